"""Model files that lie: checkpoints, a user's module, folders of reward models. Each loads, or ends in one error of the family."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from evaluation.test_rewards import adapter_run, as_run, classifier
from finetuneflow.errors import FineTuneFlowError
from finetuneflow.evaluation.reward_model import load_reward_model, shared_reward_model
from finetuneflow.hardware import Memory
from finetuneflow.models import new as new_module
from finetuneflow.models import own
from finetuneflow.models.adapters import AdapterSpec, attach_adapter
from finetuneflow.models.mamba_swelu_checkpoint import convert_from_original, convert_to_original
from finetuneflow.models.new import new_model
from finetuneflow.models.reward import adapter_for_scoring, scoring_model
from models.test_mamba_swelu_checkpoint import original, refused, saved
from models.test_own import EXAMPLE, REGISTRATION, TINY, refusal, variant
from models.tiny import save_tiny, tiny_model, tiny_tokenizer

STATE, DENSE, LAYER = "model_state_dict", "dense1.weight", "mamba_stack.layers.0.mamba."

# --- checkpoints of the original ----------------------------------------------------------------------------


class Reduced:
    """Pickled as a call of a function with arguments, and then a state."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


ODD_WEIGHTS: dict[str, Callable[[], Any]] = {
    "a number": lambda: 3,
    "a text": lambda: "x",
    "a dictionary": dict,
    "expanded": lambda: torch.zeros(1).expand(28, 20),
    "expanded to a terabyte": lambda: torch.zeros(1).expand(10**6, 10**6),
    "sparse": lambda: torch.ones(28, 20).to_sparse(),
    "sparse rows": lambda: torch.ones(28, 20).to_sparse_csr(),
    "meta": lambda: torch.zeros(28, 20, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(28, 20), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)]),
    "float8": lambda: torch.zeros(28, 20).to(torch.float8_e4m3fn),
    "complex": lambda: torch.zeros(28, 20, dtype=torch.complex64),
    "integers": lambda: torch.zeros(28, 20, dtype=torch.int32),
    "truth values": lambda: torch.zeros(28, 20, dtype=torch.bool),
    "no rows": lambda: torch.zeros(0, 20),
    "no columns": lambda: torch.zeros(28, 0),
}


@pytest.mark.filterwarnings("ignore")  # torch warns that some of these kinds are young or old
@pytest.mark.parametrize("kind", ODD_WEIGHTS)
def test_a_weight_of_another_kind_is_named(kind: str, tmp_path: Path) -> None:
    payload = original()
    payload[STATE][DENSE] = ODD_WEIGHTS[kind]()
    error = refused(saved(tmp_path, payload), tmp_path / "model")
    assert error.code == "MODEL_CORRUPT" and f"under {DENSE}" in error.message and error.remedy


@pytest.mark.parametrize(
    "key",
    [3, None, ("a", 1), 1.5, torch.Size([1]), "a\ud800", "line\nbreak", "", "x" * 10**5, f"mamba_stack.layers.{'9' * 5000}.x"],
    ids=lambda key: repr(key)[:20],
)
def test_a_key_that_is_no_parameters_name_is_refused_and_can_be_printed(key: Any, tmp_path: Path) -> None:
    payload = original()
    payload[STATE][key] = torch.zeros(20)
    error = refused(saved(tmp_path, payload), tmp_path / "model")
    assert error.code == "MODEL_CORRUPT" and "no parameter's name" in error.message
    str(error).encode()
    assert len(error.message) < 300


@pytest.mark.parametrize("key", [1, None, "\ud800", "x" * 10**5], ids=lambda key: repr(key)[:20])
def test_keys_of_the_file_itself_are_no_less_odd(key: Any, tmp_path: Path) -> None:
    for payload in ({key: torch.zeros(2)}, {key: 1}):
        error = refused(saved(tmp_path, payload), tmp_path / "model")
        str(error).encode()
        assert error.code == "MODEL_CORRUPT" and len(error.message) < 300


@pytest.mark.parametrize("name", ["token_embedding.weight", "position_embedding.weight", f"{LAYER}conv1d.weight", DENSE])
def test_a_size_of_nothing_is_refused(name: str, tmp_path: Path) -> None:
    payload = original()
    payload[STATE][name] = payload[STATE][name][:0]
    assert f"under {name}" in refused(saved(tmp_path, payload), tmp_path / "model").message


