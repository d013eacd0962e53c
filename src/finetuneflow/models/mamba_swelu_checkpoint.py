"""Checkpoints of the original MambaSWELU, to a model folder and back, bit for bit.

    model_step_N.pt  ──convert_from_original──▶  config.json, model.safetensors, tokenizer, conversion.json
    model folder     ──convert_to_original────▶  {model_state_dict, config, global_step}

The five settings inside a checkpoint name neither the layout nor half of the sizes, and may be wrong: everything is
read off the names and shapes of the tensors, and what the settings say otherwise is noted. A checkpoint is opened as
plain tensors and numbers only; one that would run code is refused, and so is one that would take more memory than it has
bytes. Nothing is written unless all of it fits, and the source is never changed.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import pickletools
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from finetuneflow.errors import ModelError, StorageError
from finetuneflow.knowledge.shapes.settings import LARGEST, MOST_LAYERS
from finetuneflow.models.mamba_swelu import MODEL_TYPE, RANGES, MambaSWELUConfig, MambaSWELUForCausalLM
from finetuneflow.models.screening import SINGLE_NAME, corrupt, read_json, read_model_config, weight_files
from finetuneflow.models.tokenizer import load_tokenizer
from finetuneflow.workspace import new_folder, require_free, sync_directory, translate_os_errors, write_json

State = dict[str, torch.Tensor]

# The settings that the original saves in a checkpoint: its names, and ours where they differ.
ORIGINAL_SETTINGS = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "n_layers": "n_layers",
    "max_seq_len": "max_seq_len",
    "tie_embeddings": "tie_word_embeddings",
}
# Found in some configuration files of the original; those in the second group leave no trace in the weights.
FURTHER_SETTINGS = {"d_state": "d_state", "d_conv": "d_conv", "expand": "expand", "expand_factor": "expand"} | {
    "dense_hidden_dim": "dense_hidden_dim"
}
TRACELESS_SETTINGS = ("dropout", "swelu_k")
SETTINGS = (*ORIGINAL_SETTINGS, *FURTHER_SETTINGS, *TRACELESS_SETTINGS)

# What weights are stored in. Others (8-bit floats, integers, complex numbers) would be read as something they are not.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What `torch.load(weights_only=True)` lets a file call although it makes gigabytes of a few bytes; no checkpoint needs it.
AMPLIFIERS = frozenset({"bytearray", "encode", "_rebuild_device_tensor_from_cpu_tensor"})
# A file older than the zip format begins with so many pickles: two marks, the machine, the dictionary, its tensors' names.
LEADING_PICKLES = 5

HEAD, EMBEDDING = "lm_head.weight", "token_embedding.weight"
PREFIX = "model."
# What wrappers put before every name: data parallelism and compilation.
WRAPPERS = ("module.", "_orig_mod.")
RECORD_NAME = "conversion.json"


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What a checkpoint turned out to be. `num_parameters` counts tied weights once; `step` is the original's global step."""

    source: str
    folder: str
    layout: str
    settings: dict[str, Any]
    num_parameters: int
    num_tensors: int
    step: int | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def convert_from_original(checkpoint: Path, out: Path, *, tokenizer: Path | None = None) -> ConversionReport:
    """Write the model folder `out` (which must not exist, or be empty) from a checkpoint of the original.

    `tokenizer`: a folder with the GPT-2 tokenizer (or whichever the model was trained with), copied beside the weights.
    Raises `ModelError`: MODEL_NOT_FOUND, MODEL_PICKLE, MODEL_CORRUPT, MODEL_NO_TOKENIZER; `StorageError`.
    """
    require_free(out)
    payload = load_checkpoint(checkpoint)
    state, saved, notes = _parts(checkpoint, payload)
    config = infer_config(state, where=checkpoint)
    notes += _compare_settings(config, saved) + _settle_head(state, config, saved)
    _require_fitting(state, config, where=checkpoint)
    notes += _remarks(state)
    with new_folder(out) as stage:
        if tokenizer is not None:
            notes += _copy_tokenizer(tokenizer, stage, config)
        else:
            notes.append("No tokenizer was named: copy one into the folder before training (the original uses GPT-2's).")
        _write_model(stage, state, config)
        report = ConversionReport(
            source=str(checkpoint),
            folder=str(out),
            layout=config.layout,
            settings={name: getattr(config, name) for name in sorted(_reported_settings())},
            num_parameters=sum(value.numel() for value in state.values()),
            num_tensors=len(state),
            step=_whole(payload.get("global_step")),
            notes=tuple(notes),
        )
        write_json(stage / RECORD_NAME, report.to_dict())
    return report


