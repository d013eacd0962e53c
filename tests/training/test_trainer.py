"""The numbers of a step, against references that share no code with ours.

The references are transformers' own loss per row (`model(input_ids, labels).loss`), TRL's `SFTTrainer` on the same
tokens, and a training loop written out in plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from finetuneflow.config import RunConfig
from finetuneflow.data.batches import StepCollator
from finetuneflow.training import objectives
from finetuneflow.training.callbacks import Monitor
from finetuneflow.training.progress import Progress
from finetuneflow.training.setup import choose_setup
from finetuneflow.training.start import start_model
from training.workbench import Bench

ONE_STEP: dict[str, Any] = {
    "method__kind": "full",
    "training__learning_rate": 1.9e-4,  # the largest that full fine-tuning takes as it is
    "training__max_steps": 1,
    "training__warmup_ratio": 0.0,
    "training__log_steps": 1,
    "training__max_grad_norm": 0.0,
}


class Watch(TrainerCallback):
    """Keeps the gradients that the optimizer is about to use, and the rows they came from."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.rows: list[int] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients.append({name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None})


class Prepared:
    """A trainer as a run builds it, not yet started."""

    def __init__(self, bench: Bench, collator: Callable[[Any], Any] | None = None, **settings: Any) -> None:
        self.config: RunConfig = bench.config(**settings)
        self.events: list[dict[str, Any]] = []
        run_dir = bench.workspace.new_run_dir("bench")
        setup = choose_setup(self.config)
        torch.set_num_threads(1)
        self.materials = objectives.load_materials(self.config, bench.workspace, self.emit)
        started = start_model(self.config, setup, self.materials.tokenizer, None, self.emit)
        self.model = started.model
        evaluates = self.materials.prepared.eval is not None
        monitor = Monitor(self.emit, Progress(), self.config.training, run_dir, evaluates=evaluates)
        self.trainer = objectives.build_trainer(
            self.config, self.config.training, setup, self.materials, started, monitor, run_dir, self.emit
        )
        self.watch = Watch()
        self.trainer.add_callback(self.watch)
        self.trainer.data_collator = self._recording(collator or self.trainer.data_collator)

    def emit(self, name: str, /, **fields: Any) -> dict[str, Any]:
        self.events.append({"event": name, **fields})
        return self.events[-1]

    def _recording(self, collator: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def collate(rows: list[dict[str, Any]]) -> Any:
            self.watch.rows += [row["index"] for row in rows]
            return collator(rows)

        return collate

    def logged(self, key: str = "loss") -> list[Any]:
        return [event[key] for event in self.events if event["event"] == "log"]


def fresh_model(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)


def row_loss(model: Any, row: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """transformers' own loss of one row without any padding, and the number of tokens it is a mean of."""
    labels = torch.tensor([row["labels"]])
    return model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss, int((labels[:, 1:] != -100).sum())


def reference_step(model: Any, rows: list[dict[str, Any]]) -> float:
    """Mean over all supervised tokens of all rows; leaves its gradients on the model."""
    parts = [row_loss(model, row) for row in rows]
    loss = sum(loss * count for loss, count in parts) / sum(count for _, count in parts)
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 4), (8, 1), (1, 8), (3, 2)])
def test_loss_and_gradients_are_transformers_own_over_the_whole_accumulated_step(
    bench: Bench, batch: int, accumulation: int
) -> None:
    ours = Prepared(bench, **ONE_STEP, training__batch_size=batch, training__gradient_accumulation=accumulation)
    reference = fresh_model(bench.base)
    ours.trainer.train()
    dataset = ours.materials.prepared.train
    rows = [dataset[i] for i in ours.watch.rows[: batch * accumulation]]
    assert len({row["index"] for row in rows}) == batch * accumulation
    loss = reference_step(reference, rows)
    assert ours.logged() == [pytest.approx(loss, abs=1e-5)]
    gradients = ours.watch.gradients[0]
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)
    norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in reference.parameters()))
    assert ours.logged("grad_norm") == [pytest.approx(norm, rel=1e-4)]


def test_the_mean_is_over_tokens_not_over_rows(bench: Bench) -> None:
    """The rows differ in length, so that a mean of means would show."""
    ours = Prepared(bench, **ONE_STEP, training__batch_size=1, training__gradient_accumulation=8)
    model = fresh_model(bench.base)
    ours.trainer.train()
    parts = [row_loss(model, ours.materials.prepared.train[i]) for i in ours.watch.rows[:8]]
    mean_of_means = sum(loss.item() for loss, _ in parts) / len(parts)
    assert abs(ours.logged()[0] - mean_of_means) > 1e-4


