"""Which pieces each architecture is put together from: one row or one function per family of transformers 5."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

from finetuneflow.knowledge.shapes.classics import CLASSICS
from finetuneflow.knowledge.shapes.layouts import (
    Experts,
    Layout,
    Rule,
    attention,
    feed_forward,
    latent_attention,
    mixture,
    set_window,
    sparse_layers,
    start,
)
from finetuneflow.knowledge.shapes.settings import Settings
from finetuneflow.knowledge.shapes.states import STATES

Family = Callable[[Settings], Layout]


def every(period: int) -> Callable[[int], str]:
    """The last of each `period` layers sees everything, the others a window."""
    return lambda i: "full_attention" if period and (i + 1) % period == 0 else "sliding_attention"


def first_of(period: int) -> Callable[[int], str]:
    """The first of each `period` layers sees everything, the others a window."""
    return lambda i: "full_attention" if i % period == 0 else "sliding_attention"


def decoder(
    s: Settings,
    *,
    qkv_bias: Rule = "attention_bias",
    out_bias: Rule = "attention_bias",
    out: str = "o_proj",
    qk_norm: Literal["none", "head", "width"] = "none",
    own_head_dim: bool = True,
    sinks: bool = False,
    mlp: Literal["gated", "fused", "plain"] = "gated",
    mlp_block: str = "mlp",
    mlp_names: tuple[str, str] = ("up_proj", "down_proj"),
    mlp_bias: Rule = "mlp_bias",
    dense_width: str = "intermediate_size",
    norms: int = 2,
    norm_vectors: int = 1,
    windows: Callable[[int], str] | None = None,
    latent: bool = False,
    experts: Experts | None = None,
    head_bias: Rule = False,
    extra: Callable[[Layout, Settings], int] | None = None,
) -> Layout:
    """A decoder like Llama's: attention and a feed-forward part in each layer, norms around them, a norm at the end.

    `norms`: per layer over the full width, each of `norm_vectors` vectors (2 with a bias, 0 without weights).
    `windows`: the attention kind by layer where the config lists none. `extra`: further parameters of one layer.
    """
    d = start(s, own_head_dim=own_head_dim)
    sparse = sparse_layers(s, d.layers) if experts else []
    dense = sorted(set(d.all_layers()) - set(sparse))
    if dense or s.raw(dense_width) is not None:
        d.intermediate = s.integer(dense_width)
    if latent:
        latent_attention(d, s)
    else:
        attention(d, s, qkv_bias=qkv_bias, out_bias=out_bias, out=out, qk_norm=qk_norm, sinks=sinks)
    if dense:
        feed_forward(d, s, block=mlp_block, kind=mlp, names=mlp_names, bias=mlp_bias, layers=dense)
    if experts:
        mixture(d, s, experts, sparse)
        d.intermediate = d.intermediate or s.integer(experts.width)
    d.other_parameters += (norms * d.layers + 1) * norm_vectors * d.hidden
    if extra:
        d.other_parameters += d.layers * extra(d, s)
    d.head_bias = head_bias if isinstance(head_bias, bool) else s.flag(head_bias)
    d.other_parameters += d.vocab if d.head_bias else 0
    if windows or s.raw("sliding_window") is not None:
        set_window(d, s, windows)
    return d


# --- rules that depend on more than one key ---------------------------------------------------------


def _qwen_windows(s: Settings, **settings: object) -> Layout:
    """Qwen 2 and 3 use the window only where `use_sliding_window` says so, from layer `max_window_layers` on."""
    if not s.flag("use_sliding_window"):
        s = Settings({**s.values, "sliding_window": None}, s.defaults, s.name)
    first = s.integer("max_window_layers", 0, least=0)
    return decoder(s, windows=lambda i: "sliding_attention" if i >= first else "full_attention", **settings)  # type: ignore[arg-type]


def _qwen2_moe(s: Settings) -> Layout:
    used = s.flag("use_sliding_window")
    first = s.integer("max_window_layers", 0, least=0)
    if not used:
        s = Settings({**s.values, "sliding_window": None}, s.defaults, s.name)
    shared = Experts(shared="shared_expert", shared_width="shared_expert_intermediate_size", shared_gate=True)
    windows = lambda i: "sliding_attention" if i % 2 == 0 and i < first else "full_attention"  # noqa: E731
    return decoder(s, qkv_bias="qkv_bias", out_bias=False, mlp_bias=False, experts=shared, windows=windows)


def _gemma3(s: Settings) -> Layout:
    pattern = s.integer("sliding_window_pattern", 6)
    d = decoder(s, qk_norm="head", mlp_bias=False, norms=4, windows=every(pattern))
    if s.flag("use_bidirectional_attention") and d.sliding_window:
        d.sliding_window = d.sliding_window // 2 + 1
    return d


def _cohere(s: Settings) -> Layout:
    def norms(d: Layout, s: Settings) -> int:
        return (d.heads + d.kv_heads) * d.head_dim if s.flag("use_qk_norm") else 0

    return decoder(s, mlp_bias=False, norms=1, extra=norms)


def _cohere2(s: Settings) -> Layout:
    windows = every(s.integer("sliding_window_pattern", 4))
    return decoder(s, mlp_bias=False, norms=1, windows=windows)


def _smollm3(s: Settings) -> Layout:
    """The layers without rotary positions are the ones with a window, where windows are used at all."""
    interval = s.integer("no_rope_layer_interval", 4)
    rotary = s.listing("no_rope_layers")
    if not s.flag("use_sliding_window"):
        s = Settings({**s.values, "sliding_window": None}, s.defaults, s.name)

    def windows(i: int) -> str:
        has_rope = rotary[i] if rotary and i < len(rotary) else (i + 1) % interval != 0
        return "full_attention" if has_rope else "sliding_attention"

    return decoder(s, windows=windows)


def _exaone4(s: Settings) -> Layout:
    pattern = s.optional("sliding_window_pattern", least=0) if isinstance(s.raw("sliding_window_pattern"), int) else 4
    return decoder(s, qkv_bias=False, out_bias=False, qk_norm="head", mlp_bias=False, windows=every(pattern or 0))


def _exaone_moe(s: Settings) -> Layout:
    pattern = s.integer("sliding_window_pattern", 4)
    experts = Experts(shared="shared_experts", shared_count="num_shared_experts")
    return decoder(s, qkv_bias=False, out_bias=False, qk_norm="head", mlp_bias=False, windows=every(pattern), experts=experts)


def _stablelm(s: Settings) -> Layout:
    def norms(d: Layout, s: Settings) -> int:
        return (d.heads + d.kv_heads) * d.head_dim if s.flag("qk_layernorm") else 0

    count = 1 if s.flag("use_parallel_residual") else 2
    return decoder(
        s,
        qkv_bias="use_qkv_bias",
        out_bias=False,
        own_head_dim=False,
        mlp_bias=False,
        norms=count,
        norm_vectors=2,
        extra=norms,
    )


def _phi(s: Settings) -> Layout:
    return decoder(
        s,
        qkv_bias=True,
        out_bias=True,
        out="dense",
        mlp="plain",
        mlp_names=("fc1", "fc2"),
        mlp_bias=True,
        norms=1,
        norm_vectors=2,
        head_bias=True,
        extra=lambda d, s: 4 * (d.hidden // d.heads) if s.flag("qk_layernorm") else 0,
    )


def _phi3(s: Settings) -> Layout:
    d = start(s)
    d.intermediate = s.integer("intermediate_size")
    queries = d.heads * d.head_dim
    d.linear("self_attn.qkv_proj", d.hidden, queries + 2 * d.kv_heads * d.head_dim, "attention")
    d.linear("self_attn.o_proj", queries, d.hidden, "attention")
    feed_forward(d, s, kind="fused", bias=False)
    d.other_parameters += (2 * d.layers + 1) * d.hidden
    set_window(d, s)
    return d


def _hyperclovax(s: Settings) -> Layout:
    return decoder(s, norms=4 if s.flag("use_post_norm", True) else 2)


def _hunyuan_moe(s: Settings) -> Layout:
    e = Experts(
        router="gate.wg", router_module=True, width="intermediate_size", chosen="moe_topk", shared="shared_mlp",
        shared_width="intermediate_size",
    )  # fmt: skip
    return decoder(s, qk_norm="head", mlp_bias=False, experts=e)


def _glm4_moe(s: Settings) -> Layout:
    e = Experts(shared="shared_experts", shared_count="n_shared_experts")
    norm: Literal["head", "none"] = "head" if s.flag("use_qk_norm") else "none"
    return decoder(s, out_bias=False, qk_norm=norm, mlp_bias=False, experts=e)


def _granite_moe(s: Settings, *, sinks: bool = False, windows: Callable[[int], str] | None = None) -> Layout:
    e = Experts(block="block_sparse_moe", router="router", width="intermediate_size")
    d = decoder(s, experts=e, sinks=sinks, windows=windows)
    shared = s.optional("shared_intermediate_size", least=0) or 0
    if shared:
        d.linear("shared_mlp.input_linear", d.hidden, 2 * shared, "mlp")
        d.linear("shared_mlp.output_linear", shared, d.hidden, "mlp")
    return d


def _first_dense(s: Settings) -> Settings:
    """The first layer is dense where the config lists no kinds of layers."""
    return s if s.raw("mlp_layer_types") is not None else Settings({**s.values, "first_k_dense_replace": 1}, s.defaults, s.name)


def _hy_v3(s: Settings) -> Layout:
    e = Experts(shared="shared_experts", shared_count="num_shared_experts", shared_bias="mlp_bias")
    return decoder(_first_dense(s), qk_norm="head", experts=e)


def _glm4_moe_lite(s: Settings) -> Layout:
    e = Experts(shared="shared_experts", shared_count="n_shared_experts")
    return decoder(_first_dense(s), latent=True, mlp_bias=False, experts=e)


def _llama4(s: Settings) -> Layout:
    """Layers interleave experts and a wider dense part; attention is in chunks except in every fourth layer."""
    e = Experts(
        block="feed_forward", router="router", router_module=True, width="intermediate_size", shared="shared_expert",
        shared_width="intermediate_size",
    )  # fmt: skip
    d = decoder(s, mlp_block="feed_forward", mlp_bias=False, dense_width="intermediate_size_mlp", experts=e)
    chunk = s.optional("attention_chunk_size")
    kinds = s.listing("layer_types", d.layers)
    interval = s.integer("no_rope_layer_interval", 4)
    if chunk:
        chunked = [k == "chunked_attention" for k in kinds] if kinds else [(i + 1) % interval != 0 for i in d.all_layers()]
        d.sliding_window, d.sliding_layers = chunk, sum(chunked)
    return d


def _afmoe(s: Settings) -> Layout:
    e = Experts(
        router="router.gate", router_module=True, shared="shared_experts", shared_count="num_shared_experts", extra_per_expert=1
    )
    windows = every(s.integer("global_attn_every_n_layers", 4))
    d = decoder(s, qk_norm="head", mlp_bias=False, norms=4, windows=windows, experts=e)
    d.linear("self_attn.gate_proj", d.hidden, d.heads * d.head_dim, "attention")
    return d


_NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}
_USE_BIAS = {"qkv_bias": "use_bias", "out_bias": "use_bias", "mlp_bias": "use_bias"}
_SHARED = Experts(shared="shared_experts", shared_count="n_shared_experts")
_WIDE_EXPERTS = Experts(width="intermediate_size")

DECODERS: dict[str, Family] = {
    name: partial(decoder, **row)  # type: ignore[arg-type]
    for name, row in {
        # dense
        "llama": {},
        "granite": {},
        "internlm3": {},
        "iquestcoder": {},
        "mistral": _NO_BIAS,
        "ministral": _NO_BIAS,
        "ministral3": _NO_BIAS,
        "cwm": {"qkv_bias": False, "out_bias": False, "windows": first_of(4)},
        "helium": {"out_bias": False},
        "seed_oss": {"out_bias": "attention_out_bias"},
        "granite_swa": {"sinks": True, "windows": first_of(4)},
        "gemma": {"mlp_bias": False},
        "gemma2": {"mlp_bias": False, "norms": 4, "windows": every(2)},
        "vaultgemma": {"mlp_bias": False, "windows": every(2)},
        "olmo": {"mlp_bias": False, "norm_vectors": 0},
        "olmo2": {"qk_norm": "width", "mlp_bias": False},
        "olmo3": {"qk_norm": "width", "mlp_bias": False, "windows": every(4)},
        "ernie4_5": _USE_BIAS,
        "starcoder2": {**_USE_BIAS, "mlp": "plain", "mlp_names": ("c_fc", "c_proj"), "norm_vectors": 2},
        "arcee": {"mlp": "plain"},
        # xIELU, the only activation of published models, has two learned scalars
        "apertus": {"mlp": "plain", "mlp_bias": False, "qk_norm": "head", "extra": lambda d, s: 2},
        "bitnet": {"mlp_bias": False, "extra": lambda d, s: d.hidden + d.intermediate},
        "glm": {"out_bias": False, "mlp": "fused", "mlp_bias": False},
        "glm4": {"out_bias": False, "mlp": "fused", "mlp_bias": False, "norms": 4},
        "nemotron": {"mlp": "plain", "norm_vectors": 2},
        "nanochat": {"mlp": "plain", "mlp_names": ("fc1", "fc2"), "mlp_bias": False, "norm_vectors": 0},
        "hunyuan_v1_dense": {"qk_norm": "head", "mlp_bias": False},
        "jais2": {"mlp": "plain", "norm_vectors": 2},
        "diffllama": {"mlp_bias": False, "extra": lambda d, s: 4 * d.head_dim},
        # mixtures of experts
        "mixtral": {**_NO_BIAS, "experts": _WIDE_EXPERTS},
        "qwen3_moe": {"qk_norm": "head", "mlp_bias": False, "experts": Experts()},
        "olmoe": {"qk_norm": "width", "experts": _WIDE_EXPERTS},
        "flex_olmo": {"qk_norm": "width", "experts": _WIDE_EXPERTS},
        "minimax_m2": {**_NO_BIAS, "qk_norm": "width", "experts": _WIDE_EXPERTS},
        "phimoe": {
            "experts": Experts(router="router", router_module=True, width="intermediate_size"),
            "norm_vectors": 2,
            "head_bias": "lm_head_bias",
        },
        "gpt_oss": {
            "experts": Experts(router="router", router_bias=True, width="intermediate_size", biased=True),
            "sinks": True,
            "windows": every(2),
        },
        "ernie4_5_moe": {
            **_USE_BIAS,
            "experts": Experts(
                shared="shared_experts", shared_count="moe_num_shared_experts", shared_bias="use_bias", extra_per_expert=1
            ),
            "head_bias": "use_bias",
        },
        "dots1": {"qk_norm": "head", "mlp_bias": False, "experts": _SHARED},
        "solar_open": {"out_bias": False, "experts": _SHARED},
        "mellum": {"qk_norm": "head", "mlp_bias": False, "experts": Experts(), "windows": lambda i: "full_attention"},
        "aria_text": {
            "experts": Experts(
                router="router",
                width="intermediate_size",
                chosen="moe_topk",
                shared="shared_experts",
                shared_count="moe_num_shared_experts",
                shared_bias="mlp_bias",
            ),
        },
        # latent attention
        "deepseek_v2": {"latent": True, "experts": replace(_SHARED, shared_bias="mlp_bias")},
        "deepseek_v3": {"latent": True, "mlp_bias": False, "experts": _SHARED},
        "youtu": {"latent": True, "mlp_bias": False},
        "minicpm3": {"latent": True},
    }.items()
}

FAMILIES: dict[str, Family] = {
    **DECODERS,
    "qwen2": partial(_qwen_windows, qkv_bias=True, out_bias=False, mlp_bias=False),
    "qwen3": partial(_qwen_windows, qk_norm="head", mlp_bias=False),
    "qwen2_moe": _qwen2_moe,
    "gemma3_text": _gemma3,
    "cohere": _cohere,
    "cohere2": _cohere2,
    "smollm3": _smollm3,
    "exaone4": _exaone4,
    "exaone_moe": _exaone_moe,
    "stablelm": _stablelm,
    "phi": _phi,
    "phi3": _phi3,
    "hyperclovax": _hyperclovax,
    "hunyuan_v1_moe": _hunyuan_moe,
    "glm4_moe": _glm4_moe,
    "granitemoe": _granite_moe,
    "granitemoeshared": _granite_moe,
    "granitemoe_swa": partial(_granite_moe, sinks=True, windows=first_of(4)),
    "hy_v3": _hy_v3,
    "glm4_moe_lite": _glm4_moe_lite,
    "llama4_text": _llama4,
    "afmoe": _afmoe,
    **CLASSICS,
    **STATES,
}
