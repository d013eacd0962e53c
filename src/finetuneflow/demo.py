"""`ftf demo`: what instruction tuning does, shown on the bundled model in a few minutes.

The base model has read facts and has never seen a question asked. The tuning set teaches the form of an
answer on some entities; the acceptance suite asks about others. So what passes afterwards was known
before: tuning made it answer.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from finetuneflow.config import Origin, RunConfig, build_config
from finetuneflow.terminal import RunView, console, human_time, percent, table
from finetuneflow.workspace import Workspace

# Settings found on the development suite, three seeds; see models/starter/CARD.md.
SETTINGS: dict[str, Any] = {
    "name": "demo",
    "model": {"base": "starter"},
    "data": {"max_length": 256},
    "method": {"kind": "lora", "r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"},
    "training": {
        "learning_rate": 3e-3,
        "scheduler": "linear",
        "warmup_ratio": 0.06,
        "weight_decay": 0.0,
        "batch_size": 32,
        "gradient_accumulation": 1,
        "eval_batch_size": 32,
        "group_by_length": True,
        "max_steps": 240,
        "log_steps": 5,
        "eval_steps": 80,
        "save_steps": 80,
    },
    "evaluation": {"samples": 6, "max_new_tokens": 32, "suite": "starter"},
}
SHOWN_ANSWERS = 8


def run_demo(workspace: Workspace, *, seed: int = 0, quiet: bool = False) -> dict[str, Any]:
    """Tune, evaluate, compare, export; returns `{base_pass, tuned_pass, prompts, train_seconds, run}` (shares from 0 to 1)."""
    from finetuneflow.evaluation.compare import Comparison, Forgetting, compare_suites, measure_forgetting
    from finetuneflow.evaluation.suite import load_suite, run_suite
    from finetuneflow.export import export
    from finetuneflow.inference import load_generator
    from finetuneflow.models.starter import starter_path
    from finetuneflow.training.run import train
    from finetuneflow.views import show_comparison, show_export, show_suite
    from finetuneflow.workspace import write_json

    say = (lambda *a, **k: None) if quiet else console.print
    began = time.monotonic()
    suite = load_suite(starter_path() / "acceptance.yaml")
    config, origins = demo_config(workspace, seed=seed)

    say(_heading(1, f"Tuning the bundled model on {count_lines(Path(config.data.train[0])):,} short conversations"))
    with RunView(quiet=quiet) as view:
        result = train(config, workspace=workspace, origins=origins, sinks=[view])

    say(_heading(2, f"Asking both the same {len(suite.prompts)} questions, none of them in the tuning set"))
    tuned = load_generator(result.run_dir)
    base = tuned.view(None, name="base")
    answers = {"base": run_suite(base, suite), "tuned": run_suite(tuned, suite)}
    for name, outcome in answers.items():
        write_json(result.run_dir / "evals" / f"acceptance-{name}.json", outcome.to_dict())
        if not quiet:
            show_suite(outcome, title=name) if name == "tuned" else say(
                f"{name}: {outcome.passed} of {len(outcome.items)} passed"
            )
    say(_answers(answers))

    say(_heading(3, "Is it better? And what was forgotten?"))
    forgetting: Forgetting = measure_forgetting(base, tuned)
    comparison: Comparison = compare_suites(answers["base"], answers["tuned"], names=("base", "tuned"))
    if not quiet:
        show_comparison(comparison, items=0)
    say(
        f"general text: perplexity {forgetting.a_perplexity:.1f} -> {forgetting.b_perplexity:.1f} "
        f"({forgetting.loss_change:+.1%} bits per byte; above zero is forgetting)"
    )

    say(_heading(4, "Exporting the adapter, checked by loading it again"))
    package = export(result.run_dir, to="adapter")
    if not quiet:
        show_export(package)

    summary = {
        "base_pass": answers["base"].pass_share,
        "tuned_pass": answers["tuned"].pass_share,
        "prompts": len(suite.prompts),
        "train_seconds": round(result.metrics["train_runtime"], 2),
        "run": result.run_dir.name,
    }
    say(
        f"\n[bold]Base model {percent(summary['base_pass'])}, tuned model {percent(summary['tuned_pass'])}[/] of {summary['prompts']} prompts; "
        f"trained in {human_time(summary['train_seconds'])}, all in {human_time(time.monotonic() - began)}."
    )
    say(f"Report: {result.run_dir / 'report.md'}   loss curve: {package.dir / 'train_loss.png'}", style="dim", markup=False)
    say(f"Now ask it yourself: ftf chat {result.run_dir.name}", style="dim", markup=False)
    return summary


def demo_config(workspace: Workspace, *, seed: int) -> tuple[RunConfig, dict[str, Origin]]:
    """The demo's run file; writes its tuning and validation sets into the workspace."""
    from finetuneflow.models.starter import tuning

    folder = workspace.root / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    train, validation = folder / "tuning.jsonl", folder / "validation.jsonl"
    tuning.write(train, tuning.examples(split="tuning", seed=tuning.DEFAULT_SEED + seed, count=tuning.NUM_TRAINING_EXAMPLES))
    tuning.write(
        validation, tuning.examples(split="development", seed=tuning.DEFAULT_SEED + seed, count=tuning.NUM_VALIDATION_EXAMPLES)
    )
    return build_config(SETTINGS, [f"data.train={train}", f"data.eval={validation}", f"training.seed={42 + seed}"], where="demo")


def count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _heading(number: int, text: str) -> str:
    return f"\n[bold]{number}. {text}[/]"


def _answers(answers: dict[str, Any]) -> Any:
    """Some questions with both answers, one per tag, so that each kind is seen."""
    seen: set[str] = set()
    rows: list[tuple[str, ...]] = []
    for before, after in zip(answers["base"].items, answers["tuned"].items, strict=True):
        kind = " ".join(after.tags)
        if kind not in seen and len(rows) < SHOWN_ANSWERS:
            seen.add(kind)
            rows.append((after.prompt, before.answer[:60], after.answer[:60], "✓" if after.passed else "✗"))
    return table(None, ["asked", "base answers", "tuned answers", ""], rows)
