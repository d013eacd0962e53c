"""A run is predicted before it starts, refused where it cannot fit, and measured against its prediction."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetuneflow import planning
from finetuneflow.config import RunConfig
from finetuneflow.errors import CODES, HardwareError
from finetuneflow.knowledge.values import Machine
from finetuneflow.training import preflight
from finetuneflow.training.objectives import smaller_batch
from training.workbench import Bench, all_events, at, sums, write_rows

PHASES = ("checking", "tokenizing", "loading", "training", "saving", "evaluating")


def plan_of(run_dir: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((run_dir / "plan.json").read_text())
    return plan


def phases(bench: Bench) -> list[str]:
    return [event["name"] for event in bench.seen("phase")]


def predicted_bytes(bench: Bench, config: RunConfig) -> int:
    seen = planning.look(config, workspace=bench.workspace, machine=planning.machine_here(device="cpu"), network=False, threads=1)
    assert seen.situation.estimate is not None
    return seen.situation.estimate.total_bytes


@pytest.fixture
def tiny_machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes this machine one of so many bytes, for everything that asks the preflight's way."""

    def shrink(memory_bytes: int) -> None:
        machine = planning.machine_here(device="cpu")
        small = replace(machine.device, memory_bytes=memory_bytes)

        def asked(hardware: object = None, *, device: str = "auto") -> Machine:
            return replace(machine, devices=(small,), host_memory_bytes=memory_bytes)

        monkeypatch.setattr(preflight, "machine_here", asked)

    return shrink


# --- predicted and measured ---------------------------------------------------------------------------


def test_a_run_leaves_its_plan_and_says_it(bench: Bench, with_report: None) -> None:
    result = bench.train(training__learning_rate=0.5)
    plan = plan_of(result.run_dir)
    [said] = bench.seen("plan")
    for key in ("device", "memory_bytes", "capacity_bytes", "verdict", "seconds", "steps", "price_usd"):
        assert said[key] == plan[key]
    assert plan["kind"] == "cpu" and plan["memory_bytes"] == sum(plan["memory"]["breakdown"].values())
    assert plan["verdict"] == "fits" and plan["correction"] == 1 and not bench.seen("warning", code="PLAN_FAILED")
    findings = bench.seen("finding")
    assert [finding["code"] for finding in findings] == [finding["code"] for finding in plan["findings"]]
    rate = next(finding for finding in findings if finding["field"] == "training.learning_rate")
    assert rate["why"] and rate["level"] in ("error", "warning", "advice") and rate["fix"]
    order = [event["event"] for event in bench.events]
    assert order.index("plan") < order.index("finding") < order.index("log")
    metrics = result.metrics
    # What the plan counted is what the run did.
    assert plan["steps"] == metrics["steps"] == 12
    assert (plan["cost"]["steps"]["steps"], plan["memory"]["total_bytes"]) == (12, plan["memory_bytes"])
    report = (result.run_dir / "report.md").read_text()
    section = report.partition("## Plan and Outcome")[2].partition("\n## ")[0]
    for label in ("Peak memory", "Training time"):
        cells = [cell.strip() for cell in re.search(rf"\| {label} \|(.*)\|", section)[1].split("|")]  # type: ignore[index]
        assert re.search(r"\d", cells[0]) and re.search(r"\d", cells[1]) and re.fullmatch(r"[+-]\d+ %", cells[2])
    assert rate["code"] in section.replace("\\", "")


def test_a_run_that_somebody_stopped_keeps_its_plan_when_it_goes_on(bench: Bench) -> None:
    run_dir = bench.interrupted(at("checkpoint", step=4))
    before = (run_dir / "plan.json").read_bytes()
    write_rows(bench.root / "other.jsonl", sums(3))
    bench.resume(run_dir)
    assert (run_dir / "plan.json").read_bytes() == before
    assert not bench.seen("plan") and len([event for event in all_events(run_dir) if event["event"] == "plan"]) == 1


