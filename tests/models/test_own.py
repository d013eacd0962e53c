"""Models of one's own: a module file is run once, checked, trained, asked, exported and found again; what cannot work is refused."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuneflow.config import build_config
from finetuneflow.data.examples import Message
from finetuneflow.errors import FineTuneFlowError, ModelError
from finetuneflow.export import export
from finetuneflow.inference import Decoding, load_generator
from finetuneflow.models import own
from finetuneflow.models.adapters import AdapterSpec, attach_adapter
from finetuneflow.models.load import load_base
from finetuneflow.models.new import new_model
from finetuneflow.models.source import ModelSource, resolve, tokenizer_folder
from finetuneflow.planning.base_model import look_at_model
from finetuneflow.workspace import sha256_file
from models.tiny import save_tiny, tiny_tokenizer
from training.workbench import Bench, at, sums, write_rows

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "custom_model" / "gated_conv.py"
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
REGISTRATION = EXAMPLE.read_text()[EXAMPLE.read_text().index("AutoConfig.register") :]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of the example architecture with the test suite's tokenizer."""
    root = tmp_path_factory.mktemp("own")
    tiny_tokenizer().save_pretrained(root / "tokenizer")
    new_model(EXAMPLE, root / "base", settings=TINY, tokenizer=str(root / "tokenizer"), seed=1)
    return root / "base"


def variant(folder: Path, *changes: tuple[str, str], name: str = "variant.py") -> Path:
    """The example with some text replaced; each text must be there."""
    text = EXAMPLE.read_text()
    for before, after in changes:
        assert before in text, before
        text = text.replace(before, after)
    path = folder / name
    path.write_text(text)
    return path


def load(base: Path, module: Path = EXAMPLE, **options: Any) -> Any:
    return load_base(ModelSource(str(base), module=str(module)), **{"dtype": "fp32", "device": "cpu"} | options)


def refusal(call: Callable[[], Any]) -> FineTuneFlowError:
    with pytest.raises(FineTuneFlowError) as caught:
        call()
    return caught.value


# --- the file ---------------------------------------------------------------------------------------


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 100


def test_a_file_is_run_once_and_its_classes_are_registered(tmp_path: Path) -> None:
    counter = tmp_path / "runs"
    path = variant(tmp_path, ("import torch\n", f"import torch\nopen({str(counter)!r}, 'a').write('x')\n"))
    first, second = own.provide(path), own.provide(path)
    assert first is second and counter.read_text() == "x"
    assert own.causal_class("gated_conv") is first.model_class
    assert first.sha256 == sha256_file(path)
    assert not list(tmp_path.glob("__pycache__"))


def test_two_versions_of_a_file_can_be_used_in_turn(tmp_path: Path) -> None:
    old, new = own.provide(EXAMPLE), own.provide(variant(tmp_path, ("kernel_size: int = 7", "kernel_size: int = 5")))
    assert (old.config_class().kernel_size, new.config_class().kernel_size) == (7, 5)
    assert own.causal_class("gated_conv") is new.model_class
    own.provide(EXAMPLE)
    assert own.causal_class("gated_conv") is old.model_class


