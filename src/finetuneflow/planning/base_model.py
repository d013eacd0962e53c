"""A base model's small files: from its name to a shape and facts, without its weights.

Looks on this disk, in the hub's cache, in the table of known models, then asks the hub for two small files; never with a token.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import re
import threading
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetuneflow.errors import ModelError
from finetuneflow.knowledge.shapes import ModelShape, known_shape, shape_from_config, shape_from_size, size_in_name
from finetuneflow.knowledge.shapes.families import FAMILIES
from finetuneflow.knowledge.shapes.headers import shape_from_tensors
from finetuneflow.knowledge.shapes.packaged import PACKAGED
from finetuneflow.knowledge.values import ModelFacts
from finetuneflow.models.new import FRESH, STATED_SHAPE
from finetuneflow.models.source import HUB_ID

HUB_SECONDS = 2.0
PART_BYTES = 1_000_000
HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What the small files of a base model say. `folder` is where they lie, if they lie on this disk."""

    shape: ModelShape
    facts: ModelFacts
    folder: Path | None = None
    notes: tuple[str, ...] = ()


def look_at_model(base: str, *, revision: str | None = None, network: bool = True) -> BaseModel:
    """Shape and facts of a base model named as in a run file, or by its size alone ("7B").

    Looks on this disk, then in the hub's cache, then in the table of known models, then asks the hub for its
    config.json (two seconds at most), then reads the size out of the name; says which it was.
    Raises `ModelError` where nothing of that leads to a shape, `ConfigError` for a size that no model has.
    """
    if (folder := _local_folder(base, revision)) is not None:
        config = read_json(folder / "config.json")
        if config is None:
            raise ModelError(
                "MODEL_NOT_FOUND",
                f"{base} holds no readable config.json.",
                where=str(folder),
                remedy="Name the folder that holds config.json and model.safetensors.",
            )
        shape, notes = _shape_in(folder, config, base)
        return BaseModel(shape, _facts_in(folder, base, config), folder, notes)
    if re.fullmatch(r"\d+(\.\d+)?\s*[kKmMbBtT]", base):
        shape = shape_from_size(base)
        return BaseModel(shape, ModelFacts(base), notes=(f"The shape of {base} is a typical one of that size.",))
    if (known := known_shape(base)) is not None:
        return BaseModel(known, ModelFacts(base, model_type=known.model_type, max_position=known.max_position))
    if os.path.isfile(base) or not HUB_ID.fullmatch(base):
        raise ModelError("MODEL_NOT_FOUND", f"There is no folder {base!r:.200}.", remedy="Check the path, or name a hub id.")
    answer = _ask_hub(base, revision) if network else Unanswered("the hub was not asked")
    if isinstance(answer, BaseModel):
        return answer
    if size := size_in_name(base):
        shape = shape_from_size(size)
        note = f"{base} is neither on this disk nor known, and {answer.why}: a typical shape of {size} is assumed."
        described = ModelFacts(base, licence=answer.licence, gated=answer.gated)
        return BaseModel(replace(shape, name=base), described, notes=(note,))
    raise ModelError(
        "MODEL_NOT_FOUND",
        f"Nothing is known about the shape of {base!r}: no folder of that name, not in the cache, and {answer.why}.",
        remedy="Give a folder with a config.json, a hub id that can be reached, or a size such as 7B.",
    )


def _local_folder(base: str, revision: str | None) -> Path | None:
    if base == "starter":
        from finetuneflow.models.starter import starter_path

        return starter_path()
    path = os.path.expanduser(base)
    if base and os.path.isdir(path):
        return Path(path)
    repository = _hub_cache() / f"models--{base.replace('/', '--')}"
    try:
        commit = (repository / "refs" / (revision or "main")).read_text().strip()
    except (OSError, ValueError):
        commit = revision or ""
    folder = repository / "snapshots" / commit
    return folder if commit and os.path.isfile(folder / "config.json") else None


def _shape_in(folder: Path, config: dict[str, Any], base: str) -> tuple[ModelShape, tuple[str, ...]]:
    """The shape of a folder's model: by its config, or for an architecture not known here by the tensors of its weights.

    Where usual keys describe another number of parameters than the weights hold, the weights are right.
    """
    if str(config.get("model_type")) in FAMILIES | PACKAGED or not (tensors := tensor_shapes(folder)):
        return shape_from_config(config, name=base), ()
    with contextlib.suppress(ModelError):
        read = shape_from_config(config, name=base)
        held = sum(math.prod(shape) for shape in tensors.values())
        if abs(read.num_parameters - held) <= 0.005 * held:
            return read, ()
    shape = shape_from_tensors(config, tensors, name=base, stated=read_json(folder / STATED_SHAPE))
    note = f"The architecture of {base} is not known here: its parameters are counted in the weights, its activations are approximate."
    return shape, (note,)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a folder, from the headers of its safetensors files; {} where one cannot be read.

    A header is its length in eight bytes, little-endian, and so much JSON (the safetensors format).
    """
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length)) if length <= HEADER_BYTES else {}
            found |= {name: tuple(map(int, entry["shape"])) for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}
    return found


def _hub_cache() -> Path:
    """Where the hub's client keeps models, by the variables it reads."""
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expanduser(cache or os.path.join(home, "hub")))