def convert_to_original(folder: Path, out: Path, *, step: int | None = None) -> None:
    """Write the model of `folder` as a checkpoint `out` of the original, readable with `torch.load(weights_only=True)`.

    `step` is the global step to note; without it, the one of the checkpoint the folder was made from, if it was.
    """
    require_free(out)
    config, state = read_folder(folder)
    payload = to_original(state, config, step=step if step is not None else _recorded_step(folder))
    out.parent.mkdir(parents=True, exist_ok=True)
    with translate_os_errors(out), _temporary_beside(out) as temporary:
        torch.save(payload, temporary)
        again = load_checkpoint(temporary)
        _require_same(payload["model_state_dict"], again["model_state_dict"], where=out)
        os.replace(temporary, out)
    sync_directory(out.parent)


def to_original(state: Mapping[str, torch.Tensor], config: MambaSWELUConfig, *, step: int | None = None) -> dict[str, Any]:
    """A checkpoint of the original from tensors under our names; the tied head is the embedding under a second name."""
    renamed = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    if config.tie_word_embeddings:
        renamed[HEAD] = renamed[EMBEDDING]
    settings = {theirs: getattr(config, ours) for theirs, ours in ORIGINAL_SETTINGS.items()}
    payload: dict[str, Any] = {"model_state_dict": renamed, "config": settings}
    return payload if step is None else payload | {"global_step": step}


def from_original_names(state: Mapping[str, torch.Tensor]) -> State:
    """Tensors under our names: the head keeps its name, all others get `model.` in front."""
    return {name if name == HEAD else PREFIX + name: tensor for name, tensor in state.items()}


# --- reading a checkpoint ------------------------------------------------------------------------


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The dictionary in a checkpoint file, opened as plain tensors, numbers and texts."""
    if not path.is_file():
        raise ModelError("MODEL_NOT_FOUND", f"There is no checkpoint {path}.", where=str(path), remedy="Name a .pt file.")
    try:
        _require_modest(path)
        # Mapped, not read: the optimizer state, twice the weights, is never touched. Files older than the zip format cannot be.
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if re.search("unsupported|blocked", str(error), re.IGNORECASE):
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise _holds_more(path, named[1] if named else None) from error
        raise corrupt(path, "is damaged, cut short or no checkpoint of PyTorch") from error
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the many kinds that readers of archives, pickles and tensors raise over a bad file
        raise _damaged(path, error) from error
    fields = _plain(payload)
    if fields is None:
        raise corrupt(path, f"holds a {type(payload).__name__} where a dictionary is expected")
    return fields


def _require_modest(path: Path) -> None:
    """Refuse a small file that would open into a large one: compressed parts, or a call out of `AMPLIFIERS`."""
    with contextlib.ExitStack() as opened:
        if zipfile.is_zipfile(path):
            archive = opened.enter_context(zipfile.ZipFile(path))
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise corrupt(path, "has compressed parts, which PyTorch does not write")
            pickles = [opened.enter_context(archive.open(m)) for m in archive.infolist() if m.filename.endswith("data.pkl")]
        else:
            pickles = [opened.enter_context(path.open("rb"))] * LEADING_PICKLES
        for file in pickles:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL" and (named := re.split(r"[ .]", str(argument))[-1]) in AMPLIFIERS:
                    raise _holds_more(path, named)


def _plain(value: Any) -> dict[Any, Any] | None:
    """A dictionary's entries without what a file can put in place of its methods; None for anything else."""
    return dict(dict.items(value)) if isinstance(value, dict) else None


def _whole(value: Any) -> int | None:
    """A whole number that can be counted to; None for anything else."""
    return value if type(value) is int and 0 <= value < 2**63 else None


def _damaged(path: Path, error: Exception) -> ModelError:
    return corrupt(path, f"is damaged, cut short or no checkpoint of PyTorch ({_told(error)})")


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _holds_more(path: Path, named: str | None) -> ModelError:
    return ModelError(
        "MODEL_PICKLE",
        f"{path.name} holds more than tensors and numbers{f' ({named})' if named else ''}; opening that could run code or fill the "
        "memory, so it is not opened.",
        where=str(path),
        remedy="Where you trust the file, load it in the program that wrote it and save "
        "{'model_state_dict': model.state_dict(), 'config': {…plain numbers…}} with torch.save; then convert that.",
    )


