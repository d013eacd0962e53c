"""What differs between two configurations, recipes or runs: the settings, and what follows from them.

`ftf diff A B` shows this. Settings that one side does not give stand at their defaults. Quantities that follow from
several settings (effective batch, steps, warm-up steps, alpha / r) are listed under `derived.`, because two runs can
differ in every setting of a batch and still train alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetuneflow.config import RunConfig, settings

Values = Mapping[str, Any]

DERIVED = {
    "derived.effective_batch": "Examples per optimizer step and device: batch_size x gradient_accumulation.",
    "derived.steps": "Optimizer steps: max_steps, else epochs x examples / effective batch.",
    "derived.epochs": "Passes over the training data that the steps make.",
    "derived.examples_seen": "Training examples seen in all, repeats counted.",
    "derived.warmup_steps": "Steps in which the learning rate rises.",
    "derived.scaling": "Weight of the adapter's update: alpha / r, or alpha / sqrt(r) with rslora.",
}


@dataclass(frozen=True, slots=True)
class Difference:
    """One setting or derived quantity that is not the same. None: not set, or not known on that side.

    `note`: what the setting means. `ratio`: b / a, where both are positive numbers.
    """

    key: str
    a: Any
    b: Any
    note: str
    ratio: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"key": self.key, "a": self.a, "b": self.b, "ratio": self.ratio, "note": self.note}


def difference(
    a: Values | RunConfig, b: Values | RunConfig, *, examples_a: int | None = None, examples_b: int | None = None
) -> list[Difference]:
    """Every setting that differs, in the order of the run file, then the derived quantities; [] for equal inputs.

    `a`, `b`: configurations, or nested settings as in a run file. `examples_a`, `examples_b`: training examples of each
    side, where known; without them steps follow from max_steps alone. Keys that are no settings are compared as well.
    """
    notes, defaults = _notes(), _defaults()
    ours, theirs = {**defaults, **_flat(a)}, {**defaults, **_flat(b)}
    keys = [*notes, *sorted((ours.keys() | theirs.keys()) - notes.keys())]
    found = [_difference(key, ours.get(key), theirs.get(key), notes.get(key, "")) for key in keys]
    derived_a, derived_b = derived(ours, examples_a), derived(theirs, examples_b)
    if derived_a["derived.epochs"] == ours.get("training.epochs") and derived_b["derived.epochs"] == theirs.get(
        "training.epochs"
    ):
        derived_a["derived.epochs"] = derived_b["derived.epochs"] = None  # the settings say it already
    found += [_difference(key, derived_a[key], derived_b[key], note) for key, note in DERIVED.items()]
    return [entry for entry in found if not _same(entry.a, entry.b)]


def derived(flat: Values, examples: int | None = None) -> dict[str, float | None]:
    """The derived quantities of complete settings by dotted key; None where one is not known or does not apply.

    Steps are rounded to whole ones; a run counts the incomplete last batch of each epoch too.
    """
    batch = _product(flat.get("training.batch_size"), flat.get("training.gradient_accumulation"))
    epochs, max_steps = _number(flat.get("training.epochs")), _number(flat.get("training.max_steps"))
    steps = max_steps
    if steps is None and examples and batch and epochs:
        steps = float(max(1, round(epochs * examples / batch)))
    seen = _product(steps, batch)
    if max_steps is not None:
        epochs = seen / examples if seen and examples else None
    warmup = _product(_number(flat.get("training.warmup_ratio")), steps)
    return {
        "derived.effective_batch": batch,
        "derived.steps": steps,
        "derived.epochs": epochs,
        "derived.examples_seen": seen,
        "derived.warmup_steps": None if warmup is None else float(math.ceil(warmup)),
        "derived.scaling": _scaling(flat),
    }


def _scaling(flat: Values) -> float | None:
    alpha, rank = _number(flat.get("method.alpha")), _number(flat.get("method.r"))
    if flat.get("method.kind") not in ("lora", "qlora", "dora") or alpha is None or not rank or rank < 0:
        return None
    return alpha / math.sqrt(rank) if flat.get("method.rslora") else alpha / rank


# --- comparing ----------------------------------------------------------------------------------------


def _difference(key: str, a: Any, b: Any, note: str) -> Difference:
    first, second = _number(a), _number(b)
    ratio = second / first if first is not None and second is not None and first > 0 and second > 0 else None
    return Difference(key, a, b, note, ratio if ratio is not None and math.isfinite(ratio) else None)


def _same(a: Any, b: Any) -> bool:
    """Equal values: 3 and 3.0 are the same, 1 and true are not, NaN is itself."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)


def _number(value: Any) -> float | None:
    """A finite number, or None; truth values are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _product(a: Any, b: Any) -> float | None:
    first, second = _number(a), _number(b)
    return None if first is None or second is None else _number(first * second)


# --- flat settings ------------------------------------------------------------------------------------


def _flat(values: Values | RunConfig) -> dict[str, Any]:
    plain = values.model_dump(mode="json") if isinstance(values, RunConfig) else values
    return dict(_leaves(plain, "", frozenset(_defaults())))


def _leaves(values: Values, prefix: str, known: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value). A setting that is a mapping itself, such as data.mapping, stays whole."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in known:
            yield from _leaves(value, f"{key}.", known)
        else:
            yield key, value


def _defaults() -> dict[str, Any]:
    return {key: default for key, _, default, _ in settings()}


def _notes() -> dict[str, str]:
    """What each setting means, in the order of the run file."""
    return {key: text for key, _, _, text in settings()}
