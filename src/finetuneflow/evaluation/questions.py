"""Questions with expected answers, out of canonical examples; loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetuneflow.data.examples import Example, Message, Problem, to_examples
from finetuneflow.data.sources import read_rows
from finetuneflow.errors import EvaluationError

if TYPE_CHECKING:
    from finetuneflow.data.tokens import Policy, Tokens
    from finetuneflow.inference import Generator


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
    """One question per example: its last assistant turn with text is what is expected; of a preference pair the chosen answer's.

    Documents and answers rated bad have none.
    """
    found: list[Question] = []
    for example in examples:
        if limit is not None and len(found) >= limit:
            break
        conversation = as_conversation(example)
        last = _last_answer(conversation.messages) if conversation is not None else None
        if conversation is not None and last is not None:
            messages = conversation.messages[: last + 1]
            found.append(
                Question(str(example.place), messages[:-1], messages[-1].content, replace(conversation, messages=messages))
            )
    return found


def as_conversation(example: Example) -> Example | None:
    """The conversation that an example holds up as good; None for a document and for an answer rated bad."""
    if example.kind == "preference":
        return replace(example, kind="chat", messages=(*example.messages, *example.chosen), chosen=(), rejected=())
    if example.kind == "unpaired" and example.label:
        return replace(example, kind="chat", label=None)
    return example if example.kind == "chat" else None


def _last_answer(messages: Sequence[Message]) -> int | None:
    """Where the last assistant turn stands that answers something with text (a tool call alone is no text)."""
    return next(
        (i for i in range(len(messages) - 1, 0, -1) if messages[i].role == "assistant" and messages[i].content.strip()), None
    )


def fitting(asked: Sequence[Question], generators: Sequence[Generator]) -> tuple[list[Question], list[Problem]]:
    """The questions that every generator can take whole, expected answer included, and why the others are left out."""
    from finetuneflow.data.tokens import Policy

    refused: dict[int, Problem] = {}
    for generator in generators:
        policy = Policy(supervise="last", max_length=generator.context_length, overlong="drop")
        rows = label_rows(generator, [question.example for question in asked], policy)
        refused |= {i: row for i, row in enumerate(rows) if isinstance(row, Problem)}
    return [question for i, question in enumerate(asked) if i not in refused], [refused[i] for i in sorted(refused)]


def label_rows(generator: Generator, examples: Sequence[Example], policy: Policy) -> list[list[Tokens] | Problem]:
    """Token ids and labels of each example in the generator's own template, or why it has none."""
    from finetuneflow.data.tokens import tokenize_many

    return list(tokenize_many(examples, generator.template, policy))  # type: ignore[arg-type]


def prompt_rows(generator: Generator, asked: Sequence[Question]) -> list[tuple[int, ...]]:
    """Token ids of each question's prompt."""
    return [generator.prompt_ids(question.prompt, question.example.tools) for question in asked]
