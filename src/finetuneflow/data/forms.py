"""Forms of training rows beside the supervised one: pairs, rated answers, and prompts to be answered by the model itself.

Place in the flow: `preferences.FormReader` -> **forms** -> Arrow files (`prepare`) and `ftf data preview --form`.

    pair     a prompt with a preferred and a rejected ending   dpo, orpo, cpo, simpo, reward
    rated    a prompt with an answer and whether it is good    kto
    prompt   a prompt alone, as inference writes it            grpo, rloo, ppo

Each side of a pair is the whole conversation, prompt and ending, rendered and labelled by the functions of `tokens`. Earlier
answers within the prompt are never in the loss: what is compared is the ending. Both sides share one prompt, also where a
row is too long: first the prompt's oldest exchanges go (the system message stays), then the ends of the endings.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from finetuneflow.data.encoding import Encoded
from finetuneflow.data.examples import Example, Kind, Message, Problem, endings_of, message_json, prompt_of
from finetuneflow.data.templates import Template
from finetuneflow.data.tokens import (
    MASKED,
    Policy,
    Source,
    Span,
    TokenizeStats,
    Tokens,
    check_policy,
    encode_examples,
    encode_text,
    exchanges_of,
    flat,
    label_source,
    problem_of,
    render_example,
    truncate,
)
from finetuneflow.errors import DataError

Form = Literal["supervised", "pair", "rated", "prompt"]

# What a form is made from, once ratings have become pairs or labels (`preferences.FormReader`).
KINDS: dict[Form, frozenset[Kind]] = {
    "supervised": frozenset({"chat", "text"}),
    "pair": frozenset({"preference"}),
    "rated": frozenset({"unpaired"}),
    "prompt": frozenset({"chat", "preference", "unpaired"}),
}

COLUMNS: dict[Form, tuple[tuple[str, str], ...]] = {
    "supervised": (("index", "int64"), ("input_ids", "ids"), ("labels", "ids"), ("length", "int32"), ("place", "string")),
    "pair": (
        ("index", "int64"),
        ("chosen_ids", "ids"),
        ("chosen_labels", "ids"),
        ("rejected_ids", "ids"),
        ("rejected_labels", "ids"),
        ("prompt_length", "int32"),
        ("length", "int32"),
        ("place", "string"),
    ),
    "rated": (
        ("index", "int64"),
        ("input_ids", "ids"),
        ("labels", "ids"),
        ("label", "bool"),
        ("prompt_length", "int32"),
        ("length", "int32"),
        ("place", "string"),
    ),
    "prompt": (
        ("index", "int64"),
        ("input_ids", "ids"),
        ("length", "int32"),
        ("place", "string"),
        ("messages", "string"),
        ("answer", "string"),
    ),
}


def schema(form: Form) -> Any:
    """The columns of a form's Arrow file as a `pyarrow.Schema`; token ids and labels are lists of int32."""
    import pyarrow as pa

    types = {"int64": pa.int64(), "int32": pa.int32(), "string": pa.string(), "bool": pa.bool_(), "ids": pa.list_(pa.int32())}
    return pa.schema([(name, types[kind]) for name, kind in COLUMNS[form]])


# --- prompts and endings --------------------------------------------------------------------------


def reference_answer(example: Example) -> str:
    """The text a good answer to the prompt has: of a pair the chosen one's first turn, of a bad answer none."""
    if example.kind == "unpaired" and not example.label:
        return ""
    return endings_of(example)[0][0].content


def _conversation(example: Example, prompt: Sequence[Message], ending: Sequence[Message]) -> Example:
    """One side as a conversation in which only the ending's answers may enter the loss."""
    silenced = (replace(turn, weight=0.0) if turn.role == "assistant" else turn for turn in prompt)
    return replace(example, kind="chat", messages=(*silenced, *ending), chosen=(), rejected=(), label=None)


# --- pairs and rated answers -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sides:
    """The endings of one example, each as a row of its own: (chosen, rejected), or one answer.

    `prompt_length`: tokens that all sides share before the first token of any ending that is in the loss.
    """

    rows: tuple[Tokens, ...]
    prompt_length: int

    @property
    def length(self) -> int:
        """Tokens of the longest side."""
        return max(len(row.ids) for row in self.rows)


@dataclass(frozen=True, slots=True)
class _Side:
    """One side with the text before its ending, by which prompts are compared."""

    row: Tokens
    prompt_text: str

    @property
    def first(self) -> int:
        """The first token in the loss; only for sides that have one."""
        return next(i for i, label in enumerate(self.row.labels) if label != MASKED)


