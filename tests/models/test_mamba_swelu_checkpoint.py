"""Checkpoints of the original become model folders and come back bit for bit; what does not fit is refused, nothing is lost."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuneflow.errors import ModelError, StorageError
from finetuneflow.models.mamba_swelu import LAYOUTS, register
from finetuneflow.models.mamba_swelu_checkpoint import convert_from_original, convert_to_original
from models.test_mamba_swelu_reference import logits_of, tiny
from models.tiny import tiny_tokenizer

IDS = [3, 41, 7, 7, 0, 22, 49]


def original(layout: str = "simplified", **settings: Any) -> dict[str, Any]:
    """A checkpoint as the original saves it, names spelled out here and not by the code under test."""
    model = tiny(layout, **settings)
    state = {name.removeprefix("model."): value.detach().clone() for name, value in model.state_dict().items()}
    if settings.get("tie_word_embeddings", True):
        state["lm_head.weight"] = state["token_embedding.weight"]
    config = {"vocab_size": 50, "d_model": 20, "n_layers": 2, "max_seq_len": 40, "tie_embeddings": True}
    config["tie_embeddings"] = settings.get("tie_word_embeddings", True)
    moments = {"state": {0: {"exp_avg": torch.ones(50, 20)}}, "param_groups": [{"lr": 3e-4}]}
    return {"model_state_dict": state, "config": config, "optimizer_state": moments, "global_step": 757_500, "epoch": 3}


def saved(folder: Path, payload: Any, name: str = "model_step_757500.pt") -> Path:
    torch.save(payload, folder / name)
    return folder / name


def test_the_names_are_those_of_the_description() -> None:
    """Spelled out once, for one layer of each layout."""
    common = {
        "token_embedding.weight",
        "position_embedding.weight",
        "lm_head.weight",
        "mamba_stack.norm.weight",
        "mamba_stack.norm.bias",
    }
    common |= {f"dense{n}.{part}" for n in (1, 2, 3) for part in ("weight", "bias")}
    common |= {f"swelu{n}.{part}" for n in (1, 2, 3) for part in ("k", "lam")}
    layer = {"norm.weight", "norm.bias", "activation.k", "activation.lam"}
    mixer = {
        "in_proj.weight",
        "conv1d.weight",
        "conv1d.bias",
        "x_proj.weight",
        "dt_proj.weight",
        "dt_proj.bias",
        "out_proj.weight",
    }
    own = {"simplified": {"ssm_activation.k", "ssm_activation.lam"}, "selective": {"A_log", "D"}}
    for layout in LAYOUTS:
        inside = layer | {f"mamba.{name}" for name in mixer | own[layout]}
        expected = common | {f"mamba_stack.layers.0.{name}" for name in inside}
        assert set(original(layout, n_layers=1)["model_state_dict"]) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", [{}, {"learn_lambda": False}, {"tie_word_embeddings": False}], ids=str)
def test_there_and_back_is_bit_for_bit(tmp_path: Path, layout: str, settings: dict[str, Any]) -> None:
    payload = original(layout, **settings)
    report = convert_from_original(saved(tmp_path, payload), tmp_path / "model")
    convert_to_original(tmp_path / "model", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == {"model_state_dict", "config", "global_step"}
    assert back["config"] == payload["config"] and back["global_step"] == report.step == 757_500
    assert back["model_state_dict"].keys() == payload["model_state_dict"].keys()
    for name, value in payload["model_state_dict"].items():
        assert torch.equal(back["model_state_dict"][name], value), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_converted_model_answers_as_the_description_says(tmp_path: Path, layout: str) -> None:
    register()
    payload = original(layout, learn_lambda=False)
    report = convert_from_original(saved(tmp_path, payload), tmp_path / "model")
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(loading.values())
    assert report.num_parameters == sum(p.numel() for p in model.parameters())
    weights = {name: value.double().numpy() for name, value in payload["model_state_dict"].items()}
    expected = torch.from_numpy(logits_of(weights, IDS)).float()
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([IDS])).logits[0], expected, rtol=1e-5, atol=1e-5)


def test_sizes_layout_and_lambda_are_read_off_the_tensors(tmp_path: Path) -> None:
    sizes = {"d_state": 3, "d_conv": 5, "expand": 3, "dense_hidden_dim": 17, "max_seq_len": 33, "n_layers": 3, "d_model": 24}
    payload = original("selective", learn_lambda=False, **sizes)
    payload["config"] = {"vocab_size": 50_257, "d_model": 24, "max_seq_len": 2048, "dropout": 0.3, "expand_factor": 2}
    report = convert_from_original(saved(tmp_path, payload), tmp_path / "model")
    found = json.loads((tmp_path / "model" / "config.json").read_text())
    assert {name: found[name] for name in sizes} == sizes
    assert (found["layout"], found["learn_lambda"], found["vocab_size"], found["dropout"]) == ("selective", False, 50, 0.3)
    text = "\n".join(report.notes)
    for said in (
        "vocab_size = 50257; the tensors say 50",
        "max_seq_len = 2048; the tensors say 33",
        "expand_factor = 2; the tensors say 3",
    ):
        assert said in text
    assert "d_model" not in text
    assert json.loads((tmp_path / "model" / "conversion.json").read_text()) == json.loads(json.dumps(report.to_dict()))


def test_without_settings_or_as_a_bare_state_dict_it_converts(tmp_path: Path) -> None:
    payload = original()
    no_settings = convert_from_original(saved(tmp_path, {"model_state_dict": payload["model_state_dict"]}), tmp_path / "a")
    bare = convert_from_original(saved(tmp_path, payload["model_state_dict"], "bare.pt"), tmp_path / "b")
    assert any("holds no settings" in note for note in no_settings.notes) and any("bare" in note for note in bare.notes)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert no_settings.step is None


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_names_of_wrapped_models_are_understood(tmp_path: Path, wrapper: str) -> None:
    payload = original()
    payload["model_state_dict"] = {wrapper + name: value for name, value in payload["model_state_dict"].items()}
    report = convert_from_original(saved(tmp_path, payload), tmp_path / "model")
    assert any(wrapper in note for note in report.notes)


def test_the_older_file_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(original(), path, _use_new_zipfile_serialization=False)
    assert convert_from_original(path, tmp_path / "model").step == 757_500


# --- the head ---------------------------------------------------------------------------------------------


def test_a_head_that_differs_is_kept_and_said(tmp_path: Path) -> None:
    payload = original()
    payload["model_state_dict"]["lm_head.weight"] = payload["model_state_dict"]["token_embedding.weight"] + 1e-3
    report = convert_from_original(saved(tmp_path, payload), tmp_path / "model")
    assert any("differs from the embedding" in note and "say that they are" in note for note in report.notes)
    assert report.settings["tie_word_embeddings"] is False
    kept = load_file(tmp_path / "model" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(kept, payload["model_state_dict"]["lm_head.weight"])


def test_a_missing_head_is_the_embedding(tmp_path: Path) -> None:
    payload = original()
    del payload["model_state_dict"]["lm_head.weight"]
    report = convert_from_original(saved(tmp_path, payload), tmp_path / "model")
    assert report.settings["tie_word_embeddings"] is True and any("There is no lm_head.weight" in note for note in report.notes)


def test_equal_weights_that_are_said_to_be_apart_stay_two(tmp_path: Path) -> None:
    payload = original()
    payload["config"]["tie_embeddings"] = False
    report = convert_from_original(saved(tmp_path, payload), tmp_path / "model")
    assert report.settings["tie_word_embeddings"] is False and any("both are kept" in note for note in report.notes)


def test_broken_numbers_and_mixed_types_are_kept_and_said(tmp_path: Path) -> None:
    payload = original()
    payload["model_state_dict"]["dense1.bias"][0] = float("nan")
    payload["model_state_dict"]["dense2.weight"] = payload["model_state_dict"]["dense2.weight"].bfloat16()
    report = convert_from_original(saved(tmp_path, payload), tmp_path / "model")
    text = "\n".join(report.notes)
    assert "dense1.bias" in text and "bfloat16, float32" in text
    convert_to_original(tmp_path / "model", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["model_state_dict"]
    assert back["dense1.bias"][0].isnan() and back["dense2.weight"].dtype is torch.bfloat16


# --- what is refused ----------------------------------------------------------------------------------------


class Evil:
    """A pickle that creates a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def refused(path: Path, out: Path) -> ModelError:
    """The error of a conversion that must leave nothing behind and the source as it was."""
    before = path.read_bytes() if path.is_file() else None
    names = set(out.parent.iterdir())
    with pytest.raises(ModelError) as caught:
        convert_from_original(path, out)
    assert set(out.parent.iterdir()) == names
    assert before is None or path.read_bytes() == before
    return caught.value


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_run_code_is_not_opened(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "evil.pt"
    torch.save(original() | {"epoch": Evil(tmp_path / "created")}, path, _use_new_zipfile_serialization=zipped)
    error = refused(path, tmp_path / "model")
    assert error.code == "MODEL_PICKLE" and not (tmp_path / "created").exists()
    assert "mkdir" in error.message and "torch.save" in str(error.remedy)


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    payload = original()
    state = payload["model_state_dict"]
    state["mamba_stack.layers.1.mamba.extra"] = state.pop("dense3.bias")
    state["dense2.weight"] = torch.zeros(28, 27)
    error = refused(saved(tmp_path, payload), tmp_path / "model")
    assert error.code == "MODEL_CORRUPT"
    for said in ("1 missing (e.g. dense3.bias)", "mamba.extra", "dense2.weight: (28, 27) instead of (28, 28)"):
        assert said in error.message
    assert error.context["missing"] == ["dense3.bias"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("token_embedding.weight"), "token_embedding.weight"),
        (lambda state: [state.pop(name) for name in list(state) if "layers" in name], "layers.0.mamba.in_proj"),
        (lambda state: [state.pop(name) for name in list(state) if "layers.0" in name], "layers.0.mamba.in_proj"),
        (lambda state: state.pop("swelu2.lam"), "swelu2.lam"),
        (lambda state: state.update({"dense1.weight": torch.zeros(5)}), "dense1.weight"),
        (lambda state: state.update({"dense1.weight": "text"}), "dense1.weight"),
        (lambda state: state.update({"dense1.weight": torch.zeros(28, 20, dtype=torch.int8)}), "floating-point"),
        (lambda state: state.update({"mamba_stack.layers.0.mamba.in_proj.weight": torch.zeros(3, 20)}), "in_proj"),
        (lambda state: state.update({"mamba_stack.layers.999999999.norm.bias": torch.zeros(20)}), "none of number 2"),
        (lambda state: state.clear(), "model_state_dict"),
    ],
)
def test_what_is_no_such_model_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    payload = original()
    change(payload["model_state_dict"])
    error = refused(saved(tmp_path, payload), tmp_path / "model")
    assert error.code == "MODEL_CORRUPT" and said in error.message


