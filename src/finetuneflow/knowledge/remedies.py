"""Remedies computed for one run: settings that would have helped, in order of the harm they do.

Of a memory failure the message itself is measured (`memory_figures`), and every change of settings is put to a prediction
where there is one. The run needed at least what the message says: where that is more than was predicted, predictions are
raised by the same factor before a remedy is called sufficient.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from finetuneflow.config import RunConfig
from finetuneflow.errors import FineTuneFlowError
from finetuneflow.knowledge.criteria import ADAPTER_RATES, RATES, rate_text
from finetuneflow.knowledge.memory import Estimate
from finetuneflow.knowledge.objectives import least_batch, takes_fast_path, traits_of
from finetuneflow.knowledge.resolve import objective_rate, resolve_on
from finetuneflow.knowledge.steps import smaller_budgets
from finetuneflow.knowledge.values import GB, Machine

WhatIf = Callable[[dict[str, Any]], int]

USABLE = 0.95  # share of a device's memory that a run can fill: the rest is lost to gaps between blocks
CONTEXT_BYTES = 1_500_000_000  # what a process holds on a card besides tensors, generously; more belongs to somebody else
SHORTEST = 256  # tokens; a lower limit would cut most answers
SMALL_RANK = 8
SHORTEST_ANSWER = 32  # drawn tokens; below, hardly anything can be said


@dataclass(frozen=True, slots=True)
class Remedy:
    """`settings`: dotted settings with their new values. `saves`: the predicted saving in words; `enough`: whether it suffices
    by that prediction, None without one."""

    text: str
    settings: dict[str, Any] = field(default_factory=dict)
    saves: str | None = None
    command: str | None = None
    enough: bool | None = None


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """What an out-of-memory message says, in bytes; None where it is silent. `foreign`: held by other processes."""

    wanted: int | None = None
    capacity: int | None = None
    free: int | None = None
    allocated: int | None = None
    reserved: int | None = None
    foreign: int | None = None

    @property
    def needed(self) -> int | None:
        """Least memory that this process would have needed."""
        if self.wanted is None or self.capacity is None or self.free is None:
            return None
        return self.capacity - self.free - (self.foreign or 0) + self.wanted

    @property
    def idle(self) -> int | None:
        """Reserved by the allocator in pieces that did not fit."""
        return None if self.reserved is None or self.allocated is None else max(0, self.reserved - self.allocated)


UNITS = {"bytes": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_SIZE = r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?(bytes|[kmgt]i?b|b)\b"
# PyTorch's messages since 0.4 (c10/cuda/CUDACachingAllocator.cpp, pull requests 13751 and 99699; "capacty" was once printed),
# MPS (aten/mps/MPSAllocator.mm), the CPU allocator (c10/core/impl/alloc_cpu.cpp) and NumPy.
_FIGURES = {
    "wanted": rf"(?:tried to allocate|unable to allocate) {_SIZE}",
    "capacity": rf"(?:total capac(?:i)?ty of {_SIZE}|{_SIZE} total capacity|max allowed: {_SIZE})",
    "free": rf"(?:of which {_SIZE} is free|{_SIZE} free)",
    "allocated": rf"(?:{_SIZE} is allocated by pytorch|{_SIZE} already allocated|mps allocated: {_SIZE})",
    "idle": rf"(?:{_SIZE} is reserved by pytorch but unallocated|{_SIZE} cached)",
    "reserved": rf"{_SIZE} reserved in total by pytorch",
}
_OTHER_PROCESS = re.compile(rf"process [0-9]{{1,10}} has {_SIZE} memory in use")


def memory_figures(text: str) -> MemoryFigures:
    """The figures of the last out-of-memory message of an output; all None where there is none."""
    lower = text.lower()
    start = max(lower.rfind("tried to allocate"), lower.rfind("unable to allocate"))
    if start < 0:
        return MemoryFigures()
    begin = lower.rfind("mps backend out of memory", max(0, start - 300), start)  # it names figures before that word
    passage = lower[begin if begin >= 0 else start : start + 1_500].replace("\n", " ")
    found = {name: _bytes(re.search(pattern, passage)) for name, pattern in _FIGURES.items()}
    idle, allocated = found.pop("idle"), found["allocated"]
    if found["reserved"] is None and idle is not None and allocated is not None:
        found["reserved"] = allocated + idle
    if begin >= 0 and found["free"] is None and found["capacity"] is not None:
        other = _bytes(re.search(rf"other allocations: {_SIZE}", passage)) or 0
        found["free"] = max(0, found["capacity"] - (allocated or 0) - other)
    return MemoryFigures(**found, foreign=_foreign(passage, found))


def _foreign(passage: str, found: dict[str, int | None]) -> int | None:
    """Memory of other processes: told by name, or what no figure of this process accounts for."""
    if "this process has" in passage:  # otherwise the one process named may be this one, seen from inside a container
        return sum(_size(*match.groups()) for match in _OTHER_PROCESS.finditer(passage))
    capacity, free, reserved = found["capacity"], found["free"], found["reserved"]
    if capacity is None or free is None or reserved is None or "process" in passage:
        return None
    rest = capacity - free - reserved
    return rest if rest > CONTEXT_BYTES else 0


def _bytes(match: re.Match[str] | None) -> int | None:
    if match is None:
        return None
    number, unit = [group for group in match.groups() if group is not None][:2]
    return _size(number, unit)


def _size(number: str, unit: str) -> int:
    return round(float(number) * UNITS[unit])


# --- memory ---------------------------------------------------------------------------------------------


def for_memory(
    config: RunConfig | None,
    figures: MemoryFigures,
    estimate: Estimate | None,
    machine: Machine | None,
    what_if: WhatIf | None,
) -> tuple[Remedy, ...]:
    """Remedies when an accelerator's memory ran out, least harm first; those that need no setting before all."""
    found = list(_without_settings(figures))
    if config is not None:
        capacity = figures.capacity or (estimate.capacity_bytes if estimate else machine.device.memory_bytes if machine else None)
        usable = round((capacity - (figures.foreign or 0)) * USABLE) if capacity else None
        found += _by_settings(config, "cuda", usable, figures.needed, estimate, machine, what_if)
    return tuple(found)


