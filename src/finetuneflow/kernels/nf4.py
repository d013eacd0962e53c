"""4-bit NormalFloat, plainly: the reference against which quantised weights are checked.

A weight matrix is read as one row of numbers, cut into blocks of 64, each divided by its largest
magnitude (the block's constant) and rounded to the nearest of 16 levels; two codes share a byte, the
first in the high half. Double quantisation stores the constants in 8 bits: their mean is taken off and
blocks of 256 of them are rounded to a dynamic 8-bit scale. Source: Dettmers et al. 2023 (QLoRA),
section 3 and appendix; Dettmers et al. 2021 for the dynamic scale.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

BLOCK = 64
CONSTANTS_BLOCK = 256
# The outermost quantile: midway between those that 16 and 15 equal shares of probability would give, because
# zero is a level of its own and the positive side has one level more than the negative.
OUTER_QUANTILE = ((1 - 1 / 32) + (1 - 1 / 30)) / 2


@functools.cache
def nf4_levels() -> torch.Tensor:
    """The 16 levels, ascending, fp32: quantiles of N(0, 1) at equal steps, scaled to [-1, 1], zero exact."""
    positive = torch.special.ndtri(torch.linspace(OUTER_QUANTILE, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(OUTER_QUANTILE, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    return (levels / levels.max()).float()


@functools.cache
def dynamic_levels() -> torch.Tensor:
    """The 256 levels of the dynamic 8-bit scale, ascending, fp32.

    Seven decades 10⁻⁶ … 10⁰ with 1, 2, 4, … 64 values each (the middles of equal shares of [0.1, 1] of the
    decade), with both signs; and 0 and 1.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1, dtype=torch.float64)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [middles, -middles]
    return torch.cat(values).sort().values.float()


@dataclass(frozen=True, slots=True)
class Constants:
    """The blocks' constants: fp32 as they are, or 8-bit codes with one fp32 scale per 256 and their common mean."""

    plain: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    mean: torch.Tensor | None = None

    def values(self) -> torch.Tensor:
        if self.plain is not None:
            return self.plain
        assert self.codes is not None and self.scales is not None and self.mean is not None
        return dequantize_blocks(self.codes, self.scales, dynamic_levels(), CONSTANTS_BLOCK) + self.mean

    def num_bytes(self) -> int:
        stored = (self.plain, self.codes, self.scales, self.mean)
        return sum(t.numel() * t.element_size() for t in stored if t is not None)


@dataclass(frozen=True, slots=True)
class Nf4Tensor:
    """A quantised tensor: two codes a byte, the blocks' constants, and what is needed to give it back."""

    packed: torch.Tensor
    constants: Constants
    shape: torch.Size
    dtype: torch.dtype

    def bits_per_parameter(self) -> float:
        """Counted on what is stored: 4.5 with fp32 constants, 4.127 with double quantisation (for large tensors)."""
        stored = self.packed.numel() * self.packed.element_size() + self.constants.num_bytes()
        return 8 * stored / self.shape.numel()


def quantize(weight: torch.Tensor, *, double: bool = False) -> Nf4Tensor:
    """Round `weight` (any float type and shape, finite) to NF4."""
    codes, absmax = quantize_blocks(weight.float().reshape(-1), nf4_levels(), BLOCK)
    constants = quantize_constants(absmax) if double else Constants(plain=absmax)
    return Nf4Tensor(pack(codes), constants, weight.shape, weight.dtype)


def dequantize(quantized: Nf4Tensor) -> torch.Tensor:
    """The rounded weight, in its original type and shape."""
    codes = unpack(quantized.packed, quantized.shape.numel())
    values = dequantize_blocks(codes, quantized.constants.values(), nf4_levels(), BLOCK)
    return values.reshape(quantized.shape).to(quantized.dtype)


def quantize_constants(absmax: torch.Tensor) -> Constants:
    """Double quantisation. Constants are all positive; without their mean they use both signs of the scale."""
    mean = absmax.mean()
    codes, scales = quantize_blocks(absmax - mean, dynamic_levels(), CONSTANTS_BLOCK)
    return Constants(codes=codes, scales=scales, mean=mean)


def quantize_blocks(values: torch.Tensor, levels: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8) and one largest magnitude per block of a flat fp32 tensor; the last block may be short.

    A value midway between two levels takes the lower one. A block of zeros gets the constant 0 and the code of 0.
    """
    padded = torch.nn.functional.pad(values, (0, -values.numel() % block)).reshape(-1, block)
    absmax = padded.abs().amax(dim=1)
    scaled = padded / absmax.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    midpoints = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(scaled, midpoints.to(scaled.device)).to(torch.uint8)
    return codes.reshape(-1)[: values.numel()], absmax


def dequantize_blocks(codes: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, block: int) -> torch.Tensor:
    """Level times constant, flat, fp32."""
    constants = absmax.repeat_interleave(block)[: codes.numel()]
    return levels.to(codes.device)[codes.long()] * constants


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes a byte, the first in the high half; an odd one out is paired with code 0."""
    pairs = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).reshape(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def unpack(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` codes of packed bytes."""
    return torch.stack([packed >> 4, packed & 0xF], dim=1).reshape(-1)[:count]