def test_a_file_may_expose_register_instead(tmp_path: Path) -> None:
    indented = "def register():\n" + "".join(f"    {line}\n" for line in REGISTRATION.splitlines())
    assert own.provide(variant(tmp_path, (REGISTRATION, indented))).model_type == "gated_conv"


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ([("import torch\n", "import torch\nimport no_such_package\n")], "MODEL_MODULE_FAILED", "no_such_package"),
        ([("import torch\n", "import torch\nraise SystemExit(3)\n")], "MODEL_MODULE_FAILED", "SystemExit"),
        ([("import torch\n", "import torch\ndef broken(:\n")], "MODEL_MODULE_FAILED", "SyntaxError"),
        ([(REGISTRATION, "")], "MODEL_MODULE_INVALID", "registers no architecture"),
        ([(REGISTRATION.splitlines()[1], "")], "MODEL_MODULE_INVALID", "without a causal language model"),
        ([('model_type = "gated_conv"', 'model_type = "llama"')], "MODEL_MODULE_INVALID", "llama"),
        (
            [
                ('model_type = "gated_conv"', 'model_type = "llama"'),
                ("GatedConvConfig)\nAuto", "GatedConvConfig, exist_ok=True)\nAuto"),
            ],
            "MODEL_MODULE_INVALID",
            "llama",
        ),
        ([('model_type = "gated_conv"', 'model_type = "mamba_swelu"')], "MODEL_MODULE_INVALID", "mamba_swelu"),
        ([("(PreTrainedModel, GenerationMixin)", "(PreTrainedModel)")], "MODEL_MODULE_INVALID", "cannot generate"),
        ([("    config_class = GatedConvConfig\n", "")], "MODEL_MODULE_INVALID", "config_class = MyConfig"),
        ([("    def forward(self, input_ids,", "    def compute(self, input_ids,")], "MODEL_MODULE_INVALID", "no forward"),
        ([("attention_mask=None, labels=None, **kwargs", "labels=None")], "MODEL_MODULE_INVALID", "no attention_mask"),
        ([("labels=None, **kwargs", "labels=None")], "MODEL_MODULE_INVALID", "no **kwargs"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_a_file_lacks_is_said(tmp_path: Path, changes: list[tuple[str, str]], code: str, words: str) -> None:
    error = refusal(lambda: own.provide(variant(tmp_path, *changes)))
    assert error.code == code and error.where is not None and "variant.py" in error.where
    assert words in f"{error.message} {error.remedy}"


def test_after_a_refusal_the_registers_are_as_before(tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING, LlamaConfig

    kept = own.provide(EXAMPLE)
    broken = variant(
        tmp_path,
        ('model_type = "gated_conv"', 'model_type = "llama"'),
        ("GatedConvConfig)\nAuto", "GatedConvConfig, exist_ok=True)\nAuto"),
    )
    refusal(lambda: own.provide(broken))
    assert CONFIG_MAPPING["llama"] is LlamaConfig
    assert own.causal_class("gated_conv") is kept.model_class


def test_the_line_of_an_import_error_is_named(tmp_path: Path) -> None:
    path = variant(tmp_path, ("import torch\n", "import torch\nraise KeyError('that')\n"))
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if "raise KeyError" in text)
    assert refusal(lambda: own.provide(path)).where == f"{path}:{line}"


def test_a_missing_file_and_one_that_is_no_python_are_refused(tmp_path: Path) -> None:
    assert refusal(lambda: own.provide(tmp_path / "nowhere.py")).code == "MODEL_MODULE_NOT_FOUND"
    (tmp_path / "model.txt").write_text("x")
    assert refusal(lambda: own.provide(tmp_path / "model.txt")).code == "MODEL_MODULE_INVALID"


# --- what its model must do -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([("(self.reach, 0)", "(self.reach // 2, self.reach - self.reach // 2)")], "tokens after it"),
        (
            [
                ("(value * mask)", "value"),
            ],
            "masks_padding",
        ),
        ([("def prepare_inputs_for_generation", "def unused")], "newest token alone"),
        (
            [
                ("def prepare_inputs_for_generation", "def unused"),
                ("labels=None, **kw", "past_key_values=None, labels=None, **kw"),
            ],
            "newest token alone",
        ),
        (
            [("CausalLMOutput(loss=loss, logits=logits)", "CausalLMOutput(loss=loss, logits=logits[:, -1:])")],
            "of shape (1, 1, 512)",
        ),
        ([("self.embed_tokens", "self.table"), ('"embed_tokens.weight"', '"table.weight"')], "token table is not found"),
        ([("self.lm_head", "self.out"), ('"lm_head.weight"', '"out.weight"')], "output layer is not found"),
        ([("self.norm(x)", "self.norm(x, 3, 4)")], "a trial of the model fails with TypeError"),
    ],
    ids=["looks ahead", "padding", "no cache", "cache not used", "logits", "table", "head", "raises"],
)
def test_a_model_that_would_mislead_training_or_generation_is_refused(
    tmp_path: Path, changes: list[tuple[str, str]], words: str
) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    path = variant(tmp_path, *changes)
    error = refusal(lambda: new_model(path, tmp_path / "base", settings=TINY, tokenizer=str(tmp_path / "tokenizer")))
    assert error.code in ("MODEL_MODULE_INVALID", "MODEL_MODULE_FAILED") and words in error.message
    assert not (tmp_path / "base").exists()


