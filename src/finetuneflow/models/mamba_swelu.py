"""MambaSWELU, an architecture by Paul Obara, as a transformers model: written from its description, not from its code.

    ids ─▶ token + learned position embedding ─▶ n × [x + SWELU(mixer(LayerNorm(x)))] ─▶ LayerNorm
        ─▶ three dense layers, each with SWELU ─▶ output head, tied to the token embedding

The mixer has one of two layouts. "selective" is Mamba's (Gu & Dao 2023); "simplified" is what the original falls back to
where `mamba_ssm` is not installed: a gated causal convolution without a state, which carries the projections `x_proj` and
`dt_proj` of the other along without using them. They stay here, so that the weights are the same, and get no gradient.

Parameters are named as in the original, the head as `lm_head.weight` and all others with `model.` in front
(`mamba_swelu_checkpoint` converts). `register` makes the classes known to transformers' Auto classes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple

from finetuneflow.kernels.scan import causal_conv1d, selective_scan
from finetuneflow.knowledge.shapes.settings import MOST_LAYERS

MODEL_TYPE = "mamba_swelu"
LAYOUTS = ("simplified", "selective")
# What a configuration may say: whole numbers of 1 or more, and numbers between two bounds.
SIZES = ("vocab_size", "d_model", "n_layers", "d_state", "d_conv", "expand", "max_seq_len", "dense_hidden_dim")
RANGES = {"dropout": (0.0, 1.0), "swelu_k": (-1e3, 1e3), "initializer_range": (0.0, 1e3)}
# SWELU's guards: the exponent is |k| + EXPONENT_GUARD, the size |z| + SIZE_GUARD.
EXPONENT_GUARD, SIZE_GUARD = 1e-6, 1e-8
# exp(-2^14) is 0 in fp32 and fp64: a larger power would only bring infinities in.
LARGEST_LOG2 = 14.0
LOG2_E = math.log2(math.e)
# Time steps at the start, from Mamba's section 3.6: log-uniform between these.
FIRST_STEPS = (1e-3, 1e-1)
# Where the fused kernels of `mamba_ssm` run.
FUSED_DEVICES = frozenset({"cuda"})


class MambaSWELUConfig(PreTrainedConfig):
    """Sizes under the names of the original; `hidden_size`, `num_hidden_layers` and `max_position_embeddings` work as well.

    `learn_lambda` False: SWELU has no scale λ, as in early checkpoints. `initializer_range` is the spread of fresh weights.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["cache_params"]  # noqa: RUF012 - a dataclass field if annotated
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
    }

    vocab_size: int = 50_257
    d_model: int = 1024
    n_layers: int = 6
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    max_seq_len: int = 2048
    dense_hidden_dim: int = 2048
    swelu_k: float = 1.0
    dropout: float = 0.1
    tie_word_embeddings: bool = True
    layout: str = "simplified"
    learn_lambda: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}; it must be one of {', '.join(LAYOUTS)}")
        for name in SIZES:
            if type(size := getattr(self, name)) is not int or size < 1:
                raise ValueError(f"{name} is {size!r:.40}; it must be a whole number of 1 or more")
        for name, (low, high) in RANGES.items():
            if type(value := getattr(self, name)) not in (int, float) or not low <= value <= high:
                raise ValueError(f"{name} is {value!r:.40}; it must be a number from {low:g} to {high:g}")
        if self.n_layers > MOST_LAYERS:
            raise ValueError(f"n_layers is {self.n_layers:,}; it must be {MOST_LAYERS:,} or less")

    @property
    def inner_size(self) -> int:
        """Channels of the mixer."""
        return self.expand * self.d_model

    @property
    def dt_rank(self) -> int:
        """Width of the bottleneck that the time steps come out of."""
        return math.ceil(self.d_model / 16)


# --- the activation -------------------------------------------------------------------------------


