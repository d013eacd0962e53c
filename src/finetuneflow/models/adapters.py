"""Adapters on a base model: attach a fresh one, count what it trains, read saved ones back.

PEFT does the work and fixes the file format; this module decides which modules are meant,
says so when a name fits none, and never opens a pickle. Adapters hold fp32 weights over a
base of any storage type.
"""

from __future__ import annotations

import contextlib
import functools
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from finetuneflow.errors import ModelError, TrainingError
from finetuneflow.models.targets import (
    checked_modules_to_save,
    has_attention,
    has_conv1d,
    ia3_targets,
    resolve_targets,
    ties_embeddings,
)

AdapterKind = Literal["full", "lora", "qlora", "dora", "rslora", "ia3", "prefix"]
MERGEABLE = ("LORA", "IA3")

TRAINED = "default"  # the adapter that is trained and saved, among others that may be loaded beside it
REFERENCE = "ref"  # a frozen adapter that preferences are measured against (the name that TRL looks for)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What is trained on top of a base model.

    `target_modules`: "auto" (PEFT's choice for the architecture, else all-linear), "all-linear",
    a list of module names, or one regular expression that matches whole module paths.
    `init`: True is PEFT's default (A Kaiming uniform, B zero); else one of its names ("gaussian", "pissa", "olora", …).
    `r`, `alpha`, `dropout`, `rslora`, `bias` and `init` concern the low-rank kinds, `num_virtual_tokens` prefix tuning.
    `task`: what the model under it does; a reward model scores.
    """

    kind: AdapterKind = "lora"
    r: int = 16
    alpha: float = 32
    dropout: float = 0.05
    target_modules: str | Sequence[str] = "auto"
    modules_to_save: Sequence[str] = ()
    rslora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    num_virtual_tokens: int = 20
    init: bool | str = True
    task: Literal["generate", "score"] = "generate"


class ParameterCount(NamedTuple):
    """Parameters as the user counts them: a 4-bit weight is one parameter, a tied one is counted once."""

    trainable: int
    total: int


# --- attaching ------------------------------------------------------------------------------


def attach_adapter(model: Any, spec: AdapterSpec, *, base_revision: str | None = None) -> Any:
    """Return `model` ready to train as `spec` says: a `PeftModel`, or the model itself for full fine-tuning.

    The base is changed in place (frozen, wrapped). `base_revision` is written into the adapter's config.
    """
    quantized = is_quantized(model)
    if spec.kind == "qlora" and not quantized:
        raise ModelError(
            "ADAPTER_NEEDS_QUANTIZED_BASE",
            "QLoRA needs a base model in 4 or 8 bits, and this one is not quantised.",
            remedy="Load the base with quantize='nf4', or use the method lora.",
        )
    if spec.kind == "full":
        return _unfreeze(model, quantized=quantized)
    from peft import get_peft_model

    config = peft_config(model, spec)
    if quantized:
        model = _prepared_for_few_bits(model)
    try:
        adapted = get_peft_model(model, config, revision=base_revision)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ModelError(
            "ADAPTER_UNSUPPORTED",
            f"The method {spec.kind} cannot be put on this {model.config.model_type} model as configured: {str(error)[:300]}",
            remedy="Choose other target_modules ('auto' suits every supported model), another init, or the method lora.",
        ) from error
    # Left to itself, PEFT asks the hub for the base's vocabulary size at every save, each checkpoint included, to find
    # out whether the embedding was resized. It never is here, and a trained one is saved through modules_to_save.
    adapted.save_pretrained = functools.partial(adapted.save_pretrained, save_embedding_layers=False)
    require_trainable(adapted)
    return adapted


def _prepared_for_few_bits(model: Any) -> Any:
    """Frozen, and with its unquantised weights (embeddings, norms, head) fit to train through.

    PEFT's own preparation copies those to fp32. That is kept for fp16, whose range gradients leave; bf16 has the range
    of fp32, gives the same losses to four digits, and saves half the embedding: 2 GB of an 8B model.
    """
    from peft import prepare_model_for_kbit_training

    if any(p.dtype is torch.float16 for p in model.parameters()):
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
    return model.requires_grad_(False)


def _unfreeze(model: nn.Module, *, quantized: bool) -> nn.Module:
    if quantized:
        raise TrainingError(
            "TRAINING_NO_TRAINABLE_PARAMETERS",
            "A quantised model cannot be fine-tuned in full: its 4- or 8-bit weights take no gradient.",
            remedy="Load the base unquantised, or train an adapter (method qlora).",
        )
    model.requires_grad_(True)
    require_trainable(model)
    return model


def peft_config(model: Any, spec: AdapterSpec) -> Any:
    """PEFT's configuration for `spec` on this model, its target modules resolved and checked."""
    import peft

    task = {"generate": "CAUSAL_LM", "score": "SEQ_CLS"}[spec.task]
    if spec.kind == "prefix":
        _require_attention(model)
        return peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=spec.num_virtual_tokens)
    targets = resolve_targets(model, spec.target_modules, kind=spec.kind)
    to_save = checked_modules_to_save(model, spec.modules_to_save)
    if spec.kind == "ia3":
        targets, feedforward = ia3_targets(model, targets)
        return peft.IA3Config(
            task_type=task,
            target_modules=targets,
            feedforward_modules=feedforward,
            modules_to_save=to_save,
            fan_in_fan_out=has_conv1d(model),
        )
    return peft.LoraConfig(
        task_type=task,
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # PEFT divides by it; a fraction is fine
        lora_dropout=spec.dropout,
        target_modules=targets,
        modules_to_save=to_save,
        use_rslora=spec.rslora or spec.kind == "rslora",
        use_dora=spec.kind == "dora",
        bias=spec.bias,
        init_lora_weights=spec.init,  # type: ignore[arg-type]
        ensure_weight_tying=bool(to_save) and ties_embeddings(model),
        fan_in_fan_out=has_conv1d(model),
    )


