"""The formulas of PPO against loops in NumPy, written from the papers, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from finetuneflow.config import Reinforcement
from finetuneflow.training import ppo_math
from finetuneflow.training.ppo_math import AdaptiveKL, FixedKL, kl_controller

ROWS, WIDTH = 5, 7
LENGTHS = (7, 1, 4, 2, 6)


def numbers(seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def mask() -> torch.Tensor:
    return torch.tensor([[place < length for place in range(WIDTH)] for length in LENGTHS])


def poisoned(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same with padding that would spoil any sum it entered."""
    return torch.where(mask, values, torch.nan)


def tokens(values: Any) -> list[float]:
    """The values of real tokens, row by row."""
    values = values.detach() if isinstance(values, torch.Tensor) else values
    return [float(values[row][place]) for row, length in enumerate(LENGTHS) for place in range(length)]


# --- rewards and advantages -----------------------------------------------------------------------


def advantages_by_definition(rewards: Any, values: Any, gamma: float, lam: float) -> np.ndarray:
    """Schulman et al. 2016, equation 16 as it stands: a sum of discounted residuals, none behind the last token."""
    found = np.zeros((ROWS, WIDTH))
    for row, length in enumerate(LENGTHS):
        residuals = [
            float(rewards[row][t]) + (gamma * float(values[row][t + 1]) if t + 1 < length else 0.0) - float(values[row][t])
            for t in range(length)
        ]
        for t in range(length):
            found[row, t] = sum((gamma * lam) ** (k - t) * residuals[k] for k in range(t, length))
    return found


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_the_sum_of_discounted_residuals(mask: torch.Tensor, gamma: float, lam: float) -> None:
    rewards, values = numbers(1), numbers(2)
    advantages, returns = ppo_math.generalised_advantages(poisoned(rewards, mask), poisoned(values, mask), mask, gamma, lam)
    expected = advantages_by_definition(rewards, values, gamma, lam)
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(
        tokens(returns), [a + v for a, v in zip(tokens(expected), tokens(values), strict=True)], atol=1e-12
    )


def test_with_lambda_one_the_returns_are_the_rewards_still_to_come(mask: torch.Tensor) -> None:
    rewards, values = numbers(3), numbers(4)
    _, returns = ppo_math.generalised_advantages(rewards, values, mask, 0.9, 1.0)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            to_come = sum(0.9 ** (k - t) * float(rewards[row, k]) for k in range(t, length))
            assert float(returns[row, t]) == pytest.approx(to_come, abs=1e-12)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_divides_by_the_deviation_over_all_tokens(mask: torch.Tensor, shift_mean: bool) -> None:
    values = numbers(5, scale=3.0) + 2
    flat = np.array(tokens(values))
    expected = (flat - flat.mean()) / np.sqrt(flat.var() + 1e-8) + (0 if shift_mean else flat.mean())
    found = ppo_math.whiten(poisoned(values, mask), mask, shift_mean=shift_mean)
    np.testing.assert_allclose(tokens(found), expected, atol=1e-10)
    assert found[~mask].eq(0).all()


def test_the_score_is_paid_at_the_last_token_and_the_divergence_at_each(mask: torch.Tensor) -> None:
    scores, log_ratio = torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0], dtype=torch.float64), numbers(6)
    found = ppo_math.token_rewards(scores, poisoned(log_ratio, mask), 0.3, mask)
    for row, length in enumerate(LENGTHS):
        for t in range(WIDTH):
            expected = -0.3 * float(log_ratio[row, t]) + (float(scores[row]) if t == length - 1 else 0.0)
            assert float(found[row, t]) == pytest.approx(expected if t < length else 0.0, abs=1e-12)
    # What an answer is paid in all: its score less the weighted divergence (Ziegler et al. 2019, equation 2).
    divergence = torch.where(mask, log_ratio, 0.0).sum(dim=1)
    torch.testing.assert_close(found.sum(dim=1), scores - 0.3 * divergence)


def test_a_mean_over_nothing_is_zero() -> None:
    assert ppo_math.masked_mean(torch.full((2, 2), torch.nan), torch.zeros(2, 2, dtype=torch.bool)) == 0


