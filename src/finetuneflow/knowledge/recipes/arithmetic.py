"""What follows from a recipe's figures: steps x batch = examples seen, over examples = epochs.

Documents often state steps and epochs that do not fit each other. Each source of a phase gets the same sums, so the
differences can be seen; `Arithmetic.contradictions` says them in words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from finetuneflow.config import build_config
from finetuneflow.knowledge.objectives import rows_per_step
from finetuneflow.knowledge.recipes.schema import Figures, Phase, Span, load_recipe, number_text, plain, recipe_names
from finetuneflow.knowledge.resolve import usual_rate

MOST_EPOCHS = 5  # the recipe document's own rule of thumb: 2 to 5 epochs
NOTABLE = 1.5  # two step counts that differ by this factor or more are said to differ


@dataclass(frozen=True, slots=True)
class Sums:
    """What one source states and what follows from it.

    `steps`, `epochs`: as stated; `steps_implied` follows from stated epochs, `epochs_implied` from stated steps.
    `examples_per_second`: over all devices, from steps, batch and hours. `tokens_at_most`: every example at full length.
    `batch_assumed`, `examples_assumed`: the source does not state it and the recipe's own was used.
    """

    steps: Span | None
    epochs: Span | None
    batch: Span
    examples: Span | None
    steps_implied: Span | None
    epochs_implied: Span | None
    steps_for_3_epochs: Span | None
    warmup_share: Span | None
    examples_per_second: Span | None
    tokens_at_most: Span | None
    batch_assumed: bool
    examples_assumed: bool


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Sums of the reference document, of the primary source, and of the recipe's own settings on its dataset."""

    documented: Sums | None
    published: Sums | None
    recipe: Sums
    contradictions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = plain(asdict(self))
        return values


def batch_of(phase: Phase) -> int:
    """Rows of the dataset in an optimizer step, as sources count a batch: of PPO those of a round."""
    config = build_config(phase.settings)[0]
    return rows_per_step(
        config.model_copy(update={"training": config.training.model_copy(update={"objective": phase.objective})})
    )


def recipe_arithmetic(phase: Phase) -> Arithmetic:
    """The sums of a phase. Each is None where a figure for it is missing; what is assumed instead is marked."""
    config = build_config(phase.settings)[0]
    training = config.training
    batch = _exactly(batch_of(phase))
    examples = _exactly(phase.dataset.examples) if phase.dataset.examples else None
    own = Figures(
        steps=_exactly(training.max_steps) if training.max_steps else None,
        epochs=_exactly(training.epochs),
        batch=batch,
        examples=examples,
        warmup_ratio=_exactly(training.warmup_ratio),
        max_length=_exactly(config.data.max_length),
    )
    documented = _sums(phase.documented, batch, examples) if phase.documented else None
    published = _sums(phase.published, batch, examples) if phase.published else None
    return Arithmetic(documented, published, _sums(own, batch, examples), _contradictions(documented, published))


def _sums(figures: Figures, batch: Span, examples: Span | None) -> Sums:
    batch_assumed, examples_assumed = figures.batch is None, figures.examples is None and examples is not None
    batch, examples = figures.batch or batch, figures.examples or examples
    implied = _rounded(_over(_times(figures.epochs, examples), batch))
    steps = figures.steps or implied
    seen = _times(figures.steps, batch) if figures.steps else _times(figures.epochs, examples)
    return Sums(
        steps=figures.steps,
        epochs=figures.epochs,
        batch=batch,
        examples=examples,
        steps_implied=implied,
        epochs_implied=_over(_times(figures.steps, batch), examples),
        steps_for_3_epochs=_rounded(_over(_times(_exactly(3), examples), batch)),
        warmup_share=figures.warmup_ratio or _over(figures.warmup_steps, steps),
        examples_per_second=_over(seen, _times(figures.hours, _exactly(3600))),
        tokens_at_most=_times(seen, figures.max_length),
        batch_assumed=batch_assumed,
        examples_assumed=examples_assumed,
    )


def _contradictions(documented: Sums | None, published: Sums | None) -> tuple[str, ...]:
    found: list[str] = []
    if documented and documented.epochs_implied:
        implied, sum_text = documented.epochs_implied, f"{_sum_text(documented)} examples"
        low = implied.low if implied.low is not None else 0.0
        if (stated := documented.epochs) and _apart(implied, stated, 1.1):
            found.append(f"The document says {_epochs(stated)}; {sum_text} = {_epochs(implied)}.")
        elif low > MOST_EPOCHS:
            found.append(f"{sum_text} = {_epochs(implied)}, above the document's own rule of 2 to {MOST_EPOCHS}.")
    ours = documented.steps if documented else None
    theirs = (published.steps or published.steps_implied) if published else None
    if ours and theirs and published and _apart(ours, theirs):
        how = (
            f" ({_epochs(published.epochs)} x {published.examples} / {published.batch})"
            if published.epochs and not published.steps
            else ""
        )
        found.append(f"The document says {ours} steps; the primary source comes to {theirs}{how}.")
    return tuple(found)


