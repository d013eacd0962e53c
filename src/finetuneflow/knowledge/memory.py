"""How much memory a run will need, part by part, before anything is loaded.

    estimate            training: the highest of its phases (loading, training step, optimizer step, evaluation, generation)
    estimate_inference  generation: weights and the KV cache

All figures are bytes. Weights, adapters, gradients and optimizer states are counted; activations are counted by the rules of
`activations.py`; what the runtime itself takes is a constant measured once. `docs/memory.md` holds predicted against
measured figures. Sources stand beside each rule.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from finetuneflow.config import RunConfig
from finetuneflow.knowledge import memory_phases
from finetuneflow.knowledge.activations import TYPE_BYTES, kept_weights
from finetuneflow.knowledge.memory_heads import drawing_copies
from finetuneflow.knowledge.memory_phases import (
    COLLATOR_MULTIPLE,
    CPU_PROCESS,
    CUDA_CONTEXT,
    CUDA_HOST,
    Parts,
    Strategy,
    Workload,
    host_bytes,
    parts_of,
    weight_bytes,
)
from finetuneflow.knowledge.objectives import reference_of, reward_models, supervise_of, traits_of
from finetuneflow.knowledge.resolve import Resolved, resolve
from finetuneflow.knowledge.shapes.shape import ModelShape, kv_cache_bytes
from finetuneflow.knowledge.steps import Cutting, cutting_of
from finetuneflow.knowledge.values import DataFacts, Machine

Verdict = Literal["fits", "tight", "no"]

# Share of a device's memory that a plan may fill. On CUDA other programs and the allocator's unusable gaps take a few
# per cent; main memory is shared with the system and its file cache.
USABLE = {"cuda": 0.95, "cpu": 0.90}
COMFORTABLE = 0.85  # of the usable share: above it the verdict is "tight"
ROWS_CUT_TOGETHER = 256  # rows of an evaluation among which the fast path fills its passes; a test compares
DRAWN_TOGETHER = 4  # micro-batches of prompts that `training/ppo.py` answers at once; a test compares


@dataclass(frozen=True, slots=True)
class Estimate:
    """Peak memory of one device, in bytes.

    `breakdown` is of the phase that needs most (`phase`) and adds up to `total_bytes`; `phases` has every phase's total.
    `usable_bytes` is the share of `capacity_bytes` that may be planned with. `verdict`: "fits" up to 85 % of that,
    "tight" up to 100 % (or where paged optimizer states would have to leave the device), else "no".
    `host_bytes` is main memory: the same as `total_bytes` on a CPU.
    """

    breakdown: dict[str, int]
    total_bytes: int
    capacity_bytes: int
    usable_bytes: int
    verdict: Verdict
    phase: str
    phases: dict[str, int]
    host_bytes: int
    uncertain_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.verdict != "no"

    def ratio_of(self, measured_bytes: int) -> float:
        """By what factor the uncertain parts were wrong, from a measured peak; what `correction_from` takes.

        Parts that are counted exactly are taken off both sides. Call it on an estimate made with correction 1.
        """
        certain = self.total_bytes - self.uncertain_bytes
        return max(measured_bytes - certain, 0) / max(self.uncertain_bytes, 1)

    def to_dict(self) -> dict[str, Any]:
        return {
            "total_bytes": self.total_bytes,
            "capacity_bytes": self.capacity_bytes,
            "usable_bytes": self.usable_bytes,
            "fits": self.fits,
            "verdict": self.verdict,
            "phase": self.phase,
            "phases": dict(self.phases),
            "breakdown": dict(self.breakdown),
            "host_bytes": self.host_bytes,
            "uncertain_bytes": self.uncertain_bytes,
            "notes": list(self.notes),
        }


# --- training ---------------------------------------------------------------------------------------

UNCERTAIN = ("activations", "logits", "temporary", "allocator_slack")


def estimate(
    shape: ModelShape,
    config: RunConfig,
    machine: Machine,
    resolved: Resolved | None = None,
    *,
    data: DataFacts | None = None,
    strategy: Strategy = "single",
    correction: float = 1.0,
    workload: Workload | None = None,
) -> Estimate:
    """Peak memory of the run that `config` describes, on each device of `machine`.

    `correction` multiplies what is not counted exactly (activations, logits, temporaries, allocator slack); it comes from
    earlier runs on the machine through `correction_from`. `workload` overrides what config and data say about batches.
    """
    resolved = resolved or resolve(config, machine)
    workload = workload or workload_of(shape, config, resolved, data)
    device = resolved.device
    parts = parts_of(shape, config, resolved, workload)
    shares = machine.device_count if strategy == "fsdp" else 1
    phases = {
        name: {key: round(value * (correction if key in UNCERTAIN else 1.0)) for key, value in phase.items()}
        for name, phase in memory_phases.phases(parts, shares, strategy).items()
    }
    name = max(phases, key=lambda phase: sum(phases[phase].values()))
    breakdown = {key: value for key, value in phases[name].items() if value}
    total = sum(breakdown.values())
    capacity = machine.device.memory_bytes if device != "cpu" else machine.host_memory_bytes
    usable = round(capacity * USABLE[device])
    host = total if device == "cpu" else host_bytes(parts)
    notes = [*workload.notes, *_notes(parts, correction, strategy, machine)]
    return Estimate(
        breakdown=breakdown,
        total_bytes=total,
        capacity_bytes=capacity,
        usable_bytes=usable,
        verdict=_verdict(total, usable, breakdown.get("optimizer_paged", 0)),
        phase=name,
        phases={phase: sum(values.values()) for phase, values in phases.items()},
        host_bytes=host,
        uncertain_bytes=sum(breakdown.get(part, 0) for part in UNCERTAIN),
        notes=tuple(notes),
    )


def _verdict(total: int, usable: int, paged: int) -> Verdict:
    if total <= usable * COMFORTABLE:
        return "fits"
    return "tight" if total - paged <= usable else "no"


def workload_of(shape: ModelShape, config: RunConfig, resolved: Resolved, data: DataFacts | None = None) -> Workload:
    """The widest micro-batch: rows of `max_length`, or of the longest example where all are shorter, and drawn answers behind
    the longest prompt. On the fast path: as many tokens as its budget lets pass at once."""
    limit, traits = config.data.max_length, traits_of(config)
    notes = []
    longest = data.length_percentiles[-1] if data is not None and data.length_percentiles else None
    if longest is not None and longest < limit and longest > 0:
        notes.append(f"The longest example has {longest:,} tokens: data.max_length {limit:,} is never reached.")
    tokens = min(limit, longest) if longest else limit
    batch, eval_batch = config.training.batch_size, config.training.eval_batch_size
    if not (config.data.eval or config.data.eval_fraction > 0):
        eval_batch = 0
    if (cutting := cutting_of(shape, config, resolved.device, data)) is not None:
        found = _workload_of_budget(cutting, config, data, max(tokens, 1), evaluates=eval_batch > 0)
        return replace(found, notes=tuple(notes))
    drawn_tokens = config.reinforcement.max_new_tokens if traits.draws else 0
    width = -(-tokens // COLLATOR_MULTIPLE) * COLLATOR_MULTIPLE + drawn_tokens
    if data is not None and 0 < data.examples < batch and not traits.draws:
        batch = data.examples
    return Workload(
        batch=batch * traits.sides,
        tokens=width,
        eval_batch=eval_batch * traits.sides,
        eval_tokens=width,
        supervised=drawn_tokens / width if traits.draws else supervised_share(config, data),
        micro_batches=config.training.gradient_accumulation,
        drawn=drawn_at_once(config, eval_batch),
        new_tokens=drawn_tokens,
        notes=tuple(notes),
    )


def _workload_of_budget(
    cutting: Cutting, config: RunConfig, data: DataFacts | None, longest: int, *, evaluates: bool
) -> Workload:
    """The fullest forward pass of the fast path: its budget, or all rows of a step where those are fewer tokens."""
    rows = config.training.effective_batch
    if data is not None and 0 < data.examples < rows:
        rows = data.examples
    width = longest if cutting.packed else -(-longest // COLLATOR_MULTIPLE) * COLLATOR_MULTIPLE
    budget = max(cutting.budget, width)  # a row is never cut
    at_once = min(budget / width, rows)
    return Workload(
        batch=at_once,
        tokens=width,
        eval_batch=min(budget / width, max(config.training.eval_batch_size, ROWS_CUT_TOGETHER)) if evaluates else 0,
        eval_tokens=width,
        supervised=supervised_share(config, data),
        padded=not cutting.packed,
        micro_batches=math.ceil(rows / at_once),
        kept_weights=_kept_weights(data, longest),
    )


def _kept_weights(data: DataFacts | None, longest: int) -> float:
    """Per token and head, over texts of the data's lengths; where those are not known, over texts of the longest."""
    lengths = [length for length in data.length_percentiles if length > 0] if data is not None else []
    lengths = lengths or [longest]
    return sum(kept_weights(min(length, longest)) for length in lengths) / sum(lengths)


