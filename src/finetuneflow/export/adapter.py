"""The adapter as a package: the weights copied unchanged, loaded again and compared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from finetuneflow.errors import ExportError
from finetuneflow.export.package import DOCUMENT_BYTES, copy_tokenizer, folder_bytes, tokenizer_dir
from finetuneflow.export.record import RunRecord, require_weights
from finetuneflow.export.redact import Redactor
from finetuneflow.export.trained import agreed_prompts, base_weights, model_source, require_same_base, working_precision
from finetuneflow.export.verify import EXACT_TOLERANCE, Answers, Check, greedy_answers, judge, sequence_logits, sequences_of
from finetuneflow.workspace import require_free_bytes, write_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def build_adapter(record: RunRecord, stage: Path, redactor: Redactor) -> Check:
    """Fill `stage` with adapter and tokenizer and compare it with the run's own; raises what loading raises."""
    from finetuneflow.models.adapters import check_adapter_dir

    if not record.config.method.is_adapter:
        raise ExportError(
            "EXPORT_UNSUPPORTED",
            f"The run {record.name} was full fine-tuning: it changed the model itself, there is no adapter.",
            remedy="Use --to merged: it exports the complete tuned model.",
        )
    source = require_weights(record)
    config = check_adapter_dir(source)
    require_free_bytes(stage, 2 * (source / WEIGHTS).stat().st_size + folder_bytes(tokenizer_dir(record)) + DOCUMENT_BYTES)
    shutil.copyfile(source / WEIGHTS, stage / WEIGHTS)
    # PEFT wrote where the base lay on this machine; whoever gets the package needs the name that was asked for.
    named = {**config, "base_model_name_or_path": redactor.text(record.config.model.base)}
    write_json(stage / CONFIG, named)
    copy_tokenizer(record, stage)
    return check_adapter(record, stage)


def check_adapter(record: RunRecord, stage: Path) -> Check:
    """Base + exported adapter against base + trained adapter: the same base in memory, so nothing may differ."""
    from finetuneflow.models.adapters import load_adapters, switch_adapter

    prompts = agreed_prompts(record, stage)
    model = load_adapters(_load_trained_base(record), {"default": record.weights_dir, "exported": stage}).eval()
    answers = {}
    sequences: list[list[int]] = []
    for name in ("default", "exported"):
        switch_adapter(model, name)
        greedy = greedy_answers(model, prompts)
        sequences = sequences or sequences_of(prompts, greedy)
        answers[name] = Answers(greedy, sequence_logits(model, sequences))
    return judge(
        answers["default"],
        answers["exported"],
        prompts,
        tolerance=EXACT_TOLERANCE,
        compared="base + trained adapter and base + exported adapter",
    )


def _load_trained_base(record: RunRecord) -> Any:
    """The base as it was in training: 4-bit for QLoRA, else in the precision memory allows."""
    from finetuneflow.models.load import load_base

    method = record.config.method
    if method.kind == "qlora":
        base = load_base(model_source(record), quantize="nf4", double_quant=method.double_quantization)
    else:
        precision = working_precision(*base_weights(record))
        base = load_base(model_source(record), dtype=precision["dtype"], device=precision["device"])
    require_same_base(record, base.facts.digest)
    return base.model
