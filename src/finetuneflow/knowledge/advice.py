"""Whether to fine-tune at all, and what to change after a run that was not good enough. Advice, never a refusal.

    whether_to_tune   what costs less and often does as well
    after_failure     rate, steps or data for the next run, from the figures of the last one

The order is the field's: prompt engineering, retrieval, fine-tuning, full training (the meetup's slides).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from finetuneflow.config import RunConfig
from finetuneflow.errors import ConfigError
from finetuneflow.knowledge.resolve import resolve_on
from finetuneflow.knowledge.values import DataFacts, many

# What somebody wants from a tuned model.
GOALS = {
    "facts": "answers from facts that are new to the model or change",
    "format": "answers of a fixed form, such as JSON",
    "style": "a tone or a manner of answering",
    "task": "one task done well: classify, extract, rewrite",
    "domain": "the vocabulary and habits of a field",
    "conversation": "a base model that follows instructions and converses",
}
Verdict = Literal["tune", "try_first"]

# OpenAI's guide to supervised fine-tuning: 10 at the least, improvements seen from 50 to 100, start with 50 good ones.
LEAST_EXAMPLES, FEW_EXAMPLES, SEEN_TO_HELP = 10, 50, 100
CURATED_EXAMPLES = 1_000  # LIMA (arXiv:2305.11206)

_OPENAI = "OpenAI, guide to supervised fine-tuning"
_LIMA = "LIMA, arXiv:2305.11206"
_OVADIA = "Ovadia et al., arXiv:2312.05934"
_GEKHMAN = "Gekhman et al., arXiv:2405.05904"
_SLIDES = "Dat'apéro meetup, March 2024: prompt engineering, retrieval, fine-tuning, full training, in that order"


@dataclass(frozen=True, slots=True)
class Reason:
    """`against`: it speaks for trying something else first; otherwise it is a remark on the tuning."""

    text: str
    source: str
    against: bool = True


@dataclass(frozen=True, slots=True)
class Advice:
    """`try_first`: what to try before, in order; empty with the verdict "tune"."""

    verdict: Verdict
    reasons: tuple[Reason, ...]
    try_first: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_PROMPT = "Prompt engineering: instructions and a handful of examples in the prompt."
_RETRIEVAL = "Retrieval: look the facts up and put them into the prompt."
_STRUCTURED = "Structured output: let the decoder allow only what the schema allows."


def whether_to_tune(data: DataFacts | None, config: RunConfig, goal: str | None = None) -> Advice:
    """What speaks against fine-tuning here, and what to try first. `goal`: one of `GOALS`.

    Raises `ConfigError` (CONFIG_INVALID_VALUE) for another goal.
    """
    if goal is not None and goal not in GOALS:
        near = difflib.get_close_matches(goal, GOALS, n=1)
        raise ConfigError(
            "CONFIG_INVALID_VALUE",
            f"{goal[:40]!r} is no known goal.{f' Did you mean {near[0]!r}?' if near else ''}",
            where="--goal",
            remedy="Choose among: " + "; ".join(f"{name} ({text})" for name, text in GOALS.items()) + ".",
        )
    reasons, first = _by_goal(goal, config)
    if data is not None:
        by_size, prompt = _by_size(data)
        reasons += by_size
        first = ([_PROMPT] if prompt else []) + first
    against = any(reason.against for reason in reasons)
    if against:
        reasons.append(Reason("Fine-tuning is rarely the first thing to try, and retrieval is very effective.", _SLIDES))
        first = [_PROMPT, *first]
    return Advice("try_first" if against else "tune", tuple(reasons), tuple(dict.fromkeys(first)))


def _by_goal(goal: str | None, config: RunConfig) -> tuple[list[Reason], list[str]]:
    if goal == "facts":
        return [
            Reason(
                "Retrieval consistently beat fine-tuning as a way to give a model knowledge, of facts it had met and of new ones.",
                _OVADIA,
            ),
            Reason(
                "New facts are learned more slowly than known ones, and the more of them are learned, the more the model invents: "
                "the increase is linear.",
                _GEKHMAN,
            ),
            Reason(
                "Facts that change need a new run each time they do; a search index takes the new text as it is.",
                "how the two work",
            ),
        ], [_RETRIEVAL]
    if goal == "format":
        text = "A fixed form is guaranteed by constrained decoding and taught by a few examples; weights only make it likelier."
        return [Reason(text, "JSON schema decoding of llama.cpp, vLLM and the hosted APIs")], [_STRUCTURED]
    if config.training.objective == "pretrain":
        text = (
            "Continued pre-training takes many passages about each fact: models learn facts from varied repetition, not from one "
            "mention. For looking facts up, retrieval does better."
        )
        return [Reason(text, _OVADIA)], [_RETRIEVAL]
    return [], []


def _by_size(data: DataFacts) -> tuple[list[Reason], bool]:
    """Reasons from the number of different examples, and whether they would better go into a prompt."""
    distinct = round(data.examples * (1 - min(max(data.duplicate_share or 0.0, 0.0), 1.0)))
    different = "different " if distinct != data.examples else ""
    number = many(distinct, f"{different}{data.noun}")
    reasons = []
    if distinct < LEAST_EXAMPLES:
        reasons.append(
            Reason(f"{number}: fewer than the {LEAST_EXAMPLES} that hosted services ask for. They fit into a prompt.", _OPENAI)
        )
    elif distinct < FEW_EXAMPLES:
        reasons.append(
            Reason(f"{number}: improvements are seen from 50 to 100 on. Write {FEW_EXAMPLES} good ones, then measure.", _OPENAI)
        )
    elif distinct < SEEN_TO_HELP:
        reasons.append(
            Reason(
                f"{number}: where improvements begin (50 to 100). If these do not help, more of the same kind hardly will.",
                _OPENAI,
            )
        )
    elif distinct < CURATED_EXAMPLES:
        text = f"{number}: enough for a style or a task. {CURATED_EXAMPLES:,} carefully chosen examples taught a 65B model to converse."
        reasons.append(Reason(text, _LIMA, against=False))
    if data.eval_examples == 0:
        text = "Nothing is held out: whether the tuned model is better could not be shown. Set data.eval or data.eval_fraction."
        reasons.append(Reason(text, _OPENAI, against=False))
    return reasons, distinct < SEEN_TO_HELP


# --- after a run that was not good enough --------------------------------------------------------------

# The MambaSWELU strategy document: a rising loss means too high a rate, a standing one perhaps the end; where the test prompts
# fail, halve the rate, train up to 50,000 steps, or take other data.
MOST_STEPS = 50_000
RISES, STANDS = 1.02, 0.01  # last loss over the lowest before it; change of the last third
GOOD_SHARE = 0.8  # of the acceptance prompts
FEWEST_POINTS = 6  # of a curve that says anything


@dataclass(frozen=True, slots=True)
class NextRun:
    """One thing to change in the next run, with the settings that do it (none where data is what has to change)."""

    text: str
    reason: str
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def after_failure(config: RunConfig, metrics: Mapping[str, Any], *, fresh: bool = False) -> list[NextRun]:
    """What to change after a finished run, from the figures in its `metrics.json`, most telling first.

    `fresh`: the base had random weights, and was trained at another rate.
    Empty where the acceptance prompts were passed, or nothing speaks against the run. Never raises for odd values.
    """
    share = _number(metrics.get("suite_pass_share"))
    if share is not None and share >= GOOD_SHARE:
        return []
    rate = resolve_on(config, "cpu", bf16=False, fresh=fresh).learning_rate  # the same on every device
    losses = _curve(metrics.get("eval_loss_curve")) or _curve(metrics.get("train_loss_curve"))
    found = [*_by_curve(rate, losses)]
    if share is not None:
        found += _by_suite(rate, metrics, share)
    kept: dict[str, NextRun] = {}
    for item in found:
        kept.setdefault(item.text, item)
    return list(kept.values())


def _by_curve(rate: float, losses: list[float]) -> Iterator[NextRun]:
    if len(losses) < FEWEST_POINTS:
        return
    lowest, last, third = min(losses), losses[-1], losses[-max(2, len(losses) // 3) :]
    if last > RISES * lowest > 0:
        yield _half_rate(rate, f"The loss rose again, from {lowest:.3f} to {last:.3f}: the rate is too high.")
    elif lowest > 0 and max(third) - min(third) < STANDS * lowest:
        yield NextRun(
            "Take other or more data; further steps on these will hardly help.",
            f"The loss stands still: {third[0]:.3f} to {last:.3f} over the last third. The run may simply be done.",
        )


def _by_suite(rate: float, metrics: Mapping[str, Any], share: float) -> Iterator[NextRun]:
    failed = f"{100 * share:.0f} % of the acceptance prompts were passed"
    yield _half_rate(rate, f"{failed}.")
    steps = int(_number(metrics.get("steps")) or 0)
    if 0 < steps < MOST_STEPS:
        more = min(2 * steps, MOST_STEPS)
        yield NextRun(
            f"Train {more:,} steps instead of {steps:,}.",
            f"{failed}; the document goes up to {MOST_STEPS:,} steps. Early stopping ends a run that gets worse.",
            {"training.max_steps": more},
        )
    yield NextRun(
        "Take other data: answers of the kind the prompts ask for.",
        f"{failed}: what is not in the data cannot be learned from it.",
    )


def _half_rate(rate: float, reason: str) -> NextRun:
    return NextRun(f"Halve the learning rate, to {rate / 2:g}.", reason, {"training.learning_rate": rate / 2})


def _curve(value: Any) -> list[float]:
    """The finite losses of a curve; [] for anything else."""
    points = value if isinstance(value, list) else []
    found = [_number(point.get("loss")) for point in points if isinstance(point, Mapping)]
    return [loss for loss in found if loss is not None]


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None
