"""How much work a run is: optimizer steps, examples and tokens, counted as the trainer counts them.

Rows are padded to the longest of their micro-batch, rounded up to a multiple of 8; what that adds is reckoned from how the
lengths spread. The fast path packs the rows of a step instead, or pads rows of like length (`Cutting`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from finetuneflow.config import RunConfig, Training
from finetuneflow.knowledge.activations import packs
from finetuneflow.knowledge.memory_phases import COLLATOR_MULTIPLE
from finetuneflow.knowledge.objectives import rows_per_step, takes_fast_path, traits_of
from finetuneflow.knowledge.shapes.shape import ModelShape
from finetuneflow.knowledge.values import DataFacts

STRETCH = 16  # `data.batches.EpochSampler` sorts as many steps' rows by length at a time; a test compares
# Spread of lengths where only their mean is known: log-normal, standard deviation 0.8 of the mean. Instruction sets have 0.6 (Alpaca)
# to 1.2 (ShareGPT).
ASSUMED_SPREAD = 0.8
LONGEST = 10_000_000  # tokens; whatever claims more is no length


# Tokens of a forward pass beyond which products gain nothing more, and only memory grows.
ENOUGH_TOKENS = {"cpu": 2_048, "cuda": 16_384}


@dataclass(frozen=True, slots=True)
class Budget:
    """Most tokens in a forward pass of the fast path, and why."""

    tokens: int
    reason: str


def token_budget(training: Training, max_length: int, device: str, *, longest: int | None = None) -> Budget:
    """What `training.token_budget` becomes. `longest`: tokens of the longest row, where it is known; no row is ever cut."""
    longest = min(longest or max_length, max_length)
    if training.token_budget is not None:
        return Budget(
            training.token_budget, "As asked." if training.token_budget >= longest else "As asked; a longer row goes alone."
        )
    enough, asked = ENOUGH_TOKENS[device], training.batch_size * longest
    tokens = max(min(asked, enough), longest)
    if tokens == asked:
        return Budget(tokens, f"{training.batch_size} rows as long as the longest ({longest:,} tokens).")
    if tokens == longest:
        return Budget(tokens, "The longest row.")
    return Budget(tokens, f"On this {device}, larger forward passes gain nothing.")


SMALLEST_BUDGET = 256  # tokens; below, a processor too waits for its calls


def smaller_budgets(training: Training) -> list[int]:
    """Halves of a budget that was asked for."""
    found, tokens = [], training.token_budget or 0
    while (tokens := tokens // 2) >= SMALLEST_BUDGET:
        found.append(tokens)
    return found


@dataclass(frozen=True, slots=True)
class Cutting:
    """How the fast path cuts a step: `budget` tokens to a forward pass, packed behind one another or padded."""

    budget: int
    packed: bool


def cutting_of(shape: ModelShape, config: RunConfig, device: str, data: DataFacts | None = None) -> Cutting | None:
    """None on the plain path."""
    if not takes_fast_path(config):
        return None
    longest = data.length_percentiles[-1] if data is not None and data.length_percentiles else None
    budget = token_budget(config.training, config.data.max_length, device, longest=max(longest or 0, 0) or None)
    return Cutting(budget.tokens, packs(shape, config.method.kind))


@dataclass(frozen=True, slots=True)
class Steps:
    """A run in counts, over all devices. `epochs`: passes over the rows, a fraction where `max_steps` ends one early.

    `tokens_seen` are real ones, `padded_tokens` what passes through the model. `micro_batches`: forward passes of each
    device. `row_tokens` and `row_width`: mean length of a row, and of what it is padded to. `notes`: what was assumed.
    Of pairs both sides count as tokens and one as example. Of drawn answers `examples_seen` counts answers, and a row is a
    prompt with one.
    """

    steps: int
    epochs: float
    examples_seen: int
    tokens_seen: int
    warmup_steps: int
    effective_batch: int
    micro_batches: int
    padded_tokens: int
    row_tokens: float
    row_width: float
    notes: tuple[str, ...] = ()

    @property
    def padding_share(self) -> float:
        return 1 - self.tokens_seen / self.padded_tokens if self.padded_tokens else 0.0


def steps_of(config: RunConfig, data: DataFacts, device_count: int = 1, *, cutting: Cutting | None = None) -> Steps:
    """What transformers' trainer will do with `data` (its training part, before anything is cut).

    An epoch has ceil(rows / (micro-batch x devices)) micro-batches and a step for each `gradient_accumulation` of them, the
    last step with the rest. On several devices accelerate repeats rows until the last micro-batches are full. With `cutting`
    the rows of a step are the same, in other micro-batches.
    """
    if device_count < 1:
        raise ValueError("device_count must be at least 1")
    training, traits = config.training, traits_of(config)
    lengths, rows_per_example, notes = row_lengths(config, data)
    if traits.draws:
        return _steps_of_drawn(config, data, lengths, rows_per_example, notes, device_count)
    rows = round(max(data.examples, 0) * rows_per_example)
    batch, accumulation = training.batch_size, training.gradient_accumulation
    per_epoch = math.ceil(math.ceil(rows / batch) / device_count)
    steps_per_epoch = max(math.ceil(per_epoch / accumulation), 1)
    steps = 0 if not rows else training.max_steps or math.ceil(training.epochs * steps_per_epoch)
    whole, rest = divmod(steps, steps_per_epoch)
    rows_per_epoch = rows if device_count == 1 else per_epoch * batch * device_count
    seen = whole * rows_per_epoch + min(rest * accumulation * batch * device_count, rows_per_epoch)
    longer = sum(lengths) / len(lengths)
    # Of a pair the lengths are those of its longer side.
    mean = longer if traits.sides == 1 else longer * (data.both_tokens or 2 * data.mean_tokens or 1) / (data.mean_tokens or 1)
    width = traits.sides * max(mean_width(lengths, min(batch, max(rows, 1)), groups=_groups(config, rows)), longer)
    micro_batches = whole * per_epoch + min(rest * accumulation, per_epoch)
    if cutting is not None:
        passes, width = _cut(lengths, min(training.effective_batch, max(rows, 1)), cutting, sort=training.group_by_length)
        micro_batches = max(round(seen / (training.effective_batch * device_count) * passes), steps)
    return Steps(
        steps=steps,
        epochs=steps / steps_per_epoch,
        examples_seen=seen,
        tokens_seen=round(seen * mean),
        warmup_steps=0 if training.scheduler == "constant" else math.ceil(steps * min(training.warmup_ratio, 0.999_999)),
        effective_batch=training.effective_batch * device_count,
        micro_batches=micro_batches,
        padded_tokens=round(seen * width),
        row_tokens=mean,
        row_width=width,
        notes=notes,
    )


def _steps_of_drawn(
    config: RunConfig, data: DataFacts, lengths: list[float], share: float, notes: tuple[str, ...], device_count: int
) -> Steps:
    """Runs that draw answers: a step takes some prompts, grpo and rloo answer each several times. Prompts that do not fill a
    group's last step wait for the next epoch; ppo goes on into it."""
    training, drawn = config.training, config.reinforcement
    prompts, per_step = round(max(data.examples, 0) * share), rows_per_step(config) * device_count
    if traits_of(config).family == "ppo":
        wanted = max(1, math.ceil(training.epochs * prompts / per_step))
        answers, micro_batches = per_step, math.ceil(drawn.rollout_size / training.batch_size)
    else:
        wanted = math.ceil(training.epochs * (prompts // per_step))
        answers, micro_batches = training.effective_batch * device_count, training.gradient_accumulation
    steps = 0 if not prompts else training.max_steps or wanted
    prompt = sum(lengths) / len(lengths)
    width = max(mean_width(lengths, training.batch_size), prompt) + drawn.max_new_tokens
    seen = steps * answers
    return Steps(
        steps=steps,
        epochs=steps * per_step / max(prompts, 1),
        examples_seen=seen,
        tokens_seen=round(seen * (prompt + drawn.max_new_tokens)),
        warmup_steps=0 if training.scheduler == "constant" else math.ceil(steps * min(training.warmup_ratio, 0.999_999)),
        effective_batch=training.effective_batch * device_count,
        micro_batches=steps * micro_batches,
        padded_tokens=round(seen * width),
        row_tokens=prompt + drawn.max_new_tokens,
        row_width=width,
        notes=(*notes, f"Answers are taken to be as long as they may be: {drawn.max_new_tokens:,} tokens."),
    )


# --- lengths ----------------------------------------------------------------------------------------


def row_lengths(config: RunConfig, data: DataFacts) -> tuple[list[float], float, tuple[str, ...]]:
    """(equally likely lengths of a row in ascending order, rows per example, notes) once `overlong` has been applied."""
    limit = config.data.max_length
    lengths, notes = _example_lengths(data, limit)
    if config.data.overlong == "drop":
        kept = [length for length in lengths if length <= limit]
        return kept or [float(limit)], len(kept) / len(lengths), notes
    if config.data.overlong == "split" and traits_of(config).form == "supervised":  # other forms are cut
        parts = [part for length in lengths for part in _parts(length, limit)]
        return sorted(parts), len(parts) / len(lengths), notes
    return [min(length, limit) for length in lengths], 1.0, notes


def _example_lengths(data: DataFacts, limit: int) -> tuple[list[float], tuple[str, ...]]:
    known = [min(max(length, 1), LONGEST) for length in data.length_percentiles]
    if len(known) > 1:
        return sorted((a + b) / 2 for a, b in itertools.pairwise(known)), ()
    if 0 < data.mean_tokens <= LONGEST:
        sigma = math.sqrt(math.log(1 + ASSUMED_SPREAD**2))
        normal = NormalDist(math.log(data.mean_tokens) - sigma**2 / 2, sigma)
        note = (
            f"Only the mean length of an example is known ({data.mean_tokens:,.0f} tokens): a usual spread around it is assumed."
        )
        return [math.exp(normal.inv_cdf((p + 0.5) / 100)) for p in range(100)], (note,)
    return [float(limit)], (f"The examples' lengths are not known: {limit:,} tokens each are assumed, the most there can be.",)


def _parts(length: float, limit: int) -> list[float]:
    whole = min(int(length // limit), 1_000)
    rest = length - whole * limit
    return [float(limit)] * whole + ([rest] if rest >= 1 or not whole else [])


# --- padding ----------------------------------------------------------------------------------------


def _groups(config: RunConfig, rows: int) -> int:
    """Micro-batches among which rows are sorted by length; 1 where they are not."""
    training = config.training
    if not training.group_by_length:
        return 1
    return max(min(STRETCH * training.effective_batch, rows) // training.batch_size, 1)


def _cut(lengths: Sequence[float], rows: int, cutting: Cutting, *, sort: bool) -> tuple[float, float]:
    """(forward passes of a step of `rows` rows, mean width of a row).

    Packed rows fill their budget but for half a pass at the end of a step; those above half of it cannot share one. Padded ones
    are sorted by length within the step.
    """
    mean, count = sum(lengths) / len(lengths), len(lengths)
    if cutting.packed:
        alone = rows * sum(length > cutting.budget / 2 for length in lengths) / count
        passes = 1.0 if rows * lengths[-1] <= cutting.budget else max(rows * mean / cutting.budget + 0.5, alone, 1.0)
        return passes, mean
    # As `data.batches.StepCollator` cuts them: a step of evenly spread lengths, or the same lengths sorted over several steps.
    spread = min(rows * (STRETCH if sort else 1), 256)
    passes, tokens, row = 0, 0, spread
    while row > 0:
        widest = _padded(lengths[min(int((row - 0.5) / spread * count), count - 1)])
        together = max(min(int(cutting.budget // widest), row, rows), 1)
        passes, tokens, row = passes + 1, tokens + together * widest, row - together
    return passes * rows / spread, max(tokens / spread, mean)


def _padded(length: float) -> int:
    return math.ceil(length / COLLATOR_MULTIPLE) * COLLATOR_MULTIPLE


def mean_width(lengths: Sequence[float], batch: int, *, groups: int = 1) -> float:
    """Expected width of a micro-batch of `batch` rows drawn from `lengths` (ascending), padding included.

    The longest of n draws is at most the i-th of m lengths with probability (i/m)^n. Among rows sorted into `groups`
    micro-batches, the j-th has its longest row at about (j - 1 + n/(n+1)) / groups of the distribution.
    """
    count = len(lengths)
    padded = [_padded(length) for length in lengths]
    if groups > 1:
        places = (
            [(j + batch / (batch + 1)) / groups for j in range(groups)]
            if groups <= 4096
            else [(j + 0.5) / 4096 for j in range(4096)]
        )
        return sum(padded[min(int(place * count), count - 1)] for place in places) / len(places)
    return sum(width * (((i + 1) / count) ** batch - (i / count) ** batch) for i, width in enumerate(padded))
