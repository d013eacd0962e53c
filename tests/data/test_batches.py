"""Batches: padding is invisible, and the order depends on seed and epoch alone."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuneflow.data.batches import IGNORED, Collator, EpochSampler

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
