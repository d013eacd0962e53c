"""Linear layers that share an input, with their low-rank changes, as one function; and a gated feed-forward block as another.

    project(x, projections)      ->  one output per projection:  W x + b + s · B A x
    gated_block(x, gate, up, down, kind)

What PEFT's layers do one by one under autocast, here: frozen weights are used in their storage type; the fp32 master copies of A
and B are rounded to the compute type once per pass; the A-products of layers with the same input are one product; B's product
is added in place. The backward pass keeps the input, the outputs of A, and of a block gate and up; the rest is computed again.
4-bit weights are unpacked for the product and dropped. The plain reference is `kernels.lora`; PEFT's own layers another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetuneflow.kernels.elementwise import gated, gated_backward


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear layer: `weight` (out, in) or packed 4-bit storage that `unpack` turns into it, `bias` (out,), `a` (r, in) and
    `b` (out, r) of the adapter if there is one, its `scale`, and the dropout on the adapter's input."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    unpack: Callable[[torch.dtype], torch.Tensor] | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """What may have a gradient, in the order autograd gets it."""
        return self.weight, self.bias, self.a, self.b

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """W in the compute type, without a copy where it is stored so."""
        return self.weight.to(dtype) if self.unpack is None else self.unpack(dtype)


def project(x: torch.Tensor, projections: Sequence[Projection]) -> tuple[torch.Tensor, ...]:
    """Outputs (…, out) of each projection, in the compute type (that of autocast, else of `x`)."""
    tensors = [tensor for projection in projections for tensor in projection.tensors]
    return _Project.apply(x, tuple(projections), _compute_type(x), *tensors)  # type: ignore[no-any-return, no-untyped-call]


def gated_block(x: torch.Tensor, gate: Projection, up: Projection, down: Projection, kind: str) -> torch.Tensor:
    """down(activation(gate(x)) · up(x)); `kind` names the activation (`elementwise.ACTIVATIONS`)."""
    parts = (gate, up, down)
    tensors = [tensor for projection in parts for tensor in projection.tensors]
    return _GatedBlock.apply(x, parts, kind, _compute_type(x), *tensors)  # type: ignore[no-any-return, no-untyped-call]


def _compute_type(x: torch.Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, projections: tuple[Projection, ...], dtype: torch.dtype, *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            outputs, thin, masks = _forward(flat, projections)
        ctx.save_for_backward(flat, *thin, *masks)
        ctx.projections, ctx.shape, ctx.x_dtype = projections, x.shape, x.dtype
        return tuple(output.view(*x.shape[:-1], -1) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        flat, *kept = ctx.saved_tensors
        count = len(ctx.projections)
        with torch.autocast(flat.device.type, enabled=False):
            found = [grad.reshape(-1, grad.shape[-1]).to(flat.dtype) for grad in grads]
            wanted = ctx.needs_input_grad[3:]
            grad_x, of_tensors = _backward(
                flat, ctx.projections, found, kept[:count], kept[count:], wanted, input_grad=ctx.needs_input_grad[0]
            )
        return (None if grad_x is None else grad_x.to(ctx.x_dtype).view(ctx.shape), None, None, *of_tensors)


class _GatedBlock(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        parts: tuple[Projection, ...],
        kind: str,
        dtype: torch.dtype,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            (gate, up), thin, masks = _forward(flat, parts[:2])
            (out,), last_thin, last_masks = _forward(gated(kind, gate, up), parts[2:])
        ctx.save_for_backward(flat, gate, up, *thin, *last_thin, *masks, *last_masks)
        ctx.parts, ctx.kind, ctx.shape, ctx.x_dtype = parts, kind, x.shape, x.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        flat, gate, up, *kept = ctx.saved_tensors
        thin, masks = kept[:3], kept[3:]
        wanted = ctx.needs_input_grad[4:]
        with torch.autocast(flat.device.type, enabled=False):
            grad = grad.reshape(-1, grad.shape[-1]).to(flat.dtype)
            # The gradient at the product needs only the weights; the product itself comes with the gate's own backward pass.
            grad_product, _ = _backward(None, ctx.parts[2:], [grad], thin[2:], masks[2:], (False,) * 4, input_grad=True)
            grad_gate, grad_up, product = gated_backward(ctx.kind, _tensor(grad_product), gate, up)
            _, of_down = _backward(product, ctx.parts[2:], [grad], thin[2:], masks[2:], wanted[8:], input_grad=False)
            del product
            grad_x, of_both = _backward(
                flat, ctx.parts[:2], [grad_gate, grad_up], thin[:2], masks[:2], wanted[:8], input_grad=ctx.needs_input_grad[0]
            )
        return (None if grad_x is None else grad_x.to(ctx.x_dtype).view(ctx.shape), None, None, None, *of_both, *of_down)


def _forward(
    x: torch.Tensor, projections: Sequence[Projection]
) -> tuple[list[torch.Tensor], list[torch.Tensor | None], list[torch.Tensor | None]]:
    """(outputs, outputs of A, dropout masks) of each projection on x (rows, in)."""
    dtype = x.dtype
    thin: list[torch.Tensor | None] = [None] * len(projections)
    masks: list[torch.Tensor | None] = [None] * len(projections)
    together = [i for i, p in enumerate(projections) if p.a is not None and not p.dropout]
    if together:
        down = torch.cat([_tensor(projections[i].a) for i in together]).to(dtype)
        ranks = [len(_tensor(projections[i].a)) for i in together]
        for i, part in zip(together, torch.split(torch.mm(x, down.T), ranks, dim=1), strict=True):
            thin[i] = part
    for i, p in enumerate(projections):
        if p.a is not None and p.dropout:
            mask = masks[i] = torch.rand(x.shape, device=x.device) >= p.dropout
            thin[i] = torch.mm(x * mask, p.a.to(dtype).T).div_(1 - p.dropout)
    outputs = []
    for p, change in zip(projections, thin, strict=True):
        matrix = p.matrix(dtype)
        out = torch.mm(x, matrix.T) if p.bias is None else torch.addmm(p.bias.to(dtype), x, matrix.T)
        if change is not None:
            out.addmm_(change, (_tensor(p.b) * p.scale).to(dtype).T)
        outputs.append(out)
    return outputs, thin, masks


def _backward(
    x: torch.Tensor | None,
    projections: Sequence[Projection],
    grads: Sequence[torch.Tensor],
    thin: Sequence[torch.Tensor | None],
    masks: Sequence[torch.Tensor | None],
    wanted: Sequence[bool],
    *,
    input_grad: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """(gradient at x, gradients of the projections' tensors). `wanted`: which of the latter; `x` may be None if none of a weight is."""
    dtype = grads[0].dtype
    grad_x: torch.Tensor | None = None
    found: list[list[torch.Tensor | None]] = []
    together: list[tuple[int, torch.Tensor]] = []  # adapters without dropout see the same input: their A-products are one
    for i, (p, grad, change, mask) in enumerate(zip(projections, grads, thin, masks, strict=True)):
        of_weight, of_bias, of_a, of_b = wanted[4 * i : 4 * i + 4]
        gradient: list[torch.Tensor | None] = [None] * 4
        if input_grad:
            matrix = p.matrix(dtype)
            grad_x = torch.mm(grad, matrix) if grad_x is None else grad_x.addmm_(grad, matrix)
        if of_weight:
            gradient[0] = torch.mm(grad.T, _tensor(x)).to(p.weight.dtype)
        if of_bias:
            gradient[1] = grad.sum(dim=0, dtype=torch.float32).to(_tensor(p.bias).dtype)
        if of_b:
            gradient[3] = torch.mm(grad.T, _tensor(change)).to(_tensor(p.b).dtype).mul_(p.scale)
        if p.a is not None and (input_grad or of_a):
            through = torch.mm(grad, (_tensor(p.b) * p.scale).to(dtype))
            if mask is None:
                together.append((i, through))
            else:
                if grad_x is not None:
                    grad_x += torch.mm(through, p.a.to(dtype)).mul_(mask).div_(1 - p.dropout)
                if of_a:
                    gradient[2] = torch.mm(through.T, _tensor(x) * mask).to(p.a.dtype).div_(1 - p.dropout)
        found.append(gradient)
    if together:
        through = together[0][1] if len(together) == 1 else torch.cat([part for _, part in together], dim=1)
        masters = [_tensor(projections[i].a) for i, _ in together]
        if grad_x is not None:
            grad_x.addmm_(through, torch.cat(masters).to(dtype))
        if any(wanted[4 * i + 2] for i, _ in together):
            gradient_of_all = torch.mm(through.T, _tensor(x)).to(masters[0].dtype)
            parts = torch.split(gradient_of_all, [len(master) for master in masters])
            for (i, _), part in zip(together, parts, strict=True):
                found[i][2] = part if wanted[4 * i + 2] else None
    return grad_x, [gradient for gradients in found for gradient in gradients]


def _tensor(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None
    return value
