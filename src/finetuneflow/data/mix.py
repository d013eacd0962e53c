"""Mixing: one training file out of several, of any shapes, with a given share of each.

Place in the flow: `ftf data mix` -> **mix** -> canonical JSON Lines, which `data.train` takes like any other file.

Shares are of examples in the output. Without repetition the output is the largest that keeps the shares: the scarcest
source, by its share, decides. What two sources both hold counts for the first of them alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from finetuneflow.data.examples import Example, Kind, Mapping, Problem, to_examples, write_canonical
from finetuneflow.data.similarity import exact_key, near_clusters
from finetuneflow.data.sources import read_rows
from finetuneflow.data.spool import Spool
from finetuneflow.errors import ConfigError, DataError
from finetuneflow.knowledge.situation import many

MIXED_KINDS: frozenset[Kind] = frozenset({"chat"})  # one conversational set
SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-9, 1e9  # beyond them sums and shares leave the range of a float
MOST_REPEATED = 10_000_000  # examples of a mix that repeats some: they are drawn in memory, and a typing error must not fill it


@dataclass(frozen=True, slots=True)
class Source:
    """A file and its weight; weights need not add up to 1."""

    path: Path
    weight: float

    def __post_init__(self) -> None:
        if not SMALLEST_WEIGHT <= self.weight <= LARGEST_WEIGHT:
            raise ConfigError(
                "CONFIG_INVALID_VALUE",
                f"The weight {self.weight:g} of {self.path} is not between {SMALLEST_WEIGHT:g} and {LARGEST_WEIGHT:g}.",
                where=str(self.path),
                remedy="Weights count against each other: 7 and 3 mean the same as 0.7 and 0.3.",
            )


@dataclass(slots=True)
class Taken:
    """What came of one source. `duplicates`: examples that it or an earlier source holds already."""

    file: str
    share: float
    rows_rejected: int = 0
    other_kinds: int = 0
    duplicates: int = 0
    usable: int = 0
    taken: int = 0
    repeated: int = 0


@dataclass(frozen=True, slots=True)
class Mix:
    """The result: where it is, and what of it came from where.

    `problems`: the file of rejected rows, None where there are none. `limited_by`: the file that is used up, where the others
    hold more or a larger number was asked for.
    """

    out: Path
    problems: Path | None
    examples: int
    sources: tuple[Taken, ...]
    limited_by: str | None = None

    @property
    def left_over(self) -> int:
        """Usable examples that the mix has no place for."""
        return sum(max(0, source.usable - source.taken) for source in self.sources)

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "problems": str(self.problems) if self.problems else None,
            "examples": self.examples,
            "limited_by": self.limited_by,
            "left_over": self.left_over,
            "sources": [{**asdict(source), "got_share": source.taken / max(self.examples, 1)} for source in self.sources],
        }


def parse_sources(texts: Sequence[str]) -> list[Source]:
    """`file=weight` as the command line gives it; without a weight, 1."""
    found = []
    for text in texts:
        name, separator, number = text.rpartition("=")
        if not separator or Path(text).exists():
            name, number = text, "1"
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not name or not 0 < weight < float("inf"):
            raise ConfigError(
                "CONFIG_INVALID_VALUE", f"{text[:120]!r} is not of the form file=weight.", remedy="For instance: mine.jsonl=0.7"
            )
        found.append(Source(Path(name), weight))
    return found


def mix(
    sources: Sequence[Source],
    out: Path,
    *,
    count: int | None = None,
    repeat: bool = False,
    near_duplicates: bool = False,
    mapping: Mapping | None = None,
    seed: int = 42,
) -> Mix:
    """Write the mixed file, and rejected rows into a file beside it. `count`: examples wanted; with `repeat`, sources may be used again."""
    problems: list[Problem] = []
    pools, taken = _read_all(sources, out.parent, mapping, problems)
    kept = _distinct(pools, taken, near=near_duplicates)
    wanted = _counts([source.weight for source in sources], [len(indices) for indices in kept], count, repeat=repeat)
    order: list[tuple[int, int]] = []  # (source, index)
    for number, (indices, size) in enumerate(zip(kept, wanted, strict=True)):
        order += [(number, index) for index in _sample(indices, size, random.Random(f"{seed}-{number}"))]
        taken[number].taken = size
        taken[number].repeated = max(0, size - len(indices))
    random.Random(seed).shuffle(order)
    problems_path = out.with_name(f"{out.stem}.problems.jsonl")
    examples: Iterable[Example | Problem] = (pools[number][index] for number, index in order)
    written, rejected = write_canonical(chain(examples, problems), out, problems_path=problems_path)
    falls_short = not repeat and written < (count if count is not None else sum(facts.usable for facts in taken))
    scarcest = min(taken, key=lambda facts: facts.usable / facts.share)
    return Mix(out, problems_path if rejected else None, written, tuple(taken), scarcest.file if falls_short else None)


def _read_all(
    sources: Sequence[Source], folder: Path, mapping: Mapping | None, problems: list[Problem]
) -> tuple[list[Spool], list[Taken]]:
    whole = sum(source.weight for source in sources)
    pools, taken = [], []
    for source in sources:
        pool, facts = Spool(folder), Taken(str(source.path), source.weight / whole)
        for item in to_examples(read_rows(source.path), mapping):
            if isinstance(item, Problem):
                facts.rows_rejected += 1
                problems.append(item)
            elif item.kind in MIXED_KINDS:
                pool.append(item)
            else:
                facts.other_kinds += 1
        if not pool:
            raise DataError(
                "DATASET_NOTHING_USABLE",
                f"{source.path} has no conversation that could be mixed ({many(facts.rows_rejected, 'row')} rejected, {many(facts.other_kinds, 'example')} of other kinds).",
                where=str(source.path),
                remedy=f"See why: ftf data check {source.path}",
            )
        pools.append(pool)
        taken.append(facts)
    return pools, taken


def _distinct(pools: Sequence[Spool], taken: Sequence[Taken], *, near: bool) -> list[list[int]]:
    """Per source the indices of examples that neither it nor an earlier source has already."""
    together = chain.from_iterable(pools)
    keys: Iterator[int] = iter(near_clusters(together) if near else (exact_key(example) for example in together))
    seen: set[int] = set()
    kept: list[list[int]] = []
    for pool, facts in zip(pools, taken, strict=True):
        indices = []
        for index in range(len(pool)):
            key = next(keys)
            if key not in seen:
                seen.add(key)
                indices.append(index)
        facts.duplicates, facts.usable = len(pool) - len(indices), len(indices)
        if not indices:
            raise DataError(
                "DATASET_NOTHING_USABLE",
                f"Everything in {facts.file} is in the files before it already.",
                remedy="Leave it out, or name it first.",
            )
        kept.append(indices)
    return kept


def _counts(weights: Sequence[float], available: Sequence[int], count: int | None, *, repeat: bool) -> list[int]:
    """How many examples of each source: the wanted number, or as many as keep the shares without repetition."""
    whole = sum(weights)
    shares = [weight / whole for weight in weights]
    enough = [size / share for size, share in zip(available, shares, strict=True)]  # the totals that use each source up
    wanted = count if count is not None else max(enough)
    total = wanted if repeat else min(*enough, wanted)
    if repeat and total > (most := max(MOST_REPEATED, sum(available))):
        raise ConfigError(
            "CONFIG_INVALID_VALUE",
            f"To keep the shares, the mix would have to repeat examples until it holds more than {most:,}."
            if count is None
            else f"More than {most:,} examples are asked for, most of them repeated ones.",
            where="--repeat",
            remedy="Give a smaller --count, or weights that are nearer to each other.",
        )
    exact = [share * total for share in shares]
    sizes = [int(number + 1e-9) for number in exact]
    # Largest remainders get what rounding down left over, as far as a source has it.
    rest = int(total + 1e-9) - sum(sizes)
    by_remainder = sorted(range(len(sizes)), key=lambda number: sizes[number] - exact[number])
    for number in by_remainder[: max(0, rest)]:
        if repeat or sizes[number] < available[number]:
            sizes[number] += 1
    return sizes


def _sample(indices: Sequence[int], size: int, chance: random.Random) -> list[int]:
    """A seeded sample; more than there are means every one again before any a third time."""
    chosen: list[int] = []
    while len(chosen) < size:
        chosen += chance.sample(list(indices), min(len(indices), size - len(chosen)))
    return chosen