def _sum_text(sums: Sums) -> str:
    """`3,000 steps x 128 / 52,000`, with what was assumed marked."""
    batch = f"{sums.batch} (assumed)" if sums.batch_assumed else f"{sums.batch}"
    return f"{sums.steps} steps x {batch} / {sums.examples or '?'}" + (" (assumed)" if sums.examples_assumed else "")


def _apart(a: Span, b: Span, factor: float = NOTABLE) -> bool:
    """Whether two ranges lie apart by that factor. A range without an end reaches as far as it needs to."""

    def above(upper: Span, lower: Span) -> bool:
        return upper.low is not None and lower.high is not None and upper.low >= factor * lower.high

    return above(a, b) or above(b, a)


# --- ranges -----------------------------------------------------------------------------------------


def _exactly(value: float) -> Span:
    return Span(low=value, high=value)


def _times(a: Span | None, b: Span | None) -> Span | None:
    return _combine(a, b, lambda x, y: x * y)


def _over(a: Span | None, b: Span | None) -> Span | None:
    """a / b: the smallest quotient has the largest divisor."""
    swapped = None if b is None else Span.model_construct(low=b.high, high=b.low)
    return _combine(a, swapped, lambda x, y: x / y)


def _combine(a: Span | None, b: Span | None, operation: Callable[[float, float], float]) -> Span | None:
    if a is None or b is None:
        return None
    low = operation(a.low, b.low) if a.low is not None and b.low is not None else None
    high = operation(a.high, b.high) if a.high is not None and b.high is not None else None
    return None if low is None and high is None else Span.model_construct(low=low, high=high)


def _rounded(span: Span | None) -> Span | None:
    """To whole steps, at least one."""
    if span is None:
        return None
    low, high = (None if end is None else float(max(1, round(end))) for end in (span.low, span.high))
    return Span.model_construct(low=low, high=high)


# --- tables for docs/recipes.md -----------------------------------------------------------------------


def recipe_tables() -> str:
    """Every packaged phase in Markdown: what the sources state, what follows, and where they contradict."""
    phases = [
        (recipe.name if len(recipe.phases) == 1 else f"{recipe.name}:{phase.name}", phase, recipe_arithmetic(phase))
        for recipe in map(load_recipe, recipe_names())
        for phase in recipe.phases
    ]
    lines = ["### What a recipe sets", "", "| recipe | objective | method | learning rate | batch | epochs | on its own data |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, phase, sums in phases:
        training = build_config(phase.settings)[0].training
        objective = phase.objective
        steps = f"{sums.recipe.steps_implied} steps" if sums.recipe.steps_implied else "-"
        rate = number_text(training.learning_rate or usual_rate(phase.objective, phase.method)[0])
        batch = number_text(batch_of(phase))
        lines.append(f"| `{name}` | {objective} | {phase.method} | {rate} | {batch} | {number_text(training.epochs)} | {steps} |")
    lines += ["", "### What the documents say, and what follows", ""]
    lines.append(
        "| recipe | document: steps x batch / examples | = epochs | 3 epochs are | warm-up | examples/s | primary source |"
    )
    lines.append("|---|---|---|---|---|---|---|")
    for name, _, sums in phases:
        lines.append(f"| `{name}` | " + " | ".join([*_document_cells(sums.documented), _published_cell(sums.published)]) + " |")
    lines += ["", "### Contradictions", ""]
    lines += [f"- `{name}`: {text}" for name, _, sums in phases for text in sums.contradictions]
    return "\n".join(lines) + "\n"


def _document_cells(sums: Sums | None) -> list[str]:
    if sums is None:
        return ["-"] * 5
    stated = _sum_text(sums) if sums.steps else "-"
    share = f"{_percent(sums.warmup_share)}" if sums.warmup_share else "-"
    rate = str(_rounded(sums.examples_per_second)) if sums.examples_per_second else "-"
    epochs = _epochs(sums.epochs_implied) if sums.epochs_implied else "-"
    three = f"{sums.steps_for_3_epochs} steps" if sums.steps_for_3_epochs else "-"
    return [stated, epochs, three, share, rate]


def _published_cell(sums: Sums | None) -> str:
    if sums is None:
        return "-"
    if sums.steps and sums.epochs_implied:
        return f"{sums.steps} steps x {sums.batch} / {sums.examples} = {_epochs(sums.epochs_implied)}"
    if sums.epochs and sums.steps_implied:
        return f"{_epochs(sums.epochs)} x {sums.examples} / {sums.batch} = {sums.steps_implied} steps"
    return f"{sums.steps or '?'} steps x {sums.batch}"


def _epochs(span: Span) -> str:
    """`7.4 epochs`, `3.1 to 6.2 epochs`, `< 9.6 epochs`."""
    low, high = (None if end is None else round(end, 1) for end in (span.low, span.high))
    return f"{Span.model_construct(low=low, high=high)} {'epoch' if low == high == 1 else 'epochs'}"


def _percent(span: Span) -> str:
    low, high = (None if end is None else round(100 * end, 1) for end in (span.low, span.high))
    return f"{Span.model_construct(low=low, high=high)} %"
