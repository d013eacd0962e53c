"""The merged model: the weights that theory asks for, checked by loading, refused when the training is not in it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from run_dir import make_run
from safetensors.torch import load_file, save_file

from conftest import RunMaker
from finetuneflow.errors import ExportError
from finetuneflow.export import export, trained, verify
from finetuneflow.export.verify import Answers, judge, tolerance_for


def base_of(run_dir: Path) -> Path:
    return Path(yaml.safe_load((run_dir / "run.yaml").read_text())["model"]["base"])


def expected_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """W + alpha/r B A by hand from the two files, in 64 bits."""
    adapter = load_file(run_dir / "adapter/adapter_model.safetensors")
    weights = {name: tensor.double() for name, tensor in load_file(base_of(run_dir) / "model.safetensors").items()}
    for name in adapter:
        if name.endswith("lora_A.weight"):
            target = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            b = adapter[name.replace("lora_A", "lora_B")].double()
            weights[target] += 8 / 4 * b @ adapter[name].double()
    return weights


def test_merged_weights_are_base_plus_scaled_product(new_run: RunMaker) -> None:
    run_dir = new_run("lora")
    result = export(run_dir, "merged")
    merged, expected = load_file(result.dir / "model.safetensors"), expected_weights(run_dir)
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-6)
    assert result.check.passed and result.check.error < 1e-5 and result.check.adapter_effect and result.check.adapter_effect > 0.1


def test_a_bfloat16_base_is_rounded_once_to_the_nearest(new_run: RunMaker) -> None:
    run_dir = new_run("lora", dtype="bfloat16")
    result = export(run_dir, "merged")
    assert 0 < result.check.error < result.check.tolerance
    for name, tensor in load_file(result.dir / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        wanted = expected_weights(run_dir)[name]
        off = (tensor.double() - wanted).abs() > 2.0**-8 * wanted.abs() * 1.001 + 1e-7  # u |w|: the nearest number, no further
        assert not off.any(), name


def test_a_wider_type_can_be_asked_for(new_run: RunMaker) -> None:
    result = export(new_run("lora", dtype="bfloat16"), "merged", dtype="float32", name="wide")
    assert {t.dtype for t in load_file(result.dir / "model.safetensors").values()} == {torch.float32}
    assert result.check.tolerance == verify.EXACT_TOLERANCE
    assert json.loads((result.dir / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("kind", ["qlora", "dora", "ia3"])
def test_other_mergeable_methods_pass_their_check(new_run: RunMaker, kind: str) -> None:
    result = export(new_run(kind), "merged")
    assert result.check.passed and result.check.same_texts == result.check.prompts
    names = {file.name for file in result.files}
    assert {"model.safetensors", "config.json", "generation_config.json", "chat_template.jinja", "README.md"} <= names
    assert "adapter_config.json" not in names and "finetuneflow_export.zip" not in names


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "mamba"])
def test_transposed_tied_and_recurrent_weights_merge_too(tmp_path: Path, architecture: str) -> None:
    """GPT-2 stores its matrices transposed, Gemma shares embedding and output, Mamba has no attention."""
    result = export(make_run(tmp_path, architecture=architecture), "merged")
    assert result.check.passed and result.check.adapter_effect and result.check.adapter_effect > 0.01


def test_the_merged_model_answers_through_transformers_alone(new_run: RunMaker) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_dir = new_run("lora")
    folder = export(run_dir, "merged").dir
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Quelle est la capitale ?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    merged = AutoModelForCausalLM.from_pretrained(folder)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_of(run_dir)), run_dir / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**ids).logits, tuned(**ids).logits, rtol=1e-4, atol=1e-5)


def test_generation_ends_at_the_turn_end_of_the_template(tmp_path: Path) -> None:
    """The base names <|endoftext|> (id 1) only; a chat-tuned model ends its turns with <|im_end|> (id 3)."""
    run_dir = make_run(tmp_path)
    write = base_of(run_dir) / "generation_config.json"
    write.write_text(json.dumps({"eos_token_id": 1, "temperature": 0.6, "do_sample": False}))
    settings = json.loads((export(run_dir, "merged").dir / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [3, 1]


def test_full_fine_tuning_exports_its_own_weights(new_run: RunMaker) -> None:
    run_dir = new_run("full")
    result = export(run_dir, "merged")
    assert (result.dir / "model.safetensors").read_bytes() == (run_dir / "model/model.safetensors").read_bytes()
    assert json.loads((result.dir / "generation_config.json").read_text())["eos_token_id"] == 3
    assert result.check.max_abs_diff == 0.0
    assert [file.name for file in export(run_dir, "zip").files] == ["finetuneflow_export.zip"]


def test_prefix_tuning_cannot_be_merged_and_says_what_to_do(new_run: RunMaker) -> None:
    with pytest.raises(ExportError) as caught:
        export(new_run("prefix"), "merged")
    assert caught.value.code == "EXPORT_UNSUPPORTED" and "--to adapter" in (caught.value.remedy or "")


# --- refused -------------------------------------------------------------------------------------------------


def change_merge(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let the merge go wrong in the way `change(model)` says."""
    from finetuneflow.models import load

    real = load.merged_copy

    def wrong(*args: Any, **options: Any) -> Any:
        merged = real(*args, **options)
        with torch.no_grad():
            change(merged.model)
        return merged

    monkeypatch.setattr(load, "merged_copy", wrong)


