"""Every supported family loads, takes each kind of adapter, trains all of it, and comes back from disk the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, save_tiny, tiny_model

from finetuneflow.kernels import nf4
from finetuneflow.models.adapters import AdapterSpec, attach_adapter, save_adapter, trainable_parameters
from finetuneflow.models.load import load_base, load_with_adapters, merged_copy

KINDS = ("lora", "dora", "rslora", "ia3", "prefix")
IDS = torch.randint(4, 300, (2, 14), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hidden width 64: one block of NF4, and a multiple of every head count."""
    root = tmp_path_factory.mktemp("tiny")
    return {name: save_tiny(root / name, name, hidden=64) for name in ARCHITECTURES}


def load(folder: Path, **options: Any) -> Any:
    return load_base(str(folder), **{"dtype": "fp32", "device": "cpu"} | options)


def train(model: Any, *, steps: int = 2) -> list[str]:
    """Take some steps; returns the trainable parameters that did not move."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_moves_every_lora_weight_and_the_adapter_survives_the_disk(
    folders: dict[str, Path], tmp_path: Path, architecture: str, targets: str
) -> None:
    torch.manual_seed(0)
    base = load(folders[architecture])
    untouched = logits(base.model)
    model = attach_adapter(base.model, AdapterSpec(r=4, alpha=8, dropout=0.0, target_modules=targets))
    torch.testing.assert_close(logits(model), untouched, msg="a fresh adapter must change nothing")
    assert train(model) == []
    trained = logits(model)
    assert not torch.allclose(trained, untouched, atol=1e-3)
    save_adapter(model, tmp_path)
    again = load_with_adapters(str(folders[architecture]), {"default": tmp_path}, dtype="fp32", device="cpu")
    torch.testing.assert_close(logits(again.model), trained)
    merged = merged_copy(str(folders[architecture]), tmp_path, dtype="fp32", device="cpu")
    torch.testing.assert_close(logits(merged.model), trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox"])
def test_each_kind_of_adapter_trains_generates_and_survives_the_disk(
    folders: dict[str, Path], tmp_path: Path, architecture: str, kind: Any
) -> None:
    torch.manual_seed(0)
    model = attach_adapter(
        load(folders[architecture]).model, AdapterSpec(kind=kind, r=4, alpha=8, dropout=0.0, num_virtual_tokens=5)
    )
    assert train(model) == []
    trained = logits(model)
    save_adapter(model, tmp_path)
    again = load_with_adapters(str(folders[architecture]), {"default": tmp_path}, dtype="fp32", device="cpu").model
    torch.testing.assert_close(logits(again), trained)
    generated = again.generate(input_ids=IDS[:1], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert generated.shape == (1, IDS.shape[1] + 5)
    assert int(generated[0, IDS.shape[1]]) == int(trained[0, -1].argmax()) or kind == "prefix"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_fine_tuning_moves_every_weight(folders: dict[str, Path], architecture: str) -> None:
    model = attach_adapter(load(folders[architecture]).model, AdapterSpec(kind="full"))
    still = train(model)
    assert still == []


@pytest.mark.parametrize("use_cache", [True, False])
def test_prefix_tuning_learns_with_padding_and_partly_masked_labels(folders: dict[str, Path], use_cache: bool) -> None:
    torch.manual_seed(0)
    model = attach_adapter(load(folders["llama"]).model, AdapterSpec(kind="prefix", num_virtual_tokens=8))
    model.config.use_cache = use_cache  # as the trainer sets it: the prefix must not be lost with the cache
    mask, labels = torch.ones_like(IDS), IDS.clone()
    mask[1, 9:], labels[1, 9:], labels[:, :4] = 0, -100, -100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(25):
        loss = model(input_ids=IDS, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_no_adapter_lands_on_the_weights_that_mamba_reads_directly(folders: dict[str, Path]) -> None:
    model = attach_adapter(load(folders["mamba"]).model, AdapterSpec(target_modules="all-linear"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not any("dt_proj" in name or "out_proj" in name for name in trained)


# --- quantised bases ------------------------------------------------------------------------------


def quantized_layers(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")}


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mamba", "phi3", "gemma2"])
def test_qlora_trains_on_the_cpu(folders: dict[str, Path], tmp_path: Path, architecture: str, quantize: Any) -> None:
    torch.manual_seed(0)
    base = load(folders[architecture], quantize=quantize)
    assert quantized_layers(base.model)
    assert base.facts.num_parameters == load(folders[architecture]).facts.num_parameters, "a packed weight counts as one"
    model = attach_adapter(base.model, AdapterSpec(kind="qlora", r=4, alpha=8, dropout=0.0))
    assert train(model) == []
    trained = logits(model)
    save_adapter(model, tmp_path)
    again = load_with_adapters(str(folders[architecture]), {"default": tmp_path}, quantize=quantize, dtype="fp32", device="cpu")
    torch.testing.assert_close(logits(again.model), trained, atol=2e-3, rtol=2e-3)


def test_what_a_quantised_base_keeps_unquantised_stays_in_its_type_unless_that_is_fp16(folders: dict[str, Path]) -> None:
    def frozen_types(model: Any) -> set[torch.dtype]:
        adapted = attach_adapter(model, AdapterSpec(kind="qlora"))
        return {p.dtype for p in adapted.parameters() if not p.requires_grad and p.is_floating_point()}

    base = load(folders["llama"], quantize="nf4", dtype="bf16")
    assert frozen_types(base.model) == {torch.float32 if base.facts.dtype == "fp32" else torch.bfloat16}  # no bf16 on every CPU
    half = tiny_model("llama").half()
    half.is_loaded_in_8bit = True
    assert frozen_types(half) == {torch.float32}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_quantised_weights_are_those_of_our_nf4_reference(folders: dict[str, Path], architecture: str, double: bool) -> None:
    import bitsandbytes.functional as bnb

    full = load(folders[architecture]).model
    layers = quantized_layers(load(folders[architecture], quantize="nf4", double_quant=double).model)
    assert len(layers) == {"llama": 14, "gpt2": 8}[architecture]
    for name, layer in layers.items():
        weight = full.get_submodule(name).weight.detach()
        weight = weight.T.contiguous() if architecture == "gpt2" else weight  # Conv1D keeps input × output
        ours = nf4.dequantize(nf4.quantize(weight, double=double))
        theirs = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        errors = [float((rounded - weight).abs().mean() / weight.std()) for rounded in (ours, theirs)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-4)
        apart = (ours - theirs).abs() > 2e-5
        assert apart.float().mean() < (0.02 if double else 1e-4), "only ties differ; a tie of a constant moves its block of 64"
        assert 0.06 < errors[1] < 0.09, "the error NF4 has on normal weights, 0.073 deviations"


def test_an_evaluation_leaves_4_bit_weights_as_they_are(folders: dict[str, Path]) -> None:
    """bitsandbytes repacks them in place on some CPUs; what is dequantised or merged afterwards is then garbage."""
    import bitsandbytes.functional as bnb

    model = load(folders["llama"], quantize="nf4").model
    layer = next(iter(quantized_layers(model).values()))
    before = layer.weight.data.clone()
    weights = bnb.dequantize_4bit(before, layer.weight.quant_state)
    first = logits(model)
    assert torch.equal(layer.weight.data, before)
    assert torch.equal(bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state), weights)
    torch.testing.assert_close(logits(model.train()), first)


def test_a_qlora_adapter_merges_into_a_fresh_full_precision_base_even_after_evaluations(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = attach_adapter(load(folders["llama"], quantize="nf4").model, AdapterSpec(kind="qlora", r=4, alpha=8, dropout=0.0))
    logits(model)
    train(model, steps=4)
    logits(model)
    save_adapter(model, tmp_path)
    merged = merged_copy(str(folders["llama"]), tmp_path, dtype="fp32", device="cpu").model
    beside = load_with_adapters(str(folders["llama"]), {"default": tmp_path}, dtype="fp32", device="cpu").model
    torch.testing.assert_close(logits(merged), logits(beside), atol=1e-5, rtol=1e-5)
    distance = (logits(merged) - logits(model)).abs().mean()
    assert distance < 0.3 * logits(merged).std(), "what differs is the base's rounding to 4 bits"
    assert not quantized_layers(merged)
    assert trainable_parameters(merged).total == load(folders["llama"]).facts.num_parameters


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ia3_goes_on_every_linear_layer_too(folders: dict[str, Path], architecture: str) -> None:
    model = attach_adapter(load(folders[architecture]).model, AdapterSpec(kind="ia3", target_modules="all-linear"))
    assert trainable_parameters(model).trainable > 0
