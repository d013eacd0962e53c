"""Look at a model folder before anything in it is loaded: no code, no pickles, no lying headers.

Everything here reads JSON and safetensors headers only. It runs before transformers sees the folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuneflow.errors import ModelError
from finetuneflow.models.own import causal_class
from finetuneflow.workspace import sha256_file

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
JSON_LIMIT_BYTES = 64 * 1024 * 1024

# Fields by which a JSON file of a model repository asks a library to fetch or run code.
CODE_FIELDS = frozenset({"auto_map", "custom_generate", "custom_pipelines"})
KERNEL_FIELDS = frozenset({"kernel_config", "use_kernels", "kernel_mapping"})
IMPLEMENTATION_FIELD = re.compile(r"_?(attn|attention|experts|kernel)_implementation(_internal|_autoset)?")


@dataclass(frozen=True, slots=True)
class CodeRequest:
    """One place where a repository asks for code to be run."""

    file: str
    field: str
    value: str
    elsewhere: bool  # the code lies outside this repository, so that its commit does not fix it


# --- code -------------------------------------------------------------------------------------


def code_requests(folder: Path) -> list[CodeRequest]:
    """Every field in the folder's JSON files that asks for code, at any depth."""
    return [
        request
        for path in sorted(folder.glob("*.json"))
        if path.name not in ("tokenizer.json", "vocab.json", INDEX_NAME)
        for request in _requests_in(path.name, read_json(path))
    ]


def _requests_in(file: str, value: Any, prefix: str = "") -> Iterator[CodeRequest]:
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _requests_in(file, item, f"{prefix}[{number}].")
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        field = f"{prefix}{key}"
        if key in CODE_FIELDS and item:
            yield CodeRequest(file, field, _short(item), elsewhere="--" in json.dumps(item))
        elif (key in KERNEL_FIELDS and item) or (IMPLEMENTATION_FIELD.fullmatch(key) and "/" in json.dumps(item)):
            yield CodeRequest(file, field, _short(item), elsewhere=True)
        elif key == "trust_remote_code" and item:
            yield CodeRequest(file, field, _short(item), elsewhere=False)
        else:
            yield from _requests_in(file, item, f"{field}.")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def require_consent(folder: Path, *, base: str, commit: str, consent: str | None, provided: bool = False) -> bool:
    """True if the folder's own code may run: it asks for some and `consent` names exactly this commit.

    Code that lies outside the folder (a kernel, another repository) is refused whatever the consent says,
    because the commit does not fix it. `provided`: the user's own file brings the architecture, so that what
    config.json would have run for it is never looked at.
    """
    requests = [r for r in code_requests(folder) if not (provided and (r.file, r.field) == ("config.json", "auto_map"))]
    refused = [r for r in requests if r.elsewhere] or (requests if consent != commit else [])
    if not refused:
        return bool(requests)
    first = refused[0]
    if first.elsewhere:
        remedy = (
            f"Copy the model to a folder of yours, remove {first.field!r} from {first.file}, and name that folder as the base."
        )
    else:
        remedy = (
            "Read the code in the repository; if you trust it, set trust_remote_code_revision to this exact revision: "
            f"{commit}. A model of the same family without custom code is safer."
        )
    stale = " The consent given is for another revision." if consent and not first.elsewhere else ""
    raise ModelError(
        "MODEL_REMOTE_CODE",
        f"{base} asks for code of its own to be run ({first.file}: {first.field} = {first.value}); this is off by default.{stale}",
        where=str(folder / first.file),
        remedy=remedy,
        context={"commit": commit, "requests": [f"{r.file}: {r.field}" for r in refused]},
    )


# --- configuration ------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """A JSON file of a model folder, or `MODEL_CORRUPT`."""
    try:
        if path.stat().st_size > JSON_LIMIT_BYTES:
            raise corrupt(path, f"is larger than {JSON_LIMIT_BYTES // 2**20} MiB")
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise corrupt(path, f"is not readable JSON ({error})") from error


def read_model_config(folder: Path, *, base: str) -> dict[str, Any]:
    """`config.json`, with a clear word for folders that hold something other than a model."""
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise is_adapter(base, has_config=path.is_file())
    if not path.is_file():
        raise ModelError(
            "MODEL_NOT_FOUND",
            f"{base} holds no config.json, so it is not a model in the Hugging Face layout.",
            where=str(folder),
            remedy="Name the folder that holds config.json, model.safetensors and the tokenizer files.",
        )
    config = read_json(path)
    if not isinstance(config, dict):
        raise corrupt(path, "is not a JSON object")
    if not isinstance(config.get("model_type"), str) or not isinstance(config.get("architectures") or [], list):
        raise corrupt(path, "names no model_type, or its architectures are no list")
    return config


def is_adapter(base: str, *, has_config: bool) -> ModelError:
    remedy = "Name its base model as the base, and this one as the adapter."
    if has_config:
        remedy = "Remove adapter_config.json if the weights beside it are complete, or name the base and the adapter apart."
    return ModelError(
        "MODEL_IS_ADAPTER", f"{base} is an adapter (it holds adapter_config.json), not a base model.", remedy=remedy
    )


