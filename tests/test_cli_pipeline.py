"""Pipelines as a stranger uses them: the file and its mistakes, and every verb that takes one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from face import Ftf
from finetuneflow.config import BUNDLED_SUITES, parse_yaml
from finetuneflow.errors import FineTuneFlowError
from finetuneflow.events import read_events
from finetuneflow.pipeline_config import (
    build_pipeline,
    dump_pipeline,
    load_pipeline,
    names_pipeline,
    require_runnable_pipeline,
)
from finetuneflow.pipeline_gates import parse_gate
from finetuneflow.training.status import stage_runs
from models.tiny import save_tiny, tiny_tokenizer
from training.workbench import assert_same_result

ROOT = Path(__file__).parents[1]
FAST = {
    "epochs": 1, "batch_size": 2, "gradient_accumulation": 2, "log_steps": 1, "eval_steps": 2, "save_steps": 2,
    "precision": "fp32", "threads": 1, "learning_rate": 0.005,
}  # fmt: skip


def stage(name: str = "one", **settings: Any) -> dict[str, Any]:
    return {"name": name, "data": {"train": f"{name}.jsonl"}, **settings}


def built(*stages: dict[str, Any], **shared: Any) -> Any:
    return build_pipeline({"name": "p", **shared, "stages": list(stages)})


REWARD = {"training": {"objective": "reward"}}
PPO = {"training": {"objective": "ppo"}}


# --- the file -----------------------------------------------------------------------------------------


def test_later_settings_win_recipe_then_shared_then_stage_then_set(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    file = {
        "training": {"learning_rate": 0.2, "epochs": 7},
        "stages": [stage("sft", recipe="rlhf:sft", training={"epochs": 8}), stage("plain")],
    }
    path.write_text(yaml.safe_dump(file))
    sft, plain = load_pipeline(path, ["stages.sft.training.batch_size=9", "training.seed=5"]).stages
    got = sft.config.training
    # weight_decay comes from the recipe, the rate from the file's sections, epochs from the stage, the rest from --set.
    assert (got.weight_decay, got.learning_rate, got.epochs, got.batch_size, got.seed) == (0.1, 0.2, 8, 9, 5)
    assert (sft.config.method.kind, plain.config.training.epochs, plain.config.training.batch_size) == ("full", 7, 4)
    assert plain.config.training.seed == 5 and sft.origins["training.weight_decay"] == "recipe"


@pytest.mark.parametrize(
    ("stages", "starts"),
    [
        ([stage("a"), stage("b")], ["fresh:None", "continue:a"]),
        ([stage("a"), stage("r", **REWARD), stage("p", **PPO)], ["fresh:None", "continue:a", "continue:a"]),
        ([stage("a"), stage("b", method={"r": 8})], ["fresh:None", "merge:a"]),
        ([stage("a", method={"r": 8}), stage("b"), stage("c", method={"r": 8})], ["fresh:None", "continue:a", "continue:b"]),
        ([stage("a"), stage("b", method={"kind": "dora"})], ["fresh:None", "merge:a"]),
        ([stage("a"), stage("b", method={"kind": "full"})], ["fresh:None", "merge:a"]),
        ([stage("a", method={"kind": "full"}), stage("b")], ["fresh:None", "model:a"]),
        ([stage("a"), stage("b", start="stack")], ["fresh:None", "stack:a"]),
        ([stage("a"), stage("b"), stage("c", **{"from": "a"})], ["fresh:None", "continue:a", "continue:a"]),
        ([stage("a"), stage("b", start="fresh")], ["fresh:None", "fresh:None"]),
        ([stage("a"), stage("b", model={"base": "other/model"})], ["fresh:None", "fresh:None"]),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) else "",
)
def test_where_a_stage_starts_is_chosen_and_survives_being_written(stages: list[dict[str, Any]], starts: list[str]) -> None:
    pipeline = built(*stages)
    assert [f"{s.start.kind}:{s.start.parent}" for s in pipeline.stages] == starts
    assert all(s.start.reason for s in pipeline.stages)
    again = build_pipeline(parse_yaml(dump_pipeline(pipeline), where="copy"), complete=True)
    assert [s.start for s in again.stages] == [s.start for s in pipeline.stages]
    assert [s.config for s in again.stages] == [s.config for s in pipeline.stages]


def test_a_recipe_of_several_phases_is_a_pipeline_that_wants_data(tmp_path: Path) -> None:
    assert names_pipeline(None, "rlhf") and not names_pipeline(None, "rlhf:sft") and not names_pipeline(None, "lora")
    pipeline = load_pipeline(None, ["stages.sft.data.train=a.jsonl"], recipe="rlhf")
    assert [s.name for s in pipeline.stages] == ["sft", "reward", "ppo"]
    assert pipeline.stage("ppo").config.reinforcement.reward == ["stage:reward"]
    with pytest.raises(FineTuneFlowError) as caught:
        require_runnable_pipeline(pipeline)
    assert "--set stages.reward.data.train=" in str(caught.value) and "sft:" not in caught.value.message


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ({"stages": []}, ["at least one stage"]),
        ({"stages": "sft"}, ["at least one stage"]),
        ({"stages": [{"data": {"train": "a"}}]}, ["name"]),
        ({"stages": [stage("a"), stage("a")]}, ["Two stages are named 'a'"]),
        ({"stages": [stage("base")]}, ["cannot be named 'base'"]),
        ({"stages": [stage("a/b")]}, ["name"]),
        ({"stages": [stage("a", gates=["eval loss fell"])]}, ["gates", "did you mean 'gate'"]),
        ({"stages": [stage("a", trainig={})]}, ["did you mean 'training'"]),
        ({"stages": [stage("a", training={"lr": 1})]}, ["stages[0] (a)", "training.learning_rate"]),
        ({"mesure": {}, "stages": [stage("a")]}, ["did you mean 'measure'"]),
        ({"stages": [stage("a"), stage("b", **{"from": "c"})]}, ["no earlier stage 'c'"]),
        ({"stages": [stage("a", **{"from": "b"}), stage("b")]}, ["no earlier stage 'b'"]),
        ({"stages": [stage("a", start="continue")]}, ["needs an earlier stage"]),
        ({"stages": [stage("a", **REWARD), stage("b", **{"from": "a"})]}, ["reward model", "stage:a"]),
        ({"stages": [stage("a"), stage("b", start="fresh", **{"from": "a"})]}, ["start: fresh", "from: a"]),
        ({"stages": [stage("a"), stage("b", model={"adapter": "x"})]}, ["model.adapter"]),
        ({"stages": [stage("a", method={"kind": "full"}), stage("b", start="merge")]}, ["trains the whole model"]),
        ({"stages": [stage("a"), stage("b", method={"kind": "dora"}, start="continue")]}, ["lora cannot be continued as dora"]),
        ({"stages": [stage("a", method={"kind": "prefix"}), stage("b", method={"kind": "lora"})]}, ["continued only"]),
        ({"stages": [stage("a"), stage("b", start="stack", method={"kind": "qlora"})]}, ["two LoRA adapters"]),
        ({"stages": [stage("p", **PPO | {"reinforcement": {"reward": "stage:rewrd"}})]}, ["no earlier stage 'rewrd'"]),
        (
            {"stages": [stage("a"), stage("p", **PPO | {"reinforcement": {"reward": "stage:a"}})]},
            ["The stage a makes no reward model"],
        ),
        ({"stages": [stage("a", recipe="rlhf")]}, ["rlhf:sft"]),
        ({"stages": [stage("a", gate=["acceptance >= 80 %"])]}, ["measure.suites"]),
        ({"stages": [stage("a", gate=["forgetting <= 5 %"])]}, ["measure.general_text"]),
        ({"stages": [stage("a", gate=["accuracy >= 0.6"])]}, ["sft has no accuracy"]),
        ({"stages": [stage("a", gate=["perplexity <= 3"], **REWARD)]}, ["reward has no perplexity"]),
        ({"measure": {"suites": "starter"}, "stages": [stage("a", gate=["startr >= 0.5"])]}, ["did you mean 'starter'"]),
        ({"measure": {"suites": "starter"}, "stages": [stage("a", gate=["starter >= 80"])]}, ["is a share"]),
        (
            {"measure": {"suites": "starter"}, "stages": [stage("a", gate="starter > 0.1", **REWARD)]},
            ["a reward model gives no answers"],
        ),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_named_with_its_place(file: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(FineTuneFlowError) as caught:
        build_pipeline({"name": "p", **file}, where="p.yaml")
    assert caught.value.exit_code == 2 and caught.value.remedy and "p.yaml" in str(caught.value.where)
    assert all(word in f"{caught.value} {caught.value.where}" for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("text", "before", "after", "passes"),
    [
        ("accuracy >= 0.6", None, 0.6, True),
        ("accuracy > 60%", None, 0.6, False),
        ("accuracy  >=  60 %", None, 0.61, True),
        ("eval loss < 1e-1", None, 0.09, True),
        ("reward >= -2.5", None, -2.4, True),
        ("kl <= .5", None, 0.6, False),
        ("eval loss fell", 2.0, 1.9, True),
        ("eval loss fell", 2.0, 2.0, False),
        ("eval loss fell", None, 1.0, False),
        ("reward rose", -1.0, -0.5, True),
        ("perplexity <= 3", None, None, False),
        ("perplexity <= 3", None, float("nan"), False),
    ],
)
def test_gates_compare_as_they_are_written(text: str, before: float | None, after: float | None, passes: bool) -> None:
    assert parse_gate(text).passes(before, after) is passes


@pytest.mark.parametrize(
    "text",
    ["", "accuracy", "accuracy = 0.6", "accuracy >= high", ">= 0.6", "0.6 <= accuracy", "accuracy >= 0.6 or so", "reward >= 5 %",
     "eval lossfell", "accuracy >= 0.6 %%", "accuracy => 1", "eval loss fell by 3"],
)  # fmt: skip
def test_anything_else_is_no_gate_and_the_grammar_is_told(text: str) -> None:
    with pytest.raises(FineTuneFlowError) as caught:
        parse_gate(text)
    assert caught.value.code == "CONFIG_INVALID_VALUE" and "FIGURE >= NUMBER" in str(caught.value.remedy)


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "pipelines").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_pipelines_that_could_start(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their data, and suites about it, are written by the generator they name; here a small suite stands for each of those."""
    monkeypatch.chdir(tmp_path)
    for suite in yaml.safe_load(path.read_text())["measure"]["suites"]:
        if suite not in BUNDLED_SUITES:
            Path(suite).parent.mkdir(parents=True, exist_ok=True)
            prompt = {"id": "a", "messages": [{"role": "user", "content": "Hi?"}], "check": {"contains": "Hi"}}
            Path(suite).write_text(yaml.safe_dump({"version": 1, "name": Path(suite).stem, "prompts": [prompt]}))
    require_runnable_pipeline(load_pipeline(path))