def _parts(path: Path, payload: dict[str, Any]) -> tuple[State, dict[str, Any], list[str]]:
    """(tensors by the original's names, saved settings, notes) of a checkpoint, or of a bare state dict."""
    notes: list[str] = []
    state = _plain(payload.get("model_state_dict"))
    if state is None and payload and all(isinstance(value, torch.Tensor) for value in payload.values()):
        state, payload = payload, {}
        notes.append("The file is a bare state dict: there are no settings to compare with.")
    if not state:
        held = ", ".join(_shown(name) for name in list(payload)[:8])
        raise corrupt(path, f"has no model_state_dict (it holds: {held or 'nothing'})")
    state = {name: _usable(name, value, where=path) for name, value in state.items()}
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
            notes.append(f"All names began with {wrapper!r}, as a wrapped model saves them; it was taken off.")
    largest = max(state, key=lambda name: state[name].nbytes)
    if sum(value.nbytes for name, value in state.items() if name != HEAD) > path.stat().st_size:
        raise _unfit(path, f"is smaller than its tensors, which share their numbers (the largest is {largest})", wrong=[largest])
    saved = _plain(payload.get("config"))
    if saved is None:
        saved = {}
        notes.append("The checkpoint holds no settings; all were read off the tensors.")
    named = {name: saved[name] for name in SETTINGS if name in saved}
    saved = {name: value for name, value in named.items() if _is_setting(name, value)}
    odd = sorted(named.keys() - saved.keys())
    notes += [f"The settings say {name} = {_shown(named[name])}, which cannot be: it is passed over." for name in odd]
    if payload.get("global_step") is not None and _whole(payload["global_step"]) is None:
        notes.append(f"The global step cannot be used ({_shown(payload['global_step'])}); it is not kept.")
    return state, saved, notes


def _usable(name: Any, value: Any, *, where: Path) -> torch.Tensor:
    """An entry of a state dict as a bare tensor, once it has a parameter's name and numbers that a parameter can hold."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.]{1,200}", name, re.ASCII):
        raise _unfit(where, f"holds something under {_shown(name)}, which is no parameter's name")
    if odd := _oddity(value):
        raise _unfit(where, f"holds {odd} under {name} instead of floating-point numbers", wrong=[name])
    return torch.Tensor.detach(value)


def _oddity(value: Any) -> str | None:
    """What is wrong with a value that should be a weight; its methods are not asked, as a file can put others in their place."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(value).__name__}"
    kinds = {"meta": value.is_meta, "quantised": value.is_quantized, "nested": value.is_nested}
    kinds |= {"sparse": value.layout is not torch.strided, str(value.dtype).removeprefix("torch."): value.dtype not in FLOATS}
    if any(kinds.values()):
        return f"a tensor of the kind {next(kind for kind, found in kinds.items() if found)}"
    if 0 in value.shape:
        return f"an empty tensor {tuple(value.shape)}"
    if value.nbytes > torch.Tensor.untyped_storage(value).nbytes():
        return f"a tensor {tuple(value.shape)} that claims more numbers than are stored"
    return None


def _is_setting(name: str, value: Any) -> bool:
    if name == "tie_embeddings":
        return isinstance(value, bool)
    low, high = RANGES.get(name, (1, LARGEST))
    return type(value) in (int, float) and low <= value <= high


def _shown(value: Any) -> str:
    """A key or a value for a message: numbers and short texts as they are, of anything else the kind."""
    plain = type(value) in (bool, int, float) or (isinstance(value, str) and len(value) <= 60 and value.isprintable())
    return repr(value)[:64] if plain else f"a {type(value).__name__}"


# --- what the tensors say ----------------------------------------------------------------------------


