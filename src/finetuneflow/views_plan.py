"""What is known before a run, as tables: plans, findings, scores, recipes, differences. Nothing is computed here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from finetuneflow.terminal import clean, console, human_bytes, human_time, say, table

if TYPE_CHECKING:
    from finetuneflow.knowledge.advice import Advice
    from finetuneflow.knowledge.decision_matrix import Cell
    from finetuneflow.knowledge.difference import Difference
    from finetuneflow.knowledge.explain import Diagnosis
    from finetuneflow.knowledge.recipes import Figures, Recipe, Sums
    from finetuneflow.knowledge.recommend import Option, Plan
    from finetuneflow.knowledge.score import Score
    from finetuneflow.knowledge.situation import Finding
    from finetuneflow.planning import Look

STARS = 5


def _item(text: str, *, mark: str = "·", style: str = "") -> None:
    """A line with a mark, continuation lines hanging under its text."""
    line = Table.grid(padding=(0, 1))
    line.add_row(" ", Text(mark, style=style), Text(clean(text), style=style))
    console.print(line if console.is_terminal else Text(f"  {mark} {clean(text)}"), soft_wrap=not console.is_terminal)


# --- plans --------------------------------------------------------------------------------------------

VERDICTS = {"fits": ("fits", "green"), "tight": ("tight", "yellow"), "no": ("no", "red")}
LARGEST_PARTS = 6


def show_plan(plan: Plan, advice: Advice, seen: Look) -> None:
    """The machine and the model, every option with memory, time and cost, the chosen one with its reasons."""
    hardware, model = plan.hardware, plan.model
    count = f"{hardware['count']} x " if hardware["count"] > 1 else ""
    devices = hardware["devices"][0]
    console.print(Text.assemble(("machine  ", "dim"), f"{count}{clean(devices['name'])}, {devices['memory_gb']:g} GB"))
    console.print(Text.assemble(("model    ", "dim"), f"{clean(model['name'])}, {model['parameters'] / 1e6:,.0f} M parameters"))
    data = seen.situation.data
    if data is not None:
        from finetuneflow.knowledge.values import many

        length = f"{data.both_tokens:.0f} tokens (both sides)" if data.both_tokens else f"{data.mean_tokens:.0f} tokens"
        examples = f"{'' if data.counted else 'about '}{many(data.examples, data.noun)} of {length}"
        console.print(
            Text.assemble(("data     ", "dim"), examples + (f", {data.eval_examples:,} held out" if data.eval_examples else ""))
        )
    console.print()
    rows = [_option_row(option, chosen=option.name == plan.choice) for option in plan.options]
    columns = ["", "method", "", "memory", "time", "cost", "quality", "micro-batch x acc.", "length"]
    console.print(table(None, columns, rows, right=(3, 4, 5), whole=(0, 1, 2, 3, 4, 5)))
    if plan.chosen is not None:
        _show_choice(plan.chosen)
    if advice.verdict == "try_first":
        say("\nBefore you tune:", style="bold")
        for text in advice.try_first:
            _item(text)
    for reason in advice.reasons:
        _item(f"{reason.text} ({reason.source})", style="dim")
    if notes := [*seen.notes, *plan.notes]:
        say("\nAssumed:", style="dim")
        for note in dict.fromkeys(notes):
            if not any(other != note and other.startswith(note.rstrip(".")) for other in notes):  # said at more length
                _item(note, style="dim")


def _option_row(option: Option, *, chosen: bool) -> tuple[Any, ...]:
    word, style = VERDICTS[option.verdict]
    settings = option.settings
    batch = f"{settings.get('training.batch_size', '')} x {settings.get('training.gradient_accumulation', '')}"
    where = f" ({option.strategy} on {option.devices})" if option.devices > 1 else ""
    return (
        "→" if chosen else "",
        Text(option.title + where, style="bold" if chosen else ""),
        Text(word, style=style),
        f"{option.memory_gb:.1f} GB",
        _hours(option.hours),
        "" if option.cost_usd is None else f"{option.cost_usd:,.2f} $",
        option.quality.documented or "",
        batch,
        f"{settings['data.max_length']:,}" if "data.max_length" in settings else "",
    )


def _hours(hours: float | None) -> str:
    return "" if hours is None else human_time(hours * 3600)


def _show_choice(option: Option) -> None:
    console.print(Text(f"\n{option.title}", style="bold"))
    say(f"  {option.reason}")
    if option.hours_range:
        low, high = option.hours_range
        say(f"  between {_hours(low)} and {_hours(high)}")
    if option.energy_kwh is not None and option.co2_kg is not None:
        say(f"  energy about {option.energy_kwh:.2g} kWh, {option.co2_kg:.2g} kg of CO2")
    parts = sorted(option.breakdown.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name.replace('_', ' ')} {human_bytes(size)}" for name, size in parts[:LARGEST_PARTS])
    say(f"  memory: {shown}" + (f" and {len(parts) - LARGEST_PARTS} more" if len(parts) > LARGEST_PARTS else ""))
    rows = [(key, _value(value), option.why.get(key, "")) for key, value in option.settings.items()]
    console.print(table(None, ["setting", "value", "why"], rows, whole=(0, 1)))


def show_matrix(cells: Sequence[Cell]) -> None:
    """Memory bands against model sizes, from the estimate; cells that the documented matrix has otherwise are marked."""
    models = list(dict.fromkeys(cell.model for cell in cells))
    bands = list(dict.fromkeys(cell.band for cell in cells))
    by_place = {(cell.band, cell.model): cell for cell in cells}
    rows = []
    for band in bands:
        row = [by_place[band, model] for model in models]
        rows.append((band, *(_plain(f"{cell.text}{' *' if cell.differs else ''}") for cell in row)))
    console.print(table(None, ["card", *models], rows, whole=range(len(models) + 1)))
    say(
        "\n✓ comfortable   ~ with micro-batch 1 and 1,024 tokens   ✗ does not fit   * the documented matrix differs:",
        style="dim",
    )
    for cell in cells:
        if cell.differs:
            _item(_plain(f"{cell.band}, {cell.model}: {cell.text} instead of {cell.documented_text}. {cell.why}"))


def _plain(text: str) -> str:
    """The document's signs as characters that every terminal has, one column wide."""
    return text.replace("✅", "✓").replace("⚠️", "~").replace("❌", "✗")