class _SweluFunction(torch.autograd.Function):
    """λ·sign(z)·(1 − exp(−|z|^k)) in fp32 or better; keeps z alone for the backward pass.

    At z = 0 the slope is that of the points beside it (automatic differentiation of |z| would give 0 there).
    Powers are taken to base 2, which a processor does three times as fast as to base e.
    """

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, k: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(z, k, scale)
        x = z.to(torch.promote_types(z.dtype, torch.float32))
        power, _ = _power(x, k)
        size = _fade(power).neg_().add_(1).mul_(x.sign())
        return (size if scale is None else size.mul_(scale.to(x.dtype))).to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, k, scale = ctx.saved_tensors
        x = z.to(torch.promote_types(z.dtype, torch.float32))
        exponent, factor = k.to(x.dtype).abs() + EXPONENT_GUARD, 1.0 if scale is None else scale.to(x.dtype)
        power, log_size = _power(x, k)
        fade = _fade(power)
        grad = grad.to(x.dtype)
        signed = grad * x.sign()
        grad_scale = None if scale is None else (signed.sum() - _dot(signed, fade)).to(scale.dtype)
        slope = fade.mul_(power)  # of 1 − exp(−p) with respect to log p
        grad_k = (_dot(signed.mul_(slope), log_size) * factor * k.sign() / LOG2_E).to(k.dtype)
        grad_z = slope.mul_(grad).mul_(exponent * factor).div_(x.abs().add_(SIZE_GUARD))
        return grad_z.to(z.dtype), grad_k, grad_scale


