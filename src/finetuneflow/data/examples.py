"""Shape: from a row of any common dataset to one canonical `Example`.

Place in the flow: `sources.read_rows` -> **examples.to_examples** -> `quality.inspect`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from finetuneflow.data.json_rows import visible
from finetuneflow.knowledge.values import many
from finetuneflow.workspace import translate_os_errors

if TYPE_CHECKING:
    from finetuneflow.data.sources import Row

__all__ = [
    "NOTES",
    "Example",
    "Kind",
    "Mapping",
    "Message",
    "Place",
    "Problem",
    "Role",
    "ToolCall",
    "endings_of",
    "for_other_objectives",
    "message_json",
    "prompt_of",
    "to_canonical",
    "to_examples",
    "visible",
    "write_canonical",
]

Role = Literal["system", "user", "assistant", "tool"]
Kind = Literal["chat", "text", "preference", "unpaired"]

# The plainest objective that trains on examples of a kind.
OBJECTIVE_OF: dict[Kind, str] = {"chat": "sft", "text": "pretrain", "preference": "dpo", "unpaired": "kto"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row came from. `row` counts rows from 0, `line` counts lines from 1 (text files only)."""

    file: str
    row: int
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line is not None else f"{self.file}[{self.row}]"


@dataclass(frozen=True, slots=True)
class Problem:
    """One row that cannot be used, as a value: bad rows never stop good ones.

    `shape` names the format when it was recognised all the same (questions without answers, …), else it is empty.
    """

    place: Place
    code: str
    found: str
    hint: str
    shape: str = ""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the assistant makes. `arguments` is a JSON object (already parsed)."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `weight` 0.0 keeps an assistant turn out of the loss."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Example:
    """What everything after this stage works on, whatever the file looked like.

    - `chat`: `messages` is the whole conversation.
    - `text`: `text` is the document (continued pre-training).
    - `preference`: `messages` is the shared prompt, `chosen` / `rejected` the two endings.
    - `unpaired` (KTO): `messages` is prompt + answer, `label` says whether the answer is good.

    `rating` is what a rater gave the last answer of a chat, in the units of its file (higher is better); with the note
    `ranked_only` it tells its rank among the answers to the same prompt alone, as 0, -1, -2, ….
    `group` ties examples that must stay on one side of a split (same document or tree);
    `shape` names the format it was read from; `notes` what was recognised and repaired.
    """

    kind: Kind
    place: Place
    shape: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    chosen: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    label: bool | None = None
    tools: tuple[dict[str, Any], ...] = ()
    group: str | None = None
    notes: tuple[str, ...] = field(default=())
    rating: float | None = None


def prompt_of(example: Example) -> tuple[Message, ...]:
    """What the last answer of an example replies to; of a pair, what both endings reply to."""
    if example.kind == "preference":
        return example.messages
    last = next((i for i in range(len(example.messages) - 1, -1, -1) if example.messages[i].role == "assistant"), 0)
    return example.messages[:last]


def endings_of(example: Example) -> tuple[tuple[Message, ...], ...]:
    """What follows the prompt: chosen and rejected of a pair, the last answer of any other conversation."""
    if example.kind == "preference":
        return example.chosen, example.rejected
    return (example.messages[len(prompt_of(example)) :],)


def for_other_objectives(kinds: Counter[str]) -> tuple[str, str]:
    """Of examples the objective cannot use: how many of each kind, and the setting that uses them, for an error; empty for none."""
    found = [kind for kind in OBJECTIVE_OF if kinds[kind]]
    counts = ", ".join(many(kinds[kind], f"{kind} example") for kind in found)
    settings = " or ".join(f"--set training.objective={OBJECTIVE_OF[kind]}" for kind in found)
    return (f"for other objectives: {counts}", f"Train on them with {settings}. ") if found else ("", "")