def zero_a_layer(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight.zero_()


def flip_a_sign(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.weight.neg_()


def not_a_number(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight[3, 3] = float("nan")


def small_noise(model: Any) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.mul_(1 + 0.02 * torch.randn_like(parameter))


DAMAGES = [(change, dtype) for change in (zero_a_layer, flip_a_sign, not_a_number) for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize(("change", "dtype"), [*DAMAGES, (small_noise, "float32")])
def test_a_corrupted_merge_is_refused_and_leaves_nothing(
    new_run: RunMaker, monkeypatch: pytest.MonkeyPatch, change: Any, dtype: str
) -> None:
    change_merge(monkeypatch, change)
    run_dir = new_run("lora", dtype=dtype)
    with pytest.raises(ExportError) as caught:
        export(run_dir, "merged")
    assert caught.value.code == "EXPORT_CHECK_FAILED" and caught.value.context["problems"]
    assert [path.name for path in (run_dir / "exports").iterdir()] == ["lock"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_that_forgot_the_adapter_is_refused(new_run: RunMaker, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    from finetuneflow.models import load

    monkeypatch.setattr(load, "merged_copy", lambda source, adapter_dir, **options: load.load_base(source, **options))
    with pytest.raises(ExportError) as caught:
        export(new_run("lora", dtype=dtype), "merged")
    assert any("more than half of what training changed" in problem for problem in caught.value.context["problems"])


def test_a_training_too_small_for_the_number_type_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """An update far below one rounding step of bfloat16 is lost by merging; in 32 bits it is kept."""
    run_dir = make_run(tmp_path, dtype="bfloat16")
    path = run_dir / "adapter/adapter_model.safetensors"
    weights = load_file(path)
    save_file({n: t * (1e-4 if "lora_B" in n else 1) for n, t in weights.items()}, path, metadata={"format": "pt"})
    with pytest.raises(ExportError) as caught:
        export(run_dir, "merged")
    assert "float32" in (caught.value.remedy or "")
    assert export(run_dir, "merged", dtype="float32").check.passed


def test_a_machine_too_small_for_32_bits_checks_in_the_stored_type(new_run: RunMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    result = export(new_run("lora", dtype="bfloat16"), "merged")
    assert result.check.passed and result.check.tolerance > verify.EXACT_TOLERANCE


# --- the rule, by hand -------------------------------------------------------------------------------------------


def answers(logits: torch.Tensor, greedy: tuple[int, ...] = (0,)) -> Answers:
    return Answers((greedy,), (logits,))


CLEAR = torch.tensor([[4.0, 0.0, -4.0], [4.0, 0.0, -4.0]])  # spread sqrt(32/3), margin 4


def test_the_error_is_relative_to_the_spread_of_the_logits() -> None:
    off = CLEAR + torch.tensor([0.03, 0.0, 0.0])
    check = judge(answers(CLEAR), answers(off), [[1]], tolerance=1.0, compared="x")
    assert check.error == pytest.approx(0.03 / 3**0.5 / (32 / 3) ** 0.5, rel=1e-4)
    assert check.max_abs_diff == pytest.approx(0.03, rel=1e-4) and check.argmax_agreement == 1.0


def test_another_choice_where_the_trained_model_is_certain_fails_whatever_the_mean() -> None:
    many = CLEAR[:1].repeat(2000, 1)
    other = many.clone()
    other[7] = torch.tensor([-4.0, 4.0, 0.0])
    check = judge(Answers(((0,),), (many,)), Answers(((0,),), (other,)), [[1] * 1999], tolerance=0.1, compared="x")
    assert check.error < 0.1 and not check.passed and "at 1 position where" in check.problems[0]


def test_another_choice_where_the_trained_model_wavers_is_excused() -> None:
    wavering, turned = torch.tensor([[1.0, 1.0 + 1e-6, -2.0]] * 2), torch.tensor([[1.0 + 1e-6, 1.0, -2.0]] * 2)
    check = judge(answers(wavering, (1,)), answers(turned, (1,)), [[1]], tolerance=1e-4, compared="x")
    assert check.passed and check.argmax_agreement == 0.0


def test_greedy_texts_may_part_only_where_the_trained_model_is_undecided() -> None:
    parted = judge(answers(CLEAR, (0,)), answers(CLEAR, (1,)), [[1]], tolerance=1e-4, compared="x")
    assert not parted.passed and parted.same_texts == 0
    level = torch.tensor([[1.0, 1.0, -2.0], [1.0, 1.0, -2.0]])
    assert judge(answers(level, (0,)), answers(level, (1,)), [[1]], tolerance=1e-4, compared="x").passed


def test_an_error_above_half_of_the_effect_fails_even_within_tolerance() -> None:
    base = CLEAR + torch.tensor([0.0, 0.1, 0.0])
    almost_base = CLEAR + torch.tensor([0.0, 0.09, 0.0])
    check = judge(answers(CLEAR), answers(almost_base), [[1]], tolerance=0.5, compared="x", base_logits=(base,))
    assert not check.passed and "half of what training changed" in check.problems[0]


def test_tolerances_follow_the_stated_rule() -> None:
    assert tolerance_for(["float32"], 500) == 1e-4
    assert tolerance_for(["bfloat16", "float32"], 100) == pytest.approx(2 * 2**-8 * 10)
    assert tolerance_for(["float16"], 100) == pytest.approx(2 * 2**-11 * 10)
    assert tolerance_for(["float16", "bfloat16"], 4) == tolerance_for(["bfloat16"], 4)
