"""Packed attention equals masked softmax written out in float64, text by text; shelves are filled by best fit."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from finetuneflow.kernels import attention
from finetuneflow.kernels.attention import LARGEST_BLOCK, best_fit, grouped, packed, packed_attention, packed_mask

LENGTHS: dict[str, list[int]] = {
    "one token": [1],
    "odd lengths": [7, 33, 1, 20],
    "a block of 64": [64],
    "one more than a block": [65, 64, 63],
    "all block sizes": [128, 64, 256],
    "the largest block": [512, 3],
    "one longer than the largest block": [513],
    "long, short, long": [600, 40, 769],
    "many texts": [1 + (37 * i) % 90 for i in range(25)],
    "an empty text between": [5, 0, 9],
}
# (query heads, key and value heads, width)
HEADS = [(2, 2, 16), (4, 2, 8), (3, 1, 64), (4, 1, 128)]


def sides(
    tokens: int, heads: tuple[int, int, int] = (2, 1, 16), dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.Tensor]:
    """Queries, keys, values (1, heads, tokens, width) and an upstream gradient (1, tokens, heads, width)."""
    generator = torch.Generator().manual_seed(seed)
    queries, pairs, width = heads
    shapes = [(1, queries, tokens, width), (1, pairs, tokens, width), (1, pairs, tokens, width), (1, tokens, queries, width)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def module(groups: int = 1) -> Any:
    """What transformers' attention functions read of a layer."""
    return types.SimpleNamespace(num_key_value_groups=groups, is_causal=True, training=True)


