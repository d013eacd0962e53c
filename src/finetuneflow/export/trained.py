"""The trained model as the reference of every check: its base, unchanged since training, in the precision memory allows."""

from __future__ import annotations

import gc
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from finetuneflow.errors import DataError, ExportError
from finetuneflow.export.package import tokenizer_dir
from finetuneflow.export.record import RunRecord
from finetuneflow.export.verify import check_prompts

SHORT_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
STORED_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
MEMORY_SHARE = 0.8  # the rest is for activations and whatever else runs


def model_source(record: RunRecord) -> Any:
    """The base model of the run's settings, as the loader wants it."""
    from finetuneflow.models.source import source_of

    return source_of(record.config.model, record.run_dir)


def own_module(record: RunRecord) -> str | None:
    """The Python file of the run's own architecture, if it has one: the run's copy of it."""
    from finetuneflow.models.own import kept_in

    return kept_in(record.run_dir, record.config.model.module)


def require_same_base(record: RunRecord, digest: str) -> None:
    """Compare the base's files with the hash kept at training; an adapter on another base is another model."""
    fingerprint = record.environment.get("fingerprint")
    trained_on = fingerprint.get("base model") if isinstance(fingerprint, dict) else None
    if isinstance(trained_on, str) and trained_on and trained_on != digest:
        raise ExportError(
            "EXPORT_BASE_CHANGED",
            f"The files of {record.config.model.base} are not those the run was trained on (hash {digest[:19]}…, then {trained_on[:19]}…).",
            remedy="Restore the base model of that time: for a hub model, set model.revision in run.yaml to the commit of the run.",
        )


def stored_weights(folder: Path) -> tuple[str, int]:
    """Number type of most of a folder's weights and how many there are, from the files' headers (configs are often wrong)."""
    from safetensors import safe_open

    counts: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                tensor = file.get_slice(name)
                counts[STORED_NAMES.get(tensor.get_dtype(), "float32")] += math.prod(tensor.get_shape())
    return (counts.most_common(1)[0][0], counts.total()) if counts else ("float32", 0)


def base_weights(record: RunRecord) -> tuple[str, int]:
    """`stored_weights` of the run's base model."""
    from finetuneflow.models.source import resolve

    return stored_weights(resolve(model_source(record)).path)


def working_precision(stored: str, num_parameters: int) -> dict[str, str]:
    """Loader options: 32-bit arithmetic wherever memory allows, so that only what the export changed is measured."""
    import torch

    needed = 4 * num_parameters
    if torch.cuda.is_available() and needed < MEMORY_SHARE * torch.cuda.mem_get_info()[0]:
        return {"dtype": "fp32", "device": "auto"}
    if needed < MEMORY_SHARE * psutil.virtual_memory().available:
        return {"dtype": "fp32", "device": "cpu"}
    return {"dtype": SHORT_NAMES[stored], "device": "auto"}


def release_memory() -> None:
    """Give a dropped model's memory back before the next one is loaded: one at a time."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- tokenizer, template, prompts ----------------------------------------------------------------------


def exported_tokenizer(folder: Path) -> Any:
    from finetuneflow.models.tokenizer import load_tokenizer

    return load_tokenizer(folder)[0]


def chat_template(record: RunRecord, tokenizer: Any) -> Any | None:
    """The tokenizer's template, in our sandbox; None for a run on plain text and where no template can be followed."""
    from finetuneflow.data.templates import resolve_template

    if record.config.training.objective == "pretrain" or not tokenizer.chat_template:
        return None
    try:
        return resolve_template(tokenizer)
    except DataError:
        return None


def agreed_prompts(record: RunRecord, stage: Path) -> list[list[int]]:
    """Prompts by the exported tokenizer, after seeing that the run's own gives the same ids."""
    exported, own = exported_tokenizer(stage), exported_tokenizer(tokenizer_dir(record))
    own.chat_template = _trained_source(record) or own.chat_template
    prompts = check_prompts(exported, chat_template(record, exported), record.run_dir)
    if prompts != check_prompts(own, chat_template(record, own), record.run_dir):
        raise ExportError(
            "EXPORT_CHECK_FAILED",
            "The export was refused: its tokenizer, loaded again, gives other token ids than the run's.",
            remedy="Nothing was left in place. Check tokenizer/ and template.json of the run.",
        )
    return prompts


def _trained_source(record: RunRecord) -> str | None:
    path = record.run_dir / "template.json"
    source = json.loads(path.read_text(encoding="utf-8")).get("source") if path.is_file() else None
    return source if isinstance(source, str) else None
