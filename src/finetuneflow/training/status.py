"""How a run, or a pipeline, stands, told from its directory alone. No torch: listing runs must be instant."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from finetuneflow.config import load_config
from finetuneflow.errors import FineTuneFlowError, StorageError
from finetuneflow.events import Event, read_events
from finetuneflow.pipeline_config import read_pipeline
from finetuneflow.pipeline_stages import Stage
from finetuneflow.workspace import Workspace, lock_owner, read_json_object, write_json

STOP_FILE = "stop.json"
ENDINGS = {"complete": "succeeded", "stopped": "stopped", "failed": "failed"}
# What whoever goes on with a run or tells of it relies on in an event, beside its name, number and time.
RELIED_ON: dict[str, dict[str, Any]] = {
    "failed": {"code": str},
    "log": {"step": int, "loss": int | float},
    "eval": {"step": int, "eval_loss": int | float},
    "pipeline": {"status": str},
    "gate": {"stage": str, "gate": str, "passed": bool, "found": str, "accepted": bool},
}


def sound_events(directory: Path) -> Iterator[Event]:
    """The events of a run or a pipeline. Raises `RUN_DAMAGED` at one that lacks what is relied on: somebody else wrote it."""
    path, last = directory / "events.jsonl", 0
    try:
        for event in read_events(path):
            wanted = {"seq": int, "event": str, "time": str, **RELIED_ON.get(str(event.get("event")), {})}
            wrong = [name for name, kind in wanted.items() if not isinstance(event.get(name), kind)]
            if wrong or datetime.fromisoformat(event["time"]).tzinfo is None:
                raise ValueError(f"{', '.join(wrong) or 'time'} is missing or of another kind")
            last = event["seq"]
            yield event
    except (RecursionError, TypeError, ValueError) as error:
        raise StorageError(
            "RUN_DAMAGED",
            f"The events of {directory.name} hold something that was not written by FineTuneFlow ({error}).",
            where=f"{path}, after event {last}",
            remedy="Remove that line, or put the file back from a copy; nothing else of it is touched.",
        ) from error


def request_stop(run_dir: Path, *, save: bool = True) -> None:
    """Ask a running run to stop after its current step, with or without saving a checkpoint first."""
    write_json(run_dir / STOP_FILE, {"save": save})


def forget_stop(run_dir: Path) -> None:
    """Drop a request that nobody answered."""
    (run_dir / STOP_FILE).unlink(missing_ok=True)


def run_status(run_dir: Path) -> str:
    """`running`, `succeeded`, `stopped`, `failed`, or `interrupted` (its process died without a word)."""
    if lock_owner(run_dir) is not None:
        return "running"
    last = before = ""
    for event in sound_events(run_dir):
        if event["event"] == "started":
            last, before = "started", last
        elif event["event"] == "failed" and event["code"].startswith("RESUME_"):
            last = before  # a resume that was refused changed nothing
        elif event["event"] in ENDINGS:
            last = event["event"]
    return ENDINGS.get(last, "interrupted")


def run_summary(run_dir: Path) -> dict[str, Any]:
    """One line of `ftf runs`. A run whose files are damaged is listed as such, never hidden."""
    lineage = read_json_object(run_dir / "lineage.json")
    summary: dict[str, Any] = {
        "run": run_dir.name,
        "path": str(run_dir),
        "status": "damaged",
        "method": None,
        "base": None,
        "pipeline": lineage.get("pipeline"),
        "stage": lineage.get("stage"),
    }
    figures = dict.fromkeys(("step", "total_steps", "loss", "eval_loss", "started", "seconds"))
    with contextlib.suppress(FineTuneFlowError):
        figures |= _figures(run_dir)
        config, _ = load_config(run_dir / "run.yaml")
        summary |= {"method": config.method.kind, "base": config.model.base, "status": run_status(run_dir)}
    return summary | figures


def _figures(run_dir: Path) -> dict[str, Any]:
    """The newest figures that a run has told, when it began, and for how long it has been at it."""
    figures: dict[str, Any] = {}
    first = last = None
    for event in sound_events(run_dir):
        first, last = first or event["time"], event["time"]
        for name in ("step", "total_steps", "loss", "eval_loss"):
            if name in event and event["event"] in ("log", "eval"):
                figures[name] = event[name]
    if first and last:
        figures["started"] = first
        figures["seconds"] = (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()
    return figures


def recorded_result(run_dir: Path) -> str | None:
    """The hash with which the result of a run was saved; None where its lineage tells none."""
    result = read_json_object(run_dir / "lineage.json").get("result")
    found = result.get("sha256") if isinstance(result, dict) else None
    return found if isinstance(found, str) else None


# --- pipelines ----------------------------------------------------------------------------------------


def pipeline_status(directory: Path) -> str:
    """`running`, `succeeded`, `stopped`, `gated`, `failed`, or `interrupted` (its process died without a word)."""
    if lock_owner(directory) is not None:
        return "running"
    last = "interrupted"
    for event in sound_events(directory):
        if event["event"] == "pipeline":
            last = "interrupted" if event["status"] == "started" else event["status"]
    return last


def stage_runs(directory: Path) -> dict[str, Path]:
    """The newest run of each stage, oldest first, told by the lineage of the runs beside the pipeline."""
    return runs_of_pipelines(Workspace(directory.parent.parent)).get(directory.name, {})


def runs_of_pipelines(workspace: Workspace) -> dict[str, dict[str, Path]]:
    """The newest run of each stage of every pipeline."""
    found: dict[str, dict[str, Path]] = {}
    for name in workspace.run_names():
        lineage = read_json_object(workspace.runs_dir / name / "lineage.json")
        if lineage.get("pipeline"):
            found.setdefault(str(lineage["pipeline"]), {})[str(lineage.get("stage"))] = workspace.runs_dir / name
    return found


def pipeline_summary(directory: Path, status: str | None = None, runs: dict[str, Path] | None = None) -> dict[str, Any]:
    """A pipeline and its stages as they stand: what `state.json` keeps for other programs. The runs are the truth of it.

    `status`: where the caller knows better, because it is the process that works on it; `runs`: as `stage_runs` finds them.
    """
    pipeline = read_pipeline(directory)
    runs = stage_runs(directory) if runs is None else runs
    gates, last, began, seconds = _told(directory)
    stages = [_stage_summary(stage, runs.get(stage.name), gates.get(stage.name, {})) for stage in pipeline.stages]
    return {
        "pipeline": directory.name,
        "path": str(directory),
        "status": status or pipeline_status(directory),
        "reason": last.get("message"),
        "started": began,
        "seconds": seconds,
        "stages": stages,
    }


def _told(directory: Path) -> tuple[dict[str, dict[str, dict[str, Any]]], dict[str, Any], str | None, float]:
    """(the newest outcome of each gate by stage, the last word of the pipeline, when it began, seconds of all attempts)."""
    gates: dict[str, dict[str, dict[str, Any]]] = {}
    last: dict[str, Any] = {}
    began = before = None
    seconds = 0.0
    for event in sound_events(directory):
        now = datetime.fromisoformat(event["time"])
        if before is not None and not (event["event"] == "pipeline" and event["status"] == "started"):
            seconds += (now - before).total_seconds()  # what lies between two attempts is no time of the pipeline's
        began, before = began or event["time"], now
        if event["event"] == "gate":
            outcome = {key: event[key] for key in ("gate", "passed", "found", "accepted")}
            gates.setdefault(event["stage"], {})[event["gate"]] = outcome
        elif event["event"] == "pipeline":
            last = event
    return gates, last, began, seconds


def _stage_summary(stage: Stage, run_dir: Path | None, gates: dict[str, dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "stage": stage.name,
        "objective": stage.config.training.objective,
        "method": stage.config.method.kind,
        "start": {"kind": stage.start.kind, "from": stage.start.parent, "reason": stage.start.reason},
        "gates": list(gates.values()),
        "run": None,
        "status": "waiting",
    }
    if run_dir is None:
        return summary
    metrics = read_json_object(run_dir / "metrics.json")
    status = run_status(run_dir)
    if status == "succeeded" and any(not (gate["passed"] or gate["accepted"]) for gate in gates.values()):
        status = "gated"
    figures = {name: metrics.get(name) for name in ("steps", "train_runtime", "peak_memory_bytes", "eval_loss")}
    return summary | {"run": run_dir.name, "status": status, **figures, "result_sha256": recorded_result(run_dir)}


def pipeline_dir(workspace: Workspace, text: str | Path) -> Path | None:
    """The pipeline that is meant where a verb goes on with one or stops one: by name or path, or `latest` where the newest
    thing in the workspace is a pipeline or a run of one."""
    if str(text) != "latest":
        is_run = str(text) in workspace.run_names() or (Path(text) / "run.yaml").is_file()
        return None if is_run else workspace.find_pipeline_dir(text)
    runs, pipelines = workspace.run_names(), workspace.pipeline_names()
    if not pipelines:
        return None
    newest = workspace.pipelines_dir / pipelines[-1]
    if not runs:
        return newest
    run_dir = workspace.runs_dir / runs[-1]
    if owner := read_json_object(run_dir / "lineage.json").get("pipeline"):
        return workspace.find_pipeline_dir(str(owner))
    ages = [(path.stat().st_mtime_ns) for path in (newest / "pipeline.yaml", run_dir / "run.yaml")]
    return newest if ages[0] > ages[1] else None


def named_run(workspace: Workspace, text: str | Path) -> Path:
    """The run that is meant: as `Workspace.run_dir` finds it, or of a pipeline its last finished stage that answers."""
    if str(text) == "latest" or str(text) in workspace.run_names() or (Path(text) / "run.yaml").is_file():
        return workspace.run_dir(text)
    directory = workspace.find_pipeline_dir(text)
    if directory is None:
        return workspace.run_dir(text)
    runs = stage_runs(directory)
    for stage in reversed(read_pipeline(directory).stages):
        if stage.answers and stage.name in runs and run_status(runs[stage.name]) == "succeeded":
            return runs[stage.name]
    raise StorageError(
        "RUN_NOT_FOUND",
        f"No stage of the pipeline {directory.name} whose result answers has ended yet.",
        remedy=f"`ftf resume {directory.name}` goes on with it.",
    )