@pytest.mark.parametrize("shape", [(), (40,), (2, 2, 2)], ids=str)
def test_a_state_of_other_dimensions_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    payload = original("selective")
    payload[STATE][f"{LAYER}A_log"] = torch.ones(shape)
    assert "A_log" in refused(saved(tmp_path, payload), tmp_path / "model").message


@pytest.mark.parametrize("stride", [0, 1], ids=["expanded", "shared"])
def test_tensors_that_claim_more_than_the_file_holds_are_refused(stride: int, tmp_path: Path) -> None:
    """Every shape fits every other: only the numbers are not there."""
    shapes = {name: value.shape for name, value in original(d_model=512, vocab_size=600, n_layers=3)[STATE].items()}
    one = torch.zeros(max(shape.numel() for shape in shapes.values()) if stride else 1)
    strides = {name: torch.empty(shape, device="meta").stride() for name, shape in shapes.items()}
    state = {name: one.as_strided(shape, [stride * step for step in strides[name]]) for name, shape in shapes.items()}
    path = saved(tmp_path, {STATE: state})
    assert path.stat().st_size < 10e6
    error = refused(path, tmp_path / "model")
    assert error.code == "MODEL_CORRUPT" and re.search(r"claims more|smaller than its tensors", error.message)


def test_more_layers_than_any_model_has_are_refused_before_one_is_made(tmp_path: Path) -> None:
    payload = original()
    payload[STATE] |= {f"mamba_stack.layers.{number}.norm.bias": torch.zeros(1) for number in range(2, 2_001)}
    assert "2,001 layers" in refused(saved(tmp_path, payload), tmp_path / "model").message


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("call", [(bytearray, (10**6,)), (__import__("_codecs").encode, ("x" * 99, "hex"))], ids=["bytes", "hex"])
def test_a_file_that_would_fill_the_memory_is_not_opened(call: Any, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    torch.save(original() | {"epoch": Reduced(*call)}, path, _use_new_zipfile_serialization=zipped)
    error = refused(path, tmp_path / "model")
    assert error.code == "MODEL_PICKLE" and call[0].__name__ in error.message


def test_compressed_parts_are_not_unpacked(tmp_path: Path) -> None:
    whole = saved(tmp_path, original())
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    error = refused(tmp_path / "bomb.pt", tmp_path / "model")
    assert error.code == "MODEL_CORRUPT" and "compressed" in error.message


def test_a_dictionary_that_hides_its_own_methods_is_read_all_the_same(tmp_path: Path) -> None:
    payload = original()
    armed = lambda entries: Reduced(OrderedDict, (list(entries.items()),), {"items": 5, "get": 5, "keys": 5})  # noqa: E731
    payload |= {STATE: armed(payload[STATE]), "config": armed(payload["config"])}
    assert convert_from_original(saved(tmp_path, armed(payload)), tmp_path / "model").step == 757_500


@pytest.mark.parametrize(
    "value",
    [torch.zeros(3), torch.tensor(50), "x" * 10**5, True, 1e300, float("nan"), float("inf"), None, [1], {1: 2}, 10**600, -1, 0],
    ids=lambda value: repr(value)[:12],
)
def test_settings_that_cannot_be_are_passed_over_and_said(value: Any, tmp_path: Path) -> None:
    payload = original(tie_word_embeddings=False)
    payload["config"] = dict.fromkeys(("vocab_size", "d_model", "dropout", "tie_embeddings", "expand"), value)
    payload["global_step"] = value
    report = convert_from_original(saved(tmp_path, payload), tmp_path / "model")
    assert report.settings["vocab_size"] == 50 and report.settings["d_model"] == 20
    assert report.settings["dropout"] == (0.0 if type(value) is int and value == 0 else 0.1)
    assert any("vocab_size" in note and "passed over" in note for note in report.notes)
    assert all(len(note) < 200 for note in report.notes)
    assert json.loads((tmp_path / "model" / "conversion.json").read_text())["step"] in (None, 0)
    convert_to_original(tmp_path / "model", tmp_path / "back.pt")


@pytest.mark.parametrize("config", [torch.zeros(3), "x", 5, [1], {1: 2, None: 3, "d_model": 20}], ids=repr)
def test_settings_of_another_kind_do_not_stop_a_conversion(config: Any, tmp_path: Path) -> None:
    payload = original() | {"config": config}
    assert convert_from_original(saved(tmp_path, payload), tmp_path / "model").settings["d_model"] == 20


def test_infinite_weights_are_reported(tmp_path: Path) -> None:
    payload = original()
    payload[STATE]["dense2.bias"][3] = float("inf")
    report = convert_from_original(saved(tmp_path, payload), tmp_path / "model")
    assert any("dense2.bias" in note and "cannot be used" in note for note in report.notes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_layers", 10**9),
        ("d_model", 10**12),
        ("d_model", 0),
        ("vocab_size", "x"),
        ("vocab_size", None),
        ("vocab_size", True),
        ("dropout", "x"),
        ("dropout", 7),
        ("swelu_k", [1]),
        ("initializer_range", -1),
        ("layout", "other"),
        ("layout", []),
        ("d_conv", 2.5),
        ("dtype", "float999"),
    ],
)
def test_a_folder_whose_settings_lie_does_not_become_a_checkpoint(name: str, value: Any, tmp_path: Path) -> None:
    convert_from_original(saved(tmp_path, original()), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {name: value}))
    error = refusal(lambda: convert_to_original(tmp_path / "model", tmp_path / "back.pt"))
    assert error.code == "MODEL_CORRUPT" and not (tmp_path / "back.pt").exists()


