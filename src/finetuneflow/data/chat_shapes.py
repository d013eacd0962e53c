"""Shapes of conversations and documents: instruction and answer in columns, lists of turns, transcripts, plain text.

Place in the flow: `shapes.detect` names the reader of a row; this holds the readers for these shapes and the pieces that
other readers build on: a row's cells, the prompt out of its columns, a conversation out of its turns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from finetuneflow.data.conversations import RowFault, read_messages, read_text, read_tools, trainable, wrong_type
from finetuneflow.data.examples import Example, Message, Place, visible

MESSAGE_KEYS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
QUESTION_KEYS = ("question", "query", "problem", "user", "human")
ANSWER_KEYS = (
    "output",
    "answer",
    "response",
    "completion",
    "best_answer",
    "canonical_solution",
    "solution",
    "target",
    "answers",
    "reply",
    "assistant",
)
TEXT_KEYS = ("text", "content", "document", "body", "page_content", "passage", "string")
MEDIA_KEYS = frozenset(("images", "image", "videos", "video", "audios", "audio"))
GROUP_KEYS = ("group", "document_id", "doc_id", "source_document", "conversation_id", "message_tree_id")
SYSTEM_KEYS = ("system", "system_prompt")

NO_INPUT = re.compile(
    r"""[\s<(\["'`{]*(?:no[\s_-]*inputs?(?:[\s_]+(?:needed|required|provided|given|necessary|is\s+(?:needed|required|provided)))?
    |n/?a|none|null|nil|aucune?(?:\s+entrée)?|pas\s+d['’]entrée|not\s+applicable)[\s>)\]"'`}.!]*""",
    re.IGNORECASE | re.VERBOSE,
)
PLACEHOLDER = re.compile(r"\{\{\s*[A-Za-z_]\w*\s*\}\}")
END_MARKERS = (
    "###eos_token###",
    "</s>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<eos>",
)
ALPACA_PREAMBLE = "Below is an instruction that describes a task"
INSTRUCTION_MARK, INPUT_MARK, RESPONSE_MARK = "### Instruction:", "\n### Input:", "\n### Response:"
MARKER_CHARS = 80  # an input that says there is none is never longer
TRANSCRIPT_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
COLUMN_IN_TEMPLATE = re.compile(r"\{([^{}]+)\}")


@dataclass(slots=True)
class Cells:
    """One row on its way to examples: its cells by column key (nulls left out), and what was noticed while reading."""

    place: Place
    values: dict[str, Any]
    tree_paths: Literal["best", "all"] = "best"
    several_answers: bool = False
    shape: str = ""
    notes: list[str] = field(default_factory=list)

    def first(self, keys: Sequence[str]) -> str | None:
        """The first of `keys` that the row has."""
        for key in keys:
            if key in self.values:
                return key
        return None

    def text(self, key: str) -> str:
        return read_text(self.values[key], f"`{key}`", self.notes)

    def optional_text(self, keys: Sequence[str]) -> str:
        key = self.first(keys)
        return self.text(key) if key else ""

    def group(self) -> str | None:
        key = self.first(GROUP_KEYS)
        return str(self.values[key]) if key and isinstance(self.values[key], str | int) else None


Reader = Callable[[Cells], list[Example]]


@lru_cache(maxsize=4096)
def prompt_columns(keys: frozenset[str]) -> tuple[str, ...]:
    """The columns that make up the prompt, in the order in which they are put together.

    `prompt` counts only where no instruction or question is given: then it is the rendered form of the same thing.
    """
    question = next((key for key in QUESTION_KEYS if key in keys), None)
    lead = "instruction" if "instruction" in keys else None
    if lead is None and question is None:
        lead = "prompt" if "prompt" in keys else None
    if lead is None and question is None:
        return ("input",) if "input" in keys else ()
    context = next((key for key in ("context", "passage") if key in keys), None)
    title = "title" if "title" in keys and context is None and question is not None else None
    extra_input = "input" if "input" in keys else None
    return tuple(key for key in (lead, title, context, question, extra_input) if key is not None)


# --- prompts with answers ------------------------------------------------------------------------


def read_pair(cells: Cells) -> list[Example]:
    """instruction/input/output and its synonyms."""
    columns = prompt_columns(frozenset(cells.values))
    answer_key = next(key for key in ANSWER_KEYS if key in cells.values)
    refuse_chat_prompt(cells, columns[0])
    prompt = unwrap_alpaca(join_prompt(cells, columns), cells.notes)
    turns = [
        *system_turn(cells),
        *history_turns(cells),
        Message("user", prompt),
        Message("assistant", read_answer(cells, answer_key)),
    ]
    return [chat(cells, turns)]


def join_prompt(cells: Cells, columns: Sequence[str]) -> str:
    parts = []
    for key in columns:
        part = cells.text(key)
        if key in ("input", "context") and len(columns) > 1 and says_no_input(part):
            cells.notes.append("no_input_marker")
            continue
        if part.strip():
            parts.append(part)
    return "\n\n".join(parts)


def says_no_input(text: str) -> bool:
    return len(text) <= MARKER_CHARS and NO_INPUT.fullmatch(text) is not None


def refuse_chat_prompt(cells: Cells, column: str) -> None:
    """A question made of turns has no answer beside it that we could place (benchmarks keep answers elsewhere)."""
    if isinstance(cells.values[column], list | dict):
        raise wrong_type(f"`{column}`", cells.values[column])


def read_answer(cells: Cells, key: str) -> str:
    value = cells.values[key]
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = value["text"]  # SQuAD: {"text": [...], "answer_start": [...]}
    if isinstance(value, list) and len(value) > 1 and all(isinstance(item, str) for item in value):
        cells.notes.append("first_of_several")
        value = value[0]
    return without_end_marker(read_text(value, f"`{key}`", cells.notes), cells.notes)


def without_end_marker(answer: str, notes: list[str]) -> str:
    stripped = answer.rstrip()
    if not stripped.endswith(END_MARKERS):
        return answer
    marker = next(marker for marker in END_MARKERS if stripped.endswith(marker))
    notes.append("end_marker_removed")
    return stripped.removesuffix(marker).rstrip()


def unwrap_alpaca(prompt: str, notes: list[str]) -> str:
    """The instruction and input inside an applied Alpaca prompt, when it is exactly that; else the prompt as it is."""
    if INSTRUCTION_MARK not in prompt:
        return prompt
    parts = alpaca_parts(prompt, notes)
    if parts is None or parts[1]:
        notes.append("alpaca_prompt_kept")
        return prompt
    notes.append("alpaca_prompt_unwrapped")
    return parts[0]


def alpaca_parts(text: str, notes: list[str]) -> tuple[str, str] | None:
    """Prompt (instruction and input) and response of an Alpaca prompt; None unless the text is exactly one.

    "Exactly" means: each mark once, in order, and nothing before the first but the original preamble.
    """
    if any(text.count(mark) > 1 for mark in (INSTRUCTION_MARK, INPUT_MARK, RESPONSE_MARK)):
        return None
    before, _, rest = text.partition(INSTRUCTION_MARK)
    body, mark, response = rest.partition(RESPONSE_MARK)
    if not mark or (before.strip() and not before.strip().startswith(ALPACA_PREAMBLE)):
        return None
    instruction, _, extra = (part.strip() for part in body.partition(INPUT_MARK))
    if extra and says_no_input(extra):
        notes.append("no_input_marker")
        extra = ""
    return "\n\n".join(part for part in (instruction, extra) if part), response.strip()


def system_turn(cells: Cells) -> list[Message]:
    text = cells.optional_text(SYSTEM_KEYS)
    return [Message("system", text)] if text.strip() else []


def history_turns(cells: Cells) -> list[Message]:
    """Earlier turns as `history: [[question, answer], …]`."""
    history = cells.values.get("history")
    if not history:
        return []
    turns: list[Message] = []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise wrong_type("`history`", history)
        question, answer = (read_text(part, "`history`", cells.notes) for part in pair)
        turns += [Message("user", question), Message("assistant", answer)]
    return turns


def chat(cells: Cells, turns: Sequence[Message], tools: tuple[dict[str, Any], ...] = (), group: str | None = None) -> Example:
    """A chat example after the rules of `trainable`; placeholders are noted."""
    messages = trainable(tuple(turns), cells.notes)
    note_placeholders((message.content for message in messages), cells.notes)
    return Example(
        "chat", cells.place, cells.shape, messages, tools=tools, group=group or cells.group(), notes=unique(cells.notes)
    )


def note_placeholders(texts: Iterator[str], notes: list[str]) -> None:
    for text in texts:
        if "{{" in text and PLACEHOLDER.search(text):
            notes.append("placeholder")
            return


def unique(notes: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(notes)) if notes else ()


def read_self_instruct(cells: Cells) -> list[Example]:
    """One example per instance; all of one task stay together."""
    instances = cells.values["instances"]
    if "instruction" not in cells.values or not isinstance(instances, list) or not instances:
        raise wrong_type("`instances`", instances)
    group = str(cells.values.get("id", cells.place.row))
    examples = []
    for instance in instances:
        if not isinstance(instance, dict):
            raise wrong_type("an instance", instance)
        values = {
            "instruction": cells.values["instruction"],
            **{key: instance[key] for key in ("input", "output") if instance.get(key) is not None},
        }
        if "output" not in values:
            raise RowFault("ROW_NO_ANSWER", "an instance without output", "Add the output of each instance.")
        one = Cells(cells.place, values, shape=cells.shape)
        prompt = join_prompt(one, prompt_columns(frozenset(values)))
        examples.append(
            chat(
                one,
                [Message("user", prompt), Message("assistant", read_answer(one, "output"))],
                group=group if len(instances) > 1 else None,
            )
        )
    return examples


# --- text ----------------------------------------------------------------------------------------


def read_plain_text(cells: Cells) -> list[Example]:
    """A document to continue; a transcript or an applied Alpaca prompt inside it is opened into turns."""
    text = cells.text(cells.shape)
    if cells.shape == "string":
        cells.notes.append("bare_string")
    if not text.strip():
        raise RowFault("ROW_EMPTY_TEXT", "the text is empty", "Remove the row.")
    turns = transcript_turns(text)
    if turns is not None and turns[0].role == "user":
        cells.shape = "hh-rlhf"
        return [chat(cells, turns)]
    if INSTRUCTION_MARK in text:
        parts = alpaca_parts(text, cells.notes)
        if parts is not None and all(parts):
            cells.notes.append("alpaca_prompt_unwrapped")
            return [chat(cells, [Message("user", parts[0]), Message("assistant", without_end_marker(parts[1], cells.notes))])]
        cells.notes.append("alpaca_prompt_kept")
    note_placeholders(iter((text,)), cells.notes)
    return [Example("text", cells.place, cells.shape, text=text, group=cells.group(), notes=unique(cells.notes))]


def transcript_turns(text: str) -> tuple[Message, ...] | None:
    """The turns of an HH-RLHF transcript (blank line, `Human:` or `Assistant:`), or None when the text is no such thing."""
    if "Human:" not in text or "Assistant:" not in text:
        return None
    parts = TRANSCRIPT_TURN.split(text)
    if parts[0].strip() or len(parts) < 5:
        return None
    return tuple(
        Message("user" if role == "Human" else "assistant", said.strip())
        for role, said in zip(parts[1::2], parts[2::2], strict=True)
    )


# --- conversations -------------------------------------------------------------------------------


def read_chat(cells: Cells) -> list[Example]:
    """OpenAI `messages`, ShareGPT `conversations`, and lists that mix them."""
    messages = conversation(cells)
    return [chat(cells, messages, tools=tools_of(cells))]


def conversation(cells: Cells) -> tuple[Message, ...]:
    key = next(key for key in MESSAGE_KEYS if key in cells.values)
    items = cells.values[key]
    if isinstance(items, str):
        items = parsed_cell(items, key)
    if key == "turns" and isinstance(items, list) and items and all(isinstance(item, str) for item in items):
        cells.shape = "turns"
        raise RowFault(
            "ROW_NO_ANSWER",
            f"questions only: {visible(items[0], 60)}",
            "Join the file that holds the answers, or keep it for evaluation.",
        )
    if isinstance(items, list) and items and isinstance(items[0], dict) and "from" in items[0] and cells.shape == "messages":
        cells.shape = "sharegpt"
    messages = read_messages(items, cells.notes)
    system = system_turn(cells)
    return messages if not system or messages[0].role == "system" else (*system, *messages)


def parsed_cell(text: str, key: str) -> Any:
    """A table cell that holds JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowFault(
            "ROW_WRONG_TYPE", f"`{key}` is text that is no JSON: {visible(text, 50)}", "Write the turns as a JSON list."
        ) from error


def tools_of(cells: Cells) -> tuple[dict[str, Any], ...]:
    key = cells.first(("tools", "functions"))
    return read_tools(cells.values[key]) if key else ()
