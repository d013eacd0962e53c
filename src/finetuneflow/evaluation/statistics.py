"""Is a difference real? Paired bootstrap, exact sign test, effect size, and a verdict by a stated rule.

Pure numbers in, values out; loads no torch. Differences are B minus A, turned so that positive means B is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["better", "no evidence", "worse"]

RESAMPLES = 10_000
LEVEL = 0.95
# Fewer items that differ cannot reach p < 0.05 in a two-sided sign test (2 / 2^5 = 0.0625), however clear they look.
MIN_DIFFERING = 6
RULE = (
    f"B is called better (worse) than A when the whole {LEVEL:.0%} bootstrap interval of the mean difference lies above (below) zero "
    f"and at least {MIN_DIFFERING} items differ; otherwise there is no evidence."
)
_CHUNK_NUMBERS = 4_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval of a mean."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    differences: Sequence[float], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean of paired differences (Efron and Tibshirani 1993, chapter 13).

    Items are drawn with replacement `resamples` times; the same seed gives the same interval.
    """
    import numpy as np

    values = np.asarray(differences, dtype=np.float64)
    if values.size == 0:
        raise ValueError("a bootstrap needs at least one difference")
    random = np.random.default_rng(seed)
    means = np.empty(resamples)
    rows = max(1, _CHUNK_NUMBERS // values.size)
    for start in range(0, resamples, rows):
        drawn = random.integers(0, values.size, size=(min(rows, resamples - start), values.size))
        means[start : start + rows] = values[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def wilson(passed: int, total: int, *, z: float = 1.959964) -> Interval:
    """Score interval of a share (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953), 95 % by default.

    Unlike the bootstrap it has a width where all or none passed.
    """
    share = passed / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return Interval(share, max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of `wins` against `losses` under a fair coin; ties are left out beforehand."""
    total = wins + losses
    if total == 0:
        return 1.0
    tail = term = 1
    for k in range(min(wins, losses)):
        term = term * (total - k) // (k + 1)  # "total choose k + 1", a whole number
        tail += term
    # Divided as whole numbers: 2^total is no float any more from 1,024 pairs on.
    return min(1.0, 2 * tail / (1 << total))


def effect_size(differences: Sequence[float]) -> float | None:
    """Cohen's d for pairs: mean difference over its standard deviation; None where all differences are the same."""
    count = len(differences)
    if count < 2:
        return None
    mean = math.fsum(differences) / count
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in differences) / (count - 1))
    return mean / spread if spread > 1e-12 * max(1.0, abs(mean)) else None


def verdict(interval: Interval, differing: int) -> Verdict:
    """What `RULE` says."""
    if differing < MIN_DIFFERING:
        return "no evidence"
    if interval.low > 0:
        return "better"
    return "worse" if interval.high < 0 else "no evidence"
