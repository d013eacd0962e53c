"""Batches: padding is invisible, and the order depends on seed and epoch alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuneflow.data.batches import FILLED_TO, IGNORED, Collator, EpochSampler, StepCollator, next_tokens

PAD = 9
lists = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=20), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(rows=lists, multiple=st.sampled_from([1, 8, 64]))
def test_every_token_and_label_is_where_it_was_and_all_else_is_masked(rows: list[list[int]], multiple: int) -> None:
    batch = Collator(PAD, multiple_of=multiple)(
        [{"index": 100 + i, "input_ids": row, "labels": row[::-1]} for i, row in enumerate(rows)]
    )
    width = batch["input_ids"].shape[1]
    assert width % multiple == 0 and max(map(len, rows)) <= width < max(map(len, rows)) + multiple
    assert batch["row_ids"].tolist() == [100 + i for i in range(len(rows))]
    for i, row in enumerate(rows):
        gap = width - len(row)
        assert batch["input_ids"][i].tolist() == row + [PAD] * gap
        assert batch["labels"][i].tolist() == row[::-1] + [IGNORED] * gap
        assert batch["attention_mask"][i].tolist() == [1] * len(row) + [0] * gap


def test_a_padding_token_inside_a_row_stays_visible_and_supervised() -> None:
    """Where padding and end of turn are one token, the end is still learned."""
    batch = Collator(PAD, multiple_of=1)(
        [{"index": 0, "input_ids": [1, PAD], "labels": [IGNORED, PAD]}, {"index": 1, "input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    )
    assert batch["attention_mask"][0].tolist() == [1, 1, 0] and batch["labels"][0].tolist() == [IGNORED, PAD, IGNORED]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 200), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000))
def test_an_epoch_is_a_permutation_that_only_seed_and_epoch_decide(size: int, seed: int, epoch: int) -> None:
    def order() -> list[int]:
        sampler = EpochSampler(size, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(1)
    one = order()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert order() == one and sorted(one) == list(range(size)) and len(EpochSampler(size, seed=seed)) == size
    assert torch.equal(torch.random.get_rng_state(), before), "and it draws nothing from the global random state"


def test_epochs_and_seeds_differ() -> None:
    orders = set()
    for seed in range(3):
        for epoch in range(3):
            sampler = EpochSampler(50, seed=seed)
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 9


def test_grouping_keeps_every_row_once_and_wastes_less_padding() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(5, 400) for _ in range(1003)]
    plain = EpochSampler(1003, seed=1)
    grouped = EpochSampler(1003, seed=1, lengths=lengths, group_size=16)
    order = list(grouped)
    assert sorted(order) == list(range(1003))

    def padded(rows: list[int]) -> int:
        return sum(16 * max(lengths[row] for row in rows[i : i + 16]) for i in range(0, len(rows), 16))

    assert padded(order) < 0.75 * padded(list(plain))


def test_grouped_order_is_a_function_of_seed_and_epoch_and_differs_between_epochs() -> None:
    lengths = [(7 * i) % 50 for i in range(200)]
    one, two = (EpochSampler(200, seed=3, lengths=lengths, group_size=8) for _ in range(2))
    torch.rand(5)  # the global random state plays no part
    assert list(one) == list(two)
    two.set_epoch(1)
    assert list(one) != list(two)
    firsts = [lengths[row] for row in list(one)[::8]]
    assert firsts != sorted(firsts, reverse=True)  # long and short steps are mixed


# --- steps --------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "packed": {"packed": True},
    "padded": {"packed": False},
    "as they come": {"rows_each": 3},
}


@st.composite
def steps(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows of different lengths; of some nothing is learned, of some a single token. Ids tell rows and places apart."""
    made = []
    for i, length in enumerate(draw(st.lists(st.integers(1, 30), min_size=1, max_size=9))):
        ids = [1000 * (i + 1) + place for place in range(length)]
        learned = draw(st.sets(st.integers(0, length - 1)))
        made.append({"index": 70 + i, "input_ids": ids, "labels": [t if k in learned else IGNORED for k, t in enumerate(ids)]})
    return made


def texts_of(micro_batch: dict[str, Any]) -> list[tuple[list[int], list[int], list[int]]]:
    """(ids, targets, positions) of each text of a micro-batch, padding left out."""
    ids, targets = micro_batch["input_ids"], micro_batch["targets"]
    assert ids.shape == targets.shape and ids.dtype == targets.dtype == torch.long
    if "lengths" in micro_batch:
        assert "attention_mask" not in micro_batch, "transformers would take it as one text"
        assert ids.shape == micro_batch["position_ids"].shape == (1, sum(micro_batch["lengths"]))
        parts = [side[0].split(micro_batch["lengths"]) for side in (ids, targets, micro_batch["position_ids"])]
        texts = [(a.tolist(), b.tolist(), c.tolist()) for a, b, c in zip(*parts, strict=True)]
        if set(texts[-1][0]) == {PAD}:  # filling
            filling = texts.pop()
            assert set(filling[1]) == {IGNORED} and filling[2] == list(range(len(filling[0]))) and len(filling[0]) < FILLED_TO
        return texts
    mask = micro_batch["attention_mask"].bool()
    assert (ids[~mask] == PAD).all() and (targets[~mask] == IGNORED).all()
    return [(ids[i][m].tolist(), targets[i][m].tolist(), list(range(int(m.sum())))) for i, m in enumerate(mask)]


