"""Gather what `knowledge` is asked about: this machine, a base model's small files, a sample of the data.

Nothing here loads torch, downloads weights or reads a large file to its end: a plan answers in under a second.
What was sampled or assumed instead of read is written into `notes`.
"""

from __future__ import annotations

import contextlib
import platform
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from finetuneflow.config import Origin, RunConfig, load_config
from finetuneflow.errors import DataError, FineTuneFlowError, HardwareError
from finetuneflow.events import read_events
from finetuneflow.hardware import Cpu, Gpu, Hardware, probe
from finetuneflow.knowledge import facts
from finetuneflow.knowledge.advice import NextRun, after_failure
from finetuneflow.knowledge.cost import Cost, Efficiency, efficiency_from, estimate_cost, share_reached
from finetuneflow.knowledge.explain import Diagnosis, diagnose
from finetuneflow.knowledge.lint import check
from finetuneflow.knowledge.memory import correction_from
from finetuneflow.knowledge.objectives import supervise_of, traits_of
from finetuneflow.knowledge.outcome import compare
from finetuneflow.knowledge.recommend import Plan, options
from finetuneflow.knowledge.situation import Finding, Situation, completed
from finetuneflow.knowledge.values import DataFacts, Device, Machine
from finetuneflow.models.new import is_fresh
from finetuneflow.planning.base_model import BaseModel, look_at_model, read_json
from finetuneflow.planning.sample import load_tokenizer, look_at_data
from finetuneflow.training.status import run_status
from finetuneflow.workspace import Workspace

LEARNED_RUNS = 50  # the newest ones


@dataclass(frozen=True, slots=True)
class Look:
    """A run about to be started, as far as it is known without loading anything heavy. `notes`: what was assumed."""

    situation: Situation
    base: BaseModel
    learned: Learned
    notes: tuple[str, ...] = ()

    def cost_with(self, data: DataFacts | None = None) -> Cost | None:
        """Time, price, energy and CO2 of the run; None where the size of the data is not known."""
        data = data or self.situation.data
        if data is None or self.situation.machine is None:
            return None
        return estimate_cost(
            self.base.shape,
            self.situation.config,
            self.situation.machine,
            data,
            self.situation.resolved,
            efficiency=self.learned.efficiency,
            country=self.situation.config.training.country,
        )

    def plan(self) -> Plan:
        """Every way to fine-tune this model on this machine, each at its fastest setting that fits, and which to choose."""
        situation = self.situation
        assert situation.machine is not None
        return options(
            self.base.shape,
            situation.config,
            situation.machine,
            situation.data,
            origins=situation.origins,
            country=situation.config.training.country,
            efficiency=self.learned.efficiency,
            correction=self.learned.memory_correction,
        )


def plan(config: RunConfig, **where: Any) -> Plan:
    """What fits, how long it takes, what it costs: `Plan.options` and `Plan.choice`. `where`: as for `look` (gpu, count, …)."""
    return look(config, **where).plan()


def lint(config: RunConfig, origins: Mapping[str, Origin] | None = None, **where: Any) -> list[Finding]:
    """What is wrong or doubtful in a run before it starts, errors first. `where`: as for `look` (gpu, count, …)."""
    return check(look(config, origins, **where).situation)


def look(
    config: RunConfig,
    origins: Mapping[str, Origin] | None = None,
    *,
    workspace: Workspace | None = None,
    gpu: str | None = None,
    count: int = 1,
    model: str | None = None,
    machine: Machine | None = None,
    network: bool = True,
    threads: int | None = None,
) -> Look:
    """Everything that a plan, the linter or a score asks about a run.

    `gpu`, `count`: a machine that is named instead of this one. `model`: a base other than the run file's.
    """
    if machine is None:
        machine = facts.machine_named(gpu, count) if gpu else machine_here(device=config.training.device)
    base = look_at_model(model or config.model.base, revision=config.model.revision, network=network)
    tokenizer = load_tokenizer(base.folder)
    data, notes = look_at_data(
        config.data, tokenizer, supervise=supervise_of(config), seed=config.training.seed, form=traits_of(config).form
    )
    learned = learn(workspace or Workspace(), machine)
    described = base.facts if tokenizer is None else replace(base.facts, vocabulary_size=tokenizer.get_vocab_size())
    added = None if tokenizer is None else frozenset(token.content for token in tokenizer.get_added_tokens_decoder().values())
    situation = Situation(
        config=config,
        origins=origins,
        machine=machine,
        shape=base.shape,
        model=described,
        data=data,
        cpu_threads=threads or config.training.threads,
        added_tokens=added,
        device_count_before=_devices_before(workspace or Workspace(), config.name),
        correction=learned.memory_correction,
    )
    return Look(completed(situation), base, learned, (*base.notes, *notes, *learned.notes))


# --- earlier runs -------------------------------------------------------------------------------------


def _devices_before(workspace: Workspace, name: str) -> int | None:
    """On how many devices the newest run of that name was planned."""
    for run in reversed(workspace.run_names()):
        if re.fullmatch(rf"{re.escape(name)}-\d{{8}}-\d+", run):
            count = (read_json(workspace.runs_dir / run / "plan.json") or {}).get("devices")
            return count if isinstance(count, int) and count > 0 else None
    return None


@dataclass(frozen=True, slots=True)
class Learned:
    """What finished runs on the same kind of machine teach: by how much memory and time were predicted wrongly.

    `efficiency`: share of the device's rate that runs reached; None before the first one.
    """

    memory_correction: float = 1.0
    efficiency: Efficiency | None = None
    runs: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.runs:
            return ()
        return (
            f"Corrected by {self.runs} earlier run{'s' if self.runs > 1 else ''} on this machine (memory x {self.memory_correction:.2f}).",
        )