NAMES = sorted(original("selective")[STATE].keys() | original()[STATE].keys())
ANY_NAME = st.sampled_from(NAMES) | st.sampled_from([1, None, "x", "module.x", f"{LAYER}A_log", "mamba_stack.layers.7.x"])
# Mostly in what describes a file: the pickle at its beginning, the directory at its end.
PLACES = st.integers(-4000, 4000) | st.integers(0, 10**6)
ANY_VALUE = st.sampled_from([None, True, 3, -1, float("nan"), "x", [], {}, 2**70, *map(torch.zeros, ((), (0,), (3,), (2, 2)))])
KINDS = [torch.float16, torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e5m2]
CHANGES = st.one_of(
    st.tuples(st.just("drop"), ANY_NAME),
    st.tuples(st.just("rename"), ANY_NAME, ANY_NAME),
    st.tuples(st.just("kind"), ANY_NAME, st.sampled_from(KINDS)),
    st.tuples(st.just("shape"), ANY_NAME, st.lists(st.integers(0, 60), max_size=3)),
    st.tuples(st.just("put"), ANY_NAME, ANY_VALUE),
    st.tuples(st.just("setting"), st.sampled_from(["vocab_size", "tie_embeddings", "dropout", "swelu_k", "expand"]), ANY_VALUE),
    st.tuples(st.just("field"), st.sampled_from(["config", STATE, "global_step", "epoch", "new"]), ANY_VALUE),
)


def change(payload: dict[str, Any], kind: str, name: Any, value: Any = None) -> None:
    state, config = payload.get(STATE), payload.get("config")
    if kind == "field":
        payload[name] = value
    elif kind == "setting" and isinstance(config, dict):
        config[name] = value
    elif kind == "put" and isinstance(state, dict):
        state[name] = value
    elif isinstance(state, dict) and isinstance(state.get(name), torch.Tensor):
        if kind in ("drop", "rename"):
            moved = state.pop(name)
            state |= {value: moved} if kind == "rename" else {}
        else:
            state[name] = state[name].to(value) if kind == "kind" else torch.ones(value)


def loads_or_is_refused(path: Path) -> None:
    """A conversion that ends well can be taken back; any other ends in an error of the family and leaves nothing."""
    out = path.parent / "model"
    try:
        convert_from_original(path, out)
    except FineTuneFlowError as error:
        str(error).encode()
        assert error.remedy and not out.exists()
    else:
        convert_to_original(out, path.parent / "back.pt")


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60)
@given(changes=st.lists(CHANGES, min_size=1, max_size=3), layout=st.sampled_from(["simplified", "selective"]))
def test_a_checkpoint_changed_at_will_loads_or_is_refused(changes: list[Any], layout: str) -> None:
    payload = original(layout, n_layers=1)
    for parts in changes:
        change(payload, *parts)
    with TemporaryDirectory() as folder:
        loads_or_is_refused(saved(Path(folder), payload))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60)
