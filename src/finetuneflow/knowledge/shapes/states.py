"""Families that keep a state of fixed size instead of, or beside, keys and values: Mamba and the hybrids with linear attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from finetuneflow.knowledge.shapes.layouts import (
    Experts,
    Layout,
    attention,
    feed_forward,
    layer_kinds,
    mixture,
    sparse_layers,
    start,
)
from finetuneflow.knowledge.shapes.settings import MOST_LAYERS, Settings, unsupported


def _stateful(s: Settings) -> Layout:
    """A model without attention. Heads are a formality here: one, as wide as the model; `attention_layers` is 0."""
    s.require("hidden_size", "num_hidden_layers", "vocab_size")
    hidden = s.integer("hidden_size")
    return Layout(
        hidden=hidden,
        layers=s.integer("num_hidden_layers", most=MOST_LAYERS),
        heads=1,
        kv_heads=1,
        head_dim=hidden,
        vocab=s.integer("vocab_size"),
        tied=s.flag("tie_word_embeddings", True),
        gated_mlp=False,
        layer_path="backbone.layers.{}",
        embedding_name="embeddings",
        attention_layers=0,
    )


def _selective_scan(d: Layout, block: str, inner: int, state: int, rank: int, kernel: int, *, bias: bool, conv_bias: bool,
                    layers: Sequence[int]) -> None:  # fmt: skip
    """Mamba's mixer (arXiv:2312.00752): projections in and out, a short convolution, input-dependent steps and matrices."""
    d.linear(f"{block}.in_proj", d.hidden, 2 * inner, "state", bias=bias, layers=layers)
    d.linear(f"{block}.x_proj", inner, rank + 2 * state, "state", layers=layers)
    d.linear(f"{block}.dt_proj", rank, inner, "state", bias=True, layers=layers)
    d.linear(f"{block}.out_proj", inner, d.hidden, "state", bias=bias, layers=layers)
    d.other_parameters += len(layers) * inner * (kernel + int(conv_bias) + state + 1)
    d.state_size = state
    d.state_values += len(layers) * inner * (kernel + state)


def _structured_scan(d: Layout, block: str, inner: int, state: int, groups: int, heads: int, kernel: int, *, bias: bool,
                     conv_bias: bool, layers: Sequence[int]) -> None:  # fmt: skip
    """Mamba-2's mixer (arXiv:2405.21060): one projection yields gate, input, state matrices and steps."""
    mixed = inner + 2 * groups * state
    d.linear(f"{block}.in_proj", d.hidden, inner + mixed + heads, "state", bias=bias, layers=layers)
    d.linear(f"{block}.out_proj", inner, d.hidden, "state", bias=bias, layers=layers)
    d.other_parameters += len(layers) * (mixed * (kernel + int(conv_bias)) + 3 * heads + inner)
    d.state_size = state
    d.state_values += len(layers) * (mixed * kernel + inner * state)


def _mamba(s: Settings) -> Layout:
    d = _stateful(s)
    inner = s.integer("intermediate_size", s.integer("expand") * d.hidden)
    rank = math.ceil(d.hidden / 16) if s.raw("time_step_rank") == "auto" else s.integer("time_step_rank")
    d.intermediate = inner
    _selective_scan(
        d,
        "mixer",
        inner,
        s.integer("state_size"),
        rank,
        s.integer("conv_kernel"),
        bias=s.flag("use_bias"),
        conv_bias=s.flag("use_conv_bias", True),
        layers=d.all_layers(),
    )
    d.other_parameters += (d.layers + 1) * d.hidden
    return d


def _mamba2(s: Settings) -> Layout:
    d = _stateful(s)
    d.intermediate = s.integer("expand") * d.hidden
    heads = s.integer("num_heads")
    if heads * s.integer("head_dim") != d.intermediate:
        raise unsupported("num_heads x head_dim is not expand x hidden_size.", name=s.name, invalid=["num_heads", "head_dim"])
    _structured_scan(
        d,
        "mixer",
        d.intermediate,
        s.integer("state_size"),
        s.integer("n_groups"),
        heads,
        s.integer("conv_kernel"),
        bias=s.flag("use_bias"),
        conv_bias=s.flag("use_conv_bias", True),
        layers=d.all_layers(),
    )
    d.other_parameters += (d.layers + 1) * d.hidden
    return d


def _split(s: Settings, d: Layout, default: Callable[[int], bool]) -> tuple[list[int], list[int]]:
    """Layers with attention and layers with a state; `default(i)` says attention where the config has no list."""
    kinds = layer_kinds(s, d.layers, lambda i: "full_attention" if default(i) else "linear_attention")
    with_attention = [i for i, kind in enumerate(kinds) if kind in ("full_attention", "attention")]
    d.attention_layers = len(with_attention)
    return with_attention, [i for i in d.all_layers() if i not in set(with_attention)]


