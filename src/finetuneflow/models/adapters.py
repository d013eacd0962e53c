"""Adapters on a base model: attach a fresh one, count what it trains, read saved ones back.

PEFT does the work and fixes the file format; this module decides which modules are meant,
says so when a name fits none, and never opens a pickle. Adapters hold fp32 weights over a
base of any storage type.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from finetuneflow.errors import ModelError, TrainingError

AdapterKind = Literal["full", "lora", "qlora", "dora", "rslora", "ia3", "prefix"]
LOW_RANK_KINDS = ("lora", "qlora", "dora", "rslora")

# State-space models: an adapter on `dt_proj` gets no gradient and one on `out_proj` is refused by PEFT,
# because their fused kernels read those weights directly.
STATE_SPACE_TARGETS = {"mamba": ("in_proj", "x_proj"), "mamba2": ("in_proj",), "falcon_mamba": ("in_proj", "x_proj")}

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What is trained on top of a base model.

    `target_modules`: "auto" (PEFT's choice for the architecture, else all-linear), "all-linear",
    a list of module names, or one regular expression that matches whole module paths.
    `init`: True is PEFT's default (A Kaiming uniform, B zero); else one of its names ("gaussian", "pissa", "olora", …).
    `r`, `alpha`, `dropout`, `rslora`, `bias` and `init` concern the low-rank kinds, `num_virtual_tokens` prefix tuning.
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
    from peft import get_peft_model, prepare_model_for_kbit_training

    config = peft_config(model, spec)
    if quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        adapted = get_peft_model(model, config, revision=base_revision)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ModelError(
            "ADAPTER_UNSUPPORTED",
            f"The method {spec.kind} cannot be put on this {model.config.model_type} model as configured: {str(error)[:300]}",
            remedy="Choose other target_modules ('auto' suits every supported model), another init, or the method lora.",
        ) from error
    require_trainable(adapted)
    return adapted


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

    if spec.kind == "prefix":
        _require_attention(model)
        return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=spec.num_virtual_tokens)
    targets = resolve_targets(model, spec.target_modules, kind=spec.kind)
    to_save = checked_modules_to_save(model, spec.modules_to_save)
    if spec.kind == "ia3":
        feedforward = feedforward_targets(model, targets)
        return peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=targets,
            feedforward_modules=feedforward,
            modules_to_save=to_save,
            fan_in_fan_out=has_conv1d(model),
        )
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
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
    if model.config.model_type in STATE_SPACE_TARGETS:
        raise ModelError(
            "ADAPTER_UNSUPPORTED",
            f"Prefix tuning puts keys and values before the text, and {model.config.model_type} has no attention.",
            remedy="Use the method lora.",
        )


# --- which modules are meant ------------------------------------------------------------------


def resolve_targets(model: Any, wanted: str | Sequence[str], *, kind: str = "lora") -> list[str] | str:
    """The module names (or the pattern) an adapter goes on; raises when a name or the pattern fits no module."""
    model_type = model.config.model_type
    if isinstance(wanted, str) and wanted in ("auto", "all-linear"):
        chosen = _known_targets(model_type, kind) if wanted == "auto" or model_type in STATE_SPACE_TARGETS else None
        return chosen or linear_module_names(model)
    names = linear_modules(model)
    if isinstance(wanted, str) and wanted not in _leaf_names(names):
        return _checked_pattern(model, wanted, names)
    return _checked_names(model, [wanted] if isinstance(wanted, str) else list(wanted), names)


def _known_targets(model_type: str, kind: str) -> list[str] | None:
    if model_type in STATE_SPACE_TARGETS:
        return list(STATE_SPACE_TARGETS[model_type])
    from peft.utils import constants

    table = (
        constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
        if kind == "ia3"
        else constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    )
    return table.get(model_type)  # type: ignore[no-any-return]


def feedforward_targets(model: Any, targets: list[str] | str) -> list[str]:
    """The IA3 targets whose input, not output, is rescaled: the last linear layer of each feed-forward block."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as table

    known = table.get(model.config.model_type) or ["down_proj", "fc2", "c_proj", "dense_4h_to_h"]
    matched = {name for name in linear_modules(model) if _is_target(name, targets)}
    return sorted(name for name in known if any(_is_target(path, [name]) for path in matched))