@given(damage=st.lists(st.tuples(PLACES, st.integers(0, 255)), min_size=1, max_size=8), zipped=st.booleans())
def test_a_checkpoint_with_damaged_bytes_loads_or_is_refused(damage: list[tuple[int, int]], zipped: bool) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        torch.save(original(n_layers=1), path, _use_new_zipfile_serialization=zipped)
        content = bytearray(path.read_bytes())
        for place, value in damage:
            content[place % len(content)] = value
        path.write_bytes(content)
        loads_or_is_refused(path)


# --- a module of the user's ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["None", "5", "property(lambda self: 1)", "len", "type"])
def test_a_forward_that_is_no_function_is_said(value: str, tmp_path: Path) -> None:
    path = variant(tmp_path, ("    def forward(self, input_ids,", f"    forward = {value}\n\n    def other(self, input_ids,"))
    error = refusal(lambda: own.provide(path))
    assert error.code.startswith("MODEL_MODULE") and "forward" in error.message


@pytest.mark.parametrize("value", ["5", "None", "''"])
def test_a_type_that_is_no_name_is_said(value: str, tmp_path: Path) -> None:
    error = refusal(lambda: own.provide(variant(tmp_path, ('model_type = "gated_conv"', f"model_type = {value}"))))
    assert error.code == "MODEL_MODULE_INVALID" and "model_type" in error.message


def test_registered_things_that_are_no_classes_are_said(tmp_path: Path) -> None:
    lines = (
        "from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING\n"
        "CONFIG_MAPPING.register('gated_conv', 5)\nMODEL_FOR_CAUSAL_LM_MAPPING.register(5, 6)\n"
    )
    error = refusal(lambda: own.provide(variant(tmp_path, (REGISTRATION, lines))))
    assert error.code == "MODEL_MODULE_INVALID" and "5 and 6" in error.message


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


ODD_SHAPES = ("5", "None", "{'heads': 2.5}", "{'heads': float('nan')}", "{'heads': torch.zeros(3)}", "{'heads': 'two'}")
ODD_SHAPES += ("{1: 2}", "{'nonsense': 3}", "{'heads': -1}", "{'heads': True}", "{'heads': 10**30}", "{'heads': None}")


@pytest.mark.parametrize("returned", ODD_SHAPES)
def test_a_shape_that_plans_cannot_read_is_refused_when_it_is_stated(returned: str, tokenizer: str, tmp_path: Path) -> None:
    path = variant(tmp_path, (REGISTRATION, f"def ftf_shape(config):\n    return {returned}\n\n\n{REGISTRATION}"))
    error = refusal(lambda: new_model(path, tmp_path / "base", settings=TINY, tokenizer=tokenizer))
    assert error.code == "MODEL_MODULE_INVALID" and "ftf_shape" in error.message and not (tmp_path / "base").exists()


def test_a_shape_that_is_no_function_is_refused(tokenizer: str, tmp_path: Path) -> None:
    path = variant(tmp_path, (REGISTRATION, f"ftf_shape = {{'heads': 2}}\n{REGISTRATION}"))
    error = refusal(lambda: new_model(path, tmp_path / "base", settings=TINY, tokenizer=tokenizer))
    assert error.code == "MODEL_MODULE_FAILED" and "ftf_shape" in error.message


MAMBA_NAMES = {"hidden_size": "d_model", "num_hidden_layers": "n_layers"}
SMALL = {"d_model": 16, "n_layers": 1, "dense_hidden_dim": 16, "max_seq_len": 16}


@pytest.mark.parametrize("architecture", ["mamba_swelu", EXAMPLE], ids=["packaged", "own"])
@pytest.mark.parametrize(
    ("size", "count"),
    [(10**6, r"[\d,]{14,} parameters"), (10**12, "more parameters than can be counted"), (10**40, "than can be counted")],
    ids=["wide", "too wide to count", "too wide for a number"],
)
def test_sizes_without_bound_are_refused_before_anything_is_made(
    architecture: Any, size: int, count: str, tokenizer: str, tmp_path: Path
) -> None:
    settings = SMALL | {"d_model": size} if architecture == "mamba_swelu" else TINY | {"hidden_size": size}
    error = refusal(lambda: new_model(architecture, tmp_path / "base", settings=settings, tokenizer=tokenizer))
    assert error.code == "MEMORY_WONT_FIT" and re.search(count, error.message) and "GB" in error.message


