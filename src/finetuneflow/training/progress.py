"""What a run knows about itself between steps: losses of the open log window, best evaluation, speed.

Everything here that shapes later output (the window, the best step, the evaluations without
improvement) is saved in each checkpoint, so a resumed run writes the same lines.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SPEED_WINDOW = 50  # optimizer steps the speed and the remaining time are taken over


class Progress:
    """Plain values; no torch import, tensors are only added up and read at the end of a window."""

    def __init__(
        self, *, on_saving: Callable[[int], None] = lambda step: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._on_saving = on_saving
        self._step_loss: Any = None
        self._window: list[Any] = []
        self._metrics: dict[str, list[float]] = {}  # of the open log window, by name
        self.best_step: int | None = None
        self.best_loss: float | None = None
        self.evaluations_without_improvement = 0
        self.tokens_seen = 0
        self.examples_seen = 0
        self._seconds_before = 0.0  # training time of earlier attempts, up to the checkpoint that was resumed
        self._began = clock()
        self.grad_norm = 0.0
        self.learning_rate = 0.0
        self._waited = 0.0  # seconds that steps waited for their rows, in this process
        # (time, tokens seen, seconds waited) at the end of recent steps; of this process only, so a pause never counts
        self._marks: deque[tuple[float, int, float]] = deque(maxlen=SPEED_WINDOW + 1)

    # --- fed by the trainer ---------------------------------------------------------------------

    def begin(self) -> None:
        """Start the clock: call once, right before the first step."""
        self._began = self._clock()
        self._marks.append((self._began, self.tokens_seen, self._waited))

    def waited(self, seconds: float) -> None:
        """A step waited so long for its rows."""
        self._waited += seconds

    def count(self, *, examples: int, tokens: int) -> None:
        """One micro-batch; tokens that are not padding."""
        self.examples_seen += examples
        self.tokens_seen += tokens

    def add_loss(self, loss: Any) -> None:
        """The share of one micro-batch in the step's loss (already divided by the step's tokens)."""
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss

    def add_metrics(self, metrics: Mapping[str, float]) -> None:
        """Figures of one micro-batch or step beside the loss; the next log line holds their mean. What is not finite is left out."""
        for name, value in metrics.items():
            if math.isfinite(value):
                self._metrics.setdefault(name, []).append(value)

    def end_step(self, *, grad_norm: float, learning_rate: float) -> None:
        self._window.append(self._step_loss)
        self._step_loss = None
        self.grad_norm = grad_norm
        self.learning_rate = learning_rate
        self._marks.append((self._clock(), self.tokens_seen, self._waited))

    def record_evaluation(self, step: int, loss: float) -> bool:
        """Whether this evaluation is the best so far."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_step, self.best_loss, self.evaluations_without_improvement = step, loss, 0
            return True
        self.evaluations_without_improvement += 1
        return False

    def emit_saving(self, step: int) -> None:
        self._on_saving(step)

    # --- read by the monitor ----------------------------------------------------------------------

    def drain_window(self) -> float:
        """Mean loss of the steps since the last log line; empties the window."""
        losses = [float(loss) for loss in self._window]
        self._window = []
        return sum(losses) / len(losses)

    def drain_metrics(self) -> dict[str, float]:
        """Mean of each figure since the last log line; empties the window."""
        found = {name: sum(values) / len(values) for name, values in self._metrics.items()}
        self._metrics = {}
        return found

    def seconds(self) -> float:
        """Training time of all attempts that led here."""
        return self._seconds_before + self._clock() - self._began

    @property
    def has_open_window(self) -> bool:
        return bool(self._window)

    def speed(self) -> tuple[float, float]:
        """(seconds per step, tokens per second) over a sliding window of this process's steps."""
        (t0, tokens0, _), (t1, tokens1, _) = self._marks[0], self._marks[-1]
        steps = len(self._marks) - 1
        elapsed = max(t1 - t0, 1e-9)
        return (elapsed / max(steps, 1), (tokens1 - tokens0) / elapsed)

    def data_wait_share(self) -> float:
        """Share of the time of those steps in which they waited for their rows."""
        (t0, _, waited0), (t1, _, waited1) = self._marks[0], self._marks[-1]
        return (waited1 - waited0) / max(t1 - t0, 1e-9)

    # --- checkpoints --------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "window": [float(loss) for loss in self._window],
            "metrics": self._metrics,
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "evaluations_without_improvement": self.evaluations_without_improvement,
            "tokens_seen": self.tokens_seen,
            "examples_seen": self.examples_seen,
            "seconds": self.seconds(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._window = list(state["window"])
        self._metrics = {name: list(values) for name, values in state["metrics"].items()}
        self.best_step = state["best_step"]
        self.best_loss = state["best_loss"]
        self.evaluations_without_improvement = state["evaluations_without_improvement"]
        self.tokens_seen = state["tokens_seen"]
        self.examples_seen = state["examples_seen"]
        self._seconds_before = state["seconds"]


def peak_resident_bytes() -> int:
    """Highest resident memory of this process so far.

    Linux tells it per program (`VmHWM`); `getrusage` there also counts what the process that started us had.
    Elsewhere `getrusage` is all there is (macOS counts bytes, others KiB).
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
