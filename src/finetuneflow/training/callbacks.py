"""The monitor: decides when to log, evaluate, save and stop, and turns what happens into events.

One callback holds all of it, because the order of these decisions within a step matters.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
from transformers import TrainerCallback

from finetuneflow.config import Training
from finetuneflow.events import Emit
from finetuneflow.knowledge.run_warnings import WARNINGS
from finetuneflow.training.progress import Progress, peak_resident_bytes
from finetuneflow.training.status import STOP_FILE
from finetuneflow.training.watch import HISTORY, REINFORCED, concerns

WATCH_WINDOW = 10  # log lines the loss guards look at


class Monitor(TrainerCallback):
    """Feeds `emit` and steers the trainer. `stopped` says after training whether a stop was asked for."""

    def __init__(self, emit: Emit, progress: Progress, settings: Training, run_dir: Path, *, evaluates: bool) -> None:
        self.emit = emit
        self.progress = progress
        self.settings = settings
        self.run_dir = run_dir
        self.evaluates = evaluates
        self.trainer: Any = None  # set once the trainer exists
        self.stopped: str | None = None
        self._ask_at: frozenset[int] = frozenset()
        self._ask: Callable[[int], Any] = lambda step: None
        self._stop_signal = False
        self._losses: deque[float] = deque(maxlen=2 * WATCH_WINDOW)
        self._figures: deque[dict[str, float]] = deque(maxlen=HISTORY)
        self._warned: set[str] = set()

    def ask_at(self, steps: Iterable[int], ask: Callable[[int], Any]) -> None:
        """Have the model answer its test prompts after each of these steps."""
        self._ask_at, self._ask = frozenset(steps), ask

    def stop_soon(self) -> None:
        """Signal handlers call this: they only set a flag, the step's end does the work."""
        self._stop_signal = True

    # --- per step -----------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, last = state.global_step, state.global_step >= state.max_steps
        if step % self.settings.log_steps == 0 or last:
            self._log(state)
        if step in self._ask_at and not last:  # after the last step the finished weights are asked anyway
            self._ask(step)
        control.should_evaluate = self.evaluates and (step % self.settings.eval_steps == 0 or last)
        control.should_save = step % self.settings.save_steps == 0 or last
        if (request := self._stop_request()) is not None:
            self.stopped = "asked to stop" + ("" if request else ", without saving")
            control.should_training_stop = True
            # An evaluation that is due is made even now: a resume starts behind this step and would never make it.
            control.should_evaluate = control.should_evaluate and request
            control.should_save = request

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        self.emit("eval", step=state.global_step, total_steps=state.max_steps, epoch=state.epoch, **metrics)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.emit("checkpoint", step=state.global_step, path=f"checkpoints/step-{state.global_step:06d}")

    def has_ended(self, state: Any) -> bool:
        """Whether all steps are done or patience is at its end."""
        return state.global_step >= state.max_steps or self._out_of_patience()

    def _out_of_patience(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.progress.evaluations_without_improvement >= patience

    def after_evaluation(self, state: Any, control: Any) -> None:
        """Early stopping: called by the trainer once the best evaluation is known."""
        patience = self.settings.patience
        if self._out_of_patience() and state.global_step < state.max_steps:
            control.should_training_stop = control.should_save = True
            if self.progress.has_open_window:
                self._log(state)  # the steps since the last log line belong to the mean training loss
            self.emit(
                "decision",
                setting="training.patience",
                value=state.global_step,
                reason=f"Stopped early: no better evaluation loss in {patience} evaluations; the best was at step {self.progress.best_step}.",
            )

    # --- inside ---------------------------------------------------------------------------------------

    def _log(self, state: Any) -> None:
        seconds_per_step, tokens_per_second = self.progress.speed()
        loss = self.progress.drain_window()
        figures = self.progress.drain_metrics()
        metrics = {"loss": loss, "grad_norm": self.progress.grad_norm, "learning_rate": self.progress.learning_rate}
        self.emit(
            "log",
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=state.epoch,
            **metrics,
            **({"metrics": figures} if figures else {}),
            tokens_seen=self.progress.tokens_seen,
            tokens_per_second=tokens_per_second,
            seconds_per_step=seconds_per_step,
            eta_seconds=seconds_per_step * (state.max_steps - state.global_step),
            data_wait_share=self.progress.data_wait_share(),
            **memory_now(),
        )
        self.trainer.log({**metrics, **figures})  # experiment trackers listen there
        self._watch(loss, figures, state)

    def _watch(self, loss: float, figures: dict[str, float], state: Any) -> None:
        """Named warnings, each at most once: they advise, they never stop a run."""
        self._losses.append(loss)
        self._figures.append(figures)
        for code, message, _ in concerns(self.settings.objective, list(self._figures)):
            self._warn(code, message)
        step = state.global_step
        # The first step of a warm-up has rate 0, and so has every step of a run that ends with it.
        warming_up = step <= math.ceil(self.settings.warmup_ratio * state.max_steps) < state.max_steps
        if self.progress.learning_rate == 0.0 and not warming_up:
            self._warn("LEARNING_RATE_ZERO", f"The learning rate is 0 at step {step}: nothing is learned.")
        if len(self._losses) < 2 * WATCH_WINDOW or self.settings.objective in REINFORCED:
            return  # the loss of a policy gradient says nothing about progress
        losses = list(self._losses)
        before, after = sum(losses[:WATCH_WINDOW]) / WATCH_WINDOW, sum(losses[WATCH_WINDOW:]) / WATCH_WINDOW
        if after > before * 1.1:
            self._warn(
                "LOSS_RISING",
                f"The training loss rose from {before:.3f} to {after:.3f} over the last {2 * WATCH_WINDOW} log lines.",
            )
        elif abs(after - before) < 1e-3 * before and after > 0.05:
            self._warn(
                "LOSS_FLAT",
                f"The training loss has stayed at {after:.3f} over the last {2 * WATCH_WINDOW} log lines.",
            )

    def _warn(self, code: str, message: str) -> None:
        if code not in self._warned:
            self._warned.add(code)
            self.emit("warning", code=code, message=message, advice=WARNINGS[code].advice)

    def _stop_request(self) -> bool | None:
        """None: go on. True: stop and save. False: stop without saving."""
        if self._stop_signal:
            return True
        path = self.run_dir / STOP_FILE
        if not path.exists():
            return None
        try:
            return bool(json.loads(path.read_text()).get("save", True))
        except (OSError, ValueError):
            return True
        finally:
            path.unlink(missing_ok=True)


def memory_now() -> dict[str, int]:
    """Memory in bytes, now and at its peak: of the GPU where one is used, else resident memory of this process."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return {"memory_bytes": torch.cuda.memory_allocated(), "peak_memory_bytes": torch.cuda.max_memory_allocated()}
    resident = psutil.Process().memory_info().rss
    return {"memory_bytes": resident, "peak_memory_bytes": max(resident, peak_resident_bytes())}  # the kernel's peak lags behind