def tokenize_sides(
    examples: Iterable[Example], template: Template, policy: Policy, *, stats: TokenizeStats | None = None
) -> Iterator[Sides | Problem]:
    """The rows of each pair or rated answer, in order, or why it cannot be used. `policy.supervise` is not asked."""
    check_policy(policy)
    for example, outcomes in _encode_sides(examples, template):
        result = _sides(example, outcomes, template, policy)
        if stats is not None:
            stats.count_sides(result if isinstance(result, Problem) else result.rows, template.bos_id)
        yield result


def _encode_sides(
    examples: Iterable[Example], template: Template
) -> Iterator[tuple[Example, list[tuple[Source, Encoded] | Problem]]]:
    """Each example with all its sides encoded; sides go through the tokenizer in batches, like any conversations."""
    read: deque[Example] = deque()

    def conversations() -> Iterator[Example]:
        for example in examples:
            read.append(example)
            prompt = prompt_of(example)
            for ending in endings_of(example):
                yield _conversation(example, prompt, ending)

    encoded = encode_examples(conversations(), template)
    for _, first in encoded:
        example = read.popleft()
        yield example, [first, *(next(encoded)[1] for _ in endings_of(example)[1:])]


def _sides(
    example: Example, outcomes: Sequence[tuple[Source, Encoded] | Problem], template: Template, policy: Policy
) -> Sides | Problem:
    prompt_turns = len(prompt_of(example))
    sides: list[_Side] = []
    for outcome in outcomes:
        if isinstance(outcome, Problem):
            return outcome
        sides.append(_side(*outcome, prompt_turns, template))
    if all(len(side.row.ids) <= policy.max_length for side in sides):
        return _compared(example, sides)
    if policy.overlong == "drop":
        found = f"{max(len(side.row.ids) for side in sides):,} tokens with the longer answer"
        return problem_of(example, "ROW_TOO_LONG", found, f"Raise max_length above {policy.max_length:,}, or cut long rows.")
    return _compared(example, _shortened(example, sides, template, policy), cut=True)


def _side(source: Source, encoded: Encoded, prompt_turns: int, template: Template) -> _Side:
    row = label_source(source, encoded, template, Policy())
    assert source.located is not None, "every side is a conversation"
    shift = len(source.messages) - source.located.turns  # a merged system message makes one turn less
    starts = (answer.start for answer in source.located.answers if answer.message + shift >= prompt_turns)
    return _Side(row, source.text[: next(starts, len(source.text))])


def _shortened(example: Example, sides: Sequence[_Side], template: Template, policy: Policy) -> list[_Side]:
    """All sides within `max_length`: without the fewest oldest exchanges, or with the last one alone and cut at the end."""
    head, exchanges = exchanges_of(prompt_of(example))
    best: list[_Side] | None = None
    low, high = 1, len(exchanges) - 1  # how many of the oldest go
    while low <= high:
        middle = (low + high) // 2
        tried = _side_by_side(example, (*head, *flat(exchanges[middle:])), template)
        if tried is not None and all(len(side.row.ids) <= policy.max_length for side in tried):
            best, high = tried, middle - 1
        else:
            low = middle + 1
    if best is None:
        last = _side_by_side(example, (*head, *exchanges[-1]), template) if len(exchanges) > 1 else None
        best = [replace(side, row=truncate(side.row, policy.max_length)) for side in last or sides]
    return [replace(side, row=_with_losses(side.row, whole.row)) for side, whole in zip(best, sides, strict=True)]


def _side_by_side(example: Example, prompt: tuple[Message, ...], template: Template) -> list[_Side] | None:
    """The sides after another prompt; None where the template refuses it."""
    sides = []
    for ending in endings_of(example):
        source = render_example(_conversation(example, prompt, ending), template)
        encoded = encode_text(source.text, template) if isinstance(source, Source) else None
        if not isinstance(source, Source) or not isinstance(encoded, Encoded):
            return None
        sides.append(_side(source, encoded, len(prompt), template))
    return sides


def _with_losses(row: Tokens, whole: Tokens) -> Tokens:
    return replace(row, lost_tokens=len(whole.ids) - len(row.ids), lost_answer_tokens=max(0, whole.supervised - row.supervised))


