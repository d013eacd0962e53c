"""A run, top to bottom. Read this file first.

    train(config)   makes a run directory and executes it
    resume(run)     executes it again from its newest intact checkpoint
    execute         check -> load -> tokenize -> train -> save -> evaluate

The run directory is the whole truth of a run; everything below writes into it through `emit`
(events) or `workspace.write_*` (files). `objectives.py` holds what differs between kinds of training.
"""

from __future__ import annotations

import contextlib
import json
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetuneflow.config import Origin, RunConfig, dump_config, load_config, require_runnable
from finetuneflow.errors import FineTuneFlowError, ResumeError, StorageError, TrainingError
from finetuneflow.events import Emit, EventLog, Sink, metric_lines, read_events
from finetuneflow.training import checkpoints
from finetuneflow.training.lineage import Membership, differences, environment, fingerprint, record_result, record_start
from finetuneflow.training.start import merged_base, shaping_files, with_folders
from finetuneflow.training.status import forget_stop, run_status
from finetuneflow.workspace import Workspace, directory_lock, write_atomic, write_json


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended: `succeeded`, or `stopped` when somebody asked for it (then it can be resumed)."""

    run_dir: Path
    status: str
    metrics: dict[str, Any]


def train(
    config: RunConfig,
    *,
    workspace: Workspace | None = None,
    origins: Mapping[str, Origin] | None = None,
    sinks: Sequence[Sink] = (),
    on_start: Callable[[Path], None] = lambda run_dir: None,
    member: Membership | None = None,
) -> RunResult:
    """Run `config` in a new run directory of `workspace`, as a stage of a pipeline where it is a `member` of one.

    Events go to its file and to every sink.
    """
    from finetuneflow.data.prepare import require_files

    require_runnable(config)
    config = config.with_absolute_paths()
    require_files((*config.data.train, *config.data.eval, *config.data.replay))
    workspace = workspace or Workspace()
    config = with_folders(config, workspace)
    run_dir = workspace.new_run_dir(config.name)
    record_start(run_dir, config, workspace, member)  # first: what has a run.yaml is a run
    config = merged_base(config, run_dir, workspace)
    write_atomic(run_dir / "run.yaml", dump_config(config, origins or {}))
    on_start(run_dir)
    return _attempt(config, run_dir, workspace, sinks, origins=origins or {}, resuming=False, accept_changes=False)


def resume(
    run_dir: Path, *, workspace: Workspace | None = None, sinks: Sequence[Sink] = (), accept_changes: bool = False
) -> RunResult:
    """Continue an interrupted, stopped or failed run from its newest intact checkpoint.

    Raises `ResumeError` when it ended already, has no usable checkpoint, or when configuration, data,
    tokenizer, code or libraries differ (each named) and `accept_changes` is not set.
    """
    if run_status(run_dir) == "succeeded":
        raise ResumeError("RESUME_FINISHED", f"{run_dir.name} ended already.", remedy="Start a new run to train further.")
    config, _ = load_config(run_dir / "run.yaml")
    workspace = workspace or Workspace(run_dir.parent.parent)
    return _attempt(config, run_dir, workspace, sinks, origins={}, resuming=True, accept_changes=accept_changes)


def _attempt(
    config: RunConfig,
    run_dir: Path,
    workspace: Workspace,
    sinks: Sequence[Sink],
    *,
    origins: Mapping[str, Origin],
    resuming: bool,
    accept_changes: bool,
) -> RunResult:
    """One attempt: holds the run's lock, and leaves a last event that tells how it ended."""
    from finetuneflow.training.preflight import memory_remedies

    with directory_lock(run_dir), EventLog(run_dir / "events.jsonl", list(sinks)) as log:
        attempt = 1 + sum(event["event"] == "started" for event in read_events(log.path))
        log.emit("started", attempt=attempt, run=run_dir.name, pid=os.getpid(), resuming=resuming)
        forget_stop(run_dir)  # it was meant for the attempt before
        try:
            return execute(
                config, run_dir, workspace, log.emit, origins=origins, resuming=resuming, accept_changes=accept_changes
            )
        except BaseException as error:
            failure = as_failure(error)
            if failure.code == "OUT_OF_MEMORY":
                failure.remedy = memory_remedies(config, workspace, failure, run_dir.name)
            with contextlib.suppress(StorageError):  # a disk without room for these words must not hide them
                if failure.code == "TRAINING_FAILED":
                    write_atomic(run_dir / "traceback.txt", traceback.format_exc())
                log.emit("failed", code=failure.code, message=failure.message, where=failure.where, remedy=failure.remedy)
            if failure is error:
                raise
            raise failure from error


