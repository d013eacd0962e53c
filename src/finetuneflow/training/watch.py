"""What to worry about while a preference or a reward is being learned: named warnings from the figures of recent log lines.

    concerns(objective, history)   ->  [(code, message, advice)]

Pure: numbers in, words out. `history` holds the `metrics` of log lines, oldest first (see `METRICS`); the monitor says each
warning once and never stops a run for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from finetuneflow.knowledge.run_warnings import WARNINGS

Concern = tuple[str, str, str]
History = Sequence[Mapping[str, float]]

HISTORY = 200  # log lines that are looked back on
REINFORCED = frozenset({"grpo", "rloo", "ppo"})
ENOUGH = 8  # log lines before a trend is called one

# The figures of an objective, by the names under which they stand in log lines, evaluations and the report.
METRICS: dict[str, str] = {
    "accuracy": "share of pairs whose chosen answer scores higher",
    "margin": "how much higher the chosen answer scores, on average",
    "reward_chosen": "score of the chosen answers",
    "reward_rejected": "score of the rejected answers",
    "logp_chosen": "log-probability of the chosen answers, in nats per answer",
    "logp_rejected": "log-probability of the rejected answers, in nats per answer",
    "entropy": "entropy of the policy's next token, in nats",
    "kl": "divergence from the reference model, in nats",
    "kl_coefficient": "weight of that divergence",
    "token_accuracy": "share of tokens of chosen answers that the model holds likeliest",
    "nll": "ordinary loss on the chosen answers, in nats per token",
    "reward": "reward of drawn answers",
    "reward_std": "spread of that reward",
    "reward_length_correlation": "correlation of reward and length within a batch",
    "response_length": "tokens of a drawn answer",
    "ended_share": "share of drawn answers that ended by themselves",
    "clip_fraction": "share of tokens whose probability ratio was clipped",
    "approx_kl": "divergence of the policy from the one that drew the answers",
    "ratio_mean": "probability of a drawn token now, over what it was when it was drawn",
    "ratio_max": "largest such ratio",
    "first_ratio_error": "how far that ratio was from 1 before the first update: 0 unless something is wrong",
    "policy_loss": "clipped policy objective",
    "value_loss": "squared error of the value head",
    "value_explained_variance": "share of the returns' variance that the value head explains",
    "same_reward_share": "share of prompts whose answers all got the same reward: nothing is learned from them",
}

CONCERNS = frozenset(
    {
        "BOTH_LOGPS_FALLING",
        "REWARD_MODEL_WEAK",
        "KL_RUNAWAY",
        "REWARD_HACKING_LENGTH",
        "ENTROPY_COLLAPSE",
        "VALUE_NOT_LEARNING",
        "REWARDS_ALL_EQUAL",
    }
)


def concerns(objective: str, history: History) -> list[Concern]:
    """All concerns that apply to the newest figures."""
    looks: tuple[Callable[[History], Concern | None], ...] = (
        (_kl_runaway, _length_hacking, _entropy_collapse, _value_not_learning, _nothing_to_compare)
        if objective in REINFORCED
        else (_both_falling, _weak_reward_model)
        if objective == "reward"
        else (_both_falling,)
    )
    return [found for look in looks if (found := look(history)) is not None]


def _concern(code: str, message: str) -> Concern:
    return code, message, WARNINGS[code].advice


# --- preferences ------------------------------------------------------------------------------------

FALL = 0.1  # of the first log-probability: less is noise


def _both_falling(history: History) -> Concern | None:
    """Likelihood displacement (Razin et al. 2024): the margin grows although both answers become less likely."""
    chosen, rejected = _ends(history, "logp_chosen"), _ends(history, "logp_rejected")
    if chosen is None or rejected is None:
        return None
    if chosen[1] - chosen[0] < -FALL * abs(chosen[0]) and rejected[1] - rejected[0] < -FALL * abs(rejected[0]):
        return _concern(
            "BOTH_LOGPS_FALLING",
            f"Chosen and rejected answers both become less likely (log-probability {chosen[0]:.1f} to {chosen[1]:.1f} and "
            f"{rejected[0]:.1f} to {rejected[1]:.1f}): probability flows to answers nobody preferred.",
        )
    return None


USEFUL_ACCURACY = 0.6


def _weak_reward_model(history: History) -> Concern | None:
    """Half the run's log lines are over and pairs are still told apart hardly better than by a coin."""
    recent = [line["accuracy"] for line in history[-ENOUGH:] if "accuracy" in line]
    if len(history) < 2 * ENOUGH or len(recent) < ENOUGH or _mean(recent) >= USEFUL_ACCURACY:
        return None
    return _concern(
        "REWARD_MODEL_WEAK",
        f"The reward model tells {100 * _mean(recent):.0f} % of recent training pairs apart; below {100 * USEFUL_ACCURACY:.0f} % it is no guide "
        "for reinforcement learning.",
    )