def supervised_share(config: RunConfig, data: DataFacts | None) -> float:
    """Share of the tokens that are in the loss."""
    if (
        (supervise_of(config) == "all" and traits_of(config).form == "supervised")
        or data is None
        or data.supervised_share is None
    ):
        return 1.0
    share = data.supervised_share
    return min(max(share, 0.0), 1.0) if math.isfinite(share) else 1.0


def drawn_at_once(config: RunConfig, eval_batch: int = 0) -> int:
    """Sequences whose answers are drawn together: those of a whole optimizer step (grpo, rloo; TRL generates for a step at once),
    or of some micro-batches of an update (ppo)."""
    training, family = config.training, traits_of(config).family
    if family == "group":
        return max(training.effective_batch, eval_batch)
    if family != "ppo":
        return 0
    together = DRAWN_TOGETHER * training.batch_size
    return together if eval_batch else min(together, config.reinforcement.rollout_size)


def _notes(parts: Parts, correction: float, strategy: Strategy, machine: Machine) -> list[str]:
    notes = []
    if parts.config.training.objective == "dpo" and reference_of(parts.config) == "model":
        notes.append("A frozen copy of the whole model is the reference; an adapter needs none.")
    if reward_models(parts.config):
        notes.append("A reward model with a base of its own is taken to be as large as this one.")
    if parts.shape.certainty == "typical":
        notes.append("The shape is a typical one of this size, not that of a known model.")
    if correction != 1.0:
        notes.append(f"Uncertain parts are multiplied by {correction:.2f}, learned from earlier runs on this machine.")
    if strategy != "single":
        notes.append(f"Per device, {strategy.upper()} over {machine.device_count}.")
    return notes


