"""Resuming is exact, and refused where it would not be.

Each run here is interrupted inside one process by an event sink that raises; `tests/faults/test_kill.py` does the
same to real processes with SIGKILL. Exact means: the same log and evaluation lines, and the same weights, bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuneflow.errors import FineTuneFlowError, ResumeError
from finetuneflow.events import metric_lines
from finetuneflow.training import checkpoints
from finetuneflow.training.status import request_stop, run_status
from models.tiny import save_tiny
from training.workbench import Bench, all_events, assert_same_result, at, lines, sums, weights, write_rows

# 24 training rows in batches of 2 x 2: 6 steps an epoch, 12 in all; checkpoints at 4, 8 and 12, log lines at 3, 6, 9 and 12.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method__dropout": 0.2},
    "lora-8bit-optimizer": {"training__optimizer": "adamw_8bit"},
    "lora-bf16": {"training__precision": "bf16", "method__dropout": 0.2},
    "lora-head": {"method__modules_to_save": ["lm_head"]},
    "dora": {"method__kind": "dora"},
    "qlora": {"method__kind": "qlora", "method__dropout": 0.2},
    "ia3": {"method__kind": "ia3"},
    "prefix": {"method__kind": "prefix", "method__num_virtual_tokens": 4},
    "full": {"method__kind": "full", "training__learning_rate": 1e-4},
    "full-bf16": {"method__kind": "full", "training__precision": "bf16", "training__learning_rate": 1e-4},
}


@pytest.fixture
def stopped(bench: Bench) -> Path:
    """A run that was stopped after step 6 and can be resumed."""
    bench.train(sinks=[stops_after(bench, 6)])
    return bench.newest()


def stops_after(bench: Bench, step: int, *, save: bool = True) -> Any:
    return lambda event: request_stop(bench.newest(), save=save) if at("log", step=step)(event) else None


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(bench: Bench, method: str) -> None:
    settings = {"training__load_best": False, **METHODS[method]}
    straight = bench.train(**settings).run_dir
    resumed = bench.interrupted(at("log", step=9), **settings)  # in the second epoch, one step behind a checkpoint
    assert run_status(resumed) == "failed"
    bench.resume(resumed)
    assert_same_result(straight, resumed)


@pytest.mark.parametrize(
    ("moment", "settings"),
    [
        pytest.param(
            at("log", step=7), {"training__save_steps": 6, "training__log_steps": 1}, id="checkpoint at the end of an epoch"
        ),
        pytest.param(at("log", step=10), {"training__log_steps": 5}, id="log window open across the checkpoint"),
        pytest.param(
            at("checkpoint", step=4), {"training__gradient_accumulation": 5}, id="epoch that ends within an accumulated step"
        ),
        pytest.param(at("eval", step=8), {}, id="between evaluation and its checkpoint"),
        pytest.param(at("phase", name="saving", step=8), {}, id="during a checkpoint"),
        pytest.param(at("checkpoint", step=8), {}, id="right after a checkpoint"),
        pytest.param(at("checkpoint", step=12), {}, id="after the last step"),
        pytest.param(at("phase", name="evaluating"), {}, id="after the result was saved"),
        pytest.param(
            at("checkpoint", step=7),
            {"training__max_steps": 7, "training__save_steps": 7},
            id="after the last of max_steps, within an epoch",
        ),
        pytest.param(at("checkpoint", step=9), {"training__epochs": 1.5}, id="after the last step of one and a half epochs"),
    ],
)
def test_any_moment_of_interruption_leads_to_the_same_end(bench: Bench, moment: Any, settings: dict[str, Any]) -> None:
    settings = {"method__dropout": 0.2, **settings}
    straight = bench.train(**settings).run_dir
    resumed = bench.interrupted(moment, **settings)
    bench.resume(resumed)
    assert_same_result(straight, resumed)
    assert metrics(resumed, "best_step", "eval_loss", "train_loss", "steps") == metrics(
        straight, "best_step", "eval_loss", "train_loss", "steps"
    )


def metrics(run_dir: Path, *names: str) -> list[Any]:
    found = json.loads((run_dir / "metrics.json").read_text())
    return [found[name] for name in names]


def test_a_run_may_be_interrupted_again_and_again(bench: Bench) -> None:
    straight = bench.train(method__dropout=0.2).run_dir
    resumed = bench.interrupted(at("log", step=6), method__dropout=0.2)
    for moment in (at("checkpoint", step=8), at("log", step=9)):
        with pytest.raises(BaseException):  # noqa: B017 - the stand-in of a kill, wrapped
            bench.resume(resumed, sinks=[_dies(moment)])
    bench.resume(resumed)
    assert_same_result(straight, resumed)


def _dies(moment: Any) -> Any:
    from training.workbench import dies

    return dies(moment)


def test_events_count_without_a_gap_over_all_attempts(bench: Bench) -> None:
    resumed = bench.interrupted(at("log", step=9))
    bench.resume(resumed)
    events = all_events(resumed)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["attempt"] for event in events if event["event"] == "started"] == [1, 2]
    assert events[-1]["event"] == "complete"


# --- stopping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 4, 6, 12])
def test_a_stop_changes_nothing_of_the_result(bench: Bench, step: int) -> None:
    """Also at step 4, where an evaluation is due that decides about the best weights, and at the very last step."""
    settings = {"method__dropout": 0.2, "training__log_steps": 1}
    straight = bench.train(**settings).run_dir
    result = bench.train(**settings, sinks=[stops_after(bench, step)])
    assert (result.status, run_status(result.run_dir)) == ("stopped", "stopped")
    assert bench.seen("stopped")[0]["step"] == step and bench.seen("checkpoint", step=step)
    assert bench.resume(result.run_dir).status == "succeeded"
    assert_same_result(straight, result.run_dir)


def test_a_stop_without_saving_leaves_the_last_checkpoint_as_it_was(bench: Bench) -> None:
    straight = bench.train().run_dir
    result = bench.train(sinks=[stops_after(bench, 6, save=False)])
    assert result.status == "stopped" and [c.step for c in checkpoints.list_complete(result.run_dir / "checkpoints")] == [4]
    bench.resume(result.run_dir)
    assert_same_result(straight, result.run_dir)


def test_a_stop_asked_for_before_a_run_died_does_not_stop_the_next_attempt(bench: Bench) -> None:
    run_dir = bench.interrupted(at("log", step=6))
    request_stop(run_dir)
    assert bench.resume(run_dir).status == "succeeded"


# --- best weights and early stopping ----------------------------------------------------------------


def overfitting(bench: Bench) -> dict[str, Any]:
    """Held-out rows that contradict the training rows: the evaluation gets worse, so that patience ends the run."""
    held_out = write_rows(
        bench.root / "held-out.jsonl", [{"instruction": row["instruction"], "output": "qwertz " * 3} for row in sums(6, start=50)]
    )
    return {
        "data__eval": [str(held_out)],
        "training__max_steps": 40,
        "training__learning_rate": 0.02,
        "method__modules_to_save": ["lm_head"],
        "training__scheduler": "constant",
        "training__warmup_ratio": 0.0,
        "training__eval_steps": 2,
        "training__save_steps": 3,
        "training__log_steps": 1,
        "training__patience": 2,
    }


def test_early_stopping_ends_at_the_same_step_after_a_resume(bench: Bench) -> None:
    settings = overfitting(bench)
    straight = bench.train(**settings)
    stopped_at = bench.seen("decision", setting="training.patience")[0]["value"]
    assert straight.metrics["steps"] == stopped_at == straight.metrics["best_step"] + 2 * 2 < 40
    resumed = bench.interrupted(at("eval", step=stopped_at - 2), **settings)
    bench.resume(resumed)
    assert_same_result(straight.run_dir, resumed)


def test_a_run_that_died_after_stopping_early_does_not_train_on(bench: Bench) -> None:
    settings = overfitting(bench)
    straight = bench.train(**settings)
    resumed = bench.interrupted(at("phase", name="saving", step=None), **settings)
    bench.resume(resumed)
    assert not bench.seen("log")
    assert_same_result(straight.run_dir, resumed)


def test_the_best_step_survives_a_resume(bench: Bench) -> None:
    """The best evaluation lies before the checkpoint that is resumed from, and its weights are the ones kept."""
    settings = {**overfitting(bench), "training__patience": None, "training__max_steps": 14}
    straight = bench.train(**settings)
    best = straight.metrics["best_step"]
    assert best < 12
    resumed = bench.interrupted(at("log", step=14), **settings)
    again = bench.resume(resumed)
    assert again.metrics["best_step"] == best and again.metrics["eval_loss"] == straight.metrics["best_eval_loss"]
    assert_same_result(straight.run_dir, resumed)
    kept = resumed / "checkpoints" / f"step-{best:06d}" / "adapter_model.safetensors"
    from safetensors.numpy import load_file

    assert {name: tensor.tobytes() for name, tensor in load_file(str(kept)).items()} == weights(resumed)


# --- damaged checkpoints ----------------------------------------------------------------------------


def checkpoint_files(run_dir: Path, step: int) -> Iterator[Path]:
    yield from sorted(p for p in (run_dir / "checkpoints" / f"step-{step:06d}").rglob("*") if p.is_file())


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "complete.json"]
)
def test_a_damaged_checkpoint_is_passed_over_for_the_older_one_and_the_event_says_why(bench: Bench, name: str) -> None:
    straight = bench.train().run_dir
    resumed = bench.interrupted(at("log", step=9))
    path = resumed / "checkpoints" / "step-000008" / name
    data = bytearray(path.read_bytes())
    data[0 if name == "complete.json" else len(data) // 2] ^= (
        0x01  # within the marker, a digit of another file's hash may lie there
    )
    path.write_bytes(bytes(data))
    bench.resume(resumed)
    (warning,) = bench.seen("warning", code="CHECKPOINT_DAMAGED")
    assert "step-000008" in warning["message"] and name in warning["message"] and "step-000004" in warning["advice"]
    assert_same_result(straight, resumed)


def test_one_flipped_bit_anywhere_in_a_checkpoint_is_found(bench: Bench) -> None:
    """Every file in turn, the marker bit by bit: nothing damaged is ever taken for whole, and no damage is a crash."""
    run_dir = bench.interrupted(at("log", step=9))
    files = list(checkpoint_files(run_dir, 8))
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "progress.json", "complete.json"} <= {
        p.name for p in files
    }
    for path in files:
        whole = path.read_bytes()
        bits = range(0, 8 * len(whole), 7) if path.name == checkpoints.MARKER else [4 * len(whole)]
        for bit in bits:
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bytes(damaged))
            reason = checkpoints.find_damage(path.parent)
            same_meaning = path.name == checkpoints.MARKER and _same_files(whole, bytes(damaged))
            assert reason or same_meaning, f"bit {bit} of {path.name}"
        path.write_bytes(whole)
    assert checkpoints.find_damage(run_dir / "checkpoints" / "step-000008") is None


def _same_files(whole: bytes, damaged: bytes) -> bool:
    """Whether a flipped bit left the list of files as it was: a blank that became another blank, the step's digit."""
    try:
        return bool(json.loads(whole)["files"] == json.loads(damaged)["files"])
    except (ValueError, KeyError):
        return False


