"""Projections that share an input equal PEFT's own layers one by one, over frozen, trained and 4-bit weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.activations import ACT2FN

from finetuneflow.kernels.projections import Projection, gated_block, project
from finetuneflow.models.fast_modules import projection_of

IN, OUT = 64, {"q": 64, "k": 32, "v": 48}
NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}  # ours -> transformers'


class Sides(nn.Module):
    """Three layers on one input."""

    def __init__(self, *, bias: bool, make: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        for name, out in OUT.items():
            setattr(self, name, make(IN, out, bias=bias))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


class Gated(nn.Module):
    def __init__(self, kind: str, *, bias: bool, make: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.gate, self.up, self.down = make(IN, 96, bias=bias), make(IN, 96, bias=bias), make(96, IN, bias=bias)
        self.activation = ACT2FN[NAMES[kind]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


def adapted(module: nn.Module, targets: list[str], *, full: bool = False, **options: Any) -> Any:
    """PEFT's LoRA with random B, ranks 2, 4, 6, … by layer."""
    torch.manual_seed(0)
    ranks = {name: 2 * (i + 1) for i, name in enumerate(targets)}
    config = LoraConfig(r=8, lora_alpha=12, target_modules=targets, rank_pattern=ranks, **options)
    model = get_peft_model(module, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
        if full:
            parameter.requires_grad_(True)
    return model.base_model.model


def batch(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 9, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def run(module: nn.Module, compute: Callable[[torch.Tensor], Any], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs and gradients at the input and at all that is trained."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    outputs = compute(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(2)
    sum((out.float() * torch.randn(out.shape, generator=generator)).sum() for out in outputs).backward()
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)} | {"input": x.grad}
    return found | {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def ours(module: Any, kind: str | None = None) -> Callable[[torch.Tensor], Any]:
    if kind is None:
        return lambda x: project(x, [projection_of(layer) for layer in (module.q, module.k, module.v)])
    return lambda x: gated_block(x, *(projection_of(layer) for layer in (module.gate, module.up, module.down)), kind)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def assert_peft(module: Any, kind: str | None = None, limit: float = 1e-5) -> None:
    theirs, found = run(module, module, batch()), run(module, ours(module, kind), batch())
    assert theirs.keys() == found.keys()
    assert {name: off(found[name], theirs[name]) for name in theirs if not off(found[name], theirs[name]) <= limit} == {}


ADAPTED = [["q", "k", "v"], ["q", "v"], ["k"]]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("targets", ADAPTED, ids="".join)
def test_three_layers_at_once_are_pefts_three_one_by_one(targets: list[str], bias: bool) -> None:
    assert_peft(adapted(Sides(bias=bias), targets))


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"bias": "all"}, {"bias": "lora_only"}], ids=str)
def test_what_an_adapter_may_be_configured_to(options: dict[str, Any]) -> None:
    assert_peft(adapted(Sides(bias=True), ["q", "k", "v"], **options))


@pytest.mark.parametrize("bias", [False, True])
def test_trained_weights_get_their_gradients_too(bias: bool) -> None:
    assert_peft(adapted(Sides(bias=bias), ["q", "v"], full=True))


def test_without_any_adapter_it_is_the_layers_themselves() -> None:
    torch.manual_seed(0)
    assert_peft(Sides(bias=True))


def test_an_input_that_wants_no_gradient_gets_none() -> None:
    module = adapted(Sides(bias=False), ["q", "k", "v"])
    sum(out.sum() for out in ours(module)(batch())).backward()
    found = [p.grad for p in module.parameters() if p.requires_grad]
    module.zero_grad()
    sum(out.sum() for out in module(batch())).backward()
    for one, other in zip(found, (p.grad for p in module.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_one_output_may_stay_unused() -> None:
    """Its gradient is then zero, not missing."""
    module = adapted(Sides(bias=False), ["q", "k", "v"])
    x = batch().requires_grad_()
    ours(module)(x)[1].sum().backward()
    assert not module.q.lora_B["default"].weight.grad.any() and module.k.lora_B["default"].weight.grad.any()
    found, x.grad = x.grad, None
    module.k(x).sum().backward()
    torch.testing.assert_close(found, x.grad)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("targets", [["gate", "up", "down"], ["gate"], ["down"]], ids="-".join)
@pytest.mark.parametrize("kind", NAMES)
def test_a_gated_block_is_its_modules_one_after_another(kind: str, targets: list[str], bias: bool) -> None:
    assert_peft(adapted(Gated(kind, bias=bias), targets), kind)


@pytest.mark.parametrize("kind", NAMES)
def test_a_gated_block_that_is_trained_in_full(kind: str) -> None:
    assert_peft(adapted(Gated(kind, bias=True), ["up"], full=True), kind)
    torch.manual_seed(0)
    assert_peft(Gated(kind, bias=False), kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "bias", "full", "rslora"), itertools.product(ADAPTED, [False, True], [False, True], [False, True])
)
@pytest.mark.parametrize("kind", [None, *NAMES])
def test_all_crossed(kind: str | None, targets: list[str], bias: bool, full: bool, rslora: bool) -> None:
    if kind is None:
        assert_peft(adapted(Sides(bias=bias), targets, full=full, use_rslora=rslora))
    else:
        names = [{"q": "gate", "k": "up", "v": "down"}[name] for name in targets]
        assert_peft(adapted(Gated(kind, bias=bias), names, full=full, use_rslora=rslora), kind)


# --- 16 bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [None, "silu", "gelu_tanh"])
def test_under_autocast_the_error_is_not_larger_than_pefts(kind: str | None, storage: torch.dtype) -> None:
    """Against the same adapter in float64, its weights rounded to the storage type of the base."""
    module = (
        adapted(Sides(bias=True), ["q", "k", "v"]) if kind is None else adapted(Gated(kind, bias=True), ["gate", "up", "down"])
    )
    for name, parameter in module.named_parameters():
        if "base_layer" in name:
            parameter.data = parameter.data.to(storage)
    x = batch(torch.bfloat16).float()
    with torch.autocast("cpu", torch.bfloat16):
        theirs, found = run(module, module, x), run(module, ours(module, kind), x)
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: tensor.dtype for name, tensor in theirs.items()}
    module.double()
    exact = run(module, module, x.double())
    for name, wanted in exact.items():
        assert off(found[name], wanted) <= 1.2 * off(theirs[name], wanted), name