def _delta_rule(d: Layout, s: Settings, layers: Sequence[int], *, fused: bool) -> None:
    """Gated delta-rule attention (arXiv:2412.06464) as in Qwen3-Next (fused projections) and Qwen3.5 (apart)."""
    key_heads, value_heads = s.integer("linear_num_key_heads"), s.integer("linear_num_value_heads")
    key_dim, value_dim = s.integer("linear_key_head_dim"), s.integer("linear_value_head_dim")
    kernel = s.integer("linear_conv_kernel_dim")
    keys, values = key_heads * key_dim, value_heads * value_dim
    if fused:
        d.linear("linear_attn.in_proj_qkvz", d.hidden, 2 * keys + 2 * values, "state", layers=layers)
        d.linear("linear_attn.in_proj_ba", d.hidden, 2 * value_heads, "state", layers=layers)
    else:
        d.linear("linear_attn.in_proj_qkv", d.hidden, 2 * keys + values, "state", layers=layers)
        d.linear("linear_attn.in_proj_z", d.hidden, values, "state", layers=layers)
        d.linear("linear_attn.in_proj_b", d.hidden, value_heads, "state", layers=layers)
        d.linear("linear_attn.in_proj_a", d.hidden, value_heads, "state", layers=layers)
    d.linear("linear_attn.out_proj", values, d.hidden, "state", layers=layers)
    mixed = 2 * keys + values
    d.other_parameters += len(layers) * (mixed * kernel + 2 * value_heads + value_dim)
    d.state_values += len(layers) * (mixed * kernel + value_heads * key_dim * value_dim)


def _qwen_hybrid(s: Settings, *, fused: bool, moe: bool) -> Layout:
    d = start(s)
    period = s.integer("full_attention_interval", 4)
    full, linear = _split(s, d, lambda i: (i + 1) % period == 0)
    sparse = sparse_layers(s, d.layers) if moe else []
    dense = sorted(set(d.all_layers()) - set(sparse))
    attention(d, s, qk_norm="head", gate=True, layers=full)
    _delta_rule(d, s, linear, fused=fused)
    if dense:
        d.intermediate = s.integer("intermediate_size")
        feed_forward(d, s, bias=False, layers=dense)
    mixture(d, s, Experts(shared="shared_expert", shared_width="shared_expert_intermediate_size", shared_gate=True), sparse)
    d.intermediate = d.intermediate or s.integer("moe_intermediate_size")
    d.other_parameters += (2 * d.layers + 1) * d.hidden
    return d


def _jamba(s: Settings) -> Layout:
    """One attention layer among several Mamba layers; experts in every other layer (arXiv:2403.19887)."""
    d = start(s)
    d.intermediate = s.integer("intermediate_size")
    period, offset = s.integer("attn_layer_period"), s.integer("attn_layer_offset", least=0)
    full, scans = _split(s, d, lambda i: i % period == offset)
    attention(d, s, qkv_bias=False, out_bias=False, layers=full)
    rank = math.ceil(d.hidden / 16) if s.raw("mamba_dt_rank") == "auto" else s.integer("mamba_dt_rank")
    state, inner = s.integer("mamba_d_state"), s.integer("mamba_expand") * d.hidden
    _selective_scan(
        d,
        "mamba",
        inner,
        state,
        rank,
        s.integer("mamba_d_conv"),
        bias=s.flag("mamba_proj_bias"),
        conv_bias=s.flag("mamba_conv_bias", True),
        layers=scans,
    )
    period, offset = s.integer("expert_layer_period"), s.integer("expert_layer_offset", least=0)
    sparse = [i for i in d.all_layers() if i % period == offset] if s.integer("num_experts", least=0) > 1 else []
    feed_forward(d, s, block="feed_forward", bias=False, layers=sorted(set(d.all_layers()) - set(sparse)))
    mixture(d, s, Experts(block="feed_forward", router="router", width="intermediate_size"), sparse)
    d.other_parameters += len(scans) * (rank + 2 * state) + (2 * d.layers + 1) * d.hidden
    return d


def _scan_of_hybrid(d: Layout, s: Settings, layers: Sequence[int]) -> None:
    """The Mamba-2 layers of Bamba and Granite 4."""
    inner = s.integer("mamba_expand") * d.hidden
    _structured_scan(
        d,
        "mamba",
        inner,
        s.integer("mamba_d_state"),
        s.integer("mamba_n_groups"),
        s.integer("mamba_n_heads"),
        s.integer("mamba_d_conv"),
        bias=s.flag("mamba_proj_bias"),
        conv_bias=s.flag("mamba_conv_bias", True),
        layers=layers,
    )


