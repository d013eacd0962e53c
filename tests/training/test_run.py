"""A run from its outside: what it leaves behind, what it reports, how it stands at any moment."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuneflow.config import load_config
from finetuneflow.errors import CODES, FineTuneFlowError, TrainingError
from finetuneflow.events import EVENT_NAMES, metric_lines
from finetuneflow.training.checkpoints import find_damage, list_complete
from finetuneflow.training.status import ENDINGS, run_status, run_summary
from models.tiny import save_tiny, tiny_tokenizer
from training.workbench import LOG_FIELDS, Bench, all_events, assert_same_result, at, sums, write_rows

# --- what it leaves behind --------------------------------------------------------------------------


def test_a_run_directory_holds_everything_that_the_run_was(bench: Bench, with_report: None) -> None:
    result = bench.train()
    names = {str(path.relative_to(result.run_dir)) for path in result.run_dir.rglob("*") if path.is_file()}
    assert {
        "run.yaml", "environment.json", "events.jsonl", "metrics.json", "report.md", "template.json", "data/manifest.json", "data/eval.jsonl",
        "tokenizer/tokenizer.json", "tokenizer/chat_template.jinja", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    } <= names  # fmt: skip
    assert load_config(result.run_dir / "run.yaml")[0] == bench.config()
    assert not any(".partial" in name or name.endswith(("stop.json", "traceback.txt")) for name in names)
    assert all(find_damage(checkpoint.path) is None for checkpoint in list_complete(result.run_dir / "checkpoints"))


def test_the_adapter_names_its_base_so_that_it_is_found_from_any_folder_and_holds_no_pickle(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bench.base
    monkeypatch.chdir(base.parent)
    bench.base = Path(base.name)
    adapter = bench.train().run_dir / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert {path.name for path in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_everything_written_can_be_read_by_others(bench: Bench, kind: str) -> None:
    run_dir = bench.train(method__kind=kind, training__learning_rate=1e-4).run_dir
    modes = {str(path.relative_to(run_dir)): oct(path.stat().st_mode & 0o777) for path in run_dir.rglob("*") if path.is_file()}
    assert {name: mode for name, mode in modes.items() if mode != "0o644"} == {}


def prompt_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 40)[None]).logits


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "prefix"])
def test_the_adapter_loads_with_plain_peft_and_answers_as_the_model_in_memory_did(
    bench: Bench, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from finetuneflow.training import objectives

    kept: list[torch.Tensor] = []
    save = objectives.save_result

    def saving(config: Any, outcome: Any, *rest: Any) -> None:
        kept.append(prompt_logits(outcome.model))
        save(config, outcome, *rest)

    monkeypatch.setattr(objectives, "save_result", saving)
    run_dir = bench.train(method__kind=kind, method__num_virtual_tokens=4, training__learning_rate=0.05).run_dir
    base = AutoModelForCausalLM.from_pretrained(str(bench.base), dtype=torch.float32)
    before = prompt_logits(base)
    after = prompt_logits(PeftModel.from_pretrained(base, str(run_dir / "adapter")))
    torch.testing.assert_close(after, kept[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(after, before, atol=1e-3), "and it learned something"


def test_a_fully_tuned_model_loads_with_plain_transformers_and_its_tokenizer(bench: Bench) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_dir = bench.train(method__kind="full", training__learning_rate=1e-4).run_dir
    model = AutoModelForCausalLM.from_pretrained(str(run_dir / "model"))
    assert model.config.use_cache and model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(str(run_dir / "model")).chat_template
    assert not (run_dir / "adapter").exists()


def test_the_metrics_are_those_of_the_lines(bench: Bench) -> None:
    result = bench.train(training__log_steps=5, training__max_steps=12)
    path = result.run_dir / "events.jsonl"
    losses = [line["loss"] for line in metric_lines(path)]
    evals = {line["step"]: line["eval_loss"] for line in metric_lines(path, "eval")}
    best = min(evals, key=lambda step: evals[step])
    metrics = json.loads((result.run_dir / "metrics.json").read_text())
    assert metrics["train_loss"] == pytest.approx((5 * losses[0] + 5 * losses[1] + 2 * losses[2]) / 12)
    assert (metrics["best_step"], metrics["eval_loss"], metrics["best_eval_loss"]) == (best, evals[best], evals[best])
    assert metrics["perplexity"] == pytest.approx(math.exp(evals[best])) and metrics["steps"] == 12
    assert (
        metrics["train_examples"] + metrics["eval_examples"] == 30
        and metrics["trainable_parameters"] < metrics["total_parameters"]
    )


def test_speed_counts_the_examples_really_seen(bench: Bench) -> None:
    """A last batch that is not full counts as what it is."""
    write_rows(bench.data, sums(5))
    metrics = bench.train(
        data__eval_fraction=0.0, training__epochs=3, training__batch_size=4, training__gradient_accumulation=4
    ).metrics
    assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(15)


# --- what it reports --------------------------------------------------------------------------------


def test_events_are_numbered_without_a_gap_and_end_with_complete(bench: Bench) -> None:
    result = bench.train()
    events = all_events(result.run_dir)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1)) and events == bench.events
    assert {event["event"] for event in events} <= EVENT_NAMES
    times = [datetime.fromisoformat(event["time"]) for event in events]
    assert times == sorted(times) and all(time.utcoffset() is not None for time in times)
    assert (events[0]["event"], events[0]["pid"], events[0]["attempt"]) == ("started", os.getpid(), 1)
    assert events[-1]["event"] == "complete" and [e["event"] for e in events].count("complete") == 1
    assert events[-1].keys() >= {"total_steps", "best_metric", "train_loss", "seconds"}
    phases = [event["name"] for event in bench.seen("phase") if "step" not in event]
    assert phases == ["checking", "tokenizing", "loading", "training", "saving", "evaluating"]


def test_every_log_line_has_the_documented_fields_with_sane_values(bench: Bench) -> None:
    bench.train(training__log_steps=1)
    logs = bench.seen("log")
    assert [event["step"] for event in logs] == list(range(1, 13))
    for event in logs:
        assert event.keys() >= LOG_FIELDS and event["total_steps"] == 12
        assert event["epoch"] == pytest.approx(event["step"] / 6)
        assert 0 < event["memory_bytes"] <= event["peak_memory_bytes"] and event["tokens_per_second"] > 0
        assert event["eta_seconds"] == pytest.approx(event["seconds_per_step"] * (12 - event["step"]))
        assert 0 < event["seconds_per_step"] < 30
    tokens = [event["tokens_seen"] for event in logs]
    assert tokens == sorted(tokens) and tokens[0] > 0
    assert all(path.startswith("checkpoints/step-") for path in (event["path"] for event in bench.seen("checkpoint")))


def test_tokens_are_counted_without_padding(bench: Bench) -> None:
    from datasets import Dataset

    result = bench.train(training__epochs=2)
    (folder,) = (bench.workspace.cache_dir / "tokens").iterdir()
    lengths = Dataset.from_file(str(folder / "train.arrow"))["length"]
    assert bench.seen("log")[-1]["tokens_seen"] == 2 * sum(lengths)
    assert result.metrics["train_tokens_per_second"] * result.metrics["train_runtime"] == pytest.approx(2 * sum(lengths))


def test_a_sink_that_fails_does_not_stop_a_run(bench: Bench) -> None:
    def broken(event: dict[str, Any]) -> None:
        raise ValueError("the screen is gone")

    assert bench.train(sinks=[broken], training__max_steps=2).status == "succeeded"


def test_lowering_the_rate_of_full_fine_tuning_is_a_decision_and_a_warning(bench: Bench) -> None:
    bench.train(
        method__kind="full",
        training__learning_rate=5e-4,
        training__log_steps=1,
        training__warmup_ratio=0.0,
        training__max_steps=3,
    )
    assert bench.seen("decision", setting="training.learning_rate")[0]["value"] == 2e-5
    (warning,) = bench.seen("warning", code="LEARNING_RATE_LOWERED")
    assert "0.0005" in warning["message"] and warning["advice"] and bench.seen("log")[0]["learning_rate"] == pytest.approx(2e-5)


def test_the_same_run_file_gives_the_same_result_again(bench: Bench) -> None:
    assert_same_result(bench.train(method__dropout=0.3).run_dir, bench.train(method__dropout=0.3).run_dir)


def test_a_tokenizer_with_neither_padding_nor_end_token_can_be_trained_with(bench: Bench) -> None:
    bench.base = save_tiny(bench.root / "bare", "llama", hidden=32, tokenizer=tiny_tokenizer(pad_token=None, eos_token=None))
    try:
        assert bench.train(data__supervise="assistant").status == "succeeded"
    except FineTuneFlowError as error:
        assert error.code == "TRAINING_NO_TURN_END"  # refused with a reason is right too; a TypeError in the batch is not


# --- how it stands ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "status"), [(at("phase", name="training"), "running"), (at("phase", name="checking"), "running")]
)
def test_a_run_at_work_is_running(bench: Bench, moment: Callable[[Any], bool], status: str) -> None:
    seen = []
    bench.train(sinks=[lambda event: seen.append(run_status(bench.newest())) if moment(event) else None], training__max_steps=2)
    assert seen == [status] and run_status(bench.newest()) == "succeeded"
    summary = run_summary(bench.newest())
    assert (summary["status"], summary["method"], summary["base"], summary["step"], summary["total_steps"]) == (
        "succeeded",
        "lora",
        str(bench.base),
        2,
        2,
    )


def test_a_run_whose_process_vanished_is_interrupted_and_a_recycled_pid_does_not_revive_it(bench: Bench) -> None:
    run_dir = bench.interrupted(at("log", step=3))
    path = run_dir / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["event"] not in ENDINGS))  # as SIGKILL leaves it
    (run_dir / "lock").write_text(json.dumps({"pid": os.getpid(), "started": 1.0}))  # our pid, but started long ago
    assert run_status(run_dir) == "interrupted"
    (run_dir / "lock").write_text(json.dumps({"pid": 2**22 + 1, "started": 1.0}))
    assert run_status(run_dir) == "interrupted"


def test_a_run_with_a_broken_run_file_is_listed_as_damaged_not_hidden(bench: Bench) -> None:
    run_dir = bench.train(training__max_steps=1).run_dir
    (run_dir / "run.yaml").write_text("model: [")
    assert run_summary(run_dir)["status"] == "damaged"


def test_an_unexpected_error_is_one_of_ours_with_a_code_and_keeps_its_trace(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetuneflow.training.trainer import SupervisedTrainer

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(SupervisedTrainer, "compute_loss", broken)
    with pytest.raises(TrainingError) as caught:
        bench.train()
    assert caught.value.code == "TRAINING_FAILED" and "ZeroDivisionError: a bug of ours" in caught.value.message
    assert "a bug of ours" in (bench.newest() / "traceback.txt").read_text() and run_status(bench.newest()) == "failed"
    assert bench.events[-1]["event"] == "failed" and bench.events[-1]["code"] in CODES


# --- signals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_after_the_step_and_the_run_resumes_exactly(bench: Bench, number: signal.Signals) -> None:
    straight = bench.train().run_dir
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    result = bench.train(sinks=[lambda event: os.kill(os.getpid(), number) if at("log", step=3)(event) else None])
    assert (result.status, run_status(result.run_dir)) == ("stopped", "stopped")
    assert bench.seen("stopped")[0]["step"] <= 4 and find_damage(list_complete(result.run_dir / "checkpoints")[-1].path) is None
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers, "the handlers are put back"
    bench.resume(result.run_dir)
    assert_same_result(straight, result.run_dir)


def test_a_second_interrupt_ends_at_once_and_leaves_whole_checkpoints_only(bench: Bench) -> None:
    def twice(event: dict[str, Any]) -> None:
        if at("phase", name="saving", step=8)(event):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    straight = bench.train().run_dir
    with pytest.raises(TrainingError) as caught:
        bench.train(sinks=[twice])
    run_dir = bench.newest()
    assert caught.value.code == "TRAINING_INTERRUPTED" and caught.value.code in CODES
    assert [c.step for c in list_complete(run_dir / "checkpoints")] == [4] and not list((run_dir / "checkpoints").glob(".*"))
    bench.resume(run_dir)
    assert_same_result(straight, run_dir)


def test_prompts_are_asked_at_the_steps_named_and_nothing_else_changes(bench: Bench, tmp_path: Path) -> None:
    """The plan of the MambaSWELU document: test prompts at 5k, 10k, 15k and 20k steps."""
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "version: 1\nname: tiny\nmax_new_tokens: 4\nprompts:\n"
        '  - {id: a, messages: [{role: user, content: "Hello?"}], check: {not_contains: zebra}, must_stop: false}\n'
    )
    plain = bench.train(evaluation__samples=2, training__patience=None)
    asked = bench.train(evaluation__samples=2, evaluation__suite=str(suite), evaluation__at_steps=[2, 5, 10_000])
    found = [(event["step"], event["passed"]) for event in bench.seen("suite")]
    last = asked.metrics["steps"]
    assert found == [(2, 1), (5, 1), (last, 1)]
    assert [event["step"] for event in bench.seen("sample")] == [2, 2, 5, 5, last, last]
    assert sorted(path.name for path in (asked.run_dir / "evals").iterdir()) == [
        "after-training.json", "step-000002.json", "step-000005.json"
    ]  # fmt: skip
    assert_same_result(plain.run_dir, asked.run_dir)
