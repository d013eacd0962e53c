"""Checkpoints that count only when they are whole.

    checkpoints/step-000200/
        adapter_model.safetensors (or model.safetensors), adapter_config.json, …   the weights
        optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json, progress.json  everything else a resume needs
        complete.json      written last: step, and size and SHA-256 of every file above

A checkpoint is written under a temporary name, synced, marked and renamed; a reader therefore sees
a whole one or none. `find_valid` verifies size and hash of each file before anything is opened:
the pickled parts (optimizer, random state) are only ever read when they are byte for byte what this
run wrote.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetuneflow.errors import ResumeError
from finetuneflow.workspace import require_free_bytes, sha256_file, sync_directory, translate_os_errors, write_json

MARKER = "complete.json"
STEP_PATTERN = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class Damage:
    """A checkpoint that must not be used, and why."""

    path: Path
    reason: str


def checkpoint_dir(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def write_checkpoint(
    root: Path, step: int, save: Callable[[Path], None], *, event: Callable[[], None] = lambda: None
) -> Checkpoint:
    """Let `save(folder)` fill a temporary folder, then mark and rename it. An older folder of that step is replaced.

    `event` is called between the files and the marker: the moment at which a kill leaves the most debris.
    """
    final = checkpoint_dir(root, step)
    temporary = root / f".{final.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    require_free_bytes(root, _size_of_newest(root))
    try:
        with translate_os_errors(temporary):
            temporary.mkdir(parents=True)
            save(temporary)
            event()
            files = {}
            for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
                os.chmod(path, 0o644)  # safetensors writes 0600
                _sync_file(path)
                files[str(path.relative_to(temporary))] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            write_json(temporary / MARKER, {"step": step, "files": files})
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
            sync_directory(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # free the space a failed checkpoint took
        raise
    return Checkpoint(step, final)


def _size_of_newest(root: Path) -> int:
    """Bytes of the newest checkpoint: what the next one will need."""
    complete = list_complete(root)
    return sum(path.stat().st_size for path in complete[-1].path.rglob("*") if path.is_file()) if complete else 0


def list_complete(root: Path) -> list[Checkpoint]:
    """Checkpoints with a marker, oldest first. Cheap: contents are not verified."""
    if not root.is_dir():
        return []
    found = [(STEP_PATTERN.fullmatch(p.name), p) for p in root.iterdir() if (p / MARKER).is_file()]
    return sorted((Checkpoint(int(m.group(1)), p) for m, p in found if m), key=lambda c: c.step)


def find_damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None: every file is there with the size and hash its marker states."""
    try:
        marker = json.loads((checkpoint / MARKER).read_text())
        files = [(str(name), int(facts["bytes"]), str(facts["sha256"])) for name, facts in marker["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its marker {MARKER} is missing or unreadable (the checkpoint was not finished)"
    for name, size, digest in files:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        if sha256_file(path) != digest:
            return f"{name} was changed (its SHA-256 differs)"
    return None


def find_valid(root: Path) -> tuple[Checkpoint, list[Damage]]:
    """The newest checkpoint whose files are all intact, and the newer ones that were skipped, with the reason.

    Raises `RESUME_NO_CHECKPOINT` when there is none.
    """
    damaged: list[Damage] = []
    candidates = [p for p in root.iterdir() if STEP_PATTERN.fullmatch(p.name)] if root.is_dir() else []
    for path in sorted(candidates, key=lambda p: int(p.name.removeprefix("step-")), reverse=True):
        reason = find_damage(path)
        if reason is None:
            return Checkpoint(int(path.name.removeprefix("step-")), path), damaged
        damaged.append(Damage(path, reason))
    skipped = "; ".join(f"{d.path.name}: {d.reason}" for d in damaged)
    raise ResumeError(
        "RESUME_NO_CHECKPOINT",
        "No checkpoint of this run can be used" + (f" ({skipped})." if skipped else ": none was completed."),
        where=str(root),
        remedy="Start the run again: `ftf train` with its run.yaml.",
        context={"damaged": [str(d.path) for d in damaged]},
    )


def remove_leftovers(root: Path) -> list[str]:
    """Delete what an interrupted save left behind; returns the names."""
    if not root.is_dir():
        return []
    partial = [p for p in root.iterdir() if p.name.startswith(".step-") and p.name.endswith(".partial")]
    for path in partial:
        shutil.rmtree(path, ignore_errors=True)
    return [p.name for p in partial]


def prune(root: Path, *, keep: int, protect: int | None) -> None:
    """Keep the newest `keep` checkpoints and the one of step `protect` (the best). A failed delete is left for next time."""
    for checkpoint in list_complete(root)[:-keep]:
        if checkpoint.step != protect:
            shutil.rmtree(checkpoint.path, ignore_errors=True)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
