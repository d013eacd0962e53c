"""What stops a run before it does harm, and what it only warns of."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from finetuneflow.errors import DataError, FineTuneFlowError, TrainingError
from finetuneflow.training import objectives
from finetuneflow.training.callbacks import WATCH_WINDOW, Monitor
from finetuneflow.training.checkpoints import list_complete
from finetuneflow.training.progress import Progress
from finetuneflow.training.status import run_status
from training.workbench import Bench, sums, write_rows

# --- numbers that are none --------------------------------------------------------------------------


class Poison(TrainerCallback):
    """Spoils a model at the beginning of a step and keeps what the weights were then."""

    def __init__(self, step: int, spoil: Callable[[Any], None]) -> None:
        self.step = step
        self.spoil = spoil
        self.model: Any = None
        self.before: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step - 1:
            self.spoil(model)
            self.model = model
            self.before = {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[Poison], None]:
    """Make the next run's trainer swallow a poison."""

    def use(poison: Poison) -> None:
        build = objectives.build_trainer

        def building(*args: Any) -> Any:
            trainer = build(*args)
            trainer.add_callback(poison)
            return trainer

        monkeypatch.setattr(objectives, "build_trainer", building)

    return use


def spoil_weight(model: Any) -> None:
    adapter = next(p for name, p in model.named_parameters() if "lora_B" in name)
    adapter.data.view(-1)[0] = math.nan


def spoil_gradient(model: Any) -> None:
    adapter = next(p for name, p in model.named_parameters() if "lora_B" in name)
    adapter.register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize(("spoil", "word"), [(spoil_weight, "loss became nan"), (spoil_gradient, "gradient norm became")])
def test_a_number_that_is_none_stops_the_run_before_the_optimizer_moves(
    bench: Bench, poisoned: Callable[[Poison], None], spoil: Callable[[Any], None], word: str
) -> None:
    poison = Poison(6, spoil)
    poisoned(poison)
    with pytest.raises(TrainingError) as caught:
        bench.train(training__log_steps=1)
    error = caught.value
    assert error.code == "TRAINING_NON_FINITE" and word in error.message and "step 6" in error.message
    assert error.context["step"] == 6 and error.context["learning_rate"] == pytest.approx(5e-3, rel=0.6)
    for name, parameter in poison.model.named_parameters():
        assert torch.equal(torch.nan_to_num(parameter), torch.nan_to_num(poison.before[name])), name
    assert bench.seen("log")[-1]["step"] == 5
    run_dir = bench.newest()
    assert run_status(run_dir) == "failed" and [c.step for c in list_complete(run_dir / "checkpoints")] == [4]
    assert bench.seen("failed")[0]["code"] == "TRAINING_NON_FINITE"


def test_the_rows_of_a_step_without_a_number_are_named_by_file_and_row(bench: Bench, poisoned: Callable[[Poison], None]) -> None:
    seen: list[int] = []

    class Rows(Poison):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.clear()
            super().on_step_begin(args, state, control, **kwargs)

    poisoned(Rows(2, spoil_gradient))
    with pytest.raises(TrainingError) as caught:
        bench.train()
    rows = caught.value.context["rows"]
    assert len(rows) == len(set(rows)) == 4  # micro-batch 2 x accumulation 2
    places = [json.loads(line) for line in (bench.newest() / "data" / "eval.jsonl").read_text().splitlines()]
    assert places and all("sums.jsonl" in row for row in rows)


def test_an_evaluation_without_a_number_is_never_the_best_one() -> None:
    progress = Progress()
    assert [progress.record_evaluation(step, loss) for step, loss in enumerate([math.nan, 3.0, math.inf, math.nan, 2.0])] == [
        False,
        True,
        False,
        False,
        True,
    ]
    assert progress.best_loss == 2.0 and progress.best_step == 4


# --- curves that look wrong ---------------------------------------------------------------------------


