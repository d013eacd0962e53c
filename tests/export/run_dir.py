"""A finished run made by hand: the folder that training leaves, with a real adapter on a tiny model."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from finetuneflow.config import build_config, dump_config
from finetuneflow.events import EventLog
from finetuneflow.workspace import sha256_file, write_json
from models.tiny import CHATML, save_tiny, tiny_tokenizer

EVAL_ROWS = [
    {"messages": [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "It is 7."}]},
    {"messages": [{"role": "user", "content": "Quelle est la capitale ?"}, {"role": "assistant", "content": "Paris."}]},
]
SAMPLES = [
    {"instruction": "What is 3 + 4?", "input": "", "expected_output": "It is 7.", "model_output": "It is 7.", "output_length": 8},
    {
        "instruction": "List | pipes",
        "input": "a\nb",
        "expected_output": "one\ntwo",
        "model_output": "<b>x</b> \x1b[31mred",
        "output_length": 12,
    },
]


def make_run(
    root: Path, kind: str = "lora", *, architecture: str = "llama", dtype: str = "float32", steps: int = 400, **settings: Any
) -> Path:
    """Write a run of method `kind` below `root` and return its folder; `settings` are `section__key` overrides."""
    base = save_tiny(root / "base", architecture, hidden=64)  # 4-bit products on the CPU want multiples of 32
    if dtype != "float32":
        _store_as(base, dtype)
    run_dir = root / "runs" / f"{kind}-20260101-001"
    (run_dir / "data").mkdir(parents=True)
    overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in settings.items()]
    values = {
        "name": kind,
        "model": {"base": str(base)},
        "data": {"train": ["train.jsonl"]},
        "method": {"kind": kind, "r": 4, "alpha": 8},
    }
    config, origins = build_config(values, overrides)
    (run_dir / "run.yaml").write_text(dump_config(config, origins))
    _save_weights(run_dir, base, kind)
    tiny_tokenizer().save_pretrained(run_dir / "tokenizer")
    if kind == "full":
        tiny_tokenizer().save_pretrained(run_dir / "model")
    write_json(run_dir / "template.json", {"name": "tokenizer", "source": CHATML})
    _write_data(run_dir)
    _write_events(run_dir / "events.jsonl", steps)
    _write_figures(run_dir)
    return run_dir


def _store_as(base: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    model.save_pretrained(base)


def _save_weights(run_dir: Path, base: Path, kind: str) -> None:
    """An adapter whose effect is plain to see: its weights are pushed away from their initial zeros."""
    import torch
    from transformers import AutoModelForCausalLM

    from finetuneflow.models.adapters import AdapterSpec, attach_adapter

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if kind == "full":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        model.save_pretrained(run_dir / "model")
        return
    spec = AdapterSpec(kind="lora" if kind == "qlora" else kind, r=4, alpha=8, target_modules="all-linear")  # type: ignore[arg-type]
    adapted = attach_adapter(model, spec)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(run_dir / "adapter")


def _write_data(run_dir: Path) -> None:
    eval_path = run_dir / "data/eval.jsonl"
    eval_path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in EVAL_ROWS))
    train = {"file": "/somewhere/private/train.jsonl", "sha256": "ab" * 32, "bytes": 15_689}
    held_out = {"file": "eval.jsonl", "sha256": sha256_file(eval_path), "bytes": 211}
    manifest = {"train": [train], "eval": [held_out], "train_examples": 118, "eval_examples": 2, "avg_tokens": 41.25}
    write_json(run_dir / "data/manifest.json", manifest)


def _write_events(path: Path, steps: int) -> None:
    """A plausible run: noisy falling train loss, an eval loss that turns up again after three quarters."""
    noise = random.Random(0)
    with EventLog(path) as log:
        log.emit("started", attempt=1, run="lora", pid=1)
        for step in range(5, steps + 1, 5):
            share = step / steps
            loss = 0.9 + 1.9 * math.exp(-5 * share) + noise.gauss(0, 0.09)
            log.emit("log", step=step, total_steps=steps, loss=loss, learning_rate=2e-4 * (1 - share), grad_norm=0.6)
            if step % 50 == 0:
                log.emit(
                    "eval",
                    step=step,
                    total_steps=steps,
                    eval_loss=1.05 + 1.6 * math.exp(-5 * share) + max(0.0, share - 0.7) * 0.3,
                )
        log.emit("complete", total_steps=steps)


def _write_figures(run_dir: Path) -> None:
    metrics = {
        "train_loss": 1.0312, "eval_loss": 1.0873, "perplexity": 2.9663, "train_runtime": 3723.4,
        "train_samples_per_second": 12.5, "best_step": 300, "peak_memory_bytes": 812_000_000, "inference_samples": SAMPLES, "suite": "greetings", "suite_pass_share": 0.925, "suite_prompts": 40,
    }  # fmt: skip
    write_json(run_dir / "metrics.json", metrics)
    hardware = {"gpus": [], "cpu": {"model": "Example CPU 9000"}, "packages": {"torch": "2.13.0", "peft": "0.21.2"}}
    write_json(
        run_dir / "environment.json", {"hardware": hardware, "setup": {"device": "cpu", "threads": 2, "learning_rate": 2e-4}}
    )
