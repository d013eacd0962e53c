"""What every package holds beside the weights: tokenizer, settings, metrics, report, curve, card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from finetuneflow.errors import ExportError
from finetuneflow.export.card import card_text
from finetuneflow.export.plot import draw_loss, draw_objective
from finetuneflow.export.record import RunRecord
from finetuneflow.export.redact import Redactor
from finetuneflow.export.report import report_text
from finetuneflow.export.verify import Check
from finetuneflow.workspace import write_atomic, write_json

# Every file a tokenizer may consist of. An allow-list: nothing else of a folder travels with an export.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
SPECIAL_TOKEN_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

DOCUMENT_BYTES = 4_000_000  # picture, report, card, manifest: generous


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def tokenizer_dir(record: RunRecord) -> Path:
    """Where the run keeps its tokenizer: `tokenizer/`, for full fine-tuning also beside the weights."""
    for folder in (record.run_dir / "tokenizer", record.run_dir / "model"):
        if (folder / "tokenizer_config.json").is_file():
            return folder
    raise ExportError(
        "EXPORT_RUN_DAMAGED",
        f"The run {record.name} has no tokenizer folder.",
        where=str(record.run_dir / "tokenizer"),
        remedy="Copy the tokenizer files of the base model to that place and export again.",
    )


def copy_tokenizer(record: RunRecord, stage: Path) -> None:
    """The tokenizer as trained, with the template used in training as its chat template, and its special tokens by role."""
    source = tokenizer_dir(record)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, stage / name)
    config = json.loads((stage / "tokenizer_config.json").read_text(encoding="utf-8"))
    if template := _trained_template(record):
        write_atomic(stage / "chat_template.jinja", template)
        if config.pop("chat_template", None) is not None:  # one template, in one place
            write_json(stage / "tokenizer_config.json", config)
    if not (stage / "special_tokens_map.json").is_file():
        write_json(stage / "special_tokens_map.json", _special_tokens(config))


def _trained_template(record: RunRecord) -> str | None:
    if record.config.training.objective == "pretrain":
        return None  # plain text was trained: whatever template the tokenizer has stays
    path = record.run_dir / "template.json"
    if not path.is_file():
        return None
    source = json.loads(path.read_text(encoding="utf-8")).get("source")
    return source if isinstance(source, str) and source else None


def _special_tokens(config: dict[str, Any]) -> dict[str, Any]:
    """What older loaders read from a file of its own; newer tokenizers keep it in their configuration."""
    found = {role: config[role] for role in SPECIAL_TOKEN_ROLES if config.get(role)}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    return found | ({"additional_special_tokens": extra} if isinstance(extra, list) and extra else {})


def write_documents(record: RunRecord, stage: Path, check: Check, redactor: Redactor, *, files_kind: str) -> None:
    """Settings, metrics, report, loss curve and card. Every text passes the redactor; tokenizer and weights hold no secrets."""
    setup = record.environment.get("setup")
    settings = {
        "run": record.name,
        "method_name": record.method,
        **record.config.model_dump(mode="json"),
        "used_on_this_machine": setup,
    }
    write_json(stage / "training_config.json", redactor.value(settings))
    write_json(stage / "metrics.json", redactor.value(record.metrics))
    write_atomic(stage / "report.md", report_text(record, redactor))
    write_atomic(stage / "train_loss.png", draw_loss(record))
    if (picture := draw_objective(record)) is not None:
        write_atomic(stage / "objective.png", picture)
    write_atomic(stage / "README.md", card_text(record, check, redactor, files_kind=files_kind))
