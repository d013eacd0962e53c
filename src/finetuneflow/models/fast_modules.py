"""Modules of a loaded model that compute the same with less: which are recognised, and how they are replaced.

A module keeps its class, parameters and names, so that PEFT's format, checkpoints and everything that walks the model stay as they
are: only its `forward` is replaced, on the instance. What a replacement cannot do (several adapters at once, DoRA, a key-value
cache) goes through the module's own forward, decided at each call. `models.fast` proves the whole on the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from finetuneflow.kernels.elementwise import ACTIVATIONS, rms_norm, rotate
from finetuneflow.kernels.projections import Projection, gated_block, project

KINDS = ("norm", "feed-forward", "attention", "linear")
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
FEED_FORWARD_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# All that the forward pass of Llama's attention, and of its like, names. One that names more (a dropout of its own, clipped or scaled
# queries, layers without positions) computes more, and a probe of a few short texts in evaluation mode need not show it.
ATTENTION_NAMES = (
    ATTENTION_PARTS
    | {"q_norm", "k_norm", "head_dim", "layer_idx", "config", "training", "attention_dropout", "scaling", "sliding_window"}
    | {"shape", "view", "transpose", "reshape", "contiguous", "getattr", "apply_rotary_pos_emb", "update"}
    | {"ALL_ATTENTION_FUNCTIONS", "get_interface", "_attn_implementation", "eager_attention_forward", "attn_logit_softcapping"}
)


class Replaced(NamedTuple):
    """A module and the forward it had; `kind` is one of `KINDS`."""

    kind: str
    module: nn.Module
    own_forward: Callable[..., Any]

    def restore(self) -> None:
        self.module.forward = self.own_forward  # type: ignore[method-assign]


def replace_modules(base: nn.Module, kinds: Collection[str] = KINDS) -> list[Replaced]:
    """Replace what is recognised in `base`, of the kinds named; `restore` of each undoes it."""
    replaced = []
    for module in base.modules():
        for kind in kinds:
            if (forward := RECOGNISE[kind](module)) is not None:
                replaced.append(Replaced(kind, module, module.forward))
                module.forward = forward  # type: ignore[method-assign]
                break
    return replaced


def _forward_of(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)


def _names_only(module: nn.Module, known: Collection[str]) -> bool:
    """Whether the module's own forward pass names nothing but what is known."""
    code = getattr(_forward_of(module), "__code__", None)
    return code is not None and set(code.co_names) <= set(known)


# --- norms ------------------------------------------------------------------------------------------------


def _norm(module: nn.Module) -> Callable[..., Any] | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return None
    if not isinstance(eps, float):
        return None
    sample = torch.linspace(-2, 3, 3 * len(weight), device=weight.device).view(3, -1)
    with torch.no_grad():
        wanted = module(sample).float()
        for offset in (0.0, 1.0):
            if torch.allclose(rms_norm(sample, weight, eps, offset).float(), wanted, rtol=1e-5, atol=1e-5):
                return partial(_norm_forward, module, eps, offset)
    return None


def _norm_forward(module: Any, eps: float, offset: float, hidden_states: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden_states, module.weight, eps, offset)


# --- linear layers and their adapters -----------------------------------------------------------------------


def projection_of(layer: Any) -> Projection | None:
    """A layer as it computes right now; None where it does something that `kernels.projections` does not."""
    base = getattr(layer, "base_layer", layer)
    frozen = _frozen_part(base)
    if frozen is None or base is layer or layer.disable_adapters or layer.merged:
        return frozen if base is layer or not getattr(layer, "merged", False) else None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not active:
        return frozen
    name = active[0]
    if len(active) > 1 or name in layer.lora_variant or layer.lora_B[name].bias is not None:
        return None
    dropout = layer.lora_dropout[name]
    share = dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0
    return Projection(
        weight=frozen.weight,
        bias=frozen.bias,
        a=layer.lora_A[name].weight,
        b=layer.lora_B[name].weight,
        scale=float(layer.scaling[name]),
        dropout=share,
        unpack=frozen.unpack,
    )


def _frozen_part(base: Any) -> Projection | None:
    if type(base) is nn.Linear:
        return Projection(base.weight, base.bias)
    state = getattr(base.weight, "quant_state", None) if type(base).__name__ == "Linear4bit" else None
    return Projection(base.weight, base.bias, unpack=partial(_unpacked, base.weight, state)) if state is not None else None


def _unpacked(weight: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state).to(dtype)


def _is_projection(layer: Any) -> bool:
    base = getattr(layer, "base_layer", layer)
    known = type(base) is nn.Linear or type(base).__name__ == "Linear4bit"
    return known and (base is layer or hasattr(layer, "lora_A"))


def _linear(module: nn.Module) -> Callable[..., Any] | None:
    """A layer with an adapter. (One without gains nothing.)"""
    return partial(_linear_forward, module, module.forward) if hasattr(module, "lora_A") and _is_projection(module) else None


