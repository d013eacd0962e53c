"""Norms, rotary positions and gates are transformers' own, forward and backward; compiled ones too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from finetuneflow.kernels import elementwise
from finetuneflow.kernels.elementwise import ACTIVATIONS, gated, gated_backward, rms_norm, rotate

EPS = 1e-5
NORMS: dict[float, Any] = {0.0: LlamaRMSNorm, 1.0: GemmaRMSNorm}
TYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(compute: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> list[torch.Tensor]:
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    out = compute(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, draw(*out.shape, dtype=out.dtype, seed=9))]


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def assert_norm(offset: float, dtype: torch.dtype, width: int, scale: float) -> None:
    norm = NORMS[offset](width, eps=EPS)
    weight, x = draw(width, seed=1).to(dtype), draw(3, 5, width, dtype=dtype) * scale

    def theirs(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * (weight + offset)

    found, reference = gradients(lambda x, w: rms_norm(x, w, EPS, offset), x, weight), gradients(theirs, x, weight)
    wanted = gradients(exact, x.double(), weight.double())
    assert [one.dtype for one in found] == [dtype] * 3
    if dtype == torch.float32:
        assert max(off(one, other) for one, other in zip(found, wanted, strict=True)) <= 1e-5
    else:
        assert torch.equal(found[0], reference[0]), "rounded at the same places"
        for one, other, right in zip(found, reference, wanted, strict=True):
            assert off(one, right) <= 1.1 * off(other, right)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0], ids=["usual", "as small as epsilon", "large"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("offset", NORMS)
def test_a_norm_is_transformers_own(offset: float, dtype: torch.dtype, scale: float) -> None:
    assert_norm(offset, dtype, 48, scale)


def test_a_frozen_norm_gets_no_gradient_and_a_trained_one_does() -> None:
    x, frozen, trained = draw(4, 8).requires_grad_(), torch.ones(8), torch.ones(8, requires_grad=True)
    rms_norm(x, frozen, EPS).sum().backward()
    first, x.grad = x.grad, None
    rms_norm(x, trained, EPS).sum().backward()
    assert frozen.grad is None and trained.grad.any()
    assert torch.equal(first, x.grad)


def tables(tokens: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin as models make them: (tokens, width), the angles of the first half again in the second."""
    angles = torch.arange(tokens)[:, None] / 10_000 ** (torch.arange(width // 2) * 2 / width)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def assert_rotated(dtype: torch.dtype, width: int) -> None:
    cos, sin = tables(11, width, dtype)

    def theirs(x: torch.Tensor) -> torch.Tensor:  # (tokens, heads, width) as (1, heads, tokens, width)
        return apply_rotary_pos_emb(x[None].transpose(1, 2), x[None].transpose(1, 2), cos[None], sin[None])[0][0].transpose(0, 1)

    found, wanted = (
        gradients(lambda x: rotate(x, cos, sin), draw(11, 3, width, dtype=dtype)),
        gradients(theirs, draw(11, 3, width, dtype=dtype)),
    )
    limit = 1e-6 if dtype == torch.float32 else 5e-3
    assert max(off(one, other) for one, other in zip(found, wanted, strict=True)) <= limit


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [2, 16, 80])
def test_rotary_positions_are_transformers_own(width: int, dtype: torch.dtype) -> None:
    assert_rotated(dtype, width)


def test_halves_of_a_table_may_differ() -> None:
    """Some models scale them apart; the backward pass is then no mere turning back."""
    x, cos, sin = (draw(5, *shape, seed=i).double().requires_grad_(i == 0) for i, shape in enumerate([(2, 6), (6,), (6,)]))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), x)


def assert_gated(kind: str, dtype: torch.dtype) -> None:
    activation = ACT2FN[{"gelu_tanh": "gelu_pytorch_tanh"}.get(kind, kind)]
    gate, up, grad = (draw(6, 40, dtype=dtype, seed=seed) * 3 for seed in range(3))
    leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
    product = activation(leaves[0]) * leaves[1]
    wanted = [*torch.autograd.grad(product, leaves, grad), product.detach()]
    limit = 1e-6 if dtype == torch.float32 else 5e-3
    assert off(gated(kind, gate, up), wanted[-1]) <= limit
    assert max(off(one, other) for one, other in zip(gated_backward(kind, grad, gate, up), wanted, strict=True)) <= limit


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gates_and_their_backward_pass_are_transformers_own(kind: str, dtype: torch.dtype) -> None:
    assert_gated(kind, dtype)


@pytest.fixture
def compiled() -> Iterator[None]:
    elementwise.use_compiled(True)
    yield
    elementwise.use_compiled(False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_compiled_loops_compute_the_same(compiled: None, dtype: torch.dtype) -> None:
    for offset in NORMS:
        for width in (48, 33):
            if dtype == torch.float32:
                assert_norm(offset, dtype, width, 1.0)
            else:  # fused, what lies between is not rounded
                x, weight = draw(3, 5, width, dtype=dtype), draw(width, seed=1).to(dtype)
                plain = NORMS[offset](width, eps=EPS)
                plain.weight.data = weight
                assert off(rms_norm(x, weight, EPS, offset), plain(x)) <= 5e-3
    assert_rotated(dtype, 16)
    for kind in ACTIVATIONS:
        assert_gated(kind, dtype)
    assert elementwise._compiled.keys() >= {"_norm_forward", "_norm_backward", "_rotate_backward", "_silu_backward"}
