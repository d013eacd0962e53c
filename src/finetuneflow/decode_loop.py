"""The loop that writes answers: every prompt read once, then one token per row and step; a row that has ended leaves.

It does what transformers' `generate` does for a plain decoder with a cache, and gives the same tokens. `generate` serves
any model; `serves` says which models this loop may take. What it saves:

- A row that has ended is computed no further: the last rows take the places of those that left (`RowLayer.keep`).
- A step writes its keys and values in their place instead of copying all that stand before them.
- Logits of the last position alone, from a tensor without gaps: through the view that `logits_to_keep=1` takes, a CPU
  multiplies batch by batch with a copy of the head for each (half the time of reading the prompts of a 135M model).
- A LoRA layer without PEFT's bookkeeping, its sum in one product (`lean_lora`).
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# Kinds of adapters that change layers of the base and nothing about how it is called.
IN_LAYERS = frozenset({"LORA", "IA3"})
GROWTH = 64  # positions of cache made at once


class Choice(Protocol):
    """How the next token of each row is chosen."""

    def draw(self, scores: torch.Tensor) -> torch.Tensor:
        """One token per row of scores."""

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on, in this order."""


class Greedy:
    """The likeliest token."""

    def draw(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.argmax(dim=-1)

    def keep(self, rows: Sequence[int]) -> None:
        """Rows have nothing of their own here."""


class RowLayer(DynamicLayer):
    """Keys and values of one layer, in room that is made ahead. All layers keep everything: a window is the mask's matter."""

    def __init__(self) -> None:
        super().__init__()
        self._room: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if not self._room or self._room[0].shape[-2] < after:
            self._grow((key_states, value_states), before, after + GROWTH)
        rows = len(key_states)
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:rows, :, before:after] = states
        self.keys, self.values = (room[:rows, :, :after] for room in self._room)
        return self.keys, self.values

    def _grow(self, states: tuple[torch.Tensor, torch.Tensor], filled: int, size: int) -> None:
        old, self._room = self._room, [s.new_empty((*s.shape[:2], size, s.shape[3])) for s in states]
        for room, before in zip(self._room, old, strict=False):
            room[:, :, :filled] = before[: len(room), :, :filled]
        self.dtype, self.device, self.is_initialized = states[0].dtype, states[0].device, True

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on, in this order; of a row that keeps its place nothing is moved."""
        places = [place for place, row in enumerate(rows) if place != row]
        for room in self._room if places else []:
            room[places] = room[[rows[place] for place in places]]
        length = self.get_seq_length()
        self.keys, self.values = (room[: len(rows), :, :length] for room in self._room)


def base_of(model: Any) -> Any:
    """The transformers model under an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def serves(model: Any) -> bool:
    """Whether the loop may take this model: a decoder of transformers that is called in the ordinary way, with a cache
    of keys and values for each layer, and adapters inside its layers."""
    adapters = getattr(model, "peft_config", {}).values()
    if any(a.peft_type not in IN_LAYERS or getattr(a, "alora_invocation_tokens", None) for a in adapters):
        return False
    base = base_of(model)
    kind: Any = type(base)
    if not (issubclass(kind, PreTrainedModel) and kind.__module__.startswith("transformers.")):
        return False
    # A class that prepares its inputs in a way of its own (Phi-3 changes its rotary factors on the way) may need more than
    # what is passed below.
    ordinary = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_sample", "generate")
    if any(getattr(kind, name, None) is not getattr(GenerationMixin, name) for name in ordinary):
        return False
    takes = inspect.signature(kind.forward).parameters.keys()
    config = base.config
    if not {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"} <= takes or config.is_encoder_decoder:
        return False
    if base.main_input_name != "input_ids" or not base._supports_default_dynamic_cache():
        return False
    types = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    layers = DynamicCache(config=config).layers
    return types <= {"full_attention", "sliding_attention"} and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
    )