def _compared(example: Example, sides: Sequence[_Side], *, cut: bool = False) -> Sides | Problem:
    """The sides as one row, or what makes them no comparison."""
    if any(side.row.supervised == 0 for side in sides):
        if cut:
            hint = "Raise max_length, or shorten the prompt."
            return problem_of(example, "ROW_NO_ANSWER_LEFT", "a prompt that leaves no room for an answer", hint)
        return problem_of(example, "ROW_NO_ANSWER", "no token that would enter the loss", "Each answer needs a turn with text.")
    first, *others = sides
    if any(side.prompt_text != first.prompt_text for side in others):
        return problem_of(
            example,
            "ROW_PROMPTS_DIFFER",
            "the template writes the prompt differently before the two answers",
            "Give both answers the same turns after the prompt, or choose another template.",
        )
    if any(side.row.ids == first.row.ids for side in others):
        found = "the two answers are the same " + ("after cutting" if cut else "tokens")
        return problem_of(example, "ROW_ANSWERS_ALIKE", found, "Raise max_length." if cut else "Remove the pair.")
    shared = min(side.first for side in sides)
    for side in others:
        shared = _common(first.row.ids, side.row.ids, shared)
    return Sides(tuple(side.row for side in sides), shared)


def _common(first: Sequence[int], second: Sequence[int], limit: int) -> int:
    """How many leading ids two rows share, `limit` at most."""
    return next((i for i in range(min(limit, len(first), len(second))) if first[i] != second[i]), limit)


# --- prompts ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as inference writes it, generation prompt included; `messages` are those that are left in it."""

    row: Tokens
    messages: tuple[Message, ...]
    answer: str


def tokenize_prompts(
    examples: Iterable[Example], template: Template, policy: Policy, *, stats: TokenizeStats | None = None
) -> Iterator[Prompt | Problem]:
    """The prompt of each example, in order. One that is too long loses its oldest exchanges (`cut`) or is left out."""
    check_policy(policy)
    for example in examples:
        result = _prompt(example, template, policy)
        if stats is not None:
            stats.count_sides(result if isinstance(result, Problem) else [result.row], template.bos_id)
        yield result


def _prompt(example: Example, template: Template, policy: Policy) -> Prompt | Problem:
    messages = prompt_of(example)
    try:
        ids = template.prompt_ids(messages, example.tools)
        if len(ids) <= policy.max_length:
            return _prompt_row(example, messages, ids, 0)
        if policy.overlong == "drop":
            hint = f"Raise max_length above {policy.max_length:,}, or cut long rows."
            return problem_of(example, "ROW_TOO_LONG", f"a prompt of {len(ids):,} tokens", hint)
        return _newest_prompt(example, len(ids), template, policy)
    except DataError as error:
        return problem_of(example, error.code, error.message, error.remedy or "Change the row, or choose another template.")


def _newest_prompt(example: Example, whole: int, template: Template, policy: Policy) -> Prompt | Problem:
    head, exchanges = exchanges_of(prompt_of(example))
    best: Prompt | None = None
    low, high = 1, len(exchanges) - 1  # how many of the oldest go
    while low <= high:
        middle = (low + high) // 2
        messages = (*head, *flat(exchanges[middle:]))
        ids = template.prompt_ids(messages, example.tools)
        if len(ids) <= policy.max_length:
            best, high = _prompt_row(example, messages, ids, whole - len(ids)), middle - 1
        else:
            low = middle + 1
    if best is not None:
        return best
    found = f"a prompt of {whole:,} tokens whose last question alone is too long"
    return problem_of(example, "ROW_PROMPT_TOO_LONG", found, f"Raise max_length above {policy.max_length:,}.")


def _prompt_row(example: Example, messages: tuple[Message, ...], ids: list[int], lost: int) -> Prompt:
    row = Tokens(ids, [MASKED] * len(ids), (Span(0, len(ids), "prompt"),), example.place, lost_tokens=lost)
    return Prompt(row, messages, reference_answer(example))


# --- rows of the Arrow files ------------------------------------------------------------------------


def side_fields(example: Example, sides: Sides) -> dict[str, Any]:
    """The columns of a pair or a rated answer, index aside."""
    shared = {"prompt_length": sides.prompt_length, "length": sides.length, "place": str(example.place)}
    if len(sides.rows) == 1:
        [row] = sides.rows
        return {"input_ids": row.ids, "labels": row.labels, "label": bool(example.label), **shared}
    chosen, rejected = sides.rows
    return {
        "chosen_ids": chosen.ids,
        "chosen_labels": chosen.labels,
        "rejected_ids": rejected.ids,
        "rejected_labels": rejected.labels,
        **shared,
    }


def prompt_fields(example: Example, prompt: Prompt) -> dict[str, Any]:
    """The columns of a prompt, index aside."""
    messages = json.dumps([message_json(message) for message in prompt.messages], ensure_ascii=False)
    ids = prompt.row.ids
    return {"input_ids": ids, "length": len(ids), "place": str(example.place), "messages": messages, "answer": prompt.answer}
