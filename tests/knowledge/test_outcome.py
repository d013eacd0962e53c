"""Predicted against measured, from the files of a run."""

from __future__ import annotations

import math

import pytest

from finetuneflow.knowledge.outcome import Outcome, compare

PLAN = {
    "memory": {"total_bytes": 10, "uncertain_bytes": 4, "breakdown": {"runtime": 1}},
    "correction": 2.0,
    "training_seconds": 50.0,
    "cost": {"flops": 1e12},
    "compute_dtype": "bfloat16",
}


def test_errors_are_relative_to_what_was_measured() -> None:
    found = compare(PLAN, {"peak_memory_bytes": 8, "train_runtime": 100.0})
    assert found.memory_error == pytest.approx(0.25) and found.time_error == pytest.approx(-0.5)


def test_the_ratio_is_that_of_the_uncertain_part_before_it_was_corrected() -> None:
    # 6 bytes are certain; 2 of 4 uncertain ones were used, and those 4 were 2 before the correction of 2.
    assert compare(PLAN, {"peak_memory_bytes": 8}).memory_ratio == pytest.approx(1.0)
    assert compare(PLAN, {"peak_memory_bytes": 3}).memory_ratio == 0.0


def test_on_a_gpu_the_runtime_is_added_to_what_its_counters_saw() -> None:
    assert compare({**PLAN, "kind": "cuda"}, {"peak_memory_bytes": 7}).measured_bytes == 8


@pytest.mark.parametrize("odd", [None, "8", True, math.inf, math.nan, -1, 0, 10**400, [], {}])
def test_values_that_are_no_measurement_count_as_missing(odd: object) -> None:
    assert compare({"memory": odd, "cost": odd, "training_seconds": odd}, {"peak_memory_bytes": odd}) == Outcome()
    assert compare({"memory": {"total_bytes": odd, "uncertain_bytes": odd}}, {"train_runtime": odd}) == Outcome()
