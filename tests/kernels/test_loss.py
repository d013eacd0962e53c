"""The loss in chunks is torch's own cross-entropy in float64 over whole logits, and those never exist."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from finetuneflow.kernels.loss import Head, rows_of_chunk, summed_cross_entropy

POSITIONS, WIDTH, VOCABULARY = 37, 12, 50
HEADS = {
    "plain": Head(),
    "scaled": Head(scale=0.25),
    "capped": Head(cap=3.0),
    "scaled, then capped": Head(scale=2.5, cap=2.0),
    "smoothed": Head(label_smoothing=0.1),
    "scaled, capped and smoothed": Head(scale=0.5, cap=4.0, label_smoothing=0.3),
}
CHUNKS = [1, 7, 16, 37, 100, None]


def inputs(positions: int = POSITIONS, *, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {"hidden": draw(positions, WIDTH), "weight": draw(VOCABULARY, WIDTH), "bias": draw(VOCABULARY)}


def targets_of(positions: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (positions,), generator=torch.Generator().manual_seed(1))


def reference(hidden: Any, weight: Any, targets: torch.Tensor, bias: Any, head: Head) -> torch.Tensor:
    logits = functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double()) * head.scale
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    return functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=head.label_smoothing)


def assert_equal(values: dict[str, torch.Tensor], head: Head, chunk: int | None, trained: set[str]) -> None:
    """Loss and gradients, those of a multiple of the loss, as where a step divides by its tokens."""
    targets = targets_of(len(values["hidden"]))
    sides = [{name: v.clone().requires_grad_(name in trained) for name, v in values.items()} for _ in range(2)]
    one, other = sides
    loss, _ = summed_cross_entropy(one["hidden"], one["weight"], targets, bias=one.get("bias"), head=head, chunk=chunk)
    expected = reference(other["hidden"], other["weight"], targets, other.get("bias"), head)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (loss * 0.37).backward()
    (expected * 0.37).backward()
    for name in values:
        if name not in trained:
            assert one[name].grad is None
            continue
        found, wanted = one[name].grad, other[name].grad
        assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm()), name


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_are_those_of_whole_logits_in_float64(head: str, chunk: int | None) -> None:
    assert_equal(inputs(), HEADS[head], chunk, {"hidden", "weight", "bias"})


@pytest.mark.parametrize(
    "trained", [{"hidden"}, {"weight"}, {"bias"}, {"hidden", "bias"}], ids=lambda names: " and ".join(sorted(names))
)
def test_only_what_is_trained_gets_a_gradient(trained: set[str]) -> None:
    assert_equal(inputs(), Head(cap=5.0), 16, trained)


@pytest.mark.parametrize("positions", [1, 2, 16, 17])
@pytest.mark.parametrize("biased", [False, True])
def test_any_number_of_positions(positions: int, biased: bool) -> None:
    values = inputs(positions)
    if not biased:
        del values["bias"]
    assert_equal(values, Head(), 16, set(values))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "chunk", "positions", "trained"),
    itertools.product(HEADS, CHUNKS, [1, 16, 33], [("hidden",), ("hidden", "weight"), ("hidden", "weight", "bias")]),
)
def test_all_crossed(head: str, chunk: int | None, positions: int, trained: tuple[str, ...]) -> None:
    assert_equal(inputs(positions), HEADS[head], chunk, set(trained))


def test_no_position_at_all_is_a_loss_of_zero_with_gradients_of_zero() -> None:
    values = {name: value.requires_grad_() for name, value in inputs(0).items()}
    loss, correct = summed_cross_entropy(values["hidden"], values["weight"], targets_of(0), bias=values["bias"])
    loss.backward()
    assert (loss.item(), correct.item()) == (0.0, 0)
    assert values["hidden"].grad.shape == (0, WIDTH)
    assert not values["weight"].grad.any() and not values["bias"].grad.any()


def test_a_tied_matrix_adds_both_its_gradients() -> None:
    ids, targets = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([1, 4, 1, 5, 9])
    gradients = []
    for compute in (
        lambda h, w: summed_cross_entropy(h, w, targets, chunk=2)[0],
        lambda h, w: reference(h, w, targets, None, Head()),
    ):
        table = inputs()["weight"].clone().requires_grad_()
        compute(functional.embedding(ids, table).tanh(), table).backward()
        gradients.append(table.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True])
def test_tokens_predicted_right_are_counted_where_no_gradient_is_recorded(trained: bool) -> None:
    values = {name: value.requires_grad_(trained) for name, value in inputs().items()}
    logits = functional.linear(values["hidden"], values["weight"], values["bias"])
    targets = torch.where(torch.arange(POSITIONS) % 3 == 0, logits.argmax(-1), logits.argmin(-1))
    with torch.no_grad():
        loss, correct = summed_cross_entropy(values["hidden"], values["weight"], targets, bias=values["bias"], chunk=5)
    assert not loss.requires_grad
    assert int(correct) == 13
    torch.testing.assert_close(loss, functional.cross_entropy(logits, targets, reduction="sum"))


def test_large_logits_neither_overflow_nor_lose_the_gradient() -> None:
    hidden = torch.tensor([[1e4, -1e4]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    loss, _ = summed_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 2e4 and hidden.grad.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_under_autocast_products_are_in_bf16_and_the_softmax_in_fp32(storage: torch.dtype) -> None:
    """As close to float64 as logits that are computed in bf16 and raised to fp32, as transformers does."""
    values = {name: value.to(storage) for name, value in inputs(400).items() if name != "bias"}
    targets = targets_of(400)

    def found(compute: Any) -> list[torch.Tensor]:
        leaves = [value.clone().requires_grad_() for value in values.values()]
        with torch.autocast("cpu", torch.bfloat16):
            loss = compute(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    exact = found(lambda h, w: reference(h, w, targets, None, Head()))
    theirs = found(lambda h, w: functional.cross_entropy(functional.linear(h, w).float(), targets, reduction="sum"))
    ours = found(lambda h, w: summed_cross_entropy(h, w, targets)[0])
    assert ours[0].dtype == torch.float32 and all(gradient.dtype == storage for gradient in ours[1:])
    for one, other, wanted in zip(ours, theirs, exact, strict=True):
        off = [float((value.double() - wanted.double()).norm() / wanted.double().norm()) for value in (one, other)]
        assert off[0] <= max(1.2 * off[1], 1e-4)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("positions", [16, 150])
def test_never_more_than_one_chunk_of_logits_exists(head: str, positions: int) -> None:
    vocabulary, rows = 3000, 16
    hidden, weight = torch.randn(positions, 4, requires_grad=True), torch.randn(vocabulary, 4, requires_grad=True)
    targets = torch.arange(positions)
    with Largest() as largest:
        loss, _ = summed_cross_entropy(hidden, weight, targets, head=HEADS[head], chunk=rows)
        loss.backward()
    assert largest.elements == rows * vocabulary
    with Largest() as whole:
        reference(hidden, weight, targets, None, Head())
    assert whole.elements == positions * vocabulary, "the measure sees whole logits"


@pytest.mark.parametrize("vocabulary", [32, 32_000, 151_936, 10**9])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_chunk_is_a_multiple_of_sixteen_rows_that_fits_its_memory(vocabulary: int, device: str) -> None:
    rows = rows_of_chunk(vocabulary, device)
    room = {"cpu": 32 << 20, "cuda": 256 << 20}[device]
    assert rows % 16 == 0 and rows >= 16
    assert rows * vocabulary * 4 <= room < (rows + 16) * vocabulary * 4 or rows == 16