def require_supported(config: dict[str, Any], *, base: str, own_code: bool) -> None:
    """Raise unless this is a causal language model of transformers', of ours or of the user's module, or consented code."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal

    model_type, architectures = str(config["model_type"]), config.get("architectures") or []
    if own_code and model_type not in CONFIG_MAPPING:
        return
    _require_trainable_quantization(config, base=base)
    registered = causal_class(model_type)
    if model_type not in causal and registered is None:
        known = model_type in CONFIG_MAPPING
        what = f"{architectures[0] if architectures else model_type!r}"
        reason = "is not a causal language model" if known else "is an architecture this version of transformers does not know"
        raise unsupported(base, f"{what} {reason}", model_type)
    named = registered.__name__ if registered is not None else causal[model_type]
    fitting = named if isinstance(named, tuple) else (named,)
    if architectures and not set(architectures) & set(fitting):
        raise unsupported(base, f"the weights are of a {architectures[0]}, not of a {fitting[0]}", model_type)


def _require_trainable_quantization(config: dict[str, Any], *, base: str) -> None:
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method", "bitsandbytes") if isinstance(quantization, dict) else None
    if method not in (None, "bitsandbytes"):
        raise unsupported(
            base, f"its weights are quantised with {method}, which cannot be trained here", config.get("model_type")
        )


def unsupported(base: str, what: str, model_type: object) -> ModelError:
    return ModelError(
        "MODEL_UNSUPPORTED_ARCH",
        f"{base} cannot be used: {what}.",
        remedy="Choose a decoder-only text model (Llama, Mistral, Qwen, Gemma, Phi, GPT-2, GPT-NeoX, Mamba, …) in its original precision; "
        "for a new family, `pip install -U transformers` may help. For an architecture of your own, name its Python file in model.module "
        "(docs/custom-models.md).",
        context={"model_type": model_type},
    )


# --- weights ------------------------------------------------------------------------------------


def weight_files(folder: Path, *, base: str) -> list[Path]:
    """The safetensors files of the model, each opened and found whole; raises when there are none or one is damaged."""
    if (folder / INDEX_NAME).is_file():
        return _indexed_files(folder)
    single = folder / SINGLE_NAME
    if single.is_file():
        check_safetensors_file(single)
        return [single]
    raise no_safetensors(base, [path.name for path in folder.iterdir()])


def no_safetensors(base: str, names: Iterable[str]) -> ModelError:
    names = sorted(names)
    pickles = [n for n in names if n.endswith(PICKLE_SUFFIXES) and "training_args" not in n and "tokenizer" not in n]
    gguf = [n for n in names if n.endswith(".gguf")]
    if pickles:
        message = f"{base} has its weights only as {pickles[0]}, a format that can run code when it is opened."
        remedy = (
            "Look for a safetensors version (on the hub, the 'Files' page or its pull requests often hold one), or convert it in a "
            "sandbox without network: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
        )
    elif gguf:
        message = f"{base} holds GGUF files only ({gguf[0]}): they are for inference and cannot be trained."
        remedy = "Name the original model the GGUF was made from."
    else:
        message = f"{base} holds no weights ({SINGLE_NAME} is missing)."
        remedy = "Name a folder or a hub repository with model.safetensors, or with its index and parts."
    return ModelError("MODEL_NO_SAFETENSORS", message, remedy=remedy, context={"files": names[:50]})


def _indexed_files(folder: Path) -> list[Path]:
    index_path = folder / INDEX_NAME
    index = read_json(index_path)
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed or not all(isinstance(v, str) for v in placed.values()):
        raise corrupt(index_path, "has no weight_map")
    files = []
    for name in sorted(set(placed.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise corrupt(index_path, f"names a part outside the folder or of another kind ({name[:80]!r})")
        path = folder / name
        if not path.is_file():
            raise corrupt(path, "is missing, though the index names it")
        held = check_safetensors_file(path)
        lacking = sorted(key for key, file in placed.items() if file == name and key not in held)
        if lacking:
            raise corrupt(path, f"lacks the tensor {lacking[0]!r} that the index places there")
        files.append(path)
    return files


def check_safetensors_file(path: Path, *, code: str = "MODEL_CORRUPT") -> set[str]:
    """The tensor names of a safetensors file whose header, offsets and size agree; else an error with `code`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise corrupt(path, f"is damaged or cut short ({error})", code=code) from error


def corrupt(path: Path, what: str, *, code: str = "MODEL_CORRUPT") -> ModelError:
    return ModelError(
        code,
        f"{path.name} {what}.",
        where=str(path),
        remedy="Download or copy the model again (delete the damaged file first), then compare its SHA-256 with the publisher's.",
    )


@functools.lru_cache(maxsize=256)
def _file_hash(path: Path, modified_ns: int) -> str:
    """`sha256_file`, remembered within this process: a run asks for its model's identity more than once."""
    return sha256_file(path)


def folder_digest(folder: Path, files: list[Path]) -> str:
    """One SHA-256 over names and contents: the identity of a model, wherever its folder lies.

    A file of the hub's cache is a link to a blob that is named by its SHA-256 if it is large; that name is used.
    """
    total = hashlib.sha256()
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in files):
        blob = path.resolve().name
        content = (
            blob
            if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob)
            else _file_hash(path.resolve(), path.stat().st_mtime_ns)
        )
        total.update(f"{name}\0{content}\n".encode())
    return f"sha256:{total.hexdigest()}"