# --- 4 bits -----------------------------------------------------------------------------------------------


def four_bit(compute: torch.dtype, double: bool) -> Callable[..., nn.Module]:
    import bitsandbytes

    def make(width: int, out: int, *, bias: bool) -> nn.Module:
        layer = bitsandbytes.nn.Linear4bit(
            width, out, bias=bias, compute_dtype=compute, compress_statistics=double, quant_type="nf4"
        )
        return layer.to("cpu")

    return make


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", [None, "silu"])
def test_over_4_bit_weights_it_is_bitsandbytes_own_layer_under_pefts(kind: str | None, double: bool) -> None:
    torch.manual_seed(0)
    make = four_bit(torch.float32, double)
    module = Sides(bias=True, make=make) if kind is None else Gated(kind, bias=True, make=make)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module = adapted(module, ["q", "k", "v"] if kind is None else ["gate", "up", "down"])
    first = module.q if kind is None else module.gate
    assert first.base_layer.weight.dtype == torch.uint8, "packed"
    assert first.base_layer.weight.quant_state.nested is double
    before = first.base_layer.weight.data.clone()
    assert_peft(module, kind)
    assert torch.equal(first.base_layer.weight.data, before)


@pytest.mark.parametrize("double", [False, True])
def test_over_4_bit_weights_in_bf16_the_error_is_not_larger_than_theirs(double: bool) -> None:
    import bitsandbytes.functional as bnb

    torch.manual_seed(0)
    module = Sides(bias=False, make=four_bit(torch.bfloat16, double))
    module = adapted(module, ["q", "k", "v"])
    x = batch(torch.bfloat16).float()
    with torch.autocast("cpu", torch.bfloat16):
        theirs, found = run(module, module, x), run(module, ours(module), x)
    whole = Sides(bias=False)
    for name in OUT:
        packed = getattr(module, name).base_layer.weight
        getattr(whole, name).weight.data = bnb.dequantize_4bit(packed.data, packed.quant_state).float()
    whole = adapted(whole, ["q", "k", "v"])
    whole.load_state_dict({n: v for n, v in module.state_dict().items() if "lora" in n}, strict=False)
    exact = run(whole.double(), whole, x.double())
    for name, wanted in exact.items():
        assert off(found[name], wanted) <= 1.2 * off(theirs[name], wanted), name


# --- dropout ----------------------------------------------------------------------------------------------


def dropping(*shapes: tuple[int, int], share: float) -> tuple[list[Projection], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: E731
    projections = [
        Projection(draw(out, width), draw(out), draw(2 + i, width), draw(out, 2 + i), scale=0.7, dropout=share)
        for i, (out, width) in enumerate(shapes)
    ]
    return projections, [tensor for projection in projections for tensor in projection.tensors]


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_the_backward_pass_is_the_derivative_of_the_forward_pass_with_the_same_inputs_dropped(share: float) -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=True)
    projections, tensors = dropping((3, 4), (2, 4), share=share)

    def compute(x: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(5)
        return project(x, projections)

    assert torch.autograd.gradcheck(compute, (x, *tensors))


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("kind", NAMES)
def test_so_is_that_of_a_gated_block(kind: str, share: float) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=True)
    projections, tensors = dropping((3, 4), (3, 4), (4, 3), share=share)

    def compute(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return gated_block(x, *projections, kind)

    assert torch.autograd.gradcheck(compute, (x, *tensors))


def test_dropout_is_on_the_adapters_input_alone_and_keeps_its_mean() -> None:
    """With A = B = identity and no base, the output is the input itself: dropped, or raised by 1 / (1 - share)."""
    share, width = 0.25, 40
    identity = torch.eye(width)
    side = Projection(torch.zeros(width, width), None, identity, identity, dropout=share)
    x = torch.ones(500, width)
    torch.manual_seed(0)
    one, other = project(x, [side, side])
    for out in (one, other):
        torch.testing.assert_close(out.unique(), torch.tensor([0.0, 4 / 3]))
        assert float((out == 0).float().mean()) == pytest.approx(share, abs=0.01)
    assert float(((one == 0) & (other == 0)).float().mean()) == pytest.approx(share**2, abs=0.01), "layers drop each for itself"
    base = Projection(identity, None, identity, torch.zeros(width, width), dropout=share)
    assert torch.equal(project(x, [base])[0], x)


def test_pefts_dropout_is_taken_over_while_training_and_only_then() -> None:
    module = adapted(Sides(bias=False), ["q"], lora_dropout=0.3)
    assert projection_of(module.q).dropout == 0.3
    assert projection_of(module.eval().q).dropout == 0.0
