"""What the command line shows: one renderer for tables and JSON, and the view of a run as it goes.

Text from files, models and users is escaped before it reaches the terminal (control characters,
bidi marks, markup), so that a row of a dataset cannot repaint the screen.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from finetuneflow.errors import FineTuneFlowError
from finetuneflow.events import Event
from finetuneflow.knowledge.situation import many

PIPE_WIDTH = 140  # a pipe has no width of its own; rich would wrap at 80


class _Terminal(Console):
    """A console whose reader may leave (`| head`): rich would end the process, but a run must outlive its viewer."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        silence(self.file)
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def silence(stream: IO[str]) -> None:
    """Send what a stream still holds to nowhere, so that the interpreter's last flush finds no closed pipe."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _console(*, stderr: bool = False) -> Console:
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if is_terminal or "COLUMNS" in os.environ else PIPE_WIDTH
    return _Terminal(stderr=stderr, width=width, soft_wrap=not is_terminal, highlight=False, emoji=False)


console = _console()
error_console = _console(stderr=True)


def print_json(value: Any) -> None:
    """Machine output: one JSON document on standard output, nothing else."""
    sys.stdout.write(_json(value, indent=2) + "\n")


def print_json_line(value: Any) -> None:
    """Machine output of a stream: one JSON object per line."""
    sys.stdout.write(_json(value) + "\n")
    sys.stdout.flush()


def _json(value: Any, *, indent: int | None = None) -> str:
    """Readable where the stream can carry it; a lone surrogate (of a file name) or another encoding asks for escapes."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent, default=str)
    return text


def print_error(error: FineTuneFlowError, *, as_json: bool) -> None:
    """An error in full: what, where, what to do. JSON goes to standard output as one line, so that streams stay readable."""
    if as_json:
        print_json_line(error.to_dict())
        return
    error_console.print(Text.assemble(("error ", "bold red"), clean(error.message), (f"  [{error.code}]", "dim")), soft_wrap=True)
    if error.where:
        error_console.print(Text.assemble(("  where       ", "dim"), clean(error.where)), soft_wrap=True)
    if error.remedy:
        error_console.print(Text.assemble(("  what to do  ", "dim"), clean(error.remedy)), soft_wrap=True)


def clean(text: str) -> str:
    """Text that cannot steer a terminal: control and bidi characters are shown as escapes, line breaks kept."""
    return "".join(c if c in "\n\t" or (c.isprintable() and c not in _BIDI) else f"\\u{ord(c):04x}" for c in text)


_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def say(text: str, *, style: str = "") -> None:
    """A paragraph of plain text, whatever characters it holds; on a terminal its indent holds for wrapped lines too."""
    shown = Text(clean(text.lstrip(" ")), style=style)
    indent = len(text) - len(text.lstrip(" "))
    console.print(Padding(shown, (0, 0, 0, indent), expand=False) if console.is_terminal else Text(" " * indent) + shown)


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters, the end cut off."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def shorten_middle(text: str, limit: int) -> str:
    """At most `limit` characters, the middle left out: of a path, both ends tell something."""
    if len(text) <= limit:
        return text
    head = (limit - 1) // 3
    return f"{text[:head]}…{text[head + 1 - limit :]}"


def table(
    title: str | None,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    right: Sequence[int] = (),
    whole: Sequence[int] = (),
) -> Table:
    """A table of plain values; columns whose index is in `right` are right-aligned, those in `whole` never wrapped."""
    result = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        result.add_column(
            column,
            justify="right" if index in right else "left",
            overflow="ellipsis" if index in whole else "fold",
            no_wrap=index in whole,
        )
    for row in rows:
        result.add_row(*(cell if isinstance(cell, Text) else Text(_one_line(cell)) for cell in row))
    return result


def _one_line(cell: Any) -> str:
    return clean("" if cell is None else str(cell)).replace("\n", " ↵ ").replace("\t", " ")