def test_without_any_whole_checkpoint_the_run_is_not_resumed_and_each_is_named(bench: Bench) -> None:
    run_dir = bench.interrupted(at("log", step=9))
    for step in (4, 8):
        (run_dir / "checkpoints" / f"step-{step:06d}" / "optimizer.pt").unlink()
    with pytest.raises(ResumeError) as caught:
        bench.resume(run_dir)
    assert caught.value.code == "RESUME_NO_CHECKPOINT"
    assert "step-000008: optimizer.pt is missing" in caught.value.message and "step-000004" in caught.value.message


def test_a_best_checkpoint_that_was_damaged_is_reported_and_the_last_weights_are_kept(bench: Bench) -> None:
    settings = {**overfitting(bench), "training__patience": None, "training__max_steps": 12}
    best = bench.train(**settings).metrics["best_step"]
    assert best < 12

    def spoil(event: dict[str, Any]) -> None:
        if at("checkpoint", step=12)(event):
            (bench.newest() / "checkpoints" / f"step-{best:06d}" / "adapter_model.safetensors").write_bytes(b"")

    result = bench.train(**settings, sinks=[spoil])
    assert result.status == "succeeded" and bench.seen("warning", code="BEST_CHECKPOINT_DAMAGED")
    assert result.metrics["eval_loss"] == metric_lines(result.run_dir / "events.jsonl", "eval")[-1]["eval_loss"]


