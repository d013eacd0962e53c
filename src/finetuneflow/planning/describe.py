"""What a base model is and what tuning it would take, from its small files: `ftf model show`."""

from __future__ import annotations

from typing import Any

from finetuneflow.config import build_config
from finetuneflow.errors import ModelError
from finetuneflow.knowledge.memory import estimate
from finetuneflow.knowledge.shapes import ModelShape, adapter_parameters, kv_cache_bytes
from finetuneflow.planning import machine_here
from finetuneflow.planning.base_model import look_at_model

KINDS = ("full", "lora", "qlora")


def describe_model(base: str, *, max_length: int = 1024, batch_size: int = 1, network: bool = True) -> dict[str, Any]:
    """Architecture, size and layers of `base`, and per method the trained parameters and the peak memory on this machine.

    Memory is of a run with default settings, micro-batches of `batch_size` examples and `max_length` tokens.
    Raises as `look_at_model` does. No weights are loaded and no code of the model is run.
    """
    found = look_at_model(base, network=network)
    shape, facts = found.shape, found.facts
    return {
        "name": base,
        "model_type": shape.model_type or None,
        "folder": None if found.folder is None else str(found.folder),
        "parameters": shape.num_parameters,
        "embedding_parameters": shape.embedding_parameters,
        "certainty": shape.certainty,
        "source": shape.source,
        "layers": shape.layers,
        "width": shape.hidden,
        "vocabulary": shape.vocab,
        "context": shape.max_position,
        "attention_layers": shape.layers if shape.attention_layers is None else shape.attention_layers,
        "cache_bytes_per_sequence": kv_cache_bytes(shape, max_length),
        "linear_layers": sorted({linear.name for linear in shape.linears if linear.is_linear_module}),
        "stored_dtype": facts.stored_dtype,
        "licence": facts.licence,
        "own_code": facts.has_own_code,
        "max_length": max_length,
        "batch_size": batch_size,
        "methods": [_method(shape, kind, max_length, batch_size) for kind in KINDS],
        "notes": list(found.notes),
    }


def _method(shape: ModelShape, kind: str, max_length: int, batch_size: int) -> dict[str, Any]:
    config, _ = build_config(
        {
            "data": {"max_length": max_length},
            "method": {"kind": kind},
            "training": {"batch_size": batch_size, "eval_batch_size": batch_size},
        }
    )
    try:
        trained = adapter_parameters(shape, config.method)
        needed = estimate(shape, config, machine_here())
    except ModelError as error:
        return {"method": kind, "possible": False, "why": error.message}
    return {
        "method": kind,
        "possible": True,
        "trained_parameters": trained,
        "memory_bytes": needed.total_bytes,
        "verdict": needed.verdict,
    }
