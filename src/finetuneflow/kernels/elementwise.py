"""Norms, rotary positions and gates with a backward pass written by hand: each keeps its inputs and little else.

Autograd would keep a tensor for every step of these formulas, in fp32 where the model raises them; here a norm keeps its input and
one number per row, rotary nothing but its tables, a gate its two factors. Every function is plain PyTorch; `fused` compiles one
into a single loop where a compiler is at hand and the run is long enough to pay for it (`use_compiled`).

Shapes: (…, width). Arithmetic in fp32 where the reference does it, results in the type of the input.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

_compiled: dict[str, Callable[..., Any]] = {}
_compile = False


def use_compiled(on: bool) -> None:
    """Whether the loops below are compiled from now on; a process-wide choice, made once at the start of a run."""
    global _compile
    _compile = on


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled at its first call where `use_compiled` says so. Shapes stay free: nothing compiles again later."""

    def call(*arguments: Any) -> Any:
        if not _compile:
            return function(*arguments)
        name = function.__name__
        if name not in _compiled:
            _compiled[name] = torch.compile(function, dynamic=True, fullgraph=True)
        return _compiled[name](*arguments)

    return call


def measure_fusing(device: torch.device, dtype: torch.dtype, *, tokens: int = 1024, hidden: int = 512) -> dict[str, float]:
    """What compiled loops save, per token, layer and unit of hidden width (seconds), and how long all of them take to compile.

    One layer's worth is timed both ways, in turns: two norms, two rotations, a gate of 8/3 the width, forward and backward.
    """
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    heads, tables = x.view(tokens, -1, 64), torch.randn(tokens, 64, device=device).to(dtype)
    wide = torch.randn(tokens, 8 * hidden // 3, device=device).to(dtype)
    weight, scale = torch.ones(hidden, device=device, dtype=dtype), torch.ones(tokens, 1, device=device)

    def layer() -> None:
        for _ in range(2):
            _norm_forward(x, weight, 1e-6, 0.0)
            _norm_backward(x, x, weight, scale, 0.0)
            _rotate_forward(heads, tables, tables)
            _rotate_backward(heads, tables, tables)
        _silu(wide, wide)
        _silu_backward(wide, wide, wide)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def seconds() -> float:
        began = time.perf_counter()
        layer()
        return time.perf_counter() - began

    before = _compile
    timings: dict[bool, list[float]] = {False: [], True: []}
    try:
        seconds()
        use_compiled(True)
        compile_seconds = seconds()
        for _ in range(7):
            for compiled, taken in timings.items():
                use_compiled(compiled)
                taken.append(seconds())
    finally:
        use_compiled(before)
    saved = statistics.median(timings[False]) - statistics.median(timings[True])
    return {"saved_per_unit": saved / (tokens * hidden), "compile_seconds": compile_seconds}


# --- RMS norm ---------------------------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · (weight + offset), over the last dimension (Zhang and Sennrich 2019). Gemma's offset is 1."""
    return _RMSNorm.apply(x, weight, eps, offset)  # type: ignore[no-any-return, no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:  # type: ignore[override]
        out, scale = _norm_forward(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        grad_x = _norm_backward(grad, x, weight, scale, ctx.offset)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = _norm_weight_gradient(grad, x, scale).to(weight.dtype)
        return grad_x, grad_weight, None, None


@fused
def _norm_forward(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    raised = x.float()
    scale = torch.rsqrt(raised.pow(2).mean(dim=-1, keepdim=True) + eps)
    if offset:
        return (raised * scale * (weight.float() + offset)).to(x.dtype), scale
    return (raised * scale).to(x.dtype) * weight.to(x.dtype), scale


@fused
def _norm_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offset: float) -> torch.Tensor:
    normed = x.float() * scale
    weighted = grad.float() * (weight.float() + offset)
    return ((weighted - normed * (weighted * normed).mean(dim=-1, keepdim=True)) * scale).to(x.dtype)


@fused
def _norm_weight_gradient(grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (grad.float() * x.float() * scale).flatten(0, -2).sum(dim=0)


# --- rotary positions ---------------------------------------------------------------------------------------


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al. 2021) as Llama lays them out: the first half of a head's width is paired with the second.

    `x` (tokens, heads, width), `cos` and `sin` (tokens, width).
    """
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _rotate_forward(x, cos, sin)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotate_backward(grad, cos, sin), None, None


@fused
def _rotate_forward(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [first * cos[..., :half] - second * sin[..., :half], second * cos[..., half:] + first * sin[..., half:]], dim=-1
    )


@fused
def _rotate_backward(grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = grad.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]
    first, second = grad[..., :half], grad[..., half:]
    return torch.cat(
        [first * cos[..., :half] + second * sin[..., half:], second * cos[..., half:] - first * sin[..., :half]], dim=-1
    )


# --- gates ----------------------------------------------------------------------------------------------------


def gated(kind: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """activation(gate) · up. `kind`: "silu" (SwiGLU, Shazeer 2020), "gelu" or "gelu_tanh"."""
    return _GATES[kind][0](gate, up)  # type: ignore[no-any-return]


def gated_backward(
    kind: str, grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient at gate, gradient at up, the product itself again)."""
    return _GATES[kind][1](grad, gate, up)  # type: ignore[no-any-return]


@fused
def _silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.silu(gate) * up


@fused
def _silu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    active = functional.silu(gate)
    return torch.ops.aten.silu_backward(grad * up, gate), grad * active, active * up


@fused
def _gelu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.gelu(gate) * up


@fused
def _gelu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    active = functional.gelu(gate)
    return torch.ops.aten.gelu_backward(grad * up, gate), grad * active, active * up


@fused
def _gelu_tanh(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.gelu(gate, approximate="tanh") * up


@fused
def _gelu_tanh_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    active = functional.gelu(gate, approximate="tanh")
    return torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh"), grad * active, active * up


_GATES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "silu": (_silu, _silu_backward),
    "gelu": (_gelu, _gelu_backward),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_backward),
}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
