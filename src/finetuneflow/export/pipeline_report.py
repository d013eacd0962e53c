"""`report.md` of a pipeline, and the lineage of runs as a text tree. The terminal shows the same record (`views.py`).

read_pipeline_record(directory)   what every stage was, took and changed
write_pipeline_report(directory)  the same for people
family_tree(run_dir)              the runs a run descends from, as lines of text
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuneflow.evaluation.compare import Measure, compare_suites
from finetuneflow.evaluation.statistics import Interval, wilson
from finetuneflow.evaluation.suite import SuiteResult
from finetuneflow.events import metric_lines
from finetuneflow.export.record import METHOD_NAMES
from finetuneflow.export.redact import Redactor
from finetuneflow.export.text import cell, duration, inline, size, visible
from finetuneflow.knowledge.objectives import traits_of
from finetuneflow.pipeline_config import BASE, Pipeline, read_pipeline
from finetuneflow.training.lineage import read_lineage
from finetuneflow.training.status import pipeline_summary, stage_runs
from finetuneflow.workspace import read_json_object, write_atomic

# Figures of an evaluation that are shown beside the loss, where an objective has them.
SHOWN_FIGURES = ("accuracy", "reward", "kl")
KL_NOTE = "kl is an estimate from drawn answers: where the divergence is small, it may come out below zero."
TAKEN = {  # by a run from the one above it in a family tree
    "continue": "continues its adapter",
    "merge": "on the base with its adapter merged",
    "stack": "on top of its adapter",
    "model": "on its weights",
}


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of a run's evaluations: at the first one (None where there was only one), and of the weights that were kept."""

    name: str
    before: float | None
    after: float

    def __str__(self) -> str:
        text = f"{self.after:.4g}" if self.before is None else f"{self.before:.4g} → {self.after:.4g}"
        return f"{text} nats" if self.name == "kl" else text


@dataclass(frozen=True, slots=True)
class StageRow:
    """One stage: `summary` as in `state.json`, and the figures of its evaluations."""

    summary: Mapping[str, Any]
    figures: tuple[Figure, ...]

    @property
    def name(self) -> str:
        return str(self.summary["stage"])

    @property
    def trained(self) -> str:
        return f"{self.summary['objective']}, {METHOD_NAMES[self.summary['method']]}"

    @property
    def source(self) -> str:
        start = self.summary["start"]
        return f"{start['kind']}: {start['from']}" if start["from"] else "the base"


@dataclass(frozen=True, slots=True)
class SuiteRow:
    """One model on one suite. `to_before`: against the model it started from; `to_first`: against the first stage that answers."""

    model: str
    suite: str
    passed: int
    prompts: int
    share: Interval
    before: str | None = None
    to_before: Measure | None = None
    to_first: Measure | None = None


@dataclass(frozen=True, slots=True)
class TextRow:
    """One model on the general text. `change`: of its bits per byte against the base, as a share; above zero is forgetting."""

    model: str
    text: str
    perplexity: float
    bits_per_byte: float
    change: float | None


@dataclass(frozen=True, slots=True)
class PipelineRecord:
    summary: Mapping[str, Any]
    base: str
    stages: tuple[StageRow, ...]
    suites: tuple[SuiteRow, ...]
    texts: tuple[TextRow, ...]
    tree: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """`state.json` with what was measured."""
        from dataclasses import asdict

        return {
            **self.summary,
            "base": self.base,
            "stages": [
                {**row.summary, "figures": {f.name: {"before": f.before, "after": f.after} for f in row.figures}}
                for row in self.stages
            ],
            "suites": [asdict(row) for row in self.suites],
            "general_text": [asdict(row) for row in self.texts],
        }


# --- reading ------------------------------------------------------------------------------------------


