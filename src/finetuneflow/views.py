"""Results as tables on a terminal: dataset reports, evaluations, comparisons, exports, the doctor's list.

Each function takes a result and prints it; nothing is computed here that `--json` would not show too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from finetuneflow.knowledge.situation import many
from finetuneflow.terminal import clean, console, human_bytes, human_time, percent, say, shorten, table

if TYPE_CHECKING:
    from finetuneflow.data.quality import FileReport
    from finetuneflow.doctor import Check
    from finetuneflow.evaluation.compare import Comparison, Measure
    from finetuneflow.evaluation.measure import Evaluation
    from finetuneflow.evaluation.suite import SuiteResult
    from finetuneflow.export import ExportResult

MARKS = {"ok": ("✓ ok  ", "green"), "warn": ("! warn", "yellow"), "fail": ("✗ fail", "red")}
EXAMPLES_PER_REASON = 2
LINES_PER_CELL = 3
WIDE = 120  # columns


# --- datasets -------------------------------------------------------------------------------------


def show_data_report(report: FileReport) -> None:
    """One file: what it is, what can be used, what cannot and why, what to know before training on it."""
    if report.error is not None:
        console.print(
            Text.assemble(
                ("✗ ", "red"), (clean(report.file), "bold"), f"  {clean(report.error['detail'])} [{report.error['error_code']}]"
            )
        )
        if remedy := report.error["context"].get("remedy"):
            say(f"  {remedy}", style="dim")
        return
    source = report.source
    form = f"{source.format}{f' ({source.compression})' if source.compression else ''}, {source.encoding}" if source else ""
    console.print(Text.assemble((clean(report.file), "bold"), f"  {form}"))
    say(
        f"  {report.usable:,} of {many(report.rows, 'row')} usable"
        + (f", {report.rejected_rows:,} rejected ({percent(report.rejected_share)})" if report.rejected else "")
        + (f", {many(report.examples, 'example')}" if report.examples != report.usable else "")
    )
    say("  shapes      " + _counts(report.shapes))
    if report.preferences:
        made = {"pair": many(report.preferences["pair"], "pair"), "rated": many(report.preferences["rated"], "rated answer")}
        say(f"  preferences {made['pair']} can be made, {made['rated']}")
    _show_problems(report)
    near = "" if report.near_duplicates is None else f", {report.near_duplicates:,} nearly the same"
    say(f"  duplicates  {report.duplicates:,} exact{near}")
    if report.languages:
        say(f"  languages   {_counts(report.languages)}  (of {report.languages_sampled:,} sampled)")
    if report.tokens is not None:
        _show_tokens(report)
    for note, count in report.notes.items():
        say(f"  · {count:,} x {note}", style="dim")
    for warning in report.warnings:
        console.print(Text.assemble(("  ! ", "yellow"), clean(warning)))


def _show_problems(report: FileReport) -> None:
    for code, count in report.rejected.items():
        console.print(Text.assemble(("  ✗ ", "red"), f"{count:,} x {code}"))
        for problem in report.problems.get(code, ())[:EXAMPLES_PER_REASON]:
            say(f"      {problem.place}: {problem.found}", style="dim")
            say(f"      → {problem.hint}", style="dim")


def _show_tokens(report: FileReport) -> None:
    tokens = report.tokens
    assert tokens is not None
    say(
        f"  tokens      {tokens.total:,} in all, {percent(tokens.supervised_share)} in the loss; "
        f"per example {tokens.shortest} to {tokens.longest:,}, median {tokens.median}, 95 % below {tokens.p95:,}"
    )
    if tokens.max_length:
        say(
            f"  over {tokens.max_length:,}   {many(tokens.rows_over, 'example')}, in which {many(tokens.answer_tokens_lost, 'answer token')} would be lost"
        )
    widest = max(tokens.histogram.values(), default=1) or 1
    for edge, count in tokens.histogram.items():
        if count:
            say(f"    {edge:>8} {'█' * max(1, round(30 * count / widest))} {count:,}")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"


def dry_run_text(manifest: Mapping[str, Any]) -> str:
    """What a run would train on, in a sentence or two."""
    tokens = f"{manifest['avg_tokens']:.0f} tokens each on average"
    draws = manifest["form"] == "prompt"
    text = f"{many(manifest['train_examples'], 'prompt' if draws else 'example')} to train on, {manifest['eval_examples']:,} held out; {tokens}"
    if draws:
        text += ". Answers to them are drawn in training, and only those are in the loss."
    else:
        text += f", {percent(manifest['supervised_share'])} in the loss."
    if replay := manifest.get("replay"):
        text += f" {many(replay['examples'], 'example')} of them ({percent(replay['share'])}) replayed from data.replay."
    return text


# --- evaluation and comparison ----------------------------------------------------------------------


def show_suite(result: SuiteResult, *, title: str | None = None) -> None:
    """Pass share per tag, and the failures."""
    console.print(
        Text.assemble(
            (f"{clean(title or result.suite)}: ", "bold"),
            f"{result.passed} of {many(len(result.items), 'prompt')} passed ({percent(result.pass_share)})",
        )
    )
    rows = [
        (tag, f"{part['passed']:.0f}/{part['prompts']:.0f}", _bar(part["pass_share"])) for tag, part in result.by_tag().items()
    ]
    console.print(table(None, ["  tag", "passed", ""], [(f"  {a}", b, c) for a, b, c in rows], right=(1,)))
    for item in result.failures[:8]:
        console.print(
            Text.assemble(
                ("  ✗ ", "red"),
                (clean(item.id), "bold"),
                f"  {clean(item.answer[:80])!r}  ",
                (clean("; ".join(item.reasons)), "dim"),
            )
        )


def _bar(share: float, width: int = 20) -> str:
    filled = round(share * width)
    return "█" * filled + "░" * (width - filled)


def show_evaluation(result: Evaluation) -> None:
    console.print(
        Text.assemble(("Evaluation of ", "bold"), (clean(result.model), "bold cyan"), f"  {human_time(result.seconds)}")
    )
    if result.losses:
        figures = result.losses
        say(
            f"  loss {figures.loss:.4f} nats/token   perplexity {figures.perplexity:.3f}   token accuracy {percent(figures.token_accuracy)}   "
            f"over {many(figures.tokens, 'token')} of {many(figures.examples, 'example')}"
        )
    if result.scores:
        scores = result.scores.to_dict()
        shown = {name: value for name, value in scores.items() if isinstance(value, int | float)}
        say("  " + "   ".join(f"{name} {value:.4g}" for name, value in shown.items()))
    if result.preferences:
        p = result.preferences
        sums = "" if p.accuracy_of_sums is None else f"   (whole answers: {percent(p.accuracy_of_sums)})"
        say(
            f"  preferences: {percent(p.accuracy)} of {many(p.pairs, 'pair')} told apart by {p.by} "
            f"(95% interval {percent(p.accuracy_low)} to {percent(p.accuracy_high)}){sums}   margin {p.margin:.3f}"
        )
    if result.samples:
        console.print(_sample_table([sample.to_dict() for sample in result.samples]))
    if result.suite:
        show_suite(result.suite)
    if result.skipped:
        say(f"  left out: {_counts(dict(result.skipped))}", style="dim")


def _sample_table(samples: Sequence[dict[str, Any]]) -> Any:
    limit = _cell_limit(3)
    rows = [tuple(shorten(s[part], limit) for part in ("instruction", "expected_output", "model_output")) for s in samples]
    return table("Samples", ["prompt", "expected", "answered"], rows)


def _cell_limit(columns: int) -> int:
    """Characters of a cell where `columns` share the line and none takes more than a few lines."""
    return max(40, LINES_PER_CELL * (console.width // columns - 2))


def show_comparison(result: Comparison, *, items: int = 6) -> None:
    """The verdict first, then the measures, then the items where the two differ most clearly."""
    colour = {"better": "bold green", "worse": "bold red", "no evidence": "bold yellow"}[result.verdict]
    console.print(Text.assemble((f"{result.verdict}  ", colour), clean(result.sentence())))
    console.print(_measure_table(result))
    if result.forgetting:
        f = result.forgetting
        say(
            f"general text ({f.text}, {f.tokens:,} tokens): perplexity {f.a_perplexity:.3f} -> {f.b_perplexity:.3f} "
            f"({f.loss_change:+.1%} bits per byte; above zero is forgetting)"
        )
    changed = [item for item in result.items if item.outcome != "tie"][:items]
    if changed:
        limit = _cell_limit(4)
        rows = [
            (item.outcome, *(shorten(text, limit) for text in (item.prompt, item.a_answer, item.b_answer))) for item in changed
        ]
        columns = ["outcome", "prompt", clean(result.a), clean(result.b)]
        console.print(table("Where they differ", columns, rows, whole=(0,)))
    say(result.rule, style="dim")


def _measure_table(result: Comparison) -> Any:
    """A narrow screen goes without units and the sign test, which the sentence above it tells."""
    wide = console.width >= WIDE
    columns = ["measure", clean(result.a), clean(result.b), "gain", "95 % interval", "won/tied/lost", "verdict"]
    rows = [_measure_row(m, with_unit=wide) for m in result.measures]
    if wide:
        columns.append("sign test p")
        rows = [(*row, f"{m.sign_test_p:.2g}") for row, m in zip(rows, result.measures, strict=True)]
    return table(None, columns, rows, right=(1, 2, 3), whole=(0, 3, 4, 5, 6, 7))


def _measure_row(m: Measure, *, with_unit: bool) -> tuple[str, ...]:
    return (
        f"{m.name} ({m.unit})" if with_unit else m.name,
        f"{m.a:.4g}",
        f"{m.b:.4g}",
        f"{m.difference.mean:+.2g}",
        f"{m.difference.low:+.2g} to {m.difference.high:+.2g}",
        f"{m.wins}/{m.ties}/{m.losses}",
        m.verdict,
    )


# --- export and doctor --------------------------------------------------------------------------------


def show_export(result: ExportResult) -> None:
    check = result.check
    console.print(Text.assemble(("Exported ", "bold green"), (clean(str(result.dir)), "bold")))
    console.print(
        table(
            None,
            ["  file", "size", "sha256"],
            [(f"  {f.name}", human_bytes(f.bytes), f.sha256[:16]) for f in result.files],
            right=(1,),
        )
    )
    say(f"  checked by loading it again: {check.compared}; {check.agreement}")


def show_doctor(checks: Sequence[Check]) -> None:
    for check in checks:
        mark, colour = MARKS[check.status]
        line = Text.assemble((mark, colour), f"  {check.name:<22}", clean(check.found))
        console.print(
            Group(line, Text(f"          → {clean(check.remedy)}", style="dim")) if check.remedy else line, soft_wrap=True
        )