# --- findings -----------------------------------------------------------------------------------------

LEVEL_MARKS = {"error": ("✗", "red"), "warning": ("!", "yellow"), "advice": ("·", "cyan")}


def show_findings(findings: Sequence[Finding], *, fixed: bool = False, fixable: bool = True) -> None:
    if not findings:
        say("Nothing found." if not fixed else "Nothing left to find.", style="green")
        return
    for finding in findings:
        mark, style = LEVEL_MARKS[finding.level]
        console.print(Text.assemble((f"{mark} {finding.level} ", style), (finding.field, "bold"), (f"  {finding.code}", "dim")))
        say(f"    {finding.found}")
        say(f"    {finding.why}", style="dim")
        if finding.fix:
            say("    fix: " + ", ".join(f"{key}: {_value(value)}" for key, value in finding.fix.items()), style="green")
    counts = Counter[str](finding.level for finding in findings)
    say(
        "\n"
        + ", ".join(
            f"{counts[level]} {level}{'s' if counts[level] > 1 and level != 'advice' else ''}"
            for level in LEVEL_MARKS
            if counts[level]
        )
    )
    say("`ftf explain CODE` says more" + ("; `ftf lint --fix` applies the safe fixes." if fixable else "."), style="dim")


def show_diagnosis(found: Diagnosis) -> None:
    console.print(Text.assemble((clean(found.cause), "bold"), (f"  {found.code}" if found.code else "", "dim")))
    say(f"  seen: {found.evidence}", style="dim")
    for number, remedy in enumerate(found.remedies, 1):
        enough = {True: "  (predicted to be enough)", False: "  (not enough alone)", None: ""}[remedy.enough]
        say(f"  {number}. {remedy.text}{f' Saves {remedy.saves}.' if remedy.saves else ''}{enough}")
        if remedy.command:
            say(f"     {remedy.command}", style="cyan")


# --- recipes ------------------------------------------------------------------------------------------


def show_recipes(recipes: Sequence[Recipe]) -> None:
    rows = []
    for recipe in recipes:
        first = recipe.phases[0]
        rate = f"{first.settings.get('training', {}).get('learning_rate', '')}"
        kinds = " → ".join(dict.fromkeys(phase.objective for phase in recipe.phases))
        stars = "" if recipe.quality is None else "★" * recipe.quality + "☆" * (STARS - recipe.quality)
        rows.append(
            (
                recipe.name,
                kinds,
                first.method,
                rate,
                stars,
                recipe.title,
            )
        )
    console.print(table(None, ["recipe", "trains by", "method", "rate", "documented", "what it is"], rows, whole=(0,)))
    say("\nftf recipes show NAME     ftf train --recipe NAME --set data.train=my.jsonl", style="dim")


