"""The eight criteria a setup is judged by, as continuous functions of the setup.

Documented bands give full marks; two points are lost for each doubling outside, unless a rule says otherwise. Where two
documented rules contradict each other, both are used and the reason says so. `docs/scoring.md` has the tables. Everything is
measured in logarithms: being off by a factor counts, not by an amount.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from finetuneflow.knowledge.setups import Setup
from finetuneflow.knowledge.values import GB

Band = tuple[float, float]

PER_DOUBLING = 2.0  # points lost for each doubling away from a documented band

# --- documented bands ---------------------------------------------------------------------------------
# Between two rows a band changes gradually, so that no border decides: (where, (low, high)), interpolated in logarithms.

# Golden rules, learning rate by parameters: below 1B, 1-7B, above 7B.
RATES = ((1e9, (5e-6, 1e-5)), (1.5e9, (1e-6, 5e-6)), (7e9, (1e-6, 5e-6)), (10.5e9, (5e-7, 1e-6)))
USED_RATES = (5e-6, 2e-5)  # lesson 1: nine models in ten
# (the method's own band, the widest that is used). LoRA and QLoRA: the chapter, quiz question 3; each tolerates the other's.
# IA3: T-Few (Liu et al. 2022) 3e-3, PEFT's example 8e-3. Prefix: Li and Liang (2021) 5e-5, PEFT's examples 1e-2 and 3e-2.
ADAPTER_RATES: dict[str, tuple[Band, Band]] = {
    "lora": ((1e-4, 3e-4), (1e-4, 5e-4)),
    "dora": ((1e-4, 3e-4), (1e-4, 5e-4)),
    "qlora": ((2e-4, 5e-4), (1e-4, 5e-4)),
    "ia3": ((3e-3, 8e-3), (1e-3, 1e-2)),
    "prefix": ((1e-3, 1e-2), (5e-5, 3e-2)),
}
_METHOD_WORDS = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "dora": "DoRA",
    "ia3": "IA3",
    "prefix": "prefix tuning",
}
# Too low is slow; too high destroys what the model knew (lesson 1: above 1e-4 the full model forgets).
RATE_BELOW, RATE_ABOVE = 2.0, 3.0

SWEET_BATCH, USED_BATCH = (128.0, 192.0), (128.0, 256.0)  # lesson 2: sweet spot; consensus
# Golden rules, batch by memory of a card in GB: below 24, about 24, above 40.
BATCHES = ((20, (64, 128)), (23, (128, 256)), (40, (128, 256)), (60, (256, 512)))
ADAPTER_BATCH = (16.0, 32.0)  # the chapter, 13.2.6: 16; recipe "LoRA": 32

# Golden rules, steps by examples: below 50k, 50-150k, above 150k. Below Dolly's 15k the lower end shrinks with the data; the
# upper end goes down to LIMA's 2,000 steps for 1,000 examples.
STEPS = (
    (1, (2 / 15, 2)),
    (1_000, (2_000 / 15, 2_000)),
    (15_000, (2_000, 5_000)),
    (33_000, (2_000, 5_000)),
    (50_000, (10_000, 25_000)),
    (150_000, (10_000, 25_000)),
    (225_000, (25_000, 100_000)),
)
PASSES = (2.0, 5.0)  # golden rules: epochs

# Golden rules, warm-up by total steps: below 5k, 5-15k, above 15k. Below 2,000 steps the same shares as there.
WARMUPS = (
    (1, (0.025, 0.1)),
    (2_000, (50, 200)),
    (5_000, (50, 200)),
    (7_500, (200, 500)),
    (15_000, (200, 500)),
    (22_500, (500, 2_000)),
)
# What the documented setups did, by total steps: Dolly, Alpaca, Vicuna, Llama 2-Chat. Below, Dolly's share of 2.5 %.
USED_WARMUPS = ((1, (0.025,)), (2_000, (50,)), (3_000, (100,)), (12_000, (360,)), (75_000, (150,)))
WARMUP_TOLERANCE = math.sqrt(2)
RULE_WARMUP = 7.0  # inside the golden rule's band but not near what the setups did
NO_WARMUP = 2.0  # LIMA (Zhou et al. 2023) trained without

# Examples -> mark. 1,000: LIMA, if chosen by hand; 15k: Dolly ("limited"); 50k-150k: the usual size; 1M: Llama 2-Chat.
SIZES = ((10, 0.0), (100, 2.0), (1_000, 5.0), (15_000, 7.0), (50_000, 8.0), (100_000, 9.0), (1_000_000, 10.0))
CURATED_SIZES = ((10, 0.0), (100, 4.0), (1_000, 8.0))
FEW_SOURCES = {1: 1.0, 2: 0.5}  # points off: a single kind of data generalises less

# Examples per card and step that keep it busy, by parameters: Llama 2-Chat 2 (up to 70B), Dolly 4 (12B), Alpaca 16 (7B).
BUSY = ((1e9, (8,)), (7e9, (4,)), (10.5e9, (2,)))
# Bytes per parameter of weights, gradients and optimizer: the chapter's table, 13.2.4 (7B: 112, 15.4, 4.2 GB).
STATE_BYTES = {"full": 16.0, "qlora": 0.6}
ADAPTER_STATE_BYTES = 2.2
FILLED = (0.175, 0.7)  # share of a card's memory: from Alpaca's (112 GB on eight of 80 GB) to where activations need the rest
EMPTY_CARD, SHARDED = 5.0, 9.0

QUICK_HOURS = 10.0  # Vicuna, "best compromise"
STEADY_BATCH = {True: 8.0, False: 128.0}  # adapter or not: lesson 2 calls 32 to 64 unstable, for full fine-tuning


@dataclass(frozen=True, slots=True)
class Criterion:
    """`score`: 0 to 10 in halves; None where the setup says too little to judge. `remark`: the short form of `reason`."""

    name: str
    score: float | None
    reason: str
    remark: str


# --- bands --------------------------------------------------------------------------------------------


def band_at(at: float, rows: Sequence[tuple[float, tuple[float, ...]]]) -> tuple[float, ...]:
    """The band at a place: interpolated between rows in logarithms, constant beyond the first and last."""
    if at <= rows[0][0]:
        return rows[0][1]
    for (left, low), (right, high) in itertools.pairwise(rows):
        if at <= right:
            share = math.log(at / left) / math.log(right / left)
            return tuple(a if a == b else a * (b / a) ** share for a, b in zip(low, high, strict=True))
    return rows[-1][1]


def _outside(value: float, low: float, high: float) -> float:
    """Doublings that a positive value lies outside a band: negative below, 0 inside, positive above."""
    return min(0.0, math.log2(value / low)) + max(0.0, math.log2(value / high))


def _within(value: float, low: float, high: float, full: float = 10.0) -> float:
    """Full marks inside, two points less for each doubling outside."""
    return full - PER_DOUBLING * abs(_outside(value, low, high))


def _curve(value: float, knots: Sequence[tuple[float, float]]) -> float:
    """Marks between knots of (value, mark), linear in the logarithm of the value, constant beyond."""
    if value <= knots[0][0]:
        return knots[0][1]
    for (left, low), (right, high) in itertools.pairwise(knots):
        if value <= right:
            return low + (high - low) * math.log(value / left) / math.log(right / left)
    return knots[-1][1]


def half(value: float) -> float:
    """To the nearest half, upwards in the middle, between 0 and 10."""
    return math.floor(min(10.0, max(0.0, value)) * 2 + 0.5 + 1e-9) / 2


# --- the eight criteria -------------------------------------------------------------------------------

Judged = tuple[float | None, str, str]  # exact mark, reason, remark


def rate_bands(setup: Setup) -> tuple[Band, Band]:
    if setup.method != "full":
        return ADAPTER_RATES[setup.method]
    low, high = band_at(setup.params, RATES)
    return (low, high), (min(low, USED_RATES[0]), max(high, USED_RATES[1]))


def _judge_rate(setup: Setup) -> Judged:
    own, used = rate_bands(setup)
    rate, whose = setup.learning_rate, f"{_METHOD_WORDS[setup.method]} of {count_text(setup.params)} parameters"
    away = _outside(rate, *own)
    beyond = _outside(rate, *used)
    slope = RATE_ABOVE if away > 0 else RATE_BELOW
    # Up to one point for leaving the method's own band, the full slope for leaving what is used at all.
    gap = abs(_outside(used[1] if away > 0 else used[0], *own))
    tolerated = min(1.0, slope * gap) * min(1.0, abs(away) / gap) if gap else 0.0
    mark = 10.0 - tolerated - slope * abs(beyond)
    if not away:
        return (
            mark,
            f"{rate_text(rate)} lies in the documented band {_range(own)} for {whose}.",
            "safe learning rate, little forgetting",
        )
    side = "above" if away > 0 else "below"
    reason = f"{rate_text(rate)} lies {side} the documented band {_range(own)} for {whose}"
    if not beyond:
        return mark, f"{reason}, but inside what is used, {_range(used)}.", f"learning rate {side} the advised band"
    harm = "a full model forgets what it knew" if setup.method == "full" else "training becomes unstable"
    effect = harm if away > 0 else "training is slow and changes little"
    factor = 2 ** abs(beyond)
    return (
        mark,
        f"{reason}, {factor:.1f} times {'over' if away > 0 else 'under'} all that is used: {effect}.",
        f"{effect} at this rate",
    )


def _batch_limits(setup: Setup) -> Band:
    memory = _memory_gb(setup)
    low, high = band_at(memory, BATCHES) if memory else USED_BATCH
    return min(low, USED_BATCH[0]), max(high, USED_BATCH[1])


def _judge_batch(setup: Setup) -> Judged:
    batch = setup.batch
    if setup.method != "full":
        low, high = ADAPTER_BATCH
        knots = [(low, 10.0), (high, 10.0), (USED_BATCH[0], 9.0), (SWEET_BATCH[1], 9.0), (USED_BATCH[1], 8.0)]
        limits, wanted = (low, USED_BATCH[1]), f"the {low:g} to {high:g} of documented adapter runs"
    else:
        limits, wanted = _batch_limits(setup), f"the sweet spot of {SWEET_BATCH[0]:g} to {SWEET_BATCH[1]:g}"
        low, high = SWEET_BATCH
        # Full marks in the middle of the sweet spot, 9 at its ends, 8 at the end of the consensus and of what the memory bears.
        knots = [(low, 9.0), (math.sqrt(low * high), 10.0), (high, 9.0), (USED_BATCH[1], 8.0), (limits[1] * (1 + 1e-9), 8.0)]
        if limits[0] < low:
            knots.insert(0, (limits[0], 9.0 - min(1.0, PER_DOUBLING * math.log2(low / limits[0]))))
    away = _outside(batch, *limits)
    mark = _curve(batch, knots) - PER_DOUBLING * abs(away)
    if low <= batch <= high:
        edge = "" if mark > 9.75 else ", towards its end" if mark > 9.25 else ", at its end"
        return mark, f"{batch:,.0f} examples per step lie in {wanted}{edge}.", "batch in the sweet spot"
    if not away:
        return mark, f"{batch:,.0f} examples per step lie outside {wanted}, but inside {_range(limits)}.", "usable batch"
    effect = "slow steps and few updates" if away > 0 else "noisy, unstable steps"
    return (
        mark,
        f"{batch:,.0f} examples per step lie a factor of {2 ** abs(away):.1f} outside {_range(limits)}: {effect}.",
        effect,
    )


def _judge_data(setup: Setup) -> Judged:
    usable = max(setup.examples * (1.0 - setup.duplicate_share), 1.0)
    mark = _curve(usable, SIZES)
    if setup.curated:
        mark = max(mark, _curve(usable, CURATED_SIZES))
    off = FEW_SOURCES.get(setup.sources or 0, 0.0)
    reason = f"{usable:,.0f} different examples" if setup.duplicate_share else f"{usable:,.0f} examples"
    reason += " chosen by hand" if setup.curated else ""
    reason += f" (Dolly 15,000, Alpaca 52,000, Vicuna 70,000, Llama 2-Chat 1,000,000){'; only ' if off else '; '}"
    reason += "how many sources they come from is not known." if setup.sources is None else f"{setup.sources} source(s)."
    size = "large" if usable >= 50_000 else "small"
    return mark - off, reason, f"{size} dataset of {usable:,.0f} examples"


def _judge_steps(setup: Setup) -> Judged:
    band = band_at(setup.examples, STEPS)
    by_size, by_passes = _within(setup.steps, band[0], band[1]), _within(setup.passes, *PASSES)
    mark = (max(by_size, 0.0) + max(by_passes, 0.0)) / 2
    steps = f"{setup.steps:,.0f} steps lie {_where(setup.steps, band)} the documented {_range(band)} for {count_text(setup.examples)} examples"
    passes = f"they are {_passes(setup.passes)} over the data where {PASSES[0]:g} to {PASSES[1]:g} are advised"
    agree = (by_size < 10.0) == (by_passes < 10.0)
    remark = "steps fit the data"
    if by_size < 10.0 or by_passes < 10.0:
        remark = f"{setup.steps:,.0f} steps, {_passes(setup.passes)} over the data"
        remark += ": overfitting" if setup.passes > PASSES[1] * 2 else ""
    return mark, f"{steps}{' and' if agree else ', but'} {passes}: the mean of {_mark(by_size)} and {_mark(by_passes)}.", remark


def _used_warmup(steps: float) -> Band:
    used = band_at(steps, USED_WARMUPS)[0]
    return used / WARMUP_TOLERANCE, used * WARMUP_TOLERANCE


def _judge_warmup(setup: Setup) -> Judged:
    rule, used = band_at(setup.steps, WARMUPS), _used_warmup(setup.steps)
    if setup.warmup == 0:
        return NO_WARMUP, f"No warm-up; {_range(rule)} steps are advised for {setup.steps:,.0f}.", "no warm-up"
    near = _within(setup.warmup, *used)
    allowed = _within(setup.warmup, min(rule[0], used[0]), max(rule[1], used[1]), full=RULE_WARMUP)
    mark = max(near, allowed)
    share = setup.warmup / setup.steps
    reason = f"{setup.warmup:,.0f} steps ({100 * share:.1f} % of {setup.steps:,.0f}) lie {_where(setup.warmup, rule)} the advised {_range(rule)}"
    away = _outside(setup.warmup, *used)
    if not away:
        return max(mark, NO_WARMUP), f"{reason}, and near what setups of that length used.", "usual warm-up"
    length = "long" if away > 0 else "short"
    reason += f"; {2 ** abs(away):.1f} times {'more' if away > 0 else 'less'} than setups of that length used ({_range(used)})."
    return (
        max(mark, NO_WARMUP) if away < 0 else mark,
        reason,
        f"warm-up {'perhaps too' if mark >= RULE_WARMUP else 'too'} {length}",
    )


def _judge_gpus(setup: Setup) -> Judged:
    if not setup.gpus:
        return None, "No GPU in this setup.", "no GPU"
    memory = _memory_gb(setup)
    if memory is None:
        return None, "The card is not named, so its use cannot be judged.", "card not named"
    each, busy = setup.batch / setup.gpus, band_at(setup.params, BUSY)[0]
    work = max(0.0, 10.0 + PER_DOUBLING * min(0.0, math.log2(each / busy)))
    states = setup.params * STATE_BYTES.get(setup.method, ADAPTER_STATE_BYTES) / GB
    room, most, filled = _judge_memory(states / memory, setup.gpus)
    text = f"{each:,.3g} examples per card and step ({busy:,.2g} or more keep it busy): {_mark(work)}; weights, gradients and optimizer "
    text += f"of {states:,.3g} GB {filled} of {memory:,.0f} GB: {_mark(room)}."
    remark = f"{setup.gpus} card(s) kept busy" if work == 10.0 else f"only {each:,.2g} examples per card and step"
    return min((work + room) / 2, most), text, remark if most == 10.0 else "too little memory for the model"


def _judge_memory(share: float, gpus: int) -> tuple[float, float, str]:
    """(mark, the most that GPU use can get, words) for states that are `share` of one card's memory."""
    low, high = FILLED
    if share <= low:
        return max(EMPTY_CARD, _within(share, low, high)), 10.0, f"fill {100 * share:.2g} % of a card, so a smaller one would do,"
    if share <= high:
        return 10.0, 10.0, f"fill {100 * share:.0f} % of a card"
    spread = share / gpus
    if spread <= high:
        return SHARDED, 10.0, f"fit only when sharded over {math.ceil(share / high)} cards"
    left = max(0.0, (1.0 - spread) / (1.0 - high))
    return SHARDED * left, 10.0 * left, f"leave no room for the batch on {gpus} card(s)"


