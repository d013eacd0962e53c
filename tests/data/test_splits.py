"""Splitting: nothing of the held-out part is trained on, and the same seed gives the same parts."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuneflow.data.examples import Example, Message, Place, to_examples
from finetuneflow.data.sources import read_rows
from finetuneflow.data.splits import leaks, split
from finetuneflow.errors import DataError


def distinct(count: int, *, seed: int = 0, group: str | None = None) -> list[Example]:
    generator = random.Random(seed)
    texts = [" ".join(f"w{generator.randrange(10_000)}" for _ in range(20)) for _ in range(count)]
    return [Example("text", Place("f", i), "text", text=text, group=group) for i, text in enumerate(texts)]


def test_parts_are_disjoint_complete_and_of_the_size_asked_for() -> None:
    parts = split(distinct(1000), eval_fraction=0.1, seed=1)
    assert len(parts.eval_indices) == 100
    assert sorted(parts.train_indices + parts.eval_indices) == list(range(1000))


def test_the_same_seed_gives_the_same_split_and_another_seed_another() -> None:
    examples = distinct(300)
    assert split(examples, eval_fraction=0.1, seed=7) == split(examples, eval_fraction=0.1, seed=7)
    assert split(examples, eval_fraction=0.1, seed=7).eval_indices != split(examples, eval_fraction=0.1, seed=8).eval_indices


def test_the_split_is_pinned() -> None:
    """A changed split silently makes old evaluation numbers incomparable; this must never change unnoticed."""
    assert split(distinct(40), eval_fraction=0.1, seed=42).eval_indices == (3, 9, 10, 36)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=60), st.sampled_from([0.05, 0.1, 0.3, 0.6]), st.integers(0, 5))
def test_exact_duplicates_and_groups_never_straddle(kinds: list[int], fraction: float, seed: int) -> None:
    base = distinct(13)
    examples = [
        replace(base[kind], place=Place("f", i), group=f"g{kind // 4}" if kind % 2 else None) for i, kind in enumerate(kinds)
    ]
    try:
        parts = split(examples, eval_fraction=fraction, seed=seed)
    except DataError as error:
        assert error.code == "DATASET_TOO_SMALL" and len(set(kinds)) == 1
        return
    train, held_out = ([examples[i] for i in indices] for indices in (parts.train_indices, parts.eval_indices))
    assert train and held_out
    assert not {example.text for example in train} & {example.text for example in held_out}
    if not any("one group" in warning for warning in parts.warnings):
        assert not ({example.group for example in train} & {example.group for example in held_out}) - {None}


def test_near_duplicates_never_straddle() -> None:
    examples = []
    for example in distinct(200):
        text = example.text or ""
        longer = " ".join([text, *text.split()[::-1]])
        examples += [replace(example, text=longer), replace(example, text=longer + " end"), replace(example, text=longer.upper())]
    parts = split(examples, eval_fraction=0.2, seed=3)
    assert not {i // 3 for i in parts.train_indices} & {i // 3 for i in parts.eval_indices}
    assert parts.clusters == 200


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_fraction_above_zero_holds_out_at_least_one(count: int) -> None:
    parts = split(distinct(count), eval_fraction=0.01, seed=0)
    assert len(parts.eval_indices) == 1 and len(parts.train_indices) == count - 1
    assert "1 examples" in parts.warnings[0]


@pytest.mark.parametrize("examples", [[], distinct(1), distinct(1) * 5])
def test_what_cannot_be_split_is_refused_with_the_minimum(examples: list[Example]) -> None:
    with pytest.raises(DataError) as caught:
        split(examples, eval_fraction=0.1, seed=0)
    assert caught.value.code == "DATASET_TOO_SMALL" and "2 different examples" in (caught.value.remedy or "")


def test_clusters_larger_than_the_part_asked_for_still_leave_both_sides() -> None:
    first, second = distinct(2)
    parts = split([first] * 30 + [second] * 10, eval_fraction=0.05, seed=0)
    assert parts.eval_indices == tuple(range(30, 40))


def test_a_single_document_is_split_with_a_warning() -> None:
    parts = split(distinct(50, group="book"), eval_fraction=0.1, seed=0)
    assert len(parts.eval_indices) == 5 and "one group" in parts.warnings[0]


def test_fraction_zero_keeps_everything_and_nonsense_is_refused() -> None:
    assert split(distinct(3), eval_fraction=0, seed=0).train_indices == (0, 1, 2)
    for fraction in (-0.1, 1, 1.5):
        with pytest.raises(DataError) as caught:
            split(distinct(3), eval_fraction=fraction, seed=0)
        assert caught.value.code == "DATASET_BAD_SPLIT"


def test_leaks_between_given_files_are_reported_with_their_kind() -> None:
    train = distinct(50)
    fresh = distinct(10, seed=9)
    near = replace(train[5], text=f"{train[5].text} {train[5].text} more".upper())
    evaluation = [*fresh, train[3], near, replace(fresh[0], text="something else entirely", group="doc")]
    train = [*train, replace(train[0], group="doc")]
    found = {leak.eval_index: (leak.train_index, leak.kind) for leak in leaks(train, evaluation)}
    assert found == {10: (3, "exact"), 11: (5, "near"), 12: (50, "group")}


def test_messages_count_as_content_for_leaks() -> None:
    def chat(answer: str) -> Example:
        return Example("chat", Place("f", 0), "s", (Message("user", "q"), Message("assistant", answer)))

    assert [leak.kind for leak in leaks([chat("a b c d")], [chat("a  b c d"), chat("x y z w")])] == ["exact"]


def test_tens_of_thousands_of_rows_are_split_in_seconds() -> None:
    examples = distinct(30_000)
    started = time.process_time()
    split(examples, eval_fraction=0.1, seed=0)
    assert time.process_time() - started < 8


@pytest.mark.shared_data
def test_the_real_duplicates_of_metropole_stay_on_one_side(shared_data: Path) -> None:
    examples = [item for item in to_examples(read_rows(shared_data / "metropole/metropole.jsonl")) if isinstance(item, Example)]
    parts = split(examples, eval_fraction=0.1, seed=0)
    train = {examples[i].messages for i in parts.train_indices}
    assert not any(examples[i].messages in train for i in parts.eval_indices)
    assert abs(len(parts.eval_indices) - len(examples) / 10) < 5
    assert leaks([examples[i] for i in parts.train_indices], [examples[i] for i in parts.eval_indices]) == []


def test_passages_of_one_document_stay_on_one_side(tmp_path: Path) -> None:
    texts = []
    for number in range(4):
        path = tmp_path / f"book{number}.txt"
        path.write_text("\n\n".join(f"Chapter {i} of book {number}. " + f"word{i} story{number} " * 400 for i in range(12)))
        texts += [e for e in to_examples(read_rows(path)) if isinstance(e, Example)]
    found = split(texts, eval_fraction=0.25, seed=1)
    sides = [{texts[i].place.file for i in side} for side in (found.train_indices, found.eval_indices)]
    assert len(texts) > 8 and sides[0] and sides[1] and not sides[0] & sides[1]