def learn(workspace: Workspace, machine: Machine) -> Learned:
    """Compare `plan.json` with `metrics.json` of the newest finished runs of this workspace on such a device."""
    outcomes = []
    for name in workspace.run_names()[-LEARNED_RUNS:]:
        folder = workspace.runs_dir / name
        plan, metrics = read_json(folder / "plan.json"), read_json(folder / "metrics.json")
        if plan and metrics and plan.get("device") == machine.device.name:
            outcomes.append(compare(plan, metrics))
    ratios = [outcome.memory_ratio for outcome in outcomes if outcome.memory_ratio is not None]
    shares = [
        share_reached(o.flops, o.measured_seconds, machine.device, compute_dtype=o.compute_dtype or "bfloat16")
        for o in outcomes
        if o.flops and o.measured_seconds
    ]
    return Learned(correction_from(ratios), efficiency_from([share for share in shares if share]), len(ratios))


# --- failures -----------------------------------------------------------------------------------------


def diagnose_failure(code: str | None, text: str, situation: Situation | None, *, exit_status: int | None = None) -> Diagnosis:
    """`explain.diagnose` with remedies computed for this run, where it is known well enough."""
    if situation is None:
        return diagnose(code, text, exit_status)

    def what_if(settings: dict[str, Any]) -> int:
        changed = situation.memory_with(settings)
        if changed is None:
            raise HardwareError("MEMORY_WONT_FIT", "The memory of these settings is not known.")
        return changed.total_bytes

    predicts = situation.estimate is not None
    return diagnose(
        code,
        text,
        exit_status,
        config=situation.config,
        estimate=situation.estimate,
        machine=situation.machine,
        what_if=what_if if predicts else None,
    )


def diagnose_run(run_dir: Path, exit_status: int | None = None) -> Diagnosis | None:
    """Why a run failed, from its directory; None where it has not. `exit_status`: of its process, where somebody saw it."""
    status = run_status(run_dir)
    failed, started = None, ""
    for event in read_events(run_dir / "events.jsonl"):
        failed = event if event["event"] == "failed" else None if event["event"] in ("started", "complete") else failed
        started = event["time"] if event["event"] == "started" else started
    if failed is None and exit_status is None:
        if status != "interrupted":
            return None
        exit_status = -signal.SIGKILL  # no last word: nothing else ends a process like that
    text = f"{failed.get('message', '')}\n{failed.get('where') or ''}" if failed else ""
    if failed is not None:
        text = f"{_traceback(run_dir / 'traceback.txt', started)}\n{text}"
    situation = None
    with contextlib.suppress(FineTuneFlowError):
        config, origins = load_config(run_dir / "run.yaml")
        workspace = Workspace(run_dir.parent.parent)
        try:
            situation = look(config, origins, workspace=workspace, network=False).situation
        except DataError:  # the files have gone since: lengths are then those of data.max_length
            without = config.model_copy(update={"data": config.data.model_copy(update={"train": [], "eval": []})})
            situation = look(without, origins, workspace=workspace, network=False).situation
    return diagnose_failure(failed.get("code") if failed else None, text, situation, exit_status=exit_status)


def next_runs(run_dir: Path) -> list[NextRun]:
    """What to change after a finished run that was not good enough; [] where nothing speaks against it, or nothing is known."""
    metrics = read_json(run_dir / "metrics.json")
    if metrics is None:
        return []
    with contextlib.suppress(FineTuneFlowError):
        config = load_config(run_dir / "run.yaml")[0]
        return after_failure(config, metrics, fresh=is_fresh(config.model.base))
    return []


def _traceback(path: Path, started: str) -> str:
    """The traceback of the attempt that started then; an older one is of another failure."""
    with contextlib.suppress(OSError, ValueError):
        if path.stat().st_mtime >= datetime.fromisoformat(started).timestamp():
            return path.read_text(encoding="utf-8", errors="replace")
    return ""


# --- machine ------------------------------------------------------------------------------------------


def machine_here(hardware: Hardware | None = None, *, device: str = "auto") -> Machine:
    """This machine as a `Machine`. `device="cpu"` leaves its GPUs out. Never raises."""
    hardware = hardware or probe(ask_torch=False)
    total = hardware.memory.total_bytes
    gpus = () if device == "cpu" else tuple(_gpu_device(gpu, total) for gpu in hardware.gpus)
    usable = tuple(gpu for gpu in gpus if gpu.name == gpus[0].name)
    return Machine(
        devices=usable or (_cpu_device(hardware.cpu, total),),
        host_memory_bytes=total,
        cores=hardware.cpu.cores_granted,
        bitsandbytes=hardware.bitsandbytes is not None or "torch" not in hardware.packages,
    )


def _gpu_device(gpu: Gpu, host_memory_bytes: int) -> Device:
    """A card as found: its memory as the driver tells it, its rates from the table where it is a known one.

    A driver that tells no memory is that of a chip which shares the machine's.
    """
    try:
        known = facts.gpu(gpu.name)
    except FineTuneFlowError:
        return Device(gpu.name, gpu.kind, gpu.memory_total_bytes or host_memory_bytes, bf16=gpu.bf16)
    return replace(
        known,
        name=gpu.name,
        memory_bytes=gpu.memory_total_bytes or known.memory_bytes,
        bf16=known.bf16 if gpu.bf16 is None else gpu.bf16,
    )


def _cpu_device(cpu: Cpu, memory_bytes: int) -> Device:
    return facts.cpu_device(
        name=cpu.model or platform.processor() or "CPU",
        cores=cpu.cores_granted,
        features=cpu.features,
        memory_bytes=memory_bytes,
    )
