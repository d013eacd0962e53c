"""A pipeline, top to bottom: several runs, each starting from what an earlier one left.

    train_pipeline(pipeline)    makes a pipeline directory and works through its stages
    resume_pipeline(directory)  goes on at the right stage and step

Each stage is an ordinary run under `runs/`, so every verb works on it; `run.py` trains it. The pipeline's directory holds

    pipeline.yaml   every setting of every stage: this copy counts, whatever becomes of the file it was read from
    measure/        the suites and the general text that results are measured with, as they were at the start
    events.jsonl    stages, gates and decisions of all attempts         evals/   what was measured, base first
    state.json      how everything stands; a view of the runs and events, made anew after each step
    report.md       the summary for people                              lock     as of a run

The truth lies in the runs: which run belongs to which stage stands in its `lineage.json`. A finished stage is not repeated,
but its result must still have the hash it was saved with.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetuneflow.config import RunConfig, load_config
from finetuneflow.errors import FineTuneFlowError, ResumeError, StorageError, TrainingError
from finetuneflow.events import Emit, Event, EventLog, Sink
from finetuneflow.pipeline_config import (
    BASE,
    Pipeline,
    dump_pipeline,
    read_pipeline,
    require_readable,
    require_runnable_pipeline,
)
from finetuneflow.pipeline_stages import STAGE_PREFIX, Stage
from finetuneflow.training import checkpoints
from finetuneflow.training.lineage import Membership, folder_digest, read_lineage, result_folder
from finetuneflow.training.pipeline_measure import accepted_gates, gate_figures, measure_model, read_measures, with_kept_measures
from finetuneflow.training.run import as_failure
from finetuneflow.training.run import resume as resume_run
from finetuneflow.training.run import train as train_run
from finetuneflow.training.start import with_folders
from finetuneflow.training.status import (
    STOP_FILE,
    forget_stop,
    pipeline_status,
    pipeline_summary,
    recorded_result,
    request_stop,
    run_status,
    runs_of_pipelines,
    stage_runs,
)
from finetuneflow.workspace import Workspace, directory_lock, read_json_object, write_atomic, write_json

STATE_FILE = "state.json"


@dataclass(frozen=True, slots=True)
class PipelineResult:
    """How a pipeline ended: `succeeded`, or `stopped` when somebody asked for it. `state`: as in `state.json`."""

    directory: Path
    status: str
    state: dict[str, Any]


def train_pipeline(
    pipeline: Pipeline,
    *,
    workspace: Workspace | None = None,
    sinks: Sequence[Sink] = (),
    on_start: Callable[[Path], None] = lambda directory: None,
) -> PipelineResult:
    """Work through all stages in a new directory of `workspace`. Events of the pipeline and of its runs go to every sink.

    Raises `PIPELINE_GATE` where a stage does not pass its gate, and whatever a stage raises.
    """
    workspace = workspace or Workspace()
    pipeline = checked(pipeline, workspace)
    # Whose folder was deleted may have left runs: its name stays taken, or they would pass for stages of this one.
    directory = workspace.new_pipeline_dir(pipeline.name, taken=runs_of_pipelines(workspace))
    pipeline = with_kept_measures(pipeline, directory)
    write_atomic(directory / "pipeline.yaml", dump_pipeline(pipeline))
    on_start(directory)
    return _attempt(directory, pipeline, workspace, sinks, resuming=False)


def resume_pipeline(
    directory: Path,
    *,
    workspace: Workspace | None = None,
    sinks: Sequence[Sink] = (),
    accept_changes: bool = False,
    accept_gate: bool = False,
) -> PipelineResult:
    """Go on with a pipeline that was interrupted, stopped, gated or failed.

    `accept_gate`: go on behind the gate that it stands at; `accept_changes`: as for a run. Raises `ResumeError` for a pipeline
    that ended, or where the result of an earlier stage has changed.
    """
    if pipeline_status(directory) == "succeeded":
        raise ResumeError("RESUME_FINISHED", f"{directory.name} ended already.", remedy="Start a new pipeline to train further.")
    workspace = workspace or Workspace(directory.parent.parent)
    pipeline = read_pipeline(directory)
    return _attempt(directory, pipeline, workspace, sinks, resuming=True, accept_changes=accept_changes, accept_gate=accept_gate)


def checked(pipeline: Pipeline, workspace: Workspace) -> Pipeline:
    """The pipeline with absolute paths, once everything that is known to be needed later is known to be there.

    `workspace`: where the runs are whose adapters and reward models are named.
    """
    from finetuneflow.data.prepare import require_files
    from finetuneflow.training.objectives import require_named

    require_runnable_pipeline(pipeline)
    pipeline = pipeline.with_absolute_paths()
    stages = []
    for stage in pipeline.stages:
        config, data = stage.config, stage.config.data
        try:
            require_files((*data.train, *data.eval, *data.replay))
            config = with_folders(config, workspace)
            require_named(_without_stages(config))
        except FineTuneFlowError as error:
            error.where = f"stage {stage.name}" + (f": {error.where}" if error.where else "")
            raise
        stages.append(replace(stage, config=config))
    pipeline = replace(pipeline, stages=tuple(stages))
    read_measures(pipeline)
    require_readable(pipeline)
    return pipeline


def _without_stages(config: RunConfig) -> RunConfig:
    """The same without the rewards that are yet to be trained."""
    settings = config.reinforcement
    there = [text for text in settings.reward if not text.startswith(STAGE_PREFIX)]
    return config.model_copy(update={"reinforcement": settings.model_copy(update={"reward": there, "reward_weights": []})})


def _attempt(
    directory: Path,
    pipeline: Pipeline,
    workspace: Workspace,
    sinks: Sequence[Sink],
    *,
    resuming: bool,
    accept_changes: bool = False,
    accept_gate: bool = False,
) -> PipelineResult:
    """One attempt: holds the pipeline's lock, and leaves a last event that tells how it ended."""
    with directory_lock(directory), EventLog(directory / "events.jsonl", list(sinks)) as log:
        forget_stop(directory)
        log.emit("pipeline", status="started", pipeline=directory.name, pid=os.getpid(), resuming=resuming)
        worker = _Worker(directory, pipeline, workspace, log.emit, tuple(sinks), accept_changes, accept_gate)
        try:
            status = worker.run()
        except BaseException as error:
            failure = as_failure(error)
            worker.explain(failure)
            with contextlib.suppress(StorageError):
                log.emit(
                    "pipeline",
                    status="gated" if failure.code == "PIPELINE_GATE" else "failed",
                    pipeline=directory.name,
                    stage=worker.stage,
                    code=failure.code,
                    message=failure.message,
                    remedy=failure.remedy,
                )
                worker.tell("gated" if failure.code == "PIPELINE_GATE" else "failed")
            if failure is error:
                raise
            raise failure from error
        log.emit("pipeline", status=status, pipeline=directory.name, stage=worker.stage)
        state = worker.tell(status)
    return PipelineResult(directory, status, state)


