"""Where adapters go and what they train, against PEFT's own tables and the parameters it attaches."""

from __future__ import annotations

from typing import Any

import odd_models
import pytest
import torch

from finetuneflow.config import Method
from finetuneflow.errors import ModelError
from finetuneflow.knowledge.shapes import (
    adapter_parameters,
    known_shape,
    shape_from_config,
    shape_from_size,
    target_linears,
)
from finetuneflow.knowledge.shapes.families import FAMILIES
from finetuneflow.knowledge.shapes.targets import (
    FUSED_EXPERTS,
    IA3_FEEDFORWARD,
    IA3_TARGETS,
    LORA_TARGETS,
    STATE_SPACE_TARGETS,
    trains_fused_experts,
)
from finetuneflow.models import targets as engine
from finetuneflow.models.adapters import AdapterSpec, attach_adapter, trainable_parameters


def plain(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value if isinstance(value, str) else list(value) for key, value in table.items()}


def test_the_tables_are_peft_s() -> None:
    from peft.utils import constants

    assert plain(LORA_TARGETS) == constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert plain(IA3_TARGETS) == constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    assert plain(IA3_FEEDFORWARD) == constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert STATE_SPACE_TARGETS == engine.STATE_SPACE_TARGETS


def test_the_moves_onto_fused_experts_are_peft_s() -> None:
    from peft.utils import transformers_weight_conversion as conversion

    real = {
        model_type: {old: new.removesuffix(".weight") for old, new in conversion._MOE_TARGET_MODULE_MAPPING[style].items()}
        for model_type, style in conversion._MODEL_TO_CONVERSION_PATTERN.items()
        if style in conversion._MOE_TARGET_MODULE_MAPPING and model_type.islower()  # the others are names of classes
    }
    assert real == FUSED_EXPERTS


# ctrl's layers are numbered like its feed-forward parts, and PEFT takes one for the other; embed_out and embed_in of
# gpt_neox_japanese are tied in a way that PEFT does not see.
METHODS: list[dict[str, Any]] = [
    {"kind": "lora", "r": 3},
    {"kind": "lora", "r": 3, "target_modules": "all-linear"},
    {"kind": "dora", "r": 2},
    {"kind": "ia3"},
    {"kind": "full"},
    {"kind": "lora", "r": 2, "modules_to_save": ["head"]},
    {"kind": "lora", "r": 2, "modules_to_save": ["embedding"]},
    {"kind": "lora", "r": 2, "modules_to_save": ["head", "embedding"]},
    {"kind": "prefix", "num_virtual_tokens": 3},
]


def attached(config: Any, settings: dict[str, Any]) -> int:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    return trainable_parameters(attach_adapter(model, AdapterSpec(**settings, dropout=0.0))).trainable


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - {"ctrl"}))
def test_the_trained_parameters_are_peft_s(model_type: str) -> None:
    config = odd_models.odd_config(model_type)
    shape = shape_from_config(config.to_dict())
    names = {"head": shape.head_name, "embedding": shape.embedding_name}
    compared = 0
    for method in METHODS:
        saved = [names[name] for name in method.get("modules_to_save", ())]
        settings = method | ({"modules_to_save": saved} if saved else {})
        if model_type == "gpt_neox_japanese" and len(saved) == 2:
            continue
        try:
            computed = adapter_parameters(shape, Method(**settings, dropout=0.0))
        except ModelError as error:
            assert error.code == "ADAPTER_UNSUPPORTED"
            assert method["kind"] in ("prefix", "dora"), error.message
            with pytest.raises((ModelError, RuntimeError, ValueError)):
                one_step(config, settings)
            continue
        assert computed == attached(config, settings), settings
        compared += 1
    assert compared >= 6


