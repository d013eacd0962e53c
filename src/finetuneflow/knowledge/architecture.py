"""The shape of a causal language model as numbers: from a config.json, a known name, or parameters alone ("7B")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Linear:
    """One kind of linear layer: its leaf name as PEFT matches it, widths, bias, and how often it occurs in the model."""

    name: str
    inputs: int
    outputs: int
    count: int
    bias: bool = False
    part: Literal["attention", "mlp", "expert", "router", "state", "other"] = "attention"

    @property
    def num_parameters(self) -> int:
        return self.count * (self.inputs * self.outputs + (self.outputs if self.bias else 0))


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Everything memory and time are computed from. Counts are of the whole model.

    `linears`: every linear layer but the output head (routed experts included, fused ones as they are stored).
    `other_parameters`: norms, position tables, convolution kernels and the like.
    `expert_share`: of the expert parameters, the share that one token passes through (1.0 without experts).
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
    certainty: Literal["exact", "read", "typical"] = "exact"
    source: str = ""

    @property
    def embedding_parameters(self) -> int:
        """The token embedding: vocabulary x width."""
        return self.vocab * self.hidden

    @property
    def head_parameters(self) -> int:
        """The output head where it has weights of its own."""
        return 0 if self.tied else self.vocab * self.hidden

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


def shape_from_config(config: dict[str, Any], *, name: str = "model") -> ModelShape:
    """The shape a config.json describes. Raises `ModelError` (MODEL_UNSUPPORTED_ARCH) where it has no such numbers."""
    raise NotImplementedError


def shape_from_size(text: str) -> ModelShape:
    """A typical shape of that many parameters: "7B", "124M", "1.5b". Raises `ConfigError` (CONFIG_INVALID_VALUE)."""
    raise NotImplementedError


def known_shape(name: str) -> ModelShape | None:
    """The shape of a well-known hub model by its id, else None; `facts.py` has the table."""
    raise NotImplementedError
