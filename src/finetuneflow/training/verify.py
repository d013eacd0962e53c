"""Prove that resuming is exact on this machine: one run straight, one killed again and again.

Both runs are real processes of the command line; the second is ended by SIGKILL at chosen moments and
resumed each time. Afterwards every weight and every log line must be equal, bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from finetuneflow.config import RunConfig, dump_config
from finetuneflow.errors import ResumeError
from finetuneflow.events import metric_lines, read_events
from finetuneflow.workspace import Workspace, write_atomic

Moment = Literal["between steps", "during a checkpoint"]
EXACT_FIELDS = ("step", "loss", "learning_rate", "grad_norm", "eval_loss")
MAX_WAIT_SECONDS = 1800.0


@dataclass(frozen=True, slots=True)
class Kill:
    """One SIGKILL: after which step, and whether it left a half-written checkpoint behind."""

    step: int
    moment: Moment


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared. `equal` is the verdict."""

    straight_run: Path
    resumed_run: Path
    kills: tuple[Kill, ...]
    tensors: int
    different_tensors: tuple[str, ...]
    log_lines: int
    different_lines: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return not self.different_tensors and not self.different_lines and self.tensors > 0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "straight_run": str(self.straight_run), "resumed_run": str(self.resumed_run), "equal": self.equal}


def verify_resume(
    config: RunConfig, workspace: Workspace, *, kills: int = 2, seed: int = 0, say: Callable[[str], None] = lambda text: None
) -> Verification:
    """Run `config` straight and killed `kills` times (at least one of them during a checkpoint, if there are two)."""
    config = _with_fixed_threads(config)
    path = workspace.root / "verify-resume.yaml"
    write_atomic(path, dump_config(config, {}))
    say("running straight")
    straight = _finish(_start(["train", str(path)], workspace), workspace, known=set(workspace.run_names()))
    total = next(event["total_steps"] for event in read_events(straight / "events.jsonl") if event["event"] == "complete")
    plan = _plan(total, config.training.save_steps, kills, random.Random(seed))
    resumed, done = _run_with_kills(path, workspace, plan, say)
    tensors, different = compare_weights(straight, resumed)
    lines, different_lines = compare_lines(straight, resumed)
    return Verification(straight, resumed, tuple(done), tensors, tuple(different), lines, tuple(different_lines))


def _with_fixed_threads(config: RunConfig) -> RunConfig:
    """Both runs must split their sums over the same number of threads."""
    if config.training.threads:
        return config
    from finetuneflow.hardware import measure_threads

    return config.model_copy(update={"training": config.training.model_copy(update={"threads": measure_threads().threads})})


def _plan(total_steps: int, save_steps: int, kills: int, rng: random.Random) -> list[tuple[Moment, int]]:
    """Moments in rising order: from the first checkpoint on (before it there is nothing to resume from)."""
    saves = list(range(save_steps, total_steps + 1, save_steps)) or [total_steps]
    plan: list[tuple[Moment, int]] = []
    if kills >= 2 and len(saves) >= 2:
        plan.append(("during a checkpoint", rng.choice(saves[1:])))
    while len(plan) < kills:
        plan.append(("between steps", rng.randint(min(saves[0], total_steps - 1), max(total_steps - 1, 1))))
    return sorted(plan, key=lambda item: item[1])


def _run_with_kills(
    path: Path, workspace: Workspace, plan: Sequence[tuple[Moment, int]], say: Callable[[str], None]
) -> tuple[Path, list[Kill]]:
    known = set(workspace.run_names())
    process = _start(["train", str(path)], workspace)
    run_dir = _wait_for_run(process, workspace, known)
    done = []
    for moment, step in plan:
        killed = _kill_at(process, run_dir, moment, step)
        if killed is None:  # it had ended already
            break
        done.append(killed)
        say(f"killed {killed.moment}, after step {killed.step}; resuming")
        process = _start(["resume", str(run_dir)], workspace)
    return _finish(process, workspace, known=known), done


