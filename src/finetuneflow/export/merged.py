"""The complete model as a package: base and adapter in one set of weights, loaded again and compared.

The merge happens in 32 bits (where memory allows) on a freshly loaded base and is rounded once, to the number type of
the base's own files or the one asked for. A 4-bit base in memory is never merged into: its packed weights are
approximations, and bitsandbytes may have rearranged them in place.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from finetuneflow.errors import ExportError
from finetuneflow.export.package import DOCUMENT_BYTES, copy_tokenizer, folder_bytes
from finetuneflow.export.record import RunRecord, require_weights
from finetuneflow.export.trained import (
    agreed_prompts,
    base_weights,
    chat_template,
    exported_tokenizer,
    model_source,
    own_module,
    release_memory,
    require_same_base,
    stored_weights,
    working_precision,
)
from finetuneflow.export.verify import (
    EXACT_TOLERANCE,
    Answers,
    Check,
    Dtype,
    greedy_answers,
    judge,
    sequence_logits,
    sequences_of,
    tolerance_for,
)
from finetuneflow.workspace import require_free_bytes

MODEL_DOCUMENTS = ("config.json", "generation_config.json", "model.safetensors.index.json")


def build_merged(record: RunRecord, stage: Path, *, dtype: Dtype = "auto") -> Check:
    """Fill `stage` with whole weights, tokenizer and generation settings, and compare with the trained model."""
    source = require_weights(record)
    if not record.config.method.is_adapter:
        return _copy_full_model(record, source, stage)
    if record.config.method.kind == "prefix":
        raise ExportError(
            "EXPORT_UNSUPPORTED",
            "Prefix tuning puts trained vectors before the text; they cannot be written into the model's weights.",
            remedy="Use --to adapter; it is loaded beside the base model.",
        )
    base_dtype, num_parameters = base_weights(record)
    stored = base_dtype if dtype == "auto" else dtype
    precision = working_precision(base_dtype, num_parameters)
    require_free_bytes(stage, (4 if stored == "float32" else 2) * num_parameters + DOCUMENT_BYTES)
    copy_tokenizer(record, stage)
    prompts = agreed_prompts(record, stage)
    reference, base_logits, sequences = _ask_trained(record, source, prompts, precision)
    num_matrices = _merge_and_save(record, source, stage, stored, precision)
    candidate = _ask_folder(stage, prompts, sequences, precision, own_module(record))
    return judge(
        reference,
        candidate,
        prompts,
        tolerance=tolerance_for((stored, _long_name(precision["dtype"])), num_matrices),
        compared=f"base + trained adapter and the merged model ({stored})",
        base_logits=base_logits,
    )


def _long_name(short: str) -> str:
    return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[short]


def _ask_trained(
    record: RunRecord, adapter_dir: Path, prompts: list[list[int]], precision: dict[str, str]
) -> tuple[Answers, tuple[Any, ...], list[list[int]]]:
    """Base + adapter, not merged: its answers, the base's logits on them, and the sequences they were taken at."""
    from finetuneflow.models.adapters import base_only
    from finetuneflow.models.load import load_with_adapters

    loaded = load_with_adapters(
        model_source(record), {"default": adapter_dir}, dtype=precision["dtype"], device=precision["device"]
    )
    require_same_base(record, loaded.facts.digest)
    greedy = greedy_answers(loaded.model, prompts)
    sequences = sequences_of(prompts, greedy)
    logits = sequence_logits(loaded.model, sequences)
    with base_only(loaded.model) as base:
        base_logits = sequence_logits(base, sequences)
    del loaded, base
    release_memory()
    return Answers(greedy, logits), base_logits, sequences


def _ask_folder(
    folder: Path, prompts: list[list[int]], sequences: list[list[int]] | None, precision: dict[str, str], module: str | None
) -> Answers:
    """What a saved model answers, at `sequences` or else at its own greedy ones. `module`: see `own_module`."""
    from finetuneflow.models.load import load_base
    from finetuneflow.models.source import ModelSource

    source = ModelSource(str(folder), module=module)
    loaded = load_base(source, dtype=precision["dtype"], device=precision["device"])
    greedy = greedy_answers(loaded.model, prompts)
    answers = Answers(greedy, sequence_logits(loaded.model, sequences or sequences_of(prompts, greedy)))
    del loaded
    release_memory()
    return answers


def _merge_and_save(record: RunRecord, adapter_dir: Path, stage: Path, stored: str, precision: dict[str, str]) -> int:
    """Merge, round once, save with the right end of turn. Returns the number of weight matrices."""
    import torch

    from finetuneflow.models.load import merged_copy

    merged = merged_copy(model_source(record), adapter_dir, dtype=precision["dtype"], device=precision["device"]).model
    model = merged.to(getattr(torch, stored))
    tokenizer = exported_tokenizer(stage)
    set_turn_end(model, tokenizer, chat_template(record, tokenizer))
    model.save_pretrained(stage)
    num_matrices = sum(1 for parameter in model.parameters() if parameter.dim() >= 2)
    del merged, model
    release_memory()
    return num_matrices


def set_turn_end(model: Any, tokenizer: Any, template: Any | None) -> None:
    """Let generation stop where training taught it to: at the template's end of turn first, then at the end tokens known before.

    A turn end of several ordinary tokens cannot be named there; the tokenizer's end token remains.
    """
    settings = model.generation_config
    known = settings.eos_token_id
    candidates = [tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])]
    if template is not None and len(template.turn_end) == 1:
        candidates.insert(0, template.turn_end[0])
    ends = list(dict.fromkeys(token for token in candidates if token is not None))
    settings.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    settings.pad_token_id = tokenizer.pad_token_id
    if any(getattr(settings, name, None) is not None for name in ("temperature", "top_p", "top_k")):
        settings.do_sample = True  # some models ship sampling values with sampling off, which cannot be saved


def _copy_full_model(record: RunRecord, source: Path, stage: Path) -> Check:
    """Full fine-tuning: the run's own weights, unchanged, with the end of turn in the generation settings."""
    from finetuneflow.models.own import provide

    require_free_bytes(stage, folder_bytes(source) + DOCUMENT_BYTES)
    for path in source.iterdir():
        if path.suffix == ".safetensors" or path.name in MODEL_DOCUMENTS:
            shutil.copyfile(path, stage / path.name)
    copy_tokenizer(record, stage)
    if (module := own_module(record)) is not None:
        provide(module)
    _write_generation_config(record, stage)
    prompts = agreed_prompts(record, stage)
    precision = working_precision(*stored_weights(source))
    trained = _ask_folder(source, prompts, None, precision, module)
    exported = _ask_folder(stage, prompts, sequences_of(prompts, trained.greedy), precision, module)
    return judge(trained, exported, prompts, tolerance=EXACT_TOLERANCE, compared="the trained model and its copy")


def _write_generation_config(record: RunRecord, stage: Path) -> None:
    """The trained model's generation settings with the end of turn, without loading its weights."""
    from transformers import AutoConfig, GenerationConfig

    if (stage / "generation_config.json").is_file():
        settings = GenerationConfig.from_pretrained(stage)
    else:
        settings = GenerationConfig.from_model_config(AutoConfig.from_pretrained(stage))
    tokenizer = exported_tokenizer(stage)
    set_turn_end(SimpleNamespace(generation_config=settings), tokenizer, chat_template(record, tokenizer))
    settings.save_pretrained(stage)