def for_host_memory(
    config: RunConfig | None,
    figures: MemoryFigures,
    estimate: Estimate | None,
    machine: Machine | None,
    what_if: WhatIf | None,
) -> tuple[Remedy, ...]:
    """Remedies when main memory ran out. On a machine with a GPU the settings of the step do not decide that."""
    if config is None:
        return ()
    on_cpu = config.training.device == "cpu" or machine is None or machine.kind in ("cpu", "mps")
    if not on_cpu:
        return (
            Remedy(
                "Store the weights in 16 bits: the whole model passes through main memory while it is loaded.",
                {"model.dtype": "bfloat16"},
                command=command_for({"model.dtype": "bfloat16"}),
            ),
        )
    usable = estimate.usable_bytes if estimate else round(0.9 * machine.host_memory_bytes) if machine else None
    return tuple(_by_settings(config, "cpu", usable, None, estimate, machine, what_if))


def _without_settings(figures: MemoryFigures) -> Iterator[Remedy]:
    if figures.foreign:
        alone = figures.needed is not None and figures.capacity is not None and figures.needed <= figures.capacity * USABLE
        text = f"End other programs on this card: {_gb(figures.foreign)} of it are not this run's."
        yield Remedy(text, saves=_gb(figures.foreign), command="nvidia-smi", enough=alone)
    if figures.idle and figures.wanted and figures.idle >= figures.wanted:
        text = (
            f"Let the allocator join pieces: {_gb(figures.idle)} were reserved but in pieces too small for {_gb(figures.wanted)}."
        )
        command = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True ftf train run.yaml"
        yield Remedy(text, saves=f"up to {_gb(figures.idle)}", command=command)