def watch(bench: Bench, losses: list[float], rate: float = 1e-3) -> list[dict[str, Any]]:
    """The warnings of a monitor that is fed one loss a step."""
    events: list[dict[str, Any]] = []

    def emit(name: str, /, **fields: Any) -> dict[str, Any]:
        events.append({"event": name, **fields})
        return events[-1]

    progress = Progress()
    monitor = Monitor(
        emit, progress, bench.config(training__log_steps=1, training__save_steps=10_000).training, bench.root, evaluates=False
    )
    monitor.trainer = SimpleNamespace(log=lambda metrics: None)
    state = SimpleNamespace(global_step=0, max_steps=len(losses) + 1, epoch=0.0)
    control = SimpleNamespace(should_evaluate=False, should_save=False, should_training_stop=False)
    progress.begin()
    for loss in losses:
        state.global_step += 1
        progress.add_loss(loss)
        progress.end_step(grad_norm=1.0, learning_rate=rate)
        monitor.on_step_end(None, state, control)
    assert not control.should_training_stop, "warnings advise, they do not stop"
    return [event for event in events if event["event"] == "warning"]


TWICE = 2 * WATCH_WINDOW


@pytest.mark.parametrize(
    ("losses", "code"),
    [
        ([1 + 0.05 * n for n in range(3 * TWICE)], "LOSS_RISING"),
        ([2.0] * 3 * TWICE, "LOSS_FLAT"),
        ([5 * 0.97**n for n in range(3 * TWICE)], None),
        ([5 * 0.97**n * (1 + 0.3 * (-1) ** n) for n in range(3 * TWICE)], None),
        ([0.01] * 3 * TWICE, None),  # learned: flat is where it should be
        ([2.0] * (TWICE - 1), None),  # too early to tell
    ],
)
def test_a_loss_that_rises_or_stays_is_warned_of_once_and_with_advice(
    bench: Bench, losses: list[float], code: str | None
) -> None:
    warnings = watch(bench, losses)
    assert [warning["code"] for warning in warnings] == ([code] if code else [])
    assert all(warning["advice"] for warning in warnings)


def test_a_learning_rate_of_zero_is_warned_of(bench: Bench) -> None:
    assert [warning["code"] for warning in watch(bench, [3.0, 2.9, 2.8, 2.7], rate=0.0)] == ["LEARNING_RATE_ZERO"]


def test_a_run_of_one_step_that_warm_up_makes_useless_is_warned_of(bench: Bench) -> None:
    """Warm-up begins at a rate of 0: with one step in all, nothing is learned."""
    bench.train(training__max_steps=1)
    assert bench.seen("log")[0]["learning_rate"] == 0.0 and bench.seen("warning", code="LEARNING_RATE_ZERO")
    bench.train(training__max_steps=6)
    assert not bench.seen("warning", code="LEARNING_RATE_ZERO")


# --- nothing to train -----------------------------------------------------------------------------------


def test_a_model_of_which_nothing_would_be_trained_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetuneflow.models import adapters

    monkeypatch.setattr(adapters, "_unfreeze", lambda model, quantized: adapters.require_trainable(model.requires_grad_(False)))
    with pytest.raises(TrainingError) as caught:
        bench.train(method__kind="full", training__learning_rate=1e-5)
    assert caught.value.code == "TRAINING_NO_TRAINABLE_PARAMETERS"


def refused(bench: Bench, rows: list[dict[str, Any]] | str, **settings: Any) -> FineTuneFlowError:
    if isinstance(rows, str):
        bench.data.write_text(rows)
    else:
        write_rows(bench.data, rows)
    with pytest.raises(FineTuneFlowError) as caught:
        bench.train(**settings)
    assert not bench.seen("phase", name="loading"), "found out before a model is loaded"
    assert bench.seen("failed")[0]["code"] == caught.value.code and run_status(bench.newest()) == "failed"
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("overlong", ["cut", "drop", "split"])
def test_rows_of_which_no_answer_fits_are_refused(bench: Bench, overlong: str) -> None:
    rows = [{"instruction": f"Say it {n}. " + "very long " * 60, "output": "Yes."} for n in range(20)]
    assert refused(bench, rows, data__max_length=32, data__overlong=overlong).code == "TRAINING_NO_SUPERVISED_TOKENS"


