"""Loss on held-out text: mean over supervised tokens, perplexity, token accuracy, and the loss of each example.

The mean is over all supervised tokens of the set, not a mean of batch means: it does not depend on how examples
are batched. Logits are computed only at positions that predict a supervised token.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from finetuneflow.errors import EvaluationError

IGNORED = -100
# Upper bound of one batch's logits, in numbers: 256 MiB in fp32.
LOGIT_BUDGET = 1 << 26
MAX_BATCH_TOKENS = 8_192


class Labelled(Protocol):
    """Token ids with a label each; -100 where a token does not count (`data.tokens.Tokens`)."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def labels(self) -> Sequence[int]: ...


@dataclass(frozen=True, slots=True)
class ExampleLoss:
    """Sum of the negative log-likelihood (nats), supervised tokens, and how many of them the model ranks first."""

    nll: float
    tokens: int
    correct: int

    @property
    def mean(self) -> float:
        return self.nll / self.tokens if self.tokens else math.nan


@dataclass(frozen=True, slots=True)
class Losses:
    """Loss of a set of examples. `loss` in nats per supervised token; `token_accuracy` 0 to 1."""

    loss: float
    perplexity: float
    token_accuracy: float
    tokens: int
    examples: int
    per_example: tuple[ExampleLoss, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what is no finite number becomes null."""
        return {
            "eval_loss": _finite(self.loss),
            "perplexity": _finite(self.perplexity),
            "token_accuracy": self.token_accuracy,
            "supervised_tokens": self.tokens,
            "examples": self.examples,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def measure_losses(model: Any, examples: Sequence[Labelled], *, max_batch_tokens: int | None = None) -> Losses:
    """Loss of `model` (already in evaluation mode) on tokenised examples; examples without a supervised token count nothing."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    budget = max_batch_tokens or max(256, min(MAX_BATCH_TOKENS, LOGIT_BUDGET // int(config.vocab_size)))
    per_example: list[ExampleLoss] = [ExampleLoss(0.0, 0, 0)] * len(examples)
    with torch.no_grad():
        for batch in _batches(examples, budget):
            for i, loss in zip(batch, _batch_losses(model, [examples[i] for i in batch]), strict=True):
                per_example[i] = loss
    return summarise(per_example)


def summarise(per_example: Sequence[ExampleLoss]) -> Losses:
    """Weigh every supervised token alike."""
    tokens = sum(item.tokens for item in per_example)
    if tokens == 0:
        raise EvaluationError(
            "EVALUATION_NO_DATA",
            "No token of the evaluation data counts for the loss.",
            remedy="Give examples with assistant answers.",
        )
    loss = math.fsum(item.nll for item in per_example) / tokens
    return Losses(
        loss=loss,
        perplexity=perplexity(loss),
        token_accuracy=sum(item.correct for item in per_example) / tokens,
        tokens=tokens,
        examples=len(per_example),
        per_example=tuple(per_example),
    )


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is too large for a number."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _batches(examples: Sequence[Labelled], budget: int) -> list[list[int]]:
    """Examples of like length together, padded size at most `budget` tokens (a longer example goes alone)."""
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].ids), i))
    batches: list[list[int]] = []
    for i in order:
        if not any(label != IGNORED for label in examples[i].labels[1:]):
            continue
        width = len(examples[batches[-1][0]].ids) if batches else 0
        if batches and width * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _batch_losses(model: Any, batch: Sequence[Labelled]) -> list[ExampleLoss]:
    ids, mask, targets = _right_padded(batch, device=model.device)
    # Position t predicts token t + 1: targets are moved by one, and columns where no row has one are not computed.
    columns = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    logits = _logits_at(model, ids, mask, columns).float()
    wanted = targets[:, columns]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none")
    nll = nll.view_as(wanted).double().sum(dim=1)
    counted = wanted != IGNORED
    correct = ((logits.argmax(dim=-1) == wanted) & counted).sum(dim=1)
    return [ExampleLoss(n, t, c) for n, t, c in zip(nll.tolist(), counted.sum(dim=1).tolist(), correct.tolist(), strict=True)]


def _right_padded(batch: Sequence[Labelled], *, device: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = max(len(item.ids) for item in batch)
    ids = torch.zeros((len(batch), width), dtype=torch.long)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, item in enumerate(batch):
        length = len(item.ids)
        ids[row, :length] = torch.tensor(list(item.ids), dtype=torch.long)
        mask[row, :length] = 1
        targets[row, : length - 1] = torch.tensor(list(item.labels)[1:], dtype=torch.long)
    return ids.to(device), mask.to(device), targets.to(device)


def _logits_at(model: Any, ids: torch.Tensor, mask: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        return model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=columns).logits  # type: ignore[no-any-return]
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, columns]  # type: ignore[no-any-return]


# --- plain text -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Text:
    """A window of plain text: every token but those only there as context is supervised."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


def text_losses(model: Any, tokenizer: Any, text: str, *, context: int) -> Losses:
    """Loss on running text, in windows of at most `context` tokens that overlap by half: each token is counted once."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    return measure_losses(model, windows(first + list(ids), context))


def windows(ids: Sequence[int], context: int) -> list[Text]:
    """Cut ids into windows of at most `context` (2 or more) tokens; from the second on, the first half is context only."""
    overlap = context // 2
    cut, start, counted = [], 0, 0
    while counted < len(ids):
        end = min(start + context, len(ids))
        labels = [IGNORED] * (counted - start) + list(ids[counted:end])
        cut.append(Text(tuple(ids[start:end]), tuple(labels)))
        counted, start = end, end - overlap
    return cut
