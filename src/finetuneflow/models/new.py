"""A fresh model: random weights from an architecture's configuration, with a tokenizer, as a folder like any other base."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetuneflow.errors import ConfigError, HardwareError, ModelError
from finetuneflow.hardware import probe_memory
from finetuneflow.knowledge.shapes.settings import MOST_LAYERS
from finetuneflow.models import own
from finetuneflow.models.source import STARTER, ModelSource, tokenizer_folder
from finetuneflow.models.tokenizer import load_tokenizer, quiet_transformers
from finetuneflow.models.trial import NEEDED_SETTINGS, check_model
from finetuneflow.workspace import new_folder, require_free, write_json

STATED_SHAPE = "ftf_shape.json"  # what a module's `ftf_shape` says, as data: plans read it and run no code
FRESH = "ftf_new.json"  # says that a folder's weights are random; what is trained from it is saved without


def new_model(
    architecture: str | Path,
    out: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    tokenizer: str = STARTER,
    seed: int = 42,
) -> dict[str, Any]:
    """Write a randomly initialised model to the new folder `out`; returns what was made.

    `architecture`: a module file (see `own.py`) or the name of a packaged architecture. `settings` go to its configuration;
    vocabulary size and special tokens follow the tokenizer (a folder, a hub id or "starter") unless set.
    The same seed and settings give the same weights. Raises `StorageError` (STORAGE_EXISTS), `ConfigError`, `ModelError`,
    `HardwareError` (MEMORY_WONT_FIT, before anything is made).
    """
    config_class, module = _classes(architecture)
    require_free(out)
    folder, own_code = tokenizer_folder(ModelSource(tokenizer))
    tokens, _ = load_tokenizer(folder, run_own_code=own_code)
    config = _configuration(config_class, settings or {}, tokens, str(architecture))
    model = _initialised(config, seed, module)
    with new_folder(out) as stage, quiet_transformers():
        model.save_pretrained(stage)
        tokens.save_pretrained(stage)
        stated = None if module is None else module.shape_of(json.loads((stage / "config.json").read_text(encoding="utf-8")))
        if stated is not None:
            write_json(stage / STATED_SHAPE, stated)
        write_json(stage / FRESH, {"architecture": config.model_type, "seed": seed, "settings": dict(settings or {})})
    return {
        "out": str(out),
        "model_type": config.model_type,
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": config.vocab_size,
        "seed": seed,
        "module": None if module is None else {"path": str(module.path), "sha256": module.sha256},
    }


def is_fresh(base: str) -> bool:
    """Whether `base` is a folder with random weights that `new_model` made."""
    return os.path.isfile(os.path.join(os.path.expanduser(base), FRESH))


def _classes(architecture: str | Path) -> tuple[Any, own.OwnArchitecture | None]:
    """The configuration class, and the module file where it is not one of ours."""
    if str(architecture) in own.BUILT_IN:
        from transformers import CONFIG_MAPPING

        own.provide_built_in(str(architecture))
        return CONFIG_MAPPING[str(architecture)], None
    module = own.provide(architecture)
    return module.config_class, module


def _configuration(config_class: Any, settings: Mapping[str, Any], tokens: Any, architecture: str) -> Any:
    """The configuration with the user's settings; vocabulary and special tokens from the tokenizer where it has such fields."""
    from transformers import PreTrainedConfig

    with _as_config_error(architecture):
        known = {name for name in vars(config_class()) if not name.startswith("_")} | set(config_class.attribute_map)
    for name in settings:
        if name not in known:
            nearest = difflib.get_close_matches(name, sorted(known), n=1)
            raise ConfigError(
                "CONFIG_UNKNOWN_KEY",
                f"{config_class.__name__} has no setting {name!r}." + (f" Did you mean {nearest[0]!r}?" if nearest else ""),
                remedy=f"Its own settings: {', '.join(sorted(known - set(vars(PreTrainedConfig()))))}.",
            )
    from_tokens = {
        "vocab_size": len(tokens),
        "pad_token_id": tokens.pad_token_id,
        "eos_token_id": tokens.eos_token_id,
        "bos_token_id": tokens.bos_token_id,
    }
    with _as_config_error(architecture):
        config = config_class(**{name: value for name, value in from_tokens.items() if name in known} | dict(settings))
    _require_sizes(config)
    if getattr(config, "vocab_size", len(tokens)) < len(tokens):
        raise ConfigError(
            "CONFIG_INVALID_VALUE",
            f"vocab_size {config.vocab_size:,} has no room for the tokenizer's {len(tokens):,} tokens.",
            remedy="Leave vocab_size out, or name a tokenizer that is no larger.",
        )
    return config


def _require_sizes(config: Any) -> None:
    """The sizes that every architecture has are whole numbers, and a depth that can be built; `check_model` says which lack."""
    for name in NEEDED_SETTINGS:
        size, most = getattr(config, name, 1), MOST_LAYERS if name == "num_hidden_layers" else None
        if type(size) is not int or size < 1 or (most and size > most):
            raise ConfigError(
                "CONFIG_INVALID_VALUE",
                f"{name} is {size!r:.60}; it must be a whole number {f'from 1 to {most:,}' if most else 'of 1 or more'}.",
                remedy="Correct the value given with --set, or the default in the configuration class.",
            )


@contextlib.contextmanager
def _as_config_error(architecture: str) -> Iterator[None]:
    """What a configuration class says against a value; transformers' checks raise several kinds."""
    try:
        yield
    except Exception as error:
        raise ConfigError(
            "CONFIG_INVALID_VALUE",
            f"The configuration of {architecture} refuses these settings: {' '.join(str(error).split())[:300]}",
            remedy="Correct the value given with --set, or the defaults of the configuration class.",
        ) from error


def _initialised(config: Any, seed: int, module: own.OwnArchitecture | None) -> Any:
    """The model with weights drawn from `seed`, seen to work; the process's own random state stays as it was."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.random.fork_rng(devices=[]):
            with torch.device("meta"):
                _require_memory(AutoModelForCausalLM.from_config(config))
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config)
    except HardwareError:
        raise
    except Exception as error:
        if "overflow" in str(error).lower():
            raise _too_large("more parameters than can be counted", 2**63) from error
        raise ModelError(
            "MODEL_MODULE_FAILED",
            f"A model of type {config.model_type} cannot be made with these settings: {type(error).__name__}: {str(error)[:300]}",
            where=None if module is None else str(module.path),
            remedy="Check the settings given with --set against what the model class expects.",
        ) from error
    if module is not None:
        check_model(model, module)
    return model


def _require_memory(shapes: Any) -> None:
    """Raise unless the weights of a model without any (on the meta device) have room in memory."""
    needed_bytes = sum(value.nbytes for value in (*shapes.parameters(), *shapes.buffers()))
    if needed_bytes > probe_memory().available_bytes:
        raise _too_large(f"{sum(parameter.numel() for parameter in shapes.parameters()):,} parameters", needed_bytes)


def _too_large(what: str, needed_bytes: int) -> HardwareError:
    available_bytes = probe_memory().available_bytes
    return HardwareError(
        "MEMORY_WONT_FIT",
        f"A model with these settings has {what}: its weights take at least {needed_bytes / 1e9:,.1f} GB, and {available_bytes / 1e9:,.1f} GB "
        "of memory are free.",
        remedy="Choose smaller sizes with --set.",
        context={"needed_bytes": needed_bytes, "available_bytes": available_bytes},
    )
