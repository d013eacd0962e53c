"""Every objective on the bundled model and real data: each takes the files it is made for, learns something and leaves a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetuneflow.config import build_config
from finetuneflow.training import run as runs
from finetuneflow.workspace import Workspace

PAIRS = "llamafactory/dpo_en_demo.json"
TRANSCRIPTS = "hh_rlhf/harmless-base-test.rows0-499.jsonl.gz"
TREES = "oasst/en_100_tree.rows0-59.jsonl"
QUESTIONS = "metropole/metropole.jsonl"
SUMS = "gsm8k/train.jsonl"

CASES = [
    ("dpo", PAIRS, {}),
    ("dpo", TRANSCRIPTS, {"preference.loss": "ipo"}),
    ("dpo", TREES, {}),
    ("kto", TRANSCRIPTS, {}),
    ("orpo", PAIRS, {}),
    ("cpo", TRANSCRIPTS, {}),
    ("simpo", TRANSCRIPTS, {"preference.beta": 2.0}),
    ("reward", TREES, {}),
    ("reward", TRANSCRIPTS, {}),
    ("grpo", QUESTIONS, {"reinforcement.reward": ["similarity"]}),
    ("rloo", SUMS, {"reinforcement.reward": ["number", "ends"]}),
    ("ppo", QUESTIONS, {"reinforcement.reward": ["length:12"], "reinforcement.rollout_size": 8}),
]


@pytest.mark.shared_data
@pytest.mark.parametrize(("objective", "file", "settings"), CASES, ids=[f"{o}-{Path(f).parent}" for o, f, _ in CASES])
def test_an_objective_trains_on_real_data(
    shared_data: Path, tmp_path: Path, objective: str, file: str, settings: dict[str, Any]
) -> None:
    values: dict[str, Any] = {
        "model": {"base": "starter"},
        "data": {"train": [str(shared_data / file)], "limit": 24, "max_length": 160, "eval_fraction": 0.2},
        "method": {"dropout": 0.0},
        "training": {
            "objective": objective,
            "max_steps": 3,
            "batch_size": 4,
            "gradient_accumulation": 1,
            "eval_batch_size": 4,
            "learning_rate": 1e-3,
            "log_steps": 1,
            "threads": 1,
            "precision": "fp32",
        },
        "reinforcement": {"samples_per_prompt": 4, "max_new_tokens": 12},
        "evaluation": {"samples": 0},
    }
    for key, value in settings.items():
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = value
    events: list[dict[str, Any]] = []
    result = runs.train(build_config(values)[0], workspace=Workspace(tmp_path), sinks=[events.append])
    assert result.status == "succeeded" and result.metrics["steps"] == 3
    assert len(result.metrics["metrics_curve"]) == 3
    assert (result.run_dir / "adapter" / "adapter_model.safetensors").is_file()
    assert result.metrics["eval_metrics"], "held-out rows are evaluated"
    assert not [e for e in events if e["event"] == "warning" and e["code"] in ("PLAN_FAILED", "REPORT_FAILED")]