@dataclass(frozen=True, slots=True)
class _Prediction:
    """Predicted peaks of a run with changed settings, and whether they fit."""

    what_if: WhatIf | None
    usable: int | None
    needed: int | None
    now: int | None

    def of(self, settings: dict[str, Any]) -> int | None:
        if self.what_if is None:
            return None
        try:
            return self.what_if(settings)
        except FineTuneFlowError:  # these settings do not go together for this model
            return None

    def fits(self, predicted: int | None) -> bool | None:
        if predicted is None or self.usable is None:
            return None
        factor = max(1.0, self.needed / self.now) if self.needed and self.now else 1.0
        return predicted * factor <= self.usable

    def remedy(self, text: str, settings: dict[str, Any]) -> Remedy | None:
        """The remedy with its figures; None where it is predicted to save nothing."""
        predicted = self.of(settings)
        saves = None
        if predicted is not None and self.now is not None:
            if predicted >= self.now:
                return None
            saves = f"{_gb(self.now - predicted)} ({_gb(self.now)} -> {_gb(predicted)} predicted)"
        return Remedy(text, settings, saves, command_for(settings), self.fits(predicted))


def _by_settings(
    config: RunConfig,
    device: str,
    usable: int | None,
    needed: int | None,
    estimate: Estimate | None,
    machine: Machine | None,
    what_if: WhatIf | None,
) -> list[Remedy]:
    bare = _Prediction(what_if, usable, needed, None)
    prediction = _Prediction(what_if, usable, needed, bare.of({}))
    singles = []
    for text, options in _changes(config, device, estimate, machine):
        chosen = next((settings for settings in options if prediction.fits(prediction.of(settings))), None)
        if chosen is None:  # no prediction: the mildest step; none suffices: the strongest
            chosen = options[0] if prediction.now is None else options[-1]
        remedy = prediction.remedy(text.format(**{key.split(".")[-1]: value for key, value in chosen.items()}), chosen)
        if remedy is not None:
            singles.append(remedy)
    if prediction.now is None or prediction.usable is None or any(remedy.enough for remedy in singles):
        return singles
    return [_together(prediction, singles), *singles]


def _together(prediction: _Prediction, singles: list[Remedy]) -> Remedy:
    """The mildest changes that suffice together, or the word that none do."""
    settings: dict[str, Any] = {}
    for remedy in singles:
        merged = settings | remedy.settings
        before, after = prediction.of(settings), prediction.of(merged)
        if after is None or (before is not None and after >= before):
            continue
        settings = merged
        if prediction.fits(after):
            together = prediction.remedy("No single change is enough; these together are predicted to be.", settings)
            if together is not None:
                return together
    least = prediction.of(settings) or prediction.now or 0
    factor = max(1.0, prediction.needed / prediction.now) if prediction.needed and prediction.now else 1.0
    return Remedy(
        f"Take a smaller base model, or a device with at least {math.ceil(least * factor / USABLE / GB)} GB: "
        "all changes of settings together are not predicted to be enough.",
        enough=None,
    )