def test_a_model_without_gradient_checkpointing_passes_it_over_and_says_so(base: Path, tmp_path: Path) -> None:
    path = variant(tmp_path, ("    supports_gradient_checkpointing = True\n", ""))
    loaded = load(base, path)
    loaded.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert any("does not support gradient checkpointing" in note for note in loaded.notes)
    assert not any("checkpointing" in note for note in load(base).notes)


# --- the base ---------------------------------------------------------------------------------------


def test_without_its_module_a_base_is_refused_and_model_module_is_named(base: Path, tmp_path: Path) -> None:
    """In a process that has never seen the file: what was registered before would be known here."""
    script = (
        "import sys\nfrom finetuneflow.errors import ModelError\nfrom finetuneflow.models.source import ModelSource, resolve\n"
        "try:\n    resolve(ModelSource(sys.argv[1]))\nexcept ModelError as e:\n    print(e.code, e.remedy)\n"
    )
    shown = subprocess.run([sys.executable, "-c", script, str(base)], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("MODEL_UNSUPPORTED_ARCH") and "model.module" in shown


def test_code_inside_a_model_folder_is_not_run_by_naming_another_file(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    assert load(folder).facts.model_type == "gated_conv"  # the user's file brings the classes
    assert refusal(lambda: resolve(ModelSource(str(folder)))).code == "MODEL_REMOTE_CODE"
    assert not (tmp_path / "ran").exists()


def test_a_base_of_another_architecture_is_refused(tmp_path: Path) -> None:
    error = refusal(lambda: load(save_tiny(tmp_path / "llama")))
    assert error.code == "MODEL_MODULE_MISMATCH" and "llama" in error.message and "gated_conv" in error.message


def test_the_digest_of_a_base_covers_the_module(base: Path, tmp_path: Path) -> None:
    digest = resolve(ModelSource(str(base), module=str(EXAMPLE))).digest
    elsewhere = variant(tmp_path, name="elsewhere.py")
    changed = variant(tmp_path, ("nn.RMSNorm(width)", "nn.RMSNorm(width, eps=1e-5)"))
    assert resolve(ModelSource(str(base), module=str(elsewhere))).digest == digest
    assert resolve(ModelSource(str(base), module=str(changed))).digest != digest


def test_a_new_model_is_the_same_for_the_same_seed_and_never_written_over(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tokenizer = str(base)
    for name, seed in (("a", 1), ("b", 2)):
        new_model(EXAMPLE, tmp_path / name, settings=TINY, tokenizer=tokenizer_only(tokenizer, tmp_path), seed=seed)
    first, same, other = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "a", tmp_path / "b"))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])
    assert refusal(lambda: new_model(EXAMPLE, base, settings=TINY)).code == "STORAGE_EXISTS"
    assert "hidden_size" in refusal(lambda: new_model(EXAMPLE, tmp_path / "c", settings={"hiden_size": 3})).message


def tokenizer_only(base: str, folder: Path) -> str:
    """The tokenizer of a base alone: a folder without config.json."""
    target = folder / "tokenizer"
    tiny_tokenizer().save_pretrained(target)
    assert tokenizer_folder(ModelSource(str(target))) == (target, False)
    return str(target)


# --- adapters, precision, batches ----------------------------------------------------------------------

