"""The shape of a model whose architecture is not known here, from the names and shapes of its stored tensors.

Counts are exact; what runs between the tensors is not in a header, so that activations follow width and depth alone.
An architecture's author may state the rest (see `STATED`); nothing of the author's code runs here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetuneflow.knowledge.shapes.settings import MOST_LAYERS, Settings, unsupported
from finetuneflow.knowledge.shapes.shape import Linear, ModelShape

# What an author may state beside config.json, each a number of `ModelShape`.
STATED = frozenset(
    {"heads", "kv_heads", "head_dim", "attention_layers", "key_value_width", "intermediate", "max_position"}
    | {"sliding_window", "sliding_layers", "state_size", "state_values"}
)

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
_TABLE = re.compile(r"emb|wte|wpe|position", re.I)
_ATTENTION = re.compile(r"^([qkvo]_proj|qkv\w*|query\w*|key|value|c_attn|Wqkv|out_proj|wq|wk|wv|wo)$")


@dataclass(frozen=True, slots=True)
class _Sorted:
    """Stored tensors by what they are: the token table, the output head (None: shared with it), linear layers, all values."""

    table: str
    head: str | None
    linears: tuple[Linear, ...]
    total: int


def shape_from_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]],
    *,
    name: str = "model",
    stated: Mapping[str, Any] | None = None,
) -> ModelShape:
    """A shape from config.json and the tensors of the weights (name -> shape), for an architecture that is not known.

    A stored matrix is taken for a linear layer unless it is a table. Raises `ModelError` (MODEL_UNSUPPORTED_ARCH) where width
    or token table cannot be told, or `stated` holds something else than numbers under the names of `STATED`.
    """
    s = Settings(config, {}, name)
    s.require("hidden_size")
    hidden = s.integer("hidden_size")
    layers = s.optional("num_hidden_layers", most=MOST_LAYERS) or _depth(tensors)
    heads = s.optional("num_attention_heads")
    parts = _sort(tensors, s.optional("vocab_size"), with_attention=heads is not None, name=name)
    vocab, width = tensors[parts.table]
    counted = vocab * width * (1 if parts.head is None else 2) + sum(linear.num_parameters for linear in parts.linears)
    shape = ModelShape(
        name=name,
        model_type=s.word("model_type"),
        hidden=hidden,
        layers=layers,
        heads=heads or 1,
        kv_heads=s.optional("num_key_value_heads") or heads or 1,
        head_dim=s.optional("head_dim") or hidden // (heads or 1),
        intermediate=s.optional("intermediate_size") or max((linear.outputs for linear in parts.linears), default=hidden),
        vocab=vocab,
        tied=parts.head is None,
        gated_mlp=True,  # the costlier assumption: a gate keeps one tensor more
        linears=parts.linears,
        other_parameters=parts.total - counted,
        max_position=s.optional("max_position_embeddings"),
        attention_layers=None if heads is not None else 0,
        certainty="read",
        source="the tensors of the weights: parameters are counted, activations follow width and depth",
        embedding_width=None if width == hidden else width,
        embedding_name=_leaf(parts.table),
        head_name="lm_head" if parts.head is None else _leaf(parts.head),
    )
    return _with_stated(shape, stated or {})


def _depth(tensors: Mapping[str, tuple[int, ...]]) -> int:
    """How many numbers stand where a layer's number stands; 1 where none does."""
    return len({found.group() for tensor in tensors if (found := _LAYER.search(tensor))}) or 1


def _leaf(tensor: str) -> str:
    """The module a tensor belongs to, the last part of its path."""
    return tensor.rsplit(".", 2)[-2] if tensor.count(".") else tensor


def _sort(tensors: Mapping[str, tuple[int, ...]], vocab: int | None, *, with_attention: bool, name: str) -> _Sorted:
    matrices = {tensor: shape for tensor, shape in tensors.items() if len(shape) == 2 and tensor.endswith(".weight")}
    outer = {tensor: shape for tensor, shape in matrices.items() if not _LAYER.search(tensor)}
    of_vocabulary = [tensor for tensor, shape in outer.items() if vocab is None or shape[0] >= vocab]
    table = next((tensor for tensor in of_vocabulary if _TABLE.search(tensor) and "pos" not in tensor), None)
    if table is None:
        raise unsupported("No stored tensor looks like the table of tokens.", name=name)
    head = next((tensor for tensor in of_vocabulary if tensor != table and matrices[tensor] == matrices[table]), None)
    kinds: Counter[tuple[str, tuple[int, int], bool]] = Counter()
    places: dict[tuple[str, tuple[int, int], bool], list[int]] = {}
    for tensor, shape in matrices.items():
        if tensor in (table, head) or _TABLE.search(_leaf(tensor)):
            continue
        path = tensor.removesuffix(".weight")
        number = _LAYER.search(tensor)
        key = (_LAYER.sub("{}", path, count=1), (shape[0], shape[1]), f"{path}.bias" in tensors)
        kinds[key] += 1
        places.setdefault(key, []).extend([int(number.group())] if number else [])
    linears = tuple(
        Linear(
            name=path.rsplit(".", 1)[-1],
            inputs=inputs,
            outputs=outputs,
            count=count,
            bias=bias,
            part="attention" if with_attention and _ATTENTION.match(path.rsplit(".", 1)[-1]) else "mlp",
            path=path,
            layer_indices=tuple(sorted(places[path, (outputs, inputs), bias])),
        )
        for (path, (outputs, inputs), bias), count in kinds.items()
    )
    return _Sorted(table, head, linears, sum(math.prod(shape) for shape in tensors.values()))


def _with_stated(shape: ModelShape, stated: Mapping[str, Any]) -> ModelShape:
    wrong = [
        key
        for key, value in stated.items()
        if key not in STATED or isinstance(value, bool) or not isinstance(value, int) or value < 0
    ]
    if wrong:
        raise unsupported(
            f"What its author states of its shape cannot be used: {', '.join(sorted(map(str, wrong)))}. "
            f"Whole numbers are known for: {', '.join(sorted(STATED))}.",
            name=shape.name,
            invalid=wrong,
        )
    if not stated:
        return shape
    return replace(shape, source=f"{shape.source}; {', '.join(sorted(stated))} as stated by its author", **stated)