def answer_rows(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    limit: int,
    choice: Choice,
    ended: Callable[[Sequence[int]], bool],
    on_token: Callable[[int], None] | None = None,
    cancelled: threading.Event | None = None,
) -> list[list[int]]:
    """The tokens that follow each left padded prompt, through the one that `ended` (asked with the answer so far) says
    is the last, or `limit` of them.

    `on_token` hears of every token; it is for a single row. `model` is in evaluation mode, and gradients are off.
    """
    base = base_of(model)
    answers: list[list[int]] = [[] for _ in ids]
    active = list(range(len(ids)))  # the prompt of each row
    width = ids.shape[1]
    mask = torch.cat([mask, mask.new_ones(len(mask), limit)], dim=1)
    positions = (mask[:, :width].cumsum(dim=1) - 1).clamp(min=0)
    padded = (mask[:, :width] == 0).any(dim=1).tolist()
    cache: Any = DynamicCache()
    cache.layer_class_to_replicate = RowLayer
    last = torch.tensor([width - 1], device=ids.device)
    with lean_layers(model), getattr(base, "_optimize_model_for_decode", contextlib.nullcontext)():
        for step in range(limit):
            read = base(
                input_ids=ids,
                # Without padding there is nothing to mask, and building a mask is what a short step spends its time on.
                attention_mask=mask[: len(active), : width + step] if any(padded[i] for i in active) else None,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
                logits_to_keep=last if step == 0 else 1,
            )
            tokens = choice.draw(read.logits[:, -1].float())
            for row, token in zip(active, tokens.tolist(), strict=True):
                answers[row].append(token)
                if on_token:
                    on_token(token)
            going = [row for row, prompt in enumerate(active) if not ended(answers[prompt])]
            if not going or (cancelled is not None and cancelled.is_set()):
                break
            ids, positions = tokens[:, None], positions[:, -1:] + 1
            if len(going) < len(active):
                kept = moved_up(going)
                active = [active[row] for row in kept]
                choice.keep(kept)
                for layer in cache.layers:
                    layer.keep(kept)
                ids, positions, mask = ids[kept], positions[kept], mask[kept]
    return answers


def moved_up(going: Sequence[int]) -> list[int]:
    """Rows in a new order in which as many as possible keep their place: the last ones fill the places of those that left."""
    count = len(going)
    fill = iter([row for row in going if row >= count])
    stay = set(going)
    return [place if place in stay else next(fill) for place in range(count)]


# --- LoRA layers, for the time of an answer -----------------------------------------------------


@contextlib.contextmanager
def lean_layers(model: Any) -> Iterator[None]:
    """Inside, plain LoRA layers compute the same in fewer operations."""
    # Under autocast the types of the operations are its choice, and another operation may be another choice.
    layers = [] if torch.is_autocast_enabled(model.device.type) else _lora_layers(model)
    try:
        for layer in layers:
            layer.forward = lean_lora(layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _lora_layers(model: Any) -> list[Any]:
    """LoRA layers that add one adapter's product to what a linear layer gives, and nothing else."""
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.lora.layer import Linear

    return [layer for layer in model.modules() if type(layer) is Linear and _is_plain(layer)]


def _is_plain(layer: Any) -> bool:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1 or "forward" in vars(layer):
        return False
    a, b = layer.lora_A[names[0]], layer.lora_B[names[0]]
    if type(a) is not torch.nn.Linear or type(b) is not torch.nn.Linear or a.bias is not None or b.bias is not None:
        return False
    return names[0] not in layer.lora_variant and getattr(layer, "cast_input_dtype_enabled", True)


def lean_lora(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer's forward in evaluation mode: W x + b + s · B A x, in the types that PEFT computes them in."""
    (name,) = (name for name in layer.active_adapters if name in layer.lora_A)
    a, b, scaling, base = layer.lora_A[name].weight, layer.lora_B[name].weight.t(), layer.scaling[name], layer.base_layer

    def forward(x: torch.Tensor) -> torch.Tensor:
        result = base(x)
        low_rank = F.linear(x.to(a.dtype), a)
        flat = result.reshape(-1, result.shape[-1]).to(a.dtype)
        return torch.addmm(flat, low_rank.reshape(-1, a.shape[0]), b, alpha=scaling).to(result.dtype).view(result.shape)

    return forward
