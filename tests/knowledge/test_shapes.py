"""Shapes against transformers itself: every family built on the meta device, real caches, and published parameter counts."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from importlib import resources
from typing import Any

import odd_models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

from finetuneflow.errors import ConfigError, ModelError
from finetuneflow.knowledge.shapes import (
    ModelShape,
    generic,
    known_shape,
    kv_bytes_per_token,
    kv_cache_bytes,
    parameters_in,
    shape_from_config,
    shape_from_size,
    size_in_name,
)
from finetuneflow.knowledge.shapes.families import FAMILIES
from finetuneflow.knowledge.shapes.known_models import KNOWN
from finetuneflow.knowledge.shapes.settings import Settings

DEFAULTS: dict[str, dict[str, Any]] = json.loads(
    resources.files("finetuneflow.knowledge.shapes").joinpath("config_defaults.json").read_text(encoding="utf-8")
)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
}


def require_same(model: Any, shape: ModelShape) -> None:
    """Every linear layer by its path, width and bias; every fused tensor by its size; the total."""
    head = model.get_output_embeddings()
    real = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            widths = tuple(module.weight.shape)
            real[path] = (widths if isinstance(module, Conv1D) else widths[::-1]) + (module.bias is not None,)
    described = {
        path: (linear.inputs, linear.outputs, linear.bias)
        for linear in shape.linears
        if linear.is_linear_module
        for path in linear.paths
    }
    assert described == real
    assert all(linear.count == len(linear.paths) for linear in shape.linears if linear.is_linear_module)
    assert all(linear.name == path.rsplit(".", 1)[-1] for linear in shape.linears for path in linear.paths)
    parameters = dict(model.named_parameters())
    for linear in shape.linears:
        for path in () if linear.is_linear_module else linear.paths:
            tensor = parameters.get(path, parameters.get(f"{path}.weight"))
            assert tensor is not None, path
            assert tensor.numel() * len(linear.paths) == linear.count * linear.inputs * linear.outputs, path
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert shape.embedding_parameters == model.get_input_embeddings().weight.numel()
    assert shape.tied == (head is not None and head.weight is model.get_input_embeddings().weight)
    assert shape.head_parameters == (0 if shape.tied else head.weight.numel())


def variants(model_type: str) -> list[dict[str, Any]]:
    known = odd_models.fields(model_type)
    flags = [{key: not value} for key, value in known.items() if isinstance(value, bool) and key in DEFAULTS[model_type]]
    fitting = [v for v in odd_models.VARIANTS if set(v) <= set(known)]
    return [{}, *fitting, *flags]


# Settings that transformers builds but that no model can compute with, or that give no causal language model.
NO_MODEL = {("helium", "head_dim"), ("olmoe", "head_dim"), ("xglm", "add_cross_attention")}


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_layer_and_the_total_are_those_of_transformers(model_type: str) -> None:
    compared = 0
    for change in variants(model_type):
        if any((model_type, key) in NO_MODEL for key in change):
            continue
        try:
            config = odd_models.odd_config(model_type, **change)
            model = odd_models.on_meta(config)
        except Exception:  # this family does not take that setting; the plain one must work
            assert change, f"{model_type} cannot be built at all"
            continue
        try:
            shape = shape_from_config(config.to_dict())
        except ModelError:
            assert "num_experts" in change or "add_cross_attention" in change, change  # no experts: refused, not guessed
            continue
        assert shape.certainty == "exact"
        require_same(model, shape)
        # What a saved config.json leaves out, the class defaults fill in.
        assert shape_from_config(config.to_diff_dict() | {"model_type": config.model_type}) == shape, change
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_class_defaults_are_those_of_transformers(model_type: str) -> None:
    used = {key for row in DEFAULTS.values() for key in row}
    real = {k: v for k, v in odd_models.fields(model_type).items() if k in used and isinstance(v, int | str)}
    assert DEFAULTS[model_type] == real


def test_there_is_a_row_of_defaults_for_each_family_and_no_other() -> None:
    assert set(DEFAULTS) == set(FAMILIES)


# --- configs of unlisted families ------------------------------------------------------------------

READABLE = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "cohere2", "phi", "phi3", "olmo2", "glm4", "stablelm",
    "granite", "smollm3", "exaone4", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "gpt_oss", "glm4_moe", "dots1",
    "deepseek_v3", "youtu", "minicpm3",
)  # fmt: skip
UNLISTED = ("deepseek_v32", "glm_moe_dsa", "cohere2_moe", "gemma4_text", "gemma3n_text", "mimo_v2_flash", "kolibri1", "hy_v4")


@pytest.mark.parametrize("model_type", READABLE)
def test_the_usual_keys_alone_come_within_two_per_cent(model_type: str) -> None:
    known = odd_models.fields(model_type)
    large = {"n_routed_experts": 64, "num_experts_per_tok": 4, "n_shared_experts": 2, "first_k_dense_replace": 1}
    config = odd_models.odd_config(model_type).__class__(**({k: v for k, v in large.items() if k in known}))
    shape = generic.read(Settings(config.to_dict(), {}, "x"))
    exact = sum(p.numel() for p in odd_models.on_meta(config).parameters())
    linears = sum(linear.num_parameters for linear in shape.linears)
    total = linears + shape.other_parameters + shape.vocab * shape.hidden * (1 if shape.tied else 2)
    assert total == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("model_type", UNLISTED)
def test_unlisted_families_are_read_within_two_per_cent(model_type: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]()
    shape = shape_from_config(config.to_dict())
    assert shape.certainty == "read"
    assert "unlisted family" in shape.source
    assert shape.num_parameters == pytest.approx(sum(p.numel() for p in odd_models.on_meta(config).parameters()), rel=0.02)


@pytest.mark.parametrize("model_type", ["rwkv", "nemotron_h", "recurrent_gemma", "zamba2", "xlstm", "falcon_h1", "jetmoe"])
def test_families_of_their_own_kind_are_refused_rather_than_guessed(model_type: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with pytest.raises(ModelError) as caught:
        shape_from_config(CONFIG_MAPPING[model_type]().to_dict())
    assert caught.value.code == "MODEL_UNSUPPORTED_ARCH"


def test_other_names_of_the_same_numbers_are_understood() -> None:
    renamed = {
        "model_type": "somebody-elses",
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "num_kv_heads": 2,
        "ffn_dim": 96,
        "padded_vocab_size": 100,
        "tie_word_embeddings": False,
    }
    shape = shape_from_config(renamed)
    assert shape.certainty == "read"
    assert shape.num_parameters == shape_from_config(LLAMA).num_parameters


def test_of_a_model_that_sees_the_language_model_is_counted() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    inner = {k: v for k, v in odd_models.odd_settings("gemma3_text").items() if k != "vocab_size"}
    config = CONFIG_MAPPING["gemma3"](text_config=inner)
    model = odd_models.on_meta(config)
    shape = shape_from_config(config.to_dict())
    assert (shape.model_type, shape.certainty, shape.vocab) == ("gemma3", "read", 262_208)
    assert "language model alone" in shape.source
    language = model.get_submodule("model.language_model")
    assert shape.num_parameters == sum(p.numel() for p in language.parameters())
    paths = {path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {path for linear in shape.linears for path in linear.paths} <= paths
    # As the 4B model on the hub has it: heads, head width and vocabulary left out.
    bare = shape_from_config({"model_type": "gemma3", "text_config": {"hidden_size": 2560, "num_hidden_layers": 34}})
    assert (bare.heads, bare.kv_heads, bare.head_dim, bare.tied) == (8, 4, 256, True)


# --- hostile configs --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"model_type": "llama"}, {"model_type": "nobody"}, {"vocab_size": 5}, [], None, "llama"])
def test_configs_without_a_shape_are_refused_with_what_is_missing(config: Any) -> None:
    with pytest.raises(ModelError) as caught:
        shape_from_config(config, name="some/model")
    assert caught.value.code == "MODEL_UNSUPPORTED_ARCH"
    assert "some/model" in str(caught.value)
    if isinstance(config, dict) and config:
        assert {"hidden_size", "num_hidden_layers"} & set(caught.value.context["missing"])


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), float("inf"), 10**30, "64", True, [64], {"a": 1}])
@pytest.mark.parametrize("model_type", ["llama", "nobody", "gemma3_text"])
def test_hostile_values_are_refused_by_name(model_type: str, key: str, value: Any) -> None:
    with pytest.raises(ModelError) as caught:
        shape_from_config(LLAMA | {"model_type": model_type, key: value})
    assert caught.value.code == "MODEL_UNSUPPORTED_ARCH"
    assert key in caught.value.message
    assert len(caught.value.message) < 300


@given(st.dictionaries(st.sampled_from([*LLAMA, "head_dim", "num_experts", "layer_types", "text_config", "mlp_only_layers"]),
                       st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.booleans(), st.lists(st.integers()),
                                 st.dictionaries(st.text(), st.integers()))),
       st.sampled_from([*sorted(FAMILIES), "nobody"]))  # fmt: skip
def test_any_config_gives_a_shape_or_the_one_error(changes: dict[str, Any], model_type: str) -> None:
    try:
        shape = shape_from_config(LLAMA | changes | {"model_type": model_type})
    except ModelError as error:
        assert error.code == "MODEL_UNSUPPORTED_ARCH"
    else:
        assert shape.num_parameters > 0
        assert shape.active_parameters > 0


@pytest.mark.parametrize(
    "extra",
    [{"is_encoder_decoder": True}, {"architectures": ["BertForMaskedLM"]}, {"architectures": ["LlamaForSequenceClassification"]}],
)
def test_what_is_no_causal_language_model_is_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="causal"):
        shape_from_config(LLAMA | extra)


def test_a_missing_key_means_the_default_of_its_class() -> None:
    tied = {
        name: shape_from_config(LLAMA | {"model_type": name}).tied
        for name in ("llama", "gemma", "qwen2", "starcoder2", "smollm3")
    }
    assert tied == {"llama": False, "gemma": True, "qwen2": False, "starcoder2": True, "smollm3": True}
    # A null is not a missing key: Mistral's class has 8 key/value heads, a null means as many as heads.
    without = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"} | {"model_type": "mistral"}
    assert shape_from_config(without | {"num_attention_heads": 16}).kv_heads == 8
    assert shape_from_config(without | {"num_key_value_heads": None}).kv_heads == 4


# --- mixtures ---------------------------------------------------------------------------------------


def test_active_parameters_are_the_published_ones() -> None:
    published = {
        "mistralai/Mixtral-8x7B-v0.1": 12.9e9,
        "Qwen/Qwen3-30B-A3B": 3.3e9,
        "deepseek-ai/DeepSeek-V3": 37e9,
        "openai/gpt-oss-120b": 5.1e9,
    }
    for name, active in published.items():
        shape = known_shape(name)
        assert shape is not None
        # gpt-oss's card leaves out the embedding table, which is looked up and not multiplied.
        counted = shape.active_parameters - (shape.embedding_parameters if "gpt-oss" in name else 0)
        assert counted == pytest.approx(active, rel=0.02), name
    assert (dense := shape_from_config(LLAMA)).active_parameters == dense.num_parameters


def test_experts_per_token_may_be_listed_by_layer() -> None:
    config = odd_models.odd_config("hunyuan_v1_moe", moe_topk=[2] * 5)
    shape = shape_from_config(config.to_dict())
    require_same(odd_models.on_meta(config), shape)
    assert (shape.experts_per_token, shape.expert_share) == (2, 2 / 16)
    with pytest.raises(ModelError, match="moe_topk"):
        shape_from_config(config.to_dict() | {"moe_topk": [2, 3, 2, 2, 2]})


# --- sizes and names --------------------------------------------------------------------------------


def test_sizes_meet_their_parameters_from_ten_million_to_a_trillion() -> None:
    size = 10e6
    while size <= 1e12:
        text = f"{size / 1e6:.6f}M" if size < 1e10 else f"{size / 1e9:.6f}B"
        shape = shape_from_size(text)
        assert shape.num_parameters == pytest.approx(parameters_in(text), rel=0.005), text
        assert 2 <= shape.intermediate / shape.hidden <= 5, text
        assert shape.heads % shape.kv_heads == 0
        assert shape.certainty == "typical"
        size *= 1.02


def test_typical_shapes_are_the_published_ones() -> None:
    published = {"7B": (32, 4096, 32), "8B": (32, 4096, 8), "13B": (40, 5120, 40), "70B": (80, 8192, 8), "405B": (126, 16_384, 8)}
    for text, expected in published.items():
        shape = shape_from_size(text)
        assert (shape.layers, shape.hidden, shape.kv_heads) == expected, text
    assert shape_from_size(" 7b ").num_parameters == shape_from_size("7.0B").num_parameters


@pytest.mark.parametrize(
    "text", ["", "7", "B", "-7B", "0B", "1.5B-Instruct", "9M", "1.1T", "7KB", "nanB", "1e9B", "9" * 400 + "B", "٧B7", None, 7]
)
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        shape_from_size(text)
    assert caught.value.code == "CONFIG_INVALID_VALUE"
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("Qwen/Qwen3-0.6B-Base", "0.6B"),
        ("meta-llama/Llama-2-7b-chat-hf", "7B"),
        ("HuggingFaceTB/SmolLM2-135M", "135M"),
        ("Qwen/Qwen3-30B-A3B", "30B"),
        ("EleutherAI/pythia-1.4b-deduped", "1.4B"),
        ("bigscience/bloom-7b1", "7.1B"),
        ("openai/gpt-oss-120b", "120B"),
        ("google/gemma-2-2b-it", "2B"),
        ("mistralai/Mixtral-8x7B-v0.1", None),
        ("stabilityai/stablelm-2-1_6b", None),
        ("unsloth/model-bnb-4bit", None),
        ("microsoft/Phi-3-mini-128k-instruct", None),
        ("someone/v0.1", None),
        ("7B/model", None),
        ("gpt2", None),
        ("", None),
    ],
)
def test_sizes_in_names(name: str, size: str | None) -> None:
    assert size_in_name(name) == size


# Parameters as the model's card, paper or safetensors header states them. Language models alone for Gemma 3 4B and up (embedding
# and other parameters of arXiv:2503.19786, table 1).
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616, "meta-llama/Llama-2-13b-chat-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192, "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496, "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496, "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800, "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824, "codellama/CodeLlama-7b-hf": 6_738_546_688,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": 1_100_048_384, "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096, "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400, "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-v0.1": 140_630_071_296, "Qwen/Qwen2.5-0.5B": 494_032_768, "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688, "Qwen/Qwen2.5-Coder-7B-Instruct": 7_615_616_512, "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352, "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648, "Qwen/Qwen3-0.6B-Base": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976, "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096, "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200, "Qwen/Qwen3-32B": 32_762_123_264, "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_000_000_000, "google/gemma-2b": 2_506_172_416, "google/gemma-7b-it": 8_537_680_896,
    "google/gemma-2-2b-it": 2_614_341_888, "google/gemma-2-9b": 9_241_705_984, "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-270m": 268_098_176, "google/gemma-3-1b-it": 999_885_952, "google/gemma-3-4b-it": 3_884_000_000,
    "google/gemma-3-12b-pt": 11_771_000_000, "google/gemma-3-27b-it": 27_016_000_000, "microsoft/phi-2": 2_779_683_840,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552, "microsoft/Phi-3-mini-128k-instruct": 3_821_079_552,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552, "microsoft/Phi-3-medium-4k-instruct": 13_960_238_080,
    "microsoft/phi-4": 14_659_507_200, "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008, "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384, "HuggingFaceTB/SmolLM3-3B": 3_075_098_624, "gpt2": 124_439_808,
    "openai-community/gpt2-medium": 354_823_168, "openai-community/gpt2-large": 774_030_080,
    "openai-community/gpt2-xl": 1_557_611_200, "EleutherAI/pythia-70m": 70_426_624, "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-410m": 405_334_016, "EleutherAI/pythia-1b": 1_011_781_632, "EleutherAI/pythia-1.4b-deduped": 1_414_647_808,
    "EleutherAI/pythia-2.8b": 2_775_208_960, "EleutherAI/pythia-6.9b": 6_857_302_016, "EleutherAI/pythia-12b": 11_846_072_320,
    "EleutherAI/gpt-neox-20b": 20_554_567_680, "EleutherAI/gpt-j-6b": 6_053_381_344, "facebook/opt-125m": 125_239_296,
    "facebook/opt-350m": 331_196_416, "facebook/opt-1.3b": 1_315_758_080, "facebook/opt-2.7b": 2_651_596_800,
    "facebook/opt-6.7b": 6_658_473_984, "facebook/opt-13b": 12_853_473_280, "facebook/opt-30b": 29_974_540_288,
    "bigscience/bloom-560m": 559_214_592, "bigscience/bloom-7b1": 7_069_016_064, "tiiuae/falcon-7b-instruct": 6_921_720_704,
    "tiiuae/falcon-40b": 41_303_293_952, "state-spaces/mamba-130m-hf": 129_135_360, "state-spaces/mamba-2.8b-hf": 2_768_345_600,
    "deepseek-ai/DeepSeek-V3": 671_026_404_352, "openai/gpt-oss-20b": 20_914_757_184, "openai/gpt-oss-120b": 116_829_156_672,
    "mistralai/Mistral-7B-v0.2": 7_241_732_096,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_models_have_their_published_parameters(name: str) -> None:
    shape = known_shape(name)
    assert shape is not None
    assert shape.num_parameters == pytest.approx(PUBLISHED[name], rel=0.01)
    assert name in shape.source
    loud = known_shape(name.upper())
    assert loud is not None
    assert replace(loud, name=shape.name, source=shape.source) == shape


def test_every_known_model_is_held_against_a_published_count() -> None:
    counted = {json.dumps(strip(known_shape(name))) for name in PUBLISHED}
    assert {name for name in KNOWN if json.dumps(strip(known_shape(name))) not in counted} == set()
    assert len(KNOWN) >= 60


def strip(shape: ModelShape | None) -> list[Any]:
    assert shape is not None
    return [shape.model_type, shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.vocab, shape.num_parameters]


@pytest.mark.parametrize("name", ["", "nobody/nothing", "someone/Llama-2-7b-hf-my-merge", "meta-llama/Llama-2-7b/../x", "qwen3"])
def test_other_names_are_not_known(name: str) -> None:
    assert known_shape(name) is None


def test_the_last_part_of_a_name_and_mirrors_are_enough() -> None:
    reference = known_shape("meta-llama/Meta-Llama-3-8B")
    for name in ("Meta-Llama-3-8B", "unsloth/llama-3-8b-Instruct-bnb-4bit", "NousResearch/Meta-Llama-3-8B"):
        shape = known_shape(name)
        assert shape is not None and reference is not None
        assert shape.linears == reference.linears, name


# --- cache ------------------------------------------------------------------------------------------


def cached_values(cache: Any) -> int:
    """Floating-point numbers that transformers' cache object holds, whatever it calls them."""

    def numbers(held: Any) -> int:
        if isinstance(held, torch.Tensor):
            return held.numel() if held.is_floating_point() else 0
        if isinstance(held, dict):
            return sum(map(numbers, held.values()))
        return sum(map(numbers, held)) if isinstance(held, list | tuple) else 0

    layers = sum(numbers(value) for layer in cache.layers for value in vars(layer).values())
    return layers + numbers(getattr(cache, "linear_cache", []))  # MiniMax keeps its states beside the layers


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - {"openai-gpt"}))
def test_the_cache_is_as_large_as_the_real_one(model_type: str) -> None:
    from transformers import AutoModelForCausalLM

    changes = {"use_sliding_window": True, "max_window_layers": 2}
    known = odd_models.fields(model_type)
    config = odd_models.odd_config(model_type, **{k: v for k, v in changes.items() if k in known})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    shape = shape_from_config(config.to_dict())
    for num_tokens in (7, 40):  # below and above the window of 16
        with torch.no_grad():
            out = model(input_ids=torch.randint(1, 200, (1, num_tokens)), use_cache=True)
        cache = out.past_key_values if getattr(out, "past_key_values", None) is not None else out.cache_params
        assert kv_cache_bytes(shape, num_tokens, 4) == 4 * cached_values(cache), num_tokens


