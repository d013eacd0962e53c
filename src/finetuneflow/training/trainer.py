"""The supervised trainer: transformers' `Trainer` with our loss, guards, evaluation and checkpoints.

What differs from the parent, and why:

- the loss is the mean over *supervised tokens of the whole optimizer step*, computed only at positions
  that have a label; the parent leaves the normalisation to each model class;
- a loss or gradient that is not finite stops the run before the optimizer moves, naming the rows;
- the evaluation loss is a mean over tokens, not a mean of batch means (which depends on the batch size);
- checkpoints are complete or absent (`checkpoints.write_checkpoint`);
- the order of rows is a pure function of seed and epoch (`batches.EpochSampler`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import Trainer

from finetuneflow.data.batches import IGNORED, EpochSampler
from finetuneflow.errors import TrainingError
from finetuneflow.training.callbacks import Monitor
from finetuneflow.training.checkpoints import prune, write_checkpoint

PROGRESS_FILE = "progress.json"
STATE_FILE = "trainer_state.json"


def supervised_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of the next-token cross-entropy in nats, number of supervised tokens, number predicted right.

    `logits` (batch, length, vocabulary), `labels` (batch, length) with -100 where nothing is learned.
    Only supervised positions are raised to fp32: logits of prompts and padding are never copied.
    """
    targets = labels[:, 1:]
    chosen = targets != IGNORED
    predictions = logits[:, :-1][chosen].float()
    targets = targets[chosen]
    total = functional.cross_entropy(predictions, targets, reduction="sum")
    correct = (predictions.detach().argmax(dim=-1) == targets).sum()
    return total, chosen.sum(), correct


class SupervisedTrainer(Trainer):
    """See the module text. `places` names row ids for people; `checkpoints_dir` is where `step-N` folders go."""

    def __init__(
        self,
        *args: Any,
        monitor: Monitor,
        checkpoints_dir: Path,
        keep_checkpoints: int,
        places: Callable[[int], str],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, callbacks=[monitor], **kwargs)
        self.model_accepts_loss_kwargs = True  # makes the parent count supervised tokens over the whole step
        self.loss_is_scaled_for_ga = True
        self._loss_shifts_labels = True
        self.monitor = monitor
        self.progress = monitor.progress
        monitor.trainer = self
        self.checkpoints_dir = checkpoints_dir
        self.keep_checkpoints = keep_checkpoints
        self.places = places
        self._step_rows: list[int] = []

    # --- one step -----------------------------------------------------------------------------

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        rows = inputs.pop("row_ids").tolist()
        self._step_rows += rows
        self.progress.count(examples=len(rows), tokens=int(inputs["attention_mask"].sum()))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self._non_finite("loss", float(loss))
        self.progress.add_loss(loss)
        return loss

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        total, count, _ = supervised_loss(outputs.logits, labels)
        loss = total / (num_items_in_batch if num_items_in_batch is not None else count.clamp(min=1))
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients; the divisor already counts all devices
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> float:
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        # With fp16 the loss scaler meets infinities while it looks for its scale, and skips those steps itself.
        if not math.isfinite(norm) and getattr(self.accelerator, "scaler", None) is None:
            raise self._non_finite("gradient norm", norm)
        self.progress.end_step(grad_norm=norm, learning_rate=self.optimizer.param_groups[0]["lr"])
        self._step_rows = []
        return norm

    def _non_finite(self, what: str, value: float) -> TrainingError:
        step, rate = self.state.global_step + 1, self.optimizer.param_groups[0]["lr"]
        rows = [self.places(row) for row in self._step_rows]
        return TrainingError(
            "TRAINING_NON_FINITE",
            f"The {what} became {value} at step {step} (learning rate {rate:.3g}); the weights were not changed by it.",
            where="rows " + ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else ""),
            remedy="Lower training.learning_rate (a tenth is a good try), use precision bf16 or fp32, and look at those rows; "
            "then start a new run. The last checkpoint is from before this step.",
            context={"step": step, "learning_rate": rate, "rows": rows, "value": str(value)},
        )

    # --- evaluation -----------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        loader = self.get_eval_dataloader(eval_dataset)
        was_training = self.model.training
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        # A loader draws a seed from the global random state: put back, so that evaluating does not change the dropout that follows.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for batch in loader:
                batch.pop("row_ids")
                batch = self._prepare_inputs(batch)
                labels = batch.pop("labels")
                with self.accelerator.autocast():
                    logits = self.model(**batch).logits
                sums += torch.stack([part.double() for part in supervised_loss(logits, labels)])
        self.model.train(was_training)
        nll, count, correct = self.accelerator.reduce(sums, "sum").tolist()
        loss = nll / count
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700.0)),
            f"{metric_key_prefix}_token_accuracy": correct / count,
            f"{metric_key_prefix}_tokens": count,
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = self.progress.record_evaluation(self.state.global_step, metrics["eval_loss"])
        if is_best:
            self.control.should_save = True  # the best weights are always on disk, whatever save_steps says
        self.monitor.after_evaluation(self.state, self.control)
        return is_best

    # --- order and checkpoints --------------------------------------------------------------------

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.monitor.has_ended(self.state):  # resumed from its last checkpoint: the parent would take one step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        settings = self.monitor.settings
        if not settings.group_by_length:
            return EpochSampler(len(self.train_dataset), seed=self.args.seed)
        lengths = list(self.train_dataset["length"])
        return EpochSampler(len(lengths), seed=self.args.seed, lengths=lengths, group_size=settings.effective_batch)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        step = self.state.global_step

        def save(folder: Path) -> None:
            self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            self.state.save_to_json(str(folder / STATE_FILE))
            (folder / PROGRESS_FILE).write_text(json.dumps(self.progress.state()))

        write_checkpoint(self.checkpoints_dir, step, save, event=lambda: self.progress.emit_saving(step))
        prune(self.checkpoints_dir, keep=self.keep_checkpoints, protect=self.progress.best_step)
