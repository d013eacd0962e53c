"""Cross-entropy straight from the last hidden states: full logits never exist.

    summed_cross_entropy(hidden, weight, targets)  ->  (sum of the losses in nats, number of tokens predicted right)

`hidden` holds the supervised positions alone. They meet the output layer in chunks; each chunk's logits give loss and gradient
at once and are dropped (the idea of Wijmans et al. 2024, "Cut Your Losses", and of Liger's fused linear cross-entropy, Hsu et
al. 2024). Memory beyond the gradients: one chunk of logits, whatever the vocabulary or the number of positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# Logits of a chunk, in fp32. Larger chunks multiply little faster; on a CPU smaller ones stay in the cache.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}


@dataclass(frozen=True, slots=True)
class Head:
    """What stands between hidden states and probabilities beside the matrix: logits = scale · z, then cap · tanh(logits / cap)."""

    scale: float = 1.0
    cap: float | None = None
    label_smoothing: float = 0.0


def summed_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    head: Head = Head(),
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over positions of the cross-entropy in nats (fp32), and how many targets have the highest logit.

    `hidden` (positions, width), `weight` (vocabulary, width), `bias` (vocabulary,), `targets` (positions,), none ignored.
    Products are computed in the type of `hidden`, or of autocast; the softmax in fp32. `chunk`: positions at a time.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    rows = chunk or rows_of_chunk(weight.shape[0], hidden.device.type)
    return _SummedCrossEntropy.apply(hidden, weight, bias, targets, head, rows, torch.is_grad_enabled())  # type: ignore[no-any-return, no-untyped-call]


def rows_of_chunk(vocabulary: int, device: str) -> int:
    """Positions whose logits make up a chunk: a multiple of 16, at least 16."""
    return max(CHUNK_BYTES[device] // (4 * vocabulary) // 16 * 16, 16)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        head: Head,
        rows: int,
        backward: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # `needs_input_grad` is true of what is trained even where no gradient is being recorded.
        wants_hidden, wants_weight, wants_bias = (backward and wanted for wanted in ctx.needs_input_grad[:3])
        backward = wants_hidden or wants_weight or wants_bias
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.long, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if wants_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(hidden.dtype)
            for start in range(0, len(targets), rows):
                here = slice(start, start + rows)
                states = hidden[here]
                logits = torch.mm(states, matrix.T).float()
                if bias is not None:
                    logits += bias
                grad, loss, right = _loss_and_gradient(logits, targets[here], head, backward=backward)
                total += loss
                correct += right
                if grad is None:
                    continue
                if grad_bias is not None:
                    grad_bias += grad.sum(dim=0)
                grad = grad.to(hidden.dtype)
                if grad_hidden is not None:
                    torch.mm(grad, matrix, out=grad_hidden[here])
                if grad_weight is not None:
                    grad_weight += torch.mm(grad.T, states)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.types = weight.dtype, bias.dtype if bias is not None else None
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_type, bias_type = ctx.types
        return (
            None if grad_hidden is None else grad_hidden.mul_(grad),
            None if grad_weight is None else grad_weight.mul_(grad).to(weight_type),
            None if grad_bias is None else grad_bias.mul_(grad).to(bias_type),
            None,
            None,
            None,
            None,
        )


def _loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, head: Head, *, backward: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(gradient of the raw logits, summed loss, number right) of one chunk; `logits` (rows, vocabulary) in fp32 are overwritten."""
    if head.scale != 1.0:
        logits *= head.scale
    slope = None
    if head.cap is not None:
        bent = torch.tanh(logits / head.cap)
        slope = 1 - bent * bent if backward else None
        logits = bent.mul_(head.cap)
    right = (logits.argmax(dim=-1) == targets).sum() if not backward else torch.zeros((), dtype=torch.long, device=logits.device)
    total = torch.logsumexp(logits, dim=-1)
    at_target = logits.gather(1, targets[:, None])[:, 0]
    smoothing = head.label_smoothing
    if smoothing:
        loss = (total - (1 - smoothing) * at_target - smoothing * logits.mean(dim=-1)).sum()
    else:
        loss = (total - at_target).sum()
    if not backward:
        return None, loss, right
    grad = logits.sub_(total[:, None]).exp_()
    grad.scatter_add_(1, targets[:, None], torch.full_like(targets[:, None], -(1 - smoothing), dtype=grad.dtype))
    if smoothing:
        grad -= smoothing / grad.shape[1]
    if slope is not None:
        grad *= slope
    if head.scale != 1.0:
        grad *= head.scale
    return grad, loss, right
