"""The demo shows what it says: the base fails, the tuned model passes, by the real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tuning_the_bundled_model_turns_at_most_20_percent_into_at_least_90(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "finetuneflow.cli", "demo", "--json", "--workspace", str(tmp_path)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(summary) == {"base_pass", "tuned_pass", "prompts", "train_seconds", "run"}
    assert summary["prompts"] >= 60
    assert summary["base_pass"] <= 0.20
    assert summary["tuned_pass"] >= 0.90
    run = tmp_path / "runs" / summary["run"]
    assert (run / "report.md").is_file() and (run / "exports" / "adapter" / "finetuneflow_export.zip").is_file()


def test_the_demo_asks_about_nothing_it_was_tuned_on(tmp_path: Path) -> None:
    from finetuneflow.demo import demo_config
    from finetuneflow.evaluation.suite import load_suite
    from finetuneflow.workspace import Workspace

    config, _ = demo_config(Workspace(tmp_path), seed=0)
    asked = {turn.content for prompt in load_suite("starter").prompts for turn in prompt.messages[-1:]}
    lines = [json.loads(line) for path in (*config.data.train, *config.data.eval) for line in Path(path).read_text().splitlines()]
    told = {turn["content"] for line in lines for turn in line["messages"]}
    # Standing phrases of the memory prompts ("What is my name?") are the form that tuning teaches; facts may not be shared.
    assert len(lines) > 3_000
    assert not {
        text
        for text in asked & told
        if any(word in text for word in ("capital", "opposite", "contraire", "+", "colour", "couleur"))
    }