def _kill_at(process: subprocess.Popen[bytes], run_dir: Path, moment: Moment, step: int) -> Kill | None:
    for event in _follow(process, run_dir):
        saving = event["event"] == "phase" and event.get("name") == "saving" and event.get("step", -1) >= step
        logged = event["event"] == "log" and event["step"] >= step
        if saving if moment == "during a checkpoint" else logged:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            debris = list((run_dir / "checkpoints").glob(".step-*.partial"))
            return Kill(event["step"], "during a checkpoint" if debris else "between steps")
    return None


def _follow(process: subprocess.Popen[bytes], run_dir: Path) -> Iterator[dict[str, Any]]:
    """New events of a live process, as they come (polled every 2 ms); ends with the process."""
    path = run_dir / "events.jsonl"
    position = path.stat().st_size if path.exists() else 0
    while process.poll() is None:
        with path.open("rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                position += len(line)
                yield json.loads(line)
        time.sleep(0.002)


def _start(arguments: list[str], workspace: Workspace) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "finetuneflow.cli", *arguments, "--workspace", str(workspace.root), "--quiet"]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    )


def _wait_for_run(process: subprocess.Popen[bytes], workspace: Workspace, known: set[str]) -> Path:
    deadline = time.monotonic() + MAX_WAIT_SECONDS
    while time.monotonic() < deadline:
        new = [name for name in workspace.run_names() if name not in known]
        if new and (workspace.runs_dir / new[0] / "events.jsonl").exists():
            return workspace.runs_dir / new[0]
        if process.poll() is not None:
            raise _failed(process)
        time.sleep(0.02)
    raise ResumeError("VERIFY_FAILED", "The run to verify did not start in time.")


def _finish(process: subprocess.Popen[bytes], workspace: Workspace, *, known: set[str]) -> Path:
    _, stderr = process.communicate(timeout=MAX_WAIT_SECONDS)
    if process.returncode != 0:
        raise _failed(process, stderr)
    return workspace.runs_dir / next(name for name in workspace.run_names() if name not in known)


def _failed(process: subprocess.Popen[bytes], stderr: bytes | None = None) -> ResumeError:
    text = (stderr or (process.stderr.read() if process.stderr else b"")).decode("utf-8", "replace")
    return ResumeError("VERIFY_FAILED", f"A run to verify ended with exit code {process.returncode}: {text.strip()[-600:]}")


# --- comparing two runs -------------------------------------------------------------------------------


def compare_weights(first: Path, second: Path) -> tuple[int, list[str]]:
    """(number of tensors, names of those that are not bit for bit equal) of two runs' results."""
    import torch
    from safetensors.torch import load_file

    one, two = (load_file(str(_weights(run))) for run in (first, second))
    different = [
        name for name in sorted({*one, *two}) if name not in one or name not in two or not torch.equal(one[name], two[name])
    ]
    return len(one), different


def _weights(run_dir: Path) -> Path:
    adapter = run_dir / "adapter" / "adapter_model.safetensors"
    return adapter if adapter.exists() else run_dir / "model" / "model.safetensors"


def compare_lines(first: Path, second: Path) -> tuple[int, list[str]]:
    """(number of log and evaluation lines, descriptions of those that differ in a figure that must not)."""
    count, different = 0, []
    for name in ("log", "eval"):
        one, two = (metric_lines(run / "events.jsonl", name) for run in (first, second))
        count += len(one)
        if [line["step"] for line in one] != [line["step"] for line in two]:
            different.append(f"{name}: steps {[line['step'] for line in one]} against {[line['step'] for line in two]}")
            continue
        for a, b in zip(one, two, strict=True):
            different += [
                f"{name} step {a['step']}: {f} {a[f]!r} against {b[f]!r}" for f in EXACT_FIELDS if f in a and a[f] != b.get(f)
            ]
    return count, different