# --- the verbs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "base", "llama", hidden=32)


@pytest.fixture
def place(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pipeline file of two small stages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTF_HOME", str(tmp_path / "ws"))
    for name, start in (("one", 0), ("two", 40)):
        rows = [{"instruction": f"What is {n} plus {n}?", "output": f"It is {2 * n}."} for n in range(start, start + 24)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = {
        "name": "p",
        "model": {"base": str(tiny)},
        "data": {"max_length": 96, "eval_fraction": 0.2},
        "training": FAST,
        "evaluation": {"samples": 0},
        "stages": [stage("one", gate=["eval loss <= 100"]), stage("two", start="merge", method={"r": 4, "dropout": 0.2})],
    }
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(file))
    return tmp_path


def test_plan_adds_up_times_and_takes_the_highest_memory(ftf: Ftf, place: Path) -> None:
    found = ftf("plan", "p.yaml", "--gpu", "RTX 4090", "--json").json
    rows, total = found["stages"], found["total"]
    alone = ftf("plan", "p.yaml", "--gpu", "RTX 4090", "--set", "stages.one.training.batch_size=1", "--json").json
    assert [row["stage"] for row in rows] == ["one", "two"] and rows[1]["start"]["kind"] == "merge"
    assert total["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert total["price_usd"] == pytest.approx(sum(row["price_usd"] for row in rows)) and total["price_usd"] > 0
    assert total["memory_bytes"] == max(row["memory_bytes"] for row in rows)
    assert alone["stages"][0]["steps"] > rows[0]["steps"] and alone["stages"][1] == rows[1]
    shown = ftf("plan", "p.yaml", "--offline").out
    assert "all" in shown and "merge: one" in shown


def test_lint_names_the_stage_of_each_finding(ftf: Ftf, place: Path) -> None:
    answer = ftf("lint", "p.yaml", "--set", "stages.two.method.target_modules=[lm_head]", "--json")
    by_stage = {name: {f["code"] for f in answer.json if f["stage"] == name} for name in ("one", "two")}
    assert answer.code == 2 and by_stage["two"] - by_stage["one"]
    assert ftf("lint", "p.yaml", "--fix", "--json").json["error_code"] == "CLI_USAGE"


def test_lint_knows_that_preferences_come_after_tuning(ftf: Ftf, place: Path) -> None:
    """Alone the stage would be told to tune first; behind a stage that does, adapter or whole model, it is not."""
    rows = [
        {"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": f"No idea about {n}."} for n in range(24)
    ]  # fmt: skip
    (place / "dpo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = yaml.safe_load((place / "p.yaml").read_text())
    bare = save_tiny(place / "bare", "llama", hidden=32, tokenizer=tiny_tokenizer(chat_template=False))
    dpo = stage("dpo", training={"objective": "dpo"})
    told = {}
    for name, stages in {
        "alone": [dpo],
        "behind": [stage("one"), dpo],
        "whole": [stage("one", method={"kind": "full"}), dpo],
    }.items():
        (place / "l.yaml").write_text(yaml.safe_dump({**file, "model": {"base": str(bare)}, "stages": stages}))
        found = ftf("lint", "l.yaml", "--json").json
        told[name] = "PREFERENCE_BEFORE_TUNING" in {f["code"] for f in found if f["stage"] == "dpo"}
    assert told == {"alone": True, "behind": False, "whole": False}


def test_a_dry_run_counts_every_stage_and_trains_nothing(ftf: Ftf, place: Path) -> None:
    found = ftf("train", "p.yaml", "--dry-run", "--json").json
    assert {name: part["train_examples"] + part["eval_examples"] for name, part in found["stages"].items()} == {
        "one": 24,
        "two": 24,
    }
    assert not (place / "ws" / "runs").exists() and not (place / "ws" / "pipelines").exists()


def test_a_pipeline_from_train_to_export(ftf: Ftf, place: Path) -> None:
    made = ftf("train", "p.yaml", "--json")
    assert made.code == 0 and made.json["status"] == "succeeded"
    name, last = made.json["pipeline"], made.json["stages"][-1]["run"]
    assert [row["status"] for row in made.json["stages"]] == ["succeeded", "succeeded"]
    assert made.json["stages"][0]["gates"][0]["passed"] and made.json["stages"][0]["figures"]["eval loss"]["after"] < 100

    listed = ftf("runs", "--json").json
    assert [(run["pipeline"], run["stage"]) for run in listed] == [(name, "one"), (name, "two")]
    assert [row["pipeline"] for row in ftf("runs", "--pipelines", "--json").json] == [name]
    assert "✓ one  ✓ two" in ftf("runs").out

    assert "Stage 2 of 2: two" in ftf("logs", name).out
    assert json.loads(ftf("logs", name, "--json").out.splitlines()[-1])["status"] == "succeeded"
    said = [ftf("chat", which, "--message", "Hi?", "--max-new-tokens", "4", "--json").json["answers"] for which in (name, last)]
    assert list(said[0].values()) == list(said[1].values())
    assert ftf("export", name, "--to", "adapter", "--json").code == 0
    assert (place / "ws" / "runs" / last / "exports" / "adapter").is_dir()
    assert ftf("stop", name, "--json").json == {"pipeline": name, "before": "succeeded", "status": "succeeded"}
    assert ftf("resume", name, "--json").json["error_code"] == "RESUME_FINISHED"


def test_a_reward_model_is_evaluated_by_the_verb_that_its_end_recommends(ftf: Ftf, place: Path, tiny: Path) -> None:
    pairs = [{"prompt": f"{n} plus {n}?", "chosen": f"It is {2 * n}.", "rejected": "No."} for n in range(12)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    file = {"name": "judge", "model": {"base": str(tiny)}, "data": {"train": "pairs.jsonl", "max_length": 96}}
    (place / "judge.yaml").write_text(yaml.safe_dump({**file, "training": {**FAST, "objective": "reward"}}))
    assert "ftf evaluate judge" in (trained := ftf("train", "judge.yaml")).out and trained.code == 0
    found = ftf("evaluate", "judge", "--data", "pairs.jsonl", "--json")
    assert found.code == 0 and (found.json["preferences"]["by"], found.json["preferences"]["pairs"]) == ("reward", 12)
    assert "12 pairs" in ftf("evaluate", "judge", "--data", "pairs.jsonl").out
    assert ftf("evaluate", "judge", "--suite", "starter", "--json").json["error_code"] == "MODEL_SCORES_ONLY"


def test_a_gate_ends_with_6_and_resume_accepts_it(ftf: Ftf, place: Path) -> None:
    shown = ftf("train", "p.yaml", "--set", 'stages.one.gate=["eval loss < 0.001"]')
    assert shown.code == 6 and "PIPELINE_GATE" in shown.err and "eval loss < 0.001" in shown.out and "--accept-gate" in shown.err
    name = ftf("runs", "--pipelines", "--json").json[0]["pipeline"]
    again = ftf("resume", "latest", "--json")
    assert (again.code, again.json["error_code"], again.json["context"]["stage"]) == (6, "PIPELINE_GATE", "one")
    done = ftf("resume", "latest", "--accept-gate", "--json").json
    assert (done["pipeline"], done["status"], done["stages"][0]["gates"][0]["accepted"]) == (name, "succeeded", True)
    assert "not passed, accepted" in (place / "ws" / "pipelines" / name / "report.md").read_text()


def test_what_cannot_start_is_one_error_and_leaves_nothing(ftf: Ftf, place: Path) -> None:
    (place / "two.jsonl").unlink()
    missing = ftf("train", "p.yaml", "--json")
    assert (missing.code, missing.json["error_code"]) == (3, "DATASET_NOT_FOUND") and "stage two" in missing.json["context"][
        "where"
    ]
    empty = ftf("train", "--recipe", "multi-stage", "--json")
    assert (empty.code, empty.json["error_code"]) == (2, "CONFIG_CONFLICT") and "stages.general.data.train" in empty.json[
        "detail"
    ]
    both = ftf("train", "p.yaml", "--recipe", "multi-stage", "--json")
    assert (both.code, both.json["error_code"]) == (2, "CONFIG_CONFLICT")
    nowhere = ftf("train", "p.yaml", "--set", "stages.three.training.epochs=1", "--json")
    assert nowhere.code == 2 and "three" in nowhere.json["detail"]
    assert ftf("resume", "latest", "--accept-gate", "--json").json["error_code"] == "CLI_USAGE"
    assert not (place / "ws").exists()


def test_a_pipeline_whose_file_is_damaged_is_listed_as_such(ftf: Ftf, place: Path) -> None:
    damaged = place / "ws" / "pipelines" / "p-20260101-001"
    damaged.mkdir(parents=True)
    (damaged / "pipeline.yaml").write_text("stages: [")
    assert [(row["pipeline"], row["status"]) for row in ftf("runs", "--pipelines", "--json").json] == [(damaged.name, "damaged")]
    assert "damaged" in ftf("runs", "--pipelines").out
    assert ftf("resume", damaged.name, "--json").json["error_code"] == "CONFIG_UNREADABLE"


@pytest.mark.parametrize(
    "event", ['{"event": "gate", "stage": "one", "time": "2026-01-01T00:00:00"}', '{"event": "pipeline", "time": "x"}']
)
def test_an_event_that_makes_no_sense_hides_no_pipeline(ftf: Ftf, place: Path, event: str) -> None:
    pipeline = dump_pipeline(load_pipeline(place / "p.yaml"))
    for name, events in (("p-20260101-001", event), ("p-20260101-002", "")):
        directory = place / "ws" / "pipelines" / name
        directory.mkdir(parents=True)
        (directory / "pipeline.yaml").write_text(pipeline)
        (directory / "events.jsonl").write_text(events and event.replace("{", '{"seq": 1, ', 1) + "\n")
    listed = {row["pipeline"]: row["status"] for row in ftf("runs", "--pipelines", "--json").json}
    assert listed == {"p-20260101-001": "damaged", "p-20260101-002": "interrupted"}


# --- real processes -----------------------------------------------------------------------------------------


def _started(place: Path) -> subprocess.Popen[bytes]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-m", "finetuneflow.cli", "train", "p.yaml", "--quiet"], cwd=place, env=env)


def _signal_in_second_stage(process: subprocess.Popen[bytes], place: Path, number: signal.Signals) -> Path:
    """Send the signal once the second stage has logged its third step; returns the pipeline's directory."""
    deadline = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline:
        for directory in (place / "ws" / "pipelines").glob("*"):
            run_dir = stage_runs(directory).get("two") if (directory / "pipeline.yaml").is_file() else None
            if run_dir and any(e["event"] == "log" and e["step"] >= 3 for e in read_events(run_dir / "events.jsonl")):
                os.kill(process.pid, number)
                process.wait(timeout=60)
                return directory
        time.sleep(0.005)
    raise AssertionError("the moment never came")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_pipeline_ended_by_a_signal_goes_on_to_the_same_weights(ftf: Ftf, place: Path, number: signal.Signals) -> None:
    overrides = ("--set", "training.epochs=6")
    straight = ftf("train", "p.yaml", *overrides, "--json", "--workspace", place / "straight").json
    file = yaml.safe_load((place / "p.yaml").read_text())
    file["training"]["epochs"] = 6
    (place / "p.yaml").write_text(yaml.safe_dump(file))
    process = _started(place)
    directory = _signal_in_second_stage(process, place, number)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    status = ftf("runs", "--pipelines", "--json").json[0]
    assert status["status"] == ("interrupted" if number == signal.SIGKILL else "stopped")
    assert ftf("resume", "latest", "--json").json["status"] == "succeeded"
    for name, run in (("one", straight["stages"][0]["run"]), ("two", straight["stages"][1]["run"])):
        assert_same_result(place / "straight" / "runs" / run, stage_runs(directory)[name])
