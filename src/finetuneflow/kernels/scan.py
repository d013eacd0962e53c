"""The selective state-space recurrence, chunk by chunk, and the short causal convolution before it.

    h_t = exp(Δ_t·A) ∘ h_{t-1} + Δ_t·B_t·u_t        y_t = C_t·h_t + D ∘ u_t

Source: Gu & Dao 2023 (Mamba, arXiv:2312.00752), section 3.2 and algorithm 2: A is discretised by zero-order hold, B by
Euler's rule. `selective_scan_reference` is these two lines as a loop; `selective_scan` gives the same values and
gradients from some positions at a time and keeps one state per chunk for the backward pass.

Shapes: u and delta (batch, length, channels), A (channels, states), B and C (batch, length, states), D (channels,),
state (batch, channels, states). delta must be ≥ 0 and A ≤ 0, as Mamba makes them: every decay then lies in [0, 1], and
a product of decays can only fade to zero. Nothing is divided by such a product and no sum of exponents is exponentiated
with its sign turned, so neither long chunks nor large steps overflow. Arithmetic is fp32 (fp64 for fp64 inputs) whatever
the type of the inputs; y comes back in the type of u, the last state in that of the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Unless `chunk` is given, a buffer holds the states of so many positions that it has about this many numbers.
# On a processor, buffers that stay in its cache are fastest; elsewhere a launch must be worth its while.
BUFFER_NUMBERS = {"cpu": 1 << 19}
BUFFER_NUMBERS_ELSEWHERE = 1 << 24
SHORTEST_CHUNK, LONGEST_CHUNK = 8, 128
# A processor steps through a chunk position by position: one pass over memory. Elsewhere each step is a launch, and
# segments side by side need a square root of the launches for three times the memory traffic.
STEPPING_DEVICES = frozenset({"cpu"})
LOG2_E = math.log2(math.e)


def selective_scan_reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, last state) by the recurrence as it is written, one position after the other; gradients by autograd."""
    work = torch.promote_types(u.dtype, torch.float32)
    x, step, rates, into, out_of = (value.to(work) for value in (u, delta, A, B, C))
    h = x.new_zeros(x.shape[0], *A.shape) if state is None else state.to(work)
    outputs = []
    for t in range(x.shape[1]):
        h = torch.exp(step[:, t, :, None] * rates) * h + (step[:, t] * x[:, t])[..., None] * into[:, t, None, :]
        outputs.append((h * out_of[:, t, None, :]).sum(dim=-1))
    y = torch.stack(outputs, dim=1)
    return (y if D is None else y + x * D.to(work)).to(u.dtype), h


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    state: torch.Tensor | None = None,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, last state), equal to `selective_scan_reference` up to the order of sums; time grows linearly with length.

    `state` is where the recurrence starts (zeros if None); gradients reach it, and come in through the last state.
    `chunk` is the number of positions whose states are in memory at once. The backward pass makes them anew from the
    chunk's first state: kept are the inputs and one state per chunk. It cannot itself be differentiated.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk holds at least 1 position, not {chunk}")
    positions = BUFFER_NUMBERS.get(u.device.type, BUFFER_NUMBERS_ELSEWHERE) // max(u.shape[0] * A.numel(), 1)
    size = chunk or min(max(positions, SHORTEST_CHUNK), LONGEST_CHUNK)
    result: tuple[torch.Tensor, torch.Tensor] = _ChunkedScan.apply(u, delta, A, B, C, D, state, size)  # type: ignore[no-untyped-call]
    return result


