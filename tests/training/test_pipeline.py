"""Pipelines: each stage starts from the right weights, ends the same however it is interrupted, and is checked by its gates.

The references are single runs made by hand (`bench.train`) and figures read from files; nothing is compared with itself.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetuneflow.errors import FineTuneFlowError, ResumeError, TrainingError
from finetuneflow.events import Event, read_events
from finetuneflow.pipeline_config import Pipeline, build_pipeline
from finetuneflow.training import pipeline as pipelines
from finetuneflow.training.lineage import folder_digest, read_lineage
from finetuneflow.training.run import train
from finetuneflow.training.status import named_run, pipeline_dir, pipeline_status, request_stop, run_status, stage_runs
from finetuneflow.workspace import sha256_file
from training.test_preference import pairs
from training.workbench import DEFAULTS, Bench, Killed, assert_same_result, at, caused_by, dies, sums, weights, write_rows

SUITE = """
version: 1
name: sums
max_new_tokens: 4
prompts:
  - {id: never, messages: [{role: user, content: "What is 1 plus 2?"}], check: {equals: zzzz}, must_stop: false}
  - {id: always, messages: [{role: user, content: "What is 2 plus 2?"}], check: {not_contains: zzzz}, must_stop: false}
"""


@dataclass
class Line:
    """A bench for pipelines: two supervised stages on a tiny model unless a test asks for others."""

    bench: Bench
    events: list[Event] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.bench.root

    def values(self, *stages: dict[str, Any], **more: Any) -> dict[str, Any]:
        shared: dict[str, Any] = {"model": {"base": str(self.bench.base)}}
        for key, value in DEFAULTS.items():
            section, _, name = key.rpartition(".")
            if section:
                shared.setdefault(section, {})[name] = value
        shared["training"] |= {"epochs": 1, "save_steps": 2, "eval_steps": 2, "log_steps": 1}
        return {"name": "line", **shared, **more, "stages": list(stages or self.two_stages())}

    def two_stages(self) -> list[dict[str, Any]]:
        write_rows(self.root / "second.jsonl", sums(30, start=50))
        return [
            {"name": "general", "data": {"train": str(self.bench.data)}},
            {"name": "special", "data": {"train": str(self.root / "second.jsonl")}, "method": {"dropout": 0.2}},
        ]

    def build(self, *stages: dict[str, Any], **more: Any) -> Pipeline:
        return build_pipeline(self.values(*stages, **more))

    def train(
        self, pipeline: Pipeline | None = None, *, sinks: Iterable[Callable[[Event], None]] = ()
    ) -> pipelines.PipelineResult:
        self.events = []
        return pipelines.train_pipeline(
            pipeline or self.build(), workspace=self.bench.workspace, sinks=[self.events.append, *sinks]
        )

    def resume(
        self, directory: Path, *, sinks: Iterable[Callable[[Event], None]] = (), **options: Any
    ) -> pipelines.PipelineResult:
        self.events = []
        return pipelines.resume_pipeline(directory, workspace=self.bench.workspace, sinks=[self.events.append, *sinks], **options)

    def newest(self) -> Path:
        workspace = self.bench.workspace
        return workspace.pipelines_dir / workspace.pipeline_names()[-1]

    def killed(self, when: Callable[[Event], bool], pipeline: Pipeline | None = None) -> Path:
        """A pipeline that ends, as if killed, right after the first event that `when` accepts."""
        with pytest.raises(BaseException) as caught:
            self.train(pipeline, sinks=[dies(when)])
        assert caused_by(caught.value, Killed)
        return self.newest()

    def seen(self, name: str, **fields: Any) -> list[Event]:
        return [e for e in self.events if e["event"] == name and all(e.get(k) == v for k, v in fields.items())]


@pytest.fixture
def line(bench: Bench) -> Line:
    return Line(bench)


@pytest.fixture(scope="module")
def straight(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """The directory of an uninterrupted pipeline, made once: its second stage continues the first, or trains on its merged result."""

    @functools.cache
    def made(merges: bool) -> Path:
        root = tmp_path_factory.mktemp("straight")
        line = Line(Bench(root, tiny_base, write_rows(root / "sums.jsonl", sums(30))))
        return line.train(line.build(*(merging(line) if merges else line.two_stages()))).directory

    return made


def merging(line: Line) -> list[dict[str, Any]]:
    """The second stage makes an adapter of its own, with dropout: its weights depend on the random state too."""
    stages = line.two_stages()
    stages[1] |= {"start": "merge", "method": {"r": 4, "dropout": 0.2}}
    return stages


def in_run(line: Line, stage: str, when: Callable[[Event], bool]) -> Callable[[Event], bool]:
    """Accepts an event of a stage's run, not of the stages before."""
    return lambda event: bool(line.seen("stage", stage=stage)) and when(event)


