"""`ftf chat`: talk to a run, switch its adapter off and on to feel the difference.

/base        answer with the base model alone        /tuned       answer with the adapter again
/both        answer with both, one after the other   /use NAME    use another loaded adapter
/system TEXT set the system message                  /reset       forget the conversation
/good, /bad  rate the last answer                    /1, /2, /tie say which of two answers was better (in /both)
/help        this list                               /quit        leave
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuneflow.data.examples import Message
from finetuneflow.data.votes import Choice, Vote, Voted, append_vote
from finetuneflow.errors import FineTuneFlowError
from finetuneflow.terminal import clean, console, print_error

if TYPE_CHECKING:
    from finetuneflow.inference import Generator

ANSWER_SHARE = 4  # of the model's context, at least this part is kept free for the answer; older turns go first
HELP = (__doc__ or "").split("\n\n")[1]
RATINGS: dict[str, Choice] = {"good": "good", "bad": "bad"}
COMPARISONS: dict[str, Choice] = {"1": "a", "2": "b", "tie": "tie"}


class Chat:
    """One conversation. `answer` takes a line of the user and yields pieces of text as they come.

    `votes` is the file that /good, /bad, /1, /2 and /tie write to; words after them are kept as a comment.
    """

    def __init__(self, generator: Generator, *, system: str | None = None, votes: Path | None = None, **decoding: Any) -> None:
        self.generator = generator
        self.votes = votes
        self._open: tuple[tuple[Message, ...], list[Voted]] | None = None  # the last prompt and its answers, until voted on
        self.decoding = decoding
        self.history: list[Message] = [Message("system", system)] if system else []
        self.voices: list[str | None] = ["active"]  # which adapters answer; None is the base alone

    def answer(self, line: str) -> Iterator[tuple[str, Iterator[str]]]:
        """(name of the voice, its pieces) for each voice; the last answer goes into the history."""
        room = min(self.decoding["max_new_tokens"], self.generator.context_length // ANSWER_SHARE)
        asked = self.generator.recent([*self.history, Message("user", line)], room=room)
        self._open = None
        said: list[Voted] = []
        for voice in self.voices:
            pieces: list[str] = []
            yield self._name(voice), self._speak(voice, asked, pieces)
            said.append(Voted(self._model(voice), "".join(pieces)))
        self.history = [*asked, Message("assistant", said[-1].text)]  # only now: a question that failed is not remembered
        self._open = tuple(asked), said

    def _speak(self, voice: str | None, asked: list[Message], said: list[str]) -> Iterator[str]:
        with self.generator.adapter(voice):
            for piece in self.generator.stream(asked, **self.decoding):
                said.append(piece)
                yield piece

    def _name(self, voice: str | None) -> str:
        if voice is None:
            return "base"
        return "tuned" if voice == "active" and self.generator.adapters else self.generator.name if voice == "active" else voice

    def _model(self, voice: str | None) -> str:
        """The name a vote file knows a voice by: which run or model, and whether its adapter was off."""
        name = self.generator.name
        return name if voice == "active" else f"{name} (base)" if voice is None else f"{name} ({voice})"

    def _vote(self, choice: Choice, comment: str) -> str:
        if self.votes is None:
            return "There is no vote file: start the chat with --votes FILE."
        if self._open is None:
            return "There is no answer to vote on, or it has a vote already."
        prompt, said = self._open
        if len(said) == 1 and choice not in RATINGS.values():
            return "There was one answer: say /good or /bad."
        if len(said) > 1 and choice in RATINGS.values():
            return "There were two answers: say /1, /2 or /tie."
        if len(said) > 1 and said[0].text.strip() == said[1].text.strip():
            return "Both answers are the same, so there is nothing to prefer: not noted."
        append_vote(self.votes, Vote(prompt, dict(zip(("a", "b"), said, strict=False)), choice, comment))
        self._open = None
        return f"Noted in {self.votes}."

    def command(self, line: str) -> str:
        """Carry out a /command; returns what to tell the user."""
        verb, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if verb in RATINGS or verb in COMPARISONS:
            return self._vote((RATINGS | COMPARISONS)[verb], rest)
        if verb == "base":
            self.voices = [None]
        elif verb == "tuned":
            self.voices = ["active"]
        elif verb == "both":
            self.voices = [None, "active"]
        elif verb == "use":
            with self.generator.adapter(rest):  # raises when there is none of that name
                self.voices = [rest]
        elif verb == "system":
            self.history = [Message("system", rest)] if rest else []
            self._open = None
            return "A new conversation with that system message." if rest else "A new conversation without a system message."
        elif verb == "reset":
            self.history = [m for m in self.history[:1] if m.role == "system"]
            return "The conversation starts anew."
        else:
            return HELP
        return "Now answering: " + ", ".join(self._name(voice) for voice in self.voices)


def talk(chat: Chat, *, read: Callable[[str], str] = input, interactive: bool | None = None) -> None:
    """The loop of `ftf chat`. Ends with /quit, end of input or Ctrl-C; Ctrl-C while answering stops the answer."""
    interactive = sys.stdin.isatty() if interactive is None else interactive
    if interactive:
        console.print("/base and /tuned switch the adapter, /both compares, /help lists all, /quit leaves.", style="dim")
    while True:
        try:
            line = read("\nyou  > " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line in ("/quit", "/exit"):
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                console.print(clean(chat.command(line)), style="dim", markup=False)
            else:
                show_answer(chat, line)
        except FineTuneFlowError as error:
            print_error(error, as_json=False)


def show_answer(chat: Chat, line: str) -> None:
    for name, pieces in chat.answer(line):
        console.print(f"{clean(name):<5}> ", style="bold cyan", end="", markup=False)
        try:
            for piece in pieces:
                console.print(clean(piece), end="", markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print(" …", end="")
        console.print()
