"""Batch: tokenized rows become padded tensors, in an order that is a pure function of seed and epoch.

Place in the flow: `tokens.tokenize` -> Arrow cache -> **batches** -> the trainer. The only module of
`data` that uses torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

IGNORED = -100  # the label PyTorch's cross-entropy passes over


class Collator:
    """Pads rows `{index, input_ids, labels}` on the right to tensors of shape (batch, length).

    The attention mask comes from the true lengths, never from comparing with the pad token: a
    tokenizer whose pad token is its end token keeps that token supervised where a turn ends.
    `row_ids` (batch,) names the rows for error messages; the trainer takes it out before the model sees it.
    """

    def __init__(self, pad_token_id: int, *, multiple_of: int = 8) -> None:
        self.pad_token_id = pad_token_id
        self.multiple_of = multiple_of

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        width = -(-max(lengths) // self.multiple_of) * self.multiple_of
        input_ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            input_ids[i, :length] = torch.as_tensor(row["input_ids"], dtype=torch.long)
            labels[i, :length] = torch.as_tensor(row["labels"], dtype=torch.long)
            attention_mask[i, :length] = 1
        row_ids = torch.tensor([row["index"] for row in rows], dtype=torch.long)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "row_ids": row_ids}


class EpochSampler(Sampler[int]):
    """A fresh permutation each epoch, drawn from (seed, epoch) alone.

    It reads no global random state, so a resumed run sees the same order whatever happened before.
    """

    def __init__(self, size: int, *, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())