def read_pipeline_record(directory: Path, summary: Mapping[str, Any] | None = None) -> PipelineRecord:
    """Everything the report tells, from the pipeline's directory and its runs. `summary`: as `pipeline_summary` gave it."""
    pipeline, summary = read_pipeline(directory), summary or pipeline_summary(directory)
    runs = stage_runs(directory)
    measured = {path.stem: read_json_object(path) for path in sorted((directory / "evals").glob("*.json"))}
    stages = tuple(StageRow(found, _figures(runs.get(found["stage"]))) for found in summary["stages"])
    return PipelineRecord(
        summary,
        pipeline.stages[0].config.model.base,
        stages,
        tuple(_suite_rows(pipeline, measured)),
        tuple(_text_rows(pipeline, measured)),
        tuple(pipeline_tree(pipeline, runs)),
    )


def _figures(run_dir: Path | None) -> tuple[Figure, ...]:
    if run_dir is None:
        return ()
    kept = read_json_object(run_dir / "metrics.json").get("eval_metrics") or {}
    lines = metric_lines(run_dir / "events.jsonl", "eval")
    found = []
    for name in ("loss", *SHOWN_FIGURES):
        values = [line[f"eval_{name}"] for line in lines if isinstance(line.get(f"eval_{name}"), int | float)]
        if isinstance(after := kept.get(f"eval_{name}"), int | float):
            found.append(Figure("eval loss" if name == "loss" else name, values[0] if len(values) > 1 else None, after))
    return tuple(found)