def as_failure(error: BaseException) -> FineTuneFlowError:
    """Every way a run can fail as one error of our family."""
    from finetuneflow.training.objectives import explain_out_of_memory, is_out_of_memory

    if isinstance(error, FineTuneFlowError):
        return error
    if is_out_of_memory(error):
        return explain_out_of_memory(error)
    if isinstance(error, KeyboardInterrupt):
        return TrainingError(
            "TRAINING_INTERRUPTED",
            "The run was interrupted from the keyboard.",
            remedy="`ftf resume` goes on from its last checkpoint.",
        )
    return TrainingError(
        "TRAINING_FAILED",
        f"{type(error).__name__}: {str(error)[:500]}",
        remedy="The whole trace is in traceback.txt of the run; `ftf resume` goes on from the last checkpoint.",
    )


def execute(
    config: RunConfig,
    run_dir: Path,
    workspace: Workspace,
    emit: Emit,
    *,
    origins: Mapping[str, Origin],
    resuming: bool,
    accept_changes: bool,
) -> RunResult:
    """The run itself."""
    from finetuneflow.models.own import keep_module
    from finetuneflow.training import objectives
    from finetuneflow.training.energy import measured_energy
    from finetuneflow.training.preflight import preflight
    from finetuneflow.training.setup import apply_setup, choose_setup, settle_fusing

    # Check: what this machine can do, and every substitution said aloud.
    emit("phase", name="checking")
    earlier = _read_json(run_dir / "environment.json") if resuming else {}
    setup = choose_setup(config, threads=earlier.get("setup", {}).get("threads"))
    for decision in setup.decisions:
        emit("decision", setting=decision.setting, value=decision.value, reason=decision.reason)
        if decision.warning:
            emit("warning", code=decision.warning, message=decision.reason, advice=decision.advice)
    apply_setup(setup, seed=config.training.seed)
    objectives.require_named(config)
    if not resuming:  # a resumed run keeps its plan: what it was started with is what it is measured against
        preflight(config, origins, setup, run_dir, workspace, emit)

    # Tokenize: rows -> examples -> split -> tokens in an Arrow cache; fatal audits come before any model is loaded.
    emit("phase", name="tokenizing")
    materials = objectives.load_materials(config, workspace, emit)
    prepared = materials.prepared
    if replay := prepared.manifest.get("replay"):
        reason = f"{replay['examples']:,} of {prepared.manifest['train_examples']:,} training examples ({replay['share']:.1%}) are replayed."
        emit("decision", setting="data.replay_share", value=config.data.replay_share, reason=reason)

    num_tokens = objectives.tokens_of(config, prepared)
    before = earlier.get("setup", {}).get("fuse_loops") if resuming else None
    setup, fusing = settle_fusing(config, setup, num_tokens, workspace.cache_dir, earlier=before)
    emit("decision", setting=fusing.setting, value=fusing.value, reason=fusing.reason)

    # A resume goes on only where nothing that shapes the result has changed; until then it writes nothing.
    current = fingerprint(
        config,
        setup,
        data={**prepared.files, **shaping_files(config)},
        tokenizer=materials.tokenizer_digest,
        template=materials.template.digest,
        base=materials.base_digest,
    )
    start = None
    if resuming:
        _require_same(earlier.get("fingerprint", {}), current, emit, accept_changes=accept_changes)
        start = _find_start(run_dir, emit)
    write_json(run_dir / "environment.json", {**environment(setup), "fingerprint": current})
    write_json(run_dir / "data" / "manifest.json", prepared.manifest)
    prepared.copy_held_out(run_dir / "data" / "eval.jsonl")
    materials.save_tokenizer(run_dir)
    keep_module(config.model.module, run_dir)

    # Train.
    with measured_energy(config.training.country) as energy:
        outcome = objectives.train_model(config, setup, materials, run_dir, emit, start=start)
    if outcome.stopped:
        emit("stopped", step=outcome.step, reason=outcome.stopped)
        return RunResult(run_dir, "stopped", {})

    # Save, then measure what was saved.
    emit("phase", name="saving")
    objectives.save_result(config, outcome, materials, run_dir)
    record_result(run_dir, config, prepared.manifest)
    emit("phase", name="evaluating")
    metrics = {
        "objective": config.training.objective,
        **_metrics(run_dir, outcome, prepared.manifest),
        "energy": asdict(energy),
        **objectives.measure(config, outcome, materials, run_dir, emit),
    }
    write_json(run_dir / "metrics.json", metrics)
    _write_report(run_dir, emit)
    emit(
        "complete",
        total_steps=outcome.step,
        best_metric=metrics.get("best_eval_loss"),
        train_loss=metrics["train_loss"],
        seconds=metrics["train_runtime"],
    )
    return RunResult(run_dir, "succeeded", metrics)