def result(directory: Path, stage: str) -> Path:
    return stage_runs(directory)[stage]


# --- each stage starts from the right weights -----------------------------------------------------------


def test_a_pipeline_equals_its_runs_made_by_hand(line: Line) -> None:
    made = line.train()
    bench = line.bench
    first = bench.train(line.build().stages[0].config.model_copy(update={"name": "by-hand"})).run_dir
    second_config = line.build().stages[1].config
    model = second_config.model.model_copy(update={"adapter": str(first / "adapter")})
    # What is continued keeps the method it was made with: the dropout that the second stage asks for has no effect.
    second = bench.train(second_config.model_copy(update={"model": model, "name": "by-hand"})).run_dir
    assert made.status == "succeeded"
    assert_same_result(first, result(made.directory, "general"))
    assert_same_result(second, result(made.directory, "special"))
    assert weights(first) != weights(second)


def test_after_full_fine_tuning_a_stage_starts_from_the_whole_model(line: Line) -> None:
    full = {"kind": "full"}
    stages = [
        {
            "name": "one",
            "data": {"train": str(line.bench.data)},
            "method": full,
            "training": {"max_steps": 2, "learning_rate": 1e-4},
        },
        {"name": "two", "data": {"train": str(line.bench.data)}, "training": {"max_steps": 2}},
    ]
    made = line.train(line.build(*stages))
    one, two = result(made.directory, "one"), result(made.directory, "two")
    config = yaml.safe_load((two / "run.yaml").read_text())
    assert config["model"]["base"] == str(one / "model") and config["model"]["adapter"] is None
    assert line.seen("decision", setting="stages.two.start")[0]["value"] == "model"
    parent = read_lineage(two)["parents"][0]
    assert (parent["run"], parent["how"], parent["sha256"]) == (one.name, "model", folder_digest(one / "model"))


def test_another_rank_merges_the_adapter_before(line: Line) -> None:
    stages = line.two_stages()
    stages[1] |= {"method": {"r": 4}, "training": {"max_steps": 2}}
    made = line.train(line.build(*stages))
    special = result(made.directory, "special")
    config = yaml.safe_load((special / "run.yaml").read_text())
    assert config["model"]["base"] == str(special / "base") and config["method"]["r"] == 4
    assert read_lineage(special)["parents"][0]["how"] == "merge"
    said = line.seen("decision", setting="stages.special.start")[0]
    assert said["value"] == "merge" and "method.r 4 where 16 was" in said["reason"]


def test_a_stage_behind_a_merged_one_starts_from_the_merged_base(line: Line) -> None:
    stages = [*line.two_stages(), {"name": "third", "data": {"train": str(line.bench.data)}, "training": {"max_steps": 2}}]
    stages[1] |= {"start": "merge", "training": {"max_steps": 2}}
    made = line.train(line.build(*stages))
    special, third = result(made.directory, "special"), result(made.directory, "third")
    config = yaml.safe_load((third / "run.yaml").read_text())
    assert config["model"]["base"] == str(special / "base") and config["model"]["adapter"] == str(special / "adapter")


def test_a_reward_stage_is_passed_over_and_rewards_the_stage_that_names_it(line: Line) -> None:
    prompts = str(line.bench.data)
    stages = [
        {"name": "sft", "data": {"train": prompts}, "training": {"max_steps": 2}},
        {
            "name": "reward",
            "training": {"objective": "reward", "max_steps": 2},
            "data": {"train": str(write_rows(line.root / "pairs.jsonl", pairs(24)))},
        },
        {
            "name": "rl",
            "data": {"train": prompts},
            "training": {"objective": "rloo", "max_steps": 1, "batch_size": 4},
            "reinforcement": {"reward": "stage:reward", "samples_per_prompt": 4, "max_new_tokens": 4},
        },
    ]
    made = line.train(line.build(*stages))
    sft, reward, rl = (result(made.directory, name) for name in ("sft", "reward", "rl"))
    taken = {parent["how"]: parent["run"] for parent in read_lineage(rl)["parents"]}
    assert taken == {"continue": sft.name, "reward": reward.name}
    assert yaml.safe_load((rl / "run.yaml").read_text())["reinforcement"]["reward"] == [f"model:{reward}"]
    assert read_lineage(reward)["parents"][0]["run"] == sft.name
    assert named_run(line.bench.workspace, made.directory.name) == rl


