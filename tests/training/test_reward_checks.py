"""Every reward is looked at before anything is loaded or trained, in a single run as in a pipeline."""

from __future__ import annotations

from typing import Any

import pytest

from finetuneflow.errors import FineTuneFlowError
from finetuneflow.pipeline_config import build_pipeline
from finetuneflow.training import pipeline as pipelines
from finetuneflow.training.pipeline import checked
from training.test_preference import pairs
from training.workbench import Bench, write_rows

DRAWS: dict[str, Any] = {
    "training__objective": "rloo",
    "training__batch_size": 4,
    "reinforcement__samples_per_prompt": 4,
    "reinforcement__max_new_tokens": 4,
}


def tuned(bench: Bench) -> str:
    """The name of a run that is no reward model."""
    return bench.train(name="tuned", training__max_steps=1).run_dir.name


def nothing(bench: Bench) -> str:
    (bench.root / "empty").mkdir()
    return str(bench.root / "empty")


def plain_base(bench: Bench) -> str:
    return str(bench.base)


def damaged(bench: Bench) -> str:
    data = write_rows(bench.root / "pairs.jsonl", pairs(12))
    run_dir = bench.train(name="judge", data__train=[str(data)], training__objective="reward", training__max_steps=1).run_dir
    (run_dir / "adapter" / "adapter_model.safetensors").unlink()
    return run_dir.name


@pytest.mark.parametrize(
    ("named", "code"),
    [
        (tuned, "REWARD_INVALID"),
        (nothing, "MODEL_NOT_FOUND"),
        (plain_base, "REWARD_INVALID"),
        (damaged, "ADAPTER_NOT_FOUND"),
        (lambda bench: "gone", "RUN_NOT_FOUND"),
    ],
)
def test_what_is_no_reward_model_ends_a_run_and_a_pipeline_before_they_begin(bench: Bench, named: Any, code: str) -> None:
    reward = f"model:{named(bench)}"
    with pytest.raises(FineTuneFlowError) as caught:
        bench.train(**DRAWS, reinforcement__reward=[reward])
    assert caught.value.code == code and caught.value.remedy
    assert not bench.seen("phase", name="tokenizing") and not bench.seen("phase", name="loading")
    before = bench.workspace.run_names()
    with pytest.raises(FineTuneFlowError) as caught:
        pipelines.train_pipeline(rewarded(bench, reward), workspace=bench.workspace)
    assert caught.value.code == code and "stage rl" in str(caught.value.where)
    assert bench.workspace.run_names() == before and not bench.workspace.pipelines_dir.exists()


@pytest.mark.parametrize("reward", ["own.py:nothing", "lenght:4"])
def test_a_function_that_is_not_there_ends_a_run_before_anything_is_loaded(bench: Bench, reward: str) -> None:
    (bench.root / "own.py").write_text("def share(completion): return 1.0\n")
    with pytest.raises(FineTuneFlowError) as caught:
        bench.train(**DRAWS, reinforcement__reward=[reward], reinforcement__reward_folder=str(bench.root))
    assert caught.value.code == "REWARD_INVALID" and not bench.seen("phase", name="tokenizing")


def test_a_reward_model_is_found_by_the_name_of_its_run(bench: Bench) -> None:
    data = write_rows(bench.root / "pairs.jsonl", pairs(12))
    judge = bench.train(name="judge", data__train=[str(data)], training__objective="reward", training__max_steps=1).run_dir
    found = checked(rewarded(bench, "model:judge"), bench.workspace)
    assert found.stage("rl").config.reinforcement.reward == [f"model:{judge}"]


def test_an_adapter_that_is_not_there_is_found_before_a_stage_is_trained(bench: Bench) -> None:
    pipeline = rewarded(bench, "ends", model={"base": str(bench.base), "adapter": str(bench.root)}, start="fresh")
    with pytest.raises(FineTuneFlowError) as caught:
        pipelines.train_pipeline(pipeline, workspace=bench.workspace)
    assert caught.value.code == "ADAPTER_NOT_FOUND" and "stage rl" in str(caught.value.where)
    assert not bench.workspace.pipelines_dir.exists()


def rewarded(bench: Bench, reward: str, **stage: Any) -> Any:
    """A pipeline whose second stage draws answers that `reward` pays."""
    draws = bench.config(**DRAWS).model_dump(
        mode="json", include={"training": {"objective", "batch_size"}, "reinforcement": True}
    )
    draws["reinforcement"]["reward"] = [reward]
    stages = [{"name": "sft"}, {"name": "rl", **draws, **stage}]
    shared = {"model": {"base": str(bench.base)}, "data": {"train": [str(bench.data)], "max_length": 96}}
    return build_pipeline({"name": "p", **shared, "stages": stages})
