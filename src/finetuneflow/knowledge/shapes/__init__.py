"""The shape of a causal language model as numbers: from a config.json, a known name, or parameters alone ("7B")."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from importlib import resources
from typing import Any

from finetuneflow.errors import ConfigError
from finetuneflow.knowledge.shapes import generic
from finetuneflow.knowledge.shapes.families import FAMILIES
from finetuneflow.knowledge.shapes.known_models import known_config
from finetuneflow.knowledge.shapes.layouts import Layout
from finetuneflow.knowledge.shapes.packaged import PACKAGED, PACKAGED_DEFAULTS
from finetuneflow.knowledge.shapes.settings import Settings, unsupported
from finetuneflow.knowledge.shapes.shape import Certainty, Linear, ModelShape, kv_bytes_per_token, kv_cache_bytes
from finetuneflow.knowledge.shapes.targets import adapter_parameters, target_linears

__all__ = [
    "Linear",
    "ModelShape",
    "adapter_parameters",
    "known_shape",
    "kv_bytes_per_token",
    "kv_cache_bytes",
    "shape_from_config",
    "shape_from_size",
    "size_in_name",
    "target_linears",
]

# Models with pictures or sound keep the language model's settings under one of these keys.
_TEXT_PARTS = ("text_config", "llm_config", "language_config")
# What the language model inside is called where the wrapper's config does not say.
_INNER_TYPES = {
    "gemma3": "gemma3_text",
    "llama4": "llama4_text",
    "mistral3": "mistral",
    "llava": "llama",
    "aria": "aria_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
# Names of classes that score text in other ways than from left to right, or read it before they write.
_NOT_CAUSAL = re.compile(r"For(MaskedLM|SequenceClassification|TokenClassification|QuestionAnswering|PreTraining)$")


@functools.cache
def _class_defaults() -> dict[str, dict[str, Any]]:
    """What a missing key means, by model type: the defaults of the configuration classes of transformers 5.23.

    transformers leaves out keys that equal its defaults when it saves a config, so a missing `tie_word_embeddings` is true
    for Gemma and false for Llama. A test compares each value with the installed release.
    """
    text = resources.files(__package__).joinpath("config_defaults.json").read_text(encoding="utf-8")
    defaults: dict[str, dict[str, Any]] = json.loads(text)
    return defaults


def shape_from_config(config: Mapping[str, Any], *, name: str = "model") -> ModelShape:
    """The shape a config.json describes. Raises `ModelError` (MODEL_UNSUPPORTED_ARCH) where it has no such numbers.

    Missing keys take the default of their class; a config with neither width nor depth is refused all the same.
    Of a model that also sees or hears, the language model alone is counted.
    """
    if not isinstance(config, Mapping):
        raise unsupported("The config is not a group of settings.", name=name)
    _refuse_other_kinds(config, name)
    outer = next((key for key in _TEXT_PARTS if isinstance(config.get(key), Mapping)), None)
    if outer is None:
        return replace(_decoder_shape(config, name), stored_dtype=_stored_dtype(config))
    inner = {"model_type": _INNER_TYPES.get(str(config.get("model_type")))} | dict(config[outer])
    if config.get("tie_word_embeddings") is not None:
        inner["tie_word_embeddings"] = config["tie_word_embeddings"]
    shape = _decoder_shape(inner, name)
    return replace(
        shape,
        model_type=str(config.get("model_type") or shape.model_type),
        stored_dtype=_stored_dtype(config) or _stored_dtype(inner),
        linears=tuple(_below_language_model(linear) for linear in shape.linears),
        certainty="read",
        source=f"{shape.source}; the language model alone, without the parts for pictures or sound",
    )


def _below_language_model(linear: Linear) -> Linear:
    return replace(linear, path=re.sub(r"^model\.", "model.language_model.", linear.path))


def _stored_dtype(config: Mapping[str, Any]) -> str | None:
    """The type the weights were saved in; releases before 5 of transformers call the key `torch_dtype`."""
    stated = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return stated if stated in ("float32", "bfloat16", "float16") else None


def _refuse_other_kinds(config: Mapping[str, Any], name: str) -> None:
    architectures = config.get("architectures")
    classes = [str(a) for a in architectures] if isinstance(architectures, list) else []
    if config.get("is_encoder_decoder") is True:
        raise unsupported("An encoder-decoder is not a causal language model.", name=name)
    if classes and all(_NOT_CAUSAL.search(c) for c in classes):
        raise unsupported(f"{classes[0]} is not a causal language model.", name=name)


def _decoder_shape(config: Mapping[str, Any], name: str) -> ModelShape:
    model_type = str(config.get("model_type") or "")
    build = FAMILIES.get(model_type) or PACKAGED.get(model_type)
    stated = Settings(config, {}, name)
    if stated.raw("hidden_size") is None and stated.raw("num_hidden_layers") is None:
        stated.require("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if build is None:
        shown = repr(model_type) if model_type else "without a type"
        return _shape(
            generic.read(stated), name, model_type, "read", f"config.json of an unlisted family ({shown}), by its usual keys"
        )
    settings = Settings(config, _class_defaults().get(model_type) or PACKAGED_DEFAULTS.get(model_type, {}), name)
    return _shape(build(settings), name, model_type, "exact", f"config.json ({model_type})")


def _shape(d: Layout, name: str, model_type: str, certainty: Certainty, source: str) -> ModelShape:
    described = {f.name: getattr(d, f.name) for f in fields(d) if f.name not in ("layer_path", "linears")}
    share = d.experts_per_token / d.num_experts if d.num_experts else 1.0
    linears = tuple(d.linears)
    return ModelShape(
        name=name,
        model_type=model_type,
        linears=linears,
        expert_share=share,
        certainty=certainty,
        source=source,
        **described,
    )


# Published Llama-like shapes, smallest first: parameters -> layers, width, heads, key/value heads, vocabulary, shared head.
# Sources: llama2.c README (15M, 42M, 110M); config.json of SmolLM2 135M and 360M, Llama 3.2 1B and 3B, Llama 2 7B and 13B,
# Llama 1 33B (arXiv:2302.13971, table 2), Llama 3 8B, 70B and 405B (arXiv:2407.21783, table 3).
_TYPICAL: tuple[tuple[float, int, int, int, int, int, bool], ...] = (
    (15.2e6, 6, 288, 6, 6, 32_000, True),
    (41.7e6, 8, 512, 8, 8, 32_000, True),
    (109.5e6, 12, 768, 12, 12, 32_000, True),
    (134.5e6, 30, 576, 9, 3, 49_152, True),
    (361.8e6, 32, 960, 15, 5, 49_152, True),
    (1.236e9, 16, 2048, 32, 8, 128_256, True),
    (3.213e9, 28, 3072, 24, 8, 128_256, True),
    (6.738e9, 32, 4096, 32, 32, 32_000, False),
    (8.030e9, 32, 4096, 32, 8, 128_256, False),
    (13.02e9, 40, 5120, 40, 40, 32_000, False),
    (32.53e9, 60, 6656, 52, 52, 32_000, False),
    (70.55e9, 80, 8192, 64, 8, 128_256, False),
    (405.9e9, 126, 16_384, 128, 8, 128_256, False),
)
SMALLEST, LARGEST = 10e6, 1e12
_SIZE = re.compile(r"\s*(\d{1,6}(?:\.\d{1,6})?)\s*([mMbBtT])\s*")
_UNITS = {"m": 1e6, "b": 1e9, "t": 1e12}


def parameters_in(text: str) -> float | None:
    """The number a size such as "7B", "124M" or "0.6b" stands for, else None."""
    found = _SIZE.fullmatch(text)
    return float(found[1]) * _UNITS[found[2].lower()] if found else None


def shape_from_size(text: str) -> ModelShape:
    """A typical shape of that many parameters: "7B", "124M", "1.5b". Raises `ConfigError` (CONFIG_INVALID_VALUE).

    The nearest published Llama-like model, deeper and wider with the cube root of the parameters; the feed-forward width makes
    up the rest, so that the count is met within 3 % from 10M to 1T.
    """
    wanted = parameters_in(text) if isinstance(text, str) else None
    if wanted is None or not SMALLEST <= wanted <= LARGEST:
        raise ConfigError(
            "CONFIG_INVALID_VALUE",
            f"{str(text)[:40]!r} is no size of a model between 10M and 1T parameters.",
            remedy="Write it like 124M, 0.6B, 7B or 70B.",
        )
    shape = shape_from_config(_typical_config(wanted), name=text.strip())
    return replace(shape, certainty="typical", source=f"a typical Llama-like shape of {text.strip()} parameters")


def _typical_config(wanted: float) -> dict[str, Any]:
    size, layers, width, heads, kv_heads, vocab, tied = min(_TYPICAL, key=lambda row: abs(math.log(row[0] / wanted)))
    head, group = width // heads, heads // kv_heads
    growth = (wanted / size) ** (1 / 3)  # depth x width^2 follows the parameters, each with its cube root
    unit = 1 if group == 1 else min(kv_heads, 4)  # head counts that groups divide
    most = max(unit, unit * round(heads * growth / unit))
    counts = list(range(most, 0, -unit))
    if 0.85 < wanted / size < 1.15:  # "7B" means 6.7 billion: the published depth and width stand
        growth, counts = 1.0, [heads, *(count for count in counts if count < heads)]
    for count in counts:
        depth = max(2, round(layers * growth * (heads * growth / count) ** 2))
        config = _filled_up(wanted, depth, head, count, group, vocab, tied)
        # Below 20M the vocabulary would crowd out the feed-forward part: narrower then.
        if config["intermediate_size"] >= 2 * config["hidden_size"]:
            break
    return config


def _filled_up(wanted: float, layers: int, head: int, heads: int, group: int, vocab: int, tied: bool) -> dict[str, Any]:
    """The settings whose feed-forward width makes the count meet `wanted`."""
    width = heads * head
    kv_heads = max(count for count in range(1, heads + 1) if heads % count == 0 and count <= max(1, heads // group))
    outside = vocab * width * (1 if tied else 2) + width
    attention = 2 * width * width + 2 * width * kv_heads * head + 2 * width
    inner = ((wanted - outside) / layers - attention) / (3 * width)
    return {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": max(8, 8 * round(inner / 8)),
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
    }


def known_shape(name: str) -> ModelShape | None:
    """The shape of a well-known hub model by its id, instruction-tuned editions included, else None."""
    config = known_config(name)
    if config is None:
        return None
    shape = shape_from_config(config, name=name)
    return replace(shape, source=f"published settings of {name}; {shape.source}")


# A size stands alone between separators; "8x7B" and a mixture's active share ("A3B") are not the whole model's.
_NAMED_SIZE = re.compile(r"(?<![A-Za-z0-9.])(?<!\d_)(\d{1,4}(?:\.\d{1,3})?)([mMbB])(\d?)(?![A-Za-z0-9])")


def size_in_name(name: str) -> str | None:
    """The size a model's name states: "0.6B" of "Qwen/Qwen3-0.6B-Base", None where it states none.

    "8x7B" is left out: the experts of a mixture share their attention, so the product is not the size (Mixtral 8x7B: 46.7B).
    BLOOM's "7b1" is 7.1B.
    """
    sizes = []
    for number, unit, tenth in _NAMED_SIZE.findall(name.rsplit("/", 1)[-1]):
        stated = f"{number}.{tenth}" if tenth and "." not in number else number
        sizes.append((float(stated) * _UNITS[unit.lower()], f"{stated}{unit.upper()}"))
    return max(sizes)[1] if sizes else None