def _measured_models(pipeline: Pipeline, measured: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """(model, the model it started from) of everything that was measured, the base first."""
    models: list[tuple[str, str | None]] = [(BASE, None)]
    models += [(stage.name, stage.start.parent or BASE) for stage in pipeline.stages if stage.answers]
    return [(name, before) for name, before in models if name in measured]


def _suite_rows(pipeline: Pipeline, measured: Mapping[str, Any]) -> list[SuiteRow]:
    models = _measured_models(pipeline, measured)
    first = next((name for name, _ in models if name != BASE), None)
    rows = []
    suites: Mapping[str, Any] = measured[models[0][0]]["suites"] if models else {}
    for suite in suites:
        results = {
            name: SuiteResult.from_dict(measured[name]["suites"][suite])
            for name, _ in models
            if suite in measured[name]["suites"]
        }
        for name, before in models:
            if name not in results:
                continue
            result = results[name]
            row = SuiteRow(
                model=name,
                suite=suite,
                passed=result.passed,
                prompts=len(result.items),
                share=wilson(result.passed, len(result.items)),
                before=before,
                to_before=_compared(results, before, name),
                to_first=_compared(results, first, name) if first not in (name, before) and name != BASE else None,
            )
            rows.append(row)
    return rows


def _compared(results: Mapping[str, SuiteResult], before: str | None, after: str) -> Measure | None:
    if before is None or before not in results:
        return None
    return compare_suites(results[before], results[after], names=(before, after)).measures[0]


def _text_rows(pipeline: Pipeline, measured: Mapping[str, Any]) -> list[TextRow]:
    rows = []
    base = (measured.get(BASE, {}).get("general") or {}).get("bits_per_byte")
    for name, _ in _measured_models(pipeline, measured):
        if found := measured[name].get("general"):
            bits = found["bits_per_byte"]
            change = bits / base - 1 if base and name != BASE else None
            rows.append(TextRow(name, found["text"], found["perplexity"], bits, change))
    return rows


# --- the report -----------------------------------------------------------------------------------------


def write_pipeline_report(directory: Path, summary: Mapping[str, Any] | None = None) -> Path:
    """Write `report.md` into the pipeline's directory and return its path. Needs no torch."""
    path = directory / "report.md"
    write_atomic(path, pipeline_report_text(read_pipeline_record(directory, summary), Redactor()))
    return path


def pipeline_report_text(record: PipelineRecord, redactor: Redactor) -> str:
    """The whole report as Markdown."""
    summary = record.summary
    head = [
        f"# Pipeline {inline(str(summary['pipeline']))}",
        "",
        f"- Status: {summary['status']}" + (f". {inline(summary['reason'])}" if summary.get("reason") else ""),
        f"- Base model: {inline(record.base)}",
        f"- Time: {duration(summary['seconds'])}, measuring included",
    ]
    sections = [head, _stage_section(record), _suite_section(record), _text_section(record), _start_section(record)]
    sections.append(["## Lineage", "", "```", *record.tree, "```"])
    return redactor.text("\n\n".join("\n".join(lines) for lines in sections if lines) + "\n")


def _stage_section(record: PipelineRecord) -> list[str]:
    names = [name for name in ("eval loss", *SHOWN_FIGURES) if any(f.name == name for row in record.stages for f in row.figures)]
    lines = [
        "## Stages",
        "",
        f"| stage | trained | from | steps | time | peak memory | {''.join(f'{name} | ' for name in names)}gates | status |",
        "|---|---|---|--:|--:|--:|" + "--:|" * len(names) + "---|---|",
    ]
    for row in record.stages:
        figures = {figure.name: str(figure) for figure in row.figures}
        cells = [*stage_cells(row), *(figures.get(name, "") for name in names), gates_text(row), row.summary["status"]]
        lines.append("| " + " | ".join(cell(str(text)) for text in cells) + " |")
    if names:
        lines += ["", "Figures of evaluations: at the first one → of the weights that were kept."]
    if "kl" in names:
        lines[-1] += f" {KL_NOTE}"
    return lines


def stage_cells(row: StageRow) -> list[str]:
    """Name, what was trained, from what, steps, time, peak memory."""
    found = row.summary
    return [
        row.name,
        row.trained,
        row.source,
        f"{found['steps']:,}" if found.get("steps") is not None else "",
        duration(found["train_runtime"]) if found.get("train_runtime") is not None else "",
        size(found["peak_memory_bytes"]) if found.get("peak_memory_bytes") is not None else "",
    ]


def gates_text(row: StageRow) -> str:
    """Each gate with its outcome and what was found."""
    words = []
    for gate in row.summary["gates"]:
        outcome = "passed" if gate["passed"] else "not passed, accepted" if gate["accepted"] else "not passed"
        words.append(f"{gate['gate']}: {outcome} ({gate['found']})")
    return "; ".join(words)


def _suite_section(record: PipelineRecord) -> list[str]:
    if not record.suites:
        return []
    lines = [
        "## Acceptance",
        "",
        "| suite | model | passed | share (95 %) | change to where it started (95 %) | change to the first stage (95 %) |",
    ]
    lines.append("|---|---|--:|---|---|---|")
    for row in record.suites:
        cells = [row.suite, row.model, f"{row.passed} of {row.prompts}", share_text(row), change_text(row.to_before, row.before)]
        lines.append("| " + " | ".join(cell(text) for text in [*cells, change_text(row.to_first)]) + " |")
    note = "Shares with Wilson's interval; changes in percentage points with the paired bootstrap over the prompts, answered greedily."
    return [*lines, "", note]


def share_text(row: SuiteRow) -> str:
    return f"{100 * row.share.mean:.1f} % ({100 * row.share.low:.1f} to {100 * row.share.high:.1f})"


def change_text(measure: Measure | None, to: str | None = None) -> str:
    """`+12.0 (+5.0 to +19.0) better than sft`."""
    if measure is None:
        return ""
    change = measure.difference
    figures = f"{100 * change.mean:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})"
    return f"{figures} {measure.verdict}" + (f", from {to}" if to else "")


def _text_section(record: PipelineRecord) -> list[str]:
    if not record.texts:
        return []
    lines = [
        "## Forgetting",
        "",
        f"General text: {inline(record.texts[0].text)}.",
        "",
        "| model | perplexity | bits per byte | change |",
        "|---|--:|--:|--:|",
    ]
    lines += [
        f"| {cell(row.model)} | {row.perplexity:.3f} | {row.bits_per_byte:.4f} | {'' if row.change is None else f'{100 * row.change:+.1f} %'} |"
        for row in record.texts
    ]
    return [*lines, "", "Change of the bits per byte against the base; above zero is forgetting."]


def _start_section(record: PipelineRecord) -> list[str]:
    lines = ["## Why each stage starts where it does", ""]
    return lines + [f"- {row.name}: {inline(row.summary['start']['reason'])}" for row in record.stages]


# --- lineage --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Person:
    """A run in a family tree: what is said of it, and the results it took: (how, from whom)."""

    label: str
    taken: tuple[tuple[str, str], ...]


def family_tree(run_dir: Path) -> list[str]:
    """The base, and every run from there to this one, as lines of text; empty where nothing is recorded."""
    people: dict[str, _Person] = {}
    todo, roots = [run_dir], {}
    while todo:
        folder = todo.pop()
        lineage = read_lineage(folder)
        if folder.name in people or not lineage:
            continue
        parents = [parent for parent in lineage.get("parents") or [] if isinstance(parent, dict)]
        people[folder.name] = _person(lineage, parents)
        roots[folder.name] = str(lineage.get("base"))
        todo += [folder.parent / str(parent["run"]) for parent in parents if parent.get("run")]
    if run_dir.name not in people:
        return []
    return draw_family(people, roots)


def pipeline_tree(pipeline: Pipeline, runs: Mapping[str, Path]) -> list[str]:
    """The family of a pipeline's stages, those that have not begun included."""
    people, roots = {}, {}
    for stage in pipeline.stages:
        run_dir = runs.get(stage.name)
        name = run_dir.name if run_dir else stage.name
        parent = stage.start.parent
        taken: list[tuple[str, str]] = [(stage.start.kind, runs[parent].name if parent in runs else parent)] if parent else []
        for text in stage.config.reinforcement.reward if traits_of(stage.config).draws else ():
            kind, _, named = text.partition(":")
            if kind == "stage":
                taken.append(("reward", runs[named].name if named in runs else named))
        label = f"{stage.config.training.objective}, {METHOD_NAMES[stage.config.method.kind]}"
        people[name] = _Person(label if run_dir else f"{label}, not begun", tuple(taken))
        roots[name] = stage.config.model.base
    return draw_family(people, roots)


def _person(lineage: Mapping[str, Any], parents: Sequence[Mapping[str, Any]]) -> _Person:
    method = METHOD_NAMES.get(str(lineage.get("method")), str(lineage.get("method")))
    taken = tuple((str(parent.get("how")), str(parent.get("run") or parent.get("path"))) for parent in parents)
    return _Person(f"{lineage.get('objective')}, {method}", taken)


def draw_family(people: Mapping[str, _Person], roots: Mapping[str, str]) -> list[str]:
    """Lines of a tree: bases at the left, below each what was trained on it, one step further in what was trained on that."""
    children: dict[str, list[str]] = {}
    tops: dict[str, list[str]] = {}
    for name, person in people.items():
        parent = next((who for how, who in person.taken if how != "reward"), None)
        if parent in people:
            children.setdefault(str(parent), []).append(name)
        else:
            tops.setdefault(parent or roots[name], []).append(name)
    lines: list[str] = []

    def draw(names: Sequence[str], indent: str) -> None:
        for name in names:
            last = name == names[-1]
            lines.append(f"{indent}{'└─' if last else '├─'} {_described(name, people[name])}")
            draw(sorted(children.get(name, [])), indent + ("   " if last else "│  "))

    for base, names in tops.items():
        lines.append(" ".join(visible(Path(base).name if Path(base).is_absolute() else base).split()))
        draw(sorted(names), "")
    return lines


def _described(name: str, person: _Person) -> str:
    words = [f"rewarded by {Path(who).name}" if how == "reward" else TAKEN.get(how, how) for how, who in person.taken]
    return " ".join(visible(f"{name} ({'; '.join([person.label, *words])})").split())
