"""Statistics against plain references, known values and simulation."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetuneflow.evaluation.statistics import Interval, effect_size, paired_bootstrap, sign_test, verdict, wilson


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [
        (0, 0, 1.0),
        (10, 0, 0.001953125),
        (8, 2, 0.109375),
        (5, 5, 1.0),
        (15, 5, 0.04138947),  # R: binom.test(15, 20)
        (9, 1, 0.021484375),
        (61, 39, 0.03520020),  # R: binom.test(61, 100)
        (5, 0, 0.0625),
        (6, 0, 0.03125),
    ],
)
def test_the_sign_test_gives_the_known_exact_values(wins: int, losses: int, p: float) -> None:
    assert sign_test(wins, losses) == pytest.approx(p, rel=1e-6)
    assert sign_test(losses, wins) == sign_test(wins, losses)


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_sign_test_equals_the_sum_of_all_outcomes_no_likelier_than_the_one_seen(wins: int, losses: int) -> None:
    total = wins + losses
    row = [Fraction(1)]
    for _ in range(total):  # Pascal's triangle, halved at each step
        row = [(a + b) / 2 for a, b in zip([Fraction(0), *row], [*row, Fraction(0)], strict=True)]
    expected = sum(p for p in row if p <= row[wins])
    assert sign_test(wins, losses) == pytest.approx(float(expected), rel=1e-12)


def test_the_sign_test_works_for_thousands_of_pairs() -> None:
    assert sign_test(2500, 2500) == 1.0
    assert sign_test(2600, 2400) == pytest.approx(math.erfc(199 / math.sqrt(2 * 5000)), rel=0.01)


def test_the_bootstrap_equals_a_plain_loop() -> None:
    differences = list(np.random.default_rng(5).normal(0.2, 1.0, size=23))
    random = np.random.default_rng(11)
    means = sorted(sum(differences[i] for i in random.integers(0, 23, size=23)) / 23 for _ in range(2_000))

    def quantile(q: float) -> float:
        place = q * (len(means) - 1)
        below = int(place)
        return means[below] + (place - below) * (means[below + 1] - means[below])

    interval = paired_bootstrap(differences, resamples=2_000, seed=11)
    assert interval.low == pytest.approx(quantile(0.025), abs=1e-12)
    assert interval.high == pytest.approx(quantile(0.975), abs=1e-12)
    assert interval.mean == pytest.approx(sum(differences) / 23)


def test_the_bootstrap_is_the_same_for_the_same_seed_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [float(i % 7) for i in range(50)]
    whole = paired_bootstrap(values, seed=3)
    assert paired_bootstrap(values, seed=3) == whole != paired_bootstrap(values, seed=4)
    monkeypatch.setattr("finetuneflow.evaluation.statistics._CHUNK_NUMBERS", 999)
    assert paired_bootstrap(values, seed=3) == whole


def test_a_95_percent_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    random = np.random.default_rng(2024)
    covered = 0
    for trial in range(400):
        interval = paired_bootstrap(list(random.normal(0.3, 1.0, size=60)), resamples=800, seed=trial)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.92 <= covered / 400 <= 0.98


def test_two_equal_models_are_seldom_told_apart() -> None:
    random = np.random.default_rng(7)
    told_apart = 0
    for trial in range(300):
        a, b = random.random((2, 90)) < 0.6  # pass or fail of 90 prompts, the same chance for both
        differences = [float(y) - float(x) for x, y in zip(a, b, strict=True)]
        interval = paired_bootstrap(differences, resamples=600, seed=trial)
        told_apart += verdict(interval, sum(d != 0 for d in differences)) != "no evidence"
    assert told_apart / 300 <= 0.09


def test_a_real_difference_is_found_with_its_sign() -> None:
    better = paired_bootstrap([1.0] * 30 + [0.0] * 50 + [-1.0] * 2)
    assert verdict(better, 32) == "better"
    assert verdict(paired_bootstrap([-d for d in [1.0] * 30 + [0.0] * 50]), 30) == "worse"


def test_few_differing_items_are_no_evidence_however_one_sided() -> None:
    assert verdict(paired_bootstrap([1.0] * 5), 5) == "no evidence"
    assert verdict(paired_bootstrap([1.0] * 6), 6) == "better"
    assert verdict(Interval(0.5, 0.0, 1.0), 50) == "no evidence"


def test_effect_size_is_the_mean_over_the_standard_deviation() -> None:
    assert effect_size([1.0, 2.0, 3.0]) == pytest.approx(2.0)
    assert effect_size([1.0, 1.0, 1.0]) is None
    assert effect_size([0.1] * 7) is None
    assert effect_size([1.0]) is None


def test_the_pure_parts_load_neither_torch_nor_numpy() -> None:
    modules = ("scores", "judges", "suite", "statistics", "compare", "questions", "measure", "samples")
    program = (
        f"import sys, importlib; [importlib.import_module('finetuneflow.evaluation.' + m) for m in {modules!r}]; "
        "print([m for m in ('torch', 'transformers', 'numpy', 'sacrebleu', 'nltk') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("passed", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_gives_the_published_values(passed: int, total: int, low: float, high: float) -> None:
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3."""
    found = wilson(passed, total)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert found.mean == passed / total and wilson(total, total).high == 1.0