def show_recipe(recipe: Recipe) -> None:
    from finetuneflow.knowledge.recipes import recipe_arithmetic

    console.print(Text(recipe.title, style="bold"))
    say(recipe.summary)
    say(f"\nSuits   {recipe.suits}")
    say(f"Made for  {recipe.needs.base}, {recipe.needs.gpus}")
    say(f"Memory  {recipe.memory_note}")
    for phase in recipe.phases:
        sums = recipe_arithmetic(phase)
        name = f"{recipe.name}:{phase.name}" if len(recipe.phases) > 1 else recipe.name
        console.print(Text(f"\n{name}", style="bold"), Text(f"{phase.objective} on {phase.dataset.name}, {phase.dataset.kind}"))
        console.print(_settings_table(phase.settings))
        columns = [
            ("documented", phase.documented, sums.documented),
            ("published", phase.published, sums.published),
            ("this recipe", None, sums.recipe),
        ]
        console.print(_figures_table([column for column in columns if column[2] is not None]))
        for text in sums.contradictions:
            _item(text, mark="!", style="yellow")
    for text in recipe.caution:
        _item(text)
    console.print(Text("\nSources", style="bold"))
    for source in recipe.source:
        _item(f"{source.title}: {source.where}")


def _settings_table(settings: dict[str, Any]) -> Any:
    rows = [(f"{group}.{key}", value) for group, inner in settings.items() for key, value in inner.items()]
    return table(None, ["setting", "value"], rows, whole=(0,))


def _figures_table(columns: Sequence[tuple[str, Figures | None, Sums | None]]) -> Any:
    """A row per figure, a column per source; what follows from other figures is in brackets."""
    lines: list[tuple[str, list[str]]] = []
    for label, stated, implied in (
        ("steps", "steps", "steps_implied"),
        ("epochs", "epochs", "epochs_implied"),
        ("batch, all devices", "batch", None),
        ("examples", "examples", None),
    ):
        lines.append((label, [_figure(sums, stated, implied) for _, _, sums in columns]))
    lines.append(("steps for 3 epochs", [_figure(sums, "steps_for_3_epochs", None) for _, _, sums in columns]))
    lines.append(("hours", [str(figures.hours) if figures and figures.hours else "" for _, figures, _ in columns]))
    lines.append(("hardware", [figures.hardware or "" if figures else "" for _, figures, _ in columns]))
    rows = [(label, *cells) for label, cells in lines if any(cells)]
    return table(None, ["", *(name for name, _, _ in columns)], rows, right=range(1, len(columns) + 1))


def _figure(sums: Any, stated: str, implied: str | None) -> str:
    if (value := getattr(sums, stated)) is not None:
        return str(value)
    value = getattr(sums, implied) if implied else None
    return f"({value})" if value is not None else ""


# --- differences --------------------------------------------------------------------------------------


def show_difference(found: Sequence[Difference], a: str, b: str) -> None:
    if not found:
        say(f"{a} and {b} have the same settings.")
        return
    rows = [(d.key, _value(d.a), _value(d.b), f"x {d.ratio:.3g}" if d.ratio else "", d.note) for d in found]
    console.print(table(None, ["setting", a, b, "", "meaning"], rows, right=(3,), whole=(0,)))


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# --- scores -------------------------------------------------------------------------------------------


def show_score(found: Score) -> None:
    rows = [
        (criterion.name, "–" if criterion.score is None else f"{criterion.score:g}", bar(criterion.score), criterion.reason)
        for criterion in found.criteria
    ]
    console.print(table(None, ["criterion", "mark", "", "why"], rows, right=(1,), whole=(0, 1, 2)))
    console.print(Text(f"\noverall {found.overall:g} of 10", style="bold"))
    say(f"  {found.position.text}")
    for text in found.strengths:
        _item(text, mark="+", style="green")
    for text in found.weaknesses:
        _item(text, mark="-", style="yellow")
    if found.improvements:
        say("\nWhat would raise it:")
        for improvement in found.improvements:
            marks = ", ".join(f"{name} {before:g} → {after:g}" for name, (before, after) in improvement.scores.items())
            _item(f"{improvement.change}: {marks} (overall {improvement.overall:g})")


def bar(mark: float | None) -> str:
    """A mark of 0 to 10 as ten characters."""
    whole = round(mark or 0)
    return "█" * whole + "░" * (10 - whole)
