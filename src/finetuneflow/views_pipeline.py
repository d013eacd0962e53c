"""Pipelines as tables: the plan of one, one that ended or stands, and the list of all. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from finetuneflow.terminal import clean, console, human_bytes, human_time, say, table

if TYPE_CHECKING:
    from finetuneflow.export.pipeline_report import PipelineRecord, StageRow, SuiteRow
    from finetuneflow.planning.stages import PipelinePlan

STATUS_STYLES = {
    "succeeded": "green",
    "running": "cyan",
    "gated": "yellow",
    "stopped": "yellow",
    "failed": "red",
    "interrupted": "red",
}
UNKNOWN = "–"
STATUS_MARKS = {"succeeded": "✓", "running": "…", "gated": "!", "stopped": "■", "failed": "✗", "interrupted": "✗", "waiting": "·"}


def show_pipeline_plan(plan: PipelinePlan) -> None:
    """A row per stage, their sums, and why each starts where it does."""
    found = plan.to_dict()
    rows = [
        (
            row["stage"],
            f"{row['objective']}, {row['method']}",
            _source(row["start"]),
            _count(row["steps"]),
            _memory(row),
            _time(row["seconds"]),
            _price(row["price_usd"]),
        )
        for row in found["stages"]
    ]
    total = found["total"]
    memory = human_bytes(total["memory_bytes"]) if total["memory_bytes"] else UNKNOWN
    rows.append(("all", "", "", _count(total["steps"]), memory, _time(total["seconds"]), _price(total["price_usd"])))
    columns = ["stage", "trains", "from", "steps", "memory", "time", "cost"]
    console.print(table(f"Pipeline {clean(plan.name)}", columns, rows, right=(3, 4, 5, 6), whole=(0, 1, 3, 4, 5, 6)))
    say("Memory of all: of the stage that needs most. Measuring between the stages is not counted.", style="dim")
    if blank := [stage.stage.name for stage in plan.stages if not stage.stage.config.data.train]:
        wanted = " ".join(f"--set stages.{name}.data.train=FILE" for name in blank)
        say(f"Steps, time and cost follow from the data: {wanted}", style="dim")
    for row in found["stages"]:
        say(f"  {row['stage']}: {row['start']['reason']}", style="dim")
    for note in dict.fromkeys(note for row in found["stages"] for note in row["notes"]):
        say(f"  · {note}", style="dim")


def _memory(row: dict[str, Any]) -> Any:
    if row["memory_bytes"] is None:
        return UNKNOWN
    style = {"fits": "", "tight": "yellow", "no": "red"}[row["verdict"]]
    return Text(human_bytes(row["memory_bytes"]) + ("" if row["verdict"] == "fits" else f" ({row['verdict']})"), style=style)


def _source(start: dict[str, Any]) -> str:
    return f"{start['kind']}: {start['from']}" if start["from"] else "base"


def _count(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _time(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else human_time(seconds)


def _price(price: float | None) -> str:
    return UNKNOWN if price is None else f"{price:,.2f} $"


def show_pipeline(record: PipelineRecord) -> None:
    """What every stage was, took and changed."""
    from finetuneflow.export.pipeline_report import KL_NOTE

    summary = record.summary
    status = str(summary["status"])
    took = f"  {human_time(summary['seconds'])}" if summary["seconds"] else ""
    console.print(
        Text.assemble(
            ("Pipeline ", "bold"),
            (clean(str(summary["pipeline"])), "bold cyan"),
            "  ",
            (status, STATUS_STYLES.get(status, "")),
            took,
        )
    )
    columns = ["stage", "trained", "from", "steps", "time", "peak memory", "evaluations, first → kept", "status"]
    console.print(table(None, columns, [_stage_row(row) for row in record.stages], right=(3, 4, 5), whole=(0, 1, 2, 3, 4, 5, 7)))
    if any(figure.name == "kl" and min(figure.after, figure.before or 0) < 0 for row in record.stages for figure in row.figures):
        say(f"  {KL_NOTE}", style="dim")
    for row in record.stages:
        for gate in row.summary["gates"]:
            mark, style = ("✓", "green") if gate["passed"] else ("!", "yellow") if gate["accepted"] else ("✗", "red")
            word = "  accepted all the same" if gate["accepted"] else ""
            line = f"{row.name}: {clean(gate['gate'])}  "
            console.print(Text.assemble((f"  {mark} ", style), line, (clean(gate["found"]) + word, "dim")))
    if record.suites:
        columns = [
            "suite",
            "model",
            "passed",
            "share (95 %)",
            "change to where it started (95 %)",
            "change to the first stage (95 %)",
        ]
        console.print(table("Acceptance", columns, [_suite_row(row) for row in record.suites], right=(2,), whole=(0, 1, 2, 3)))
    if record.texts:
        rows = [
            (
                row.model,
                f"{row.perplexity:.2f}",
                f"{row.bits_per_byte:.4f}",
                "" if row.change is None else f"{100 * row.change:+.1f} %",
            )
            for row in record.texts
        ]
        columns = ["model", "perplexity", "bits per byte", "change"]
        console.print(table("General text (change above zero: forgetting)", columns, rows, right=(1, 2, 3)))


def _stage_row(row: StageRow) -> tuple[Any, ...]:
    found = row.summary
    status = str(found["status"])
    return (
        row.name,
        row.trained,
        row.source,
        _count(found.get("steps")),
        _time(found.get("train_runtime")),
        human_bytes(found["peak_memory_bytes"]) if found.get("peak_memory_bytes") else "",
        ", ".join(f"{figure.name} {figure}" for figure in row.figures),
        Text(status, style=STATUS_STYLES.get(status, "dim")),
    )


def _suite_row(row: SuiteRow) -> tuple[str, ...]:
    from finetuneflow.export.pipeline_report import change_text, share_text

    passed = f"{row.passed}/{row.prompts}"
    return (row.suite, row.model, passed, share_text(row), change_text(row.to_before), change_text(row.to_first))


def show_pipelines(summaries: Sequence[dict[str, Any]]) -> None:
    """The pipelines of a workspace, one line each."""
    rows = [
        (
            found["pipeline"],
            Text(found["status"], style=STATUS_STYLES.get(found["status"], "")),
            "  ".join(f"{STATUS_MARKS.get(stage['status'], '?')} {stage['stage']}" for stage in found["stages"]),
            _time(found["seconds"]),
        )
        for found in summaries
    ]
    console.print(table("Pipelines", ["pipeline", "status", "stages", "time"], rows, right=(3,), whole=(0, 1, 3)))