def with_gradients(compute: Any, query: Any, key: Any, value: Any, upstream: Any) -> list[torch.Tensor]:
    """[output, gradient of query, of key, of value]."""
    leaves = [side.detach().clone().requires_grad_() for side in (query, key, value)]
    out = compute(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def dense(lengths: Sequence[int], scale: float | None = None) -> Any:
    """The textbook: softmax(q kᵀ · scale) v in float64, -inf wherever a key is later or belongs to another text."""

    def compute(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, k, v = (side[0].double() for side in (query, key, value))
        k, v = (torch.stack([side[h * len(side) // len(q)] for h in range(len(q))]) for side in (k, v))
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        place = torch.arange(len(owner))
        sees = (owner[:, None] == owner) & (place[:, None] >= place)
        scores = torch.einsum("hqw,hkw->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
        return torch.einsum("hqk,hkw->qhw", weights, v)[None]

    return compute


def ours(lengths: Sequence[int], scale: float | None = None, dropout: float = 0.0) -> Any:
    def compute(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        return packed_attention(module(groups), query, key, value, None, dropout=dropout, scaling=scale)[0]

    def inside(*arguments: Any) -> list[torch.Tensor]:
        with packed(lengths):
            return with_gradients(compute, *arguments)

    return inside


def text_by_text(lengths: Sequence[int], theirs: Any) -> Any:
    def compute(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        layer = module(query.shape[1] // key.shape[1])
        parts = [torch.split(side, list(lengths), dim=2) for side in (query, key, value)]
        return torch.cat([theirs(layer, *text) for text in zip(*parts, strict=True)], dim=1)

    return compute


def sdpa_text(layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return sdpa_attention_forward(layer, query, key, value, None)[0]


def eager_text(layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    length = query.shape[2]
    mask = torch.full((1, 1, length, length), torch.finfo(query.dtype).min, dtype=query.dtype).triu(1)
    return eager_attention_forward(layer, query, key, value, mask, scaling=query.shape[-1] ** -0.5)[0]


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def assert_dense(lengths: list[int], heads: tuple[int, int, int], scale: float | None = None) -> None:
    arguments = sides(sum(lengths), heads)
    found = ours(lengths, scale)(*arguments)
    wanted = with_gradients(dense(lengths, scale), *arguments)
    for name, one, other in zip(("output", "query", "key", "value"), found, wanted, strict=True):
        size = max(float(other.double().norm()), 1e-6)  # of one token alone, queries and keys have no gradient
        assert float((one.double() - other.double()).norm()) <= 1e-5 * size, name


@pytest.mark.parametrize("kept", [0, 10_000], ids=["weights computed again", "weights kept"])
@pytest.mark.parametrize("case", LENGTHS)
def test_outputs_and_gradients_are_those_of_dense_masked_softmax(case: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "KEPT_WIDTH", kept)
    assert_dense(LENGTHS[case], (4, 2, 16))


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("heads", HEADS)
def test_heads_of_any_width_may_share_keys(heads: tuple[int, int, int], scale: float | None) -> None:
    assert_dense([70, 9, 40], heads, scale)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("heads", [*HEADS, (1, 1, 8), (6, 2, 32), (8, 2, 80)])
@pytest.mark.parametrize("case", LENGTHS)
def test_lengths_and_heads_crossed(case: str, heads: tuple[int, int, int], scale: float | None) -> None:
    assert_dense(LENGTHS[case], heads, scale)


@pytest.mark.parametrize("case", ["odd lengths", "all block sizes", "one longer than the largest block"])
def test_in_bf16_the_error_is_that_of_transformers_own(case: str) -> None:
    """As large as eager attention's, which rounds weights at the same places. sdpa on a CPU keeps fp32 between its products."""
    lengths = LENGTHS[case]
    arguments = sides(sum(lengths), (4, 2, 32), torch.bfloat16)
    exact = with_gradients(dense(lengths), *arguments)
    eager, sdpa = (with_gradients(text_by_text(lengths, theirs), *arguments) for theirs in (eager_text, sdpa_text))
    for i, found in enumerate(ours(lengths)(*arguments)):
        assert found.dtype == torch.bfloat16
        assert off(found, exact[i]) <= 1.15 * off(eager[i], exact[i])
        assert off(found, exact[i]) <= 2 * off(sdpa[i], exact[i])


def test_autocast_computes_in_its_type_and_gives_gradients_in_that_of_the_inputs() -> None:
    lengths = [30, 9]
    arguments = sides(39)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(lengths)(*arguments)
    assert [one.dtype for one in found] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    same = ours(lengths)(*(side.bfloat16() for side in arguments))
    assert all(torch.equal(one, other.to(one.dtype)) for one, other in zip(found, same, strict=True))


# --- texts do not meet ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["odd lengths", "long, short, long", "many texts"])
def test_of_the_loss_of_one_text_others_get_exactly_no_gradient(case: str) -> None:
    lengths = LENGTHS[case]
    query, key, value, upstream = sides(sum(lengths))
    for text in {0, len(lengths) // 2, len(lengths) - 1}:
        start = sum(lengths[:text])
        end = start + lengths[text]
        only = torch.zeros_like(upstream)
        only[:, start:end] = upstream[:, start:end]
        for gradient in ours(lengths)(query, key, value, only)[1:]:
            outside = torch.cat([gradient[:, :, :start], gradient[:, :, end:]], dim=2)
            assert not outside.any()
            assert gradient[:, :, start:end].any() or end - start == 1


@pytest.mark.parametrize("text", range(3))
@pytest.mark.parametrize("lengths", [[20, 30, 9], [600, 30, 9], [70, 700, 530]], ids=str)
def test_whatever_a_text_holds_the_others_stay_the_same_bit_for_bit(lengths: list[int], text: int) -> None:
    """Even where its scores are as large as they get before they overflow."""
    arguments = sides(sum(lengths))
    before = ours(lengths)(*arguments)
    here = slice(sum(lengths[:text]), sum(lengths[: text + 1]))
    changed = [side.clone() for side in arguments]
    for side in changed[:3]:
        side[:, :, here] *= -1e15
    after = ours(lengths)(*changed)
    assert not torch.equal(after[0], before[0])
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[here] = False
    assert torch.equal(after[0][:, others], before[0][:, others])
    for one, other in zip(after[1:], before[1:], strict=True):
        assert torch.equal(one[:, :, others], other[:, :, others])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", range(3), ids=["query", "key", "value"])
@pytest.mark.parametrize(
    "text",
    [
        pytest.param(0, marks=pytest.mark.xfail(strict=True, reason="zero times nan is nan for all that share a block")),
        1,
        3,
    ],
)
def test_numbers_that_are_none_stay_in_a_long_text(text: int, side: int, bad: float) -> None:
    """Of short ones they reach others; but a step whose loss is not finite ends the run before the optimizer moves."""
    lengths = [20, 600, 100, 700]
    arguments = sides(sum(lengths))
    before = ours(lengths)(*arguments)
    here = slice(sum(lengths[:text]), sum(lengths[: text + 1]))
    arguments[side][:, :, here] = bad
    after = ours(lengths)(*arguments)
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[here] = False
    assert not after[0][:, here].isfinite().all()
    assert torch.equal(after[0][:, others], before[0][:, others])
    for one, other in zip(after[1:], before[1:], strict=True):
        assert torch.equal(one[:, :, others], other[:, :, others])


# --- where it is transformers' own ------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("within", [None, [5, 7], [20, 4]], ids=["outside", "of another size", "of that size but two rows"])
def test_a_row_that_is_not_packed_gets_transformers_own_attention(within: list[int] | None, masked: bool) -> None:
    query, key, value, upstream = (torch.cat([side, -side]) for side in sides(24))
    mask = torch.ones(24, 24).tril().bool()[None, None] if masked else None
    layer = module(2)
    own = with_gradients(lambda q, k, v: sdpa_attention_forward(layer, q, k, v, mask)[0], query, key, value, upstream)

    def compute(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return packed_attention(layer, q, k, v, mask)[0]

    if within is None:
        found = with_gradients(compute, query, key, value, upstream)
    else:
        with packed(within):
            found = with_gradients(compute, query, key, value, upstream)
    assert all(torch.equal(one, other) for one, other in zip(found, own, strict=True))


def test_a_step_of_generation_inside_a_packed_row_sees_its_cache() -> None:
    query, key, value, _ = sides(24)
    with packed([10, 14]):
        found = packed_attention(module(2), query[:, :, -1:], key, value, None)[0]
    torch.testing.assert_close(found, sdpa_attention_forward(module(2), query[:, :, -1:], key, value, None)[0])


def test_the_mask_is_none_only_while_every_text_fits_the_window() -> None:
    with packed([10, 14]):
        assert packed_mask(1, 24, 24) is None
        assert packed_mask(1, 24, 24, local_size=14) is None
        windowed = packed_mask(1, 24, 24, local_size=13, mask_function=lambda b, h, q, k: (k <= q) & (q - k < 13))
        assert windowed is not None and windowed.shape[-2:] == (24, 24)
    with packed([10, 13]):
        assert packed_mask(2, 24, 24, allow_is_causal_skip=False) is not None


@pytest.mark.parametrize("name", attention.UNSUPPORTED)
def test_scores_that_are_changed_in_another_way_are_refused(name: str) -> None:
    query, key, value, _ = sides(9)
    with packed([4, 5]), pytest.raises(NotImplementedError, match=name):
        packed_attention(module(2), query, key, value, None, **{name: 30.0})


def test_layouts_nest_and_end_even_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), packed([3]) as outer:
        with packed([1, 1]):
            assert attention._layout.lengths == (1, 1)
        assert attention._layout is outer
        raise ZeroDivisionError
    assert attention._layout is None


# --- dropout ----------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["weights kept", "weights computed again"])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 and 8 and stretches of 5, so that a dozen tokens go all ways."""
    for name, value in {"UNIT": 4, "LARGEST_BLOCK": 8, "STRETCH": 5, "KEPT_WIDTH": 8 if request.param else 0}.items():
        monkeypatch.setattr(attention, name, value)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_backward_pass_is_the_derivative_of_the_forward_pass_with_the_same_weights_dropped(
    small_blocks: None, dropout: float
) -> None:
    lengths = [3, 11, 1]
    leaves = [side.double().requires_grad_() for side in sides(sum(lengths), (2, 1, 2))[:3]]

    def compute(*arguments: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return packed_attention(module(2), *arguments, None, dropout=dropout)[0]

    with packed(lengths):
        assert torch.autograd.gradcheck(compute, leaves)


def test_dropout_leaves_out_its_share_of_the_weights_and_keeps_their_mean(small_blocks: None) -> None:
    lengths = [3, 12, 1, 7]
    total = sum(lengths)
    query, key, _, _ = sides(total, (1, 1, total))
    value = torch.eye(total)[None, None]  # the output is then the weights themselves
    torch.manual_seed(0)
    with packed(lengths):
        whole = packed_attention(module(), query, key, value, None)[0]
        draws = torch.stack([packed_attention(module(), query, key, value, None, dropout=0.25)[0] for _ in range(800)])
    seen = whole > 0
    assert float((draws[:, seen] == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    kept = draws[:, seen]
    torch.testing.assert_close(torch.where(kept == 0, whole[seen], kept * 0.75), whole[seen].expand_as(kept))
    torch.testing.assert_close(draws.mean(dim=0), whole, atol=0.06, rtol=0)
    assert not draws[:, ~seen].any()


# --- which texts share blocks ---------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(0, 700), max_size=40))
def test_every_text_that_fits_a_block_is_in_one_group_wide_enough_for_it(lengths: list[int]) -> None:
    groups = grouped(lengths)
    assert sorted(text for _, texts in groups for text in texts) == [i for i, n in enumerate(lengths) if 0 < n <= LARGEST_BLOCK]
    for width, texts in groups:
        assert max(lengths[text] for text in texts) <= width <= LARGEST_BLOCK and width % attention.UNIT == 0
    assert groups == grouped(list(lengths))


# --- best fit -----------------------------------------------------------------------------------------------

lists = st.lists(st.integers(1, 60), min_size=0, max_size=40)


@given(lengths=lists, room=st.integers(1, 50))
def test_every_text_has_one_place_and_no_two_shelves_could_be_one(lengths: list[int], room: int) -> None:
    shelves = best_fit(lengths, room)
    assert sorted(i for shelf in shelves for i in shelf) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in shelf) for shelf in shelves]
    assert all(full <= room or len(shelf) == 1 for full, shelf in zip(filled, shelves, strict=True))
    assert len(shelves) < 2 or sum(sorted(filled)[:2]) > room
    assert best_fit(list(lengths), room) == shelves


def fewest(lengths: list[int], room: int) -> int:
    """The least number of bins, by trying every set of texts as the content of the last one."""
    best = {0: 0}
    for chosen in range(1, 1 << len(lengths)):
        lowest = chosen & -chosen
        options, part = [], chosen
        while part:
            if part & lowest and sum(length for i, length in enumerate(lengths) if part >> i & 1) <= room:
                options.append(best[chosen ^ part] + 1)
            part = (part - 1) & chosen
        best[chosen] = min(options)
    return best[(1 << len(lengths)) - 1]


@settings(max_examples=40)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=7), room=st.integers(20, 30))
def test_shelves_are_at_most_eleven_ninths_of_the_fewest_and_one(lengths: list[int], room: int) -> None:
    assert len(best_fit(lengths, room)) <= 11 / 9 * fewest(lengths, room) + 1


def test_the_fullest_shelf_with_room_is_taken() -> None:
    assert best_fit([60, 52, 45, 3], 100) == [[0], [1, 2, 3]]  # first fit would put the 3 beside the 60
    assert best_fit([6, 7, 3, 1], 10) == [[1, 2], [0, 3]]  # and worst fit beside the 6
    assert best_fit([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]  # equal lengths keep their order
