"""The LoRA reference does what the papers say and equals PEFT, number for number."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetuneflow.kernels.lora import (
    LoRALinear,
    apply_lora,
    count_parameters,
    load_peft_state_dict,
    lora_layers,
    to_peft_state_dict,
)
from models.tiny import tiny_model

TARGETS = ("q_proj", "v_proj", "down_proj")
EXACT = {"atol": 1e-6, "rtol": 1e-6}


def layer(*, r: int = 4, alpha: float = 8, dropout: float = 0.0, rslora: bool = False, seed: int = 0) -> LoRALinear:
    torch.manual_seed(seed)
    made = LoRALinear(nn.Linear(24, 16), r, alpha, dropout, rslora=rslora)
    nn.init.normal_(made.lora_B)
    return made


def peft_model(base: Any, *, rslora: bool = False) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=12, lora_dropout=0.0, target_modules=list(TARGETS), use_rslora=rslora, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def pair(tmp_path: Path, *, rslora: bool = False) -> tuple[Any, Any]:
    """The same adapter on the same base: PEFT's, written to its file, and ours, read from it."""
    theirs = peft_model(tiny_model("llama"), rslora=rslora)
    theirs.save_pretrained(tmp_path)
    ours = tiny_model("llama")
    apply_lora(ours, TARGETS, r=4, alpha=12, rslora=rslora)
    load_peft_state_dict(ours, load_file(tmp_path / "adapter_model.safetensors"))
    return ours, theirs


@pytest.mark.parametrize("rslora", [False, True])
def test_logits_and_gradients_equal_those_of_peft(tmp_path: Path, rslora: bool) -> None:
    ours, theirs = pair(tmp_path, rslora=rslora)
    ids = torch.randint(4, 300, (2, 17), generator=torch.Generator().manual_seed(1))
    results = [model(input_ids=ids, labels=ids) for model in (ours, theirs)]
    torch.testing.assert_close(results[0].logits, results[1].logits, **EXACT)
    for result in results:
        result.loss.backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(their_gradients) == 2 * len(lora_layers(ours)) == 12
    for path, ours_layer in lora_layers(ours).items():
        for part, ours_gradient in (("lora_A", ours_layer.lora_A.grad), ("lora_B", ours_layer.lora_B.grad)):
            torch.testing.assert_close(ours_gradient, their_gradients[f"base_model.model.{path}.{part}.default.weight"], **EXACT)


def test_merged_weights_equal_those_of_peft(tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path)
    merged = theirs.merge_and_unload().state_dict()
    for path, ours_layer in lora_layers(ours).items():
        ours_layer.merge()
        torch.testing.assert_close(ours_layer.base.weight, merged[f"{path}.weight"], **EXACT)


def test_peft_reads_an_adapter_we_wrote(tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path)
    for ours_layer in lora_layers(ours).values():
        nn.init.normal_(ours_layer.lora_B, std=0.3)
    save_file(to_peft_state_dict(ours), tmp_path / "adapter_model.safetensors")
    from peft import PeftModel

    read_back = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    ids = torch.arange(5, 25).unsqueeze(0)
    torch.testing.assert_close(read_back(ids).logits, ours(ids).logits, **EXACT)
    assert not torch.allclose(read_back(ids).logits, theirs(ids).logits, atol=1e-3)


def test_a_foreign_state_dict_is_refused() -> None:
    ours = tiny_model("llama")
    apply_lora(ours, ["q_proj"], r=4, alpha=8)
    state = to_peft_state_dict(ours)
    state["base_model.model.surplus.lora_A.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="surplus"):
        load_peft_state_dict(ours, state)


def test_a_fresh_layer_answers_as_its_base() -> None:
    torch.manual_seed(0)
    base = nn.Linear(24, 16)
    x = torch.randn(3, 24)
    expected = base(x)
    assert torch.equal(LoRALinear(base, 4, 8)(x), expected)


def test_the_forward_pass_is_the_formula() -> None:
    made, x = layer(), torch.randn(5, 24)
    weight = made.base.weight + (8 / 4) * made.lora_B @ made.lora_A
    torch.testing.assert_close(made(x), x @ weight.T + made.base.bias)


def test_a_starts_kaiming_uniform_and_b_at_zero() -> None:
    torch.manual_seed(0)
    made = LoRALinear(nn.Linear(400, 8), 64, 64)
    bound = 1 / math.sqrt(400)  # √(6 / ((1 + a²)·fan_in)) with a = √5
    assert made.lora_A.abs().max() <= bound
    assert made.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not made.lora_B.any()


@pytest.mark.parametrize(("rslora", "expected"), [(False, 32 / 16), (True, 32 / 4)])
def test_scaling_is_alpha_over_r_or_over_its_root(rslora: bool, expected: float) -> None:
    assert layer(r=16, alpha=32, rslora=rslora).scaling == expected


def test_merge_and_unmerge_round_trip_and_are_idempotent() -> None:
    made, x = layer(), torch.randn(5, 24)
    weight, expected = made.base.weight.clone(), made(x)
    made.merge()
    made.merge()
    torch.testing.assert_close(made(x), expected)
    assert not torch.allclose(made.base.weight, weight)
    made.unmerge()
    made.unmerge()
    torch.testing.assert_close(made.base.weight, weight)
    torch.testing.assert_close(made(x), expected)


def test_dropout_touches_the_adapter_path_only_and_only_in_training() -> None:
    made, x = layer(dropout=0.5), torch.randn(2000, 24)
    base, full = made.base(x), made.eval()(x)
    torch.manual_seed(0)
    dropped = made.train()(x)
    assert not torch.equal(dropped, full)
    nn.init.zeros_(made.lora_B)
    assert torch.equal(made(x), base), "with B at zero, dropout must leave no trace"
    torch.testing.assert_close((dropped - base).mean(0), (full - base).mean(0), atol=0.5, rtol=0.1)


def test_only_the_adapter_trains_and_counts_match_the_formula() -> None:
    model = tiny_model("llama", hidden=48, layers=2)
    total = sum(p.numel() for p in model.parameters())
    paths = apply_lora(model, ["q_proj", "down_proj"], r=4, alpha=8)
    counts = count_parameters(model)
    assert len(paths) == 4
    assert counts.trainable == 2 * (4 * (48 + 48) + 4 * (96 + 48))
    assert counts.frozen == total


def test_the_chapter_example_has_its_printed_counts() -> None:
    """768 × 768 at rank 8: 12,288 trainable, 589,824 frozen, 48 times fewer."""
    counts = count_parameters(LoRALinear(nn.Linear(768, 768, bias=False), 8, 16))
    assert counts == (12_288, 589_824)
    assert counts.frozen / counts.trainable == 48


def test_a_bf16_base_keeps_its_type_and_the_adapter_stays_fp32() -> None:
    made = LoRALinear(nn.Linear(24, 16).bfloat16(), 4, 8)
    assert made(torch.randn(2, 24, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert made.lora_A.dtype is made.lora_B.dtype is torch.float32


def test_a_target_that_fits_nothing_is_named() -> None:
    with pytest.raises(ValueError, match="qproj"):
        apply_lora(tiny_model("llama"), ["qproj"], r=4, alpha=8)