def linear_modules(model: Any) -> dict[str, nn.Module]:
    """Every linear layer by its path, the output head left out: what an adapter can go on."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def linear_module_names(model: Any) -> list[str]:
    """The last parts of the paths of all linear layers, sorted: `all-linear` spelled out."""
    return sorted(_leaf_names(linear_modules(model)))


def _leaf_names(paths: Iterable[str]) -> set[str]:
    return {path.rsplit(".", 1)[-1] for path in paths}


def _is_target(path: str, targets: list[str] | str) -> bool:
    """PEFT's own rule: a pattern matches the whole path, a name its end."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _checked_names(model: Any, wanted: list[str], names: Mapping[str, nn.Module]) -> list[str]:
    head = head_name(model)
    for name in wanted:
        if head and _is_target(head, [name]):
            raise ModelError(
                "ADAPTER_TARGET_HEAD",
                f"{name!r} is the model's output layer; a low-rank adapter on it is not supported.",
                remedy=f"Take {name!r} out of target_modules and, to train it in full, put it into modules_to_save.",
            )
        if not any(_is_target(path, [name]) for path in names):
            raise _no_such_target(model, name)
    return wanted


def _checked_pattern(model: Any, pattern: str, names: Mapping[str, nn.Module]) -> str:
    try:
        matched = any(_is_target(path, pattern) for path in names)
    except re.error as error:
        raise ModelError(
            "ADAPTER_TARGET_MISSING",
            f"target_modules {pattern!r} is not a valid regular expression: {error}.",
            remedy="Give module names as a list, or a Python regular expression that matches whole module paths.",
        ) from error
    if not matched:
        raise _no_such_target(model, pattern)
    return pattern


def _no_such_target(model: Any, name: str) -> ModelError:
    available = linear_module_names(model)
    nearest = difflib.get_close_matches(name, available, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return ModelError(
        "ADAPTER_TARGET_MISSING",
        f"target_modules {name!r} fits no linear layer of this {model.config.model_type} model.{hint}",
        remedy=f"Choose among: {', '.join(available)}; or 'all-linear', or 'auto'.",
        context={"available": available},
    )


def checked_modules_to_save(model: Any, wanted: Sequence[str]) -> list[str] | None:
    """`modules_to_save` if each name fits a module, else an error with the names there are."""
    paths = [name for name, _ in model.named_modules() if name]
    for name in wanted:
        if not any(_is_target(path, [name]) for path in paths):
            whole = [n for n in (head_name(model), embedding_name(model)) if n]
            raise ModelError(
                "ADAPTER_TARGET_MISSING",
                f"modules_to_save {name!r} fits no module of this {model.config.model_type} model.",
                remedy=f"The usual ones here: {', '.join(n.rsplit('.', 1)[-1] for n in whole)}.",
            )
    return list(wanted) or None


def head_name(model: Any) -> str | None:
    return _path_of(model, model.get_output_embeddings())


def embedding_name(model: Any) -> str | None:
    return _path_of(model, model.get_input_embeddings())


def _path_of(model: Any, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


def ties_embeddings(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def has_conv1d(model: Any) -> bool:
    """True for the GPT-2 family, whose weights are stored transposed."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


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
        raise _adapter_corrupt(config_path, "asks for a Megatron module to be imported, which is never done for a foreign adapter")
    return config


def _no_adapter_weights(adapter_dir: Path) -> ModelError:
    if list(adapter_dir.glob("*.bin")) + list(adapter_dir.glob("*.pt")):
        return ModelError(
            "ADAPTER_PICKLE",
            f"The adapter in {adapter_dir} is stored as a pickle, which can run code when it is opened.",
            remedy=f"Ask its author for {ADAPTER_WEIGHTS}; or, in a throw-away sandbox, load it with PEFT and `save_pretrained` it anew.",
        )
    return ModelError(
        "ADAPTER_NOT_FOUND", f"{adapter_dir} holds no {ADAPTER_WEIGHTS}.", remedy="Copy the whole adapter folder."
    )


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
        raise _base_mismatch(adapter_dir, config, f"{len(surplus)} tensors fit nowhere, {len(missing)} are missing, e.g. {example}")


def _base_mismatch(adapter_dir: Path, config: dict[str, Any], what: str) -> ModelError:
    return ModelError(
        "ADAPTER_BASE_MISMATCH",
        f"The adapter does not fit this base model: {what[:300]}",
        where=str(adapter_dir),
        remedy=f"It was trained on {config.get('base_model_name_or_path')!r}; load it on that base.",
    )


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
