"""The trainers: `GuardedTrainer`, what all of them share, and `SupervisedTrainer`, which learns answers.

What differs from transformers' `Trainer`, and why:

- the supervised loss is the mean over *supervised tokens of the whole optimizer step*, computed only at positions
  that have a label; the parent leaves the normalisation to each model class;
- a loss or gradient that is not finite stops the run before the optimizer moves, naming the rows;
- the evaluation loss is a mean over tokens, not a mean of batch means (which depends on the batch size);
- checkpoints are complete or absent (`checkpoints.write_checkpoint`);
- the order of rows is a pure function of seed and epoch (`batches.EpochSampler`).
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import Trainer

from finetuneflow.data.batches import IGNORED, EpochSampler
from finetuneflow.errors import TrainingError
from finetuneflow.models.adapters import TRAINED, is_peft_model, load_adapter_weights
from finetuneflow.models.fast import FastPath
from finetuneflow.training.callbacks import Monitor
from finetuneflow.training.checkpoints import prune, write_checkpoint

PROGRESS_FILE = "progress.json"
STATE_FILE = "trainer_state.json"


def plain_loss(model: Any, micro_batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of the next-token cross-entropy in nats, number of supervised tokens, number predicted right: the reference.

    The model makes logits of all positions; only supervised ones are raised to fp32.
    """
    targets = micro_batch["targets"]
    inputs = {name: value for name, value in micro_batch.items() if name != "targets"}
    chosen = targets != IGNORED
    predictions = model(**inputs).logits[chosen].float()
    targets = targets[chosen]
    total = functional.cross_entropy(predictions, targets, reduction="sum")
    correct = (predictions.detach().argmax(dim=-1) == targets).sum()
    return total, chosen.sum(), correct


def non_finite(what: str, value: float, step: int, optimizer: torch.optim.Optimizer, rows: Sequence[str]) -> TrainingError:
    """The error for a loss or a gradient that is no finite number; `rows` are the names of those in the step."""
    rate = optimizer.param_groups[0]["lr"]
    return TrainingError(
        "TRAINING_NON_FINITE",
        f"The {what} became {value} at step {step} (learning rate {rate:.3g}); the weights were not changed by it.",
        where="rows " + ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else ""),
        remedy="Lower training.learning_rate (a tenth is a good try), use precision bf16 or fp32, and look at those rows (and at what "
        "answers were paid, where there are rewards); then start a new run. The last checkpoint is from before this step.",
        context={"step": step, "learning_rate": rate, "rows": list(rows), "value": str(value)},
    )