def _judge_time(setup: Setup) -> Judged:
    if setup.hours is None:
        return None, "The duration is not known.", "duration not known"
    mark = 10.0 - PER_DOUBLING * max(0.0, math.log2(setup.hours / QUICK_HOURS))
    rate = setup.steps * setup.batch / (setup.hours * 3600)
    pace = f" {rate:,.1f} examples per second are passed through."
    compared = "Alpaca took 3 h, Vicuna 10 h, Llama 2-Chat 100 h."
    remark = (
        f"quick ({_hours(setup.hours)})"
        if mark > 7.0
        else f"slow ({_hours(setup.hours)}, where {QUICK_HOURS:g} to 20 h are usual)"
    )
    return mark, f"{_hours(setup.hours)}: {compared}{pace}", remark


def _judge_stability(setup: Setup) -> Judged:
    adapter = setup.method != "full"
    _, used = rate_bands(setup)
    hot = RATE_ABOVE * max(0.0, _outside(setup.learning_rate, *used))
    needed = min(band_at(setup.steps, WARMUPS)[0], _used_warmup(setup.steps)[0])
    short = 3.0 if setup.warmup == 0 else min(3.0, max(0.0, math.log2(needed / setup.warmup)))
    noisy = 1.5 * max(0.0, math.log2(STEADY_BATCH[adapter] / setup.batch))
    losses = {
        f"a rate above {rate_text(used[1])}": hot,
        f"a warm-up below {needed:,.0f} steps": short,
        f"a batch below {STEADY_BATCH[adapter]:g}": noisy,
    }
    taken = [f"{text} ({-points:.1f})" for text, points in losses.items() if points > 0]
    if not taken:
        return 10.0, "Moderate rate, enough warm-up, steady batch: nothing here makes a loss diverge.", "very stable"
    return 10.0 - sum(losses.values()), f"Points are lost for {', '.join(taken)}.", "risk of instability"


