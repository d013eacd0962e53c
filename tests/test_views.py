"""What the results say in words: units, one and many, and what a figure stands for."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from face import Ftf
from finetuneflow.evaluation.compare import Comparison, measure_pairs
from finetuneflow.export.pipeline_report import KL_NOTE, Figure, PipelineRecord, StageRow, pipeline_report_text
from finetuneflow.export.redact import Redactor
from finetuneflow.export.scoring import _judge
from finetuneflow.terminal import RunView, console, figure_text
from finetuneflow.views_pipeline import show_pipeline

TIME = {"seq": 1, "time": "2026-01-01T00:00:00+00:00"}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(path: Path, count: int, word: str = "question") -> Path:
    return write(path, *({"question": f"{word} {n}?", "answer": f"It is {n}."} for n in range(count)))


# --- a dry run ------------------------------------------------------------------------------------------


def dry_run(ftf: Ftf, workspace: Path, *overrides: str) -> str:
    workspace.with_suffix(".yaml").write_text("model: {base: starter}\n")
    settings = (part for text in overrides for part in ("--set", text))
    answer = ftf("train", workspace.with_suffix(".yaml"), "--dry-run", "--workspace", workspace, *settings)
    assert answer.code == 0, answer.err
    return answer.out


def test_a_dry_run_of_ppo_says_that_answers_are_drawn(ftf: Ftf, tmp_path: Path) -> None:
    data = questions(tmp_path / "prompts.jsonl", 10)
    told = dry_run(ftf, tmp_path / "ws", f"data.train={data}", "training.objective=ppo", "reinforcement.reward=ends", "name=p")
    assert "9 prompts to train on, 1 held out" in told and "Answers to them are drawn in training" in told
    assert "0.0 %" not in told


def test_a_dry_run_tells_how_much_is_replayed(ftf: Ftf, tmp_path: Path) -> None:
    data, general = questions(tmp_path / "own.jsonl", 20), questions(tmp_path / "general.jsonl", 40, "general")
    settings = (f"data.train={data}", "data.eval_fraction=0.1", f"data.replay={general}", "data.replay_share=0.25")
    told = dry_run(ftf, tmp_path / "ws", *settings, "name=r")
    assert "24 examples to train on" in told and "6 examples of them (25.0 %) replayed from data.replay" in told
    assert "replayed" not in dry_run(ftf, tmp_path / "ws", *settings[:2], "name=plain")


# --- one and many ---------------------------------------------------------------------------------------


def test_one_is_not_told_as_many(ftf: Ftf, tmp_path: Path) -> None:
    pair = write(tmp_path / "pair.jsonl", {"prompt": "Why?", "chosen": "So it is.", "rejected": "No idea."})
    checked = ftf("data", "check", pair).out
    assert "1 of 1 row usable" in checked and "1 pair can be made" in checked
    assert "1 example in" in ftf("data", "convert", pair, "--form", "pair", "--out", tmp_path / "out.jsonl").out
    assert " on 1 item (" in Comparison("a", "b", (measure_pairs("pass", [0.0], [1.0]),), (), {}).sentence()


def test_a_folder_that_is_missing_is_told_as_such_even_where_its_name_could_be_a_hub_id(ftf: Ftf, tmp_path: Path) -> None:
    pair = questions(tmp_path / "d.jsonl", 2)
    told = ftf("data", "preview", pair, "--model", "models/mine", "--json").json
    assert told["error_code"] == "MODEL_OFFLINE" and told["detail"].startswith("There is no folder models/mine. The hub")


# --- the divergence -------------------------------------------------------------------------------------


def test_the_divergence_has_its_unit_and_a_negative_one_its_reason() -> None:
    assert figure_text("kl", 1.5) == "kl 1.500 nats" and figure_text("response_length", 7) == "response length 7.000"
    assert "an estimate" in figure_text("kl", -0.01)
    console = Console(file=io.StringIO(), width=200)
    RunView(console)({**TIME, "event": "eval", "step": 3, "eval_loss": -0.5, "eval_reward": 0.5, "eval_kl": -0.02})
    assert "kl -0.020 nats (an estimate around 0)" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("kl", "told"), [(-0.02, True), (0.3, False)])
def test_a_pipeline_tells_the_divergence_with_its_unit(
    kl: float, told: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_width", 200)
    stage: dict[str, Any] = {
        "stage": "ppo", "objective": "ppo", "method": "lora", "status": "succeeded", "gates": [],
        "start": {"kind": "fresh", "from": None, "reason": "It starts from the base."},
    }  # fmt: skip
    summary = {"pipeline": "p", "status": "succeeded", "seconds": 1.0}
    record = PipelineRecord(summary, "starter", (StageRow(stage, (Figure("kl", 0.1, kl),)),), (), (), ())
    show_pipeline(record)
    shown = capsys.readouterr().out
    assert f"kl 0.1 → {kl} nats" in shown and ("may come out below zero" in shown) is told
    report = pipeline_report_text(record, Redactor())
    assert f"0.1 → {kl} nats" in report and KL_NOTE in report


# --- a plan, an export ----------------------------------------------------------------------------------


def test_a_plan_without_data_has_no_blank_cells_and_says_what_is_missing(ftf: Ftf, tmp_path: Path) -> None:
    told = ftf("plan", "--recipe", "rlhf", "--offline", "--workspace", tmp_path / "ws").out
    rows = [line.split() for line in told.splitlines() if line.startswith(("sft ", "reward ", "ppo ", "all "))]
    assert len(rows) == 4 and all(row.count("–") == 3 for row in rows)
    assert "--set stages.sft.data.train=FILE --set stages.reward.data.train=FILE --set stages.ppo.data.train=FILE" in told


def test_a_reward_model_is_exported_with_words_about_scores() -> None:
    check = _judge([0.0, 1.0, 2.0, -1.0], [0.0, 1.0, 2.0, -1.0], 1e-4, "scores of both")
    assert "4 conversations scored, 100.0% of their pairs in the same order" in check.agreement
    assert "greedy" not in check.agreement and "logit" not in check.agreement
    assert "it ranks 1 pair the other way round" in _judge([0.0, 1.0], [1.0, 0.0], 1e-4, "scores of both").problems
