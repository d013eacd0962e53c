"""Questions with expected answers, out of canonical examples; loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetuneflow.data.examples import Example, Message, Problem, to_examples
from finetuneflow.data.sources import read_rows
from finetuneflow.errors import EvaluationError


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation up to an assistant's turn, and that turn's text. `example` is the conversation with it."""

    id: str
    prompt: tuple[Message, ...]
    expected: str
    example: Example


def read_examples(paths: Sequence[Path | str]) -> tuple[list[Example], list[Problem]]:
    """The examples of data files of any shape, and the rows that are none."""
    examples: list[Example] = []
    problems: list[Problem] = []
    for path in paths:
        for item in to_examples(read_rows(path)):
            if isinstance(item, Problem):
                problems.append(item)
            else:
                examples.append(item)
    if not examples:
        first = f"; the first: {problems[0].place}: {problems[0].found}" if problems else ""
        raise EvaluationError(
            "EVALUATION_NO_DATA",
            f"None of {', '.join(map(str, paths))} holds a usable example ({len(problems)} rows were rejected{first}).",
            remedy="Look at the rows with `ftf data check`.",
        )
    return examples, problems


def questions(examples: Iterable[Example], *, limit: int | None = None) -> list[Question]:
    """One question per chat example: its last assistant turn with text is what is expected. Other kinds have none."""
    found: list[Question] = []
    for example in examples:
        if limit is not None and len(found) >= limit:
            break
        last = _last_answer(example.messages) if example.kind == "chat" else None
        if last is not None:
            messages = example.messages[: last + 1]
            found.append(Question(str(example.place), messages[:-1], messages[-1].content, replace(example, messages=messages)))
    return found


def _last_answer(messages: Sequence[Message]) -> int | None:
    """Where the last assistant turn stands that answers something with text (a tool call alone is no text)."""
    return next((i for i in range(len(messages) - 1, 0, -1) if messages[i].role == "assistant" and messages[i].content.strip()), None)
