"""Predicted against measured: what a finished run says about the prediction it was started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LARGEST = 1e30  # bytes, seconds or operations: more is no measurement


@dataclass(frozen=True, slots=True)
class Outcome:
    """Predictions from `plan.json` beside measurements from `metrics.json`; None where either is missing.

    `memory_ratio`: by what factor the uncertain parts of the memory estimate were off, before any correction; it is
    what `memory.correction_from` takes. `flops`: of the training steps, by the prediction.
    """

    predicted_bytes: int | None = None
    measured_bytes: int | None = None
    memory_ratio: float | None = None
    predicted_seconds: float | None = None
    measured_seconds: float | None = None
    flops: float | None = None
    compute_dtype: str | None = None

    @property
    def memory_error(self) -> float | None:
        """Relative error of the memory prediction: +0.1 is a tenth too much."""
        return _error(self.predicted_bytes, self.measured_bytes)

    @property
    def time_error(self) -> float | None:
        return _error(self.predicted_seconds, self.measured_seconds)


def compare(plan: Mapping[str, Any], metrics: Mapping[str, Any]) -> Outcome:
    """Both files of a run side by side. Values of the wrong type count as missing."""
    memory = plan.get("memory") if isinstance(plan.get("memory"), Mapping) else {}
    cost = plan.get("cost") if isinstance(plan.get("cost"), Mapping) else {}
    assert memory is not None and cost is not None
    predicted, measured = _positive(memory.get("total_bytes")), _positive(metrics.get("peak_memory_bytes"))
    breakdown = memory.get("breakdown")
    if measured and plan.get("kind") in ("cuda", "rocm") and isinstance(breakdown, Mapping):
        # CUDA's counters see tensors only; the prediction is of the whole card.
        measured += _positive(breakdown.get("runtime")) or 0
    return Outcome(
        predicted_bytes=round(predicted) if predicted else None,
        measured_bytes=round(measured) if measured else None,
        memory_ratio=_ratio(predicted, measured, _positive(memory.get("uncertain_bytes")), _positive(plan.get("correction"))),
        predicted_seconds=_positive(plan.get("training_seconds")),
        measured_seconds=_positive(metrics.get("train_runtime")),
        flops=_positive(cost.get("flops")),
        compute_dtype=str(plan["compute_dtype"]) if plan.get("compute_dtype") else None,
    )


def _ratio(predicted: float | None, measured: float | None, uncertain: float | None, correction: float | None) -> float | None:
    if not predicted or not measured or not uncertain:
        return None
    return max(measured - (predicted - uncertain), 0.0) / (uncertain / (correction or 1.0))


def _error(predicted: float | None, measured: float | None) -> float | None:
    return predicted / measured - 1 if predicted and measured else None


def _positive(value: object) -> float | None:
    """The value as a finite number above zero, else None: files of old runs may hold anything."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < LARGEST:
        return None
    return float(value)