def test_the_second_run_of_a_workspace_is_corrected_by_the_first(bench: Bench) -> None:
    first, second = (plan_of(bench.train().run_dir) for _ in range(2))
    assert first["correction"] == 1 and not any("earlier run" in note for note in first["notes"])
    assert second["correction"] != 1 and 0.5 <= second["correction"] <= 2
    assert any("1 earlier run " in note and f"{second['correction']:.2f}" in note for note in second["notes"])
    assert "learned from 1 earlier run" in second["cost"]["efficiency_source"]
    measured = json.loads((bench.newest() / "metrics.json").read_text())["peak_memory_bytes"]
    error = [abs(plan["memory_bytes"] - measured) for plan in (first, second)]
    assert error[1] <= error[0]


# Batches that need far more memory than one of their examples.
WIDE: dict[str, Any] = {
    "training__batch_size": 256,
    "training__gradient_accumulation": 1,
    "data__max_length": 512,
    "data__eval_fraction": 0.0,
    "training__max_steps": 1,
    "training__speed": "reference",  # the fast path cuts so many rows into small passes
}


def long_rows(bench: Bench) -> None:
    write_rows(bench.data, [{key: text * 10 for key, text in row.items()} for row in sums(300)])


def test_what_the_data_room_counts_is_said_once(bench: Bench) -> None:
    write_rows(bench.data, [{"instruction": f"Count from {n}.", "output": f"{n}, and so on. " * (1 + n % 40)} for n in range(40)])
    run_dir = bench.train(data__max_length=64, data__eval_fraction=0.0, training__max_steps=1).run_dir
    assert "ANSWERS_TRUNCATED" in {finding["code"] for finding in plan_of(run_dir)["findings"]}
    codes = [event["code"] for event in bench.events if event["event"] in ("finding", "warning")]
    assert "ANSWERS_TRUNCATED" not in codes and codes.count("ANSWERS_CUT") == 1


# --- refusals -----------------------------------------------------------------------------------------


def test_a_run_that_cannot_fit_does_not_start_and_the_fix_it_names_would_fit(
    bench: Bench, tiny_machine: Callable[[int], None]
) -> None:
    long_rows(bench)
    settings: dict[str, Any] = {**WIDE, "training__gradient_checkpointing": "off"}
    config = bench.config(**settings)
    least = predicted_bytes(bench, bench.config(**{**settings, "training__batch_size": 8}))
    most = predicted_bytes(bench, config)
    capacity = round(least * 1.3)
    assert most > 1.15 * capacity
    tiny_machine(capacity)
    with pytest.raises(HardwareError) as raised:
        bench.train(config)
    error = raised.value
    assert error.code == "MEMORY_WONT_FIT" in CODES
    assert f"{most / 1e9:.1f} GB" in error.message and f"{capacity / 1e9:.1f} GB" in error.message
    assert phases(bench) == ["checking"] and bench.seen("failed", code="MEMORY_WONT_FIT")
    assert plan_of(bench.newest())["verdict"] == "no"
    fix = dict(part.split("=", 1) for part in shlex.split(error.remedy or "") if re.match(r"[a-z_]+\.[a-z_]+=", part))
    assert fix and "training.memory_check: warn" in (error.remedy or "")
    applied = {
        key.replace(".", "__"): json.loads(value.rstrip(".")) if value[:1].isdigit() else value.rstrip(".")
        for key, value in fix.items()
    }
    result = bench.train(bench.config(**{**settings, **applied}))
    assert result.status == "succeeded" and plan_of(result.run_dir)["verdict"] in ("fits", "tight")


def test_a_machine_far_too_small_gets_a_refusal_too(bench: Bench, tiny_machine: Callable[[int], None]) -> None:
    tiny_machine(1_000_000)
    with pytest.raises(HardwareError) as raised:
        bench.train()
    assert raised.value.code == "MEMORY_WONT_FIT" and raised.value.remedy and "loading" not in phases(bench)


