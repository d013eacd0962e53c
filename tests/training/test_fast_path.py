"""Runs on the fast path are the runs of the plain path: curves, weights, resuming, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuneflow.data.batches import IGNORED, StepCollator
from models.tiny import save_tiny
from training.test_trainer import ONE_STEP, Prepared, fresh_model
from training.workbench import Bench, assert_same_result, at, lines, weights

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"method__kind": "lora", "method__dropout": 0.0},
    "full": {"method__kind": "full", "training__learning_rate": 1e-4},
}
# Several packed rows to a step, and dropout that would show another order of random numbers.
PACKED: dict[str, Any] = {"training__token_budget": 100, "method__dropout": 0.3, "training__load_best": False}


def curve(bench: Bench, **settings: Any) -> list[float]:
    run = bench.train(training__log_steps=1, **settings)
    return [line["loss"] for line in run.metrics["train_loss_curve"]]


def decision(bench: Bench, setting: str) -> dict[str, Any]:
    (found,) = bench.seen("decision", setting=setting)
    return found


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    adapter = run_dir / "adapter" / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else run_dir / "model" / "model.safetensors")


def assert_near(one: Path, other: Path, *, atol: float) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys() and first
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=atol, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_are_those_of_the_plain_path(bench: Bench, kind: str) -> None:
    settings = {**KINDS[kind], "training__max_steps": 10, "training__load_best": False}
    plain = curve(bench, training__speed="reference", **settings)
    reference, evaluated = bench.newest(), [line[3:] for line in lines(bench.newest()) if len(line) == 7 and line[0] in (4, 8)]
    assert decision(bench, "training.speed")["value"] == "reference"
    fast = curve(bench, training__token_budget=150, **settings)
    said = decision(bench, "training.speed")["reason"]
    assert "packed" in said and "attention modules fused" in said
    assert len(plain) == 10 and plain[-1] < plain[0]
    assert fast == pytest.approx(plain, abs=2e-5)
    assert_near(bench.newest(), reference, atol=5e-5)
    again = [line[3:] for line in lines(bench.newest()) if len(line) == 7 and line[0] in (4, 8)]
    assert len(again) == len(evaluated) > 0
    for one, other in zip(again, evaluated, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_steps_overlay_those_of_the_plain_path(bench: Bench, kind: str, seed: int) -> None:
    """Rounding grows along a run, by far less than a change of seed moves the curve."""
    settings = {
        **KINDS[kind],
        "training__max_steps": 200,
        "training__epochs": 1000,
        "training__eval_steps": 1000,
        "training__save_steps": 1000,
    }
    plain = curve(bench, training__speed="reference", training__seed=seed, **settings)
    fast = curve(bench, training__seed=seed, **settings)
    assert len(plain) == 200 and plain[-1] < plain[0] - 0.15
    assert max(abs(one - other) for one, other in zip(plain, fast, strict=True)) < 1e-4
    other = curve(bench, training__seed=seed + 1, **settings)
    assert max(abs(one - two) for one, two in zip(plain, other, strict=True)) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_neither_the_batch_nor_the_budget_changes_a_run_of_the_same_rows(bench: Bench, kind: str) -> None:
    curves = []
    for batch, accumulation, budget in ((1, 8, 40), (1, 8, 500), (8, 1, 120), (4, 2, None)):
        settings = {**KINDS[kind], "training__batch_size": batch, "training__gradient_accumulation": accumulation}
        curves.append(curve(bench, training__max_steps=4, training__token_budget=budget, **settings))
    for other in curves[1:]:
        assert other == pytest.approx(curves[0], abs=1e-5)


def test_budgets_cut_a_step_into_that_many_micro_batches(bench: Bench) -> None:
    """Or the test above would compare a run with itself."""
    counts = []
    for budget in (40, 150, 800):
        run = Prepared(
            bench, **ONE_STEP, training__batch_size=8, training__gradient_accumulation=1, training__token_budget=budget
        )
        rows = [run.materials.prepared.train[i] for i in range(8)]
        step = run.trainer.data_collator(rows)
        assert all("lengths" in micro_batch for micro_batch in step["micro_batches"])
        counts.append(len(step["micro_batches"]))
    assert counts[0] > counts[1] > counts[2] == 1


@pytest.mark.parametrize("kind", ["lora", "full", "qlora"])
def test_a_resumed_packed_run_equals_an_uninterrupted_one_bit_for_bit(bench: Bench, tmp_path: Path, kind: str) -> None:
    """With dropout in the adapter and, trained in full, in the attention."""
    settings: dict[str, Any] = {**PACKED, "method__kind": kind}
    if kind == "full":
        settings |= {"training__learning_rate": 1e-4, "model__base": str(with_attention_dropout(tmp_path))}
    straight = bench.train(**settings).run_dir
    assert "packed behind one another" in decision(bench, "training.speed")["reason"]
    resumed = bench.interrupted(at("log", step=9), **settings)
    bench.resume(resumed)
    assert_same_result(straight, resumed)


def with_attention_dropout(folder: Path) -> Path:
    base = save_tiny(folder / "dropping", "llama", hidden=32)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}))
    return base


def test_evaluating_in_between_changes_no_weight(bench: Bench) -> None:
    settings = {**PACKED, "training__max_steps": 6, "training__save_steps": 1000}
    often = bench.train(**settings, training__eval_steps=1).run_dir
    assert len(bench.seen("eval")) >= 6
    never = bench.train(**settings, training__eval_steps=1000).run_dir
    assert weights(often) == weights(never)


def test_evaluation_says_of_a_model_trained_in_full_what_the_plain_path_says(bench: Bench) -> None:
    """Trained until it predicts something right."""
    settings = {**KINDS["full"], "training__learning_rate": 1.9e-4, "training__epochs": 12, "training__batch_size": 8,
                "training__gradient_accumulation": 1, "training__eval_steps": 36, "training__save_steps": 36}  # fmt: skip
    found = []
    for speed in ("reference", "auto"):
        bench.train(training__speed=speed, **settings)
        found.append(
            [bench.seen("eval")[-1][name] for name in ("eval_loss", "eval_perplexity", "eval_token_accuracy", "eval_tokens")]
        )
    assert found[0][2] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_in_which_nothing_is_supervised_adds_nothing(bench: Bench, kind: str) -> None:
    """Of eight rows, each alone in its micro-batch, those with an odd id teach nothing."""

    def run(collator: StepCollator) -> Prepared:
        def collate(rows: list[dict[str, Any]]) -> Any:
            return collator([row | {"labels": [IGNORED] * len(row["labels"])} if row["index"] % 2 else row for row in rows])

        made = Prepared(
            bench, collate, **{**ONE_STEP, **KINDS[kind], "training__batch_size": 8, "training__gradient_accumulation": 1}
        )
        made.trainer.train()
        return made

    one, other = run(StepCollator(0, budget=1, packed=True)), run(StepCollator(0, budget=10_000, packed=True))
    assert {row % 2 for row in one.watch.rows[:8]} == {0, 1}
    assert one.logged() == pytest.approx(other.logged(), abs=1e-6)
    for name, gradient in one.watch.gradients[0].items():
        torch.testing.assert_close(gradient, other.watch.gradients[0][name], atol=1e-6, rtol=1e-4)


# --- several processes ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("empty_rank", ["none", "1"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("speed", ["auto", "reference"])
def test_two_processes_share_a_step_as_one_would_take_it(
    bench: Bench, tmp_path: Path, speed: str, kind: str, empty_rank: str
) -> None:
    """The gradients both end with are those of the mean over the supervised tokens of both."""
    settings = {
        **ONE_STEP,
        **KINDS[kind],
        "training__speed": speed,
        "training__token_budget": 60,
        "training__eval_steps": 1000,
        "training__save_steps": 1000,
    }
    port = 20_000 + os.getpid() % 20_000
    script = Path(__file__).with_name("two_processes.py")
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port), str(script)]
    arguments = [str(tmp_path), str(bench.base), str(bench.data), json.dumps(settings), empty_rank]
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, *command, *arguments], capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [rank["fast"] for rank in ranks] == [speed == "auto"] * 2
    micro_batches = [micro_batch for rank in ranks for micro_batch in rank["micro_batches"]]
    assert len(micro_batches) > 2
    assert empty_rank == "none" or not (ranks[1]["micro_batches"][-1]["targets"] != IGNORED).any()
    model = fresh_model(bench.base) if kind == "full" else Prepared(bench, **settings | {"training__speed": "reference"}).model
    model.train()
    total, tokens = torch.zeros(()), 0
    for micro_batch in micro_batches:
        for ids, targets in texts(micro_batch):
            learned = targets != IGNORED
            if learned.any():
                logits = model(input_ids=ids[None]).logits[0][learned]
                total = total + torch.nn.functional.cross_entropy(logits, targets[learned], reduction="sum")
                tokens += int(learned.sum())
    (total / tokens).backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for rank in ranks:
        assert rank["gradients"].keys() == wanted.keys()
        for name, gradient in rank["gradients"].items():
            torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-4)


def texts(micro_batch: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if "lengths" in micro_batch:
        sides = (micro_batch[name][0].split(micro_batch["lengths"]) for name in ("input_ids", "targets"))
        return list(zip(*sides, strict=True))
    masks = micro_batch["attention_mask"].bool()
    return [(ids[m], targets[m]) for ids, targets, m in zip(micro_batch["input_ids"], micro_batch["targets"], masks, strict=True)]
