"""Describing a decoder from its config: the pieces that the families of `families.py` are put together from.

Module trees and parameter shapes are those of transformers 5 (`models/*/modeling_*.py`). The tests build every family
on the meta device from odd settings and compare each linear layer and the total.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from finetuneflow.knowledge.shapes.settings import MOST_LAYERS, Settings, unsupported
from finetuneflow.knowledge.shapes.shape import Linear, Part

Rule = bool | str  # a fact of the family, or the config key that decides


@dataclass(slots=True)
class Layout:
    """A model being described; numbers as in `ModelShape`. `layer_path` is where a layer stands, `{}` its index."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    intermediate: int = 0
    tied: bool = False
    gated_mlp: bool = True
    layer_path: str = "model.layers.{}"
    linears: list[Linear] = field(default_factory=list)
    other_parameters: int = 0
    max_position: int | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    sliding_window: int | None = None
    sliding_layers: int = 0
    attention_layers: int | None = None
    key_value_width: int | None = None
    state_size: int | None = None
    state_values: int = 0
    embedding_width: int | None = None
    head_bias: bool = False
    embedding_name: str = "embed_tokens"
    head_name: str = "lm_head"

    def linear(
        self,
        path: str,
        inputs: int,
        outputs: int,
        part: Part,
        *,
        bias: bool = False,
        layers: Sequence[int] | None = None,
        module: bool = True,
        each: int = 1,
    ) -> None:
        """Add a layer at `path` below each of `layers` (default: all), `each` times in one place."""
        indices = tuple(range(self.layers) if layers is None else layers)
        if indices and each:
            name = path.rsplit(".", 1)[-1]
            full = f"{self.layer_path}.{path}"
            self.linears.append(Linear(name, inputs, outputs, len(indices) * each, bias, part, module, full, indices))

    def outer_linear(self, path: str, inputs: int, outputs: int) -> None:
        """Add a linear layer that stands outside the layers."""
        self.linears.append(Linear(path.rsplit(".", 1)[-1], inputs, outputs, 1, part="other", path=path))

    def all_layers(self) -> range:
        return range(self.layers)


def start(s: Settings, *, layer_path: str = "model.layers.{}", own_head_dim: bool = True, layers: int | None = None) -> Layout:
    """What every family has: width, depth, heads, vocabulary, whether the head shares the embedding.

    `own_head_dim`: a head_dim in the config counts; families without it divide the width by the heads.
    """
    s.require("hidden_size", *([] if layers else ["num_hidden_layers"]), "vocab_size")
    hidden = s.integer("hidden_size")
    heads = s.integer("num_attention_heads")
    head_dim = s.optional("head_dim") if own_head_dim else None
    if head_dim is None and heads > hidden:
        raise unsupported(f"{heads} attention heads do not fit into a width of {hidden}.", name=s.name)
    return Layout(
        hidden=hidden,
        layers=layers or s.integer("num_hidden_layers", most=MOST_LAYERS),
        heads=heads,
        kv_heads=s.integer("num_key_value_heads", heads),
        head_dim=head_dim or hidden // heads,
        vocab=s.integer("vocab_size"),
        tied=s.flag("tie_word_embeddings", True),
        layer_path=layer_path,
        max_position=s.optional("max_position_embeddings", least=0, most=10**12),
    )


def decide(s: Settings, rule: Rule) -> bool:
    return rule if isinstance(rule, bool) else s.flag(rule)


# --- attention ----------------------------------------------------------------------------------