def test_who_asks_for_a_warning_only_gets_the_run(bench: Bench, tiny_machine: Callable[[int], None]) -> None:
    tiny_machine(1_000_000)
    result = bench.train(training__memory_check="warn")
    assert result.status == "succeeded" and plan_of(result.run_dir)["verdict"] == "no"
    assert [event["verdict"] for event in bench.seen("plan")] == ["no"]


def test_a_batch_that_can_be_halved_is_not_refused_under_retry(bench: Bench, tiny_machine: Callable[[int], None]) -> None:
    long_rows(bench)
    settings = WIDE
    one = predicted_bytes(bench, bench.config(**{**settings, "training__batch_size": 1}))
    all_of_it = predicted_bytes(bench, bench.config(**settings))
    capacity = round(one * 1.35)
    assert all_of_it > 1.15 * capacity
    tiny_machine(capacity)
    with pytest.raises(HardwareError):
        bench.train(**settings, training__oom="stop")
    assert bench.train(**settings, training__oom="retry").status == "succeeded"
    tiny_machine(round(one / 2))  # where not even one example fits, it is
    with pytest.raises(HardwareError) as raised:
        bench.train(**settings, training__oom="retry")
    assert raised.value.code == "MEMORY_WONT_FIT"


def test_kto_is_not_halved_to_a_batch_its_loss_refuses(bench: Bench) -> None:
    training = bench.config(training__batch_size=2).training
    assert smaller_batch(training, least=2) is None
    halved = smaller_batch(training, least=1)
    assert halved is not None and (halved.batch_size, halved.effective_batch) == (1, training.effective_batch)


# --- a prediction that cannot be made -----------------------------------------------------------------


def test_targets_that_do_not_exist_are_told_by_the_model_not_the_prediction(bench: Bench) -> None:
    with pytest.raises(Exception) as raised:
        bench.train(method__target_modules=["no_such_layer"])
    assert getattr(raised.value, "code", "") != "MEMORY_WONT_FIT" and "no_such_layer" in str(raised.value)
    assert "loading" in phases(bench)
    [warning] = bench.seen("warning", code="PLAN_FAILED")
    assert "no_such_layer" in warning["message"] and not (bench.newest() / "plan.json").exists()


@pytest.mark.parametrize("kind", ["lora", "full", "ia3", "prefix"])
def test_every_method_is_planned(bench: Bench, kind: str) -> None:
    result = bench.train(method__kind=kind, method__num_virtual_tokens=4, training__max_steps=1)
    assert plan_of(result.run_dir)["memory_bytes"] > 0 and not bench.seen("warning", code="PLAN_FAILED")


def test_a_failed_prediction_is_a_warning(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetuneflow.errors import ModelError

    def failing(*_: Any, **__: Any) -> Any:
        raise ModelError("MODEL_UNSUPPORTED_ARCH", "The config has no hidden_size.")

    monkeypatch.setattr(preflight, "look", failing)
    result = bench.train(training__max_steps=1)
    [warning] = bench.seen("warning", code="PLAN_FAILED")
    assert result.status == "succeeded" and "no hidden_size" in warning["message"]
    assert not (result.run_dir / "plan.json").exists() and not bench.seen("plan")


def test_damaged_plans_of_earlier_runs_do_not_stop_a_run(bench: Bench) -> None:
    first = bench.train(training__max_steps=1).run_dir
    for content in ("{", "[]", '{"memory": 3}', "[" * 100_000):
        (first / "plan.json").write_text(content)
        assert bench.train(training__max_steps=1).status == "succeeded"
        bench.newest().joinpath("plan.json").unlink()


def test_a_mistake_in_the_prediction_does_not_stop_a_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("finetuneflow.training.preflight.look", broken)
    assert bench.train(training__max_steps=2).status == "succeeded"
    assert [warning["code"] for warning in bench.seen("warning")].count("PLAN_FAILED") == 1