class GuardedTrainer(Trainer):
    """What every trainer here does alike, also those that TRL provides: guards, order of rows, checkpoints, figures.

    Stands before a library's trainer in the order of classes: `class DPO(GuardedTrainer, trl.DPOTrainer)`.
    `places` names row ids for people; `checkpoints_dir` is where `step-N` folders go.
    """

    # The library types these as optional, or as the base class of what they are here.
    model: Any
    args: Any
    train_dataset: Any
    _metrics: Any  # of TRL's trainers: figures of recent forward passes, by mode and name

    def __init__(
        self,
        *args: Any,
        monitor: Monitor,
        checkpoints_dir: Path,
        keep_checkpoints: int,
        places: Callable[[int], str],
        **kwargs: Any,
    ) -> None:
        self.monitor = monitor
        self.progress = monitor.progress
        self.checkpoints_dir = checkpoints_dir
        self.keep_checkpoints = keep_checkpoints
        self.places = places
        self._step_rows: list[int] = []
        super().__init__(*args, callbacks=[monitor], **kwargs)
        monitor.trainer = self

    def _send_telemetry(self) -> None:
        """TRL reports its use to a server; nothing here does."""

    # --- one step -----------------------------------------------------------------------------

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self._step_rows += self.count(inputs)
        loss = self.forward_backward(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self._non_finite("loss", float(loss))
        self.progress.add_loss(loss)
        self.progress.add_metrics(self.take_figures("train"))
        return loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        began = time.perf_counter()
        samples = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.progress.waited(time.perf_counter() - began)
        return samples

    def forward_backward(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """The loss of a batch, its gradients added to those that are there."""
        return super().training_step(model, inputs, num_items_in_batch)

    def count(self, inputs: dict[str, Any]) -> list[int]:
        """Take the row ids out of a batch and count its rows and tokens."""
        rows: list[int] = inputs.pop("row_ids").tolist()
        self.progress.count(examples=len(rows), tokens=int(inputs["attention_mask"].sum()))
        return rows

    def take_figures(self, mode: str) -> dict[str, float]:
        """Figures beside the loss that the last forward passes of `mode` ("train" or "eval") left, under our names."""
        return {}

    def probe_loss(self, rows: Sequence[dict[str, Any]]) -> torch.Tensor:
        """The loss of some rows as a training step would compute it, leaving no trace in figures and counts."""
        batch = self.data_collator(list(rows))
        batch.pop("row_ids")
        inputs = self._prepare_inputs(batch)
        with self.accelerator.autocast():
            loss: Any = self.compute_loss(self.model, inputs)
        self.take_figures("train")
        return loss  # type: ignore[no-any-return]

    def probe_longest(self, rows: Sequence[dict[str, Any]]) -> None:
        """Forward and backward pass on some rows, so that memory runs out now if it ever will."""
        self.probe_loss(rows).backward()

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> float:
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        # With fp16 the loss scaler meets infinities while it looks for its scale, and skips those steps itself.
        if not math.isfinite(norm) and getattr(self.accelerator, "scaler", None) is None:
            raise self._non_finite("gradient norm", norm)
        self.progress.end_step(grad_norm=norm, learning_rate=self.optimizer.param_groups[0]["lr"])
        self._step_rows = []
        return norm

    def _non_finite(self, what: str, value: float) -> TrainingError:
        rows = [self.places(row) for row in self._step_rows]
        return non_finite(what, value, self.state.global_step + 1, self.optimizer, rows)

    # --- evaluation -----------------------------------------------------------------------------

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Of several adapters in memory (a frozen reference, a reward model) only the trained one is the run's."""
        if not is_peft_model(self.model):
            super().save_model(output_dir, _internal_call=_internal_call)
            return
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, selected_adapters=[TRAINED])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Put saved weights back into the trained adapter, whatever other adapters are active."""
        model = self.model if model is None else model
        if not is_peft_model(model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_adapter_weights(model, Path(resume_from_checkpoint), name=TRAINED)


class SupervisedTrainer(GuardedTrainer):
    """Next-token cross-entropy on the supervised tokens; see the module text.

    A batch of the loader is a whole optimizer step (`data.batches.StepCollator`). `fast`: the fast path, proven on this model;
    None is the plain path. `eval_collator` cuts the rows of an evaluation batch into micro-batches.
    """

    def __init__(
        self, *args: Any, fast: FastPath | None = None, eval_collator: Callable[[Any], Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.fast = fast
        self.eval_collator = eval_collator or self.data_collator

    def forward_backward(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One optimizer step's gradients, micro-batch by micro-batch: a mean over the supervised tokens of all of them."""
        model.train()
        micro_batches = inputs["micro_batches"]
        count = sum((batch["targets"] != IGNORED).sum() for batch in micro_batches).to(self.args.device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        step_loss = torch.zeros((), device=self.args.device)
        for i, micro_batch in enumerate(micro_batches):
            micro_batch = self._prepare_inputs(micro_batch)
            is_last = i == len(micro_batches) - 1  # gradients meet those of other processes once
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model), self._layout(micro_batch):
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, micro_batch, num_items_in_batch=count)
                self.accelerator.backward(loss)
            step_loss += loss.detach()
        if self.args.world_size > 1:  # each process has its share of the sum, times their number
            step_loss = self.accelerator.reduce(step_loss, "mean")
        return step_loss

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        total, count, _ = self.loss_parts(model, inputs)
        loss = total / (num_items_in_batch if num_items_in_batch is not None else count).clamp(min=1)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients; the divisor already counts all devices
        return loss

    def loss_parts(self, model: Any, micro_batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(summed loss, supervised tokens, tokens predicted right) of a micro-batch."""
        return plain_loss(model, micro_batch) if self.fast is None else self.fast.loss(model, micro_batch)

    def _layout(self, micro_batch: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.fast is None else self.fast.layout(micro_batch)

    def count(self, inputs: dict[str, Any]) -> list[int]:
        rows: list[int] = inputs.pop("row_ids").tolist()
        self.progress.count(examples=len(rows), tokens=inputs["tokens"])
        return rows

    def probe_longest(self, rows: Sequence[dict[str, Any]]) -> None:
        """Forward and backward on the largest micro-batch of some rows."""
        micro_batch = max(self.data_collator(list(rows))["micro_batches"], key=lambda batch: batch["input_ids"].numel())
        micro_batch = self._prepare_inputs(micro_batch)
        with self._layout(micro_batch):
            with self.accelerator.autocast():
                loss = self.compute_loss(self.model, micro_batch)
            loss.backward()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The parent guesses from a batch's shape, which is not one here; `knowledge.flops` counts."""
        return 0

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        was_training = self.model.training
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        # A loader draws a seed from the global random state: put back, so that evaluating does not change the dropout that follows.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            train_collator, self.data_collator = self.data_collator, self.eval_collator
            try:
                loader = self.get_eval_dataloader(eval_dataset)
            finally:
                self.data_collator = train_collator
            for batch in loader:
                for micro_batch in batch["micro_batches"]:
                    micro_batch = self._prepare_inputs(micro_batch)
                    with self.accelerator.autocast(), self._layout(micro_batch):
                        parts = self.loss_parts(self.model, micro_batch)
                    sums += torch.stack([part.double() for part in parts])
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
