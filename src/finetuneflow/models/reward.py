"""Reward models: a base model whose head gives one score for a whole conversation.

scoring_model       a causal model in memory becomes one with a score head, without loading it again
adapter_for_scoring an adapter trained to answer becomes the start of one that scores
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch

from finetuneflow.errors import ModelError
from finetuneflow.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINED, AdapterSpec, attach_adapter, check_adapter_dir


def scoring_model(causal: Any, tokenizer: Any, *, seed: int) -> Any:
    """The sequence-classification form of a causal model with one output, on the same weights; the score head is drawn from `seed`.

    Its forward pass scores the last token that is not padding, told by comparing ids. So padding must never look like the end of
    a turn: the padding id is set to one that no row ends with.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(causal.config)
    config.num_labels = 1
    config.architectures = None
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            scoring = AutoModelForSequenceClassification.from_config(config)
            inputs = scoring.score.in_features
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            "ADAPTER_UNSUPPORTED",
            f"There is no reward model of the architecture {causal.config.model_type}.",
            remedy="Use dpo, which needs none, or a base of another family.",
        ) from error
    setattr(scoring, scoring.base_model_prefix, getattr(causal, causal.base_model_prefix))
    weight = next(causal.parameters())
    head = torch.nn.Linear(inputs, 1, bias=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # As small as its input is wide (Stiennon et al. 2020, appendix C): scores start near zero.
        head.weight.normal_(std=(inputs + 1) ** -0.5, generator=generator)
    scoring.score = head.to(device=weight.device, dtype=torch.float32 if weight.dtype is torch.float32 else causal.dtype)
    scoring.config.pad_token_id = padding_id(tokenizer)
    scoring.config._name_or_path = scoring.name_or_path = causal.config._name_or_path
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method"):
        if hasattr(causal, flag):
            setattr(scoring, flag, getattr(causal, flag))
    return scoring.eval()


def padding_id(tokenizer: Any) -> int:
    """An id to pad with that no conversation ends with: the padding token unless it is the end token too."""
    pad, ends = tokenizer.pad_token_id, set(tokenizer.all_special_ids) - {tokenizer.pad_token_id}
    if pad is not None and pad != tokenizer.eos_token_id:
        return int(pad)
    # The first ordinary token that decodes to something: a row ends with a control token or white space after one.
    size = len(tokenizer)
    return next(i for i in range(size) if i not in ends and i != pad and tokenizer.decode([i]).strip())


def adapter_for_scoring(model: Any, adapter_dir: Path, spec: AdapterSpec) -> Any:
    """A scoring model with an adapter whose weights start as those of one that was trained to answer; the score head is new."""
    from dataclasses import replace

    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    saved = check_adapter_dir(adapter_dir)
    if saved["peft_type"] != "LORA":
        raise ModelError(
            "ADAPTER_UNSUPPORTED",
            f"A reward model cannot be started from an adapter of type {saved['peft_type']}.",
            remedy="Use model.adapter_start: merge.",
        )
    weights = load_file(adapter_dir / ADAPTER_WEIGHTS)
    _require_lora(saved, weights, adapter_dir)
    adapted = attach_adapter(
        model,
        replace(
            spec,
            kind="dora" if saved.get("use_dora") else spec.kind,
            r=saved["r"],
            alpha=saved["lora_alpha"],
            rslora=bool(saved.get("use_rslora")),
            target_modules=saved["target_modules"],
        ),
    )
    head = adapted.base_model.model.score.original_module.weight
    # PEFT insists on everything that such an adapter saves, the new head included.
    weights["base_model.model.score.weight"] = head
    result: Any = set_peft_model_state_dict(adapted, weights, adapter_name=TRAINED)
    if result.unexpected_keys:
        raise ModelError(
            "ADAPTER_BASE_MISMATCH",
            f"The adapter does not fit this base model: {len(result.unexpected_keys)} tensors fit nowhere, e.g. {result.unexpected_keys[0]}",
            where=str(adapter_dir),
            remedy=f"It was trained on {saved.get('base_model_name_or_path')!r}; load it on that base.",
        )
    return adapted


def _require_lora(saved: dict[str, Any], weights: dict[str, torch.Tensor], adapter_dir: Path) -> None:
    """Raise unless an adapter's settings are of the kinds they must be, and its rank is one that its weights have."""
    rank, alpha, targets = saved.get("r"), saved.get("lora_alpha"), saved.get("target_modules")
    ranks = {tensor.shape[0] for name, tensor in weights.items() if ".lora_A." in name and tensor.dim() == 2}
    if type(rank) is int and rank in ranks and type(alpha) in (int, float) and isinstance(targets, list | str):
        return
    raise ModelError(
        "ADAPTER_CORRUPT",
        f"{ADAPTER_CONFIG} gives no r, lora_alpha and target_modules that go with the adapter's weights.",
        where=str(adapter_dir / ADAPTER_CONFIG),
        remedy="Copy or export the adapter again.",
    )