# --- refusals ---------------------------------------------------------------------------------------


def test_a_finished_run_is_not_resumed(bench: Bench) -> None:
    run_dir = bench.train().run_dir
    before = all_events(run_dir)
    with pytest.raises(ResumeError) as caught:
        bench.resume(run_dir)
    assert caught.value.code == "RESUME_FINISHED" and all_events(run_dir) == before


def test_a_run_without_a_checkpoint_is_not_resumed(bench: Bench) -> None:
    for moment in (at("log", step=3), at("phase", name="loading"), at("phase", name="tokenizing")):
        run_dir = bench.interrupted(moment)
        with pytest.raises(ResumeError) as caught:
            bench.resume(run_dir)
        assert caught.value.code == "RESUME_NO_CHECKPOINT"


def change_setting(bench: Bench, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = run_dir / "run.yaml"
    path.write_text(path.read_text().replace("weight_decay: 0.01", "weight_decay: 0.02"))
    return "training.weight_decay was 0.01 and is now 0.02"


def change_data(bench: Bench, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    write_rows(bench.data, sums(29))
    return "sums.jsonl"


def change_tokenizer(bench: Bench, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = bench.base / "tokenizer.json"
    text = json.loads(path.read_text())
    text["model"]["merges"].pop()
    path.write_text(json.dumps(text))
    return "tokenizer changed"


def change_template(bench: Bench, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = bench.base / "chat_template.jinja"
    path.write_text(path.read_text().replace("\n", "\n\n", 1) + " ")
    return "template changed"


def change_base(bench: Bench, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = bench.base / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    return "base model changed"


def change_code(bench: Bench, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("finetuneflow.training.lineage.source_digest", lambda *rooms: "other")
    return "code changed"


def change_package(bench: Bench, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    from finetuneflow.training import lineage

    found = {**lineage.versions(), "peft": "0.0.1"}
    monkeypatch.setattr(lineage, "versions", lambda: found)
    return "peft was"


CHANGES = [change_setting, change_data, change_tokenizer, change_template, change_base, change_code, change_package]


@pytest.fixture
def own_base(bench: Bench) -> None:
    """A copy of the base model that a test may change."""
    bench.base = Path(shutil.copytree(bench.base, bench.root / "own-base"))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_shapes_the_result_is_named_and_refused(
    own_base: None, bench: Bench, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.train(sinks=[stops_after(bench, 6)])
    run_dir = bench.newest()
    before = {
        path: path.read_bytes()
        for path in sorted(run_dir.rglob("*"))
        if path.is_file() and path.name not in ("events.jsonl", "lock")
    }
    expected = change(bench, run_dir, monkeypatch)
    if change is change_setting:
        before[run_dir / "run.yaml"] = (run_dir / "run.yaml").read_bytes()
    with pytest.raises(ResumeError) as caught:
        bench.resume(run_dir)
    assert caught.value.code == "RESUME_CHANGED" and expected in caught.value.message and "--accept-changes" in str(caught.value)
    # The tokenizer and its template are files of the base model too.
    assert len(set(caught.value.context["changes"]) - {"base model changed"}) <= 1, "only what changed is named"
    after = {path: path.read_bytes() for path in before}
    assert after == before, "a refused resume leaves the run as it was"


def test_accepted_changes_are_recorded_and_the_run_goes_on(stopped: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    change_setting(bench, stopped, monkeypatch)
    result = bench.resume(stopped, accept_changes=True)
    (decision,) = bench.seen("decision", setting="resume")
    assert "training.weight_decay" in decision["reason"] and result.status == "succeeded"
    assert [event["step"] for event in bench.seen("log")] == [9, 12]


def test_what_was_accepted_once_is_what_the_next_resume_compares_with(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.train(sinks=[stops_after(bench, 3)])
    run_dir = bench.newest()
    change_setting(bench, run_dir, monkeypatch)
    bench.resume(run_dir, accept_changes=True, sinks=[stops_after(bench, 6)])
    assert bench.resume(run_dir).status == "succeeded"


def test_settings_that_shape_no_result_may_change(stopped: Path, bench: Bench) -> None:
    path = stopped / "run.yaml"
    path.write_text(
        path.read_text().replace("keep_checkpoints: 3", "keep_checkpoints: 9").replace("  samples: 0", "  samples: 1")
    )
    assert bench.resume(stopped).status == "succeeded"


def test_a_resume_keeps_the_measured_thread_count(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums split over another number of threads round differently: what was measured once holds for the whole run."""
    from finetuneflow import hardware

    monkeypatch.setattr(hardware, "measure_threads", lambda *a, **k: hardware.ThreadChoice(1, {}, "measured"))
    bench.train(training__threads=None, sinks=[stops_after(bench, 6)])
    monkeypatch.setattr(hardware, "measure_threads", lambda *a, **k: pytest.fail("measured again"))
    assert bench.resume(bench.newest()).status == "succeeded"
    assert torch.get_num_threads() == 1


def test_a_second_process_on_a_run_is_told_who_is_working_on_it(stopped: Path, bench: Bench) -> None:
    import os

    from finetuneflow.workspace import directory_lock

    before = all_events(stopped)
    with directory_lock(stopped), pytest.raises(FineTuneFlowError) as caught:
        bench.resume(stopped)
    assert caught.value.code == "RUN_BUSY" and str(os.getpid()) in caught.value.message
    assert all_events(stopped) == before


@pytest.mark.parametrize("architecture", ["gemma", "gpt2"])
def test_full_fine_tuning_of_tied_weights_resumes_exactly(bench: Bench, architecture: str) -> None:
    bench.base = save_tiny(bench.root / architecture, architecture, hidden=32)
    settings = {"method__kind": "full", "training__learning_rate": 1e-4}
    straight = bench.train(**settings).run_dir
    resumed = bench.interrupted(at("log", step=9), **settings)
    bench.resume(resumed)
    assert_same_result(straight, resumed)


def test_lines_of_a_resumed_run_are_written_once_more_only_from_the_checkpoint_on(bench: Bench) -> None:
    run_dir = bench.interrupted(at("log", step=9))
    bench.resume(run_dir)
    steps = [event["step"] for event in all_events(run_dir) if event["event"] == "log"]
    assert steps == [3, 6, 9, 9, 12] and len(lines(run_dir)) == 4 + 3
