"""grpo and rloo: rewards rise, runs resume exactly, prompts and their order are ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetuneflow.config import build_config
from finetuneflow.data.batches import RepeatedSampler
from finetuneflow.errors import FineTuneFlowError
from finetuneflow.events import metric_lines
from finetuneflow.training.start import with_folders
from finetuneflow.workspace import Workspace
from training.test_preference import figures
from training.workbench import Bench, at, sums, weights, write_rows

SETTINGS: dict[str, Any] = {
    "training__batch_size": 8,
    "training__gradient_accumulation": 1,
    "training__eval_batch_size": 4,
    "training__learning_rate": 0.02,
    "training__epochs": 2,
    "reinforcement__samples_per_prompt": 4,
    "reinforcement__max_new_tokens": 4,
    "reinforcement__kl_coefficient": 0.01,
}


@pytest.fixture
def asking(bench: Bench) -> Bench:
    write_rows(bench.data, sums(16))
    return bench


def rewarding(bench: Bench, text: str) -> dict[str, Any]:
    """A reward of one's own: the share of the answer's characters that `text` counts."""
    folder = bench.root / "rewards"
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(
        f"def share(completion, answer=None, prompt=None):\n    return sum(c in {text!r} for c in completion) / max(len(completion), 1)\n"
    )
    return {"reinforcement__reward": ["own.py:share"], "reinforcement__reward_folder": str(folder)}


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_the_reward_rises(asking: Bench, objective: str) -> None:
    # A random model has next to no preference among tokens: its head is what can learn one.
    settings = {**SETTINGS, **rewarding(asking, "aeiou"), "training__epochs": 12, "method__modules_to_save": ["lm_head"]}
    result = asking.train(training__objective=objective, **settings)
    curve = [line["reward"] for line in result.metrics["metrics_curve"]]
    assert sum(curve[-3:]) / 3 > sum(curve[:3]) / 3 + 0.1, curve
    evals = metric_lines(result.run_dir / "events.jsonl", "eval")
    assert evals[-1]["eval_reward"] == -evals[-1]["eval_loss"] and evals[-1]["eval_reward"] > evals[0]["eval_reward"]
    named = {"reward", "reward_std", "kl", "entropy", "response_length", "ended_share", "clip_fraction", "same_reward_share"}
    assert named <= result.metrics["metrics_curve"][-1].keys()
    assert result.metrics["train_tokens_per_second"] > 0


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_a_killed_run_resumes_to_the_same_weights_and_lines(asking: Bench, objective: str) -> None:
    settings = {**SETTINGS, **rewarding(asking, "aeiou"), "training__objective": objective, "training__gradient_accumulation": 2}
    straight = asking.train(**settings).run_dir
    resumed = asking.interrupted(at("log", step=6), **settings)
    asking.resume(resumed)
    assert figures(straight) == figures(resumed) and len(figures(straight)) > 3
    assert weights(straight) == weights(resumed) and weights(straight)


def test_full_fine_tuning_is_held_to_a_frozen_copy(asking: Bench) -> None:
    settings = {**SETTINGS, **rewarding(asking, "aeiou"), "method__kind": "full", "training__learning_rate": 1.9e-4}
    result = asking.train(training__objective="grpo", **{**settings, "training__epochs": 6})
    curve = [line["kl"] for line in result.metrics["metrics_curve"]]
    assert curve[0] == pytest.approx(0, abs=1e-5) and curve[-1] > 1e-4


def test_a_template_that_ends_turns_by_text_is_refused(asking: Bench) -> None:
    template = asking.root / "plain.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\nEND OF TURN\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    settings = {**SETTINGS, **rewarding(asking, "a"), "data__template": str(template), "data__template_consent": True}
    with pytest.raises(FineTuneFlowError) as caught:
        asking.train(training__objective="grpo", **settings)
    assert caught.value.code == "OBJECTIVE_UNSUPPORTED" and "END OF TURN" in caught.value.message


def test_the_sampler_repeats_groups_and_knows_its_epoch() -> None:
    sampler = RepeatedSampler(7, seed=3, copies=2, prompts=3, rounds=2)
    first = list(sampler)
    assert len(first) == len(sampler) == 2 * 3 * 2 * 2
    group = first[:6]
    assert group == first[6:12] and group[0] == group[1] and len(set(group)) == 3
    assert len(set(first)) == 6
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_a_reward_model_is_named_by_its_run_or_by_its_folder(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    folder = workspace.runs_dir / "judge-20260101-001"
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text("")
    for name in ("judge", folder.name, str(folder)):
        config, _ = build_config(
            {"training": {"objective": "ppo"}, "reinforcement": {"reward": f"model:{name}"}}, None, where="test"
        )
        assert with_folders(config, workspace).reinforcement.reward == [f"model:{folder}"]