# --- rewards ----------------------------------------------------------------------------------------

RUNAWAY_KL = 20.0  # nats per answer: a rule of thumb; over-optimisation sets in at some tens (Gao et al. 2023, figure 1)


def _kl_runaway(history: History) -> Concern | None:
    values = _series(history, "kl")
    if len(values) < 3:
        return None
    recent, early = _mean(values[-3:]), _mean(values[: max(1, len(values) // 4)])
    if recent <= RUNAWAY_KL or recent < 2 * early:
        return None
    return _concern(
        "KL_RUNAWAY",
        f"The policy has moved {recent:.1f} nats per answer away from the reference: rewards beyond this point are often hacked.",
    )


def _length_hacking(history: History) -> Concern | None:
    """Reward rises together with length, and within a batch the longer answers are the better paid ones."""
    reward, length = _ends(history, "reward"), _ends(history, "response_length")
    correlation = _series(history, "reward_length_correlation")
    if reward is None or length is None or len(correlation) < ENOUGH:
        return None
    paid = _mean(correlation[-ENOUGH:])
    if reward[1] > reward[0] and length[1] > 1.3 * length[0] and paid > 0.5:
        return _concern(
            "REWARD_HACKING_LENGTH",
            f"Reward rises with length: answers grew from {length[0]:.0f} to {length[1]:.0f} tokens, and within a batch reward and length "
            f"correlate at {paid:.2f}.",
        )
    return None


def _entropy_collapse(history: History) -> Concern | None:
    ends = _ends(history, "entropy")
    if ends is None or ends[0] < 0.05 or ends[1] > 0.1 * ends[0]:
        return None
    return _concern(
        "ENTROPY_COLLAPSE",
        f"The policy hardly varies any more (entropy {ends[0]:.3f} to {ends[1]:.3f} nats): it has little left to compare.",
    )


def _value_not_learning(history: History) -> Concern | None:
    values = _series(history, "value_explained_variance")
    if len(values) < 3 * ENOUGH or _mean(values[-ENOUGH:]) > 0.0:
        return None
    return _concern(
        "VALUE_NOT_LEARNING",
        "The value head explains none of the variance of the returns: advantages are as noisy as without it.",
    )


def _nothing_to_compare(history: History) -> Concern | None:
    values = _series(history, "same_reward_share")
    if len(values) < ENOUGH or _mean(values[-ENOUGH:]) < 0.9:
        return None
    return _concern(
        "REWARDS_ALL_EQUAL",
        f"For {100 * _mean(values[-ENOUGH:]):.0f} % of recent prompts all answers got the same reward: nothing is learned from them.",
    )


# --- figures ----------------------------------------------------------------------------------------


def _series(history: History, name: str) -> list[float]:
    return [line[name] for line in history if name in line and math.isfinite(line[name])]


def _ends(history: History, name: str) -> tuple[float, float] | None:
    """Mean of the first and of the last quarter; None where there are too few values for a trend."""
    values = _series(history, name)
    if len(values) < ENOUGH:
        return None
    quarter = len(values) // 4
    return _mean(values[:quarter]), _mean(values[-quarter:])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