def _require_attention(model: Any) -> None:
    if not has_attention(model):
        raise ModelError(
            "ADAPTER_UNSUPPORTED",
            f"Prefix tuning puts keys and values before the text, and {model.config.model_type} has no attention.",
            remedy="Use the method lora.",
        )


def is_peft_model(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "base_model")


def load_adapter_weights(model: Any, adapter_dir: Path, *, name: str) -> None:
    """Put the weights of a saved adapter into one of the same shape that the model already has."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    config = check_adapter_dir(adapter_dir)
    _check_all_tensors_used(model, name, adapter_dir, config)
    set_peft_model_state_dict(model, load_file(adapter_dir / ADAPTER_WEIGHTS), adapter_name=name)


def is_quantized(model: Any) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


# --- counting ---------------------------------------------------------------------------------


def trainable_parameters(model: nn.Module) -> ParameterCount:
    """How many parameters would be trained, and how many there are."""
    trainable = total = 0
    for parameter in model.parameters():
        count = logical_numel(parameter)
        total += count
        trainable += count if parameter.requires_grad else 0
    return ParameterCount(trainable, total)


def logical_numel(parameter: torch.Tensor) -> int:
    """Weights a tensor stands for: packed 4-bit storage holds two per byte."""
    if parameter.__class__.__name__ == "Params4bit":
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        return int(torch.Size(shape).numel()) if shape else parameter.numel() * 2 * parameter.element_size()
    return parameter.numel()


def require_trainable(model: nn.Module) -> ParameterCount:
    """`trainable_parameters`, or an error when there are none."""
    count = trainable_parameters(model)
    if count.trainable == 0:
        raise TrainingError(
            "TRAINING_NO_TRAINABLE_PARAMETERS",
            f"None of the model's {count.total:,} parameters would be trained.",
            remedy="Check the method and target_modules; 'auto' suits every supported model.",
        )
    return count


# --- saved adapters ---------------------------------------------------------------------------


def save_adapter(model: Any, adapter_dir: Path) -> None:
    """Write the trained adapter in PEFT's format: safetensors and its configuration, readable by other users.

    Of several adapters in memory only that one is written.
    """
    chosen = {"selected_adapters": [TRAINED]} if TRAINED in model.peft_config else {}
    model.save_pretrained(str(adapter_dir), save_embedding_layers=False, **chosen)
    for path in adapter_dir.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors writes 0600


def check_adapter_dir(adapter_dir: Path) -> dict[str, Any]:
    """The adapter's configuration, once its folder is known to be whole and free of pickles."""
    from finetuneflow.models.screening import check_safetensors_file

    config_path, weights_path = adapter_dir / ADAPTER_CONFIG, adapter_dir / ADAPTER_WEIGHTS
    if not config_path.is_file():
        raise ModelError(
            "ADAPTER_NOT_FOUND",
            f"{adapter_dir} holds no {ADAPTER_CONFIG}.",
            remedy="Name the folder that `save_pretrained` or a finished run wrote (its `adapter/`).",
        )
    if not weights_path.is_file():
        raise _no_adapter_weights(adapter_dir)
    check_safetensors_file(weights_path, code="ADAPTER_CORRUPT")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _adapter_corrupt(config_path, f"is not valid JSON ({error})") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise _adapter_corrupt(config_path, "names no peft_type")
    if config.get("megatron_config"):
        raise _adapter_corrupt(
            config_path, "asks for a Megatron module to be imported, which is never done for a foreign adapter"
        )
    return config


