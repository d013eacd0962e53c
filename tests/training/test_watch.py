"""Named warnings: each comes where its trend is, and only there."""

from __future__ import annotations

import pytest

from finetuneflow.training.watch import CONCERNS, METRICS, concerns


def history(lines: int = 24, **trends: tuple[float, float]) -> list[dict[str, float]]:
    """Log lines in which each figure moves evenly from its first to its second value."""
    return [{name: a + (b - a) * i / (lines - 1) for name, (a, b) in trends.items()} for i in range(lines)]


def codes(objective: str, lines: list[dict[str, float]]) -> set[str]:
    return {code for code, _, _ in concerns(objective, lines)}


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_both_answers_becoming_less_likely(objective: str) -> None:
    assert codes(objective, history(logp_chosen=(-40, -80), logp_rejected=(-50, -200))) == {"BOTH_LOGPS_FALLING"}
    assert codes(objective, history(logp_chosen=(-40, -39), logp_rejected=(-50, -200))) == set()
    assert codes(objective, history(lines=5, logp_chosen=(-40, -80), logp_rejected=(-50, -200))) == set()


def test_a_reward_model_hardly_better_than_a_coin() -> None:
    assert codes("reward", history(accuracy=(0.5, 0.55))) == {"REWARD_MODEL_WEAK"}
    assert codes("reward", history(accuracy=(0.5, 0.9))) == set()
    assert codes("reward", history(lines=10, accuracy=(0.5, 0.5))) == set()


@pytest.mark.parametrize("objective", ["grpo", "rloo", "ppo"])
def test_concerns_of_rewarded_answers(objective: str) -> None:
    assert codes(objective, history(kl=(0, 60))) == {"KL_RUNAWAY"}
    assert codes(objective, history(kl=(0, 5))) == set()
    hacked = history(reward=(0, 2), response_length=(20, 60), reward_length_correlation=(0.7, 0.8))
    assert codes(objective, hacked) == {"REWARD_HACKING_LENGTH"}
    fair = history(reward=(0, 2), response_length=(20, 60), reward_length_correlation=(0.1, 0.0))
    assert codes(objective, fair) == set()
    collapsed = history(entropy=(2.0, 1.5)) + history(entropy=(0.1, 0.05))
    assert codes(objective, collapsed) == {"ENTROPY_COLLAPSE"}
    assert codes(objective, history(value_explained_variance=(-0.4, -0.1))) == {"VALUE_NOT_LEARNING"}
    assert codes(objective, history(value_explained_variance=(-0.4, 0.6))) == set()
    assert codes(objective, history(same_reward_share=(0.95, 1.0))) == {"REWARDS_ALL_EQUAL"}


def test_nothing_is_said_of_nothing() -> None:
    for objective in ("sft", "dpo", "kto", "reward", "ppo"):
        assert concerns(objective, []) == [] and concerns(objective, [{}] * 50) == []
        assert concerns(objective, [{"kl": float("nan"), "entropy": float("inf")}] * 50) == []


def test_every_concern_advises_and_every_figure_is_explained() -> None:
    early = history(kl=(0, 1), entropy=(2, 1.8), value_explained_variance=(-1, -1), same_reward_share=(1, 1))
    found = concerns(
        "ppo", early + history(kl=(50, 60), entropy=(0.1, 0.01), value_explained_variance=(-1, -1), same_reward_share=(1, 1))
    )
    assert len(found) == 4 and {code for code, _, _ in found} <= CONCERNS
    assert all(code.isupper() and message.endswith(".") and advice.endswith(".") for code, message, advice in found)
    assert all(text and not text.endswith(".") for text in METRICS.values())