# --- inference ----------------------------------------------------------------------------------------


def estimate_inference(
    shape: ModelShape,
    machine: Machine,
    *,
    batch: int = 1,
    prompt_tokens: int,
    new_tokens: int,
    storage: str = "bfloat16",
    quantize: Literal["nf4", "int8"] | None = None,
    double_quantization: bool = True,
    adapter_parameters: int = 0,
    correction: float = 1.0,
) -> Estimate:
    """Peak memory of generation with a KV cache for `batch` prompts, greedy or sampled, as `Generator` runs it.

    Raises `ValueError` for counts below one (`new_tokens` may be 0: a forward pass over the prompts alone).
    """
    if batch < 1 or prompt_tokens < 1 or new_tokens < 0:
        raise ValueError("batch and prompt_tokens must be at least 1, new_tokens at least 0")
    device = "cpu" if machine.kind in ("cpu", "mps") else "cuda"
    width = TYPE_BYTES[storage]
    fixed = weight_bytes(shape, storage, quantize=quantize, double_quantization=double_quantization)
    fixed |= {"adapters": 4 * adapter_parameters, "runtime": CPU_PROCESS if device == "cpu" else CUDA_CONTEXT}
    widest = max((max(t.inputs, t.outputs) for t in shape.linears), default=0)
    largest = max((t.inputs * t.outputs for t in shape.linears), default=0)
    changing = {
        "kv_cache": batch * kv_cache_bytes(shape, prompt_tokens + new_tokens, width),
        "logits": batch * shape.vocab * (width + 4),  # of the last position alone
        "temporary": batch * prompt_tokens * 3 * widest * width
        + (largest * width if quantize else 0)
        + drawing_copies(shape.vocab, shape.hidden, batch, width, cuda=device == "cuda"),
    }
    parts = {key: round(value * (correction if key in UNCERTAIN else 1.0)) for key, value in (fixed | changing).items() if value}
    capacity = machine.device.memory_bytes if device != "cpu" else machine.host_memory_bytes
    total, usable = sum(parts.values()), round(capacity * USABLE[device])
    return Estimate(
        breakdown=parts,
        total_bytes=total,
        capacity_bytes=capacity,
        usable_bytes=usable,
        verdict=_verdict(total, usable, 0),
        phase="generation",
        phases={"generation": total},
        host_bytes=total if device == "cpu" else CUDA_HOST,
        uncertain_bytes=sum(parts.get(part, 0) for part in UNCERTAIN),
    )