@pytest.mark.parametrize("payload", [[1, 2], {}, {"weights": 3}, {"model_state_dict": [1]}, torch.zeros(3)], ids=str)
def test_files_with_other_content_are_refused(tmp_path: Path, payload: Any) -> None:
    assert refused(saved(tmp_path, payload), tmp_path / "model").code == "MODEL_CORRUPT"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float, zipped: bool) -> None:
    path = tmp_path / "whole.pt"
    torch.save(original(), path, _use_new_zipfile_serialization=zipped)
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert refused(tmp_path / "cut.pt", tmp_path / "model").code == "MODEL_CORRUPT"


@pytest.mark.parametrize("content", [b"hello", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(200), bytes(5000)], ids=repr)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.pt").write_bytes(content)
    assert refused(tmp_path / "odd.pt", tmp_path / "model").code in ("MODEL_CORRUPT", "MODEL_PICKLE")


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.pt", tmp_path / "model").code == "MODEL_NOT_FOUND"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, original())
    convert_from_original(checkpoint, tmp_path / "model")
    for call in (
        lambda: convert_from_original(checkpoint, tmp_path / "model"),
        lambda: convert_to_original(tmp_path / "model", checkpoint),
    ):
        with pytest.raises(StorageError) as caught:
            call()
        assert caught.value.code == "STORAGE_EXISTS"