def one_step(config: Any, settings: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    adapted = attach_adapter(AutoModelForCausalLM.from_config(config), AdapterSpec(**settings, dropout=0.0))
    ids = torch.randint(1, 200, (2, 9))
    adapted(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize(
    "wanted", [["q_proj"], ["q_proj", "o_proj", "down_proj"], "down_proj", r".*\.[13]\.self_attn\.v_proj", r".*mlp\.\w+_proj"]
)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gpt2", "deepseek_v3", "qwen3_moe"])
def test_names_and_patterns_reach_the_layers_that_peft_finds(model_type: str, wanted: Any) -> None:
    config = odd_models.odd_config(model_type)
    shape = shape_from_config(config.to_dict())
    settings = {"kind": "lora", "r": 3, "target_modules": wanted}
    try:
        computed = adapter_parameters(shape, Method(**settings, dropout=0.0))
    except ModelError as error:
        with pytest.raises(ModelError) as caught:
            attached(config, settings)
        assert caught.value.code == error.code
    else:
        assert computed == attached(config, settings)


def test_a_pattern_keeps_only_its_layers() -> None:
    shape = shape_from_config(odd_models.odd_config("llama").to_dict())
    (found,) = target_linears(shape, r".*\.[13]\.self_attn\.v_proj")
    assert (found.count, found.layer_indices) == (2, (1, 3))


@pytest.mark.parametrize(
    ("wanted", "code"),
    [
        (["q_prj"], "ADAPTER_TARGET_MISSING"),
        (["q_proj", "nothing"], "ADAPTER_TARGET_MISSING"),
        ("no.such.*", "ADAPTER_TARGET_MISSING"),
        ("(", "ADAPTER_TARGET_MISSING"),
        (["lm_head"], "ADAPTER_TARGET_HEAD"),
    ],
)
def test_names_that_fit_nothing_are_refused(wanted: Any, code: str) -> None:
    with pytest.raises(ModelError) as caught:
        target_linears(shape_from_size("7B"), wanted)
    assert caught.value.code == code
    if wanted == ["q_prj"]:
        assert "q_proj" in caught.value.message


def test_saved_layers_get_no_adapter_and_count_in_full() -> None:
    shape = shape_from_size("7B")
    method = Method(r=4, target_modules="all-linear", modules_to_save=["down_proj"])
    down = next(linear for linear in shape.linears if linear.name == "down_proj")
    without = Method(r=4, target_modules=[linear.name for linear in shape.linears if linear.name != "down_proj"])
    assert adapter_parameters(shape, method) == adapter_parameters(shape, without) + down.num_parameters
    with pytest.raises(ModelError) as caught:
        adapter_parameters(shape, Method(modules_to_save=["nothing"]))
    assert caught.value.code == "ADAPTER_TARGET_MISSING"


def test_published_counts_of_trained_parameters() -> None:
    """The LoRA paper (arXiv:2106.09685, section 4.2): GPT-3 with r 4 on queries and values alone, 96 layers of 12,288: 18.9M."""
    gpt3 = {
        "model_type": "llama",
        "hidden_size": 12_288,
        "num_hidden_layers": 96,
        "num_attention_heads": 96,
        "vocab_size": 50_257,
    }
    shape = shape_from_config(gpt3 | {"num_key_value_heads": 96, "intermediate_size": 4 * 12_288})
    assert adapter_parameters(shape, Method(r=4)) == pytest.approx(18.9e6, rel=0.01)
    # alpaca-lora's log: 7B, r 8 on q and v: "trainable params: 4194304".
    llama = known_shape("meta-llama/Llama-2-7b-hf")
    assert llama is not None
    assert adapter_parameters(llama, Method(r=8)) == 4_194_304
    assert adapter_parameters(llama, Method(kind="qlora", r=8)) == 4_194_304


def test_fused_experts_are_noticed() -> None:
    experts = shape_from_config(odd_models.odd_config("deepseek_v3").to_dict())
    assert trains_fused_experts(experts, Method(target_modules="all-linear"))
    assert not trains_fused_experts(experts, Method(target_modules=["q_a_proj"]))
    assert not trains_fused_experts(experts, Method(kind="ia3", target_modules="all-linear"))
    assert not trains_fused_experts(shape_from_size("7B"), Method(target_modules="all-linear"))
    with pytest.raises(ModelError) as caught:
        target_linears(experts, ["gate_proj", "q_a_proj"])
    assert caught.value.code == "ADAPTER_UNSUPPORTED"