class _Worker:
    """One attempt at a pipeline: works through the stages and knows at which it is."""

    def __init__(
        self,
        directory: Path,
        pipeline: Pipeline,
        workspace: Workspace,
        emit: Emit,
        sinks: tuple[Sink, ...],
        accept_changes: bool,
        accept_gate: bool,
    ) -> None:
        self.directory = directory
        self.pipeline = pipeline
        self.workspace = workspace
        self.emit = emit
        self.sinks = sinks
        self.accept_changes = accept_changes
        self.accept_gate = accept_gate
        self.stage: str | None = None
        self._run_dir: Path | None = None

    def run(self) -> str:
        """Every stage in order; `stopped` as soon as somebody asked for it."""
        runs = stage_runs(self.directory)
        self._measure(BASE, None)
        for number, stage in enumerate(self.pipeline.stages, 1):
            if (self.directory / STOP_FILE).exists():
                return "stopped"
            self.stage = stage.name
            found = runs.get(stage.name)
            finished_before = found is not None and run_status(found) == "succeeded"
            run_dir, status = self._train(stage, number, found)
            if status == "stopped":
                return "stopped"
            runs[stage.name] = run_dir
            if stage.answers:
                self._measure(stage.name, run_dir)
            self._pass_gates(stage, run_dir, may_accept=self.accept_gate and finished_before)
            self.tell()
        return "succeeded"

    # --- training a stage -----------------------------------------------------------------------------

    def _train(self, stage: Stage, number: int, run_dir: Path | None) -> tuple[Path, str]:
        """The stage's run, brought to its end: kept, resumed, or begun."""
        about = {"stage": stage.name, "objective": stage.config.training.objective, "number": number}
        about["of"] = len(self.pipeline.stages)
        _fresh_memory()
        if run_dir is not None and run_status(run_dir) == "succeeded":
            _require_unchanged(run_dir, stage.name)
            self.emit("stage", status="kept", run=run_dir.name, **about)
            return run_dir, "succeeded"
        sinks = [self._forward_stop, *self.sinks]
        if run_dir is not None and _has_checkpoint(run_dir):
            self._run_dir = run_dir
            self.emit("stage", status="resumed", run=run_dir.name, **about)
            result = resume_run(run_dir, workspace=self.workspace, sinks=sinks, accept_changes=self.accept_changes)
        else:
            config = self._config(stage)
            self._say_choices(stage, run_dir)
            member = Membership(self.directory.name, stage.name, stage.start.kind, stage.start.reason)

            def begun(new: Path) -> None:
                self._run_dir = new
                self.emit("stage", status="started", run=new.name, **about)
                self.tell()

            result = train_run(
                config, workspace=self.workspace, origins=stage.origins, sinks=sinks, on_start=begun, member=member
            )
        if result.status == "succeeded":
            self.emit("stage", status="succeeded", run=result.run_dir.name, **about)
        self._run_dir = None
        return result.run_dir, result.status

    def _config(self, stage: Stage) -> RunConfig:
        """The stage's settings with the paths of the results it takes up, each verified first."""
        runs = stage_runs(self.directory)
        config = stage.config
        _remove_unborn(self.workspace, self.directory.name, stage.name)
        if stage.start.parent is not None:
            run_dir = runs[stage.start.parent]
            _require_unchanged(run_dir, stage.start.parent)
            config = _starting_from(config, stage.start.kind, run_dir)
        settings = config.reinforcement
        rewards = []
        for text in settings.reward:
            if text.startswith(STAGE_PREFIX):
                name = text.removeprefix(STAGE_PREFIX)
                _require_unchanged(runs[name], name)
                text = f"model:{runs[name].resolve()}"
            rewards.append(text)
        config = config.model_copy(update={"reinforcement": settings.model_copy(update={"reward": rewards})})
        return self._with_same_threads(config, stage, runs)

    def _with_same_threads(self, config: RunConfig, stage: Stage, runs: Mapping[str, Path]) -> RunConfig:
        """The threads that the first stage measured as fastest, for all: another number adds up in another order, and a stage
        that is begun again after a kill must end as it would have."""
        setups = (read_json_object(run_dir / "environment.json").get("setup") for run_dir in runs.values())
        threads = next((setup["threads"] for setup in setups if isinstance(setup, dict) and "threads" in setup), None)
        if config.training.threads is not None or threads is None:
            return config
        reason = "As the first stage measured: a change would change the order in which numbers are added."
        self.emit("decision", setting=f"stages.{stage.name}.training.threads", value=threads, reason=reason)
        return config.model_copy(update={"training": config.training.model_copy(update={"threads": threads})})

    def _say_choices(self, stage: Stage, abandoned: Path | None) -> None:
        where = f"stages.{stage.name}"
        self.emit("decision", setting=f"{where}.start", value=stage.start.kind, reason=stage.start.reason)
        if stage.reward_reason:
            self.emit("decision", setting=f"{where}.reward", value=stage.config.reinforcement.reward, reason=stage.reward_reason)
        if abandoned is not None:
            reason = f"{abandoned.name} ended before its first checkpoint."
            self.emit("decision", setting=f"{where}.run", value="begun again", reason=reason)

    def _forward_stop(self, event: Event) -> None:
        """Hand a request to stop the pipeline on to the run that is working."""
        asked = self.directory / STOP_FILE
        if self._run_dir is not None and asked.exists() and event["event"] != "started":
            request_stop(self._run_dir, save=bool(read_json_object(asked).get("save", True)))

    # --- measuring and gates --------------------------------------------------------------------------

    def _measure(self, label: str, run_dir: Path | None) -> None:
        """Ask the base (`run_dir` None) or a stage's result, once; `evals/<label>.json` keeps what was found."""
        target = self.directory / "evals" / f"{label}.json"
        if self.pipeline.measure is None or target.is_file():
            return
        self.emit("phase", name=f"measuring {label}")
        _fresh_memory()
        found = measure_model(self.pipeline, label, run_dir, target.parent)
        write_json(target, found)
        self.emit(
            "measured",
            stage=label,
            suites={name: result["pass_share"] for name, result in found["suites"].items()},
            bits_per_byte=found["general"]["bits_per_byte"] if found["general"] else None,
        )

    def _pass_gates(self, stage: Stage, run_dir: Path, *, may_accept: bool) -> None:
        """Decide every gate; one that is not passed ends the pipeline unless it is, or was, accepted."""
        accepted = accepted_gates(self.directory, stage.name)
        failed = []
        for gate in stage.gates:
            before, after = gate_figures(self.directory, self.pipeline, stage, gate, run_dir)
            passed, found = gate.passes(before, after), gate.found(before, after)
            override = not passed and (may_accept or gate.text in accepted)
            self.emit("gate", stage=stage.name, gate=gate.text, passed=passed, found=found, accepted=override)
            if not passed and not override:
                failed.append(f"{gate.text!r} ({found})")
        if failed:
            raise TrainingError(
                "PIPELINE_GATE",
                f"The stage {stage.name} did not pass its gate: {'; '.join(failed)}.",
                where=f"{self.directory.name}: {stage.name}",
                remedy=f"Look at the run ({run_dir.name}). `ftf resume {self.directory.name} --accept-gate` goes on all the same and records "
                "that; other settings need a new pipeline.",
                context={"pipeline": self.directory.name, "stage": stage.name, "run": run_dir.name, "gates": failed},
            )

    # --- telling ----------------------------------------------------------------------------------------

    def explain(self, failure: FineTuneFlowError) -> None:
        """Say at which stage it happened and how to go on."""
        failure.context.setdefault("pipeline", self.directory.name)
        failure.context.setdefault("stage", self.stage)
        if failure.code != "PIPELINE_GATE" and self.stage is not None:
            failure.where = f"stage {self.stage} of {self.directory.name}" + (f": {failure.where}" if failure.where else "")
            more = f"`ftf resume {self.directory.name}` goes on with this stage; finished stages are kept."
            failure.remedy = f"{failure.remedy}\n  {more}" if failure.remedy else more

    def tell(self, status: str = "running") -> dict[str, Any]:
        """Write and return `state.json`, and write `report.md`: views, so that a mistake in drawing them ends nothing."""
        from finetuneflow.export.pipeline_report import write_pipeline_report

        state = pipeline_summary(self.directory, status)
        write_json(self.directory / STATE_FILE, state)
        try:
            write_pipeline_report(self.directory, state)
        except Exception as error:
            self.emit("warning", code="REPORT_FAILED", message=f"report.md could not be written: {error}", advice="")
        return state