def _changes(
    config: RunConfig, device: str, estimate: Estimate | None, machine: Machine | None
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Texts with the settings to try, mildest first; the order is that of the harm done to the result."""
    training, method = config.training, config.method
    fast = takes_fast_path(config)
    if estimate is not None and estimate.phase == "evaluation" and training.eval_batch_size > 1 and not fast:
        yield (
            "Evaluate {eval_batch_size} example(s) at a time: evaluation is where the peak is.",
            [{"training.eval_batch_size": 1}],
        )
    if estimate is not None and estimate.phase == "generation":
        yield from _less_drawn(config)
    if fast and training.token_budget is not None:  # the micro-batch decides nothing then
        if budgets := [{"training.token_budget": tokens} for tokens in smaller_budgets(training)]:
            yield "At most {token_budget} tokens in a forward pass: the same result, a little slower.", budgets
    elif batches := _smaller_batches(training.batch_size, training.effective_batch, least_batch(config)):
        yield "Smaller micro-batch at the same effective batch: the same result, a little slower.", batches
    if training.gradient_checkpointing == "off" or (training.gradient_checkpointing == "auto" and device == "cpu"):
        yield (
            "Recompute activations instead of keeping them: the same result, about a third slower.",
            [{"training.gradient_checkpointing": "on"}],
        )
    quantizes = machine is None or machine.bitsandbytes
    if quantizes and training.optimizer in ("adamw_torch", "adamw_torch_fused", *(("auto",) if device == "cpu" else ())):
        eight = "paged_adamw_8bit" if device == "cuda" else "adamw_8bit"
        yield "Keep the optimizer's state in 8 bits: hardly a difference in quality.", [{"training.optimizer": eight}]
    if method.is_adapter and config.model.dtype == "float32" and method.kind != "qlora":
        yield "Store the frozen weights in 16 bits.", [{"model.dtype": "bfloat16"}]
    if method.kind == "qlora" and not method.double_quantization:
        yield "Quantise the 4-bit constants too.", [{"method.double_quantization": True}]
    lengths = [{"data.max_length": n} for n in _shorter(config.data.max_length)]
    if lengths:
        yield "Shorter examples, at most {max_length} tokens: what is longer is cut.", lengths
    if method.kind in ("lora", "dora") and quantizes:
        yield "Load the base in 4 bits (QLoRA): slower steps, slightly lower quality.", [{"method.kind": "qlora"}]
    if method.kind == "full":
        own = objective_rate(training.objective, "lora")
        rates = {kind: own[0] if own else ADAPTER_RATES[kind][0][0] for kind in ("lora", "qlora")}
        kinds = ("lora", "qlora") if quantizes else ("lora",)
        options = [{"method.kind": kind, "training.learning_rate": rates[kind]} for kind in kinds]
        yield "Train an adapter instead of all weights ({kind}), at an adapter's learning rate.", options
    if method.kind in ("lora", "qlora", "dora") and method.r > SMALL_RANK:
        smaller = {"method.r": SMALL_RANK, "method.alpha": method.alpha * SMALL_RANK / method.r}
        yield "Lower rank: the adapter learns less.", [smaller]


def _less_drawn(config: RunConfig) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Where the peak is in drawing answers: fewer at once (whole groups), or shorter ones."""
    training, drawn = config.training, config.reinforcement
    fewer = [
        {"training.gradient_accumulation": n}
        for n in range(training.gradient_accumulation - 1, 0, -1)
        if training.batch_size * n % drawn.samples_per_prompt == 0
    ]
    if traits_of(config).family == "group" and fewer:
        yield "Draw fewer answers in a step ({gradient_accumulation} micro-batches): a noisier step.", fewer
    if drawn.max_new_tokens > SHORTEST_ANSWER:
        yield (
            "Shorter answers, at most {max_new_tokens} tokens: longer ones are cut off.",
            [{"reinforcement.max_new_tokens": max(drawn.max_new_tokens // 2, SHORTEST_ANSWER)}],
        )


def _smaller_batches(batch: int, effective: int, least: int = 1) -> list[dict[str, Any]]:
    """Micro-batches below `batch` that divide the effective batch, largest first."""
    sizes = [size for size in range(batch - 1, least - 1, -1) if effective % size == 0]
    return [{"training.batch_size": size, "training.gradient_accumulation": effective // size} for size in sizes]


def _shorter(length: int) -> list[int]:
    """Halves of a length down to the shortest that is of use."""
    found = []
    while length // 2 >= SHORTEST:
        length //= 2
        found.append(length)
    return found


# --- others ---------------------------------------------------------------------------------------------


def for_non_finite(config: RunConfig | None, machine: Machine | None) -> tuple[Remedy, ...]:
    """Clipping, number range, warm-up, rate: in that order, as far as the run does not have them."""
    if config is None:
        return ()
    training, found = config.training, []
    if training.max_grad_norm == 0 or training.max_grad_norm > 1:
        found.append(_setting("Clip gradients.", {"training.max_grad_norm": 1.0}))
    bf16 = machine is not None and bool(machine.device.bf16)
    if training.precision == "fp16" or (
        training.precision == "auto" and machine is not None and machine.kind == "cuda" and not bf16
    ):
        better = "bf16" if bf16 else "fp32"
        found.append(_setting("Compute in a type with a wider range: fp16 overflows at 65,504.", {"training.precision": better}))
    if config.model.dtype == "float16":
        found.append(
            _setting("Store the weights in a type with a wider range.", {"model.dtype": "bfloat16" if bf16 else "float32"})
        )
    if training.warmup_ratio < 0.03:
        found.append(_setting("Warm up: the first steps at full rate are the riskiest.", {"training.warmup_ratio": 0.03}))
    found.append(_lower_rate(config))
    return tuple(found)


def _lower_rate(config: RunConfig) -> Remedy:
    rate, kind = resolve_on(config, "cpu", bf16=False).learning_rate, config.method.kind  # the same on every device
    high = max(band[1] for _, band in RATES) if kind == "full" else ADAPTER_RATES[kind][0][1]
    lower = high if rate > 2 * high else float(f"{rate / 10:.2g}")
    why = f"{rate_text(rate)} is above the {rate_text(high)} advised for {kind}" if rate > high else "a tenth is a good try"
    return _setting(f"Lower the learning rate to {rate_text(lower)}: {why}.", {"training.learning_rate": lower})


def for_disk(config: RunConfig | None) -> tuple[Remedy, ...]:
    """Fewer checkpoints, as far as the run keeps more than needed."""
    if config is None or config.training.keep_checkpoints == 1:
        return ()
    text = f"Keep fewer checkpoints: {config.training.keep_checkpoints} and the best one were kept."
    return (_setting(text, {"training.keep_checkpoints": 1}),)


def for_token_ids(config: RunConfig | None) -> tuple[Remedy, ...]:
    """A shorter length, where positions may be the cause."""
    if config is None or config.data.max_length <= 1024:
        return ()
    text = f"Keep within the model's context: {config.data.max_length:,} tokens may be more than it has positions for."
    return (_setting(text, {"data.max_length": 1024}),)


def without_quantization(config: RunConfig | None, what_if: WhatIf | None, estimate: Estimate | None) -> tuple[Remedy, ...]:
    """LoRA in 16 bits needs no bitsandbytes; said with the memory it takes where that is known."""
    if config is None or config.method.kind != "qlora":
        return ()
    settings = {"method.kind": "lora"}
    usable = estimate.usable_bytes if estimate else None
    prediction = _Prediction(what_if, usable, None, None)
    needs = prediction.of(settings)
    text = "Train LoRA on unquantised weights, which needs no bitsandbytes"
    text += f" but {_gb(needs)} of memory." if needs is not None else " but more memory."
    return (Remedy(text, settings, None, command_for(settings), prediction.fits(needs)),)


def _setting(text: str, settings: dict[str, Any]) -> Remedy:
    return Remedy(text, settings, None, command_for(settings))


def command_for(settings: dict[str, Any]) -> str | None:
    """The command that starts the run anew with other settings."""
    if not settings:
        return None
    return "ftf train run.yaml" + "".join(f" --set {name}={_yaml(value)}" for name, value in settings.items())


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return (
        rate_text(value)
        if isinstance(value, float) and value < 0.01
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _gb(value: int) -> str:
    return f"{value / GB:,.1f} GB" if value >= GB / 10 else f"{value / 1e6:,.0f} MB"
