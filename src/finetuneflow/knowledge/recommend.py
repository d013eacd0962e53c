"""What to run on a machine: the ways to fine-tune a model there, each at its fastest setting that fits, and which to choose.

    options          a `Plan`: full, LoRA, QLoRA, DoRA and their useful variants, with memory, time, cost and reasons
    to_run_config    an option as a complete run file, with the reason beside each value

The way: `variants.py` (what is offered, and settings that do not depend on memory, by `hyperparameters.py`), `search.py` (the
fastest that fits), `reasons.py` (why), `choice.py` (which). The documented rule and its matrix are in `decision_matrix.py`, whether to tune
at all is in `advice.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from finetuneflow.config import Method, Origin, RunConfig
from finetuneflow.errors import ModelError
from finetuneflow.knowledge import facts
from finetuneflow.knowledge.advice import Advice, whether_to_tune
from finetuneflow.knowledge.choice import choose
from finetuneflow.knowledge.cost import Cost, Efficiency, estimate_cost
from finetuneflow.knowledge.decision_matrix import (
    DOCUMENTED_MATRIX,
    VRAM_TIGHT_ADJUSTMENTS,
    disagreements,
    matrix,
    recommend_method,
    tight_adjustments,
)
from finetuneflow.knowledge.hyperparameters import QUALITY, Quality
from finetuneflow.knowledge.memory import Estimate, estimate
from finetuneflow.knowledge.memory_phases import Strategy
from finetuneflow.knowledge.objectives import least_batch, rows_per_step, takes_fast_path
from finetuneflow.knowledge.plan import Option, Plan, to_run_config
from finetuneflow.knowledge.reasons import solved_settings
from finetuneflow.knowledge.resolve import resolve
from finetuneflow.knowledge.search import (
    OPTIMIZERS,
    Candidate,
    Grid,
    lengths,
    nominal_data,
    per_device_examples,
    search,
    used_machine,
    with_settings,
)
from finetuneflow.knowledge.shapes.shape import ModelShape
from finetuneflow.knowledge.steps import ENOUGH_TOKENS
from finetuneflow.knowledge.values import GB, DataFacts, Machine
from finetuneflow.knowledge.variants import Asked, Variant, chosen_settings, kept_settings, values_of, variants_for

__all__ = [
    "DOCUMENTED_MATRIX",
    "VRAM_TIGHT_ADJUSTMENTS",
    "Advice",
    "Option",
    "Plan",
    "Quality",
    "disagreements",
    "matrix",
    "options",
    "recommend_method",
    "tight_adjustments",
    "to_run_config",
    "whether_to_tune",
]

# What the engine starts by itself today. Plans for several devices are computed and shown all the same.
STARTABLE: frozenset[Strategy] = frozenset({"single"})


# --- the plan -----------------------------------------------------------------------------------------


def options(
    shape: ModelShape,
    config: RunConfig,
    machine: Machine,
    data: DataFacts | None,
    *,
    origins: Mapping[str, Origin] | None = None,
    country: str | None = None,
    efficiency: Efficiency | None = None,
    correction: float = 1.0,
) -> Plan:
    """The ways to fine-tune `shape` on `machine`, each solved for speed, and which to choose.

    Settings that are yours or a recipe's by `origins` (without them: that differ from their default) are kept where they concern
    the option; the effective batch, over all devices, is that of `config`. `efficiency` and `correction` are what was learned from
    earlier runs on the machine, for time and memory.
    """
    used, notes = _machine_for(machine, config)
    notes += _data_notes(data)
    data = data if data is not None and data.examples > 0 else None
    asked = Asked(shape, config, used, data, kept_settings(config, origins), country, efficiency, correction)
    variants, left_out = variants_for(asked)
    found: list[Option] = []
    for variant in variants:
        try:
            found += [_option(asked, variant, strategies) for strategies in _strategies(used)]
        except ModelError as error:
            left_out.append(
                " ".join([f"{variant.title} is left out: {error.message}", *([error.remedy] if error.remedy else [])])
            )
    chosen, judged = choose(asked, found)
    return Plan(
        hardware=_hardware(machine, used),
        model={
            "name": shape.name,
            "parameters": shape.num_parameters,
            "active_parameters": shape.active_parameters,
            "certainty": shape.certainty,
            "source": shape.source,
        },
        options=judged,
        choice=chosen,
        notes=(*notes, *_expert_notes(shape), *left_out, *([] if chosen else _ways_out(judged))),
    )


def _machine_for(machine: Machine, config: RunConfig) -> tuple[Machine, list[str]]:
    """The devices a run would use, and what to say about those it cannot."""
    name = machine.device.name
    if machine.kind == "mps":
        return _processor(machine), [
            f"{name}: the engine trains on CUDA or on the processor and does not drive Apple GPUs yet. The plan is for the processor, "
            "which shares the same memory."
        ]
    if config.training.device == "cpu" and machine.kind != "cpu":
        return _processor(machine), ["training.device is cpu: the plan leaves the GPU out."]
    if machine.kind == "cpu":
        return machine, ["No CUDA GPU: planned for the processor. Everything works there, only slower; the hours say how much."]
    notes = []
    if machine.kind == "rocm":
        notes.append(
            f"{name}: PyTorch's ROCm build answers as cuda, so the engine uses it, and bitsandbytes supports AMD cards. "
            "FineTuneFlow itself has not been tested on one."
        )
    if machine.device_count > 1:
        notes.append(
            f"{machine.device_count} GPUs: the engine trains on one by itself today. Options over all of them are shown for "
            "comparison and are not chosen."
        )
    return machine, notes


def _processor(machine: Machine) -> Machine:
    """The machine without its GPU. What its processor can do is not known: NEON beside an Apple GPU, AVX2 beside any other."""
    cpu = facts.cpu_device(
        name=f"processor beside {machine.device.name}",
        cores=machine.cores,
        features=("NEON",) if machine.kind == "mps" else ("AVX2",),
        memory_bytes=machine.host_memory_bytes,
    )
    return replace(machine, devices=(cpu,))


def _hardware(machine: Machine, used: Machine) -> dict[str, Any]:
    return {
        "devices": [
            {"name": device.name, "kind": device.kind, "memory_gb": round(device.memory_bytes / GB, 1)}
            for device in machine.devices
        ],
        "count": machine.device_count,
        "planned_for": used.device.name,
        "planned_kind": used.kind,
        "host_memory_gb": round(machine.host_memory_bytes / GB, 1),
        "bitsandbytes": machine.bitsandbytes,
        "observed": machine.observed,
    }


def _data_notes(data: DataFacts | None) -> list[str]:
    if data is None or data.examples < 1:
        return ["No usable example is known: hours and cost are left out, and settings are those for fewer than 10,000 examples."]
    return [] if data.counted else ["Tokens are estimated from characters."]


def _expert_notes(shape: ModelShape) -> list[str]:
    if not shape.num_experts or any(linear.part == "expert" and linear.is_linear_module for linear in shape.linears):
        return []
    return ["The experts are fused tensors: `all-linear` leaves them out, and 4-bit quantisation leaves them as they are."]


def _ways_out(found: Sequence[Option]) -> list[str]:
    """What to say where nothing can be started."""
    if several := [option for option in found if option.fits]:
        first = several[0]
        return [f"No option fits on one device; {first.title} with {first.strategy.upper()} over {first.devices} would."]
    least = min(found, key=lambda option: option.memory_gb, default=None)
    if least is None:
        return []
    tokens = least.settings["data.max_length"]
    return [
        f"Nothing fits. {least.title} needs least: {least.memory_gb:.1f} GB at {tokens:,} tokens. A smaller model, or more memory."
    ]


def _strategies(machine: Machine) -> list[tuple[Strategy, ...]]:
    """One option on one device, and where there are several another one over all of them."""
    return [("single",)] if machine.device_count == 1 or machine.kind == "cpu" else [("single",), ("ddp", "fsdp")]


# --- one option ---------------------------------------------------------------------------------------


def _grid(asked: Asked, variant: Variant, strategies: Sequence[Strategy]) -> Grid:
    training, machine = asked.config.training, asked.machine
    gpu = machine.kind != "cpu"
    if training.optimizer != "auto":
        optimizers: tuple[str, ...] = (resolve(asked.config, machine).optimizer,)
    else:
        allowed = [o for o in OPTIMIZERS["cuda" if gpu else "cpu"] if machine.bitsandbytes or "8bit" not in o]
        optimizers = tuple(o for o in allowed if variant.optimizers is None or o in variant.optimizers)
    fixed = {"auto": (False, True), "on": (True,), "off": (False,)}
    least = least_batch(asked.config)
    fast = takes_fast_path(asked.config)
    percentiles = asked.data.length_percentiles if asked.data is not None else ()
    return Grid(
        least_batch=least,
        enough=(training.token_budget or ENOUGH_TOKENS["cuda" if gpu else "cpu"]) if fast else None,
        longest=percentiles[-1] if percentiles and percentiles[-1] > 0 else None,
        lengths=lengths(asked.wanted_length, asked.config.data.max_length),
        per_device={
            s: max(per_device_examples(training.effective_batch, 1 if s == "single" else machine.device_count), least)
            for s in strategies
        },
        checkpointing=fixed[training.gradient_checkpointing],
        optimizers=optimizers,
    )


def _searched_shape(shape: ModelShape, method: Method) -> ModelShape:
    """The shape with one path per kind of layer, where targets are leaf names: the same figures, without matching every layer."""
    wanted = method.target_modules
    by_leaf = wanted in ("auto", "all-linear") if isinstance(wanted, str) else not any("." in name for name in wanted)
    return replace(shape, linears=tuple(replace(linear, layer_indices=()) for linear in shape.linears)) if by_leaf else shape


class _Judge:
    """Memory, time and cost of the candidates of one variant."""

    def __init__(self, asked: Asked, config: RunConfig) -> None:
        self.asked, self.config = asked, config
        self.shape = _searched_shape(asked.shape, config.method)
        self._estimates: dict[Candidate, Estimate] = {}
        self._costs: dict[Candidate, Cost] = {}

    def memory(self, candidate: Candidate) -> Estimate:
        if candidate not in self._estimates:
            asked, config = self.asked, with_settings(self.config, candidate.settings)
            self._estimates[candidate] = estimate(
                self.shape,
                config,
                asked.machine,
                resolve(config, asked.machine),
                data=asked.data,
                strategy=candidate.strategy,
                correction=asked.correction,
            )
        return self._estimates[candidate]

    def cost(self, candidate: Candidate) -> Cost:
        if candidate not in self._costs:
            asked, config = self.asked, with_settings(self.config, candidate.settings)
            machine = used_machine(asked.machine, candidate.strategy)
            data = nominal_data(asked.data, candidate.max_length)
            resolved = resolve(config, machine)
            self._costs[candidate] = estimate_cost(
                self.shape, config, machine, data, resolved, efficiency=asked.efficiency, country=asked.country
            )
        return self._costs[candidate]

    def seconds(self, candidate: Candidate) -> float:
        return self.cost(candidate).seconds[1]


def _option(asked: Asked, variant: Variant, strategies: Sequence[Strategy]) -> Option:
    chosen = chosen_settings(asked, variant, rows_per_step(asked.config))
    judge = _Judge(asked, with_settings(asked.config, values_of(chosen)))
    grid = _grid(asked, variant, strategies)
    found = search(grid, judge.memory, judge.seconds)
    candidate = found.candidate
    chosen |= solved_settings(asked, grid, found, judge.memory)
    cost = judge.cost(candidate) if found.fits and asked.data is not None else None
    shortened = candidate.max_length < grid.lengths[0]
    devices = 1 if candidate.strategy == "single" else asked.machine.device_count
    quality = QUALITY[variant.kind]
    return Option(
        method=variant.kind,
        name=variant.name if candidate.strategy == "single" else f"{variant.name}-{candidate.strategy}",
        title=variant.title,
        strategy=candidate.strategy,
        devices=devices,
        fits=found.fits,
        verdict=found.estimate.verdict,
        memory_gb=round(found.estimate.total_bytes / GB, 2),
        breakdown=dict(found.estimate.breakdown),
        hours=_hours(cost.seconds[1]) if cost else None,
        hours_range=(_hours(cost.seconds[0]), _hours(cost.seconds[2])) if cost else None,
        cost_usd=round(cost.price_usd, 2) if cost and cost.price_usd is not None else None,
        energy_kwh=cost.energy_kwh if cost else None,
        co2_kg=cost.co2_kg if cost else None,
        quality=replace(quality, research=f"{quality.research} {variant.research}".strip()),
        settings=values_of(chosen),
        why={key: choice.reason for key, choice in chosen.items()},
        startable=candidate.strategy in STARTABLE,
        shortened=shortened,
        share_cut=asked.data.share_above(candidate.max_length) if shortened and asked.data else None,
        notes=(
            *found.estimate.notes,
            *_host_notes(asked.machine, found.estimate),
            *(cost.notes if cost else ()),
            *(["FSDP's gathering of weights is not in the time."] if candidate.strategy == "fsdp" else []),
        ),
    )


def _host_notes(machine: Machine, estimate: Estimate) -> tuple[str, ...]:
    if machine.kind == "cpu" or not machine.observed or estimate.host_bytes <= machine.host_memory_bytes:
        return ()
    needed, there = estimate.host_bytes / GB, machine.host_memory_bytes / GB
    return (f"Beside the card {needed:.1f} GB of main memory are needed; this machine has {there:.1f} GB.",)


def _hours(seconds: float) -> float:
    return float(f"{seconds / 3600:.3g}")
