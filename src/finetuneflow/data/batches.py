"""Batch: tokenized rows become packed or padded tensors, in an order that is a pure function of seed and epoch.

Place in the flow: `tokens.tokenize` -> Arrow cache -> **batches** -> the trainer. The only module of
`data` that uses torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from finetuneflow.kernels.attention import best_fit

IGNORED = -100  # the label PyTorch's cross-entropy passes over
# Packed rows are filled up to a multiple of this. A matrix library compiles its kernels for each shape and keeps them: with a new
# length in every step, two cores did 5 to 20 % fewer tokens a second, and memory grew by 0.1 to 0.2 GB.
FILLED_TO = 32


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
        width = self.width(max(lengths))
        input_ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            input_ids[i, :length] = torch.as_tensor(row["input_ids"], dtype=torch.long)
            labels[i, :length] = torch.as_tensor(row["labels"], dtype=torch.long)
            attention_mask[i, :length] = 1
        row_ids = torch.tensor([row["index"] for row in rows], dtype=torch.long)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "row_ids": row_ids}

    def width(self, longest: int) -> int:
        """Width of a batch whose longest row has so many tokens."""
        return -(-longest // self.multiple_of) * self.multiple_of


class StepCollator:
    """All rows of an optimizer step, as micro-batches for one forward and backward pass each.

    How a step is cut changes neither its rows nor its loss, which is a mean over the tokens of the whole step: only speed and
    memory. A micro-batch holds at most `budget` tokens, or one longer row:

    - packed: rows behind one another in one row of the model, filled by best-fit decreasing. `position_ids` (1, tokens) restart
      with each, and `lengths` names them; attention has to keep them apart (`kernels.attention.packed`). The last of them may be a
      filling of padding tokens, a text of its own from which nothing is learned. No mask: transformers takes one as a sign that a
      row is one text.
    - padded, where a model cannot keep texts apart: rows of like length below one another, with `attention_mask` (rows, width).
    - `rows_each`: padded too, so many rows to a micro-batch in the order they come (`speed: reference`).

    `targets` of the same shape as `input_ids`: the token to be predicted *at* each position, -100 where nothing is learned.
    `row_ids` (rows,) names the rows of the step for error messages, `tokens` counts what is no padding.
    """

    def __init__(self, pad_token_id: int, *, budget: int = 0, packed: bool = False, rows_each: int | None = None) -> None:
        self.padded = Collator(pad_token_id)
        self.budget = budget
        self.packed = packed
        self.rows_each = rows_each

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        lengths = [len(row["input_ids"]) for row in rows]
        micro_batches = [self._micro_batch([rows[i] for i in part]) for part in self._cut(lengths)]
        row_ids = torch.tensor([row["index"] for row in rows], dtype=torch.long)
        return {"micro_batches": micro_batches, "row_ids": row_ids, "tokens": sum(lengths)}

    def _cut(self, lengths: Sequence[int]) -> list[list[int]]:
        if self.rows_each is not None:
            return [list(range(i, min(i + self.rows_each, len(lengths)))) for i in range(0, len(lengths), self.rows_each)]
        if self.packed:
            return best_fit(lengths, self.budget)
        parts: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            widest = self.padded.width(lengths[parts[-1][0]]) if parts else 0
            if parts and (len(parts[-1]) + 1) * widest <= self.budget:
                parts[-1].append(i)
            else:
                parts.append([i])
        return parts

    def _micro_batch(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if not self.packed:
            batch = self.padded(rows)
            del batch["row_ids"]
            return {**batch, "targets": next_tokens(batch.pop("labels"))}
        lengths = [len(row["input_ids"]) for row in rows]
        parts = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
        goals = [next_tokens(torch.as_tensor(row["labels"], dtype=torch.long)) for row in rows]
        if (filling := self._filling(sum(lengths))) > 0:
            lengths.append(filling)
            parts.append(torch.full((filling,), self.padded.pad_token_id, dtype=torch.long))
            goals.append(torch.full((filling,), IGNORED, dtype=torch.long))
        ids, targets = torch.cat(parts), torch.cat(goals)
        positions = torch.cat([torch.arange(length) for length in lengths])
        return {"input_ids": ids[None], "position_ids": positions[None], "targets": targets[None], "lengths": lengths}

    def _filling(self, tokens: int) -> int:
        """Tokens that are missing to the next multiple of `FILLED_TO`, or to the budget."""
        return min(-(-tokens // FILLED_TO) * FILLED_TO, max(self.budget, tokens)) - tokens


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Labels (…, length) moved to the position that predicts them; the last position predicts nothing."""
    return torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], IGNORED)], dim=-1)


