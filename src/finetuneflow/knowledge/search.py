"""The fastest setting that fits, found by search over a grid: length, micro-batch, checkpointing, optimizer, strategy.

Time comes from `cost.estimate_cost`, memory from `memory.estimate`. The search is exact on the grid; what it takes for granted is
that a larger micro-batch or a longer limit never needs less memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetuneflow.config import RunConfig
from finetuneflow.knowledge.memory import Estimate
from finetuneflow.knowledge.memory_phases import Strategy
from finetuneflow.knowledge.values import DataFacts, Machine

SHORTEST = 256  # tokens; below, most examples would lose their answer
LENGTH_MULTIPLE = 8
AS_FAST = 1.01  # estimated times this close are equal

# In this order where time is equal: exact states first, then a quarter of their size, then paged out when memory is short.
OPTIMIZERS = {"cuda": ("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"), "cpu": ("adamw_torch_fused",)}
STRATEGIES: tuple[Strategy, ...] = ("single", "ddp", "fsdp")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A point of the grid. `batch` and `accumulation` are per device."""

    max_length: int
    batch: int
    accumulation: int
    checkpointing: bool
    optimizer: str
    strategy: Strategy = "single"

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "data.max_length": self.max_length,
            "training.batch_size": self.batch,
            "training.eval_batch_size": self.batch,
            "training.gradient_accumulation": self.accumulation,
            "training.gradient_checkpointing": "on" if self.checkpointing else "off",
            "training.optimizer": self.optimizer,
        }

    @property
    def memory_line(self) -> tuple[Any, ...]:
        """Candidates that differ in micro-batch alone share this."""
        return (self.max_length, self.checkpointing, self.optimizer, self.strategy)