def test_runs_of_a_pipeline_that_was_deleted_are_not_taken_for_those_of_the_next(line: Line) -> None:
    stage = line.two_stages()[0] | {"training": {"max_steps": 2}}
    first = line.train(line.build(stage)).directory
    left = result(first, "general")
    shutil.rmtree(first)
    second = line.train(line.build(stage | {"training": {"max_steps": 3}})).directory
    assert second.name != first.name and result(second, "general") != left
    assert json.loads((result(second, "general") / "metrics.json").read_text())["steps"] == 3


def test_a_stage_alone_is_a_pipeline_too(line: Line) -> None:
    assert line.train(line.build(line.two_stages()[0])).status == "succeeded"


# --- interrupted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(at("log", step=5), id="between two checkpoints"),
        pytest.param(at("phase", name="loading"), id="before the first checkpoint"),
        pytest.param(at("phase", name="evaluating"), id="after the result was saved"),
        pytest.param(at("stage", stage="special", status="succeeded"), id="after the run has ended"),
    ],
)
def test_a_pipeline_killed_in_its_second_stage_ends_with_the_same_weights(
    line: Line, straight: Callable[[bool], Path], moment: Callable[[Event], bool]
) -> None:
    resumed = line.killed(in_run(line, "special", moment), line.build(*merging(line)))
    first = {path: path.stat().st_mtime_ns for path in result(resumed, "general").rglob("*") if path.is_file()}
    assert line.resume(resumed).status == "succeeded"
    assert_same_result(result(straight(True), "special"), result(resumed, "special"))
    assert first == {path: path.stat().st_mtime_ns for path in result(resumed, "general").rglob("*") if path.is_file()}
    assert line.seen("stage", stage="general", status="kept")


def test_a_pipeline_killed_between_its_stages_begins_the_next(line: Line, straight: Callable[[bool], Path]) -> None:
    resumed = line.killed(at("stage", stage="general", status="succeeded"))
    assert set(stage_runs(resumed)) == {"general"} and pipeline_status(resumed) == "failed"
    line.resume(resumed)
    assert_same_result(result(straight(False), "special"), result(resumed, "special"))


def test_a_stop_of_the_pipeline_saves_the_stage_and_both_go_on(line: Line, straight: Callable[[bool], Path]) -> None:
    def stops(event: Event) -> None:
        if in_run(line, "special", at("log", step=3))(event):
            request_stop(line.newest())

    stopped = line.train(sinks=[stops])
    assert (stopped.status, pipeline_status(stopped.directory)) == ("stopped", "stopped")
    assert run_status(result(stopped.directory, "special")) == "stopped"
    assert line.resume(stopped.directory).status == "succeeded"
    assert_same_result(result(straight(False), "special"), result(stopped.directory, "special"))


def test_a_stop_between_stages_is_obeyed(line: Line) -> None:
    def stops(event: Event) -> None:
        if at("stage", stage="general", status="succeeded")(event):
            request_stop(line.newest())

    stopped = line.train(sinks=[stops])
    assert stopped.status == "stopped" and set(stage_runs(stopped.directory)) == {"general"}


def test_the_own_copy_of_the_file_counts_on_resume(line: Line) -> None:
    stages = line.two_stages()
    stages[1] |= {"method": {"r": 16, "alpha": 4}}  # the rank is the default one, and chosen all the same
    stages[0] |= {"method": {"r": 4}}
    resumed = line.killed(at("stage", stage="general", status="succeeded"), line.build(*stages))
    line.resume(resumed)
    assert read_lineage(result(resumed, "special"))["parents"][0]["how"] == "merge"
    assert yaml.safe_load((result(resumed, "special") / "run.yaml").read_text())["method"]["r"] == 16


def test_an_interrupt_while_measuring_is_told_and_the_measure_made_later(line: Line) -> None:
    (line.root / "suite.yaml").write_text(SUITE)
    pipeline = line.build(line.two_stages()[0], measure={"suites": [str(line.root / "suite.yaml")], "general_text": None})

    def interrupts(event: Event) -> None:
        if at("phase", name="measuring general")(event):
            raise KeyboardInterrupt

    with pytest.raises(TrainingError) as caught:
        line.train(pipeline, sinks=[interrupts])
    assert caught.value.code == "TRAINING_INTERRUPTED" and "ftf resume line-" in str(caught.value.remedy)
    assert line.resume(line.newest()).status == "succeeded"
    assert [event["stage"] for event in line.seen("measured")] == ["general"]  # the base is not asked again