def attention(
    d: Layout,
    s: Settings,
    *,
    block: str = "self_attn",
    qkv_bias: Rule = "attention_bias",
    out_bias: Rule = "attention_bias",
    out: str = "o_proj",
    qk_norm: Literal["none", "head", "width", "stacked"] = "none",
    sinks: bool = False,
    gate: bool = False,
    layers: Sequence[int] | None = None,
) -> None:
    """Query, key, value and output projections, grouped where there are fewer key/value heads.

    `qk_norm`: norms on queries and keys over one head, over the whole width, or one per head stacked.
    `gate`: the query projection also yields a gate of its own width (Qwen3-Next).
    """
    indices = d.all_layers() if layers is None else layers
    bias = decide(s, qkv_bias)
    queries, keys = d.heads * d.head_dim, d.kv_heads * d.head_dim
    d.linear(f"{block}.q_proj", d.hidden, queries * (2 if gate else 1), "attention", bias=bias, layers=indices)
    d.linear(f"{block}.k_proj", d.hidden, keys, "attention", bias=bias, layers=indices)
    d.linear(f"{block}.v_proj", d.hidden, keys, "attention", bias=bias, layers=indices)
    d.linear(f"{block}.{out}", queries, d.hidden, "attention", bias=decide(s, out_bias), layers=indices)
    norms = {"none": 0, "head": 2 * d.head_dim, "width": queries + keys, "stacked": queries + keys}[qk_norm]
    d.other_parameters += len(indices) * (norms + (d.heads if sinks else 0))


def latent_attention(d: Layout, s: Settings, *, head: int | None = None) -> None:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values pass through a narrow latent."""
    bias = s.flag("attention_bias")
    rank, rope, nope = s.integer("kv_lora_rank"), s.integer("qk_rope_head_dim"), s.integer("qk_nope_head_dim")
    values, queries = s.integer("v_head_dim", head), d.heads * (rope + nope)
    query_rank = s.optional("q_lora_rank")
    if query_rank is None:
        d.linear("self_attn.q_proj", d.hidden, queries, "attention")
    else:
        d.linear("self_attn.q_a_proj", d.hidden, query_rank, "attention", bias=bias)
        d.linear("self_attn.q_b_proj", query_rank, queries, "attention")
    d.linear("self_attn.kv_a_proj_with_mqa", d.hidden, rank + rope, "attention", bias=bias)
    d.linear("self_attn.kv_b_proj", rank, d.heads * (nope + values), "attention")
    d.linear("self_attn.o_proj", d.heads * values, d.hidden, "attention", bias=bias)
    d.other_parameters += d.layers * (rank + (query_rank or 0))
    d.kv_heads = d.heads
    d.head_dim = rope + nope
    d.key_value_width = rank + rope  # the latent and the rotary part are cached, not the heads


# --- feed-forward -------------------------------------------------------------------------------


def feed_forward(
    d: Layout,
    s: Settings,
    *,
    block: str = "mlp",
    kind: Literal["gated", "fused", "plain"] = "gated",
    names: tuple[str, str] = ("up_proj", "down_proj"),
    bias: Rule = "mlp_bias",
    width: int | None = None,
    layers: Sequence[int] | None = None,
) -> None:
    """Up (with a gate beside it, fused or apart) and down. `names`: of the two that every kind has."""
    inner = width or d.intermediate
    biased = decide(s, bias)
    d.gated_mlp = kind != "plain"
    if kind == "fused":
        d.linear(f"{block}.gate_up_proj", d.hidden, 2 * inner, "mlp", bias=biased, layers=layers)
    else:
        if kind == "gated":
            d.linear(f"{block}.gate_proj", d.hidden, inner, "mlp", bias=biased, layers=layers)
        d.linear(f"{block}.{names[0]}", d.hidden, inner, "mlp", bias=biased, layers=layers)
    d.linear(f"{block}.{names[1]}", inner, d.hidden, "mlp", bias=biased, layers=layers)


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts as one family stores it: fused tensors of all experts, and a router.

    `width`: the config key of an expert's width. `router_module`: the router is a torch linear layer.
    `shared`: path of the experts that every token passes; their width is `shared_width` (a key), or
    `shared_count` (a key) times an expert's. `extra_per_expert`: parameters beside the matrices, per expert.
    """

    block: str = "mlp"
    router: str = "gate"
    router_module: bool = False
    router_bias: bool = False
    width: str = "moe_intermediate_size"
    chosen: str = "num_experts_per_tok"
    biased: bool = False
    shared: str | None = None
    shared_width: str | None = None
    shared_count: str | None = None
    shared_gate: bool = False
    shared_bias: Rule = False
    extra_per_expert: int = 0
    names: tuple[str, str] = ("experts.gate_up_proj", "experts.down_proj")


