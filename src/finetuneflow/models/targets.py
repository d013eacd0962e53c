"""Which modules of a model an adapter goes on: names, patterns and the two words "auto" and "all-linear".

PEFT refuses only when nothing fits at all; here every single name must fit, and the error lists the names there are.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from finetuneflow.errors import ModelError
from finetuneflow.models.own import BUILT_IN, is_own

# State-space models: an adapter on `dt_proj` gets no gradient and one on `out_proj` is refused by PEFT,
# because their fused kernels read those weights directly.
STATE_SPACE_TARGETS = {"mamba": ("in_proj", "x_proj"), "mamba2": ("in_proj",), "falcon_mamba": ("in_proj", "x_proj")}


# Linear layers that an architecture stores and never uses: model type and layout -> names. They would get no gradient.
UNUSED_LINEARS = {("mamba_swelu", "simplified"): frozenset({"x_proj", "dt_proj"})}


def has_attention(model: Any) -> bool:
    """Whether keys and values can be put before the text of this model."""
    config = model.config
    return config.model_type not in STATE_SPACE_TARGETS and (
        hasattr(config, "num_attention_heads") or not (is_own(config) or config.model_type in BUILT_IN)
    )


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


def _known_targets(model_type: str, kind: str) -> list[str] | str | None:
    if model_type in STATE_SPACE_TARGETS:
        return list(STATE_SPACE_TARGETS[model_type])
    from peft.utils import constants

    table = (
        constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
        if kind == "ia3"
        else constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    )
    known = table.get(model_type)
    return known if isinstance(known, str) or known is None else list(known)


def ia3_targets(model: Any, targets: list[str] | str) -> tuple[list[str] | str, list[str]]:
    """(targets, those whose input, not output, is rescaled: the last linear layer of each feed-forward block).

    PEFT wants the second to be among the first by name. Where one name fits layers of both kinds (`c_proj` of GPT-2),
    it is told apart by the module it stands in (`attn.c_proj`, `mlp.c_proj`).
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as table

    known = table.get(model.config.model_type) or ["down_proj", "fc2", "c_proj", "dense_4h_to_h"]
    matched = {name for name in linear_modules(model) if _is_target(name, targets)}
    feedforward = sorted(name for name in known if any(_is_target(path, [name]) for path in matched))
    if isinstance(targets, str):
        return targets, feedforward
    named: set[str] = set()
    for target in targets:
        if any(name != target and name.endswith(f".{target}") for name in feedforward):
            named |= {".".join(path.split(".")[-2:]) for path in matched if _is_target(path, [target])}
        else:
            named.add(target)
    return sorted(named), feedforward


def linear_modules(model: Any) -> dict[str, nn.Module]:
    """Every linear layer by its path, what is never used and the output head left out: what an adapter can go on."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    unused = UNUSED_LINEARS.get((model.config.model_type, getattr(model.config, "layout", "")), frozenset())
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and name.rsplit(".", 1)[-1] not in unused
    }


def linear_module_names(model: Any) -> list[str]:
    """The last parts of the paths of all linear layers, sorted: `all-linear` spelled out.

    Where the output head bears the same last part as a layer inside, whole paths keep the two apart.
    """
    paths = linear_modules(model)
    head = head_name(model)
    return sorted(paths if head and _is_target(head, sorted(_leaf_names(paths))) else _leaf_names(paths))


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