IDS = torch.arange(5, 17).reshape(2, 6)


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
def test_adapters_go_on_every_linear_layer_but_the_head_and_all_of_them_learn(base: Path, targets: str) -> None:
    model = attach_adapter(load(base).model, AdapterSpec(r=2, dropout=0.0, target_modules=targets))
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == {f"base_model.model.layers.{n}.{name}" for n in (0, 1) for name in ("in_proj", "out_proj")}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if ".lora_B." in name)


def test_a_head_named_like_a_layer_inside_gets_no_adapter(tmp_path: Path) -> None:
    path = variant(
        tmp_path,
        ("self.lm_head", "self.out_proj"),
        ("    _tied_weights_keys", "    get_output_embeddings = lambda self: self.out_proj\n    _tied_weights_keys"),
        ('"lm_head.weight"', '"out_proj.weight"'),
    )
    new_model(path, tmp_path / "base", settings=TINY, tokenizer=tokenizer_only("", tmp_path))
    model = attach_adapter(load(tmp_path / "base", path).model, AdapterSpec(r=2, target_modules="all-linear"))
    assert not [name for name, _ in model.named_parameters() if name.startswith("base_model.model.out_proj.lora")]
    assert [name for name, _ in model.named_parameters() if "layers.0.out_proj.lora" in name]


def test_prefix_tuning_needs_attention(base: Path) -> None:
    error = refusal(lambda: attach_adapter(load(base).model, AdapterSpec(kind="prefix")))
    assert error.code == "ADAPTER_UNSUPPORTED" and "no attention" in error.message


