"""A causal language model as numbers: its linear layers, the rest, and what it keeps in memory while it generates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Part = Literal["attention", "mlp", "expert", "router", "state", "other"]
Certainty = Literal["exact", "read", "typical"]


@dataclass(frozen=True, slots=True)
class Linear:
    """One kind of linear layer: its leaf name as PEFT matches it, widths, bias, and how often it occurs in the model.

    `path` is its module path with `{}` for the layer, `layer_indices` the layers it occurs in (empty: it stands outside them).
    `is_linear_module`: a torch module an adapter can go on; False for fused expert tensors and routers, which are bare parameters.
    """

    name: str
    inputs: int
    outputs: int
    count: int
    bias: bool = False
    part: Part = "attention"
    is_linear_module: bool = True
    path: str = ""
    layer_indices: tuple[int, ...] = ()

    @property
    def num_parameters(self) -> int:
        return self.count * (self.inputs * self.outputs + (self.outputs if self.bias else 0))

    @property
    def paths(self) -> tuple[str, ...]:
        """The full module paths, one per layer."""
        return tuple(self.path.format(index) for index in self.layer_indices) or (self.path or self.name,)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Everything memory and time are computed from. Counts are of the whole model.

    `linears`: every linear layer but the output head (routed experts included, fused ones as they are stored).
    `other_parameters`: norms, position tables, convolution kernels, biases of the head and the like.
    `expert_share`: of the expert parameters, the share that one token passes through (1.0 without experts).
    `attention_layers`: layers that keep keys and values (None: all); `sliding_layers` of them keep the last `sliding_window` tokens.
    `key_value_width`: values kept per token and attention layer (None: 2 x kv_heads x head_dim).
    `state_size`: width of a state-space model's state; `state_values`: values kept per sequence whatever its length.
    `embedding_width`: of the token table where it is not `hidden`. `head_bias`: the output head adds one.
    `embedding_name`, `head_name`: what the two modules are called, the last part of their paths.
    `stored_dtype`: the type of the weights in the file ("float32", …) where the config says it.
    `certainty`: "exact" (from a config of a known layout), "read" (from a config, by its usual keys), "typical" (from a size).
    `source` says in words where it came from.
    """

    name: str
    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    gated_mlp: bool
    linears: tuple[Linear, ...]
    other_parameters: int
    max_position: int | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    expert_share: float = 1.0
    sliding_window: int | None = None
    attention_layers: int | None = None
    state_size: int | None = None
    certainty: Certainty = "exact"
    source: str = ""
    sliding_layers: int = 0
    key_value_width: int | None = None
    state_values: int = 0
    embedding_width: int | None = None
    head_bias: bool = False
    embedding_name: str = "embed_tokens"
    head_name: str = "lm_head"
    stored_dtype: str | None = None

    @property
    def embedding_parameters(self) -> int:
        """The token embedding: vocabulary x width."""
        return self.vocab * (self.embedding_width or self.hidden)

    @property
    def head_parameters(self) -> int:
        """The output head's matrix where it is not the embedding again."""
        return 0 if self.tied else self.embedding_parameters

    @property
    def num_parameters(self) -> int:
        """All parameters, tied ones once."""
        return self.embedding_parameters + self.head_parameters + self.linear_parameters + self.other_parameters

    @property
    def linear_parameters(self) -> int:
        return sum(linear.num_parameters for linear in self.linears)

    @property
    def active_parameters(self) -> int:
        """Parameters one token passes through."""
        experts = sum(linear.num_parameters for linear in self.linears if linear.part == "expert")
        return self.num_parameters - round(experts * (1.0 - self.expert_share))


def kv_cache_bytes(shape: ModelShape, num_tokens: int, bytes_per_value: float = 2.0) -> int:
    """Bytes that one sequence of `num_tokens` holds in transformers' dynamic cache.

    Layers with a window keep the last `window - 1` tokens, state-space and linear-attention layers a state of fixed size.
    Multi-head latent attention keeps its latent, as transformers does since version 5. The tests compare real caches.
    Raises ValueError for a negative length or size.
    """
    if num_tokens < 0 or not 0 <= bytes_per_value < float("inf"):
        raise ValueError("num_tokens and bytes_per_value must not be negative")
    layers = shape.layers if shape.attention_layers is None else shape.attention_layers
    width = 2 * shape.kv_heads * shape.head_dim if shape.key_value_width is None else shape.key_value_width
    windowed = shape.sliding_layers if shape.sliding_window else 0
    in_window = min(num_tokens, max(1, (shape.sliding_window or 1) - 1))
    kept_tokens = (layers - windowed) * num_tokens + windowed * in_window
    return round((kept_tokens * width + (shape.state_values if num_tokens else 0)) * bytes_per_value)


def kv_bytes_per_token(shape: ModelShape, bytes_per_value: float = 2.0, *, num_tokens: int | None = None) -> float:
    """Bytes the cache grows by with each token; with `num_tokens`, the mean over a sequence of that length.

    Without a length, layers with a window count in full, as they do until the window is filled; a fixed state counts nothing.
    """
    if num_tokens is not None:
        if num_tokens < 1:
            raise ValueError("num_tokens must be at least 1")
        return kv_cache_bytes(shape, num_tokens, bytes_per_value) / num_tokens
    layers = shape.layers if shape.attention_layers is None else shape.attention_layers
    width = 2 * shape.kv_heads * shape.head_dim if shape.key_value_width is None else shape.key_value_width
    return layers * width * bytes_per_value