@dataclass(frozen=True, slots=True)
class Grid:
    """The values each setting may take. Lengths in the order of preference.

    `enough`: tokens of a forward pass beyond which the micro-batch changes nothing (None: it always does). Rows are as long as the
    limit, or as `longest` where all are shorter.
    """

    lengths: tuple[int, ...]
    per_device: Mapping[Strategy, int]  # examples per optimizer step and device
    checkpointing: tuple[bool, ...]
    optimizers: tuple[str, ...]
    least_batch: int = 1
    enough: int | None = None
    longest: int | None = None

    def batches(self, examples: int, max_length: int) -> list[int]:
        """Micro-batches of a step of `examples`, ascending, up to the first that holds `enough`."""
        tokens = min(max_length, self.longest or max_length)
        sizes = [batch for batch in divisors(examples) if batch >= self.least_batch]
        too_few = sum(self.enough is None or batch * tokens < self.enough for batch in sizes)
        return sizes[: too_few + 1]

    def candidates(self, max_length: int) -> list[Candidate]:
        return [
            Candidate(max_length, batch, examples // batch, checkpointing, optimizer, strategy)
            for strategy, examples in self.per_device.items()
            for batch in self.batches(examples, max_length)
            for checkpointing in self.checkpointing
            for optimizer in self.optimizers
        ]


def divisors(number: int) -> list[int]:
    """Micro-batches that accumulate to exactly `number` examples, ascending."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def lengths(wanted: int, default: int | None = None) -> tuple[int, ...]:
    """The wanted length, then its halves and those of `default` down to `SHORTEST`, descending."""
    found = {wanted}
    for length in (wanted, min(wanted, default or wanted)):
        found.add(length)
        while (length := length // 2 // LENGTH_MULTIPLE * LENGTH_MULTIPLE) >= SHORTEST:
            found.add(length)
    return tuple(sorted(found, reverse=True))


def per_device_examples(effective_batch: int, devices: int) -> int:
    """Examples per step and device that come nearest to the effective batch over all devices; at least 1."""
    return max(1, round(effective_batch / devices))


@dataclass(frozen=True, slots=True)
class Found:
    """The best point of a grid, its memory, and its expected time in seconds. `fits` is false where nothing does."""

    candidate: Candidate
    estimate: Estimate
    seconds: float

    @property
    def fits(self) -> bool:
        return self.estimate.fits


def search(grid: Grid, memory_of: Callable[[Candidate], Estimate], seconds_of: Callable[[Candidate], float]) -> Found:
    """The best point of `grid`.

    The longest length at which anything fits is kept. There, the fastest candidate that fills at most 85 % of the usable memory
    wins; where none does, the one that needs least of those that fit at all: near the limit an estimate may be wrong, and slow
    beats stopped. What is as fast to a hundredth is told apart by preference: without checkpointing, the plainer optimizer and
    strategy, the larger micro-batch. Where nothing fits, the candidate that needs least is returned with its estimate.
    """
    shortest = _least_needed(grid, grid.lengths[-1], memory_of)
    if not shortest[1].fits:
        return Found(*shortest, seconds_of(shortest[0]))
    for length in grid.lengths:
        least = shortest if length == grid.lengths[-1] else _least_needed(grid, length, memory_of)
        if least[1].fits:
            return _fastest(grid.candidates(length), grid, memory_of, seconds_of) or Found(*least, seconds_of(least[0]))
    raise AssertionError("the shortest length fits")


def _least_needed(grid: Grid, length: int, memory_of: Callable[[Candidate], Estimate]) -> tuple[Candidate, Estimate]:
    """The candidate of a length that must keep least on the device: one of those with the smallest micro-batch."""
    candidates = grid.candidates(length)
    least = min(candidate.batch for candidate in candidates)
    smallest = [c for c in candidates if c.batch == least]
    return min(((c, memory_of(c)) for c in smallest), key=lambda pair: (resident(pair[1]), _preference(pair[0], grid)))


def _fastest(
    candidates: Sequence[Candidate],
    grid: Grid,
    memory_of: Callable[[Candidate], Estimate],
    seconds_of: Callable[[Candidate], float],
) -> Found | None:
    """The preferred one of those that fit comfortably and are as fast as the fastest of them, to `AS_FAST`.

    Larger micro-batches than one that does not fit are passed over.
    """
    least = min(c.batch for c in candidates)
    too_large = {c.memory_line: least for c in candidates if c.batch == least and memory_of(c).verdict != "fits"}
    times = {c: seconds_of(c) for c in candidates if c.memory_line not in too_large}
    best: Found | None = None
    limit = math.inf
    for candidate in sorted(times, key=lambda c: times[c]):
        line = candidate.memory_line
        if times[candidate] > limit:
            break
        if line in too_large and candidate.batch >= too_large[line]:
            continue
        estimate = memory_of(candidate)
        if estimate.verdict != "fits":
            too_large[line] = candidate.batch
            continue
        limit = min(limit, AS_FAST * times[candidate])
        if best is None or _preference(candidate, grid) < _preference(best.candidate, grid):
            best = Found(candidate, estimate, times[candidate])
    return best


def resident(estimate: Estimate) -> int:
    """Bytes that must stay on the device: paged optimizer states may leave it."""
    return estimate.total_bytes - estimate.breakdown.get("optimizer_paged", 0)


def _preference(c: Candidate, grid: Grid) -> tuple[Any, ...]:
    return (c.checkpointing, grid.optimizers.index(c.optimizer), STRATEGIES.index(c.strategy), -c.batch)


# --- settings -----------------------------------------------------------------------------------------


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """`config` with dotted settings replaced, unvalidated: for values that come from here."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return config.model_copy(update={name: getattr(config, name).model_copy(update=inner) for name, inner in sections.items()})


def used_machine(machine: Machine, strategy: Strategy) -> Machine:
    """The devices a strategy uses."""
    return machine if strategy != "single" else replace(machine, devices=machine.devices[:1])


def nominal_data(data: DataFacts | None, max_length: int) -> DataFacts:
    """The data, or a thousand examples of full length to compare settings by."""
    return data or DataFacts(examples=1_000, mean_tokens=float(max_length))