class EpochSampler(Sampler[int]):
    """A fresh permutation each epoch, drawn from (seed, epoch) alone.

    It reads no global random state, so a resumed run sees the same order whatever happened before.
    With `lengths`, rows of like length meet in the same `group_size` rows (one optimizer step), which wastes
    less padding: the permutation is cut into stretches of `STRETCH` groups, each sorted by length, and the groups are
    shuffled again. The order depends on the rows of a step, not on how a step is cut into micro-batches.
    """

    STRETCH = 16

    def __init__(self, size: int, *, seed: int, lengths: Sequence[int] | None = None, group_size: int = 1) -> None:
        self.size = size
        self.seed = seed
        self.lengths = lengths
        self.group_size = group_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order: list[int] = torch.randperm(self.size, generator=generator).tolist()
        return iter(order if self.lengths is None else self._grouped(order, generator))

    def _grouped(self, order: list[int], generator: torch.Generator) -> list[int]:
        assert self.lengths is not None
        lengths, size = self.lengths, self.group_size
        stretch = size * self.STRETCH
        groups: list[list[int]] = []
        for start in range(0, len(order), stretch):
            rows = sorted(order[start : start + stretch], key=lambda row: lengths[row], reverse=True)
            groups += [rows[i : i + size] for i in range(0, len(rows), size)]
        whole = [group for group in groups if len(group) == size]
        rest = [row for group in groups if len(group) < size for row in group]  # at the end, or it would shift all that follow
        shuffled = torch.randperm(len(whole), generator=generator).tolist()
        return [row for number in shuffled for row in whole[number]] + rest


class PairCollator:
    """Pads pairs `{index, chosen_ids, chosen_labels, rejected_ids, rejected_labels}`: chosen answers first, rejected ones below.

    Gives `input_ids`, `attention_mask` and `completion_mask` (1 where a token is learned) of shape (2 x pairs, length), as TRL's
    trainers take them, and `row_ids` (pairs,). With `reference`, log-probabilities of the reference model by row, shape (rows, 2),
    the pairs' own are added as `ref_chosen_logps` and `ref_rejected_logps` (pairs,).
    """

    def __init__(self, pad_token_id: int, *, reference: torch.Tensor | None = None) -> None:
        self.sides = Collator(pad_token_id)
        self.reference = reference

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sides = [
            {"index": row["index"], "input_ids": row[f"{side}_ids"], "labels": row[f"{side}_labels"]}
            for side in ("chosen", "rejected")
            for row in rows
        ]
        batch = completions(self.sides(sides))
        batch["row_ids"] = batch["row_ids"][: len(rows)]
        if self.reference is not None:
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = self.reference[batch["row_ids"]].unbind(dim=1)
        return batch


class RatedCollator:
    """Pads rated answers `{index, input_ids, labels, prompt_length, label}` for KTO.

    Beside the rows themselves come mismatched ones, each prompt with the answer of the row before it in the batch (`KL_…`): KTO
    estimates the policy's divergence from the reference on answers that were not given to the prompt (Ethayarajh et al. 2024,
    section 4.1). A mismatched row is cut to the longest row of the batch.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.plain = Collator(pad_token_id)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = completions(self.plain(rows))
        longest = max(len(row["input_ids"]) for row in rows)
        mismatched = completions(self.plain([_with_answer_of(row, rows[i - 1], longest) for i, row in enumerate(rows)]))
        batch |= {f"KL_{name}": mismatched[name] for name in ("input_ids", "attention_mask", "completion_mask")}
        batch["label"] = torch.tensor([bool(row["label"]) for row in rows])
        return batch


def completions(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch with its labels as a mask of the tokens that are learned."""
    labels = batch.pop("labels")
    return batch | {"completion_mask": (labels != IGNORED).long()}


def _with_answer_of(row: dict[str, Any], other: dict[str, Any], longest: int) -> dict[str, Any]:
    prompt = list(row["input_ids"][: row["prompt_length"]])
    ids = [*prompt, *other["input_ids"][other["prompt_length"] :]]
    labels = [IGNORED] * len(prompt) + list(other["labels"][other["prompt_length"] :])
    return {"index": row["index"], "input_ids": ids[:longest], "labels": labels[:longest]}


class RepeatedSampler(EpochSampler):
    """Prompts in the order of `EpochSampler`, each `copies` times in a row, each group of `prompts` of them `rounds` times.

    What TRL's group methods expect of a sampler: all answers to a prompt in one batch, the batch once per micro-step that uses
    it. Prompts that do not fill a group at the end of an epoch wait for the next one.
    """

    def __init__(self, size: int, *, seed: int, copies: int, prompts: int = 1, rounds: int = 1, shuffle: bool = True) -> None:
        super().__init__(size, seed=seed)
        self.copies, self.prompts, self.rounds, self.shuffle = copies, prompts, rounds, shuffle

    def __len__(self) -> int:
        return self.size // self.prompts * self.prompts * self.copies * self.rounds

    def __iter__(self) -> Iterator[int]:
        order = list(super().__iter__()) if self.shuffle else list(range(self.size))
        for start in range(0, self.size // self.prompts * self.prompts, self.prompts):
            for _ in range(self.rounds):
                for index in order[start : start + self.prompts]:
                    yield from [index] * self.copies
