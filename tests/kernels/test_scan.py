"""The chunked scan equals the recurrence as it is written, in values and all gradients, and does not overflow."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from finetuneflow.kernels import scan
from finetuneflow.kernels.scan import causal_conv1d, selective_scan, selective_scan_reference

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


def inputs(
    length: int, *, batch: int = 2, channels: int = 6, states: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random inputs as Mamba makes them: steps from softplus, negative rates; all want gradients."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    values = {
        "u": draw(batch, length, channels),
        "delta": functional.softplus(draw(batch, length, channels)),
        "A": -torch.exp(draw(channels, states)),
        "B": draw(batch, length, states),
        "C": draw(batch, length, states),
        "D": draw(channels),
        "state": draw(batch, channels, states),
    }
    return {name: value.to(dtype).requires_grad_() for name, value in values.items()}


def gradients(outputs: tuple[torch.Tensor, torch.Tensor], values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of a fixed random combination of both outputs."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]
    return dict(zip(values, torch.autograd.grad(outputs, list(values.values()), weights), strict=True))


@pytest.fixture(params=["one by one", "in segments"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through a chunk, whatever the device."""
    monkeypatch.setattr(scan, "STEPPING_DEVICES", frozenset({"cpu"} if request.param == "one by one" else ()))


def loops(values: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence with a Python number at a time."""
    u, delta, A, B, C, D = (values[name] for name in ("u", "delta", "A", "B", "C", "D"))
    h, y = values["state"].copy(), np.zeros_like(u)
    for b, t, d in np.ndindex(*u.shape):
        y[b, t, d] = D[d] * u[b, t, d]
        for n in range(A.shape[1]):
            h[b, d, n] = math.exp(delta[b, t, d] * A[d, n]) * h[b, d, n] + delta[b, t, d] * B[b, t, n] * u[b, t, d]
            y[b, t, d] += C[b, t, n] * h[b, d, n]
    return y, h


def test_the_reference_is_the_recurrence_number_by_number() -> None:
    values = inputs(5, channels=3, states=2)
    y, last = selective_scan_reference(**values)
    expected = loops({name: value.detach().numpy() for name, value in values.items()})
    np.testing.assert_allclose(y.detach().numpy(), expected[0], rtol=1e-12)
    np.testing.assert_allclose(last.detach().numpy(), expected[1], rtol=1e-12)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (7, 3), (37, 16), (64, 64), (50, 1), (30, 100), (23, None)])
def test_values_and_all_gradients_equal_the_recurrence(length: int, chunk: int | None) -> None:
    values = inputs(length)
    expected, got = selective_scan_reference(**values), selective_scan(**values, chunk=chunk)
    torch.testing.assert_close(got, expected, **EXACT)
    torch.testing.assert_close(gradients(got, values), gradients(expected, values), **EXACT)


@pytest.mark.usefixtures("way")
def test_gradients_equal_finite_differences() -> None:
    values = inputs(6, batch=1, channels=2, states=2)
    function = lambda *args: selective_scan(*args[:6], state=args[6], chunk=4)  # noqa: E731
    assert torch.autograd.gradcheck(function, tuple(values.values()))


def test_without_skip_and_state_it_starts_from_zero() -> None:
    values = inputs(9)
    without = {name: values[name] for name in ("u", "delta", "A", "B", "C")}
    zeros = without | {"D": torch.zeros_like(values["D"]), "state": torch.zeros_like(values["state"])}
    expected, got = selective_scan_reference(**zeros), selective_scan(**without, chunk=4)
    torch.testing.assert_close(got, expected, **EXACT)
    torch.testing.assert_close(gradients(got, without), gradients(selective_scan_reference(**without), without), **EXACT)


def test_a_sequence_in_two_parts_equals_the_whole() -> None:
    values = inputs(20)
    whole, last = selective_scan(**values, chunk=8)
    cut = lambda part: {name: value[:, part] if name in "u delta B C" else value for name, value in values.items()}  # noqa: E731
    first, state = selective_scan(**cut(slice(0, 13)), chunk=8)
    second, end = selective_scan(**(cut(slice(13, 20)) | {"state": state}), chunk=8)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, **EXACT)
    torch.testing.assert_close(end, last, **EXACT)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("step", [1e-6, 50.0, 1e4])
def test_long_chunks_and_extreme_steps_stay_finite_and_right(step: float) -> None:
    """Over 512 positions the exponents add up to −10⁸ and below: their sums, turned in sign, would overflow at −89."""
    values = inputs(512, batch=1, channels=3, dtype=torch.float32)
    values["delta"] = (values["delta"].detach() * step).requires_grad_()
    expected, got = selective_scan_reference(**values), selective_scan(**values, chunk=512)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    want, have = gradients(expected, values), gradients(got, values)
    for name in want:
        assert torch.isfinite(have[name]).all()
        scale = want[name].abs().max().clamp(min=1e-20)
        torch.testing.assert_close(have[name] / scale, want[name] / scale, rtol=1e-3, atol=1e-4)


def test_a_step_of_zero_leaves_the_state_as_it_is() -> None:
    values = inputs(5) | {"delta": torch.zeros(2, 5, 6, dtype=torch.float64)}
    assert torch.equal(selective_scan(**values)[1], values["state"])


@pytest.mark.parametrize("autocast", [False, True])
def test_16_bit_inputs_are_summed_in_32_bits(autocast: bool) -> None:
    halves = {name: value.detach().bfloat16() for name, value in inputs(200).items()}
    y_exact, last_exact = selective_scan_reference(**{name: value.double() for name, value in halves.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, last = selective_scan(**halves)
    assert y.dtype is torch.bfloat16 and last.dtype is torch.float32
    torch.testing.assert_close(last.double(), last_exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), y_exact, rtol=2**-8, atol=1e-4)


def test_only_one_state_per_chunk_is_kept_for_the_backward_pass() -> None:
    values = inputs(64, dtype=torch.float32)
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        selective_scan(**values, chunk=16)
    given = sum(value.numel() for name, value in values.items() if name != "state")
    assert kept == given + 4 * values["state"].numel()


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        selective_scan(**inputs(3), chunk=0)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_the_convolution_equals_a_grouped_convolution(length: int) -> None:
    torch.manual_seed(0)
    x, history = torch.randn(2, length, 5), torch.randn(2, 3, 5)
    layer = torch.nn.Conv1d(5, 5, 4, groups=5)
    expected = layer(torch.cat([history, x], dim=1).transpose(1, 2)).transpose(1, 2)
    got = causal_conv1d(x, layer.weight.squeeze(1), layer.bias, history=history)
    torch.testing.assert_close(got, expected)
    from_zero = functional.conv1d(functional.pad(x.transpose(1, 2), (3, 0)), layer.weight, groups=5).transpose(1, 2)
    torch.testing.assert_close(causal_conv1d(x, layer.weight.squeeze(1)), from_zero)


def test_the_convolution_rounds_once_from_32_bits() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 9, 5).bfloat16(), torch.randn(5, 4).bfloat16()
    got = causal_conv1d(x, weight)
    assert torch.equal(got, causal_conv1d(x.float(), weight.float()).bfloat16())
