"""What reaches the screen is text: nothing in it steers the terminal, and nothing useful is cut out of sight."""

from __future__ import annotations

import io
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from finetuneflow.terminal import RunView, clean, human_bytes, human_time, print_json, shorten, shorten_middle, table

BASE = {"seq": 1, "time": "2026-01-01T00:00:00+00:00"}


def rendered(value: object, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(value)
    return console.file.getvalue()  # type: ignore[attr-defined]


@given(st.text(st.characters(codec=None)))
def test_clean_text_holds_nothing_that_steers_a_terminal(text: str) -> None:
    shown = clean(text)
    assert all(c in "\n\t" or c.isprintable() for c in shown) and clean(shown) == shown
    assert not set(shown) & set("\x1b\x9b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def test_letters_of_every_script_stay_as_they_are() -> None:
    text = "français, Ελληνικά, עברית, 日本語, 🎉\nnext"
    assert clean(text) == text


@given(st.text(min_size=1), st.integers(5, 60))
def test_a_shortened_text_fits_and_a_short_one_is_untouched(text: str, limit: int) -> None:
    for shortened in (shorten(text, limit), shorten_middle(text, limit)):
        assert len(shortened) <= limit and (shortened == text or len(text) > limit)


def test_a_shortened_path_keeps_both_ends() -> None:
    short = shorten_middle("/home/someone/models/very/deep/below/Llama-3.2-1B", 24)
    assert short.startswith("/home") and short.endswith("Llama-3.2-1B") and "…" in short


def test_a_table_keeps_the_columns_named_whole_on_one_line_and_folds_the_others() -> None:
    name = "a-rather-long-run-name-20260101-001"
    shown = rendered(table(None, ["run", "text"], [(name, "word " * 30)], whole=(0,)), 80)
    assert name in shown and shown.count("word") == 30 and max(map(len, shown.splitlines())) <= 80
    assert rendered(table(None, ["run", "text"], [(name, "word")], whole=(0,)), 10)  # too narrow for all: still no crash


def test_a_cell_is_one_line_of_plain_text() -> None:
    shown = rendered(table(None, ["x"], [("[bold]a[/]\nb\x1b[2J",)]), 60)
    assert "[bold]a[/] ↵ b\\u001b[2J" in shown


@pytest.mark.parametrize("value", ["é ✓", "\udcff", {"a": ["\ud800x"]}], ids=ascii)
def test_json_is_readable_back_in_any_encoding(value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("utf-8", "ascii", "cp1252"):
        raw = io.BytesIO()
        with io.TextIOWrapper(raw, encoding=encoding) as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            print_json(value)
            stream.flush()
            written = raw.getvalue().decode(encoding)
        assert json.loads(written) == value


def test_sizes_and_times_carry_units() -> None:
    assert [human_bytes(n) for n in (0, 999, 1e3, 1.5e6, 2e12)] == ["0 B", "999 B", "1 kB", "1.5 MB", "2.0 TB"]
    assert [human_time(s) for s in (0.2, 61, 3725)] == ["0 s", "1 min 01 s", "1 h 02 min"]


class Closed(io.StringIO):
    """A pipe whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_run_outlives_the_reader_of_its_output(capfd: pytest.CaptureFixture[str]) -> None:
    from finetuneflow.terminal import _Terminal

    view = RunView(_Terminal(file=Closed()))
    for step in (1, 2):
        view({**BASE, "event": "checkpoint", "step": step, "path": "checkpoints/x"})
    assert view.quiet


def test_a_view_shows_events_as_text_and_bears_those_of_another_version() -> None:
    console = Console(file=io.StringIO(), width=100)
    view = RunView(console)
    view({**BASE, "event": "warning", "message": "[bold]\x1b[31m", "advice": None})
    view({**BASE, "event": "stopped", "step": 3, "reason": "\u202eabc"})
    view({**BASE, "event": "log", "step": 1})
    view({**BASE, "event": "from the future"})
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[bold]\\u001b[31m" in shown and "\\u202eabc" in shown and "log: " in shown and "\x1b" not in shown


def test_text_objects_pass_through_a_table_unchanged() -> None:
    assert "plain" in rendered(table(None, ["x"], [(Text("plain", "bold"),)]), 40)
