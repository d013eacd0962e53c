"""The architectures that come with FineTuneFlow itself: `models/mamba_swelu.py` as numbers.

A test builds the model on the meta device from odd settings and compares each linear layer and the total.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from finetuneflow.knowledge.shapes.layouts import Layout
from finetuneflow.knowledge.shapes.settings import MOST_LAYERS, Settings, unsupported
from finetuneflow.knowledge.shapes.shape import Linear


def _mamba_swelu(s: Settings) -> Layout:
    """Blocks of a mixer and an activation with learned exponent (and scale), three dense layers behind them.

    In the simplified layout `x_proj` and `dt_proj` are stored and never used: they count, and take no adapter.
    """
    s.require("hidden_size", "num_hidden_layers", "vocab_size")
    width, wide = s.integer("hidden_size"), s.integer("dense_hidden_dim")
    inner, state, kernel = s.integer("expand") * width, s.integer("d_state"), s.integer("d_conv")
    selective = s.word("layout") == "selective"
    if s.word("layout") not in ("simplified", "selective"):
        raise unsupported(f"layout is {s.word('layout')!r}, not simplified or selective.", name=s.name, invalid=["layout"])
    positions = s.integer("max_position_embeddings")
    learned = 2 if s.flag("learn_lambda") else 1  # of each activation: its exponent, and its scale
    d = Layout(
        hidden=width,
        layers=s.integer("num_hidden_layers", most=MOST_LAYERS),
        heads=1,
        kv_heads=1,
        head_dim=width,
        vocab=s.integer("vocab_size"),
        intermediate=wide,
        tied=s.flag("tie_word_embeddings"),
        gated_mlp=False,
        layer_path="model.mamba_stack.layers.{}",
        embedding_name="token_embedding",
        max_position=positions,
        attention_layers=0,
    )
    rank = math.ceil(width / 16)
    d.linear("mamba.in_proj", width, 2 * inner, "state")
    d.linear("mamba.x_proj", inner, rank + 2 * state if selective else state, "state", module=selective)
    d.linear("mamba.dt_proj", rank if selective else inner, inner, "state", bias=True, module=selective)
    d.linear("mamba.out_proj", inner, width, "state")
    for name, inputs, outputs in (("dense1", width, wide), ("dense2", wide, wide), ("dense3", wide, width)):
        d.linears.append(Linear(name, inputs, outputs, 1, bias=True, part="mlp", path=f"model.{name}"))
    mixer = inner * (kernel + 1) + (inner * (state + 1) if selective else learned)
    d.other_parameters += d.layers * (mixer + 2 * width + learned)  # with the block's norm and activation
    d.other_parameters += positions * width + 2 * width + 3 * learned
    d.state_size = state if selective else None
    d.state_values = d.layers * inner * (kernel - 1 + (state if selective else 0))
    return d


PACKAGED: dict[str, Callable[[Settings], Layout]] = {"mamba_swelu": _mamba_swelu}

# What a missing key means: the defaults of the configuration class.
PACKAGED_DEFAULTS: dict[str, dict[str, Any]] = {
    "mamba_swelu": {
        "vocab_size": 50_257,
        "d_model": 1024,
        "n_layers": 6,
        "d_state": 16,
        "d_conv": 4,
        "expand": 2,
        "max_seq_len": 2048,
        "dense_hidden_dim": 2048,
        "tie_word_embeddings": True,
        "layout": "simplified",
        "learn_lambda": True,
    }
}
