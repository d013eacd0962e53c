"""Where a run comes from: its environment, and the fingerprint a resume must match.

A resumed run may only go on where nothing that shapes its result has changed: configuration, data,
tokenizer and template, base model, code and library versions, device. `differences` names what has.
"""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Any

import finetuneflow
from finetuneflow.config import RunConfig
from finetuneflow.hardware import probe
from finetuneflow.training.setup import Setup
from finetuneflow.workspace import source_digest

# Settings that may change between attempts: they shape neither the weights nor the log lines.
FREE_SETTINGS = frozenset(
    {
        "name",
        "training.report_to",
        "training.keep_checkpoints",
        "training.oom",
        "training.memory_check",
        "training.country",
        "evaluation",
    }
)
RESULT_SHAPING_PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "bitsandbytes", "datasets")
# Rooms whose code shapes weights or loss lines.
RESULT_SHAPING_CODE = ("data", "kernels", "models", "training")


def versions() -> dict[str, str]:
    """Installed versions of the packages that shape results."""
    found = {}
    for name in RESULT_SHAPING_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment(setup: Setup) -> dict[str, Any]:
    """What the run ran on: kept as `environment.json`. Holds no environment variables (they may be secrets)."""
    return {
        "finetuneflow": finetuneflow.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "hardware": probe(ask_torch=False).to_dict(),
        "setup": setup.to_dict(),
    }


def fingerprint(
    config: RunConfig, setup: Setup, *, data: dict[str, str], tokenizer: str, template: str, base: str
) -> dict[str, Any]:
    """Everything a resume must match, in parts that can be named. `data`: what each data file holds."""
    return {
        "configuration": _shaping_settings(config),
        "data": data,
        "tokenizer": tokenizer,
        "template": template,
        "base model": base,
        "code": source_digest(*RESULT_SHAPING_CODE),
        "packages": {**versions(), "python": ".".join(map(str, sys.version_info[:2]))},
        "device": {
            "device": setup.device,
            "compute": setup.compute_dtype,
            "storage": setup.storage_dtype,
            "optimizer": setup.optimizer,
            "checkpointing": setup.gradient_checkpointing,
            "learning rate": setup.learning_rate,
        },
    }


def _shaping_settings(config: RunConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            flat[name] = value
    return {key: value for key, value in flat.items() if key not in FREE_SETTINGS and key.split(".")[0] not in FREE_SETTINGS}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs, in words; empty when the run may go on."""
    found = []
    for part in now:
        old, new = before.get(part), now[part]
        if old == new:
            continue
        if isinstance(new, dict) and isinstance(old, dict):
            changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            found += [f"{part}: {key} was {old.get(key)!r} and is now {new.get(key)!r}" for key in changed]
        else:
            found.append(f"{part} changed")
    return found
