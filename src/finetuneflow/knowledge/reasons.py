"""Why the search chose a length, a micro-batch, checkpointing, an optimizer: a sentence with a number each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from finetuneflow.knowledge.hyperparameters import Chosen
from finetuneflow.knowledge.memory import Estimate
from finetuneflow.knowledge.search import Candidate, Found, Grid
from finetuneflow.knowledge.values import GB
from finetuneflow.knowledge.variants import Asked


def solved_settings(asked: Asked, grid: Grid, found: Found, memory_of: Callable[[Candidate], Estimate]) -> dict[str, Chosen]:
    candidate = found.candidate
    values = candidate.settings
    reasons = {
        "data.max_length": _why_length(asked, grid, candidate),
        "training.batch_size": _why_batch(found),
        "training.eval_batch_size": "As in training; evaluation keeps no activations.",
        "training.gradient_accumulation": _why_accumulation(asked, candidate),
        "training.gradient_checkpointing": _why_checkpointing(asked, found, memory_of),
        "training.optimizer": _why_optimizer(asked, found),
    }
    return {key: Chosen(values[key], reason) for key, reason in reasons.items()}


def _why_length(asked: Asked, grid: Grid, candidate: Candidate) -> str:
    wanted, data = asked.config.data.max_length, asked.data
    verb = {"cut": "cut", "drop": "dropped", "split": "split"}[asked.config.data.overlong]
    share = data.share_above(candidate.max_length) if data else None
    longer = f" {share:.0%} of the examples are longer and are {verb}." if share else ""
    if candidate.max_length < grid.lengths[0]:
        unknown = (
            " How many examples that cuts is not known." if share is None else " No example is that long." if not share else ""
        )
        return f"Lowered from {grid.lengths[0]:,}: nothing else made it fit.{longer}{unknown}"
    if candidate.max_length < wanted:
        return f"The model's positions end at {candidate.max_length:,}; {wanted:,} was wanted.{longer}"
    if candidate.max_length > wanted:
        cut = data.share_above(wanted) or 0.0 if data else 0.0
        return f"Holds 99 % of the examples; {wanted:,} would cut {cut:.0%}."
    if data is not None and share == 0:
        return f"No example is longer than {candidate.max_length:,} tokens."
    return f"As you set it; it fits.{longer}" if "data.max_length" in asked.kept else f"The documented default fits.{longer}"


def _why_batch(found: Found) -> str:
    estimate, limit = found.estimate, found.estimate.usable_bytes / GB
    total = f"{estimate.total_bytes / GB:.1f} of {limit:.1f} GB usable"
    if not found.fits:
        return f"The least that can be tried; {total}."
    if estimate.verdict == "tight":
        return f"The smallest that fits, close to the limit: {total}."
    return f"The fastest that fits: {total}."


def _why_accumulation(asked: Asked, c: Candidate) -> str:
    wanted = asked.config.training.effective_batch
    devices = 1 if c.strategy == "single" else asked.machine.device_count
    product = c.batch * c.accumulation * devices
    times = f"{c.batch} x {c.accumulation}" + (f" x {devices} devices" if devices > 1 else "")
    if product == wanted:
        return f"{times} = {wanted} examples per step, as wanted."
    return f"{times} = {product} examples per step: the nearest to the wanted {wanted} that {devices} devices share equally."


def _why_checkpointing(asked: Asked, found: Found, memory_of: Callable[[Candidate], Estimate]) -> str:
    c = found.candidate
    if asked.config.training.gradient_checkpointing != "auto":
        return "As you set it."
    if not c.checkpointing:
        return "Not needed: activations fit, and recomputing them would cost a second forward pass."
    without = memory_of(replace(c, checkpointing=False))
    if without.verdict == "fits":
        return "Recomputing activations leaves room for a larger micro-batch, which is faster on the whole."
    return f"Without it {without.total_bytes / GB:.1f} GB would be needed; {without.usable_bytes / GB:.1f} GB are usable."


def _why_optimizer(asked: Asked, found: Found) -> str:
    name, breakdown = found.candidate.optimizer, found.estimate.breakdown
    if asked.config.training.optimizer != "auto":
        return "As you set it." if name == asked.config.training.optimizer else "What you set needs CUDA; this is its nearest."
    states = (breakdown.get("optimizer", 0) + breakdown.get("optimizer_paged", 0)) / GB
    texts = {
        "adamw_torch_fused": f"Exact 32-bit states of {states:.2f} GB, in one kernel.",
        "adamw_8bit": f"8-bit states of {states:.2f} GB, a quarter of the 32-bit ones, with the same results (arXiv:2110.02861).",
        "paged_adamw_8bit": f"8-bit states of {states:.2f} GB that move to main memory at peaks (QLoRA, arXiv:2305.14314).",
    }
    return texts[name]