def _facts_in(folder: Path, name: str, config: dict[str, Any]) -> ModelFacts:
    tokenizer = read_json(folder / "tokenizer_config.json") or {}
    template = _template_in(tokenizer.get("chat_template"))
    with contextlib.suppress(OSError, ValueError):
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config  # of a model with eyes, the language part
    quantized = config.get("quantization_config")
    positions = text.get("max_position_embeddings") or text.get("n_positions") or text.get("max_seq_len")
    return ModelFacts(
        name=name,
        model_type=_word(config.get("model_type")),
        stored_dtype=_word(config.get("dtype")) or _word(config.get("torch_dtype")),
        quantized_as=_word(quantized.get("quant_method")) if isinstance(quantized, dict) else None,
        chat_template=template,
        pad_token=_token_text(tokenizer.get("pad_token")),
        eos_token=_token_text(tokenizer.get("eos_token")),
        max_position=positions if isinstance(positions, int) and not isinstance(positions, bool) and positions > 0 else None,
        licence=_licence(folder / "README.md"),
        has_own_code="auto_map" in config,
        fresh=(folder / FRESH).is_file(),
        config=config,
    )


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _template_in(value: Any) -> str | None:
    """A chat template, or the default one of a list of named ones."""
    named = (
        {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        if isinstance(value, list)
        else {}
    )
    return _word(named.get("default")) or _word(value)


def _token_text(value: Any) -> str | None:
    return _word(value.get("content") if isinstance(value, dict) else value)


def _licence(card: Path) -> str | None:
    """`license:` of a model card's front matter."""
    try:
        with card.open(encoding="utf-8") as file:
            head = file.read(20_000)
    except (OSError, ValueError):
        return None
    front = re.match(r"---\n(.*?)\n---", head, re.DOTALL)
    found = re.search(r"^license(?:_name)?:\s*[\"']?([\w.+-]+)", front.group(1), re.MULTILINE) if front else None
    return found.group(1) if found else None


@dataclass(frozen=True, slots=True)
class Unanswered:
    """Why the hub gave no config.json, and what its card says all the same."""

    why: str
    licence: str | None = None
    gated: bool | None = None


def _ask_hub(base: str, revision: str | None) -> BaseModel | Unanswered:
    """config.json and card data from the hub, without a token."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return Unanswered("the hub was not asked (HF_HUB_OFFLINE)")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if not endpoint.startswith(("https://", "http://")):
        return Unanswered("the hub was not asked (HF_ENDPOINT is no web address)")
    name = urllib.parse.quote(base, safe="/")
    wanted = urllib.parse.quote(revision or "main", safe="", errors="replace")
    config, card = _get_json(f"{endpoint}/{name}/resolve/{wanted}/config.json", f"{endpoint}/api/models/{name}")
    card = card if isinstance(card, dict) else {}
    details = card.get("cardData")
    licence = _word(details.get("license")) if isinstance(details, dict) else None
    gated = bool(card["gated"]) if "gated" in card else None
    if isinstance(config, dict):
        described = replace(_facts_in(Path(os.devnull), base, config), licence=licence, gated=gated)
        return BaseModel(shape_from_config(config, name=base), described, notes=("Its config.json was read from the hub.",))
    why = "it is gated: its config.json cannot be read without consent" if gated else "the hub gave no config.json"
    return Unanswered(why, licence, gated)


def _get_json(*urls: str) -> list[Any]:
    """What these addresses answer within `HUB_SECONDS`, None for each that gives no JSON.

    Each is asked in a thread of its own: looking up a name and a server that drips know no time limit.
    """
    answers: list[Any] = [None] * len(urls)

    def ask(index: int) -> None:
        try:
            with _opener().open(urls[index], timeout=HUB_SECONDS) as answer:
                answers[index] = json.loads(answer.read(PART_BYTES))
        except (OSError, ValueError, RecursionError, http.client.HTTPException):
            return

    threads = [threading.Thread(target=ask, args=(index,), daemon=True) for index in range(len(urls))]
    deadline = time.monotonic() + HUB_SECONDS
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return list(answers)


class _WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to a web address that is no less safe than the one asked."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urllib.parse.urlsplit(newurl).scheme not in ("https", req.type):
            return None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_WebRedirects)


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