def infer_config(state: Mapping[str, torch.Tensor], *, where: Path) -> MambaSWELUConfig:
    """The configuration whose model has these tensors (original's names), as far as tensors can tell."""
    layers = {int(found[1]) for name in state if (found := re.match(r"mamba_stack\.layers\.(\d+)\.", name))}
    first = "mamba_stack.layers.0.mamba."
    needed = [
        EMBEDDING,
        "position_embedding.weight",
        "dense1.weight",
        *(first + f"{n}.weight" for n in ("in_proj", "conv1d", "x_proj")),
    ]
    missing = [name for name in needed if name not in state]
    if missing:
        raise _unfit(where, f"lacks {', '.join(missing)}", missing=missing)
    selective = first + "A_log" in state
    needed += [first + "A_log"] * selective
    flat = [name for name in needed if state[name].dim() != (3 if "conv1d" in name else 2)]
    if flat:
        raise _unfit(where, f"has {flat[0]} of the shape {tuple(state[flat[0]].shape)}", wrong=flat)
    gaps = sorted(set(range(len(layers))) - layers)
    if gaps:
        raise _unfit(where, f"has {len(layers)} layers, and none of number {gaps[0]}", missing=[f"mamba_stack.layers.{gaps[0]}"])
    if len(layers) > MOST_LAYERS:
        raise _unfit(where, f"has {len(layers):,} layers, more than the {MOST_LAYERS:,} of any model")
    vocab_size, d_model = state[EMBEDDING].shape
    return MambaSWELUConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=max(layers) + 1,
        d_state=state[first + "A_log"].shape[-1] if selective else state[first + "x_proj.weight"].shape[0],
        d_conv=state[first + "conv1d.weight"].shape[2],
        expand=max(state[first + "conv1d.weight"].shape[0] // max(d_model, 1), 1),
        max_seq_len=state["position_embedding.weight"].shape[0],
        dense_hidden_dim=state["dense1.weight"].shape[0],
        layout="selective" if selective else "simplified",
        learn_lambda="swelu1.lam" in state,
    )


def _settle_head(state: State, config: MambaSWELUConfig, saved: Mapping[str, Any]) -> list[str]:
    """Decide whether the head is tied, and drop its copy if it is; equal weights that are said to be untied stay two."""
    head, embedding = state.get(HEAD), state[EMBEDDING]
    if head is None:
        return [f"There is no {HEAD}; it is the embedding."]
    same = head.shape == embedding.shape and head.dtype == embedding.dtype and _same_bits(head, embedding)
    config.tie_word_embeddings = same and saved.get("tie_embeddings") is not False
    if config.tie_word_embeddings:
        del state[HEAD]
        return []
    if same:
        return [f"{HEAD} equals the embedding, but the settings say that they are not tied: both are kept."]
    return [f"{HEAD} differs from the embedding, so the two are not tied." + _contradiction(saved)]


def _contradiction(saved: Mapping[str, Any]) -> str:
    return " The settings say that they are." if saved.get("tie_embeddings") is True else ""


def _compare_settings(config: MambaSWELUConfig, saved: Mapping[str, Any]) -> list[str]:
    """Notes on saved settings that the tensors contradict; takes over those that leave no trace in tensors."""
    notes = []
    for theirs, ours in (ORIGINAL_SETTINGS | FURTHER_SETTINGS).items():
        found = getattr(config, ours)
        if theirs in saved and theirs != "tie_embeddings" and saved[theirs] != found:
            notes.append(f"The settings say {theirs} = {saved[theirs]!r}; the tensors say {found}, which counts.")
    for name in TRACELESS_SETTINGS:
        if name in saved:
            setattr(config, name, float(saved[name]))
    if "dropout" not in saved:
        notes.append(f"Dropout is not saved in a checkpoint; the original's default, {config.dropout}, is assumed.")
    return notes


def _require_fitting(state: Mapping[str, torch.Tensor], config: MambaSWELUConfig, *, where: Path) -> None:
    """Raise unless the tensors are exactly those of the model that the configuration describes."""
    try:
        expected = expected_shapes(config)
    except (RuntimeError, OverflowError) as error:
        raise _unfit(where, f"has sizes of which no model can be made ({_told(error)})") from error
    missing, surplus = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = sorted(name for name in expected.keys() & state.keys() if tuple(state[name].shape) != expected[name])
    if not missing and not surplus and not wrong:
        return
    said = []
    if missing:
        said.append(f"{len(missing)} missing (e.g. {missing[0]})")
    if surplus:
        said.append(f"{len(surplus)} that fit nowhere (e.g. {surplus[0]})")
    if wrong:
        name = wrong[0]
        said.append(f"{len(wrong)} of another shape (e.g. {name}: {tuple(state[name].shape)} instead of {expected[name]})")
    raise _unfit(where, f"has tensors {', '.join(said)}", missing=missing, surplus=surplus, wrong=wrong)


