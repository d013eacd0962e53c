"""Loading: what is accepted, what is refused and in which words; precision, padding, adapters."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model, tiny_tokenizer

from finetuneflow.errors import CODES, HardwareError, ModelError, TrainingError
from finetuneflow.models import load as load_module
from finetuneflow.models.adapters import (
    AdapterSpec,
    attach_adapter,
    base_only,
    load_adapters,
    require_trainable,
    switch_adapter,
    trainable_parameters,
)
from finetuneflow.models.adapters import (
    save_adapter as save_adapter_of,
)
from finetuneflow.models.load import choose_dtype, load_base, load_with_adapters, merged_copy
from finetuneflow.models.source import ModelSource
from finetuneflow.models.targets import resolve_targets
from finetuneflow.models.tokenizer import ensure_padding_token

IDS = torch.arange(10, 30).unsqueeze(0)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "base"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf_cache"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(base: Path | str, **options: Any) -> ModelError:
    """The error that loading `base` ends with, its code known to the product."""
    with pytest.raises(ModelError) as caught:
        load_base(str(base), **{"dtype": "fp32", "device": "cpu"} | options)
    assert caught.value.code in CODES
    assert caught.value.remedy
    return caught.value


def load(base: Path | str, **options: Any) -> load_module.LoadedBase:
    return load_base(str(base), **{"dtype": "fp32", "device": "cpu"} | options)


# --- what loads -------------------------------------------------------------------------------


def test_a_folder_loads_with_its_very_weights_and_its_facts(folder: Path) -> None:
    loaded = load(folder)
    expected = tiny_model("llama").state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in loaded.model.state_dict().items())
    assert loaded.facts.architecture == "LlamaForCausalLM"
    assert loaded.facts.num_parameters == sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    assert not loaded.model.training
    assert json.loads(json.dumps(loaded.facts.to_dict()))["dtype"] == "fp32"


def test_the_digest_follows_the_content_and_not_the_place(folder: Path, tiny_folder: Path) -> None:
    first = load(folder).facts.digest
    assert first == load(tiny_folder).facts.digest
    edit_json(folder / "generation_config.json", temperature=0.5)
    assert load(folder).facts.digest != first


def test_starter_is_the_bundled_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuneflow.models.starter.starter_path", lambda: folder, raising=False)
    assert load("starter").facts.base == "starter"


def test_a_sharded_model_loads(folder: Path) -> None:
    tiny_model("llama").save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert torch.equal(load(folder).model(IDS).logits, tiny_model("llama").eval()(IDS).logits)


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (pytest.fail, ("a pickle was opened",))


def test_pickles_beside_the_weights_are_never_opened(folder: Path) -> None:
    for name in ("pytorch_model.bin", "tokenizer.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    load(folder)


# --- what is not there --------------------------------------------------------------------------


def test_a_missing_folder_gets_the_nearest_names(folder: Path) -> None:
    error = refusal(folder.parent / "bsae")
    assert error.code == "MODEL_NOT_FOUND"
    assert error.remedy and str(folder) in error.remedy


def test_a_file_is_not_a_model_and_the_folder_is_asked_for(folder: Path) -> None:
    assert "folder" in str(refusal(folder / "model.safetensors").remedy)


def test_an_unknown_hub_id_in_offline_mode_says_so() -> None:
    error = refusal("acme/no-such-model")
    assert error.code == "MODEL_OFFLINE"
    assert "HF_HUB_OFFLINE" in str(error.remedy)


@pytest.mark.parametrize("name", ["a/b/c", "../nowhere", "-rf", "a b", "file:///etc", "http://127.0.0.1/x", "a\0b", "x" * 300])
def test_names_that_are_no_hub_id_are_never_asked_for_on_the_network(name: str) -> None:
    assert refusal(name).code == "MODEL_NOT_FOUND"


def test_a_folder_without_config_is_told_apart(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path).message


def test_an_adapter_is_not_taken_for_a_base(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert refusal(folder).code == "MODEL_IS_ADAPTER"


@pytest.mark.parametrize(
    ("name", "word"), [("pytorch_model.bin", "run code"), ("model-Q4.gguf", "GGUF"), ("notes.md", "no weights")]
)
def test_weights_in_another_format_are_refused_by_name(folder: Path, name: str, word: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    error = refusal(folder)
    assert error.code == "MODEL_NO_SAFETENSORS"
    assert word in error.message


def test_a_folder_without_a_tokenizer_says_which_file_is_missing(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert refusal(folder).code == "MODEL_NO_TOKENIZER"


# --- what is damaged --------------------------------------------------------------------------


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lie_about_the_header(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def lie_about_a_shape(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"shape":[512,48]', b'"shape":[912,48]', 1))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def overwrite_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def drop_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def add_a_tensor(path: Path) -> None:
    save_file(load_file(path) | {"model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)}, path, metadata={"format": "pt"})


def change_a_shape(path: Path) -> None:
    save_file(load_file(path) | {"model.norm.weight": torch.zeros(47)}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [
        cut_in_half,
        lie_about_the_header,
        lie_about_a_shape,
        empty,
        overwrite_with_zeros,
        drop_a_tensor,
        add_a_tensor,
        change_a_shape,
    ],
)
def test_damaged_or_unfitting_weights_are_refused_never_filled_at_random(folder: Path, damage: Any) -> None:
    damage(folder / "model.safetensors")
    assert refusal(folder).code == "MODEL_CORRUPT"


def test_a_missing_tensor_is_named(folder: Path) -> None:
    drop_a_tensor(folder / "model.safetensors")
    error = refusal(folder)
    assert error.context["missing"] == ["model.layers.1.mlp.up_proj.weight"]
    assert "random" in str(error.remedy)


@pytest.mark.parametrize("part", ["model-00002-of-00002.safetensors", "../other/model.safetensors", "/etc/passwd", "weights.bin"])
def test_an_index_may_name_existing_parts_of_its_own_folder_only(folder: Path, part: str) -> None:
    index = {"weight_map": {"lm_head.weight": "model.safetensors", "model.norm.weight": part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(folder).code == "MODEL_CORRUPT"


def test_an_index_that_misplaces_a_tensor_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"no.such.tensor": "model.safetensors"}}))
    assert "no.such.tensor" in refusal(folder).message


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", "\0", "[" * 100_000, '{"model_type": ["llama"]}', '{"model_type": "llama", "architectures": 3}']
)
def test_an_unreadable_config_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert refusal(folder).code == "MODEL_CORRUPT"


def test_a_broken_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    assert refusal(folder).code == "MODEL_CORRUPT"


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(folder: Path, tmp_path: Path) -> None:
    small = save_tiny(tmp_path / "small", vocab=300, tokenizer=tiny_tokenizer(400))
    error = refusal(small)
    assert error.code == "MODEL_CORRUPT"
    assert "300 rows" in error.message


# --- code from a repository ---------------------------------------------------------------------

CODE_FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("config.json", {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}),
    ("config.json", {"text_config": {"auto_map": {"AutoConfig": "modeling.Own"}}}),
    ("config.json", {"text_config": {"trust_remote_code": True}}),
    ("config.json", {"use_kernels": True}),
    ("config.json", {"kernel_config": {"kernel_mapping": {"RMSNorm": "evil/kernel:RMSNorm"}}}),
    ("config.json", {"_attn_implementation": "evil/kernel"}),
    ("config.json", {"layers": [{"attn_implementation": "evil/kernel@main:attend"}]}),
    ("config.json", {"_attn_implementation_internal": "evil/kernel"}),
    ("config.json", {"experts_implementation": "evil/kernel"}),
    ("generation_config.json", {"custom_generate": "evil/decoding"}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization.Own", None]}}),
    ("processor_config.json", {"auto_map": {"AutoProcessor": "evil/repo--processing.Own"}}),
]


@pytest.mark.parametrize(("file", "fields"), CODE_FIELDS)
def test_every_field_that_asks_for_code_blocks_the_model(folder: Path, file: str, fields: dict[str, Any]) -> None:
    if not (folder / file).exists():
        (folder / file).write_text("{}")
    edit_json(folder / file, **fields)
    error = refusal(folder)
    assert error.code == "MODEL_REMOTE_CODE"
    assert file in error.message


def test_harmless_implementation_names_are_no_code(folder: Path) -> None:
    edit_json(folder / "config.json", _attn_implementation="eager", use_kernels=False, trust_remote_code=False)
    load(folder)


def test_consent_to_a_folder_is_for_its_exact_content(folder: Path) -> None:
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Own"})
    digest = refusal(folder).context["commit"]
    assert digest.startswith("sha256:")
    consenting = ModelSource(str(folder), trust_remote_code_revision=digest)
    assert load_base(consenting, dtype="fp32", device="cpu").facts.commit == digest
    edit_json(folder / "config.json", initializer_range=0.5)
    with pytest.raises(ModelError, match="another revision"):
        load_base(consenting, dtype="fp32", device="cpu")


@pytest.mark.parametrize(
    "fields", [{"use_kernels": True}, {"attn_implementation": "evil/kernel"}, {"auto_map": {"AutoModel": "other/repo--m.Own"}}]
)
def test_code_from_elsewhere_is_refused_even_with_consent(folder: Path, fields: dict[str, Any]) -> None:
    edit_json(folder / "config.json", **fields)
    digest = refusal(folder).context["commit"]
    with pytest.raises(ModelError) as caught:
        load_base(ModelSource(str(folder), trust_remote_code_revision=digest))
    assert caught.value.code == "MODEL_REMOTE_CODE"


# --- what cannot be trained ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "not a causal language model"),
        ({"model_type": "brand_new", "architectures": ["BrandNewForCausalLM"]}, "does not know"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ],
)
def test_other_kinds_of_models_are_refused_by_their_name(folder: Path, fields: dict[str, Any], word: str) -> None:
    edit_json(folder / "config.json", **fields)
    error = refusal(folder)
    assert error.code == "MODEL_UNSUPPORTED_ARCH"
    assert word in error.message


# --- precision and device -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requested", "device", "has_bf16", "expected", "word"),
    [
        ("auto", "cuda", True, torch.bfloat16, "range of fp32"),
        ("auto", "cuda", False, torch.float16, "no bf16"),
        ("auto", "cpu", True, torch.bfloat16, "fast"),
        ("auto", "cpu", False, torch.float32, "no fast bf16"),
        ("bf16", "cpu", False, torch.float32, "instead"),
        ("bf16", "cuda", False, torch.float16, "instead"),
        ("fp16", "cpu", True, torch.float32, "instead"),
        ("fp16", "cuda", True, torch.float16, "as asked"),
        (torch.bfloat16, "cpu", True, torch.bfloat16, "as asked"),
        ("fp32", "cpu", True, torch.float32, "as asked"),
    ],
)
def test_the_precision_is_what_the_device_can_do_and_the_reason_is_given(
    monkeypatch: pytest.MonkeyPatch, requested: Any, device: str, has_bf16: bool, expected: torch.dtype, word: str
) -> None:
    monkeypatch.setattr(load_module, "_supports_bf16", lambda _: has_bf16)
    chosen, reason = choose_dtype(requested, device)
    assert chosen is expected
    assert word in reason


def test_an_unknown_precision_names_the_known_ones() -> None:
    for wanted in ("int3", torch.float64):
        with pytest.raises(ModelError) as caught:
            choose_dtype(wanted, "cpu")  # type: ignore[arg-type]
        assert caught.value.code == "MODEL_BAD_DTYPE"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_an_error_and_never_a_silent_cpu(folder: Path) -> None:
    with pytest.raises(HardwareError) as caught:
        load(folder, device="cuda")
    assert caught.value.code == "GPU_NOT_AVAILABLE"


# --- padding --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roles", "extra", "expected"),
    [
        ({"pad_token": "<|pad|>"}, [], "<|pad|>"),
        ({"pad_token": "<|im_end|>"}, [], "<|endoftext|>"),  # pad = eos: the tokenizer's other special token serves
        ({"pad_token": None}, [], "<|endoftext|>"),
        ({"pad_token": None, "eos_token": "<|endoftext|>"}, ["<|finetune_right_pad_id|>"], "<|finetune_right_pad_id|>"),
        ({"pad_token": None, "eos_token": "<|endoftext|>"}, ["<|reserved_special_token_3|>"], "<|reserved_special_token_3|>"),
        ({"pad_token": None, "eos_token": "<|endoftext|>"}, ["<unk>"], "<unk>"),
        ({"pad_token": None, "eos_token": "<|endoftext|>"}, [], "<|endoftext|>"),
    ],
)
def test_padding_takes_an_existing_token_that_is_not_the_end(roles: dict[str, Any], extra: list[str], expected: str) -> None:
    tokenizer = tiny_tokenizer(**({"pad_token": None} | roles))
    _forget_pad(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": extra} if extra and extra != ["<unk>"] else {})
    if extra == ["<unk>"]:
        tokenizer.add_special_tokens({"unk_token": "<unk>"})
    size = len(tokenizer)
    note = ensure_padding_token(tokenizer)
    assert tokenizer.pad_token == expected
    assert len(tokenizer) == size, "no token may be added: the embedding has no row for it"
    assert (note is None) == (roles.get("pad_token") == "<|pad|>")
    if expected == tokenizer.eos_token:
        assert note and "labels come from spans" in note


def _forget_pad(tokenizer: Any) -> None:
    """The tiny vocabulary always holds <|pad|>; take its special mark away so that it is no candidate."""
    if tokenizer.pad_token != "<|pad|>":
        tokenizer.backend_tokenizer.add_tokens(["<|pad|>"])
        from tokenizers import AddedToken

        tokenizer.backend_tokenizer.add_tokens([AddedToken("<|pad|>", special=False)])


def test_training_pads_on_the_right_and_generation_knows_the_token(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", padding_side="left")
    loaded = load(folder)
    assert loaded.tokenizer.padding_side == "right"
    assert loaded.model.generation_config.pad_token_id == loaded.tokenizer.pad_token_id != loaded.tokenizer.eos_token_id


# --- attaching adapters ---------------------------------------------------------------------------


def test_auto_and_all_linear_resolve_to_names_that_exist() -> None:
    model = tiny_model("llama")
    assert resolve_targets(model, "auto") == ["q_proj", "v_proj"]
    everything = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert resolve_targets(model, "all-linear") == everything
    model.config.model_type = "a_family_peft_does_not_list"
    assert resolve_targets(model, "auto") == everything


def test_targets_may_be_a_list_a_name_or_a_pattern() -> None:
    model = tiny_model("llama")
    for wanted, layers in (
        (["q_proj"], 2),
        ("q_proj", 2),
        (r".*layers\.1\.self_attn\.(q|k)_proj", 2),
        (["layers.0.mlp.up_proj"], 1),
    ):
        adapted = attach_adapter(tiny_model("llama"), AdapterSpec(target_modules=wanted))
        assert sum(name.endswith("lora_A.default.weight") for name, _ in adapted.named_parameters()) == layers
    assert resolve_targets(model, "q_proj") == ["q_proj"]


@pytest.mark.parametrize("wanted", [["q_proj", "qq_proj"], "qq_proj", r".*\.nothing", "q_proj("])
def test_a_target_that_fits_nothing_is_an_error_with_the_names_there_are(wanted: Any) -> None:
    with pytest.raises(ModelError) as caught:
        attach_adapter(tiny_model("llama"), AdapterSpec(target_modules=wanted))
    assert caught.value.code == "ADAPTER_TARGET_MISSING"
    if wanted != "q_proj(":
        assert "q_proj" in str(caught.value.remedy)


def test_the_output_layer_is_sent_to_modules_to_save() -> None:
    with pytest.raises(ModelError) as caught:
        attach_adapter(tiny_model("llama"), AdapterSpec(target_modules=["q_proj", "lm_head"]))
    assert caught.value.code == "ADAPTER_TARGET_HEAD"
    adapted = attach_adapter(tiny_model("llama"), AdapterSpec(modules_to_save=["lm_head"]))
    assert any("lm_head.modules_to_save" in name and p.requires_grad for name, p in adapted.named_parameters())
    with pytest.raises(ModelError, match="lm_haed"):
        attach_adapter(tiny_model("llama"), AdapterSpec(modules_to_save=["lm_haed"]))


def test_counts_and_options_follow_the_spec() -> None:
    adapted = attach_adapter(tiny_model("llama", hidden=48), AdapterSpec(r=4, alpha=8, target_modules=["q_proj"]))
    assert trainable_parameters(adapted) == (2 * 4 * (48 + 48), sum(p.numel() for p in adapted.parameters()))
    rslora = attach_adapter(tiny_model("llama"), AdapterSpec(kind="rslora", r=16, alpha=32, target_modules=["q_proj"]))
    assert rslora.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 8
    dora = attach_adapter(tiny_model("llama"), AdapterSpec(kind="dora"))
    assert any("magnitude" in name for name, _ in dora.named_parameters())


def test_an_adapter_on_a_bf16_base_is_fp32() -> None:
    adapted = attach_adapter(tiny_model("llama").bfloat16(), AdapterSpec())
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_full_fine_tuning_trains_everything_but_not_a_quantised_model(tmp_path: Path) -> None:
    model = attach_adapter(tiny_model("llama").requires_grad_(False), AdapterSpec(kind="full"))
    assert trainable_parameters(model).trainable == trainable_parameters(model).total
    quantized = load(save_tiny(tmp_path / "b", hidden=64), quantize="nf4")
    with pytest.raises(TrainingError, match="quantised"):
        attach_adapter(quantized.model, AdapterSpec(kind="full"))


def test_qlora_without_quantisation_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        attach_adapter(tiny_model("llama"), AdapterSpec(kind="qlora"))
    assert caught.value.code == "ADAPTER_NEEDS_QUANTIZED_BASE"


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(TrainingError) as caught:
        require_trainable(tiny_model("llama").requires_grad_(False))
    assert caught.value.code == "TRAINING_NO_TRAINABLE_PARAMETERS"


# --- saved adapters -------------------------------------------------------------------------------


def save_adapter(base: Path, target: Path, *, seed: int = 0, spec: AdapterSpec | None = None) -> torch.Tensor:
    """Save an adapter with random weights; returns the logits of base + adapter."""
    torch.manual_seed(seed)
    model = attach_adapter(load(base).model, spec or AdapterSpec(r=4, alpha=8)).eval()
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.2)
    save_adapter_of(model, target)
    return model(IDS).logits.detach()


def test_saving_an_adapter_asks_nobody_and_others_may_read_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *_: pytest.fail("the hub was asked"))
    model = attach_adapter(load(folder).model, AdapterSpec(modules_to_save=["embed_tokens"]), base_revision="abc")
    model.peft_config["default"].base_model_name_or_path = "starter"
    model.save_pretrained(tmp_path / "checkpoint")  # as a trainer does
    save_adapter_of(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("starter", "abc")
    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_mode & 0o044 == 0o044


def test_several_adapters_on_one_base_switch_and_turn_off(folder: Path, tmp_path: Path) -> None:
    expected = {name: save_adapter(folder, tmp_path / name, seed=n) for n, name in enumerate(("first", "second"))}
    loaded = load_with_adapters(str(folder), {n: tmp_path / n for n in expected}, dtype="fp32", device="cpu")
    for name in ("first", "second", "first"):
        switch_adapter(loaded.model, name)
        torch.testing.assert_close(loaded.model(IDS).logits, expected[name])
    with base_only(loaded.model) as model:
        torch.testing.assert_close(model(IDS).logits, tiny_model("llama").eval()(IDS).logits)
    torch.testing.assert_close(loaded.model(IDS).logits, expected["first"])
    with pytest.raises(ModelError, match="third"):
        switch_adapter(loaded.model, "third")


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "ia3"])
def test_a_merged_copy_answers_as_base_and_adapter_do(folder: Path, tmp_path: Path, kind: Any) -> None:
    expected = save_adapter(folder, tmp_path / "a", spec=AdapterSpec(kind=kind, target_modules="auto"))
    merged = merged_copy(str(folder), tmp_path / "a", dtype="fp32", device="cpu")
    torch.testing.assert_close(merged.model(IDS).logits, expected, atol=1e-5, rtol=1e-4)
    assert type(merged.model).__name__ == "LlamaForCausalLM"


def test_a_prefix_cannot_be_merged(folder: Path, tmp_path: Path) -> None:
    save_adapter(folder, tmp_path / "a", spec=AdapterSpec(kind="prefix"))
    with pytest.raises(ModelError) as caught:
        merged_copy(str(folder), tmp_path / "a", dtype="fp32")
    assert caught.value.code == "ADAPTER_NOT_MERGEABLE"


def adapter_refusal(base: Path, adapter: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_with_adapters(str(base), {"tuned": adapter}, dtype="fp32", device="cpu")
    return caught.value


def test_an_adapter_stored_as_a_pickle_is_refused_and_not_opened(folder: Path, tmp_path: Path) -> None:
    save_adapter(folder, tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    (tmp_path / "a" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert adapter_refusal(folder, tmp_path / "a").code == "ADAPTER_PICKLE"


@pytest.mark.parametrize("damage", [cut_in_half, lie_about_the_header, empty])
def test_a_damaged_adapter_is_refused(folder: Path, tmp_path: Path, damage: Any) -> None:
    save_adapter(folder, tmp_path / "a")
    damage(tmp_path / "a" / "adapter_model.safetensors")
    assert adapter_refusal(folder, tmp_path / "a").code == "ADAPTER_CORRUPT"


def test_an_adapter_config_may_not_import_modules(folder: Path, tmp_path: Path) -> None:
    save_adapter(folder, tmp_path / "a")
    edit_json(tmp_path / "a" / "adapter_config.json", megatron_config={}, megatron_core="os")
    load_with_adapters(str(folder), {"tuned": tmp_path / "a"}, dtype="fp32", device="cpu")
    edit_json(tmp_path / "a" / "adapter_config.json", megatron_config={"x": 1}, megatron_core="os")
    assert adapter_refusal(folder, tmp_path / "a").code == "ADAPTER_CORRUPT"


def test_an_adapter_of_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    wider = save_tiny(tmp_path / "wider", hidden=64)
    deeper = save_tiny(tmp_path / "deeper", layers=3)
    for name, other in (("wide", wider), ("deep", deeper)):
        save_adapter(other, tmp_path / name)
        error = adapter_refusal(folder, tmp_path / name)
        assert error.code == "ADAPTER_BASE_MISMATCH"
        assert str(other) in str(error.remedy)


def test_an_adapter_that_lacks_a_tensor_is_refused(folder: Path, tmp_path: Path) -> None:
    save_adapter(folder, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)
    assert adapter_refusal(folder, tmp_path / "a").code == "ADAPTER_BASE_MISMATCH"


def test_a_folder_without_an_adapter_says_what_to_name(folder: Path, tmp_path: Path) -> None:
    assert adapter_refusal(folder, tmp_path).code == "ADAPTER_NOT_FOUND"


def test_no_adapters_at_all_is_the_base(folder: Path) -> None:
    loaded = load_with_adapters(str(folder), {}, dtype="fp32", device="cpu")
    with base_only(loaded.model) as model:
        assert torch.equal(model(IDS).logits, tiny_model("llama").eval()(IDS).logits)
    with pytest.raises(ValueError, match="at least one"):
        load_adapters(loaded.model, {})
