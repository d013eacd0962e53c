"""Splitting: a held-out part that shares nothing with what is trained on.

Place in the flow: after `examples.to_examples`, before tokenizing. Exact and near duplicates and everything of one
group (same document, same conversation tree; where asked, same prompt) fall on one side; the choice depends on the seed and the order alone.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from finetuneflow.data.examples import Example
from finetuneflow.data.similarity import Union, exact_key, near_clusters, prompt_key
from finetuneflow.errors import DataError

LeakKind = Literal["exact", "near", "group", "prompt"]
FEW_EVAL_EXAMPLES = 20  # below this, one example moves the mean loss too much to compare runs


@dataclass(frozen=True, slots=True)
class Split:
    """Indices into the examples, in ascending order. `clusters` counts the sets that had to stay together."""

    train_indices: tuple[int, ...]
    eval_indices: tuple[int, ...]
    clusters: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Leak:
    """An evaluation example that training has seen: the same, nearly the same, of the same group, or its prompt."""

    train_index: int
    eval_index: int
    kind: LeakKind


def split(examples: Sequence[Example], *, eval_fraction: float, seed: int, by_prompt: bool = False) -> Split:
    """Hold out about `eval_fraction` of the examples (0 <= fraction < 1); at least one when the fraction is above 0.

    `by_prompt`: all examples of one prompt fall on one side, as preferences about one prompt tell of each other.

    Raises `DataError` when nothing can be held out without training on it.
    """
    if not 0 <= eval_fraction < 1:
        raise DataError(
            "DATASET_BAD_SPLIT",
            f"The evaluation fraction {eval_fraction} is not between 0 and 1.",
            remedy="Use 0.1 for a tenth, or 0 for no held-out part.",
        )
    if eval_fraction == 0:
        return Split(tuple(range(len(examples))), (), len(examples))
    alike = near_clusters(examples)
    if by_prompt:
        alike = _joined(alike, map(prompt_key, examples))
    clusters, warnings = _clusters(examples, alike)
    if len(clusters) < 2:
        raise DataError(
            "DATASET_TOO_SMALL",
            f"{len(examples)} example{'s' if len(examples) != 1 else ''} cannot be split: all would be on one side (duplicates stay together).",
            remedy="Give at least 2 different examples, a separate evaluation file, or an evaluation fraction of 0.",
            context={"examples": len(examples), "minimum": 2},
        )
    held_out = _choose(clusters, max(1, round(eval_fraction * len(examples))), seed)
    if len(held_out) < FEW_EVAL_EXAMPLES:
        warnings.append(
            f"The evaluation part has {len(held_out)} examples; with fewer than {FEW_EVAL_EXAMPLES} its loss is a rough guide only."
        )
    chosen = set(held_out)
    train = tuple(index for index in range(len(examples)) if index not in chosen)
    return Split(train, tuple(sorted(held_out)), len(clusters), tuple(warnings))


def _clusters(examples: Sequence[Example], alike: list[int]) -> tuple[list[list[int]], list[str]]:
    """Index lists that must stay together. Groups are given up, with a warning, when they leave nothing to hold out."""
    grouped = _members(_joined(alike, (example.group for example in examples)))
    if len(grouped) >= 2:
        return grouped, []
    ungrouped = _members(alike)
    if len(ungrouped) < 2:
        return ungrouped, []
    return ungrouped, [
        "All examples belong to one group (one document or tree), so the evaluation part comes from that group too."
    ]


def _joined(alike: list[int], keys: Iterable[Hashable]) -> list[int]:
    """Clusters that also hold together whatever has the same key; None joins nothing."""
    union = Union(len(alike))
    first_of_key: dict[Hashable, int] = {}
    for index, (root, key) in enumerate(zip(alike, keys, strict=True)):
        union.join(index, root)
        if key is not None:
            union.join(index, first_of_key.setdefault(key, index))
    return union.roots()


def _members(roots: list[int]) -> list[list[int]]:
    members: dict[int, list[int]] = {}
    for index, root in enumerate(roots):
        members.setdefault(root, []).append(index)
    return list(members.values())


def _choose(clusters: list[list[int]], wanted: int, seed: int) -> list[int]:
    """Clusters in seeded random order while they fit; the smallest one when none fits. Never all of them."""
    order = list(clusters)
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    taken = 0
    for cluster in order:
        if len(chosen) + len(cluster) <= wanted and taken < len(clusters) - 1:
            chosen += cluster
            taken += 1
        if len(chosen) == wanted:
            break
    return chosen or min(order, key=len)


def leaks(train: Sequence[Example], evaluation: Sequence[Example], *, by_prompt: bool = False) -> list[Leak]:
    """Evaluation examples that a given training file holds too, each with one training example that shows it."""
    alike = near_clusters(chain(train, evaluation))
    seen: dict[LeakKind, dict[int | str, int]] = {"exact": {}, "near": {}, "group": {}, "prompt": {}}
    for index, example in enumerate(train):
        for kind, key in _marks(example, alike[index], by_prompt).items():
            seen[kind].setdefault(key, index)
    found = []
    for index, example in enumerate(evaluation):
        marks = _marks(example, alike[len(train) + index], by_prompt)
        hit = next((kind for kind, key in marks.items() if key in seen[kind]), None)
        if hit is not None:
            found.append(Leak(seen[hit][marks[hit]], index, hit))
    return found


def _marks(example: Example, cluster: int, by_prompt: bool) -> dict[LeakKind, int | str]:
    """By what an example can be known again, the surest first."""
    marks: dict[LeakKind, int | str] = {"exact": exact_key(example), "near": cluster}
    if example.group is not None:
        marks["group"] = example.group
    if by_prompt and (key := prompt_key(example)) is not None:
        marks["prompt"] = key
    return marks