def _no_adapter_weights(adapter_dir: Path) -> ModelError:
    if list(adapter_dir.glob("*.bin")) + list(adapter_dir.glob("*.pt")):
        return ModelError(
            "ADAPTER_PICKLE",
            f"The adapter in {adapter_dir} is stored as a pickle, which can run code when it is opened.",
            remedy=f"Ask its author for {ADAPTER_WEIGHTS}; or, in a throw-away sandbox, load it with PEFT and `save_pretrained` it anew.",
        )
    return ModelError("ADAPTER_NOT_FOUND", f"{adapter_dir} holds no {ADAPTER_WEIGHTS}.", remedy="Copy the whole adapter folder.")


def _adapter_corrupt(path: Path, what: str) -> ModelError:
    return ModelError("ADAPTER_CORRUPT", f"{path.name} {what}.", where=str(path), remedy="Copy or export the adapter again.")


def load_adapters(model: Any, adapters: Mapping[str, Path], *, is_trainable: bool = False) -> Any:
    """Put saved adapters on `model`; the first is active. Returns a `PeftModel`.

    Every tensor of a file must find its place and every place its tensor: a wrong base is an error, not a warning.
    """
    from peft import PeftModel

    adapted = None
    for name, adapter_dir in adapters.items():
        config = check_adapter_dir(adapter_dir)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # what it warns of is an error below
                if adapted is None:
                    adapted = PeftModel.from_pretrained(model, str(adapter_dir), adapter_name=name, is_trainable=is_trainable)
                else:
                    adapted.load_adapter(str(adapter_dir), adapter_name=name, is_trainable=is_trainable)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise _base_mismatch(adapter_dir, config, str(error).splitlines()[-1].strip()) from error
        _check_all_tensors_used(adapted, name, adapter_dir, config)
    if adapted is None:
        raise ValueError("load_adapters needs at least one adapter")
    return adapted


def _check_all_tensors_used(model: Any, name: str, adapter_dir: Path, config: dict[str, Any]) -> None:
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(adapter_dir / ADAPTER_WEIGHTS, framework="pt") as file:
        in_file = set(file.keys())
    in_model = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    surplus = {key for key in in_file - in_model if ".embed_tokens." not in key and ".lm_head." not in key}
    missing = in_model - in_file
    if surplus or missing:
        example = sorted(surplus or missing)[0]
        raise _base_mismatch(
            adapter_dir, config, f"{len(surplus)} tensors fit nowhere, {len(missing)} are missing, e.g. {example}"
        )


def _base_mismatch(adapter_dir: Path, config: dict[str, Any], what: str) -> ModelError:
    return ModelError(
        "ADAPTER_BASE_MISMATCH",
        f"The adapter does not fit this base model: {what[:300]}",
        where=str(adapter_dir),
        remedy=f"It was trained on {config.get('base_model_name_or_path')!r}; load it on that base.",
    )


def merge_into(model: Any, adapter_dir: Path) -> Any:
    """The plain model with a saved adapter's change written into its weights, in memory."""
    require_mergeable(adapter_dir)
    return load_adapters(model, {TRAINED: adapter_dir}).merge_and_unload(safe_merge=True)