def test_a_model_is_made_where_it_fits_and_not_where_it_does_not(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = lambda name: new_model("mamba_swelu", tmp_path / name, settings=SMALL, tokenizer=tokenizer)  # noqa: E731
    count = make("a")["parameters"]
    monkeypatch.setattr(new_module, "probe_memory", lambda: Memory(2**40, count * 4, "a test"))
    make("b")
    monkeypatch.setattr(new_module, "probe_memory", lambda: Memory(2**40, count * 4 - 1, "a test"))
    assert f"{count:,} parameters" in refusal(lambda: make("c")).message and not (tmp_path / "c").exists()


@pytest.mark.parametrize("architecture", ["mamba_swelu", EXAMPLE], ids=["packaged", "own"])
@pytest.mark.parametrize("value", [0, -3, True, 2.5, None, "10**12", [1]], ids=repr)
@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_size_that_cannot_be_is_refused(architecture: Any, name: str, value: Any, tokenizer: str, tmp_path: Path) -> None:
    key = MAMBA_NAMES.get(name, name) if architecture == "mamba_swelu" else name
    base = SMALL if architecture == "mamba_swelu" else TINY
    error = refusal(lambda: new_model(architecture, tmp_path / "base", settings=base | {key: value}, tokenizer=tokenizer))
    assert error.code == "CONFIG_INVALID_VALUE" and key in error.message


@pytest.mark.parametrize(("architecture", "name"), [("mamba_swelu", "n_layers"), (EXAMPLE, "num_hidden_layers")])
def test_a_depth_without_bound_is_refused(architecture: Any, name: str, tokenizer: str, tmp_path: Path) -> None:
    error = refusal(lambda: new_model(architecture, tmp_path / "base", settings={name: 10**9}, tokenizer=tokenizer))
    assert error.code == "CONFIG_INVALID_VALUE" and "2,000" in error.message


def test_a_home_that_is_not_there_is_a_file_that_is_not_there() -> None:
    assert refusal(lambda: own.provide("~nosuchuser/model.py")).code == "MODEL_MODULE_NOT_FOUND"


def test_a_record_of_a_module_that_nests_without_end_is_said(tmp_path: Path) -> None:
    (tmp_path / "module").mkdir()
    (tmp_path / "module" / "module.json").write_text("[" * 100_000)
    assert refusal(lambda: own.kept_record(tmp_path)).code == "MODEL_MODULE_INVALID"


# --- reward models ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scoring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for sequence classification with one label, beside its base."""
    root = tmp_path_factory.mktemp("reward")
    save_tiny(root / "base", "llama", vocab=320)
    shutil.copytree(root / "base", root / "scoring")
    classifier(root / "base").save_pretrained(root / "scoring")
    return root / "scoring"


LABELS = ("id2label", "label2id", "num_labels")
ODD_SETTINGS: list[dict[str, Any]] = [
    *({"id2label": value} for value in (5, "x", ["a"], {"x": 1}, {"0": "a", "1": "b"}, {})),
    *({"num_labels": value} for value in ("x", [1], -1, 1.0, True)),
    *({"hidden_size": value} for value in ("x", None, 0)),
    *({"vocab_size": value} for value in ("x", 10**12)),
    {"num_attention_heads": 0},
    {"num_hidden_layers": 10**9},
    {"model_type": 5},
    {"model_type": "nonsense"},
    {"architectures": 5},
    {"pad_token_id": 10**9},
    {"dtype": 5},
    {"quantization_config": 5},
    {"rope_parameters": 5},
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("settings", ODD_SETTINGS, ids=str)
def test_a_reward_folder_whose_settings_lie_is_refused(settings: dict[str, Any], scoring: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(scoring, tmp_path / "reward")
    config = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in LABELS or not settings.keys() & set(LABELS)}
    (folder / "config.json").write_text(json.dumps(kept | settings))
    error = refusal(lambda: load_reward_model(folder))
    assert error.code in ("MODEL_CORRUPT", "MODEL_UNSUPPORTED_ARCH", "REWARD_INVALID") and error.where and error.remedy


@pytest.mark.parametrize(
    "text",
    ["", "[]", "5", "null", "{}", "{", '{"a": ' * 990 + "1" + "}" * 990, "[" * 100_000, '{"num_labels": ' + "9" * 5000 + "}"],
    ids=lambda text: text[:12],
)
def test_a_reward_folder_without_a_readable_configuration_is_refused(text: str, scoring: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(scoring, tmp_path / "reward")
    (folder / "config.json").write_text(text)
    assert refusal(lambda: load_reward_model(folder)).code == "MODEL_CORRUPT"


@pytest.mark.parametrize("depth", [600, 980])
def test_a_reward_folder_whose_configuration_nests_is_refused(depth: int, scoring: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(scoring, tmp_path / "reward")
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(text + ', "x": ' + '{"a": ' * depth + "1" + "}" * depth + "}")
    assert refusal(lambda: load_reward_model(folder)).code in ("MODEL_CORRUPT", "MODEL_UNSUPPORTED_ARCH")


@pytest.mark.parametrize(
    "text", [None, "", "[]", "{}", '{"source": 5}', '{"source": null}', "[" * 100_000], ids=lambda t: str(t)[:12]
)
def test_a_reward_run_without_its_template_is_refused(text: str | None, scoring: Path, tmp_path: Path) -> None:
    run = as_run(scoring.parent / "base", tmp_path / "run")
    (run / "adapter").mkdir()
    (run / "template.json").unlink()
    if text is not None:
        (run / "template.json").write_text(text)
    error = refusal(lambda: load_reward_model(run))
    assert error.code == "TEMPLATE_INVALID" and "template.json" in error.message


@pytest.mark.parametrize(
    "text", ["", "[]", '{"setup": 5}', '{"setup": {"storage_dtype": "os"}}', '{"setup": {"storage_dtype": 5}}']
)
def test_a_reward_run_with_an_odd_record_of_its_machine_is_loaded(text: str, scoring: Path, tmp_path: Path) -> None:
    run, _ = adapter_run(scoring.parent / "base", tmp_path / "run")
    (run / "environment.json").write_text(text)
    assert load_reward_model(run).max_length


@pytest.mark.parametrize("setting", [{"r": "x"}, {"r": 10**9}, {"r": None}, {"lora_alpha": "x"}, {"target_modules": 5}], ids=str)
def test_an_adapter_whose_settings_lie_does_not_become_a_reward_model(
    setting: dict[str, Any], scoring: Path, tmp_path: Path
) -> None:
    run, _ = adapter_run(scoring.parent / "base", tmp_path / "run")
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    error = refusal(lambda: adapter_for_scoring(classifier(scoring.parent / "base"), run / "adapter", AdapterSpec()))
    assert error.code == "ADAPTER_CORRUPT"


@pytest.mark.parametrize(
    ("setting", "rows", "code"),
    [
        ({"r": "x"}, 1, "ADAPTER_BASE_MISMATCH"),
        ({"r": 8}, 1, "ADAPTER_BASE_MISMATCH"),
        ({"target_modules": ["nowhere"]}, 1, "ADAPTER_BASE_MISMATCH"),
        ({}, 2, "ADAPTER_CORRUPT"),
        ({}, 0, "ADAPTER_CORRUPT"),
    ],
    ids=str,
)
def test_a_reward_adapter_that_lies_is_not_put_on_the_policys_base(
    setting: dict[str, Any], rows: int, code: str, scoring: Path, tmp_path: Path
) -> None:
    run, _ = adapter_run(scoring.parent / "base", tmp_path / "run")
    config, weights = run / "adapter" / "adapter_config.json", run / "adapter" / "adapter_model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | setting))
    if rows != 1:
        save_file({n: value.repeat(rows, 1) if ".score." in n else value for n, value in load_file(weights).items()}, weights)
    model = attach_adapter(tiny_model("llama", vocab=320), AdapterSpec(r=4))
    error = refusal(lambda: shared_reward_model(run, model, model, lambda _: nullcontext()))
    assert error.code == code and error.where


def test_an_architecture_whose_head_has_another_name_is_refused() -> None:
    from transformers import BertConfig, BertLMHeadModel

    shape: Any = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    causal = BertLMHeadModel(BertConfig(**shape, is_decoder=True))
    assert refusal(lambda: scoring_model(causal, tiny_tokenizer(320), seed=0)).code == "ADAPTER_UNSUPPORTED"