def expected_shapes(config: MambaSWELUConfig) -> dict[str, tuple[int, ...]]:
    """Names (the original's) and shapes of a model's tensors, a tied head left out."""
    with torch.device("meta"):
        model = MambaSWELUForCausalLM(config)
    shapes = {name.removeprefix(PREFIX): tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return shapes


def _unfit(path: Path, what: str, **names: list[str]) -> ModelError:
    return ModelError(
        "MODEL_CORRUPT",
        f"{path.name} {what}, so it is no MambaSWELU as described.",
        where=str(path),
        remedy="Check that this is a complete checkpoint of MambaSWELU, saved whole; nothing was written.",
        context={kind: found[:20] for kind, found in names.items()},
    )


def _remarks(state: Mapping[str, torch.Tensor]) -> list[str]:
    notes = []
    broken = sorted(name for name, value in state.items() if not torch.isfinite(value).all())
    if broken:
        notes.append(f"{len(broken)} tensors hold NaN or infinity (e.g. {broken[0]}): the model cannot be used as it is.")
    kinds = Counter(str(value.dtype).removeprefix("torch.") for value in state.values())
    if len(kinds) > 1:
        notes.append(f"The tensors are of several types ({', '.join(sorted(kinds))}); each is kept as it is.")
    return notes


# --- a model folder ------------------------------------------------------------------------------------


def read_folder(folder: Path) -> tuple[MambaSWELUConfig, State]:
    """Configuration and tensors (our names) of a model folder, whole and fitting each other."""
    from safetensors.torch import load_file

    settings = read_model_config(folder, base=str(folder))
    if settings["model_type"] != MODEL_TYPE:
        raise ModelError(
            "MODEL_UNSUPPORTED_ARCH",
            f"{folder} holds a model of the type {settings['model_type']!r}, not {MODEL_TYPE!r}.",
            where=str(folder / "config.json"),
            remedy="Name a folder with a MambaSWELU model; the original's format can hold no other.",
        )
    try:
        config = MambaSWELUConfig.from_dict(settings)
    except Exception as error:  # transformers' checks raise several kinds
        raise corrupt(folder / "config.json", f"describes no MambaSWELU ({_told(error)})") from error
    state: State = {}
    for path in weight_files(folder, base=str(folder)):
        state |= {name: _usable(name, value, where=path) for name, value in load_file(path).items()}
    _require_fitting({name.removeprefix(PREFIX): value for name, value in state.items()}, config, where=folder)
    return config, state


def _write_model(folder: Path, state: State, config: MambaSWELUConfig) -> None:
    from safetensors.torch import load_file, save_file

    config.architectures = [MambaSWELUForCausalLM.__name__]
    config.dtype = Counter(value.dtype for value in state.values()).most_common(1)[0][0]
    config.save_pretrained(folder)
    # A copy for each name: safetensors refuses tensors that share memory, as an untied but equal head may.
    renamed = {name: value.clone(memory_format=torch.contiguous_format) for name, value in from_original_names(state).items()}
    save_file(renamed, folder / SINGLE_NAME, metadata={"format": "pt"})
    _require_same(renamed, load_file(folder / SINGLE_NAME), where=folder / SINGLE_NAME)


def _copy_tokenizer(source: Path, folder: Path, config: MambaSWELUConfig) -> list[str]:
    """Put the tokenizer of `source` beside the weights, in a form that any library loads; its end token into `config`."""
    tokenizer, notes = load_tokenizer(source)
    tokenizer.save_pretrained(folder)
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            "MODEL_CORRUPT",
            f"The tokenizer knows {len(tokenizer):,} tokens, the checkpoint's embedding has {config.vocab_size:,} rows.",
            where=str(source),
            remedy="Name the tokenizer that the model was trained with.",
        )
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return list(notes)


def _reported_settings() -> set[str]:
    return {*ORIGINAL_SETTINGS.values(), *FURTHER_SETTINGS.values(), *TRACELESS_SETTINGS, "learn_lambda"}


def _recorded_step(folder: Path) -> int | None:
    if not (folder / RECORD_NAME).is_file():
        return None
    record = read_json(folder / RECORD_NAME)
    return _whole(record.get("step")) if isinstance(record, dict) else None


# --- writing safely --------------------------------------------------------------------------------------


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    return torch.equal(*(value.contiguous().reshape(-1).view(torch.uint8) for value in (a, b)))


def _require_same(written: Mapping[str, torch.Tensor], read: Mapping[str, torch.Tensor], *, where: Path) -> None:
    same = written.keys() == read.keys() and all(
        written[name].dtype == read[name].dtype
        and written[name].shape == read[name].shape
        and _same_bits(written[name], read[name])
        for name in written
    )
    if not same:
        raise StorageError(
            "STORAGE_UNUSABLE",
            f"{where.name}, read back, is not what was written.",
            where=str(where),
            remedy="Write to another disk and check this one.",
        )


@contextlib.contextmanager
def _temporary_beside(out: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    os.close(handle)
    try:
        os.chmod(name, 0o644)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
