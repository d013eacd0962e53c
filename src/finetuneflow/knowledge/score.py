"""A setup judged against documented practice: a mark, strengths, weaknesses, its place, and what would raise it.

    score          a setup given as figures
    setup_of       the figures of a run file on a machine

The criteria are in `criteria.py`, the documented setups in `setups.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from finetuneflow.config import RunConfig
from finetuneflow.knowledge.criteria import (
    ADAPTER_RATES,
    PASSES,
    STEPS,
    USED_WARMUPS,
    Criterion,
    band_at,
    half,
    judge,
    rate_bands,
    rate_text,
)
from finetuneflow.knowledge.resolve import Resolved, resolve
from finetuneflow.knowledge.setups import COMPARED, LARGEST, Position, Setup, parse_count, position
from finetuneflow.knowledge.shapes import ModelShape
from finetuneflow.knowledge.values import GB, DataFacts, Machine

__all__ = ["Criterion", "Improvement", "Score", "Setup", "judge", "parse_count", "score", "setup_of"]

STRONG, WEAK = 9.0, 7.0  # marks from and up to which a criterion is named a strength or a weakness
ABOVE_LOWEST = 4.0  # one failing criterion is not averaged away: the overall mark is at most that far above the lowest


Changes = dict[str, Any]  # new values by field of `Setup`


@dataclass(frozen=True, slots=True)
class Improvement:
    """A change that raises the mean of the marks by `gain`. `settings`: new values by field of `Setup`.

    `overall`: the overall mark then; `scores`: the marks that change, before and after.
    """

    change: str
    settings: Changes
    overall: float
    gain: float
    scores: dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Score:
    """`overall`: see `score`. `improvements`: best first; `together`: those that add up, as one."""

    criteria: tuple[Criterion, ...]
    overall: float
    mean: float
    strengths: tuple[str, ...]
    weaknesses: tuple[str, ...]
    position: Position
    improvements: tuple[Improvement, ...]
    together: Improvement | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "criteria": [{"name": c.name, "score": _plain(c.score), "reason": c.reason} for c in self.criteria],
            "overall": _plain(self.overall),
            "mean": _plain(self.mean),
            "strengths": list(self.strengths),
            "weaknesses": list(self.weaknesses),
            "position": self.position.to_dict(),
            "improvements": [asdict(improvement) for improvement in self.improvements],
            "together": asdict(self.together) if self.together else None,
        }


def _plain(value: float | None) -> float | None:
    return int(value) if value is not None and value == int(value) else value


# --- the score ----------------------------------------------------------------------------------------


def _mean(criteria: Sequence[Criterion]) -> float:
    marks = [criterion.score for criterion in criteria if criterion.score is not None]
    return sum(marks) / len(marks)


def _overall(criteria: Sequence[Criterion]) -> float:
    lowest = min(criterion.score for criterion in criteria if criterion.score is not None)
    return half(min(_mean(criteria), lowest + ABOVE_LOWEST))


def score(setup: Setup) -> Score:
    """Judge a setup. Overall is the mean of the marks, at most four above the lowest one, rounded to the nearest half.

    Halves are the document's own steps: its example has the marks 10, 9, 9, 7, 7, 9, 6, 10, a mean of 8.375, and gets 8.5.
    Criteria that cannot be judged (no duration, no card) have no mark and are left out.
    Raises `ConfigError` for a card that is not in the table.
    """
    criteria = judge(setup)
    singles = [change for changes in _candidates(setup, criteria) if (change := _best(setup, criteria, changes)) is not None]
    return Score(
        criteria=criteria,
        overall=_overall(criteria),
        mean=_mean(criteria),
        strengths=tuple(f"{c.name}: {c.remark}" for c in criteria if c.score is not None and c.score >= STRONG),
        weaknesses=tuple(f"{c.name}: {c.remark}" for c in criteria if c.score is not None and c.score <= WEAK),
        position=position({name: getattr(setup, name) for name in COMPARED}),
        improvements=tuple(sorted(singles, key=lambda improvement: -improvement.gain)),
        together=_together(setup, criteria) if len(singles) > 1 else None,
    )


def _candidates(setup: Setup, criteria: Sequence[Criterion]) -> Iterator[list[Changes]]:
    """For each setting the values worth trying. None of them trains longer over the data than is advised."""
    (low, high), _ = rate_bands(setup)
    yield _nearest_first("learning_rate", setup.learning_rate, [float(f"{r:.2g}") for r in (low, math.sqrt(low * high), high)])
    yield _nearest_first("batch", setup.batch, [32.0, 128.0, 160.0, 192.0, 256.0])
    lengths = {int(setup.examples * passes / setup.batch) for passes in (PASSES[0], 3, PASSES[1])}
    lengths |= {int(end) for end in band_at(setup.examples, STEPS) if end * setup.batch / setup.examples <= PASSES[1]}
    ordered = _nearest_first("steps", setup.steps, [float(steps) for steps in lengths if steps >= 1])
    yield [changes | {"warmup": _usual_warmup(changes["steps"])} for changes in ordered]
    yield [{"warmup": _usual_warmup(setup.steps)}]
    more: list[Changes] = [{"examples": min(2 * setup.examples, LARGEST)}]
    if setup.passes <= PASSES[1] and setup.steps < LARGEST / 2:  # as many passes over twice the data
        more.append({**more[0], "steps": 2 * setup.steps, "warmup": _usual_warmup(2 * setup.steps)})
    yield more
    cards = next(criterion.score for criterion in criteria if criterion.name == "GPU use")
    if setup.method == "full" and cards is not None and cards < WEAK:  # where the model in full does not fit, an adapter may
        yield [{"method": kind, "learning_rate": ADAPTER_RATES[kind][0][0]} for kind in ("lora", "qlora")]
    if setup.sources is not None and setup.sources < 3:
        yield [{"sources": 3}]


def _nearest_first(name: str, now: float, values: Sequence[float]) -> list[Changes]:
    """Of changes that gain the same, the smallest is proposed: it comes first."""
    return [{name: value} for value in sorted(values, key=lambda value: abs(math.log(value / now)))]


def _usual_warmup(steps: float) -> float:
    """What setups of that length used, in two digits."""
    return float(max(1, round(float(f"{band_at(steps, USED_WARMUPS)[0]:.2g}"))))


def _changed(setup: Setup, changes: Changes) -> Setup:
    """With the changes, and the hours that follow: time is taken as proportional to the examples passed through."""
    other = replace(setup, **changes)
    if setup.hours is None:
        return other
    return replace(other, hours=min(LARGEST, max(1e-6, setup.hours * other.steps * other.batch / (setup.steps * setup.batch))))


def _best(setup: Setup, before: Sequence[Criterion], options: list[Changes]) -> Improvement | None:
    """The option that raises the mean most; None where none does."""
    tried = [improvement for changes in options if (improvement := _try(setup, before, changes)) is not None]
    return max(tried, key=lambda improvement: improvement.gain, default=None)


def _try(setup: Setup, before: Sequence[Criterion], changes: Changes) -> Improvement | None:
    changes = {name: value for name, value in changes.items() if value != getattr(setup, name)}
    after = judge(_changed(setup, changes))
    gain = _mean(after) - _mean(before)
    if gain <= 1e-9:
        return None
    scores = {
        old.name: (old.score, new.score)
        for old, new in zip(before, after, strict=True)
        if old.score is not None and new.score is not None and old.score != new.score
    }
    return Improvement(_in_words(setup, changes), changes, _overall(after), gain, scores)


def _together(setup: Setup, before: Sequence[Criterion]) -> Improvement | None:
    """The best change, then the best after it, until nothing raises the mean. More data is not part of it."""
    current, criteria = setup, before
    for _ in range(6):
        found = [
            _best(current, criteria, options)
            for options in _candidates(current, criteria)
            if not any("examples" in changes for changes in options)
        ]
        best = max((one for one in found if one), key=lambda one: one.gain, default=None)
        if best is None:
            break
        current = _changed(current, best.settings)
        criteria = judge(current)
    names = ("method", "learning_rate", "batch", "steps", "warmup", "sources")
    return _try(setup, before, {name: getattr(current, name) for name in names if getattr(current, name) is not None})


def _in_words(setup: Setup, changes: Changes) -> str:
    words = []
    for name, value in changes.items():
        label = name.replace("_", " ").replace("warmup", "warm-up")
        show = rate_text if name == "learning_rate" else str if name == "method" else "{:,.0f}".format
        words.append(f"{label} {show(getattr(setup, name))} -> {show(value)}")
    return ", ".join(words)


# --- from a run file ----------------------------------------------------------------------------------


def setup_of(
    config: RunConfig,
    shape: ModelShape,
    machine: Machine,
    data: DataFacts,
    *,
    steps: int | None = None,
    hours: float | None = None,
    resolved: Resolved | None = None,
) -> Setup:
    """The setup that a run file describes on a machine. `steps`: of the whole run, else computed from the epochs."""
    resolved = resolved or resolve(config, machine)
    gpus = machine.device_count if resolved.device == "cuda" else 0
    batch = config.training.effective_batch * max(gpus, 1)
    if steps is None:
        steps = config.training.max_steps or max(1, math.ceil(data.examples * config.training.epochs / batch))
    warms = config.training.scheduler != "constant"
    return Setup(
        params=shape.num_parameters,
        examples=data.examples,
        steps=steps,
        learning_rate=resolved.learning_rate,
        batch=batch,
        warmup=math.ceil(config.training.warmup_ratio * steps) if warms else 0,
        gpu=machine.device.name if gpus else None,
        gpus=gpus,
        hours=hours,
        method=config.method.kind,
        duplicate_share=data.duplicate_share or 0.0,
        memory_gb=machine.device.memory_bytes / GB if gpus else None,
    )