def _linear_forward(layer: Any, own_forward: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    projection = None if args or kwargs else projection_of(layer)
    if projection is None or projection.a is None:
        return own_forward(x, *args, **kwargs)  # type: ignore[no-any-return]
    return project(x, (projection,))[0]


# --- feed-forward blocks ------------------------------------------------------------------------------------


def _feed_forward(module: nn.Module) -> Callable[..., Any] | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    activation = getattr(module, "act_fn", None)
    if activation is None or not all(isinstance(part, nn.Module) and _is_projection(part) for part in parts):
        return None
    if {name for name, _ in module.named_children()} - FEED_FORWARD_PARTS or not _names_only(module, FEED_FORWARD_PARTS):
        return None
    sample = torch.linspace(-6, 6, 101)
    kinds = [name for name, known in ACTIVATIONS.items() if torch.allclose(known(sample), activation(sample), atol=1e-6)]
    if not kinds:
        return None
    forward = partial(_feed_forward_forward, module, module.forward, kinds[0])
    first: Any = getattr(parts[0], "base_layer", parts[0])
    weight, width = first.weight, first.in_features
    kind = torch.float32 if not weight.is_floating_point() else weight.dtype
    sample = torch.linspace(-1, 1, 2 * width, device=weight.device, dtype=kind).view(1, 2, width)
    with torch.no_grad():
        found, wanted = forward(sample).float(), module(sample).float()
    close = 1e-4 if kind == torch.float32 and weight.is_floating_point() else 5e-2
    return forward if float((found - wanted).norm()) <= close * float(wanted.norm()) else None


def _feed_forward_forward(module: Any, own_forward: Callable[..., Any], kind: str, x: torch.Tensor) -> torch.Tensor:
    parts = [projection_of(layer) for layer in (module.gate_proj, module.up_proj, module.down_proj)]
    gate, up, down = parts
    if gate is None or up is None or down is None:
        return own_forward(x)  # type: ignore[no-any-return]
    return gated_block(x, gate, up, down, kind)


# --- attention ----------------------------------------------------------------------------------------------


def _attention(module: nn.Module) -> Callable[..., Any] | None:
    """Llama's layout: four projections, rotary positions over whole heads, transformers' attention interface; with norms of queries
    and keys where there are some. Anything else in the module means that it computes something else."""
    children = {name for name, _ in module.named_children()}
    if not children >= ATTENTION_PARTS or children - ATTENTION_PARTS - {"q_norm", "k_norm"}:
        return None
    if any(True for _ in module.parameters(recurse=False)) or not all(
        hasattr(module, name) for name in ("head_dim", "scaling", "config", "num_key_value_groups")
    ):
        return None
    if getattr(module, "attn_logit_softcapping", None) is not None:
        return None
    if not _names_only(module, ATTENTION_NAMES) or not _turns_halves(module):
        return None
    if not all(_is_projection(getattr(module, name)) for name in ATTENTION_PARTS):
        return None
    return partial(_attention_forward, module, module.forward)


def _turns_halves(module: nn.Module) -> bool:
    """Whether its rotary positions are those of `elementwise.rotate`."""
    theirs = _forward_of(module).__globals__.get("apply_rotary_pos_emb")
    x, cos, sin = (torch.linspace(-1, 1, size).view(shape) for size, shape in ((60, (5, 2, 6)), (30, (5, 6)), (30, (5, 6))))
    cos, sin = cos.cos(), sin.sin()
    heads = x.transpose(0, 1)[None]
    try:
        found = theirs(heads, heads, cos[None], sin[None])[0][0].transpose(0, 1)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    return found.shape == x.shape and torch.allclose(found, rotate(x, cos, sin), atol=1e-6)


def _attention_forward(
    module: Any,
    own_forward: Callable[..., Any],
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sides = [projection_of(layer) for layer in (module.q_proj, module.k_proj, module.v_proj)]
    query_side, key_side, value_side = sides
    implementation = module.config._attn_implementation
    if (
        past_key_values is not None
        or position_embeddings is None
        or implementation not in ALL_ATTENTION_FUNCTIONS
        or position_embeddings[0].shape[-1] != module.head_dim
        or query_side is None
        or key_side is None
        or value_side is None
    ):
        return own_forward(
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
    batch, length, _ = hidden_states.shape
    query, key, value = project(hidden_states, (query_side, key_side, value_side))
    if hasattr(module, "q_norm"):
        query, key = _normed(module.q_norm, query, module.head_dim), _normed(module.k_norm, key, module.head_dim)
    cos, sin = (table.expand(batch, length, -1).reshape(batch * length, -1) for table in position_embeddings)
    heads = [
        rotate(side.reshape(batch * length, -1, module.head_dim), cos, sin).view(batch, length, -1, module.head_dim)
        for side in (query, key)
    ]
    heads.append(value.view(batch, length, -1, module.head_dim))
    query, key, value = (side.transpose(1, 2) for side in heads)
    if hasattr(module, "sliding_window"):
        kwargs["sliding_window"] = module.sliding_window
    out, _ = ALL_ATTENTION_FUNCTIONS[implementation](
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=module.attention_dropout if module.training else 0.0,
        scaling=module.scaling,
        **kwargs,
    )
    return module.o_proj(out.reshape(batch, length, -1)), None


def _normed(norm: Any, side: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Queries or keys through their norm: over each head, or over all of them, as wide as the norm's weight is."""
    if len(norm.weight) == side.shape[-1]:
        return norm(side)  # type: ignore[no-any-return]
    return norm(side.view(*side.shape[:-1], -1, head_dim)).view(side.shape)  # type: ignore[no-any-return]


RECOGNISE: dict[str, Callable[[nn.Module], Callable[..., Any] | None]] = {
    "norm": _norm,
    "feed-forward": _feed_forward,
    "attention": _attention,
    "linear": _linear,
}