# What `Example.notes` can hold: code -> what was recognised, and what was done about it.
NOTES: dict[str, str] = {
    "no_input_marker": "An input that only says there is none (<noinput>, N/A, None, …) was left out.",
    "placeholder": "An unfilled placeholder such as {{name}} is in the text and would be learned as it stands.",
    "alpaca_prompt_unwrapped": "The Alpaca prompt was already applied; instruction and input were taken out of it.",
    "alpaca_prompt_kept": "The text looks like an applied prompt template that could not be taken apart safely.",
    "end_marker_removed": "A written-out end marker (</s>, <|im_end|>, …) was removed from the end of an answer.",
    "number_as_text": "A number was read as text.",
    "list_of_one": "A list with one string was read as that string.",
    "first_of_several": "Several answers are given; the first was taken.",
    "empty_system_dropped": "An empty system turn was dropped.",
    "starts_with_assistant": "Turns before the first user turn were dropped.",
    "system_in_the_middle": "A system turn stands after the first user turn; some templates refuse that.",
    "same_role_twice": "Two turns of the same role in a row were joined.",
    "ends_without_answer": "Turns after the last answer were dropped: nothing in them is learned.",
    "empty_answer_dropped": "An empty last answer was dropped.",
    "empty_answer_unsupervised": "An empty answer in the middle is kept out of the loss.",
    "empty_user_turn": "A user turn is empty.",
    "tool_call_without_result": "A tool call is followed by the user, without its result.",
    "tool_call_as_text": "A tool call is written as text inside an answer and stays text.",
    "bare_string": "A bare JSON string was read as a text to continue, not as a prompt.",
    "best_of_several": "Several answers with scores are given; the best one was taken.",
    "ranked_only": "The answer is ranked among the answers to the same prompt, not rated by itself.",
    "pair_of_ratings": "A pair was made of two answers to one prompt by their ratings or ranks.",
    "half_of_a_pair": "A preference pair was parted into a good and a bad answer.",
    "label_of_rating": "Good or bad was decided by the answer's rating.",
    "replies_left_out": "Other branches of the conversation tree were left out (best-ranked path).",
}


@dataclass(frozen=True, slots=True)
class Mapping:
    """Which columns mean what, for a file whose shape is not recognised (or is recognised wrongly).

    Each value is a column name, or a template with columns in braces: `"{title}\n\n{body}"`. Braces are replaced
    literally; nothing is evaluated. Give `messages`, or `text`, or `prompt` with `answer`, or `chosen` with `rejected`.
    """

    prompt: str | None = None
    answer: str | None = None
    system: str | None = None
    context: str | None = None
    messages: str | None = None
    text: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    label: str | None = None
    group: str | None = None
    rating: str | None = None


def to_examples(
    rows: Iterable[Row | Problem],
    mapping: Mapping | None = None,
    *,
    tree_paths: Literal["best", "all"] = "best",
    several_answers: bool = False,
) -> Iterator[Example | Problem]:
    """Turn rows of any known shape into examples, row by row; problems pass through in order.

    One row can give several examples (self-instruct instances; a conversation tree with `tree_paths="all"`), and rows
    linked by parent ids give one example per tree, at the place of its first row. With `several_answers`, trees and rows
    that hold several scored answers to one prompt give every one of them with its rating, instead of the best.
    """
    from finetuneflow.data.shapes import ShapeReader  # shapes builds on the types above

    reader = ShapeReader(mapping, tree_paths, several_answers)
    for row in rows:
        if isinstance(row, Problem):
            yield row
        else:
            yield from reader.read(row)
    yield from reader.finish()


def to_canonical(example: Example) -> dict[str, Any]:
    """The one JSON form every example has on disk; `to_examples` reads it back equal, places aside."""
    optional: dict[str, Any] = {
        "messages": [message_json(message) for message in example.messages],
        "text": example.text,
        "chosen": [message_json(message) for message in example.chosen],
        "rejected": [message_json(message) for message in example.rejected],
        "label": example.label,
        "rating": example.rating,
        "tools": list(example.tools),
        "group": example.group,
        "notes": list(example.notes),
    }
    given = {key: value for key, value in optional.items() if value is not None and value != []}
    return {"kind": example.kind, "shape": example.shape, **given}


def message_json(message: Message) -> dict[str, Any]:
    """One turn in the form of chat files; only what is given."""
    result: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        result["tool_calls"] = [_call_json(call) for call in message.tool_calls]
    if message.name is not None:
        result["name"] = message.name
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    if message.weight != 1.0:
        result["weight"] = message.weight
    return result


def _call_json(call: ToolCall) -> dict[str, Any]:
    result: dict[str, Any] = {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    return result if call.id is None else {"id": call.id, **result}


def write_canonical(items: Iterable[Example | Problem], path: Path, *, problems_path: Path | None = None) -> tuple[int, int]:
    """Write examples as canonical JSON Lines, and problems beside them; returns how many of each.

    Streams: memory is flat. The files appear complete or not at all; one without problems does not, nor does an earlier one stay.
    """
    counts = [0, 0]
    with _appearing(path) as examples_file, _appearing(problems_path) as problems_file:
        for item in items:
            is_problem = isinstance(item, Problem)
            counts[is_problem] += 1
            file = problems_file if is_problem else examples_file
            if file is not None:
                value = asdict(item) if isinstance(item, Problem) else to_canonical(item)
                file.write(json.dumps(value, ensure_ascii=False) + "\n")
    if problems_path is not None and not counts[1]:
        problems_path.unlink(missing_ok=True)
    return counts[0], counts[1]


@contextmanager
def _appearing(path: Path | None) -> Iterator[TextIO | None]:
    """A text file written under a temporary name and renamed at the end; None for no path."""
    if path is None:
        yield None
        return
    temporary = path.with_name(f".{path.name}.part")
    with translate_os_errors(path):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