def test_a_finished_pipeline_is_not_resumed(line: Line) -> None:
    made = line.train(line.build(line.two_stages()[0]))
    with pytest.raises(ResumeError) as caught:
        line.resume(made.directory)
    assert caught.value.code == "RESUME_FINISHED"


@pytest.mark.parametrize("harm", ["changed", "gone", "no hash"])
def test_a_changed_result_of_an_earlier_stage_is_refused(line: Line, harm: str) -> None:
    resumed = line.killed(in_run(line, "special", at("log", step=3)))
    adapter = result(resumed, "general") / "adapter"
    if harm == "gone":
        shutil.rmtree(adapter)
    elif harm == "no hash":
        lineage = read_lineage(result(resumed, "general"))
        (adapter.parent / "lineage.json").write_text(json.dumps({**lineage, "result": ["x"]}))
    else:
        file = adapter / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ResumeError) as caught:
        line.resume(resumed, accept_changes=True)
    assert caught.value.code == "RESUME_CHANGED" and "general" in caught.value.message and harm in caught.value.message
    assert "`--accept-changes` holds for settings, data and code, not" in str(caught.value.remedy)


# --- gates ------------------------------------------------------------------------------------------------


def test_a_gate_stops_the_pipeline_and_can_be_accepted_once(line: Line) -> None:
    stages = line.two_stages()
    stages[0]["gate"] = ["eval loss < 0.001"]
    stages[1]["gate"] = ["eval loss < 0.002"]
    with pytest.raises(TrainingError) as caught:
        line.train(line.build(*stages))
    directory = line.newest()
    assert caught.value.code == "PIPELINE_GATE" and caught.value.exit_code == 6 and "eval loss is" in caught.value.message
    assert pipeline_status(directory) == "gated" and set(stage_runs(directory)) == {"general"}
    with pytest.raises(TrainingError, match="general did not pass"):
        line.resume(directory)
    with pytest.raises(TrainingError, match="special did not pass"):  # accepting is for the gate it stands at
        line.resume(directory, accept_gate=True)
    assert line.resume(directory, accept_gate=True).status == "succeeded"
    gates = {stage["stage"]: stage["gates"][0] for stage in json.loads((directory / "state.json").read_text())["stages"]}
    assert all(gate["accepted"] and not gate["passed"] for gate in gates.values())


def test_a_change_that_was_measured_once_is_not_shown(line: Line) -> None:
    stage = line.two_stages()[0] | {"gate": ["eval loss fell"], "training": {"eval_steps": 1000}}
    with pytest.raises(TrainingError, match="only once"):
        line.train(line.build(stage))


def test_gates_on_what_is_measured_compare_with_where_the_stage_started(line: Line) -> None:
    (line.root / "suite.yaml").write_text(SUITE)
    stage = line.two_stages()[0]
    stage["gate"] = ["acceptance >= 50 %", "sums <= 0.5", "forgetting < 100 %", "forgetting >= -100 %", "eval loss fell"]
    made = line.train(line.build(stage, measure={"suites": [str(line.root / "suite.yaml")]}))
    assert made.status == "succeeded"
    assert [event["stage"] for event in line.seen("measured")] == ["base", "general"]
    base, tuned = (json.loads((made.directory / "evals" / f"{name}.json").read_text()) for name in ("base", "general"))
    change = tuned["general"]["bits_per_byte"] / base["general"]["bits_per_byte"] - 1
    found = {event["gate"]: event["found"] for event in line.seen("gate")}
    assert found["forgetting < 100 %"] == f"forgetting is {100 * change:.1f} %" and found["sums <= 0.5"] == "sums is 50.0 %"
    report = (made.directory / "report.md").read_text()
    assert "| sums | general | 1 of 2 | 50.0 % (9.5 to 90.5) | +0.0 (+0.0 to +0.0) no evidence, from base |" in report
    assert f"{100 * change:+.1f} %" in report and "Status: succeeded" in report


def test_the_suite_as_it_was_at_the_start_measures_every_stage(line: Line) -> None:
    suite = line.root / "suite.yaml"
    suite.write_text(SUITE)
    pipeline = line.build(line.two_stages()[0], measure={"suites": [str(suite)], "general_text": None})
    resumed = line.killed(at("stage", stage="general", status="succeeded"), pipeline)
    suite.write_text("no suite any more")
    assert line.resume(resumed).status == "succeeded"


# --- what is wrong is said before anything is trained ------------------------------------------------------