# --- published figures --------------------------------------------------------------------------------


def reference_memory_gb(params_b: float, method: Literal["full", "lora", "qlora"]) -> float:
    """The chapter's formula (13.2.4): GB for a model of `params_b` billion parameters.

    Bytes per parameter: full 2 weights + 2 gradients + 8 optimizer + 4 activations; adapters of 1 % at 12 bytes over 2 (lora)
    or 0.5 (qlora). The table printed below it follows for full only: 7B gives 14.84 and 4.34, printed are 15.4 and 4.2.
    """
    per_parameter = {"full": 2 + 2 + 8 + 4, "lora": 2 + 0.01 * 12, "qlora": 0.5 + 0.01 * 12}
    if method not in per_parameter:
        raise ValueError(f"{method!r} is none of full, lora, qlora")
    return params_b * per_parameter[method]


def estimate_vram_requirements(
    model_size_billions: float,
    method: Literal["full", "lora", "qlora"] = "qlora",
    lora_rank: int = 16,
    batch_size: int = 4,
    seq_length: int = 512,
) -> dict[str, float]:
    """The chapter's exercise 2, with its keys, in GB to two decimals: a rule of thumb that `estimate` supersedes.

    It takes activations of one layer of width 4096, and r/4096 x 1 % of the model for the adapter, about a hundredth of
    what all linear layers give; the output printed below it is that of the other formula's table.
    """
    rates = {"full": (2, 2, 8, 4), "lora": (2, 2, 8, 2), "qlora": (0.5, 2, 4, 1)}
    if method not in rates:
        raise ValueError(f"{method!r} is none of full, lora, qlora")
    weight, gradient, optimizer, activation = rates[method]
    trained = model_size_billions * (1 if method == "full" else lora_rank / 4096 * 0.01)
    parts = {
        "model_gb": model_size_billions * weight,
        "gradients_gb": trained * gradient,
        "optimizer_gb": trained * optimizer,
        "activations_gb": batch_size * seq_length * 4096 * activation / 1e9,
    }
    return {"total_gb": round(sum(parts.values()), 2)} | {key: round(value, 2) for key, value in parts.items()}


# --- learning from runs -------------------------------------------------------------------------------

LOWEST_CORRECTION, HIGHEST_CORRECTION = 0.5, 2.0


def correction_from(ratios: Sequence[float]) -> float:
    """The factor for the uncertain parts from the ratios of earlier runs (`Estimate.ratio_of`): their median.

    Clamped to 0.5-2: what lies beyond is no estimation error but something else in memory. 1 without usable ratios.
    """
    usable = [ratio for ratio in ratios if math.isfinite(ratio) and ratio > 0]
    if not usable:
        return 1.0
    return min(max(statistics.median(usable), LOWEST_CORRECTION), HIGHEST_CORRECTION)