def _power(x: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(|z|^k, bounded above; log2 |z|), with both guards."""
    log_size = x.abs().add_(SIZE_GUARD).log2_()
    return (log_size * (k.to(x.dtype).abs() + EXPONENT_GUARD)).clamp_(max=LARGEST_LOG2).exp2_(), log_size


def _fade(power: torch.Tensor) -> torch.Tensor:
    return (power * -LOG2_E).exp2_()


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


class SWELU(nn.Module):
    """The activation with its learned exponent k and, unless the weights have none, its learned scale λ (`lam`)."""

    def __init__(self, config: MambaSWELUConfig) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(config.swelu_k))
        self.lam = nn.Parameter(torch.tensor(1.0)) if config.learn_lambda else None

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = _SweluFunction.apply(z, self.k, self.lam)  # type: ignore[no-untyped-call]
        return result


# --- what generation carries from token to token -----------------------------------------------------


@dataclass
class LayerState:
    """One mixer's memory: the last inputs of the convolution (batch, d_conv − 1, inner), and the selective state
    (batch, inner, d_state), which the simplified layout lacks."""

    conv: torch.Tensor | None = None
    ssm: torch.Tensor | None = None


@dataclass
class MambaSWELUCache:
    """All layers' memories, how many real tokens each row has seen, and how many columns there were, padding included."""

    layers: list[LayerState]
    seen: torch.Tensor | None = None
    columns: int = 0
    is_compileable: bool = field(default=False, init=False)

    @classmethod
    def empty(cls, num_layers: int) -> MambaSWELUCache:
        return cls([LayerState() for _ in range(num_layers)])

    def get_seq_length(self) -> int:
        return self.columns

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take over rows, as beam search asks for."""
        pick = lambda value: None if value is None else value.index_select(0, beam_idx.to(value.device))  # noqa: E731
        self.layers = [LayerState(pick(layer.conv), pick(layer.ssm)) for layer in self.layers]
        self.seen = pick(self.seen)


# --- mixers -----------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """What both layouts share: projection in, gate, causal convolution, projection out.

    `mask` (batch, length) is 1 at real tokens, 0 at padding, which stands behind them: it is kept out of the memory.
    """

    def __init__(self, config: MambaSWELUConfig) -> None:
        super().__init__()
        inner = config.inner_size
        self.in_proj = nn.Linear(config.d_model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, config.d_conv, groups=inner, padding=config.d_conv - 1)
        self.out_proj = nn.Linear(inner, config.d_model, bias=False)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None, state: LayerState | None) -> torch.Tensor:
        x, gate = self.in_proj(hidden).chunk(2, dim=-1)
        history = None if state is None else state.conv
        convolved = causal_conv1d(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, history=history)
        if state is not None:
            state.conv = last_inputs(x, history, mask, self.conv1d.kernel_size[0] - 1)
        out: torch.Tensor = self.out_proj(self.mix(convolved, gate, mask, state))
        return out

    def mix(self, x: torch.Tensor, gate: torch.Tensor, mask: torch.Tensor | None, state: LayerState | None) -> torch.Tensor:
        raise NotImplementedError


class SimplifiedMixer(Mixer):
    """SWELU and a sigmoid gate behind the convolution; `x_proj` and `dt_proj` are carried along, unused."""

    def __init__(self, config: MambaSWELUConfig) -> None:
        super().__init__(config)
        self.x_proj = nn.Linear(config.inner_size, config.d_state, bias=False)
        self.dt_proj = nn.Linear(config.inner_size, config.inner_size)
        self.ssm_activation = SWELU(config)

    def mix(self, x: torch.Tensor, gate: torch.Tensor, mask: torch.Tensor | None, state: LayerState | None) -> torch.Tensor:
        activated: torch.Tensor = self.ssm_activation(x)
        return activated * torch.sigmoid(gate)


class SelectiveMixer(Mixer):
    """Mamba's selective state space: time steps, B and C depend on the token."""

    def __init__(self, config: MambaSWELUConfig) -> None:
        super().__init__(config)
        self.widths = [config.dt_rank, config.d_state, config.d_state]
        self.x_proj = nn.Linear(config.inner_size, sum(self.widths), bias=False)
        self.dt_proj = nn.Linear(config.dt_rank, config.inner_size)
        self.A_log = nn.Parameter(torch.empty(config.inner_size, config.d_state))
        self.D = nn.Parameter(torch.empty(config.inner_size))

    def mix(self, x: torch.Tensor, gate: torch.Tensor, mask: torch.Tensor | None, state: LayerState | None) -> torch.Tensor:
        x = functional.silu(x)
        low_rank, into, out_of = self.x_proj(x).split(self.widths, dim=-1)
        delta = functional.softplus(self.dt_proj(low_rank).float())
        if mask is not None:
            delta = delta * mask.unsqueeze(-1).to(delta.dtype)  # a step of no time leaves the state as it is
        rates = -torch.exp(self.A_log.float())
        y, last = scan(x, delta, rates, into, out_of, self.D.float(), None if state is None else state.ssm)
        if state is not None:
            state.ssm = last
        return y * functional.silu(gate)


MIXERS: dict[str, type[Mixer]] = {"simplified": SimplifiedMixer, "selective": SelectiveMixer}


def last_inputs(x: torch.Tensor, history: torch.Tensor | None, mask: torch.Tensor | None, width: int) -> torch.Tensor:
    """The `width` inputs up to each row's last real token: (batch, width, inner)."""
    before = x.new_zeros(x.shape[0], width, x.shape[2]) if history is None else history.to(x.dtype)
    seen = torch.cat([before, x], dim=1)
    if mask is None:
        return seen[:, x.shape[1] :].clone()
    places = mask.sum(dim=1, keepdim=True) + torch.arange(width, device=x.device)
    return seen.take_along_dim(places.unsqueeze(2), dim=1)


def scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.scan.selective_scan`, by the fused kernel of `mamba_ssm` where there is one and the state starts at zero."""
    fused = fused_scan() if u.device.type in FUSED_DEVICES and state is None else None
    if fused is None:
        return selective_scan(u, delta, A, B, C, D, state=state)
    channels_first = [value.transpose(1, 2).contiguous() for value in (u, delta.to(u.dtype), B, C)]
    y, last = fused(*channels_first[:2], A, *channels_first[2:], D, return_last_state=True)
    return y.transpose(1, 2), last


@functools.cache
def fused_scan() -> Callable[..., Any] | None:
    """`mamba_ssm`'s selective scan (channels before positions), if that package is installed."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    return selective_scan_fn  # type: ignore[no-any-return]


class Block(GradientCheckpointingLayer):
    def __init__(self, config: MambaSWELUConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.mamba = MIXERS[config.layout](config)
        self.activation = SWELU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None, state: LayerState | None) -> torch.Tensor:
        change: torch.Tensor = self.dropout(self.activation(self.mamba(self.norm(hidden), mask, state)))
        return hidden + change


class Stack(nn.Module):
    """The blocks and the norm behind them; holds the names `mamba_stack.layers.{i}` and `mamba_stack.norm`."""

    def __init__(self, config: MambaSWELUConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model)


# --- the models -------------------------------------------------------------------------------------


@dataclass
class MambaSWELUOutput(ModelOutput):
    """`hidden_states`: what enters each block, and last the result of the dense layers."""

    last_hidden_state: torch.Tensor | None = None
    cache_params: MambaSWELUCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class MambaSWELUCausalLMOutput(ModelOutput):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache_params: MambaSWELUCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class MambaSWELUPreTrainedModel(PreTrainedModel):
    config_class = MambaSWELUConfig
    config: MambaSWELUConfig
    base_model_prefix = "model"
    _input_embed_layer = "token_embedding"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _is_stateful = True  # its state cannot be taken back by some tokens, as assisted generation would need

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SWELU):
            init.constant_(module.k, self.config.swelu_k)
            if module.lam is not None:
                init.ones_(module.lam)
        elif isinstance(module, SelectiveMixer):
            self._init_selective(module)

    def _init_selective(self, mixer: SelectiveMixer) -> None:
        """Mamba's start: A = −1 … −d_state in each channel, D = 1, time steps spread over two decades."""
        rank, states = mixer.widths[0], mixer.widths[1]
        init.copy_(mixer.A_log, torch.arange(1, states + 1, dtype=torch.float32).log().expand_as(mixer.A_log))
        init.ones_(mixer.D)
        init.uniform_(mixer.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        low, high = (math.log(step) for step in FIRST_STEPS)
        steps = torch.exp(torch.rand(mixer.dt_proj.bias.shape) * (high - low) + low)
        init.copy_(mixer.dt_proj.bias, steps + torch.log(-torch.expm1(-steps)))  # softplus of it is the step


class MambaSWELUModel(MambaSWELUPreTrainedModel):
    """Everything before the output head: `last_hidden_state` is what the head multiplies."""

    def __init__(self, config: MambaSWELUConfig) -> None:
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.max_seq_len, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.mamba_stack = Stack(config)
        self.dense1 = nn.Linear(config.d_model, config.dense_hidden_dim)
        self.dense2 = nn.Linear(config.dense_hidden_dim, config.dense_hidden_dim)
        self.dense3 = nn.Linear(config.dense_hidden_dim, config.d_model)
        self.swelu1, self.swelu2, self.swelu3 = SWELU(config), SWELU(config), SWELU(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache_params: MambaSWELUCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MambaSWELUOutput:
        """`attention_mask` (batch, length or all columns so far) is 1 at real tokens. With `cache_params` the input goes on
        from there. `inputs_embeds` stand for the token embeddings; positions are added to them.

        Inside, each row's real tokens come first: padding has no place, no position and no effect, wherever it stands.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give either input_ids or inputs_embeds")
        if kwargs.get("position_ids") is not None:
            raise ValueError("positions are counted from attention_mask; packed rows cannot be kept apart in the state")
        cache, mask, order = self._cache(cache_params, use_cache), None, None
        if attention_mask is not None:
            mask = attention_mask[:, -given.shape[1] :].long()
            order = mask.argsort(dim=1, descending=True, stable=True)
            mask, given = mask.take_along_dim(order, dim=1), _reordered(given, order)
        hidden = self.token_embedding(given) if inputs_embeds is None else given
        hidden = self.dropout(hidden + self.position_embedding(self._positions(hidden, mask, cache)))
        states = cache.layers if cache is not None else [None] * self.config.n_layers
        passed = []
        for block, state in zip(self.mamba_stack.layers, states, strict=True):
            passed.append(hidden)
            hidden = block(hidden, mask, state)
        passed.append(self._dense(self.mamba_stack.norm(hidden)))
        if order is not None:
            back = order.argsort(dim=1)
            passed = [_reordered(value, back) for value in (passed if output_hidden_states else passed[-1:])]
        return MambaSWELUOutput(
            last_hidden_state=passed[-1],
            cache_params=cache,
            hidden_states=tuple(passed) if output_hidden_states else None,
        )

    def _cache(self, given: MambaSWELUCache | None, wanted: bool | None) -> MambaSWELUCache | None:
        """The cache to go on with, a new one, or none. Blocks that are computed twice would move it twice."""
        twice = self.gradient_checkpointing and self.training
        if given is not None and twice:
            raise ValueError("cache_params cannot be used while gradient checkpointing trains")
        if given is not None or twice:
            return given
        wanted = self.config.use_cache and not self.training if wanted is None else wanted
        return MambaSWELUCache.empty(self.config.n_layers) if wanted else None

    def _positions(self, hidden: torch.Tensor, mask: torch.Tensor | None, cache: MambaSWELUCache | None) -> torch.Tensor:
        """Each token's place among the real tokens of its row (padding gets any); moves the cache's counts on."""
        (batch, length), limit = hidden.shape[:2], self.config.max_seq_len
        start = hidden.new_zeros(batch, dtype=torch.long) if cache is None or cache.seen is None else cache.seen
        end = start + (length if mask is None else mask.sum(dim=1))
        columns = length + (0 if cache is None else cache.columns)
        # Asking a GPU for the count makes it wait: only where there are enough columns for too many tokens.
        if columns > limit and int(end.max()) > limit:
            raise ValueError(f"a row has {int(end.max()):,} tokens; this model has positions for {limit:,} (max_seq_len)")
        if cache is not None:
            cache.seen, cache.columns = end, columns
        return (start.unsqueeze(1) + torch.arange(length, device=hidden.device)).clamp(max=limit - 1)

    def _dense(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(self.swelu1(self.dense1(hidden)))
        hidden = self.dropout(self.swelu2(self.dense2(hidden)))
        result: torch.Tensor = self.swelu3(self.dense3(hidden))
        return result


def _reordered(value: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Columns of (batch, length) or (batch, length, width) in another order for each row."""
    return value.take_along_dim(order if value.dim() == 2 else order.unsqueeze(2), dim=1)


class MambaSWELUForCausalLM(MambaSWELUPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.token_embedding.weight"}  # noqa: RUF012

    def __init__(self, config: MambaSWELUConfig) -> None:
        super().__init__(config)
        self.model = MambaSWELUModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the forward pass makes a cache of its own

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache_params: MambaSWELUCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MambaSWELUCausalLMOutput:
        """`labels` are the input ids, −100 where nothing is learned: the shift by one happens here and nowhere else.

        `logits_to_keep`: the last so many positions, or a tensor of positions; 0 keeps all. With labels, keep all.
        """
        passed = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache_params=cache_params,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            position_ids=kwargs.pop("position_ids", None),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(passed.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MambaSWELUCausalLMOutput(
            loss=loss, logits=logits, cache_params=passed.cache_params, hidden_states=passed.hidden_states
        )


def register() -> None:
    """Make the architecture known to `AutoConfig` and `AutoModelForCausalLM`; doing it again changes nothing."""
    AutoConfig.register(MODEL_TYPE, MambaSWELUConfig, exist_ok=True)
    AutoModelForCausalLM.register(MambaSWELUConfig, MambaSWELUForCausalLM, exist_ok=True)
