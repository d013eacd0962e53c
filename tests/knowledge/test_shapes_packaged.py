"""Shapes of our own architecture, held against the model itself; and shapes of unknown ones, from headers alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuneflow.config import Method
from finetuneflow.errors import ModelError
from finetuneflow.knowledge.memory import Workload
from finetuneflow.knowledge.memory_phases import NF4_BITS, weight_bytes
from finetuneflow.knowledge.shapes import adapter_parameters, kv_cache_bytes, shape_from_config, target_linears
from finetuneflow.knowledge.shapes.headers import shape_from_tensors
from finetuneflow.knowledge.shapes.packaged import PACKAGED_DEFAULTS
from finetuneflow.models import own
from finetuneflow.models.adapters import AdapterSpec, attach_adapter, trainable_parameters
from finetuneflow.models.load import load_base
from finetuneflow.models.new import new_model
from finetuneflow.planning.base_model import look_at_model, tensor_shapes
from knowledge.test_memory_estimate import parts_of_tiny, predicted_saved, saved_on_the_plain_path
from models.tiny import save_tiny, tiny_model

# Parameters of the published checkpoints, and what they were made with besides the original's default sizes.
PUBLISHED, OF_PUBLISHED = 124_104_719, {"max_seq_len": 1024, "learn_lambda": False}
ODD = {"vocab_size": 203, "d_model": 48, "n_layers": 3, "d_state": 5, "d_conv": 3, "max_seq_len": 70, "dense_hidden_dim": 56}
VARIANTS = [
    {"layout": layout, "tie_word_embeddings": tied, "learn_lambda": scaled, "expand": expand}
    for layout, tied, scaled, expand in itertools.product(("simplified", "selective"), (True, False), (True, False), (2, 3))
]


def mamba_swelu(**settings: Any) -> tuple[Any, dict[str, Any]]:
    """The model on the meta device, and what its config.json would hold."""
    from transformers import AutoConfig, AutoModelForCausalLM

    own.provide_built_in("mamba_swelu")
    config = AutoConfig.for_model("mamba_swelu", **settings)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config), config.to_dict()


def test_the_published_sizes_have_the_published_number_of_parameters() -> None:
    model, _ = mamba_swelu(**OF_PUBLISHED)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED
    named = {"model_type": "mamba_swelu", "d_model": 1024, "n_layers": 6}  # the rest by the defaults of the class
    assert shape_from_config(named | OF_PUBLISHED).num_parameters == PUBLISHED


def test_a_missing_key_means_what_the_configuration_class_takes() -> None:
    _, config = mamba_swelu()
    assert {key: config[key] for key in PACKAGED_DEFAULTS["mamba_swelu"]} == PACKAGED_DEFAULTS["mamba_swelu"]


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_every_layer_and_the_total_are_those_of_mamba_swelu(change: dict[str, Any]) -> None:
    model, config = mamba_swelu(**ODD, **change)
    shape = shape_from_config(config)
    head = model.get_output_embeddings()
    real = {
        path: (module.in_features, module.out_features, module.bias is not None)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    assert {path: (t.inputs, t.outputs, t.bias) for t in shape.linears for path in t.paths} == real
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.embedding_parameters == model.get_input_embeddings().weight.numel()
    assert shape.max_position == 70 and shape.certainty == "exact"


@pytest.mark.parametrize("layout", ["simplified", "selective"])
@pytest.mark.parametrize("targets", ["auto", "all-linear", ["in_proj", "dense2"]])
def test_adapters_count_as_peft_counts_them_and_every_one_gets_a_gradient(layout: str, targets: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    own.provide_built_in("mamba_swelu")
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba_swelu", **ODD, layout=layout)
    model = attach_adapter(AutoModelForCausalLM.from_config(config), AdapterSpec(r=3, dropout=0.0, target_modules=targets))
    shape = shape_from_config(config.to_dict())
    assert adapter_parameters(shape, Method(r=3, target_modules=targets)) == trainable_parameters(model).trainable
    ids = torch.arange(3, 15).reshape(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    adapted = {name: p for name, p in model.named_parameters() if ".lora_B." in name}
    assert adapted and all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.values())


def test_unused_projections_are_no_target_by_name_either() -> None:
    model, config = mamba_swelu(**ODD)
    with pytest.raises(ModelError) as caught:
        attach_adapter(model, AdapterSpec(target_modules=["dt_proj"]))
    assert caught.value.code == "ADAPTER_TARGET_MISSING"
    with pytest.raises(ModelError) as caught:
        target_linears(shape_from_config(config), ["dt_proj"])
    assert caught.value.code == "ADAPTER_TARGET_MISSING"


@pytest.mark.parametrize("layout", ["simplified", "selective"])
def test_the_state_of_mamba_swelu_is_as_large_as_the_real_one(layout: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    own.provide_built_in("mamba_swelu")
    config = AutoConfig.for_model("mamba_swelu", **ODD, layout=layout)
    with torch.no_grad():
        cache = AutoModelForCausalLM.from_config(config).eval()(input_ids=torch.ones(1, 9, dtype=torch.long)).cache_params
    held = sum(t.numel() for layer in cache.layers for t in (layer.conv, layer.ssm) if t is not None)
    shape = shape_from_config(config.to_dict())
    assert kv_cache_bytes(shape, 9, 4) == kv_cache_bytes(shape, 60, 4) == 4 * held


LORA, FULL = Method(kind="lora", r=8, target_modules="all-linear"), Method(kind="full")


@pytest.mark.parametrize("layout", ["simplified", "selective"])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_activations_of_mamba_swelu_are_near_what_autograd_keeps(
    layout: str, autocast: bool, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    from knowledge import test_memory_estimate

    sizes = {"vocab_size": 500, "d_model": 128, "n_layers": 4, "dense_hidden_dim": 256, "max_seq_len": 128, "layout": layout}
    own.provide_built_in("mamba_swelu")
    monkeypatch.setitem(test_memory_estimate.CONFIGS, "mamba_swelu", sizes)
    model = _trainable(sizes, method, autocast=autocast)
    work = Workload(test_memory_estimate.BATCH, test_memory_estimate.TOKENS)
    parts = parts_of_tiny("mamba_swelu", method, autocast=autocast, speed="reference", work=work)
    assert predicted_saved(parts) == pytest.approx(saved_on_the_plain_path(model, autocast=autocast), rel=0.1)


def _trainable(sizes: dict[str, Any], method: Method, *, autocast: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba_swelu", **sizes))
    if method.kind == "full":
        return model.train()
    spec = AdapterSpec(r=method.r, dropout=method.dropout, target_modules=method.target_modules)
    return attach_adapter(model.to(torch.bfloat16 if autocast else torch.float32), spec).train()


def test_weights_of_mamba_swelu_in_four_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    new_model("mamba_swelu", tmp_path / "base", settings={"d_model": 64, "n_layers": 2, "dense_hidden_dim": 128})
    packed = load_base(str(tmp_path / "base"), dtype="fp32", quantize="nf4", device="cpu").model
    stored = sum(p.numel() * p.element_size() for p in packed.parameters() if p.dtype is torch.uint8)
    rest = sum(p.numel() * p.element_size() for p in packed.parameters() if p.dtype is not torch.uint8)
    predicted = weight_bytes(look_at_model(str(tmp_path / "base")).shape, "float32", quantize="nf4")
    constants = predicted.pop("quantization_constants")
    assert sum(predicted.values()) == stored + rest
    assert constants == pytest.approx(2 * stored * (NF4_BITS[True] - 4) / 8, rel=0.01)


# --- architectures that are not known ------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "phi", "gpt_neox", "mamba"])
def test_headers_tell_the_parameters_and_the_linear_layers_of_any_model(tmp_path: Path, architecture: str) -> None:
    """Known families under an unknown name: what is read from the tensors must be what the model is made of."""
    folder = save_tiny(tmp_path / architecture, architecture)
    model = tiny_model(architecture)
    head = model.get_output_embeddings()
    real = {
        path: (module.in_features, module.out_features, module.bias is not None)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    shape = shape_from_tensors(model.config.to_dict() | {"model_type": "mine"}, tensor_shapes(folder))
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert {path: (t.inputs, t.outputs, t.bias) for t in shape.linears for path in t.paths} == real
    assert (shape.vocab, shape.layers, shape.hidden) == (512, 2, 48)
    assert shape.tied == (head.weight is model.get_input_embeddings().weight)


def test_tensors_without_a_table_and_statements_that_are_no_numbers_are_refused() -> None:
    config = {"model_type": "mine", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 20}
    with pytest.raises(ModelError, match="table of tokens"):
        shape_from_tensors(config, {"layers.0.proj.weight": (8, 8)})
    tensors = {"embed.weight": (20, 8), "layers.0.proj.weight": (8, 8)}
    assert shape_from_tensors(config, tensors, stated={"state_values": 5}).state_values == 5
    for stated in ({"state_values": "5"}, {"state_values": -1}, {"state_values": True}, {"certainty": 3}):
        with pytest.raises(ModelError):
            shape_from_tensors(config, tensors, stated=stated)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\x05\0\0\0\0\0\0\0[1,2]", b"\x02\0\0\0\0\0\0\0{}", b"\x40\0\0\0\0\0\0\0{"]
)
def test_damaged_headers_tell_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert tensor_shapes(tmp_path) == {}
