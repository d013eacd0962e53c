"""Reading a config of an unlisted family by the keys that nearly all families share."""

from __future__ import annotations

import re

from finetuneflow.knowledge.shapes.families import decoder
from finetuneflow.knowledge.shapes.layouts import Experts, Layout
from finetuneflow.knowledge.shapes.settings import Settings, unsupported

# Activations of gated feed-forward parts; the older ones (gelu, relu, …) come without a gate.
_GATED = ("silu", "swish", "gelu_pytorch_tanh", "geglu", "swiglu")
# Keys of layers that keep a state: each family builds them in its own way, so that no usual key tells their size.
_STATEFUL = re.compile(r"^((mamba|n_mamba|ssm|lru|linear_num|mlstm)_|hybrid_override|qk_dim_factor|attention_hidden_size)")
# Families of transformers whose layers look usual by their keys and are not: the count would be off by a tenth and more.
_UNLIKE = (
    "big_bird", "blt", "cpmant", "doge", "electra", "git", "hrm_text", "jetmoe", "longcat_flash", "modernbert-decoder", "moshi",
    "reformer", "rembert", "roc_bert", "xlm", "xlnet", "xmod",
)  # fmt: skip


def read(s: Settings) -> Layout:
    """A Llama-like decoder with whatever the config names: grouped heads, latent attention, experts, shared experts.

    Within 2 % of the decoders of transformers it is tested on. Raises `ModelError` naming every missing key among width,
    depth, heads and vocabulary, and for families known not to be readable this way.
    """
    if s.word("model_type") in _UNLIKE or any(_STATEFUL.match(key) for key in s.values):
        raise unsupported(
            f"The layers of {s.word('model_type') or 'this model'!r} are of their own kind, and how large they are is not known here.",
            name=s.name,
        )
    s.require("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    s = _with_width(s)
    experts = _experts(s) if (s.optional("num_experts", least=0) or 0) > 1 else None
    activation = s.word("hidden_act") or s.word("hidden_activation") or s.word("activation_function") or "silu"
    gated = activation in _GATED or experts is not None
    d = decoder(s, mlp="gated" if gated else "plain", latent=s.raw("kv_lora_rank") is not None, experts=experts)
    _per_layer_embeddings(d, s)
    return d


def _with_width(s: Settings) -> Settings:
    """A feed-forward width where the config has none (four times the model's) or one for each layer (their mean)."""
    width = s.raw("intermediate_size")
    if isinstance(width, list) and width and all(isinstance(w, int) and not isinstance(w, bool) and w > 0 for w in width):
        return Settings({**s.values, "intermediate_size": round(sum(width) / len(width))}, s.defaults, s.name)
    if width is None and s.raw("moe_intermediate_size") is None:
        return Settings({**s.values, "intermediate_size": 4 * s.integer("hidden_size")}, s.defaults, s.name)
    return s


def _per_layer_embeddings(d: Layout, s: Settings) -> None:
    """Gemma 3n and 4 look each token up once more for every layer."""
    width = s.optional("hidden_size_per_layer_input", least=0)
    if width:
        rows = s.integer("vocab_size_per_layer_input", d.vocab)
        d.other_parameters += d.layers * width * (rows + 3 * d.hidden)


def _experts(s: Settings) -> Experts:
    width = "moe_intermediate_size" if s.raw("moe_intermediate_size") is not None else "intermediate_size"
    for key in ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"):
        if s.raw(key) is not None:
            return Experts(width=width, shared="shared_experts", shared_count=key)
    if s.raw("shared_expert_intermediate_size") is not None:
        return Experts(width=width, shared="shared_expert", shared_width="shared_expert_intermediate_size")
    return Experts(width=width)
