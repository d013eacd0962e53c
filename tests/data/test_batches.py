"""Batches: padding is invisible, and the order depends on seed and epoch alone."""

from __future__ import annotations

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
