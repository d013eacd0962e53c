"""`report.md`: the run for people, in the structure of the reference, each line told truly or as not measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finetuneflow.events import read_events
from finetuneflow.export.pipeline_report import family_tree
from finetuneflow.export.record import OBJECTIVE_NAMES, RunRecord, Sample, read_run
from finetuneflow.export.redact import Redactor
from finetuneflow.export.text import cell, duration, figure, inline, rate, size
from finetuneflow.knowledge.outcome import compare
from finetuneflow.knowledge.resolve import resolve_on
from finetuneflow.knowledge.values import many
from finetuneflow.training.lineage import read_lineage
from finetuneflow.training.watch import CONCERNS, METRICS
from finetuneflow.workspace import write_atomic


def write_report(run_dir: Path) -> Path:
    """Write `report.md` into the run directory and return its path. Needs no torch."""
    path = run_dir / "report.md"
    write_atomic(path, report_text(read_run(run_dir), Redactor()))
    return path


def report_text(record: RunRecord, redactor: Redactor) -> str:
    """The whole report as Markdown."""
    sections = [
        ["# FineTuneFlow Training Report"],
        _project(record),
        _dataset(record),
        _configuration(record),
        _results(record),
        *([figures] if (figures := _objective(record)) else []),
        _plan(record),
        *([family] if (family := _lineage(record)) else []),
        ["## Sample Outputs", *_sample_table(record.samples)],
    ]
    return redactor.text("\n\n".join("\n".join(lines) for lines in sections) + "\n")


def _project(record: RunRecord) -> list[str]:
    return [
        "## Project",
        f"- Name: {inline(record.name)}",
        f"- Task: {OBJECTIVE_NAMES[record.config.training.objective]}",
        f"- Base Model: {inline(record.config.model.base)}",
    ]


def _dataset(record: RunRecord) -> list[str]:
    """What it was trained on, and what of the files was left out or may mislead."""
    sides = " (both sides)" if record.data.get("form") == "pair" else ""
    return [
        "## Dataset",
        f"- Train examples: {figure(record.data.get('train_examples'))}",
        f"- Eval examples: {figure(record.data.get('eval_examples'))}",
        f"- Avg tokens per example{sides}: {figure(record.data.get('avg_tokens'), 1)}",
        *_warnings(record.data.get("warnings") or ()),
    ]


def _configuration(record: RunRecord) -> list[str]:
    training = record.config.training
    return [
        "## Training Configuration",
        f"- Method: {record.method}",
        f"- Epochs: {training.epochs:g}" + (f" (at most {many(training.max_steps, 'step')})" if training.max_steps else ""),
        f"- Learning rate: {rate(used_learning_rate(record))}",
        f"- LoRA rank: {adapter_size(record)}",
        f"- Max sequence length: {record.config.data.max_length:,}",
        f"- GPU: {inline(record.device)}",
    ]


def used_learning_rate(record: RunRecord) -> float:
    """The peak rate that was used: full fine-tuning may have lowered the one in the run file."""
    setup = record.environment.get("setup", record.environment)
    used = setup.get("learning_rate") if isinstance(setup, dict) else None
    return float(used) if isinstance(used, int | float) else resolve_on(record.config, "cpu", bf16=False).learning_rate


def adapter_size(record: RunRecord) -> str:
    """What stands after "LoRA rank:": rank and alpha, or why there are none."""
    method = record.config.method
    if record.is_low_rank:
        return f"{method.r}, alpha: {method.alpha:g}"
    if method.kind == "prefix":
        return f"none (prefix of {method.num_virtual_tokens} virtual tokens)"
    return f"none ({record.method})"


def _results(record: RunRecord) -> list[str]:
    metrics = record.metrics
    lines = [
        "## Results",
        f"- Final train loss: {figure(metrics.get('train_loss'))}",
        f"- Final eval loss: {figure(metrics.get('eval_loss'))}",
        f"- Perplexity: {figure(metrics.get('perplexity', metrics.get('eval_perplexity')), 3)}",
        f"- Training time: {duration(metrics.get('train_runtime'))}",
    ]
    if record.best_step is not None and record.config.training.load_best:
        lines.append(f"- Weights: those of step {record.best_step:,}, the lowest eval loss")
    return lines


def _objective(record: RunRecord) -> list[str]:
    """What was logged beside the loss: at the beginning, at the end, and on held-out rows. Empty where there is nothing."""
    logged = [line["metrics"] for line in record.log_lines if isinstance(line.get("metrics"), dict)]
    if not logged:
        return []
    names = [name for name in METRICS if any(name in line for line in logged)]
    held_out = record.metrics.get("eval_metrics") or {}
    rows = []
    for name in names:
        values = [line[name] for line in logged if name in line]
        quarter = max(1, len(values) // 4)
        first, last = sum(values[:quarter]) / quarter, sum(values[-quarter:]) / quarter
        rows.append(f"| {name} | {figure(first)} | {figure(last)} | {figure(held_out.get(f'eval_{name}'))} | {METRICS[name]} |")
    return [
        "## Figures of the Objective",
        "First and last: means over a quarter of the log lines. Held out: of the weights that were kept.",
        "",
        "| figure | first | last | held out | meaning |",
        "|---|---|---|---|---|",
        *rows,
        *_warnings(event for event in read_events(record.run_dir / "events.jsonl") if event.get("code") in CONCERNS),
    ]


def _warnings(said: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = [f"- {inline(w['code'])}: {inline(w['message'])} {inline(w['advice'])}" for w in said]
    return ["", "Warnings:", "", *lines] if lines else []


def _plan(record: RunRecord) -> list[str]:
    """What was predicted before the run beside what it took, and what was found in its settings."""
    if not record.plan:
        return ["## Plan and Outcome", "No prediction was made for this run."]
    outcome = compare(record.plan, record.metrics)
    lines = [
        "## Plan and Outcome",
        "| | predicted | measured | error |",
        "|---|---|---|---|",
        f"| Peak memory | {_size(outcome.predicted_bytes)} | {_size(outcome.measured_bytes)} | {_error(outcome.memory_error)} |",
        f"| Training time | {duration(outcome.predicted_seconds)} | {duration(outcome.measured_seconds)} | {_error(outcome.time_error)} |",
        *_energy_rows(record),
    ]
    findings = [finding for finding in record.plan.get("findings") or [] if isinstance(finding, dict)]
    if not findings:
        return [*lines, "", "Nothing was found in its settings."]
    said = [
        f"- {finding.get('level')} {inline(str(finding.get('code')))}: {inline(str(finding.get('found')))}. {inline(str(finding.get('why')))}"
        for finding in findings
    ]
    return [*lines, "", "Found in its settings:", "", *said]


def _energy_rows(record: RunRecord) -> list[str]:
    """Energy and CO2, as far as they were predicted or measured."""
    cost = record.plan.get("cost")
    predicted = cost if isinstance(cost, dict) else {}
    measured = record.metrics.get("energy") or {}
    rows = []
    for label, expected, seen, unit in (("Energy", "energy_kwh", "kwh", "kWh"), ("CO2", "co2_kg", "co2_kg", "kg")):
        cells = [_amount(predicted.get(expected), unit), _amount(measured.get(seen), unit)]
        if any(cell != "not measured" for cell in cells):
            rows.append(f"| {label} | {cells[0].replace('not measured', 'not predicted')} | {cells[1]} | |")
    if source := measured.get("source"):
        rows.append(f"| Measured by | | {inline(str(source))} | |")
    return rows


def _amount(value: object, unit: str) -> str:
    return f"{value:.3g} {unit}" if isinstance(value, int | float) and not isinstance(value, bool) else "not measured"


def _size(num_bytes: int | None) -> str:
    return "not known" if num_bytes is None else size(num_bytes)


def _error(error: float | None) -> str:
    return "" if error is None else f"{100 * error:+.0f} %"


def _lineage(record: RunRecord) -> list[str]:
    """The runs it descends from, what it was trained on and what came out, by their hashes."""
    lineage, tree = read_lineage(record.run_dir), family_tree(record.run_dir)
    if not tree:
        return []
    lines = ["## Lineage", "```", *tree, "```"]
    if lineage.get("pipeline"):
        lines.append(f"- Pipeline: {inline(str(lineage['pipeline']))}, stage {inline(str(lineage['stage']))}")
    lines += [
        f"- Data: {inline(Path(path).name)}, sha256 {inline(digest)}" for path, digest in (lineage.get("data") or {}).items()
    ]
    result = lineage.get("result") or {}
    return [*lines, f"- Result: {inline(str(result['kind']))}, sha256 {inline(str(result['sha256']))}"] if result else lines


def _sample_table(samples: tuple[Sample, ...]) -> list[str]:
    if not samples:
        return ["No samples were generated for this run."]
    rows = [f"| {cell(s.instruction)} | {cell(s.expected)} | {cell(s.output)} |" for s in samples]
    return ["| Instruction | Expected | Model Output |", "|------------|----------|-------------|", *rows]