def test_explained_variance_tells_a_perfect_a_constant_and_a_wrong_estimate_apart(mask: torch.Tensor) -> None:
    returns = numbers(7)
    assert ppo_math.explained_variance(returns, returns, mask) == pytest.approx(1.0)
    assert ppo_math.explained_variance(torch.full_like(returns, 4.0), returns, mask) == pytest.approx(0.0)
    assert ppo_math.explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    assert math.isnan(ppo_math.explained_variance(returns, torch.ones_like(returns), mask))


def test_correlation_is_numpys() -> None:
    first, second = numbers(8).flatten(), numbers(8).flatten() + numbers(9).flatten()
    assert ppo_math.correlation(first, second) == pytest.approx(np.corrcoef(first, second)[0, 1])
    assert math.isnan(ppo_math.correlation(first, torch.ones_like(first)))


# --- losses ---------------------------------------------------------------------------------------------


def policy_by_definition(
    new: Any, old: Any, advantages: Any, clip: float
) -> tuple[float, list[float], float, float, list[float]]:
    """Schulman et al. 2017, equation 7, token by token: loss, its gradient, share outside, divergence, ratios."""
    total, gradient, outside, divergence, ratios = 0.0, [], 0, 0.0, []
    for n, o, a in zip(tokens(new), tokens(old), tokens(advantages), strict=True):
        r = math.exp(n - o)
        clipped = min(max(r, 1 - clip), 1 + clip)
        total += min(r * a, clipped * a)
        active = r * a <= clipped * a  # the unclipped term is the smaller one: d/dn of r a is r a
        gradient.append(r * a if active else 0.0)
        outside += abs(r - 1) > clip
        divergence += (r - 1) - math.log(r)
        ratios.append(r)
    count = sum(LENGTHS)
    return -total / count, [-g / count for g in gradient], outside / count, divergence / count, ratios


def test_the_policy_loss_and_its_gradient_are_those_of_the_paper(mask: torch.Tensor) -> None:
    old, advantages = numbers(10), numbers(11)
    new = (old + numbers(12, scale=0.3)).requires_grad_()
    loss, gradient, outside, divergence, ratios = policy_by_definition(new, old, advantages, 0.2)
    terms = ppo_math.policy_loss(new, poisoned(old, mask), poisoned(advantages, mask), mask, clip_range=0.2, count=sum(LENGTHS))
    terms.loss.backward()
    assert new.grad is not None
    assert float(terms.loss.detach()) == pytest.approx(loss, abs=1e-12)
    np.testing.assert_allclose(tokens(new.grad), gradient, atol=1e-12)
    assert new.grad[~mask].eq(0).all()
    assert float(terms.clip_fraction) == pytest.approx(outside) and 0 < outside < 1
    assert float(terms.approx_kl) == pytest.approx(divergence, abs=1e-12)
    assert float(terms.ratio_mean) == pytest.approx(np.mean(ratios)) and float(terms.ratio_max) == pytest.approx(max(ratios))


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "moves"), [(0.5, 1, False), (0.5, -1, True), (-0.5, 1, True), (-0.5, -1, False)]
)
def test_a_ratio_outside_gets_no_gradient_in_the_harmful_direction(log_ratio: float, advantage: float, moves: bool) -> None:
    new = torch.tensor([[log_ratio]], requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.bool)
    ppo_math.policy_loss(new, torch.zeros(1, 1), torch.tensor([[float(advantage)]]), one, clip_range=0.2, count=1).loss.backward()
    assert new.grad is not None and (float(new.grad) != 0.0) == moves


def test_before_any_update_the_gradient_is_that_of_the_plain_policy_gradient(mask: torch.Tensor) -> None:
    new, advantages = numbers(13).requires_grad_(), numbers(14)
    terms = ppo_math.policy_loss(new, new.detach(), advantages, mask, clip_range=0.2, count=sum(LENGTHS))
    terms.loss.backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, torch.where(mask, -advantages / sum(LENGTHS), 0.0))
    assert float(terms.clip_fraction) == 0 and float(terms.approx_kl) == 0 and float(terms.ratio_max) == 1