def test_a_folder_of_another_architecture_does_not_become_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="llama"):
        convert_to_original(tmp_path / "other", tmp_path / "back.pt")
    assert not (tmp_path / "back.pt").exists()


def test_a_folder_with_weights_of_another_size_does_not_become_a_checkpoint(tmp_path: Path) -> None:
    convert_from_original(saved(tmp_path, original()), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"n_layers": 2', '"n_layers": 3'))
    with pytest.raises(ModelError, match=r"missing \(e\.g\. mamba_stack\.layers\.2"):
        convert_to_original(tmp_path / "model", tmp_path / "back.pt")


# --- the tokenizer ------------------------------------------------------------------------------------------


def test_a_tokenizer_is_copied_and_its_end_token_noted(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "evil.py").write_text("")
    convert_from_original(saved(tmp_path, original(vocab_size=300)), tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again("Paris, 12 fois.")["input_ids"] == tokenizer("Paris, 12 fois.")["input_ids"]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    assert not (tmp_path / "model" / "evil.py").exists()


def test_a_tokenizer_as_gpt_2_publishes_it_is_understood(tmp_path: Path) -> None:
    """Only the list of tokens and that of merges: 256 bytes, one merge, the end of text."""
    from tokenizers import pre_tokenizers

    source = tmp_path / "gpt2"
    source.mkdir()
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "<|endoftext|>"]
    (source / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (source / "merges.txt").write_text("#version: 0.2\nh e\n")
    convert_from_original(saved(tmp_path, original(vocab_size=258)), tmp_path / "model", tokenizer=source)
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again("he")["input_ids"] == [256] and again.eos_token_id == 257


@pytest.mark.parametrize(("vocab", "code"), [(300, "MODEL_CORRUPT"), (None, "MODEL_NO_TOKENIZER")])
def test_a_tokenizer_that_does_not_fit_or_is_missing_is_refused(tmp_path: Path, vocab: int | None, code: str) -> None:
    (tmp_path / "tokenizer").mkdir()
    if vocab:
        tiny_tokenizer(vocab).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ModelError) as caught:
        convert_from_original(saved(tmp_path, original(vocab_size=260)), tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    assert caught.value.code == code and not (tmp_path / "model").exists()
