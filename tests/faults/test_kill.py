"""Real processes of the command line, ended by real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetuneflow.config import RunConfig, dump_config
from finetuneflow.events import read_events
from finetuneflow.training.checkpoints import find_damage, list_complete
from finetuneflow.training.status import run_status
from finetuneflow.training.verify import verify_resume
from training.workbench import Bench, assert_same_result, at

WAIT_SECONDS = 180.0


class Process:
    """`ftf train` in a process of its own; `events` follows what it writes."""

    def __init__(self, bench: Bench, config: RunConfig) -> None:
        self.bench = bench
        path = bench.root / "run.yaml"
        path.write_text(dump_config(config, {}))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "finetuneflow.cli", "train", str(path), "--workspace", str(bench.workspace.root), "--quiet"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    @property
    def run_dir(self) -> Path:
        return self.bench.newest()

    def events(self) -> Iterator[dict[str, Any]]:
        seen, deadline = 0, time.monotonic() + WAIT_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            if self.bench.workspace.run_names():
                for event in read_events(self.run_dir / "events.jsonl", after=seen):
                    seen = event["seq"]
                    yield event
            time.sleep(0.002)

    def signal_at(self, moment: Callable[[dict[str, Any]], bool], number: signal.Signals) -> None:
        for event in self.events():
            if moment(event):
                os.kill(self.process.pid, number)
                return
        raise AssertionError(f"the moment never came: {self.process.communicate()[1][-500:]!r}")

    def end(self) -> int:
        self.process.communicate(timeout=WAIT_SECONDS)
        return self.process.returncode


@pytest.fixture
def start(bench: Bench) -> Iterator[Callable[[RunConfig], Process]]:
    started: list[Process] = []

    def starting(config: RunConfig) -> Process:
        started.append(Process(bench, config))
        return started[-1]

    yield starting
    for process in started:
        if process.process.poll() is None:
            process.process.kill()
            process.process.communicate()


def test_a_run_killed_during_a_checkpoint_ends_like_an_uninterrupted_one(
    bench: Bench, start: Callable[[RunConfig], Process]
) -> None:
    config = bench.config(method__dropout=0.2)
    process = start(config)
    process.signal_at(at("phase", name="saving", step=8), signal.SIGKILL)
    assert process.end() == -signal.SIGKILL
    run_dir = process.run_dir
    assert run_status(run_dir) == "interrupted"
    checkpoints = run_dir / "checkpoints"
    # The files of step 8 are hashed and synced between the event and the marker, so the kill mostly falls there.
    partial = [path.name for path in checkpoints.iterdir() if path.name.startswith(".")]
    assert partial in ([], [".step-000008.partial"])
    assert all(find_damage(checkpoint.path) is None for checkpoint in list_complete(checkpoints))
    assert [checkpoint.step for checkpoint in list_complete(checkpoints)] == ([4] if partial else [4, 8])
    bench.resume(run_dir)
    assert bool(partial) == bool(bench.seen("warning", code="CHECKPOINT_UNFINISHED"))
    assert_same_result(bench.train(config).run_dir, run_dir)


def test_ftf_stop_saves_a_live_run_and_ends_it_as_stopped(bench: Bench, start: Callable[[RunConfig], Process]) -> None:
    from typer.testing import CliRunner

    from finetuneflow.cli import app
    from finetuneflow.errors import FineTuneFlowError

    process = start(
        bench.config(training__epochs=500, training__log_steps=1, training__save_steps=1000, training__eval_steps=1000)
    )
    next(event for event in process.events() if event["event"] == "log")
    assert run_status(process.run_dir) == "running"
    with pytest.raises(FineTuneFlowError) as caught:  # nobody else may work on it meanwhile
        bench.resume(process.run_dir)
    assert caught.value.code == "RUN_BUSY" and str(process.process.pid) in caught.value.message
    options = ["stop", process.run_dir.name, "--workspace", str(bench.workspace.root), "--json"]
    answer = CliRunner().invoke(app, options)
    assert json.loads(answer.stdout) == {"run": process.run_dir.name, "before": "running", "status": "stopped"}
    assert process.end() == 130 and len(list_complete(process.run_dir / "checkpoints")) == 1
    again = CliRunner().invoke(app, options)  # twice, and of a run that is not running: an answer, no error
    assert again.exit_code == 0 and json.loads(again.stdout)["before"] == "stopped"
    assert not (process.run_dir / "stop.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_process_saves_and_ends_it_orderly(
    bench: Bench, start: Callable[[RunConfig], Process], number: signal.Signals
) -> None:
    process = start(bench.config(training__epochs=500, training__log_steps=1, training__save_steps=1000))
    process.signal_at(at("log", step=5), number)
    assert process.end() == 130 and run_status(process.run_dir) == "stopped"
    newest = list_complete(process.run_dir / "checkpoints")[-1]
    (ending,) = [event for event in read_events(process.run_dir / "events.jsonl") if event["event"] == "stopped"]
    assert newest.step == ending["step"] >= 5 and find_damage(newest.path) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_five_kills_at_random_moments_change_nothing(bench: Bench, kind: str) -> None:
    config = bench.config(
        method__kind=kind, training__learning_rate=1e-4, training__epochs=5, training__log_steps=1, training__save_steps=3
    )
    result = verify_resume(config, bench.workspace, kills=5, seed=3)
    assert result.equal, (result.different_tensors, result.different_lines)
    assert len(result.kills) == 5 and result.log_lines > 20