def mixture(d: Layout, s: Settings, e: Experts, layers: Sequence[int]) -> None:
    """The experts of `layers`. Bare parameters, so no adapter goes on them; shared experts are ordinary layers."""
    if not layers:
        return
    d.num_experts = s.integer("num_experts", most=100_000)
    d.experts_per_token = min(s.uniform(e.chosen, 1), d.num_experts)
    inner = s.integer(e.width)
    d.linear(
        f"{e.block}.{e.router}",
        d.hidden,
        d.num_experts,
        "router",
        bias=e.router_bias,
        layers=layers,
        module=e.router_module,
    )
    up, down = e.names
    each = d.num_experts
    d.linear(f"{e.block}.{up}", d.hidden, 2 * inner, "expert", bias=e.biased, layers=layers, module=False, each=each)
    d.linear(f"{e.block}.{down}", inner, d.hidden, "expert", bias=e.biased, layers=layers, module=False, each=each)
    d.other_parameters += len(layers) * d.num_experts * e.extra_per_expert
    if e.shared is None:
        return
    count = (s.optional(e.shared_count, least=0) or 0) if e.shared_count else 1
    wide = s.integer(e.shared_width, least=0) if e.shared_width else count * inner
    if wide:
        feed_forward(d, s, block=f"{e.block}.{e.shared}", bias=e.shared_bias, width=wide, layers=layers)
    if e.shared_gate:
        d.linear(f"{e.block}.shared_expert_gate", d.hidden, 1, "router", layers=layers)


def sparse_layers(s: Settings, layers: int) -> list[int]:
    """Which layers hold experts, by whichever of the known keys the config or its class has; by default all."""
    if s.raw("decoder_sparse_step") is not None and s.optional("num_experts", least=0) == 0:
        return []  # Qwen's mixtures become dense
    kinds = s.listing("mlp_layer_types", layers)
    if kinds is not None:
        return [i for i, kind in enumerate(kinds) if kind == "sparse"]
    chosen = s.listing("moe_layers")
    if chosen is not None:
        return [i for i in range(layers) if i in chosen]
    dense_only = s.listing("mlp_only_layers") or []
    every = s.optional("decoder_sparse_step") or s.optional("interleave_moe_layer_step") or 1
    first = s.optional("first_k_dense_replace", least=0) or s.optional("num_dense_layers", least=0) or 0
    last = layers
    if s.raw("moe_layer_start_index") is not None:
        first = s.integer("moe_layer_start_index", least=0)
        end = s.integer("moe_layer_end_index", -1, least=-1)
        last = layers if end == -1 else min(layers, end + 1)
        every = s.integer("moe_layer_interval", 1)
    return [i for i in range(first, last) if i not in dense_only and (i + 1) % every == 0]


# --- what is kept while generating ----------------------------------------------------------------


def layer_kinds(s: Settings, layers: int, default: Callable[[int], str] | None = None) -> list[str]:
    """The attention kind of each layer: the config's own list, else the family's `default` by layer index."""
    own = s.listing("layer_types", layers)
    if own is not None:
        return [str(kind) for kind in own]
    return [default(i) if default else "full_attention" for i in range(layers)]


def set_window(d: Layout, s: Settings, default: Callable[[int], str] | None = None) -> None:
    """Note how many layers keep only the last tokens. Without a family's pattern a window means every layer."""
    window = s.optional("sliding_window", least=0)
    if not window or s.raw("use_sliding_window") is False:
        return
    kinds = layer_kinds(s, d.layers, default or (lambda _: "sliding_attention"))
    sliding = sum(kind == "sliding_attention" for kind in kinds)
    if sliding:
        d.sliding_window, d.sliding_layers = window, sliding