def test_the_loss_is_that_of_trl_on_the_same_tokens(bench: Bench, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    ours = Prepared(bench, **ONE_STEP, training__batch_size=4, training__gradient_accumulation=2)
    ours.trainer.train()
    rows = [ours.materials.prepared.train[i] for i in ours.watch.rows[:8]]
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=1,
        logging_steps=1,
        learning_rate=1e-5,
        max_grad_norm=1e9,
        use_cpu=True,
        bf16=False,
        max_length=None,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    dataset = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
    theirs = SFTTrainer(fresh_model(bench.base), args=arguments, train_dataset=dataset, processing_class=ours.materials.tokenizer)
    theirs.train()
    (line,) = [line for line in theirs.state.log_history if "loss" in line]
    assert ours.logged()[0] == pytest.approx(line["loss"], abs=1e-5)
    assert ours.logged("grad_norm")[0] == pytest.approx(line["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_accumulating_eight_batches_of_one_trains_like_a_batch_of_eight(bench: Bench, kind: str) -> None:
    results = []
    for batch, accumulation in ((1, 8), (8, 1)):
        settings = {**ONE_STEP, "method__kind": kind, "method__dropout": 0.0, "training__max_steps": 5}
        run = Prepared(bench, **settings, training__batch_size=batch, training__gradient_accumulation=accumulation)
        run.trainer.train()
        results.append((run.logged(), {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}))
    (one_losses, one), (eight_losses, eight) = results
    assert one_losses == pytest.approx(eight_losses, abs=1e-5)
    for name in one:
        torch.testing.assert_close(one[name], eight[name], atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "layout",
    [
        {"budget": 96, "packed": True},
        {"budget": 10_000, "packed": True},
        {"budget": 1, "packed": True},  # every row alone
        {"budget": 200},
        {"rows_each": 3},
    ],
    ids=["packed", "all in one row", "each alone", "padded to a budget", "rows as they come"],
)
def test_how_a_step_is_cut_changes_neither_loss_nor_gradients(bench: Bench, layout: dict[str, Any]) -> None:
    plain = Prepared(bench, **ONE_STEP, training__speed="reference")
    other = Prepared(bench, StepCollator(7, **layout), **ONE_STEP)  # and padded with an ordinary token
    for run in (plain, other):
        run.trainer.train()
    assert other.watch.rows == plain.watch.rows
    assert other.logged()[0] == pytest.approx(plain.logged()[0], abs=1e-6)
    for name, gradient in plain.watch.gradients[0].items():
        torch.testing.assert_close(other.watch.gradients[0][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_recomputed_activations_give_the_same_curve(bench: Bench, checkpointing: str) -> None:
    run = bench.train(
        method__dropout=0.0, training__max_steps=3, training__log_steps=1, training__gradient_checkpointing=checkpointing
    )
    losses = [line["loss"] for line in run.metrics["train_loss_curve"]]
    plain = bench.train(method__dropout=0.0, training__max_steps=3, training__log_steps=1).metrics["train_loss_curve"]
    assert losses == pytest.approx([line["loss"] for line in plain], abs=1e-5)


# --- evaluation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_the_evaluation_loss_is_the_plain_mean_over_tokens_whatever_the_batch_size(bench: Bench, batch: int) -> None:
    ours = Prepared(bench, **ONE_STEP, training__eval_batch_size=batch)
    metrics = ours.trainer.evaluate()
    model = fresh_model(bench.base).eval()
    total = tokens = correct = 0.0
    with torch.no_grad():
        for row in ours.materials.prepared.eval:
            loss, count = row_loss(model, row)
            total, tokens = total + float(loss) * count, tokens + count
            guesses = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].argmax(-1)
            labels = torch.tensor(row["labels"])[1:]
            correct += int((guesses == labels)[labels != -100].sum())
    assert metrics["eval_loss"] == pytest.approx(total / tokens, rel=1e-6)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert metrics["eval_token_accuracy"] == pytest.approx(correct / tokens) and metrics["eval_tokens"] == tokens


def test_evaluating_changes_nothing_of_the_training(bench: Bench) -> None:
    """Dropout after an evaluation is what it would have been without it."""
    settings = {"method__dropout": 0.3, "training__load_best": False, "training__log_steps": 1, "training__max_steps": 8}
    often = bench.train(**settings, training__eval_steps=1).metrics["train_loss_curve"]
    never = bench.train(**settings, training__eval_steps=1000).metrics["train_loss_curve"]
    assert often == never


# --- optimizer and schedule -----------------------------------------------------------------------------


def cosine(step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """Learning rate of the optimizer's step number `step`, counted from 0."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.5])
def test_each_step_uses_the_learning_rate_of_the_formula(bench: Bench, warmup_ratio: float) -> None:
    total, peak = 40, 5e-3
    bench.train(training__max_steps=total, training__log_steps=1, training__warmup_ratio=warmup_ratio, training__batch_size=1,
                training__gradient_accumulation=1, training__eval_steps=1000, training__save_steps=1000)  # fmt: skip
    rates = [event["learning_rate"] for event in bench.seen("log")]
    assert rates == pytest.approx([cosine(step, total, peak, warmup_ratio) for step in range(total)], rel=1e-6, abs=1e-12)


def test_gradients_are_clipped_to_the_norm_asked_for_and_logged_as_they_were(bench: Bench) -> None:
    free = Prepared(bench, **ONE_STEP)
    clipped = Prepared(bench, **{**ONE_STEP, "training__max_grad_norm": 0.01})
    for run in (free, clipped):
        run.trainer.train()
    norm = math.sqrt(sum(float(g.pow(2).sum()) for g in clipped.watch.gradients[0].values()))
    assert norm == pytest.approx(0.01, rel=1e-3) and free.logged("grad_norm")[0] > 0.1
    assert clipped.logged("grad_norm") == pytest.approx(free.logged("grad_norm"))


def plain_training(
    model: Any, rows: list[dict[str, Any]], *, steps: int, size: int, peak: float, decay: float, clip: float
) -> list[float]:
    """AdamW, cosine after 3 % warm-up, clipping: written out, one row at a time, nothing but PyTorch."""
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    losses = []
    for step in range(steps):
        model.zero_grad()
        losses.append(reference_step(model, rows[step * size : (step + 1) * size]))
        norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in model.parameters()))
        scale, rate = min(1.0, clip / (norm + 1e-6)), cosine(step, steps, peak, 0.03)
        with torch.no_grad():
            for name, p in model.named_parameters():
                first, second = moments[name]
                gradient = p.grad * scale
                first.mul_(0.9).add_(gradient, alpha=0.1)
                second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                p.mul_(1 - rate * (0.0 if name in norms else decay))  # norm weights are not decayed
                p.sub_(rate * (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))
    return losses


def test_a_run_follows_a_training_loop_written_out_by_hand(bench: Bench) -> None:
    settings = {
        **ONE_STEP,
        "training__max_steps": 10,
        "training__warmup_ratio": 0.03,
        "training__weight_decay": 0.5,
        "training__max_grad_norm": 0.3,
    }
    settings["training__eval_steps"] = 1000  # an evaluation would put its rows among those recorded
    ours = Prepared(bench, **settings)
    ours.trainer.train()
    rows = [ours.materials.prepared.train[i] for i in ours.watch.rows]
    model = fresh_model(bench.base)
    # 24 rows are 6 steps of 4; the prefetched batches of both epochs come in order
    losses = plain_training(model, rows, steps=10, size=4, peak=1.9e-4, decay=0.5, clip=0.3)
    assert ours.logged() == pytest.approx(losses, abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(dict(ours.model.named_parameters())[name], parameter, atol=2e-6, rtol=1e-4)


# Loss at steps 1, 5, 10, 15 and 20 of a LoRA run on the bench, as measured when this was written.
GOLDEN = {1: 6.27255, 5: 5.87004, 10: 5.08164, 15: 4.57716, 20: 4.48592}


def test_the_loss_curve_is_the_pinned_one(bench: Bench) -> None:
    run = bench.train(training__max_steps=20, training__log_steps=1, training__eval_steps=1000, method__dropout=0.0,
                      method__modules_to_save=["lm_head"])  # fmt: skip
    curve = {line["step"]: line["loss"] for line in run.metrics["train_loss_curve"]}
    assert {step: curve[step] for step in GOLDEN} == pytest.approx(GOLDEN, rel=2e-3)