# --- results of earlier stages --------------------------------------------------------------------------


def _starting_from(config: RunConfig, kind: str, run_dir: Path) -> RunConfig:
    """`config` on the base of the run in `run_dir` and with its result. That base may be one which an earlier stage merged."""
    base = load_config(run_dir / "run.yaml")[0].model
    model = base.model_copy(update={"dtype": config.model.dtype, "adapter": None, "adapter_start": "continue"})
    if kind == "model":
        model = model.model_copy(update={"base": str((run_dir / "model").resolve()), "revision": None})
    else:
        model = model.model_copy(update={"adapter": str((run_dir / "adapter").resolve()), "adapter_start": kind})
    return config.model_copy(update={"model": model})


def _require_unchanged(run_dir: Path, stage: str) -> None:
    """The result of a finished stage must be what was saved."""
    recorded, folder = recorded_result(run_dir), result_folder(run_dir)
    problem = None
    if folder is None:
        problem = "is gone"
    elif recorded is None:
        problem = "has no hash in lineage.json any more"
    elif folder_digest(folder) != recorded:
        problem = "has changed since it was saved"
    if problem:
        raise ResumeError(
            "RESUME_CHANGED",
            f"The result of the finished stage {stage} {problem}: what comes after it would rest on something else.",
            where=str(folder or run_dir),
            remedy="Put the files back from a copy and resume, or start a new pipeline: `--accept-changes` holds for settings, data and "
            "code, not for the result of a finished stage.",
            context={"stage": stage, "run": run_dir.name},
        )


def _has_checkpoint(run_dir: Path) -> bool:
    return (run_dir / "environment.json").is_file() and bool(checkpoints.list_complete(run_dir / "checkpoints"))


def _remove_unborn(workspace: Workspace, pipeline: str, stage: str) -> None:
    """Folders of this stage's runs that were cut off before they held a run: a merged base in one can be large."""
    if not workspace.runs_dir.is_dir():
        return
    for path in workspace.runs_dir.iterdir():
        if not (path / "run.yaml").exists():
            lineage = read_lineage(path)
            if (lineage.get("pipeline"), lineage.get("stage")) == (pipeline, stage):
                shutil.rmtree(path, ignore_errors=True)


def _fresh_memory() -> None:
    """Let go of the model before, and count the peak of memory from here: each stage tells its own."""
    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux alone; elsewhere the peak is that of the process so far
        Path("/proc/self/clear_refs").write_text("5")