class _ChunkedScan(torch.autograd.Function):
    """Inside, tensors are (position, batch, state, channel): positions one after the other, channels side by side.

    With g_t the gradient that reaches h_t: g_t = C_t·dy_t + exp(Δ_{t+1}·A) ∘ g_{t+1}, the same recurrence backwards.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        state: torch.Tensor | None,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        work = torch.promote_types(u.dtype, torch.float32)
        rates = A.to(work).t().contiguous()
        h = u.new_zeros(u.shape[0], *rates.shape, dtype=work) if state is None else state.to(work).transpose(1, 2).contiguous()
        y, starts, buffers = torch.empty_like(u), [], _buffers(2, chunk, u.shape[1], h)
        with torch.autocast(u.device.type, enabled=False):
            for span in _spans(u.shape[1], chunk):
                starts.append(h)
                x, step, into, out_of = (_position_first(value, span, work) for value in (u, delta, B, C))
                states, _ = _states(x, step, rates, into, h, *buffers)
                out = torch.matmul(out_of.unsqueeze(2), states).squeeze(2)
                y[:, span] = (out if D is None else out.addcmul_(x, D.to(work))).transpose(0, 1)
                h = states[-1].clone()
        ctx.save_for_backward(u, delta, A, B, C, D, *starts)
        ctx.chunk, ctx.state_type = chunk, None if state is None else state.dtype
        return y, h.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor, grad_last: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        u, delta, A, B, C, D, *starts = ctx.saved_tensors
        work, carried = grad_last.dtype, grad_last.transpose(1, 2)
        rates = A.to(work).t().contiguous()
        grad_u, grad_delta, grad_B, grad_C = (torch.empty_like(value) for value in (u, delta, B, C))
        grad_rates, grad_D = torch.zeros_like(rates), None if D is None else torch.zeros_like(D, dtype=work)
        *buffers, spare = _buffers(3, ctx.chunk, u.shape[1], carried)
        with torch.autocast(u.device.type, enabled=False):
            for span, start in zip(reversed(list(_spans(u.shape[1], ctx.chunk))), reversed(starts), strict=True):
                x, step, into, out_of, dy = (_position_first(value, span, work) for value in (u, delta, B, C, grad_y))
                states, decay = _states(x, step, rates, into, start, *buffers)
                grad = torch.mul(out_of.unsqueeze(3), dy.unsqueeze(2), out=spare[: len(dy)])
                grad[-1] += carried
                _recur(grad, decay[1:], backwards=True)
                carried = decay[0] * grad[0]
                grad_drive = torch.matmul(into.unsqueeze(2), grad).squeeze(2)  # of Δ·u
                grad_B[:, span] = _over_channels(step * x, grad).transpose(0, 1)
                grad_C[:, span] = _over_channels(dy, states).transpose(0, 1)
                exponents = decay.mul_(grad)  # becomes the gradient of Δ·A: g_t ∘ decay_t ∘ h_{t-1}
                exponents[0].mul_(start)
                exponents[1:].mul_(states[:-1])
                grad_rates += torch.mul(exponents, step.unsqueeze(2), out=grad).sum(dim=(0, 1))
                grad_step = exponents.mul_(rates).sum(dim=2).addcmul_(grad_drive, x)
                grad_x = grad_drive.mul_(step)
                if D is not None and grad_D is not None:
                    grad_x.addcmul_(dy, D.to(work))
                    grad_D += (dy * x).sum(dim=(0, 1))
                grad_u[:, span], grad_delta[:, span] = grad_x.transpose(0, 1), grad_step.transpose(0, 1)
        grad_state = None if ctx.state_type is None else carried.transpose(1, 2).to(ctx.state_type)
        grad_skip = None if D is None or grad_D is None else grad_D.to(D.dtype)
        return grad_u, grad_delta, grad_rates.t().to(A.dtype), grad_B, grad_C, grad_skip, grad_state, None


def _spans(length: int, chunk: int) -> Iterator[slice]:
    for first in range(0, length, chunk):
        yield slice(first, min(first + chunk, length))


def _position_first(value: torch.Tensor, span: slice, work: torch.dtype) -> torch.Tensor:
    """(batch, length, width) -> (positions of the span, batch, width), in the type of the arithmetic."""
    return value[:, span].transpose(0, 1).to(work).contiguous()


def _over_channels(row: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Σ over channels of row (position, batch, channel) times states; a row times a matrix, the fast way around here."""
    return torch.matmul(row.unsqueeze(2), states.transpose(2, 3)).squeeze(2)