def test_its_linear_layers_are_stored_in_four_bits(base: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plain, packed = load(base), load(base, quantize="nf4")
    kinds = {name: type(module).__name__ for name, module in packed.model.named_modules()}
    assert kinds["layers.0.in_proj"] == "Linear4bit" and kinds["lm_head"] == "Linear"
    assert packed.facts.num_parameters == plain.facts.num_parameters
    with torch.no_grad():
        apart = (packed.model(input_ids=IDS).logits - plain.model(input_ids=IDS).logits).std()
        assert 0 < apart < 0.3 * plain.model(input_ids=IDS).logits.std()


def test_a_model_without_linear_layers_is_not_quantised(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    path = variant(
        tmp_path,
        ("class Block", "class Projection(nn.Linear):\n    pass\n\n\nclass Block"),
        ("        self.in_proj = nn.Linear(width, 2 * width, bias=False)", "        self.in_proj = Wide(width)"),
        ("        self.out_proj = nn.Linear(width, width, bias=False)\n", "        self.out_proj = nn.Identity()\n"),
        ("class Projection(nn.Linear):\n    pass\n", WIDE),
    )
    new_model(path, tmp_path / "base", settings=TINY, tokenizer=tokenizer_only("", tmp_path))
    assert load(tmp_path / "base", path).facts.model_type == "gated_conv"
    error = refusal(lambda: load(tmp_path / "base", path, quantize="nf4"))
    assert error.code == "MODEL_MODULE_INVALID" and "no nn.Linear" in error.message


def test_a_model_that_reads_weights_directly_is_not_quantised(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    direct = "nn.functional.linear(nn.functional.silu(gate) * value, self.out_proj.weight)"
    path = variant(tmp_path, ("self.out_proj(nn.functional.silu(gate) * value)", direct))
    new_model(path, tmp_path / "base", settings=TINY, tokenizer=tokenizer_only("", tmp_path))
    error = refusal(lambda: load(tmp_path / "base", path, quantize="nf4"))
    assert error.code == "MODEL_MODULE_FAILED" and "quantised" in error.message
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if direct in text)
    assert error.where == f"{path}:{line}"


WIDE = '''class Wide(nn.Module):
    """A projection that is no nn.Linear."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2 * width, width), 0.01))

    def forward(self, x):
        return x @ self.weight.T
'''


def test_prompts_share_a_batch_only_where_the_model_masks_padding(base: Path, tmp_path: Path) -> None:
    silent = variant(tmp_path, ("    masks_padding = True\n", ""))
    prompts = [[5, 6, 7], [8, 9], [10, 11]]
    batches = {}
    for name, module in (("masks", EXAMPLE), ("silent", silent)):
        generator = load_generator(base, module=str(module), dtype="fp32")
        batches[name] = generator.plan_batches(prompts, Decoding(max_new_tokens=4), batch_size=8)
    assert batches == {"masks": [[0, 1, 2]], "silent": [[0], [1, 2]]}


def test_an_answer_is_the_same_alone_and_in_a_batch(base: Path) -> None:
    generator = load_generator(base, module=str(EXAMPLE), dtype="fp32")
    prompts = [[Message("user", text)] for text in ("Hello", "What is 3 plus 4, and why?", "Oui")]
    together = generator.generate(prompts, max_new_tokens=8)
    assert [generator.generate([prompt], max_new_tokens=8)[0].ids for prompt in prompts] == [answer.ids for answer in together]
    assert "".join(generator.stream(prompts[1], max_new_tokens=8)) == together[1].text


# --- a run, from training to export ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("bench")
    return Bench(root, base, write_rows(root / "data.jsonl", sums(24)))


@pytest.fixture
def module(bench: Bench) -> Path:
    """The user's file, outside every model folder; the same again for each test."""
    path = bench.root / "my_arch.py"
    path.write_text(EXAMPLE.read_text())
    return path


def test_train_ask_measure_export_and_load_elsewhere(bench: Bench, module: Path, base: Path, tmp_path: Path) -> None:
    result = bench.train(model__module=str(module), training__epochs=4, training__eval_steps=20, training__save_steps=20)
    run = result.run_dir
    assert result.status == "succeeded"
    curve = [point["loss"] for point in result.metrics["train_loss_curve"]]
    assert curve[-1] < curve[0]
    assert not bench.seen("warning", code="PLAN_FAILED")
    record = json.loads((run / "module" / "module.json").read_text())
    assert record["sha256"] == sha256_file(module) == sha256_file(run / "module" / "my_arch.py")

    module.unlink()  # the run keeps a copy: it is found again without the original
    answers = load_generator(run, dtype="fp32").generate([[Message("user", "What is 3 plus 10?")]], max_new_tokens=6)
    without = load_generator(run, adapter=False, dtype="fp32")
    assert answers[0].ids != without.generate([[Message("user", "What is 3 plus 10?")]], max_new_tokens=6)[0].ids

    adapter, merged = export(run, "adapter"), export(run, "merged")
    for package in (adapter, merged):
        manifest = json.loads((package.dir / "manifest.json").read_text())
        assert package.check.passed and manifest["module"] == record
        assert sha256_file(package.dir / "my_arch.py") == record["sha256"]
        assert record["sha256"] in (package.dir / "README.md").read_text()
        assert f"import {Path(record['file']).stem}" in (package.dir / "README.md").read_text()
    beside = load_generator(adapter.dir, module=str(adapter.dir / "my_arch.py"), dtype="fp32")
    assert beside.generate([[Message("user", "What is 3 plus 10?")]], max_new_tokens=6)[0].ids == answers[0].ids
    assert elsewhere(merged.dir, list(answers[0].ids), beside) == "same"


def elsewhere(folder: Path, expected: list[int], generator: Any) -> str:
    """Load an exported model as its card says, in a process without FineTuneFlow, and compare its greedy answer."""
    prompt = list(generator.template.prompt_ids([Message("user", "What is 3 plus 10?")]))
    script = (
        "import json, sys\nfolder, prompt, expected = sys.argv[1], *map(json.loads, sys.argv[2:])\nsys.path.insert(0, folder)\n"
        "import my_arch, torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)\n"
        "ids = torch.tensor([prompt])\n"
        "out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[0, len(prompt):].tolist()\n"
        "assert 'finetuneflow' not in sys.modules\nprint('same' if out[:len(expected)] == expected else out)\n"
    )
    arguments = [str(folder), json.dumps(prompt), json.dumps(expected)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    return done.stdout.strip() or done.stderr


def test_a_fully_trained_model_of_ones_own_is_asked_and_exported(bench: Bench, module: Path) -> None:
    result = bench.train(model__module=str(module), method__kind="full", training__max_steps=2, training__objective="pretrain")
    assert load_generator(result.run_dir, dtype="fp32").model.config.model_type == "gated_conv"
    package = export(result.run_dir, "merged")
    assert package.check.passed and (package.dir / "my_arch.py").is_file()
    assert "auto_map" not in (package.dir / "config.json").read_text()


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_gradient_checkpointing_is_used_where_the_model_knows_it_and_passed_over_where_not(
    bench: Bench, module: Path, kind: str
) -> None:
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
    asked: dict[str, Any] = {"method__kind": kind, "training__gradient_checkpointing": "on", "training__max_steps": 2}
    losses = []
    for text in (EXAMPLE.read_text(), EXAMPLE.read_text().replace("    supports_gradient_checkpointing = True\n", "")):
        module.write_text(text)
        losses.append(bench.train(model__module=str(module), **asked).metrics["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert any("does not support gradient checkpointing" in str(event.get("reason")) for event in bench.seen("decision"))


def test_a_resume_notices_a_changed_module_and_goes_on_with_the_same(bench: Bench, module: Path) -> None:
    run = bench.interrupted(at("checkpoint", step=4), model__module=str(module))
    module.write_text(module.read_text().replace("nn.RMSNorm(width)", "nn.RMSNorm(width, eps=1e-5)"))
    error = refusal(lambda: bench.resume(run))
    assert error.code == "RESUME_CHANGED" and "base model" in error.message
    module.write_text(EXAMPLE.read_text())
    assert bench.resume(run).status == "succeeded"


def test_a_copy_that_was_changed_in_the_run_directory_is_not_run(bench: Bench, module: Path) -> None:
    run = bench.train(model__module=str(module), training__max_steps=1).run_dir
    ran = bench.root / "ran"
    copy = run / "module" / "my_arch.py"
    copy.write_text(f"open({str(ran)!r}, 'w')\n" + copy.read_text())
    error = refusal(lambda: load_generator(run))
    assert error.code == "MODEL_MODULE_INVALID" and "SHA-256" in error.message
    assert not ran.exists()


def test_a_relative_module_is_made_absolute_for_the_run(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(module.parent)
    config = build_config({"model": {"module": module.name}})[0].with_absolute_paths()
    assert config.model.module == str(module)


def test_no_recipe_can_name_a_module() -> None:
    from finetuneflow.knowledge.recipes.schema import RECIPE_SETTINGS

    assert not [name for name in RECIPE_SETTINGS if name.startswith("model.")]


@pytest.mark.parametrize("layout", ["simplified", "selective"])
def test_our_own_architecture_trains_answers_and_exports_without_a_module(tmp_path: Path, layout: str) -> None:
    sizes = {"d_model": 48, "n_layers": 2, "dense_hidden_dim": 64, "d_state": 4, "max_seq_len": 256, "layout": layout}
    new_model("mamba_swelu", tmp_path / "base", settings=sizes, tokenizer=tokenizer_only("", tmp_path))
    bench = Bench(tmp_path, tmp_path / "base", write_rows(tmp_path / "data.jsonl", sums(16)))
    result = bench.train(method__r=8, training__eval_steps=20, training__save_steps=20)
    assert result.status == "succeeded" and not bench.seen("warning", code="PLAN_FAILED")
    assert not (result.run_dir / "module").exists()
    generator = load_generator(result.run_dir, dtype="fp32")
    assert len(generator.plan_batches([[5, 6, 7], [8, 9]], Decoding(max_new_tokens=4), batch_size=8)) == 1
    prompts = [[Message("user", text)] for text in ("Hello", "What is 3 plus 4, and why?")]
    together = generator.generate(prompts, max_new_tokens=6)
    assert [generator.generate([prompt], max_new_tokens=6)[0].ids for prompt in prompts] == [answer.ids for answer in together]
    package = export(result.run_dir, "merged")
    assert package.check.passed and "finetuneflow.models.mamba_swelu" in (package.dir / "README.md").read_text()


def test_fresh_weights_are_trained_at_the_rate_asked_for_and_trained_ones_are_not(
    bench: Bench, module: Path, base: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"method__kind": "full", "training__learning_rate": 1e-3, "training__max_steps": 1}
    run = bench.train(model__module=str(module), **asked).run_dir
    assert json.loads((run / "environment.json").read_text())["setup"]["learning_rate"] == 1e-3
    assert not bench.seen("finding", code="LR_ADAPTER_RATE_ON_FULL")
    assert not (run / "model" / "ftf_new.json").exists()
    trained = tmp_path / "trained"
    shutil.copytree(run / "model", trained)
    tiny_tokenizer().save_pretrained(trained)
    again = Bench(tmp_path, trained, bench.data).train(model__module=str(module), **asked).run_dir
    assert json.loads((again / "environment.json").read_text())["setup"]["learning_rate"] == 2e-5


# --- before a run -------------------------------------------------------------------------------------


def test_a_plan_counts_the_weights_and_runs_nothing_of_the_users(base: Path) -> None:
    """Parameters of the folder, by its headers alone: neither torch nor the module is imported."""
    script = (
        "import sys\nfrom finetuneflow.planning.base_model import look_at_model\nfound = look_at_model(sys.argv[1])\n"
        "loaded = [n for n in sys.modules if n == 'torch' or n.startswith('finetuneflow_own')]\n"
        "print(found.shape.num_parameters, sorted(l.name for l in found.shape.linears), loaded, bool(found.notes))\n"
    )
    shown = subprocess.run([sys.executable, "-c", script, str(base)], capture_output=True, text=True, check=True).stdout
    total = sum(parameter.numel() for parameter in load(base).model.parameters())
    assert shown.strip() == f"{total} ['in_proj', 'out_proj'] [] True"


def test_what_an_author_states_of_the_shape_is_written_as_data_and_read_by_a_plan(tmp_path: Path) -> None:
    path = variant(
        tmp_path,
        (
            REGISTRATION,
            "def ftf_shape(config):\n    return {'state_values': config['num_hidden_layers'] * 11, 'state_size': 3}\n\n\n"
            + REGISTRATION,
        ),
    )
    new_model(path, tmp_path / "base", settings=TINY, tokenizer=tokenizer_only("", tmp_path))
    assert json.loads((tmp_path / "base" / "ftf_shape.json").read_text()) == {"state_values": 22, "state_size": 3}
    shape = look_at_model(str(tmp_path / "base")).shape
    assert (shape.state_values, shape.state_size) == (22, 3)
    (tmp_path / "base" / "ftf_shape.json").write_text(json.dumps({"num_parameters": 5}))
    with pytest.raises(ModelError, match="num_parameters"):
        look_at_model(str(tmp_path / "base"))


# --- the library's own state-space models ---------------------------------------------------------------


def state_space(model_type: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    sizes |= {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8} if model_type == "mamba2" else {"time_step_rank": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba"])
def test_state_space_models_of_transformers_learn(model_type: str, kind: Any) -> None:
    model = attach_adapter(state_space(model_type), AdapterSpec(kind=kind, r=4, dropout=0.0)).train()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=2e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(float(loss.detach()))
        if kind == "lora":
            assert all(p.grad is not None for p in learned)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


# --- the page ---------------------------------------------------------------------------------------


def test_the_page_names_every_optional_part_and_every_code() -> None:
    page = (ROOT / "docs" / "custom-models.md").read_text()
    codes = [code for code in ast_codes() if code.startswith("MODEL_MODULE")]
    assert len(codes) == 4
    for word in (*codes, "masks_padding", "ftf_shape", "prepare_inputs_for_generation", "model.module", "ftf model new"):
        assert word in page, word


def ast_codes() -> set[str]:
    """Codes of errors that `own.py` raises."""
    tree = ast.parse(Path(own.__file__).read_text())
    return {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    }