def value_by_definition(new: Any, old: Any, returns: Any, clip: float) -> tuple[float, list[float]]:
    total, gradient = 0.0, []
    for v, o, r in zip(tokens(new), tokens(old), tokens(returns), strict=True):
        held = o + min(max(v - o, -clip), clip)
        plain, clipped = (v - r) ** 2, (held - r) ** 2
        total += max(plain, clipped)
        gradient.append(2 * (v - r) if plain >= clipped else 0.0)  # a clipped value does not depend on v
    count = sum(LENGTHS)
    return total / 2 / count, [g / 2 / count for g in gradient]


def test_the_value_loss_and_its_gradient_are_those_of_the_clipped_form(mask: torch.Tensor) -> None:
    old, returns = numbers(15), numbers(16)
    new = (old + numbers(17, scale=0.4)).requires_grad_()
    loss, gradient = value_by_definition(new, old, returns, 0.2)
    found = ppo_math.value_loss(new, poisoned(old, mask), poisoned(returns, mask), mask, clip_range=0.2, count=sum(LENGTHS))
    found.backward()
    assert new.grad is not None
    assert float(found.detach()) == pytest.approx(loss, abs=1e-12)
    np.testing.assert_allclose(tokens(new.grad), gradient, atol=1e-12)
    assert 0.0 in gradient, "some values have moved too far"


def test_micro_batches_add_up_to_their_minibatch(mask: torch.Tensor) -> None:
    new, old, advantages, count = numbers(18), numbers(19), numbers(20), sum(LENGTHS)
    whole = ppo_math.policy_loss(new, old, advantages, mask, clip_range=0.2, count=count)
    parts = [
        ppo_math.policy_loss(new[s], old[s], advantages[s], mask[s], clip_range=0.2, count=count) for s in (slice(2), slice(2, 5))
    ]
    for name in ("loss", "clip_fraction", "approx_kl", "ratio_mean"):
        assert float(sum(getattr(part, name) for part in parts)) == pytest.approx(float(getattr(whole, name)), abs=1e-12)


def test_entropy_is_that_of_the_distribution() -> None:
    logits = numbers(21, scale=2.0)
    for row, found in zip(logits.tolist(), ppo_math.entropy(logits.log_softmax(-1)).tolist(), strict=True):
        total = sum(map(math.exp, row))
        assert found == pytest.approx(-sum(math.exp(x) / total * math.log(math.exp(x) / total) for x in row), abs=1e-12)


# --- the coefficient ---------------------------------------------------------------------------------------


def test_the_adaptive_coefficient_follows_the_papers_formula() -> None:
    """Ziegler et al. 2019, section 2.2: e = clip((KL - target) / target, -0.2, 0.2), b <- b (1 + K e) with K = answers / horizon."""
    controller = AdaptiveKL(0.2, target=6.0, horizon=10_000)
    expected = 0.2
    for divergence in (0.0, 5.9, 6.0, 6.3, 6.6, 100.0, -3.0):
        controller.update(divergence, 64)
        error = (divergence - 6.0) / 6.0
        expected *= 1 + 64 / 10_000 * (-0.2 if error < -0.2 else 0.2 if error > 0.2 else error)
        assert controller.coefficient == pytest.approx(expected, rel=1e-12)


def test_the_coefficient_rises_above_the_target_and_falls_below_it() -> None:
    high, low = AdaptiveKL(0.1, 5.0, 100), AdaptiveKL(0.1, 5.0, 100)
    high.update(9.0, 10)
    low.update(2.0, 10)
    assert high.coefficient > 0.1 > low.coefficient


def test_a_controller_goes_on_from_its_state() -> None:
    first = AdaptiveKL(0.2, 6.0, 1000)
    first.update(9.0, 64)
    second = AdaptiveKL(0.2, 6.0, 1000)
    second.load_state(first.state())
    for controller in (first, second):
        controller.update(1.0, 64)
    assert first.coefficient == second.coefficient


def test_without_a_target_the_coefficient_stays() -> None:
    fixed = kl_controller(Reinforcement(kl_coefficient=0.3))
    fixed.update(1000.0, 64)
    assert type(fixed) is FixedKL and fixed.coefficient == 0.3
    assert isinstance(kl_controller(Reinforcement(kl_target=6.0)), AdaptiveKL)
