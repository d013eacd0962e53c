"""A training setup as figures, the setups that the reference document names, and where one stands among them.

The documented figures have one home, the recipes; here they are single numbers: a range by its geometric middle, "more than" by its end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

from finetuneflow.errors import ConfigError
from finetuneflow.knowledge.recipes import Span, load_recipe

MethodKind = Literal["lora", "qlora", "dora", "ia3", "prefix", "full"]
METHODS: tuple[str, ...] = get_args(MethodKind)
LARGEST = 1e15  # of any count
LIMITS: dict[str, tuple[float, float]] = {
    "params": (1, LARGEST),
    "examples": (1, LARGEST),
    "steps": (1, LARGEST),
    "learning_rate": (1e-12, 1),
    "batch": (1, LARGEST),
    "warmup": (0, LARGEST),
    "gpus": (0, 1_000_000),
    "hours": (1e-6, LARGEST),
    "sources": (1, LARGEST),
    "duplicate_share": (0, 1),
    "memory_gb": (0.01, 1e6),
}
OPTIONAL, WHOLE = {"hours", "sources", "memory_gb"}, {"warmup", "gpus", "sources"}
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}

# Those with figures of their own in the recipe document. The preference and reward recipes have another objective.
NAMES = (
    "alpaca",
    "vicuna",
    "lora",
    "llama2-chat",
    "dolly",
    "conservative",
    "conservative-fast",
    "conservative-ultra-fast",
    "conservative-max-quality",
    "qlora",
    "lima",
)
COMPARED = ("examples", "steps", "learning_rate", "batch", "warmup", "hours")
# The one overall mark the document gives. It gives every setup stars, but marks out of ten to this one only.
DOCUMENTED_MARKS = {"conservative": ((10, 9, 9, 7, 7, 9, 6, 10), 8.5)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A training setup as figures. `batch`: examples per optimizer step over all devices; `warmup`: steps.

    `gpus=0`: no GPU. `memory_gb`: of one card (GB of 10^9), where `gpu` is not a card of the table. `hours`: None if not
    known. `sources`: number of datasets mixed. `curated`: every example was chosen or checked by hand.
    Raises `ConfigError` (CONFIG_INVALID_VALUE) for figures that no setup has.
    """

    params: float
    examples: float
    steps: float
    learning_rate: float
    batch: float
    warmup: float = 0
    gpu: str | None = None
    gpus: int = 1
    hours: float | None = None
    method: MethodKind = "full"
    sources: int | None = None
    curated: bool = False
    duplicate_share: float = 0.0
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in LIMITS.items():
            _require(name, getattr(self, name), least, most)
        if self.method not in METHODS:
            raise ConfigError(
                "CONFIG_INVALID_VALUE", f"There is no method {self.method!r:.60}.", remedy=f"Known: {', '.join(METHODS)}."
            )

    @property
    def passes(self) -> float:
        """How often the run sees every example."""
        return self.steps * self.batch / self.examples


def _require(name: str, value: float | None, least: float, most: float) -> None:
    if value is None and name in OPTIONAL:
        return
    whole = name in WHOLE
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most or (whole and value != int(value)):  # type: ignore[operator, arg-type]
        raise ConfigError(
            "CONFIG_INVALID_VALUE",
            f"{name} cannot be {value!r:.40}.",
            where=name,
            remedy=f"Give a {'whole ' if whole else ''}number from {least:g} to {most:g}.",
        )


def parse_count(text: str | int | float) -> int:
    """A count as people write it: 114000, "114,000", "124M", "7B", "52k", "1.5e9". Raises `ConfigError` (CONFIG_INVALID_VALUE)."""
    found = None
    if isinstance(text, str) and len(text) <= 40:
        found = re.fullmatch(r"([0-9]+(?:[,_ ][0-9]{3})*(?:\.[0-9]+)?(?:e\+?[0-9]{1,2})?) ?([kmbgt]?)", text.strip().lower())
    if found:
        value = float(re.sub(r"[,_ ]", "", found[1])) * UNITS[found[2]]
    else:
        value = float(text) if isinstance(text, int | float) and not isinstance(text, bool) and abs(text) <= LARGEST else math.nan
    if not 0 <= value <= LARGEST or abs(value - round(value)) > 1e-6 * max(value, 1.0):
        raise ConfigError(
            "CONFIG_INVALID_VALUE", f"{str(text)[:40]!r} is not a count.", remedy="Write it like 114000, 52k, 124M or 7B."
        )
    return round(value)


