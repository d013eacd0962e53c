"""Attention of packed rows: several texts behind one another in one row, of which none sees another.

    with packed(lengths):            # while the forward and the backward pass of a packed row run
        model(input_ids=(1, total), position_ids=…)

`packed_attention` is what transformers calls (`AttentionInterface`); outside of `packed` it is transformers' own sdpa. A dense
mask would cost total² per head; here the cost of a text is its own length squared. Short texts share blocks of a few widths,
so that some batched products serve all of them; long ones go by stretches of queries against the keys before them.

Scores are computed and softmax is taken as in transformers' eager attention (fp32 inside, weights in the compute type). The
backward pass computes the weights of longer texts again instead of keeping them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

NAME = "finetuneflow_packed"
UNIT, LARGEST_BLOCK = 32, 512  # widths of blocks are multiples of the one, up to the other
# What a group of blocks costs whatever is in it, as the width squared of a block that takes as long: some forty small operations
# against 3.6 ns for each score of nine heads, forward and backward, on two cores of a server.
GROUP_COST = 128**2
STRETCH = 256  # queries of a long text that are computed together
KEPT_WIDTH = 160  # weights of blocks up to this width are kept for the backward pass: less than what a layer keeps anyway
# What changes scores in ways that are not computed here; a model that passes one of these keeps its own attention.
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")


@dataclass(frozen=True)
class Block:
    """Texts of like length, several to a block. `slots` (blocks x width,): the token in each place (any token where none belongs);
    `owned`: the places that hold a token; `mask` (blocks, width, width): 0 where a query sees a key, else -inf. A place without a
    token sees itself alone."""

    slots: torch.Tensor
    owned: torch.Tensor
    mask: torch.Tensor
    width: int

    def mask_of(self, heads: int, groups: int) -> torch.Tensor:
        """The mask for `heads` key heads, each with `groups` query heads one below the other: (heads x blocks, groups x width, width).
        Made once: all layers have the same heads."""
        return self._once("mask", heads, groups, lambda: self.mask.repeat(heads, groups, 1))

    def gather(self, side: torch.Tensor, heads: int) -> torch.Tensor:
        """(tokens, heads x groups, features) -> (heads x blocks, groups x width, features), in one copy."""
        groups, features = side.shape[1] // heads, side.shape[2]
        rows = self._once("rows", heads, groups, lambda: self._rows(heads, groups))
        return side.reshape(-1, features).index_select(0, rows).view(heads * len(self.mask), groups * self.width, features)

    def _rows(self, heads: int, groups: int) -> torch.Tensor:
        """Of (token, head) pairs, the one in each row of the gathered heads."""
        head = torch.arange(heads * groups, device=self.slots.device).view(heads, 1, groups, 1)
        return (self.slots.view(1, -1, 1, self.width) * (heads * groups) + head).flatten()

    def _once(self, what: str, heads: int, groups: int, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        key = (what, heads, groups)
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @cached_property
    def _made(self) -> dict[tuple[str, int, int], torch.Tensor]:
        return {}


class Layout:
    """Where the texts of a packed row lie: computed once, used by every layer."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self.total = sum(self.lengths)
        self.longest = max(self.lengths, default=0)
        self._on_device: dict[Any, Any] = {}

    @cached_property
    def starts(self) -> tuple[int, ...]:
        starts, at = [], 0
        for length in self.lengths:
            starts.append(at)
            at += length
        return tuple(starts)

    @property
    def long(self) -> list[tuple[int, int]]:
        """(first token, one past the last) of each text that is too long for a block."""
        pairs = zip(self.starts, self.lengths, strict=True)
        return [(start, start + length) for start, length in pairs if length > LARGEST_BLOCK]

    def blocks(self, device: torch.device, dtype: torch.dtype) -> list[Block]:
        """The blocks that hold every text which is not `long`."""
        key = (device, dtype)
        if key not in self._on_device:
            self._on_device[key] = self._place(device, dtype)
        return self._on_device[key]  # type: ignore[no-any-return]

    def in_order(self, found: list[torch.Tensor], blocks: list[Block], like: torch.Tensor, heads: int) -> torch.Tensor:
        """Results of all blocks, each as `Block.gather` lays them out, in the order and shape of `like` (tokens, heads x groups,
        features), in one copy; of long texts nothing that counts."""
        if not found:
            return torch.empty_like(like, memory_format=torch.contiguous_format)
        rows = [result.view(-1, result.shape[-1]) for result in found]
        key = (like.device, like.shape[1], heads)
        if key not in self._on_device:
            self._on_device[key] = self._rows(blocks, heads, like.shape[1] // heads)
        together = rows[0] if len(rows) == 1 else torch.cat(rows)
        return together.index_select(0, self._on_device[key]).view(like.shape)

    def _rows(self, blocks: list[Block], heads: int, groups: int) -> torch.Tensor:
        """Of the gathered rows of all blocks, the one of each (token, head) pair."""
        device = blocks[0].slots.device
        rows = torch.zeros(self.total, heads, groups, dtype=torch.long, device=device)
        head = torch.arange(heads, device=device).view(1, -1, 1)
        group = torch.arange(groups, device=device).view(1, 1, -1)
        before = 0
        for block in blocks:
            owned = block.owned
            shelf, place = (owned // block.width).view(-1, 1, 1), (owned % block.width).view(-1, 1, 1)
            rows[block.slots[owned]] = before + ((head * len(block.mask) + shelf) * groups + group) * block.width + place
            before += heads * groups * len(block.slots)
        return rows.flatten()

    def cumulative(self, device: torch.device) -> torch.Tensor:
        """Ends of the texts, with 0 before them, as fused kernels take them: (texts + 1,), int32."""
        if device not in self._on_device:
            self._on_device[device] = torch.tensor([*self.starts, self.total], dtype=torch.int32, device=device)
        return self._on_device[device]  # type: ignore[no-any-return]

    def _place(self, device: torch.device, dtype: torch.dtype) -> list[Block]:
        blocks = []
        for width, texts in grouped(self.lengths):
            shelves = best_fit([self.lengths[text] for text in texts], width)
            slots = torch.zeros(len(shelves), width, dtype=torch.long)
            owner = torch.full((len(shelves), width), -1, dtype=torch.long)
            for shelf, members in enumerate(shelves):
                at = 0
                for member in members:
                    text = texts[member]
                    start, length = self.starts[text], self.lengths[text]
                    slots[shelf, at : at + length] = torch.arange(start, start + length)
                    owner[shelf, at : at + length] = text
                    at += length
            sees = (owner[:, :, None] == owner[:, None, :]) & (owner >= 0)[:, :, None] & torch.ones(width, width).tril().bool()
            sees |= torch.eye(width, dtype=torch.bool)
            mask = torch.zeros(sees.shape).masked_fill_(~sees, float("-inf"))
            owned = (owner.flatten() >= 0).nonzero()[:, 0]
            blocks.append(Block(slots.flatten().to(device), owned.to(device), mask.to(device, dtype), width))
        return blocks


def grouped(lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Texts (by index) that share blocks of one width, for every text that fits a block: the grouping that costs least.

    Wide blocks waste scores on short texts, narrow ones hold none of the long; every further group costs `GROUP_COST`. Groups are
    neighbours in length, so the best partition is found class by class, the longest first.
    """
    classes: dict[int, list[int]] = {}
    for text, length in enumerate(lengths):
        if 0 < length <= LARGEST_BLOCK:
            classes.setdefault(-(-length // UNIT) * UNIT, []).append(text)
    sizes = sorted(classes, reverse=True)
    best: list[tuple[float, list[tuple[int, int, int]]]] = [(0.0, [])]  # of the first n classes: cost, and (width, from, to)
    for end in range(1, len(sizes) + 1):
        options = []
        for start in range(end):
            count, width = min(_width_for([(size, len(classes[size])) for size in sizes[start:end]]))
            cost, before = best[start]
            options.append((cost + count + GROUP_COST, [*before, (width, start, end)]))
        best.append(min(options))
    return [(width, [text for size in sizes[start:end] for text in classes[size]]) for width, start, end in best[-1][1]]


def _width_for(classes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(scores, width) of some widths for texts in classes (length, count), the longest first."""
    longest = classes[0][0]
    widths = [width for width in (longest, longest + UNIT, 2 * longest, 3 * longest) if width <= LARGEST_BLOCK] or [longest]
    return [(math.ceil(sum(count / (width // size) for size, count in classes)) * width**2, width) for width in widths]


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Best-fit decreasing: bins of indices, each at most `room` long unless one item alone is longer.

    The longest goes first, each into the fullest bin that still has room; ties keep their order, so the result is a pure
    function of the lengths. At most 11/9 of the fewest bins possible, and one (Johnson 1973).
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    bins: list[list[int]] = []
    left: list[int] = []
    for i in order:
        fitting = [b for b, space in enumerate(left) if space >= lengths[i]]
        if fitting:
            best = min(fitting, key=lambda b: left[b])
            bins[best].append(i)
            left[best] -= lengths[i]
        else:
            bins.append([i])
            left.append(room - lengths[i])
    return bins


# The layout of the row at work. A plain global: the backward pass may run in threads of autograd's own.
_layout: Layout | None = None


@contextlib.contextmanager
def packed(lengths: Sequence[int]) -> Iterator[Layout]:
    """Inside, attention over a single row of sum(lengths) tokens keeps its texts apart. Holds for the backward pass too, which
    may compute layers again."""
    global _layout
    before, _layout = _layout, Layout(lengths)
    try:
        yield _layout
    finally:
        _layout = before


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """`query` (batch, heads, tokens, width), `key` and `value` with the same or fewer heads -> (batch, tokens, heads, width).

    Raises `NotImplementedError` for a model whose scores are changed in ways that are not computed here.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layout = _layout
    if layout is None or query.shape[0] != 1 or query.shape[2] != layout.total or key.shape[2] != layout.total:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    if changed := [name for name in UNSUPPORTED if options.get(name) is not None]:
        raise NotImplementedError(f"attention with {', '.join(changed)}")
    if attention_mask is not None:  # a window that is shorter than a text
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):
        kind = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    if query.device.type == "cuda" and query.dtype != torch.float32 and not dropout:
        return _varlen(query, key, value, layout, scale)[None], None
    sides = (side[0].transpose(0, 1) for side in (query, key, value))
    out: torch.Tensor = _PackedAttention.apply(*sides, layout, scale, dropout)  # type: ignore[no-untyped-call]
    return out[None], None


def packed_mask(
    batch_size: int, q_length: int, kv_length: int, *, local_size: int | None = None, **options: Any
) -> torch.Tensor | None:
    """transformers' mask for `packed_attention`: none for a packed row, unless a window is shorter than one of its texts."""
    from transformers.masking_utils import sdpa_mask

    layout = _layout
    whole = layout is not None and batch_size == 1 and q_length == kv_length == layout.total
    if layout is not None and whole and (local_size is None or layout.longest <= local_size):
        return None
    return sdpa_mask(batch_size, q_length, kv_length, local_size=local_size, **options)


def register() -> str:
    """Make the attention known to transformers; the name to set as a model's `attn_implementation`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, packed_mask)
    return NAME


def _varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float) -> torch.Tensor:
    """PyTorch's flash attention over texts of different lengths."""
    from torch.nn.attention.varlen import varlen_attn

    ends = layout.cumulative(query.device)
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        ends,
        ends,
        layout.longest,
        layout.longest,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out


class _PackedAttention(torch.autograd.Function):
    """(tokens, heads, features) three times, keys and values with fewer heads where queries share them -> as the queries.

    Query heads that share a key head stand below one another in one product.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float, dropout: float
    ) -> torch.Tensor:
        heads, groups = key.shape[1], query.shape[1] // key.shape[1]
        blocks = layout.blocks(query.device, query.dtype)
        kept: list[torch.Tensor | None] = []  # of each block and stretch its weights, if they are narrow, and what dropout leaves
        with torch.autocast(query.device.type, enabled=False):
            found = []
            for block in blocks:
                q, k, v = (block.gather(side, heads) for side in (query, key, value))
                weights = _weights(q, k, block.mask_of(heads, groups), scale)
                kept += [weights if block.width <= KEPT_WIDTH else None, _draw(weights, dropout)]
                found.append(torch.bmm(_dropped(weights, kept[-1], dropout), v))
            out = layout.in_order(found, blocks, query, heads)
            for start, end in layout.long:
                k, v = (side[start:end].transpose(0, 1) for side in (key, value))
                for first, last in _stretches(end - start):
                    here = slice(start + first, start + last)
                    weights = _weights(_stacked(query[here], heads), k[:, :last], _causal(first, last, groups, query), scale)
                    kept += [None, _draw(weights, dropout)]
                    result = torch.bmm(_dropped(weights, kept[-1], dropout), v[:, :last])
                    out[here] = _unstacked(result, groups)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.layout, ctx.scale, ctx.dropout = layout, scale, dropout
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        query, key, value, *kept = ctx.saved_tensors
        layout, scale, dropout = ctx.layout, ctx.scale, ctx.dropout
        heads, groups = key.shape[1], query.shape[1] // key.shape[1]
        blocks = layout.blocks(query.device, query.dtype)
        grad = grad.to(query.dtype)
        parts: tuple[list[torch.Tensor], ...] = ([], [], [])
        remaining = iter(kept)
        with torch.autocast(query.device.type, enabled=False):
            for block in blocks:
                q, k, v, grad_out = (block.gather(side, heads) for side in (query, key, value, grad))
                weights = next(remaining)
                if weights is None:
                    weights = _weights(q, k, block.mask_of(heads, groups), scale)
                for part, found in zip(
                    parts, _backward(q, k, v, grad_out, weights, scale, next(remaining), dropout), strict=True
                ):
                    part.append(found)
            grads = [layout.in_order(part, blocks, like, heads) for part, like in zip(parts, (query, key, value), strict=True)]
            for start, end in layout.long:
                k, v = (side[start:end].transpose(0, 1) for side in (key, value))
                # Each stretch adds to the keys before it: in 16 bits every addition would round.
                sums = torch.zeros(2, *k.shape, dtype=torch.promote_types(k.dtype, torch.float32), device=k.device)
                for first, last in _stretches(end - start):
                    here = slice(start + first, start + last)
                    q, grad_out = _stacked(query[here], heads), _stacked(grad[here], heads)
                    next(remaining)
                    weights = _weights(q, k[:, :last], _causal(first, last, groups, query), scale)
                    dq, dk, dv = _backward(q, k[:, :last], v[:, :last], grad_out, weights, scale, next(remaining), dropout)
                    grads[0][here] = _unstacked(dq, groups)
                    sums[0, :, :last] += dk
                    sums[1, :, :last] += dv
                grads[1][start:end], grads[2][start:end] = sums.to(query.dtype).transpose(1, 2)
        return grads[0], grads[1], grads[2], None, None, None


def _stacked(side: torch.Tensor, heads: int) -> torch.Tensor:
    """(tokens, heads x groups, features) -> (heads, groups x tokens, features)."""
    tokens, _, features = side.shape
    return side.reshape(tokens, heads, -1, features).permute(1, 2, 0, 3).reshape(heads, -1, features)


def _unstacked(side: torch.Tensor, groups: int) -> torch.Tensor:
    heads, _, features = side.shape
    return side.view(heads, groups, -1, features).permute(2, 0, 1, 3).reshape(-1, heads * groups, features)


def _stretches(length: int) -> list[tuple[int, int]]:
    return [(first, min(first + STRETCH, length)) for first in range(0, length, STRETCH)]


def _causal(first: int, last: int, groups: int, like: torch.Tensor) -> torch.Tensor:
    """(1, groups x (last - first), last): queries first..last, once per group, against keys 0..last."""
    mask = torch.zeros(last - first, last, dtype=like.dtype, device=like.device)
    mask[:, first:] = torch.full((last - first, last - first), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)
    return mask.repeat(groups, 1)[None]


def _weights(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.softmax(torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scale), dim=-1)


def _draw(weights: torch.Tensor, dropout: float) -> torch.Tensor | None:
    return torch.rand(weights.shape, device=weights.device) >= dropout if dropout else None


def _dropped(weights: torch.Tensor, keep: torch.Tensor | None, dropout: float) -> torch.Tensor:
    return weights if keep is None else weights * keep / (1 - dropout)


def _backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
    keep: torch.Tensor | None,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values of one batch of blocks."""
    grad_value = torch.bmm(_dropped(weights, keep, dropout).transpose(1, 2), grad)
    grad_weights = _dropped(torch.bmm(grad, value.transpose(1, 2)), keep, dropout)
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    nothing = query.new_empty(())
    grad_query = torch.baddbmm(nothing, grad_scores, key, beta=0, alpha=scale)
    grad_key = torch.baddbmm(nothing, grad_scores.transpose(1, 2), query, beta=0, alpha=scale)
    return grad_query, grad_key, grad_value
