"""MambaSWELU against a second implementation: NumPy, one row and one position at a time, from the description alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from finetuneflow.models.mamba_swelu import LAYOUTS, MambaSWELUConfig, MambaSWELUForCausalLM, SelectiveMixer

Weights = dict[str, np.ndarray]


def tiny(layout: str, *, seed: int = 0, **settings: Any) -> MambaSWELUForCausalLM:
    """A tiny model whose every weight is random, the activations' among them."""
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "d_model": 20,
        "n_layers": 2,
        "d_state": 4,
        "max_seq_len": 40,
        "dense_hidden_dim": 28,
    }
    torch.manual_seed(seed)
    model = MambaSWELUForCausalLM(MambaSWELUConfig(layout=layout, **sizes | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


# --- the second implementation ---------------------------------------------------------------------


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def swelu(z: np.ndarray, w: Weights, name: str) -> np.ndarray:
    exponent = abs(w[f"{name}.k"]) + 1e-6
    return w.get(f"{name}.lam", 1.0) * np.sign(z) * (1 - np.exp(-((np.abs(z) + 1e-8) ** exponent)))


def layer_norm(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    centred = x - x.mean()
    return centred / np.sqrt((centred**2).mean() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0.0)


def convolved(xs: list[np.ndarray], w: Weights, name: str) -> list[np.ndarray]:
    kernel = w[f"{name}.conv1d.weight"][:, 0]
    width = kernel.shape[1]
    result = []
    for t in range(len(xs)):
        total = w[f"{name}.conv1d.bias"].copy()
        for j in range(width):
            if t - width + 1 + j >= 0:
                total += kernel[:, j] * xs[t - width + 1 + j]
        result.append(total)
    return result


def selective(xs: list[np.ndarray], w: Weights, name: str, d_model: int) -> list[np.ndarray]:
    rank, rates = math.ceil(d_model / 16), -np.exp(w[f"{name}.A_log"])
    states = rates.shape[1]
    h, result = np.zeros_like(rates), []
    for x in xs:
        low, into, out_of = np.split(linear(x, w, f"{name}.x_proj"), [rank, rank + states])
        step = np.log1p(np.exp(linear(low, w, f"{name}.dt_proj")))
        h = np.exp(step[:, None] * rates) * h + (step * x)[:, None] * into[None, :]
        result.append(h @ out_of + w[f"{name}.D"] * x)
    return result


def mixed(hidden: list[np.ndarray], w: Weights, name: str) -> list[np.ndarray]:
    pairs = [np.split(linear(x, w, f"{name}.in_proj"), 2) for x in hidden]
    xs, gates = convolved([x for x, _ in pairs], w, name), [gate for _, gate in pairs]
    if f"{name}.A_log" in w:
        ys = selective([x * sigmoid(x) for x in xs], w, name, len(hidden[0]))
        outs = [y * (gate * sigmoid(gate)) for y, gate in zip(ys, gates, strict=True)]
    else:
        outs = [swelu(x, w, f"{name}.ssm_activation") * sigmoid(gate) for x, gate in zip(xs, gates, strict=True)]
    return [linear(out, w, f"{name}.out_proj") for out in outs]


def logits_of(w: Weights, ids: list[int]) -> np.ndarray:
    """(length, vocabulary); `w` has the names of the original checkpoints."""
    hidden = [w["token_embedding.weight"][token] + w["position_embedding.weight"][t] for t, token in enumerate(ids)]
    for i in range(len({name.split(".")[2] for name in w if name.startswith("mamba_stack.layers.")})):
        name = f"mamba_stack.layers.{i}"
        changes = mixed([layer_norm(x, w, f"{name}.norm") for x in hidden], w, f"{name}.mamba")
        hidden = [x + swelu(change, w, f"{name}.activation") for x, change in zip(hidden, changes, strict=True)]
    out = []
    for x in hidden:
        x = layer_norm(x, w, "mamba_stack.norm")
        for number in (1, 2, 3):
            x = swelu(linear(x, w, f"dense{number}"), w, f"swelu{number}")
        out.append(linear(x, w, "lm_head"))
    return np.stack(out)


# --- the comparison -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "settings", [{}, {"learn_lambda": False}, {"tie_word_embeddings": False, "d_conv": 3, "expand": 3}], ids=str
)
def test_logits_equal_the_second_implementation(layout: str, settings: dict[str, Any]) -> None:
    model = tiny(layout, **settings)
    weights = {name.removeprefix("model."): tensor.double().numpy() for name, tensor in model.state_dict().items()}
    ids = [3, 41, 7, 7, 0, 22, 49, 13, 5, 30, 11, 2]
    with torch.no_grad():
        got = model(torch.tensor([ids])).logits[0].numpy()
    expected = logits_of(weights, ids)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


def test_the_selective_mixer_equals_the_mamba_of_transformers() -> None:
    from transformers import MambaConfig, MambaModel

    torch.manual_seed(0)
    theirs = MambaModel(MambaConfig(vocab_size=10, hidden_size=32, state_size=4, num_hidden_layers=1)).layers[0].mixer.eval()
    config = MambaSWELUConfig(d_model=32, d_state=4, layout="selective")
    ours = SelectiveMixer(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(3, 17, 32, requires_grad=True)
    expected, got = theirs(hidden), ours(hidden, None, None)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), [hidden, *theirs.parameters()])
    names = [name for name, _ in theirs.named_parameters()]
    had = torch.autograd.grad((got * weight).sum(), [hidden, *(ours.get_parameter(name) for name in names)])
    for name, a, b in zip(["hidden", *names], had, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