def _buffers(count: int, chunk: int, length: int, state: torch.Tensor) -> list[torch.Tensor]:
    """Room for the states of one chunk, `count` times: memory asked for anew in each chunk costs more than the arithmetic."""
    return [state.new_empty(min(chunk, length), *state.shape) for _ in range(count)]


def _states(
    x: torch.Tensor,
    step: torch.Tensor,
    rates: torch.Tensor,
    into: torch.Tensor,
    start: torch.Tensor,
    states: torch.Tensor,
    decay: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states h_t after each position of a chunk, and the decays exp(Δ_t·A), written into the two buffers given."""
    states, decay = states[: len(x)], decay[: len(x)]
    # A processor takes powers of 2 three times as fast as powers of e.
    torch.mul(step.unsqueeze(2), rates * LOG2_E, out=decay).exp2_()
    torch.mul(into.unsqueeze(3), (step * x).unsqueeze(2), out=states)
    states[0].addcmul_(decay[0], start)
    _recur(states, decay[1:])
    return states, decay


def _recur(values: torch.Tensor, gates: torch.Tensor, *, backwards: bool = False) -> None:
    """In place, v_t += gate_t ∘ v_{t-1} from the second position on (backwards: from the last but one on).

    `gates` has one position less than `values`. Positions go one by one, or about √length segments go side by side,
    each as if it began at zero, and are then corrected by what the segment before it left.
    """
    length = len(values)
    if length < 4 or values.device.type in STEPPING_DEVICES:
        cells, doors = list(values.unbind()), list(gates.unbind())
        _recur_one_by_one(cells[::-1] if backwards else cells, doors[::-1] if backwards else doors)
    elif backwards:
        turned = values.flip(0)
        _recur(turned, gates.flip(0))
        values.copy_(turned.flip(0))
    else:
        width = math.isqrt(length)
        whole = length // width * width
        _recur_in_segments(values[:whole].view(-1, width, *values.shape[1:]), gates[: whole - 1])
        _recur_one_by_one(list(values[whole - 1 :].unbind()), list(gates[whole - 1 :].unbind()))


def _recur_one_by_one(values: list[torch.Tensor], gates: list[torch.Tensor]) -> None:
    for before, gate, now in zip(values, gates, values[1:], strict=False):  # one gate less than values
        now.addcmul_(gate, before)


def _recur_in_segments(segments: torch.Tensor, gates: torch.Tensor) -> None:
    """`segments` is (segment, place, …); the gates before the first place of a segment lead from one to the next."""
    fade = torch.cat([torch.zeros_like(gates[:1]), gates]).view_as(segments)
    for place in range(1, segments.shape[1]):
        segments[:, place].addcmul_(fade[:, place], segments[:, place - 1])
        fade[:, place].mul_(fade[:, place - 1])  # from here on the product of all gates since the segment began
    for number in range(1, len(segments)):
        segments[number].addcmul_(fade[number], segments[number - 1, -1])


def causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, history: torch.Tensor | None = None
) -> torch.Tensor:
    """Each channel's own weighted sum over a position and the width − 1 before it; the sum is made in fp32 at least.

    x (batch, length, channels), weight (channels, width), bias (channels,); `history` (batch, width − 1, channels) is what
    came before x, zeros if None. A few shifted products: many times faster on a processor than a grouped convolution.
    """
    width, length = weight.shape[1], x.shape[1]
    work = torch.promote_types(x.dtype, torch.float32)
    seen = functional.pad(x, (0, 0, width - 1, 0)) if history is None else torch.cat([history.to(x.dtype), x], dim=1)
    seen, taps = seen.to(work), weight.to(work).t().contiguous()
    y = seen[:, :length] * taps[0] if bias is None else torch.addcmul(bias.to(work), seen[:, :length], taps[0])
    for tap in range(1, width):
        y = torch.addcmul(y, seen[:, tap : tap + length], taps[tap])
    return y.to(x.dtype)