def human_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_time(seconds: float) -> str:
    """1 h 02 min, 3 min 20 s, 41 s."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {secs:02d} s" if minutes else f"{secs} s"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# Of the figures beside the loss (`training/watch.py` explains all), those that fit a line.
SHOWN_FIGURES = ("accuracy", "margin", "reward", "kl", "response_length")


def figure_text(name: str, value: float) -> str:
    """`margin 0.512`; the divergence with its unit, and why it may be below zero, which no true divergence is."""
    text = f"{name.replace('_', ' ')} {value:.3f}"
    if name == "kl":
        text += " nats (an estimate around 0)" if value < 0 else " nats"
    return text


# --- a run as it goes -----------------------------------------------------------------------------


class RunView:
    """An event sink that draws a run: a live progress line on a terminal, plain lines in a pipe."""

    def __init__(self, target: Console | None = None, *, quiet: bool = False, live: bool = True) -> None:
        self.console = target or console
        self.quiet = quiet
        self.draws_live = live and self.console.is_terminal
        self._seen_decisions: set[tuple[str, str]] = set()
        self._live: Live | None = None
        self._bar = Progress(
            TextColumn("[bold]{task.fields[label]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            console=self.console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=1, label="step", start=True)
        self._figures = Text("")

    def __call__(self, event: Event) -> None:
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is None or self.quiet:
            return
        event = {key: clean(value) if isinstance(value, str) else value for key, value in event.items()}
        try:
            handler(event)
        except BrokenPipeError:
            self.quiet = True
        except (KeyError, TypeError, ValueError):  # written by another version, or by hand
            self._print(Text(f"{event['event']}: this event's fields are not as expected", style="dim"))

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def __enter__(self) -> RunView:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- one method per event -----------------------------------------------------------------------

    def _on_started(self, event: Event) -> None:
        verb = "Resuming" if event["resuming"] else "Run"
        self._print(
            Text.assemble(
                (f"{verb} ", "bold"),
                (event["run"], "bold cyan"),
                (f"  attempt {event['attempt']}" if event["attempt"] > 1 else "", "dim"),
            )
        )

    def _on_phase(self, event: Event) -> None:
        name = event["name"]
        if name == "training":
            share = event["trainable_parameters"] / max(event["total_parameters"], 1)
            self._print(
                Text.assemble(
                    ("training ", "bold"),
                    f"{event['trainable_parameters']:,} of {event['total_parameters']:,} parameters ({percent(share)})",
                )
            )
        elif "step" not in event:
            self._print(Text(name, style="bold"))

    def _on_plan(self, event: Event) -> None:
        parts = []
        if event["memory_bytes"] and event["capacity_bytes"]:
            parts.append(
                f"{human_bytes(event['memory_bytes'])} of {human_bytes(event['capacity_bytes'])} memory ({event['verdict']})"
            )
        if event["seconds"]:
            parts.append(f"about {human_time(event['seconds'])} for {many(event['steps'], 'step')}")
        if event["price_usd"]:
            parts.append(f"about {event['price_usd']:,.2f} $")
        self._print_item(Text("· ", "dim"), Text.assemble(("predicted  ", "cyan"), (", ".join(parts) or "nothing", "dim")))

    def _on_finding(self, event: Event) -> None:
        if event["level"] != "advice":  # advice is for the report and `ftf lint`
            mark = Text("! ", "bold yellow") if event["level"] == "warning" else Text("✗ ", "bold red")
            self._print_item(
                mark, Text.assemble((f"{event['found']}  ", "yellow"), (event["why"], "dim"), (f"  {event['code']}", "dim"))
            )

    def _on_decision(self, event: Event) -> None:
        key = (event["setting"], event["reason"])
        if key not in self._seen_decisions:
            self._seen_decisions.add(key)
            self._print_item(
                Text("· ", "dim"),
                Text.assemble((f"{event['setting']} = {clean(str(event['value']))}  ", "cyan"), (event["reason"], "dim")),
            )

    def _on_warning(self, event: Event) -> None:
        advice = f"  {event['advice']}" if event["advice"] else ""
        self._print_item(
            Text("! ", "bold yellow"), Text.assemble((event["message"], "yellow"), (f"{advice}  {event.get('code', '')}", "dim"))
        )

    def _on_log(self, event: Event) -> None:
        shown = event.get("metrics", {})
        named = "".join(f"{figure_text(name, shown[name])}   " for name in SHOWN_FIGURES if name in shown)
        figures = (
            f"loss {event['loss']:.4f}   {named}lr {event['learning_rate']:.2e}   grad {event['grad_norm']:.2f}   "
            f"{event['tokens_per_second']:,.0f} tok/s   {human_bytes(event['memory_bytes'])} (peak {human_bytes(event['peak_memory_bytes'])})   "
            f"left {human_time(event['eta_seconds'])}"
        )
        if not self.draws_live:
            self._print(Text(f"step {event['step']}/{event['total_steps']}   {figures}"))
            return
        self._bar.update(self._task, completed=event["step"], total=event["total_steps"])
        self._figures = Text(f"  {figures}", style="dim")
        if self._live is None:
            self._live = Live(console=self.console, refresh_per_second=4, transient=False)
            self._live.start()
        from rich.console import Group

        self._live.update(Group(self._bar, self._figures))

    def _on_eval(self, event: Event) -> None:
        figures = f"loss {event['eval_loss']:.4f}"
        if "eval_perplexity" in event:
            figures += f"   perplexity {event['eval_perplexity']:.2f}   token accuracy {percent(event['eval_token_accuracy'])}"
        figures += "".join(f"   {figure_text(name, event[f'eval_{name}'])}" for name in SHOWN_FIGURES if f"eval_{name}" in event)
        self._print(Text.assemble(("  eval ", "bold green"), f"step {event['step']}   {figures}"))

    def _on_suite(self, event: Event) -> None:
        passed = f"{event['passed']} of {many(event['prompts'], 'prompt')} passed ({percent(event['share'])})"
        self._print(Text.assemble(("  suite ", "bold green"), f"step {event['step']}   {event['name']}   {passed}"))

    def _on_checkpoint(self, event: Event) -> None:
        self._print(Text(f"  saved {event['path']}", style="dim"))

    def _on_complete(self, event: Event) -> None:
        self.close()
        self._print(
            Text.assemble(
                ("Done ", "bold green"),
                f"{many(event['total_steps'], 'step')} in {human_time(event['seconds'])}, mean training loss {event['train_loss']:.4f}",
            )
        )

    def _on_stopped(self, event: Event) -> None:
        self.close()
        self._print(
            Text.assemble(
                ("Stopped ", "bold yellow"),
                f"after step {event['step']} ({event['reason']}). `ftf resume` goes on from the last checkpoint.",
            )
        )

    def _on_failed(self, event: Event) -> None:
        self.close()

    # --- of a pipeline --------------------------------------------------------------------------------

    def _on_pipeline(self, event: Event) -> None:
        self.close()
        if event["status"] == "started":
            verb = "Resuming pipeline" if event["resuming"] else "Pipeline"
            self._print(Text.assemble((f"{verb} ", "bold"), (event["pipeline"], "bold cyan")))
        elif event["status"] == "stopped":
            self._print(Text.assemble(("Pipeline stopped. ", "bold yellow"), f"`ftf resume {event['pipeline']}` goes on."))

    def _on_stage(self, event: Event) -> None:
        if event["status"] == "succeeded":
            return
        word = {"kept": "  done already", "resumed": "  goes on"}.get(event["status"], "")
        head = f"\nStage {event['number']} of {event['of']}: {event['stage']}"
        self._print(Text.assemble((head, "bold magenta"), f" ({event['objective']})", (word, "dim")))

    def _on_measured(self, event: Event) -> None:
        parts = [f"{clean(name)} {percent(share)}" for name, share in event["suites"].items()]
        if event["bits_per_byte"] is not None:
            parts.append(f"general text {event['bits_per_byte']:.4f} bits per byte")
        self._print(Text.assemble(("  measured ", "bold green"), f"{event['stage']}   {'   '.join(parts)}"))

    def _on_gate(self, event: Event) -> None:
        word, style = (
            ("passed", "green") if event["passed"] else ("accepted", "yellow") if event["accepted"] else ("not passed", "red")
        )
        self._print(Text.assemble((f"  gate {word} ", f"bold {style}"), f"{event['gate']}  ", (event["found"], "dim")))

    def _print_item(self, mark: Text, text: Text) -> None:
        """A marked line whose continuation lines, on a terminal, stand under its text."""
        if not self.console.is_terminal:
            self._print(Text("  ") + mark + text)
            return
        grid = Table.grid(padding=0)
        grid.add_column(width=4)
        grid.add_column()
        grid.add_row(Text("  ") + mark, text)
        (self._live.console if self._live else self.console).print(grid)

    def _print(self, text: Text) -> None:
        (self._live.console if self._live else self.console).print(text)
