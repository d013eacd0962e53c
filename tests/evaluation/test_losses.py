"""The loss equals transformers' own, row by row and weighted by tokens, however rows are batched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.asking import tiny_generator
from finetuneflow.errors import EvaluationError
from finetuneflow.evaluation.losses import IGNORED, ExampleLoss, measure_losses, perplexity, summarise, text_losses, windows


@dataclass
class Row:
    ids: list[int]
    labels: list[int]


def rows() -> list[Row]:
    random = torch.Generator().manual_seed(1)
    made = []
    for length, first in ((5, 2), (31, 17), (12, 0), (31, 30), (3, 1), (20, 8)):
        ids = torch.randint(4, 400, (length,), generator=random).tolist()
        made.append(Row(ids, [IGNORED if i < first or i % 5 == 4 else token for i, token in enumerate(ids)]))
    return made


def own_losses(model: Any, row: Row) -> tuple[float, int, int]:
    """transformers' loss of one row on its own, its supervised tokens, and how many are ranked first."""
    ids, labels = torch.tensor([row.ids]), torch.tensor([row.labels])
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels)
    counted = labels[0, 1:] != IGNORED
    first = (output.logits[0, :-1].argmax(-1) == labels[0, 1:]) & counted
    return float(output.loss), int(counted.sum()), int(first.sum())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mamba"])
@pytest.mark.parametrize("max_batch_tokens", [1, 70, 10_000])
def test_the_loss_is_the_token_weighted_mean_of_transformers_own(architecture: str, max_batch_tokens: int) -> None:
    model = tiny_generator(architecture).model
    measured = measure_losses(model, rows(), max_batch_tokens=max_batch_tokens)
    own = [own_losses(model, row) for row in rows()]
    tokens = sum(n for _, n, _ in own)
    loss = sum(mean * n for mean, n, _ in own if n) / tokens
    assert measured.tokens == tokens
    assert measured.loss == pytest.approx(loss, rel=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert measured.token_accuracy == sum(c for *_, c in own) / tokens
    for (mean, n, c), item in zip(own, measured.per_example, strict=True):
        assert (item.tokens, item.correct) == (n, c)
        assert item.mean == pytest.approx(mean, rel=1e-4, nan_ok=True)


def test_the_mean_is_over_tokens_and_not_over_rows() -> None:
    total = summarise([ExampleLoss(10.0, 1, 0), ExampleLoss(3.0, 3, 3), ExampleLoss(0.0, 0, 0)])
    assert (total.loss, total.token_accuracy, total.examples) == (13 / 4, 3 / 4, 3)


def test_accuracy_is_one_where_the_labels_are_what_the_model_predicts() -> None:
    generator = tiny_generator()
    ids = [9, 8, 7]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(generator.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    measured = measure_losses(generator.model, [Row(ids, [IGNORED] * 3 + ids[3:])])
    assert (measured.token_accuracy, measured.tokens) == (1.0, 6)


def test_nothing_supervised_is_an_error() -> None:
    with pytest.raises(EvaluationError):
        measure_losses(tiny_generator().model, [Row([5, 6, 7], [IGNORED] * 3), Row([5], [5])])


def test_a_perplexity_beyond_all_numbers_is_infinite_and_null_in_json() -> None:
    assert perplexity(1e4) == math.inf
    assert summarise([ExampleLoss(1e6, 1, 0)]).to_dict()["perplexity"] is None


def test_the_loss_of_a_short_text_is_that_of_all_its_tokens() -> None:
    generator = tiny_generator()
    text = "Le chat dort. The dog asks: what is 3 + 4?"
    ids = generator.tokenizer(text, add_special_tokens=False)["input_ids"]
    loss, count, _ = own_losses(generator.model, Row(ids, ids))
    measured = text_losses(generator.model, generator.tokenizer, text, context=512)
    assert (measured.tokens, measured.loss) == (count, pytest.approx(loss, rel=1e-5))


@settings(deadline=None)
@given(st.integers(2, 120), st.integers(2, 40))
def test_windows_count_every_token_once_with_at_least_half_a_window_of_context(length: int, context: int) -> None:
    ids = list(range(1000, 1000 + length))
    counted: list[int] = []
    for number, window in enumerate(windows(ids, context)):
        assert len(window.ids) == len(window.labels) <= context
        start = ids.index(window.ids[0])
        assert list(window.ids) == ids[start : start + len(window.ids)]
        supervised = [i for i, label in enumerate(window.labels) if label != IGNORED]
        assert [window.labels[i] for i in supervised] == [window.ids[i] for i in supervised]
        counted += [window.ids[i] for i in supervised]
        if number:
            assert supervised[0] == context // 2
    assert counted == ids