@pytest.mark.parametrize(
    ("change", "width"), [({"new_decoder_architecture": True}, 6), ({"multi_query": False, "num_kv_heads": None}, 6), ({}, 1)]
)
def test_falcon_caches_what_it_repeats(change: dict[str, Any], width: int) -> None:
    from transformers import AutoModelForCausalLM

    config = odd_models.odd_config("falcon", **change)
    with torch.no_grad():
        out = AutoModelForCausalLM.from_config(config).eval()(input_ids=torch.ones(1, 7, dtype=torch.long), use_cache=True)
    shape = shape_from_config(config.to_dict())
    assert kv_cache_bytes(shape, 7, 1) == cached_values(out.past_key_values) == 7 * 5 * 2 * width * 16


def test_bytes_per_token() -> None:
    llama2, llama3 = known_shape("meta-llama/Llama-2-7b-hf"), known_shape("meta-llama/Meta-Llama-3-8B")
    assert llama2 is not None and llama3 is not None
    # 2 x 32 layers x 32 heads x 128 x 2 bytes: half a MiB per token, the figure of the PagedAttention paper's kind.
    assert kv_bytes_per_token(llama2, 2) == 524_288
    assert kv_bytes_per_token(llama3, 2) == 131_072
    gemma = known_shape("google/gemma-3-1b-it")
    assert gemma is not None
    assert kv_bytes_per_token(gemma, 2, num_tokens=512) == pytest.approx(kv_bytes_per_token(gemma, 2), rel=0.01)
    assert kv_bytes_per_token(gemma, 2, num_tokens=32_768) < kv_bytes_per_token(gemma, 2) / 5
    mamba = known_shape("state-spaces/mamba-130m-hf")
    assert mamba is not None
    assert kv_bytes_per_token(mamba, 2) == 0
    assert kv_cache_bytes(mamba, 10, 2) == kv_cache_bytes(mamba, 10_000, 2) == 24 * 1536 * (16 + 4) * 2


@pytest.mark.parametrize(("num_tokens", "size"), [(-1, 2), (5, -1), (5, math.nan), (5, math.inf)])
def test_a_cache_of_nonsense_is_refused(num_tokens: int, size: float) -> None:
    with pytest.raises(ValueError, match="negative"):
        kv_cache_bytes(shape_from_config(LLAMA), num_tokens, size)


# --- purity -----------------------------------------------------------------------------------------


def test_shapes_need_no_torch_and_little_time() -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from finetuneflow.knowledge.shapes import known_shape, shape_from_size\n"
        "known_shape('Qwen/Qwen3-8B'); known_shape('deepseek-ai/DeepSeek-V3'); shape_from_size('7B')\n"
        "print(sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_more_of_anything_never_counts_less() -> None:
    rng = random.Random(7)
    base = shape_from_config(LLAMA)
    for key, factor in itertools.product(("num_hidden_layers", "intermediate_size", "vocab_size"), (2, 3)):
        grown = shape_from_config(LLAMA | {key: int(LLAMA[key]) * factor + rng.randrange(3)})
        assert grown.num_parameters > base.num_parameters