# --- resume ---------------------------------------------------------------------------------------


def _require_same(before: dict[str, Any], now: dict[str, Any], emit: Emit, *, accept_changes: bool) -> None:
    changes = differences(before, now)
    if not changes:
        return
    if not accept_changes:
        raise ResumeError(
            "RESUME_CHANGED",
            "The run cannot go on as it was: " + "; ".join(changes) + ".",
            remedy="Put that back, start a new run, or accept a run that mixes both with `ftf resume --accept-changes`.",
            context={"changes": changes},
        )
    for change in changes:
        emit("decision", setting="resume", value="accepted", reason=f"Resumed although {change}.")


def _find_start(run_dir: Path, emit: Emit) -> checkpoints.Checkpoint:
    root = run_dir / "checkpoints"
    for name in checkpoints.remove_leftovers(root):
        emit(
            "warning",
            code="CHECKPOINT_UNFINISHED",
            message=f"Removed {name}: it was being written when the run ended.",
            advice="",
        )
    start, damaged = checkpoints.find_valid(root)
    for damage in damaged:
        emit(
            "warning",
            code="CHECKPOINT_DAMAGED",
            message=f"Skipped {damage.path.name}: {damage.reason}.",
            advice=f"The run goes on from {start.path.name}.",
        )
    return start


# --- results --------------------------------------------------------------------------------------


def _metrics(run_dir: Path, outcome: Any, manifest: dict[str, Any]) -> dict[str, Any]:
    """`metrics.json`: the documented figures, taken from the log lines of all attempts."""
    logs, evals = metric_lines(run_dir / "events.jsonl"), metric_lines(run_dir / "events.jsonl", "eval")
    weights = [line["step"] - before for line, before in zip(logs, [0, *(line["step"] for line in logs)], strict=False)]
    train_loss = sum(w * line["loss"] for w, line in zip(weights, logs, strict=True)) / max(sum(weights), 1)
    best = min(evals, key=lambda line: line["eval_loss"], default=None)
    final = best if outcome.restored_best and best else (evals[-1] if evals else None)
    return {
        "train_loss": train_loss,
        "final_train_loss": logs[-1]["loss"] if logs else None,
        "eval_loss": final["eval_loss"] if final else None,
        "perplexity": final.get("eval_perplexity") if final else None,
        "eval_token_accuracy": final.get("eval_token_accuracy") if final else None,
        "eval_metrics": {name: value for name, value in (final or {}).items() if name.startswith("eval_")},
        "best_eval_loss": best["eval_loss"] if best else None,
        "best_step": best["step"] if best else None,
        "steps": outcome.step,
        "train_runtime": outcome.seconds,
        "train_samples_per_second": outcome.examples_seen / max(outcome.seconds, 1e-9),
        "train_tokens_per_second": outcome.tokens_seen / max(outcome.seconds, 1e-9),
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "trainable_parameters": outcome.trainable_parameters,
        "total_parameters": outcome.total_parameters,
        "train_examples": manifest["train_examples"],
        "eval_examples": manifest["eval_examples"],
        "train_loss_curve": [{"step": line["step"], "loss": line["loss"]} for line in logs],
        "eval_loss_curve": [{"step": line["step"], "loss": line["eval_loss"]} for line in evals],
        "metrics_curve": [{"step": line["step"], **line["metrics"]} for line in logs if "metrics" in line],
    }


def _write_report(run_dir: Path, emit: Emit) -> None:
    """The report is a view of the run directory: if drawing it fails, the run has still succeeded."""
    from finetuneflow.export.report import write_report

    try:
        write_report(run_dir)
    except Exception as error:
        emit(
            "warning",
            code="REPORT_FAILED",
            message=f"report.md could not be written: {error}",
            advice="`ftf export` writes it again.",
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResumeError(
            "RESUME_NO_CHECKPOINT",
            f"The run ended before it had begun to train ({path.name} is missing).",
            where=str(path.parent),
            remedy="Start it again: `ftf train` with its run.yaml.",
        ) from error
    return dict(value)
