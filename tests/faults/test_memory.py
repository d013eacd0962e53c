"""Memory that runs out: explained, or stepped down from at equal effective batch."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuneflow.config import dump_config
from finetuneflow.errors import TrainingError
from finetuneflow.training.trainer import SupervisedTrainer
from training.workbench import Bench, assert_same_result, lines, weights

MORE_THAN_THERE_IS = 1 << 50  # bytes: the allocator's own refusal, whatever the machine


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make every batch of more tokens than `rows` of the longest rows have fail in the allocator, from a step on."""

    def install(rows: int, *, from_step: int = 0) -> None:
        compute = SupervisedTrainer.compute_loss

        def hungry(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            longest = max(self.train_dataset["length"])
            if inputs["input_ids"].numel() > rows * longest and self.state.global_step >= from_step:
                torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)
            return compute(self, model, inputs, *args, **kwargs)

        monkeypatch.setattr(SupervisedTrainer, "compute_loss", hungry)

    return install


def test_running_out_of_memory_is_explained_with_figures_and_ranked_remedies(bench: Bench, scarce: Callable[..., None]) -> None:
    scarce(2)
    with pytest.raises(TrainingError) as caught:
        bench.train(training__batch_size=4, training__gradient_accumulation=1)
    error = caught.value
    assert (
        error.code == "OUT_OF_MEMORY"
        and "GB were used at the peak of" in error.message
        and error.where
        and "allocate" in error.where
    )
    assert (
        error.remedy
        and "training.batch_size=2, training.gradient_accumulation=2; saves" in error.remedy
        and error.remedy.startswith("1. ")
        and "2. " in error.remedy
    )
    assert 0 < error.context["peak_memory_bytes"] < error.context["capacity_bytes"]
    assert bench.seen("failed")[0]["code"] == "OUT_OF_MEMORY" and not (bench.newest() / "traceback.txt").exists()


def test_retrying_steps_down_until_it_fits_and_ends_like_a_run_configured_that_way(
    bench: Bench, scarce: Callable[..., None]
) -> None:
    configured = bench.train(training__batch_size=1, training__gradient_accumulation=4).run_dir
    scarce(1)
    stepped = bench.train(training__batch_size=4, training__gradient_accumulation=1, training__oom="retry").run_dir
    assert [event["value"] for event in bench.seen("decision", setting="training.batch_size")] == [2, 1]
    assert all("effective batch 4" in event["reason"] for event in bench.seen("decision", setting="training.batch_size"))
    assert_same_result(configured, stepped)


def test_the_longest_rows_are_tried_before_the_first_step(bench: Bench, scarce: Callable[..., None]) -> None:
    scarce(2)
    bench.train(training__batch_size=4, training__gradient_accumulation=1, training__oom="retry")
    events = [(event["event"], event.get("setting") or event.get("name")) for event in bench.events]
    assert events.index(("decision", "training.batch_size")) < events.index(("phase", "training"))


def test_trying_the_longest_rows_leaves_no_trace(bench: Bench) -> None:
    settings = {"method__dropout": 0.3}
    assert_same_result(
        bench.train(**settings, training__oom="stop").run_dir, bench.train(**settings, training__oom="retry").run_dir
    )


def test_memory_that_runs_out_late_costs_no_more_than_the_steps_since_the_checkpoint(
    bench: Bench, scarce: Callable[..., None]
) -> None:
    configured = bench.train(training__log_steps=1, method__dropout=0.0)
    scarce(1, from_step=6)
    run = bench.train(training__oom="retry", training__log_steps=1, method__dropout=0.0)
    steps = [event["step"] for event in bench.seen("log")]
    assert steps == [1, 2, 3, 4, 5, 6, *range(5, 13)], "it goes on from the checkpoint of step 4"
    ours, theirs = lines(run.run_dir), lines(configured.run_dir)
    assert [line[3] for line in ours[:12]] == pytest.approx([line[3] for line in theirs[:12]], abs=1e-4)
    assert weights(run.run_dir).keys() == weights(configured.run_dir).keys()


def test_a_micro_batch_of_one_that_does_not_fit_ends_the_retries(bench: Bench, scarce: Callable[..., None]) -> None:
    scarce(0)
    with pytest.raises(TrainingError) as caught:
        bench.train(training__oom="retry")
    assert caught.value.code == "OUT_OF_MEMORY" and "batch_size" not in str(caught.value.remedy)


LIMITED = """
import resource, sys
import finetuneflow.training.trainer, peft, matplotlib.pyplot
from finetuneflow.cli import main
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + {extra}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.argv = ["ftf", "train", sys.argv[1], "--workspace", sys.argv[2], "--json"]
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="this system has no limit on address space")
def test_a_real_limit_on_memory_ends_with_the_explained_error(bench: Bench, tmp_path: Path) -> None:
    """64 rows of 512 tokens through a vocabulary of 512 want far more than the 200 MB that are left."""
    from training.workbench import write_rows

    write_rows(bench.data, [{"instruction": f"Number {n}?", "output": f"{n} " + "all of them " * 35} for n in range(200)])
    config = bench.config(
        data__max_length=512, training__batch_size=64, training__gradient_accumulation=1, data__eval_fraction=0.0
    )
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config, {}))
    command = [sys.executable, "-c", LIMITED.format(extra=200_000_000), str(path), str(tmp_path / "ws")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 6, done.stdout[-800:] + done.stderr[-800:]
    error = json.loads(done.stdout)
    assert error["error_code"] == "OUT_OF_MEMORY" and "training.batch_size=32" in error["context"]["remedy"]
    assert "Traceback" not in done.stderr
