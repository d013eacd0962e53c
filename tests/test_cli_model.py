"""`ftf model`: a fresh model from a module file, checkpoints converted, a base described; and `--module` of other verbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from face import Ftf
from models.tiny import tiny_tokenizer

EXAMPLE = Path(__file__).parents[1] / "examples" / "custom_model" / "gated_conv.py"
SIZES = ("--set", "hidden_size=48", "--set", "num_hidden_layers=2")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_new_model_is_written_described_and_asked(ftf: Ftf, tmp_path: Path, tokenizer: Path) -> None:
    made = ftf("model", "new", EXAMPLE, "--out", tmp_path / "base", *SIZES, "--tokenizer", tokenizer, "--json")
    assert made.code == 0 and made.json["architecture"] == "GatedConvForCausalLM"
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (48, 2, made.json["vocabulary"])
    shown = ftf("model", "show", tmp_path / "base", "--json").json
    assert shown["parameters"] == made.json["parameters"] and shown["linear_layers"] == ["in_proj", "out_proj"]
    assert [m["method"] for m in shown["methods"]] == ["full", "lora", "qlora"]
    assert shown["methods"][0]["trained_parameters"] == shown["parameters"] > shown["methods"][1]["trained_parameters"] > 0
    assert all(m["possible"] and m["memory_bytes"] > 0 for m in shown["methods"])
    text = ftf("model", "show", tmp_path / "base").out
    assert "gated_conv" in text and f"{made.json['parameters']:,}" in text
    asked = ftf("chat", tmp_path / "base", "--module", EXAMPLE, "--message", "Hi", "--max-new-tokens", "3", "--json")
    assert asked.code == 0


def test_models_of_ones_own_are_compared_with_each_other_and_with_known_ones(ftf: Ftf, tmp_path: Path, tokenizer: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        made = ftf("model", "new", EXAMPLE, "--out", tmp_path / name, *SIZES, "--tokenizer", tokenizer, "--seed", seed)
        assert made.code == 0, made.err
    data = tmp_path / "d.jsonl"
    data.write_text('{"question": "What is 3 + 4?", "answer": "It is 7."}\n')
    asked = ("--data", data, "--max-new-tokens", "3", "--json")
    for other in (tmp_path / "two", "starter"):
        answer = ftf("compare", tmp_path / "one", other, "--module", EXAMPLE, *asked)
        assert answer.code == 0 and answer.json["measures"][0]["items"] == 1, answer.err
    useless = ftf("compare", "starter", "starter", "--module", EXAMPLE, *asked)
    assert useless.json["error_code"] == "MODEL_MODULE_MISMATCH"


def test_mistakes_are_said_and_leave_nothing(ftf: Ftf, tmp_path: Path, tokenizer: Path) -> None:
    new: tuple[Any, ...] = ("model", "new", EXAMPLE, "--out", tmp_path / "base", "--tokenizer", tokenizer, "--json")
    assert ftf(*new, "--set", "hiden_size=3").json["error_code"] == "CONFIG_UNKNOWN_KEY"
    assert ftf(*new, "--set", "hidden_size").json["error_code"] == "CONFIG_INVALID_VALUE"
    assert ftf(*new, "--set", "vocab_size=5").json["error_code"] == "CONFIG_INVALID_VALUE"
    missing = ftf("model", "new", tmp_path / "nowhere.py", "--out", tmp_path / "base", "--json")
    assert missing.json["error_code"] == "MODEL_MODULE_NOT_FOUND" and missing.code == 4
    assert not list(tmp_path.iterdir())
    assert ftf("model", "convert", tmp_path / "x.pt", "--json").json["error_code"] == "CLI_USAGE"


def test_a_folder_of_mamba_swelu_becomes_the_originals_checkpoint_and_a_folder_again(
    ftf: Ftf, tmp_path: Path, tokenizer: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    sizes = ("--set", "d_model=32", "--set", "n_layers=2", "--set", "dense_hidden_dim=48", "--set", "max_seq_len=64")
    base, back, original = tmp_path / "base", tmp_path / "back", tmp_path / "original.pt"
    assert ftf("model", "new", "mamba_swelu", "--out", base, *sizes, "--tokenizer", tokenizer).code == 0
    assert ftf("model", "convert", base, "--to", original).code == 0
    there = ftf("model", "convert", original, "--out", back, "--tokenizer", tokenizer, "--json")
    assert there.code == 0 and there.json["layout"] == "simplified"
    first, second = (load_file(folder / "model.safetensors") for folder in (base, back))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert ftf("model", "convert", original, "--out", back, "--json").json["error_code"] == "STORAGE_EXISTS"


def test_the_starter_is_described_without_weights_or_network(ftf: Ftf) -> None:
    shown = ftf("model", "show", "starter", "--offline", "--json").json
    assert shown["model_type"] == "llama" and shown["attention_layers"] == shown["layers"]
    assert ftf("model", "show", "7B", "--offline", "--json").json["certainty"] == "typical"
