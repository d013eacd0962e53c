"""The formulas of proximal policy optimisation, as functions of tensors. `ppo.py` calls them.

Shapes: `scores` (answers,); everything per token (answers, length), where position t of a row belongs to the answer's t-th
token and `mask` is True on the tokens an answer has (they stand at the front, the rest is padding whose values do not count).

Sources: Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (objective); Schulman et al. 2016, "High-Dimensional
Continuous Control Using Generalized Advantage Estimation" (advantages); Ziegler et al. 2019, "Fine-Tuning Language Models from
Human Preferences" (rewards with divergence, adaptive coefficient).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from finetuneflow.config import Reinforcement

# --- rewards and advantages -----------------------------------------------------------------------


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the values where `mask` is True; 0 where there are none. Any shape in, a scalar out."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(values: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool = True) -> torch.Tensor:
    """Values divided by their standard deviation over all tokens: (x - m) / sqrt(v + 1e-8), v the mean squared deviation.

    Without `shift_mean` the mean m is added again, so that only the scale changes. Padding becomes 0.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def token_rewards(scores: torch.Tensor, log_ratio: torch.Tensor, coefficient: float, mask: torch.Tensor) -> torch.Tensor:
    """Reward of each token: -coefficient * log(policy / reference), and the answer's score on its last token.

    `log_ratio` (answers, length): log-probability of the drawn token under the policy that drew it, less that under the
    reference. Its sum over an answer is an unbiased estimate of the divergence (Ziegler et al. 2019, equation 2).
    """
    rewards = torch.where(mask, -coefficient * log_ratio, 0.0)
    last = mask.sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.to(rewards.dtype).unsqueeze(1))


def generalised_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages A and returns A + V, both (answers, length), 0 on padding.

    A_t = d_t + gamma * lam * A_{t+1} with d_t = r_t + gamma * V_{t+1} - V_t, and V = A = 0 behind the last token
    (Schulman et al. 2016, equations 11 and 16).
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    following_value = following_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        surprise = rewards[:, t] + gamma * following_value - values[:, t]
        following_advantage = surprise + gamma * lam * following_advantage
        advantages[:, t] = following_advantage
        following_value = values[:, t]
    return advantages, advantages + values


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over all tokens; NaN where the returns do not vary."""

    def variance(x: torch.Tensor) -> float:
        return float(masked_mean((x - masked_mean(x, mask)) ** 2, mask))

    spread = variance(returns)
    return 1 - variance(returns - values) / spread if spread > 1e-12 else float("nan")


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Pearson's correlation of two vectors; NaN where one of them does not vary."""
    a, b = first.double() - first.double().mean(), second.double() - second.double().mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 1e-12 else float("nan")


# --- losses -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PolicyTerms:
    """What one micro-batch adds to its minibatch: all but `ratio_max` are shares that add up over the micro-batches."""

    loss: torch.Tensor
    clip_fraction: torch.Tensor
    approx_kl: torch.Tensor
    ratio_mean: torch.Tensor
    ratio_max: torch.Tensor


def policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_range: float,
    count: int | torch.Tensor,
) -> PolicyTerms:
    """The clipped objective as a loss: -sum min(r A, clip(r, 1 - c, 1 + c) A) / count, r = exp(log_probs - old_log_probs)
    (Schulman et al. 2017, equation 7).

    `count`: tokens of the whole minibatch. `clip_fraction` counts the tokens whose ratio lies outside; `approx_kl` is the
    estimate r - 1 - log r of the divergence from the policy that drew the answers, never negative (Schulman 2020, k3).
    """
    log_ratio = torch.where(mask, log_probs - old_log_probs, 0.0)
    ratio = torch.exp(log_ratio)
    advantages = torch.where(mask, advantages, 0.0)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)
    with torch.no_grad():
        outside = ((ratio - 1).abs() > clip_range) & mask
        divergence = ratio - 1 - log_ratio  # 0 on padding, where the ratio is 1
        ratio_sum = torch.where(mask, ratio, 0.0).sum()
    return PolicyTerms(
        loss=-gain.sum() / count,
        clip_fraction=outside.sum() / count,
        approx_kl=divergence.sum() / count,
        ratio_mean=ratio_sum / count,
        ratio_max=ratio.detach().max(),
    )


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_range: float,
    count: int | torch.Tensor,
) -> torch.Tensor:
    """Half the squared error of the values, the larger of the plain one and of one whose value moved at most `clip_range`:
    sum max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / (2 count).

    The form of Schulman's own implementation (OpenAI baselines, ppo2): a value that has moved beyond the range towards the
    return gets no further gradient.
    """
    moved = old_values + (values - old_values).clamp(-clip_range, clip_range)
    error = torch.maximum((values - returns) ** 2, (moved - returns) ** 2)
    return 0.5 * torch.where(mask, error, 0.0).sum() / count


def entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of a distribution over the last dimension: -sum p log p."""
    return -(log_probs.exp() * log_probs).sum(dim=-1)


# --- the coefficient of the divergence ----------------------------------------------------------------


class KLController(Protocol):
    """Holds the weight of the divergence from the reference."""

    coefficient: float

    def update(self, divergence: float, answers: int) -> None:
        """Adapt to the mean divergence per answer (nats) that `answers` answers showed."""

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


@dataclass
class FixedKL:
    """The coefficient stays as it is set."""

    coefficient: float

    def update(self, divergence: float, answers: int) -> None:
        """Nothing."""

    def state(self) -> dict[str, Any]:
        return {"coefficient": self.coefficient}

    def load_state(self, state: dict[str, Any]) -> None:
        self.coefficient = float(state["coefficient"])


@dataclass
class AdaptiveKL(FixedKL):
    """Steers the divergence to `target` nats per answer (Ziegler et al. 2019, section 2.2):

    e = clip(divergence / target - 1, -0.2, 0.2),   coefficient <- coefficient * (1 + e * answers / horizon)
    """

    target: float
    horizon: int

    ERROR_LIMIT = 0.2

    def update(self, divergence: float, answers: int) -> None:
        error = min(max(divergence / self.target - 1, -self.ERROR_LIMIT), self.ERROR_LIMIT)
        self.coefficient *= 1 + error * answers / self.horizon


def kl_controller(settings: Reinforcement) -> KLController:
    """The controller that the run file asks for: adaptive where a target is set."""
    if settings.kl_target is None:
        return FixedKL(settings.kl_coefficient)
    return AdaptiveKL(settings.kl_coefficient, settings.kl_target, settings.kl_horizon)