# --- documented setups ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DocumentedSetup:
    """What the document states of a setup; None where it is silent. `stars`: its expected quality, of five."""

    name: str
    examples: float | None
    steps: float | None
    learning_rate: float | None
    batch: float | None
    warmup: float | None
    hours: float | None
    hardware: str | None
    stars: int | None


@dataclass(frozen=True, slots=True)
class Position:
    """A setup among the documented ones. `factor`: how far the nearest is, as the typical ratio of a figure (1: the same).

    `shares`: of the documented setups that state the figure, the part with fewer steps, a lower rate, … than this one.
    """

    nearest: str
    factor: float
    others: tuple[str, ...]
    shares: dict[str, float]
    text: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@lru_cache(maxsize=1)
def documented_setups() -> tuple[DocumentedSetup, ...]:
    """The documented setups in the document's order."""
    return tuple(_setup(name) for name in NAMES)


def _setup(name: str) -> DocumentedSetup:
    recipe = load_recipe(name)
    figures = recipe.phases[0].documented
    if figures is None:
        raise AssertionError(f"the recipe {name} has no documented figures")
    return DocumentedSetup(
        name=name,
        examples=_middle(figures.examples),
        steps=_middle(figures.steps),
        learning_rate=_middle(figures.learning_rate),
        batch=_middle(figures.batch),
        warmup=_middle(figures.warmup_steps),
        hours=_middle(figures.hours),
        hardware=figures.hardware,
        stars=recipe.quality,
    )


def _middle(span: Span | None) -> float | None:
    if span is None or span.exact is not None:
        return span.exact if span else None
    ends = [end for end in (span.low, span.high) if end]
    return math.exp(sum(map(math.log, ends)) / len(ends)) if ends else None


def position(figures: Mapping[str, float | None]) -> Position:
    """Where a setup stands. `figures`: those of `COMPARED` that are known; all positive or None."""
    known = {name: value for name in COMPARED if (value := figures.get(name))}
    ranked = sorted(documented_setups(), key=lambda setup: (_distance(known, setup), setup.name))
    nearest = ranked[0]
    factor = 2 ** _distance(known, nearest)
    shares = {name: share for name in known if (share := _share_below(name, known[name])) is not None}
    return Position(nearest.name, factor, tuple(setup.name for setup in ranked[1:3]), shares, _in_words(nearest, factor, shares))


def _distance(figures: Mapping[str, float], setup: DocumentedSetup) -> float:
    """Root mean square of log2 ratios over the figures both have; infinite where that is fewer than two."""
    ratios = [math.log2(value / theirs) for name, value in figures.items() if (theirs := getattr(setup, name))]
    return math.sqrt(sum(ratio * ratio for ratio in ratios) / len(ratios)) if len(ratios) > 1 else math.inf


def _share_below(name: str, value: float) -> float | None:
    stated = [theirs for setup in documented_setups() if (theirs := getattr(setup, name))]
    # Ranges are middles of logarithms: a hair's breadth is not a difference.
    return sum(theirs < value * (1 - 1e-9) for theirs in stated) / len(stated) if stated else None


def _in_words(nearest: DocumentedSetup, factor: float, shares: Mapping[str, float]) -> str:
    near = "the same as" if factor < 1.005 else f"nearest to (figures differ by a factor of {factor:.1f})"
    parts = [f"{near[0].upper()}{near[1:]} {nearest.name}."]
    words = {"steps": "fewer steps", "learning_rate": "a lower learning rate", "hours": "a shorter run"}
    told = [f"{100 * shares[name]:.0f} % have {text}" for name, text in words.items() if name in shares]
    if told:
        parts.append(f"Of the documented setups, {', '.join(told)}.")
    return " ".join(parts)