def require_mergeable(adapter_dir: Path) -> None:
    """Raise `ADAPTER_NOT_MERGEABLE` for an adapter that is no change of weights."""
    config = check_adapter_dir(adapter_dir)
    if config["peft_type"] not in MERGEABLE:
        raise ModelError(
            "ADAPTER_NOT_MERGEABLE",
            f"An adapter of type {config['peft_type']} cannot be merged into weights.",
            where=str(adapter_dir),
            remedy="Continue it (model.adapter_start: continue) or load it beside its base model.",
        )


def write_sum(lower: Path, upper: Path, target: Path) -> None:
    """One LoRA adapter that does what `lower` and `upper` do together, on the base of `lower`; `target` is a new folder.

    The matrices stand side by side: A of both stacked, B of both beside each other, each B times its own scaling, so that
    B A = s1 B1 A1 + s2 B2 A2 exactly. A layer that only one of them adapts keeps that one's rank.
    """
    from safetensors.torch import load_file, save_file

    configs = [_summable(folder) for folder in (lower, upper)]
    weights = [load_file(folder / ADAPTER_WEIGHTS) for folder in (lower, upper)]
    scaled = [_scaled(tensors, config) for tensors, config in zip(weights, configs, strict=True)]
    summed = {key: _beside(key, [part[key] for part in scaled if key in part]) for key in sorted({*scaled[0], *scaled[1]})}
    ranks = {_layer(key): tensor.shape[0] for key, tensor in summed.items() if ".lora_A." in key}
    rank = max(ranks.values())
    odd = {layer: own for layer, own in sorted(ranks.items()) if own != rank}
    config = {
        **configs[0],
        "r": rank,
        "lora_alpha": rank,  # scaling 1: it is in B
        "use_rslora": False,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": sorted(ranks),  # whole paths: the two may adapt different layers
    }
    target.mkdir(parents=True)
    save_file(summed, target / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (target / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2))
    for path in target.iterdir():
        path.chmod(0o644)


def _summable(adapter_dir: Path) -> dict[str, Any]:
    config = check_adapter_dir(adapter_dir)
    if config["peft_type"] != "LORA" or config.get("use_dora") or config.get("modules_to_save"):
        raise ModelError(
            "ADAPTER_NOT_MERGEABLE",
            "Only LoRA adapters without DoRA and without modules trained in full can be stacked into one.",
            where=str(adapter_dir),
            remedy="Use model.adapter_start: continue or merge.",
        )
    return config


def _scaled(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors in fp32, each B times alpha / r (or alpha / sqrt(r)) of its layer."""
    found = {}
    for key, tensor in tensors.items():
        tensor = tensor.float()
        if ".lora_B." in key:
            rank = tensor.shape[1]
            alpha = _pattern_value(config.get("alpha_pattern") or {}, _layer(key), config["lora_alpha"])
            tensor = tensor * (alpha / (rank**0.5 if config.get("use_rslora") else rank))
        found[key] = tensor
    return found


def _beside(key: str, parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts, dim=0 if ".lora_A." in key else 1).contiguous()


def _layer(key: str) -> str:
    """The path of the layer that a tensor of an adapter file belongs to."""
    return key.removeprefix("base_model.model.").split(".lora_")[0]


def _pattern_value(pattern: Mapping[str, Any], layer: str, otherwise: float) -> float:
    return next((float(value) for end, value in pattern.items() if layer == end or layer.endswith(f".{end}")), otherwise)


def switch_adapter(model: Any, name: str) -> None:
    """Make one of the loaded adapters the active one."""
    if name not in model.peft_config:
        raise ModelError(
            "ADAPTER_NOT_FOUND", f"No adapter {name!r} is loaded.", remedy=f"Loaded: {', '.join(model.peft_config)}."
        )
    model.set_adapter(name)


@contextlib.contextmanager
def base_only(model: Any) -> Iterator[Any]:
    """Inside, the model answers as its base; afterwards the adapter is on again."""
    if not hasattr(model, "disable_adapter"):
        yield model
        return
    with model.disable_adapter():
        yield model
