"""Every objective with every method trains on a tiny model, or is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetuneflow.errors import ConfigError
from finetuneflow.knowledge.objectives import TRAITS
from models.tiny import save_tiny
from training.workbench import Bench, sums, write_rows

REFUSED = {("ppo", "prefix")}
METHODS = ("lora", "qlora", "dora", "ia3", "prefix", "full")
OBJECTIVES = tuple(name for name in TRAITS if name not in ("sft", "pretrain"))
DRAWN: dict[str, Any] = {
    "reinforcement__reward": ["length:12"],
    "reinforcement__max_new_tokens": 12,
    "reinforcement__samples_per_prompt": 2,
    "reinforcement__rollout_size": 4,
    "reinforcement__update_epochs": 1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "base", "llama", hidden=64)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_matrix_of_objectives_and_methods(tmp_path: Path, base: Path, objective: str, method: str) -> None:
    rows = sums(12)
    if not TRAITS[objective].draws:
        rows = [
            {"prompt": r["instruction"], "chosen": r["output"], "rejected": f"I do not know {n}."} for n, r in enumerate(rows)
        ]
    bench = Bench(tmp_path, base, write_rows(tmp_path / "rows.jsonl", rows))
    settings = {"training__objective": objective, "method__kind": method, "training__max_steps": 2, "training__log_steps": 1}
    settings |= DRAWN if TRAITS[objective].draws else {}
    if (objective, method) in REFUSED:
        with pytest.raises(ConfigError) as raised:
            bench.train(**settings)
        assert raised.value.code == "CONFIG_CONFLICT"
        return
    result = bench.train(**settings)
    assert (result.status, result.metrics["steps"]) == ("succeeded", 2)
    assert not bench.seen("warning", code="PLAN_FAILED") and (result.run_dir / "plan.json").is_file()
