"""What needs no torch works without it: help, lists, logs and data checks start at once, also where only the core is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Runs one command line with every heavy package made unfindable, then says which were asked for.
WITHOUT = """
import sys
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "trl", "bitsandbytes", "matplotlib")
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"{name} was asked for", name=name)
sys.meta_path.insert(0, Blocker())
import finetuneflow
from finetuneflow.cli import main
sys.argv = ["ftf", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    code = end.code
else:
    code = 0
loaded = [name for name in HEAVY if name in sys.modules]
assert not loaded, loaded
sys.exit(code or 0)
"""


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True, cwd=cwd, env=env, timeout=60
    )


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a dataset and a workspace that holds one run."""
    (tmp_path / "run.yaml").write_text("data: {train: d.jsonl}\ntraining: {epochs: 1}\n")
    (tmp_path / "d.jsonl").write_text("".join(f'{{"instruction": "Hello {n}?", "output": "Hello."}}\n' for n in range(2)))
    (tmp_path / "stages.yaml").write_text("stages: [{name: a, data: {train: d.jsonl}}, {name: b, data: {train: d.jsonl}}]\n")
    run_dir = tmp_path / "ftf-workspace" / "runs" / "one"
    run_dir.mkdir(parents=True)
    (run_dir / "run.yaml").write_text("name: one\n")
    (run_dir / "events.jsonl").write_text(
        '{"seq": 1, "time": "2026-01-01T00:00:00+00:00", "event": "stopped", "step": 3, "reason": "asked to stop"}\n'
    )
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("train", "--help"),
        ("runs", "--json"),
        ("logs", "one", "--json"),
        ("stop", "one", "--json"),
        ("config",),
        ("explain", "RUN_BUSY"),
        ("explain", "LR_FULL_RATE_ON_ADAPTER", "--json"),
        ("plan", "--model", "starter", "--data", "d.jsonl", "--json"),
        ("plan", "--model", "70B", "--gpu", "A100", "--count", "8"),
        ("plan", "--matrix"),
        ("plan", "stages.yaml"),
        ("lint", "stages.yaml", "--json"),
        ("runs", "--pipelines", "--json"),
        ("lint", "run.yaml", "--json"),
        ("score", "run.yaml"),
        ("recipes",),
        ("rewards",),
        ("recipes", "show", "qlora"),
        ("diff", "alpaca", "run.yaml"),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_a_verb_that_needs_no_torch_loads_none(place: Path, arguments: tuple[str, ...]) -> None:
    done = run(*arguments, cwd=place)
    assert done.returncode == 0 and done.stdout, done.stderr[-500:]


def test_data_is_checked_without_torch(place: Path) -> None:
    done = run("data", "check", "d.jsonl", "--json", cwd=place)
    assert done.returncode == 0, done.stderr[-500:]
    assert json.loads(done.stdout)[0]["usable"] == 2
