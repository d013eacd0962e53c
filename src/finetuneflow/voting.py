"""`ftf compare A B --votes FILE`: shows two answers blind, takes a vote, writes it down, and goes on.

1  the first is better        2  the second is better
t  a tie                      b  both are bad
q  leave; votes are kept, and the next session goes on here
Words after the letter are kept as a comment. Questions that both answer alike are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from finetuneflow.terminal import clean

if TYPE_CHECKING:
    from finetuneflow.evaluation.ballots import Ballot, Polling

KEYS: dict[str, Literal["1", "2", "tie", "both_bad"]] = {"1": "1", "2": "2", "t": "tie", "b": "both_bad"}
HELP = (__doc__ or "").split("\n\n")[1]


def vote(polling: Polling, target: Console, *, read: Callable[[str], str] = input, interactive: bool | None = None) -> None:
    """The loop: until every question has a vote, `q`, the end of input, or Ctrl-C."""
    interactive = sys.stdin.isatty() if interactive is None else interactive
    target.print(HELP, style="dim", markup=False)
    for number, ballot in enumerate(polling.ballots(), start=1):
        show(ballot, number, target)
        answer = ask(target, read, "\nvote > " if interactive else "")
        if answer is None:
            return
        polling.cast(ballot.vote(*answer))


def ask(target: Console, read: Callable[[str], str], prompt: str) -> tuple[Literal["1", "2", "tie", "both_bad"], str] | None:
    """(vote, comment), asked until there is one; None to leave."""
    while True:
        try:
            target.print(prompt, end="", markup=False)  # not by `input`, which would write between the lines of --json
            line = read("").strip()
        except (EOFError, KeyboardInterrupt):
            return None
        key, _, comment = line.partition(" ")
        if key == "q":
            return None
        if key in KEYS:
            return KEYS[key], comment.strip()
        target.print(HELP, style="dim", markup=False)


def show(ballot: Ballot, number: int, target: Console) -> None:
    """The question, and both answers without their names."""
    asked = "\n".join(f"{turn.role}: {turn.content}" for turn in ballot.question.prompt)
    target.print(Text(f"\n{number}. {clean(asked)}", style="bold"))
    for label, text in zip(("1", "2"), ballot.shown, strict=True):
        target.print(Panel(Text(clean(text)), title=label, title_align="left"), soft_wrap=False)
