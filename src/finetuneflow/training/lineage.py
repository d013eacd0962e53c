"""Where a run comes from: its environment, the fingerprint a resume must match, and the runs whose results it goes on with.

A resumed run may only go on where nothing that shapes its result has changed: configuration, data,
tokenizer and template, base model, code and library versions, device. `differences` names what has.

`lineage.json` tells the parents of a run with the hashes of what was taken from them, its data, its settings, the pipeline
it belongs to, and, once it ended, the hash of its own result: the whole family can be told, and checked, from the runs alone.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import finetuneflow
from finetuneflow.config import RunConfig
from finetuneflow.hardware import probe
from finetuneflow.knowledge.objectives import traits_of
from finetuneflow.training.setup import Setup
from finetuneflow.workspace import Workspace, read_json_object, sha256_file, sha256_json, source_digest, write_json

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


# --- parents and result -----------------------------------------------------------------------------

LINEAGE_FILE = "lineage.json"


@dataclass(frozen=True, slots=True)
class Membership:
    """The pipeline and stage a run belongs to, and how that stage starts, with the reason."""

    pipeline: str
    stage: str
    start: str
    reason: str


@dataclass(frozen=True, slots=True)
class Parent:
    """What a run takes from an earlier one. `how`: continue, merge, stack, model or reward; `sha256`: of the folder taken."""

    run: str | None
    path: str
    how: str
    sha256: str | None


def read_lineage(run_dir: Path) -> dict[str, Any]:
    """`lineage.json` of a run; empty where it has none, or none that can be read."""
    return read_json_object(run_dir / LINEAGE_FILE)


def record_start(run_dir: Path, config: RunConfig, workspace: Workspace, member: Membership | None = None) -> None:
    """Write who the run's parents are, before it begins. `config` as it was given: before anything is merged."""
    write_json(
        run_dir / LINEAGE_FILE,
        {
            "run": run_dir.name,
            **(asdict(member) if member else {"pipeline": None, "stage": None}),
            "objective": config.training.objective,
            "method": config.method.kind,
            "base": config.model.base,
            "parents": [asdict(parent) for parent in parents_of(config, workspace)],
            "settings": sha256_json(_shaping_settings(config)),
        },
    )


def record_result(run_dir: Path, config: RunConfig, manifest: dict[str, Any]) -> None:
    """Add the hashes of the data files (as in `data/manifest.json`) and of the result, when it is saved."""
    known = read_lineage(run_dir)
    if not known:  # of a run that began before lineages were written
        record_start(run_dir, config, Workspace(run_dir.parent.parent))
        known = read_lineage(run_dir)
    result = result_folder(run_dir)
    found = {"kind": result.name, "sha256": folder_digest(result)} if result else None
    files = [*manifest["train"], *manifest["eval"], *manifest.get("replay", {}).get("files", ())]
    data = {str(file["file"]): str(file["sha256"]) for file in files}
    write_json(run_dir / LINEAGE_FILE, {**known, "data": data, "result": found})


def parents_of(config: RunConfig, workspace: Workspace) -> list[Parent]:
    """The earlier results that a run takes up: its adapter, its base where a run made it, its reward models."""
    from finetuneflow.training.start import adapter_folder

    found = []
    model = config.model
    if model.adapter is not None:
        how = "merge" if config.method.kind == "full" else model.adapter_start
        found.append(_parent(adapter_folder(model.adapter, workspace), how))
    base = Path(model.base)
    if base.is_dir() and (base.parent / "run.yaml").is_file():
        found.append(_parent(base, "model"))
    if traits_of(config).draws:
        named = [text.removeprefix("model:") for text in config.reinforcement.reward if text.startswith("model:")]
        found += [_parent(result_folder(Path(name)) or Path(name), "reward") for name in named]
    return found


def _parent(folder: Path, how: str) -> Parent:
    run = folder.parent.name if (folder.parent / "run.yaml").is_file() else None
    return Parent(run, str(folder), how, folder_digest(folder) if folder.is_dir() else None)


def result_folder(run_dir: Path) -> Path | None:
    """`adapter/` or `model/` of a finished run."""
    return next((run_dir / kind for kind in ("adapter", "model") if (run_dir / kind).is_dir()), None)


def folder_digest(folder: Path) -> str:
    """Hex SHA-256 over the names and contents of all files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return sha256_json({str(path.relative_to(folder)): sha256_file(path) for path in files})