def test_a_missing_file_of_a_later_stage_is_found_first(line: Line) -> None:
    stages = line.two_stages()
    (line.root / "second.jsonl").unlink()
    with pytest.raises(FineTuneFlowError) as caught:
        line.train(line.build(*stages))
    assert caught.value.code == "DATASET_NOT_FOUND" and "stage special" in str(caught.value.where)
    assert not line.bench.workspace.runs_dir.exists() and not line.bench.workspace.pipelines_dir.exists()


def test_a_failing_stage_is_named_with_the_way_on(line: Line) -> None:
    stages = line.two_stages()
    write_rows(line.root / "second.jsonl", [{"instruction": "", "output": ""}] * 10)
    with pytest.raises(FineTuneFlowError) as caught:
        line.train(line.build(*stages))
    directory = line.newest()
    assert caught.value.code == "TRAINING_NO_DATA" and "stage special" in str(caught.value.where)
    assert f"ftf resume {directory.name}" in str(caught.value.remedy) and pipeline_status(directory) == "failed"
    last = list(read_events(directory / "events.jsonl"))[-1]
    assert (last["status"], last["stage"], last["code"]) == ("failed", "special", caught.value.code)
    write_rows(line.root / "second.jsonl", sums(30, start=50))
    assert line.resume(directory).status == "succeeded" and line.seen("stage", stage="general", status="kept")


def test_two_processes_do_not_work_on_one_pipeline(line: Line) -> None:
    def second(event: Event) -> None:
        if at("log", step=1)(event):
            with pytest.raises(FineTuneFlowError) as caught:
                pipelines.resume_pipeline(line.newest(), workspace=line.bench.workspace)
            tried.append(caught.value.code)

    tried: list[str] = []
    line.train(line.build(line.two_stages()[0]), sinks=[second])
    assert set(tried) == {"RUN_BUSY"}


# --- told from the runs alone -------------------------------------------------------------------------------


def test_the_state_is_rebuilt_from_the_runs(line: Line) -> None:
    made = line.train()
    before = (made.directory / "state.json").read_text()
    (made.directory / "state.json").unlink()
    from finetuneflow.training.status import pipeline_summary

    assert pipeline_summary(made.directory) == json.loads(before)
    general = json.loads(before)["stages"][0]
    run_dir = result(made.directory, "general")
    assert (general["run"], general["status"]) == (run_dir.name, "succeeded")
    assert general["result_sha256"] == folder_digest(run_dir / "adapter")


def test_every_run_tells_its_parents_data_and_result(line: Line, with_report: None) -> None:
    bench = line.bench
    first = bench.train(training__max_steps=2).run_dir
    config = bench.config(training__max_steps=2, model__adapter=str(first))
    second = train(config, workspace=bench.workspace).run_dir
    lineage = read_lineage(second)
    assert lineage["data"] == {str(bench.data): sha256_file(bench.data)} and lineage["pipeline"] is None
    assert lineage["result"] == {"kind": "adapter", "sha256": folder_digest(second / "adapter")}
    parent = lineage["parents"][0]
    assert (parent["run"], parent["how"], parent["sha256"]) == (first.name, "continue", folder_digest(first / "adapter"))
    tree = (second / "report.md").read_text().split("## Lineage")[1]
    assert tree.index(f"└─ {first.name} (") < tree.index(f"   └─ {second.name} (sft, LoRA; continues its adapter)")


def test_latest_is_the_pipeline_of_the_newest_run(line: Line) -> None:
    workspace = line.bench.workspace
    assert pipeline_dir(workspace, "latest") is None
    made = line.train(line.build(line.two_stages()[0]))
    assert pipeline_dir(workspace, "latest") == made.directory and pipeline_dir(workspace, "line") == made.directory
    alone = line.bench.train(training__max_steps=2).run_dir
    assert pipeline_dir(workspace, "latest") is None and pipeline_dir(workspace, alone.name) is None


def test_all_stages_use_the_threads_that_the_first_one_measured(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetuneflow.hardware import ThreadChoice

    measured = iter([ThreadChoice(1, {}, "measured"), ThreadChoice(2, {}, "measured")])
    monkeypatch.setattr("finetuneflow.hardware.measure_threads", lambda **sizes: next(measured))
    values = line.values()
    values["training"] |= {"threads": None, "max_steps": 2}
    made = line.train(build_pipeline(values))
    used = [
        json.loads((run_dir / "environment.json").read_text())["setup"]["threads"]
        for run_dir in stage_runs(made.directory).values()
    ]
    assert used == [1, 1] and line.seen("decision", setting="stages.special.training.threads")