@pytest.mark.parametrize("way", WAYS)
@given(rows=steps(), budget=st.integers(1, 70))
def test_every_row_is_in_a_step_once_with_the_next_token_as_the_target_of_each(
    way: str, rows: list[dict[str, Any]], budget: int
) -> None:
    step = StepCollator(PAD, budget=budget, **WAYS[way])(rows)
    assert step["row_ids"].tolist() == [row["index"] for row in rows]
    assert step["tokens"] == sum(len(row["input_ids"]) for row in rows)
    texts = [text for micro_batch in step["micro_batches"] for text in texts_of(micro_batch)]
    wanted = [(row["input_ids"], [*row["labels"][1:], IGNORED], list(range(len(row["input_ids"])))) for row in rows]
    assert sorted(texts) == sorted(wanted)
    assert way != "as they come" or texts == wanted


@given(rows=steps(), budget=st.integers(1, 70))
def test_a_packed_row_is_within_the_budget_or_one_longer_text(rows: list[dict[str, Any]], budget: int) -> None:
    for micro_batch in StepCollator(PAD, budget=budget, packed=True)(rows)["micro_batches"]:
        assert sum(micro_batch["lengths"]) <= budget or len(micro_batch["lengths"]) == 1


@given(rows=steps(), budget=st.integers(64, 200))
def test_packed_rows_come_in_few_lengths(rows: list[dict[str, Any]], budget: int) -> None:
    for micro_batch in StepCollator(PAD, budget=budget, packed=True)(rows)["micro_batches"]:
        assert micro_batch["input_ids"].shape[1] in {*range(FILLED_TO, budget, FILLED_TO), budget}


@given(rows=steps(), budget=st.integers(1, 200))
def test_a_padded_micro_batch_is_within_the_budget_with_its_padding_or_one_row(rows: list[dict[str, Any]], budget: int) -> None:
    micro_batches = StepCollator(PAD, budget=budget)(rows)["micro_batches"]
    widths = [micro_batch["input_ids"].shape for micro_batch in micro_batches]
    assert all(height * width <= budget or height == 1 for height, width in widths)
    lengths = [int(length) for micro_batch in micro_batches for length in micro_batch["attention_mask"].sum(1)]
    assert lengths == sorted(lengths, reverse=True), "rows of like length share one"
    assert all((height + 1) * width > budget for height, width in widths[:-1]), "none is closed while the next row would fit"


@pytest.mark.parametrize("way", WAYS)
@given(rows=steps(), budget=st.integers(1, 70), seed=st.integers(0, 1000))
def test_how_a_step_is_cut_is_a_pure_function_of_its_rows(way: str, rows: list[dict[str, Any]], budget: int, seed: int) -> None:
    collator = StepCollator(PAD, budget=budget, **WAYS[way])
    one = collator(rows)
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    other = collator([dict(row) for row in rows])
    assert torch.equal(torch.get_rng_state(), before)
    assert [texts_of(m) for m in one["micro_batches"]] == [texts_of(m) for m in other["micro_batches"]]


def test_rows_as_they_come_are_so_many_to_a_micro_batch_and_the_rest_in_the_last() -> None:
    rows = [{"index": i, "input_ids": [i] * (i + 1), "labels": [i] * (i + 1)} for i in range(7)]
    step = StepCollator(PAD, rows_each=3)(rows)
    assert [len(micro_batch["input_ids"]) for micro_batch in step["micro_batches"]] == [3, 3, 1]


def test_short_texts_fill_what_a_long_one_leaves() -> None:
    rows = [{"index": i, "input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate([4, 9, 6, 1])]
    packed = StepCollator(PAD, budget=10, packed=True)(rows)["micro_batches"]
    assert [m["lengths"] for m in packed] == [[9, 1], [6, 4]]
    assert packed[0]["position_ids"].tolist() == [[*range(9), 0]]
    assert packed[1]["targets"].tolist() == [[2] * 5 + [IGNORED] + [0] * 3 + [IGNORED]]


def test_targets_of_a_batch_are_shifted_row_by_row() -> None:
    assert next_tokens(torch.tensor([[1, 2, 3], [4, IGNORED, 6]])).tolist() == [[2, 3, IGNORED], [IGNORED, 6, IGNORED]]
    assert next_tokens(torch.tensor([], dtype=torch.long)).tolist() == []
