"""The NF4 reference has the paper's levels and sizes and rounds exactly as bitsandbytes does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuneflow.kernels import nf4

# As printed in appendix E of the QLoRA paper.
PAPER_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mean_error(weight: torch.Tensor, rounded: torch.Tensor) -> float:
    return (weight.float() - rounded.float()).abs().mean().item()


def test_the_derived_levels_are_those_of_the_paper_and_of_bitsandbytes() -> None:
    import bitsandbytes.functional as bnb

    torch.testing.assert_close(nf4.nf4_levels(), torch.tensor(PAPER_LEVELS), atol=3e-7, rtol=0)
    torch.testing.assert_close(nf4.nf4_levels(), bnb.get_4bit_type("nf4", device="cpu"), atol=3e-7, rtol=0)
    torch.testing.assert_close(nf4.dynamic_levels(), bnb.create_dynamic_map(), atol=1e-7, rtol=0)
    assert len(nf4.dynamic_levels().unique()) == 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (100, 77), (512, 640)])
def test_codes_and_values_equal_those_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    import bitsandbytes.functional as bnb

    weight = normal(*shape, dtype=dtype)
    theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = nf4.quantize(weight)
    unequal = theirs.flatten() != ours.packed
    assert unequal.float().mean() < 1e-4, "only values at the edge between two levels may differ"
    torch.testing.assert_close(ours.constants.values(), state.absmax)
    their_values = bnb.dequantize_4bit(theirs, state)
    assert mean_error(weight, nf4.dequantize(ours)) == pytest.approx(mean_error(weight, their_values), rel=1e-4)
    if not unequal.any():
        torch.testing.assert_close(nf4.dequantize(ours), their_values, atol=2e-6, rtol=1e-6)


def test_double_quantised_constants_equal_those_of_bitsandbytes() -> None:
    import bitsandbytes.functional as bnb

    weight = normal(1024, 512)
    _, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    constants = nf4.quantize(weight, double=True).constants
    torch.testing.assert_close(constants.mean, state.offset)
    torch.testing.assert_close(constants.scales, state.state2.absmax)
    assert constants.codes is not None
    steps = (constants.codes.int() - state.absmax.int()).abs()
    assert steps.max() <= 1 and (steps > 0).float().mean() < 1e-2, "only ties may differ, by one step"


def test_bits_per_parameter_are_counted_not_claimed() -> None:
    """4 + 32/64 = 4.5 bits; with double quantisation 4 + 8/64 + 32/(64·256) = 4.127 (and 4 bytes for the mean)."""
    weight = normal(1024, 1024)
    assert nf4.quantize(weight).bits_per_parameter() == 4.5
    assert nf4.quantize(weight, double=True).bits_per_parameter() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=5e-5)
    stored = nf4.quantize(weight, double=True)
    assert stored.packed.dtype is torch.uint8 and stored.packed.numel() == weight.numel() // 2


def test_errors_on_normal_weights_are_the_published_ones() -> None:
    """bitsandbytes' own figures for N(0, 1) in blocks of 64: mean absolute error 0.0728, relative 0.203; FP4 has 0.0965."""
    import bitsandbytes.functional as bnb

    weight = normal(1024, 1024)
    rounded = nf4.dequantize(nf4.quantize(weight))
    assert mean_error(weight, rounded) == pytest.approx(0.0728, abs=2e-4)
    relative = ((weight - rounded).abs() / (weight.abs() + 1e-8)).mean().item()
    assert relative == pytest.approx(0.203, abs=3e-3)
    fp4 = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=64, quant_type="fp4"))
    assert mean_error(weight, fp4) == pytest.approx(0.0965, abs=3e-4)


def test_double_quantisation_costs_next_to_no_accuracy() -> None:
    weight = normal(1024, 1024)
    plain, double = (mean_error(weight, nf4.dequantize(nf4.quantize(weight, double=d))) for d in (False, True))
    assert plain < double < 1.003 * plain


@given(
    st.integers(1, 400),
    st.floats(1e-6, 1e6),
    st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_no_value_moves_by_more_than_half_the_widest_gap(count: int, scale: float, seed: int) -> None:
    values = normal(count, seed=seed) * scale
    rounded = nf4.dequantize(nf4.quantize(values))
    widest = nf4.nf4_levels().diff().max()
    limit = values.abs().split(64)
    for block, (got, magnitude) in enumerate(zip(rounded.split(64), limit, strict=True)):
        moved = (got - values.split(64)[block]).abs().max()
        assert moved <= magnitude.max() * widest / 2 * 1.0001


@given(st.lists(st.integers(0, 15), min_size=0, max_size=99))
@settings(deadline=None)
def test_packing_is_lossless_and_puts_the_first_code_in_the_high_half(codes: list[int]) -> None:
    packed = nf4.pack(torch.tensor(codes, dtype=torch.uint8))
    assert nf4.unpack(packed, len(codes)).tolist() == codes
    assert packed.numel() == (len(codes) + 1) // 2
    if codes:
        assert int(packed[0]) >> 4 == codes[0]


def test_a_level_times_its_constant_is_kept_exactly() -> None:
    values = nf4.nf4_levels().repeat(8) * 3.0
    assert torch.equal(nf4.dequantize(nf4.quantize(values)), values)


def test_zeros_stay_zeros() -> None:
    values = torch.zeros(3, 65, dtype=torch.bfloat16)
    assert torch.equal(nf4.dequantize(nf4.quantize(values)), values)
    assert torch.equal(nf4.dequantize(nf4.quantize(values, double=True)), values)