JUDGES = {
    "learning rate": _judge_rate,
    "batch size": _judge_batch,
    "data quality": _judge_data,
    "steps": _judge_steps,
    "warm-up": _judge_warmup,
    "GPU use": _judge_gpus,
    "time": _judge_time,
    "stability": _judge_stability,
}


def _memory_gb(setup: Setup) -> float | None:
    if setup.memory_gb is not None or not setup.gpu or not setup.gpus:
        return setup.memory_gb if setup.gpus else None
    from finetuneflow.knowledge.facts import gpu

    return float(gpu(setup.gpu).memory_bytes) / GB


def judge(setup: Setup) -> tuple[Criterion, ...]:
    """The eight criteria, in the document's order. Raises `ConfigError` for a card that is not in the table."""
    found = []
    for name, rule in JUDGES.items():
        exact, reason, remark = rule(setup)
        found.append(Criterion(name, None if exact is None else half(exact), reason, remark))
    return tuple(found)


# --- words --------------------------------------------------------------------------------------------


def rate_text(value: float) -> str:
    return f"{value:.2g}" if value >= 0.01 else re.sub(r"\.?0*e-0?", "e-", f"{value:.2e}")


def count_text(value: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def _range(band: Sequence[float]) -> str:
    show = rate_text if band[1] < 0.1 else (lambda value: f"{value:,.3g}" if value < 10 else f"{value:,.0f}")
    return f"{show(band[0])} to {show(band[1])}"


def _where(value: float, band: Sequence[float]) -> str:
    if away := _outside(value, band[0], band[1]):
        return "above" if away > 0 else "below"
    return "at the top edge of" if value >= band[1] / 1.05 else "inside"


def _passes(value: float) -> str:
    return f"{value:.0f} passes" if value >= 10 else f"{value:.1f} passes"


def _mark(value: float) -> str:
    return f"{max(value, 0.0):.1f}"


def _hours(value: float) -> str:
    return f"{value:,.0f} h" if value >= 10 else f"{value:.2g} h"