def test_a_file_without_examples_is_refused(bench: Bench) -> None:
    assert refused(bench, "").code in ("DATASET_EMPTY", "TRAINING_NO_DATA")


def test_a_file_in_which_no_row_is_usable_is_refused_with_the_first_reason(bench: Bench) -> None:
    error = refused(bench, [{"colour": "red", "size": n} for n in range(5)])
    assert error.code == "TRAINING_NO_DATA" and "5 rows" in error.message and error.where and "sums.jsonl" in error.where


def test_too_many_unusable_rows_are_refused_and_counted(bench: Bench) -> None:
    error = refused(bench, [*sums(16), *[{"instruction": f"What is {n}?", "output": ""} for n in range(4)]])
    assert (
        error.code == "DATASET_TOO_MANY_REJECTED"
        and "4 of 20" in error.message
        and "20.0%" in error.message
        and "10%" in error.message
    )
    assert bench.train(data__reject_threshold=0.2).status == "succeeded"


def test_an_evaluation_file_is_held_to_the_same_threshold(bench: Bench) -> None:
    held_out = write_rows(bench.root / "held-out.jsonl", [{"colour": "red"}] * 5)
    error = refused(bench, sums(20), data__eval=[str(held_out)])
    assert error.code == "TRAINING_NO_DATA" and "held-out.jsonl" in error.message


def test_a_missing_data_file_is_named(bench: Bench) -> None:
    with pytest.raises(DataError) as caught:
        bench.train(data__train=[str(bench.root / "nowhere.jsonl")])
    assert caught.value.code == "DATASET_NOT_FOUND" and "nowhere.jsonl" in caught.value.message


def test_one_example_trains_without_evaluation_and_says_so(bench: Bench) -> None:
    write_rows(bench.data, sums(1))
    result = bench.train(training__epochs=3, training__warmup_ratio=0.0)
    assert bench.seen("warning", code="NO_EVALUATION") and result.metrics["steps"] == 3
    assert result.metrics["eval_loss"] is None and result.metrics["train_loss"] > 0


def test_a_small_evaluation_part_is_called_a_rough_guide(bench: Bench) -> None:
    bench.train()
    (warning,) = bench.seen("warning", code="SPLIT")
    assert "6 examples" in warning["message"]


def test_held_out_rows_that_are_all_too_long_leave_a_warning_not_a_silence(bench: Bench) -> None:
    long = write_rows(
        bench.root / "held-out.jsonl", [{"instruction": "word " * 200 + str(n), "output": "Yes."} for n in range(3)]
    )
    result = bench.train(data__eval=[str(long)])
    assert bench.seen("warning", code="NO_EVALUATION") and result.metrics["eval_loss"] is None


def test_a_mistake_in_the_acceptance_suite_shows_before_training(bench: Bench) -> None:
    with pytest.raises(FineTuneFlowError) as caught:
        bench.train(evaluation__suite=str(Path(bench.root / "suite.yaml")))
    assert "suite.yaml" in str(caught.value) and not bench.seen("phase", name="training")


def test_the_one_token_rest_of_a_document_has_no_loss_and_stops_nothing(bench: Bench) -> None:
    """Cut into windows of 8, a document of 9 tokens leaves one token that nothing predicts."""
    write_rows(bench.data, [{"text": " ".join(["ok"] * n)} for n in range(5, 20)])
    settings = {"training__objective": "pretrain", "data__max_length": 8, "data__overlong": "split", "data__eval_fraction": 0.0}
    result = bench.train(**settings, training__batch_size=1, training__gradient_accumulation=1, training__epochs=1)
    assert result.status == "succeeded" and all(math.isfinite(line["loss"]) for line in result.metrics["train_loss_curve"])