def _bamba(s: Settings) -> Layout:
    d = start(s)
    d.intermediate = s.integer("intermediate_size")
    chosen = s.listing("attn_layer_indices") or []
    full, scans = _split(s, d, lambda i: i in chosen)
    attention(d, s, layers=full)
    _scan_of_hybrid(d, s, scans)
    feed_forward(d, s, block="feed_forward")
    d.other_parameters += (2 * d.layers + 1) * d.hidden
    return d


def _granite_hybrid(s: Settings) -> Layout:
    d = start(s)
    d.intermediate = s.integer("intermediate_size")
    full, scans = _split(s, d, lambda i: False)
    attention(d, s, layers=full)
    _scan_of_hybrid(d, s, scans)
    shared = s.integer("shared_intermediate_size", least=0)
    d.linear("shared_mlp.input_linear", d.hidden, 2 * shared, "mlp")
    d.linear("shared_mlp.output_linear", shared, d.hidden, "mlp")
    if s.optional("num_experts", least=0):
        mixture(d, s, Experts(block="block_sparse_moe", router="router", width="intermediate_size"), d.all_layers())
    d.other_parameters += (2 * d.layers + 1) * d.hidden
    return d


def _lfm2_width(s: Settings) -> int:
    """The feed-forward width, which the config states before two thirds and rounding up are applied."""
    width = s.integer("block_ff_dim", s.integer("intermediate_size"))
    if not s.flag("block_auto_adjust_ff_dim", True):
        return width
    factor = s.raw("block_ffn_dim_multiplier")
    width = int(2 * width / 3)
    if isinstance(factor, int | float) and not isinstance(factor, bool) and 0 < factor < 1000:
        width = int(factor * width)
    multiple = s.integer("block_multiple_of")
    return multiple * ((width + multiple - 1) // multiple)


def _lfm2(s: Settings, *, moe: bool = False) -> Layout:
    """Short gated convolutions in most layers, attention in the others; with experts in the mixture's later layers."""
    d = start(s)
    if s.raw("tie_embedding") is not None:
        d.tied = s.flag("tie_embedding")
    chosen = s.listing("full_attn_idxs")
    full, short = _split(s, d, lambda i: chosen is None or i in chosen)
    attention(d, s, qkv_bias=False, out_bias=False, out="out_proj", qk_norm="head", layers=full)
    kernel, bias = s.integer("conv_L_cache"), s.flag("conv_bias")
    d.linear("conv.in_proj", d.hidden, 3 * d.hidden, "state", bias=bias, layers=short)
    d.linear("conv.out_proj", d.hidden, d.hidden, "state", bias=bias, layers=short)
    d.state_values += len(short) * d.hidden * kernel
    sparse = sparse_layers(s, d.layers) if moe else []
    d.intermediate = s.integer("intermediate_size") if moe else _lfm2_width(s)
    for name in ("w1", "w3"):
        d.linear(f"feed_forward.{name}", d.hidden, d.intermediate, "mlp", layers=sorted(set(d.all_layers()) - set(sparse)))
    d.linear("feed_forward.w2", d.intermediate, d.hidden, "mlp", layers=sorted(set(d.all_layers()) - set(sparse)))
    mixture(d, s, Experts(block="feed_forward", router="gate"), sparse)
    d.other_parameters += len(short) * d.hidden * (kernel + int(bias)) + (2 * d.layers + 1) * d.hidden
    return d


def _minimax(s: Settings) -> Layout:
    """Lightning attention in every other layer (arXiv:2501.08313), experts in all."""
    d = start(s)
    full, linear = _split(s, d, lambda i: (i + 1) % 2 == 1)
    attention(d, s, qkv_bias=False, out_bias=False, layers=full)
    queries = d.heads * d.head_dim
    d.linear("self_attn.qkv_proj", d.hidden, 3 * queries, "state", layers=linear)
    d.linear("self_attn.out_proj", queries, d.hidden, "state", layers=linear)
    d.linear("self_attn.output_gate", d.hidden, queries, "state", layers=linear)
    mixture(d, s, Experts(width="intermediate_size"), d.all_layers())
    d.intermediate = s.integer("intermediate_size")
    d.state_values += len(linear) * d.heads * d.head_dim**2
    d.other_parameters += len(linear) * queries + (2 * d.layers + 1) * d.hidden
    return d


STATES: dict[str, Callable[[Settings], Layout]] = {
    "mamba": _mamba,
    "falcon_mamba": _mamba,
    "mamba2": _mamba2,
    "qwen3_next": lambda s: _qwen_hybrid(s, fused=True, moe=True),
    "qwen3_5_text": lambda s: _qwen_hybrid(s, fused=False, moe=False),
    "qwen3_5_moe_text": lambda s: _qwen_hybrid(s, fused=False, moe=True),
    "jamba": _jamba,
    "bamba": _bamba,
    "granitemoehybrid": _granite_hybrid,
    "lfm2": _lfm2,
    "lfm2_moe": lambda s: _lfm2(s, moe=True),
    "minimax": _minimax,
}
