"""Shapes: which format a row has, and how it is read. No registration: every row is recognised by its own columns.

Place in the flow: `sources.read_rows` -> `examples.to_examples` (which calls **ShapeReader**) -> `quality.inspect`.
`detect` is the whole table of formats, in the order in which they are tried.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from finetuneflow.data.conversations import (
    CONTENT_KEYS,
    RowFault,
    empty_answer,
    is_blank_answer,
    media_fault,
    prompt_messages,
    read_messages,
    read_text,
    read_tools,
    trainable,
    wrong_type,
)
from finetuneflow.data.examples import NOTES, Example, Mapping, Message, Place, Problem, visible
from finetuneflow.data.sources import Row, column_key
from finetuneflow.data.trees import FlatTrees, best_path, every_path
from finetuneflow.errors import DataError

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


class ShapeReader:
    """Reads rows one at a time; rows linked by parent ids are held until their tree is complete."""

    def __init__(self, mapping: Mapping | None, tree_paths: Literal["best", "all"]) -> None:
        self._mapping = MappedReader(mapping) if mapping is not None else None
        self._tree_paths: Literal["best", "all"] = tree_paths
        self._trees = FlatTrees()

    def read(self, row: Row) -> Iterator[Example | Problem]:
        if self._mapping is not None:
            yield from self._read_cells(Cells(row.place, row.fields, shape="mapped"), self._mapping.read)
            return
        cells = Cells(row.place, canonical_cells(row.fields), self._tree_paths)
        if is_flat_message(cells):
            if self._trees.starts_new(cells.values) or self._trees.is_full():
                yield from self.finish()
            self._trees.add(row.place, cells.values)
            return
        yield from self.finish()
        cells.shape, reader = detect(frozenset(cells.values))
        yield from self._read_cells(cells, reader)

    def finish(self) -> Iterator[Example | Problem]:
        """Examples and problems of the rows still held."""
        for places, root, orphan_places in self._trees.take():
            for place in orphan_places:
                yield Problem(
                    place,
                    "ROW_BAD_TREE",
                    "the parent message was not seen before it",
                    "Keep the rows of a tree together, parents first.",
                    "oasst-flat",
                )
            if root is not None:
                cells = Cells(places[0], {"prompt": root}, self._tree_paths, "oasst-flat")
                for result in self._read_cells(cells, read_tree):
                    yield result
                    if isinstance(result, Problem):  # the whole tree is lost: every row of it counts
                        yield from (replace(result, place=place) for place in places[1:])

    @staticmethod
    def _read_cells(cells: Cells, reader: Reader) -> Iterator[Example | Problem]:
        try:
            refuse_media(cells)
            yield from reader(cells)
        except RowFault as fault:
            yield Problem(cells.place, fault.code, fault.found, fault.hint, cells.shape)


@lru_cache(maxsize=4096)
def canonical_names(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(column_key(name) for name in names)


def canonical_cells(fields: dict[str, Any]) -> dict[str, Any]:
    """Cells under their column keys; null cells count as absent (tables have every column in every row)."""
    names = canonical_names(tuple(fields))
    return {key: value for key, value in zip(names, fields.values(), strict=True) if value is not None}


def refuse_media(cells: Cells) -> None:
    if MEDIA_KEYS.isdisjoint(cells.values):
        return
    key = next((key for key in sorted(MEDIA_KEYS) if cells.values.get(key)), None)
    if key is not None:
        raise media_fault(key)


def is_flat_message(cells: Cells) -> bool:
    values = cells.values
    return "message_id" in values and "text" in values and "role" in values and "replies" not in values


# --- the table of formats ------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def detect(keys: frozenset[str]) -> tuple[str, Reader]:
    """The name of the shape and its reader, from the columns a row has. The order settles what could be two things."""
    if {"kind", "shape"} <= keys:
        return "canonical", read_canonical
    if {"chosen", "rejected"} <= keys:
        return "preference", read_preference
    if "instances" in keys:
        return "self-instruct", read_self_instruct
    if "replies" in keys or {"message_tree_id", "prompt"} <= keys:
        return "oasst-tree", read_tree
    if not keys.isdisjoint(("prompt_template", "output_format")):
        return "judge-prompts", refuse_judge_prompt
    messages = next((key for key in MESSAGE_KEYS if key in keys), None)
    if messages is not None:
        return ("kto-messages", read_unpaired) if keys & {"label", "kto_tag"} else ("messages", read_chat)
    if "role" in keys and not keys.isdisjoint(CONTENT_KEYS):
        return "lone-message", refuse_lone_message
    return _detect_pair(keys)


def _detect_pair(keys: frozenset[str]) -> tuple[str, Reader]:
    prompts, answer = prompt_columns(keys), next((key for key in ANSWER_KEYS if key in keys), None)
    if prompts and answer:
        if "kto_tag" in keys or ({"prompt", "label"} <= keys and answer in ("completion", "response")):
            return "kto-prompt", read_unpaired
        return "+".join((*prompts, answer)), read_pair
    text = next((key for key in TEXT_KEYS if key in keys), None)
    if text is not None and not (prompts and text == "passage"):
        return text, read_plain_text
    if prompts:
        return "+".join((*prompts, "function")) if "function" in keys else "+".join(prompts), refuse_prompt_only
    if answer or keys & {"choices", "ground_truth", "possible_answer"}:
        return answer or sorted(keys & {"choices", "ground_truth", "possible_answer"})[0], refuse_answer_only
    return "", refuse_unknown


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


# --- preferences ---------------------------------------------------------------------------------


def read_preference(cells: Cells) -> list[Example]:
    """Preference pairs: a prompt beside two answers, a conversation beside two answers, or two whole transcripts."""
    chosen, rejected = cells.values["chosen"], cells.values["rejected"]
    turns = [answer_turns(cells, "chosen", chosen), answer_turns(cells, "rejected", rejected)]
    prompt, form = shared_prompt(cells, turns[0])
    if prompt is None:
        prompt, endings = common_prefix(turns[0], turns[1])
        form = "hh-rlhf" if isinstance(chosen, str) else "preference-transcripts"
    else:
        endings = [without_prompt(ending, prompt) for ending in turns]
    cells.shape = form
    checked = [check_ending(ending, name) for ending, name in zip(endings, ("chosen", "rejected"), strict=True)]
    if checked[0] == checked[1]:
        raise RowFault(
            "ROW_BAD_PREFERENCE", "chosen and rejected are the same", "A pair teaches only by its difference; remove the row."
        )
    messages = prompt_messages(prompt, cells.notes)
    note_placeholders((message.content for message in (*messages, *checked[0], *checked[1])), cells.notes)
    return [
        Example(
            "preference", cells.place, form, messages, chosen=checked[0], rejected=checked[1],
            tools=tools_of(cells), group=cells.group(), notes=unique(cells.notes),
        )
    ]  # fmt: skip


def answer_turns(cells: Cells, name: str, value: Any) -> tuple[Message, ...]:
    """One side of a pair as turns: a string (an answer or a transcript), one message, or a list of messages."""
    if isinstance(value, str):
        return transcript_turns(value) or (Message("assistant", without_end_marker(value, cells.notes)),)
    if isinstance(value, dict):
        return read_messages([value], cells.notes)
    if isinstance(value, list):
        return read_messages(value, cells.notes)
    raise wrong_type(f"`{name}`", value)


def shared_prompt(cells: Cells, chosen: tuple[Message, ...]) -> tuple[tuple[Message, ...] | None, str]:
    """The prompt beside the pair, or None when it must be found as the common beginning of two transcripts."""
    system = tuple(system_turn(cells))
    if cells.first(MESSAGE_KEYS):
        return conversation(cells), "preference-conversations"
    columns = prompt_columns(frozenset(cells.values))
    if not columns:
        return None, ""
    value = cells.values[columns[0]]
    if isinstance(value, list):
        return (*system, *read_messages(value, cells.notes)), "preference-prompt"
    if isinstance(value, str) and len(chosen) > 1:
        return None, ""
    if isinstance(value, str) and (
        turns := transcript_turns(value.rstrip().removesuffix("Assistant:").rstrip() + "\n\nAssistant:")
    ):
        return (*system, *turns[:-1]), "preference-prompt"
    prompt = unwrap_alpaca(join_prompt(cells, columns), cells.notes)
    return (*system, Message("user", prompt)), "preference-prompt"


def common_prefix(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], list[tuple[Message, ...]]]:
    if len(chosen) < 2 or len(rejected) < 2:
        raise RowFault(
            "ROW_NO_PROMPT",
            "chosen and rejected without the prompt they answer",
            "Add a `prompt` column, or whole transcripts on both sides.",
        )
    length = 0
    while length < min(len(chosen), len(rejected)) and chosen[length] == rejected[length]:
        length += 1
    if length == len(chosen) == len(rejected):
        raise RowFault(
            "ROW_BAD_PREFERENCE", "chosen and rejected are the same", "A pair teaches only by its difference; remove the row."
        )
    if length == 0 or chosen[length - 1].role == "assistant":
        raise RowFault(
            "ROW_BAD_PREFERENCE",
            f"the two transcripts part at turn {length}, which is not an answer",
            "Both must share everything up to the answer.",
        )
    return chosen[:length], [chosen[length:], rejected[length:]]


def without_prompt(ending: tuple[Message, ...], prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """An ending that repeats the prompt, without it."""
    return ending[len(prompt) :] if len(ending) > len(prompt) and ending[: len(prompt)] == prompt else ending


def check_ending(ending: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    if not ending or ending[0].role != "assistant" or ending[-1].role != "assistant":
        raise RowFault(
            "ROW_BAD_PREFERENCE",
            f"`{name}` is not an assistant's answer to the prompt",
            "Each side must begin and end with an assistant turn.",
        )
    if any(is_blank_answer(message) for message in ending):
        raise empty_answer(f"`{name}` is empty")
    return ending


def read_unpaired(cells: Cells) -> list[Example]:
    """KTO: one answer and whether it is good."""
    label_key = "kto_tag" if "kto_tag" in cells.values else "label"
    label = read_label(cells.values[label_key])
    shape = cells.shape
    [example] = read_chat(cells) if cells.first(MESSAGE_KEYS) else read_pair(cells)
    return [
        Example(
            "unpaired",
            cells.place,
            shape,
            example.messages,
            label=label,
            tools=example.tools,
            group=example.group,
            notes=example.notes,
        )
    ]


def read_label(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    spelled = str(value).strip().lower()
    if spelled in ("1", "1.0", "true", "yes", "good", "desirable"):
        return True
    if spelled in ("0", "0.0", "-1", "false", "no", "bad", "undesirable"):
        return False
    raise RowFault(
        "ROW_BAD_LABEL",
        f"the label {visible(repr(value), 40)}",
        "A label is true or false; name or drop the column with a mapping.",
    )


# --- trees ---------------------------------------------------------------------------------------


def read_tree(cells: Cells) -> list[Example]:
    """An OpenAssistant tree: the path of best-ranked replies, or every path."""
    root = cells.values.get("prompt", cells.values)
    if not isinstance(root, dict):
        raise wrong_type("`prompt`", root)
    group = cells.group() or str(root.get("message_tree_id") or root.get("message_id") or cells.place.row)
    if cells.tree_paths == "best":
        path, others = best_path(root)
        if others:
            cells.notes.append("replies_left_out")
        return [chat(cells, read_messages(path, cells.notes), group=group)]
    examples: dict[tuple[Message, ...], Example] = {}
    for path in every_path(root):
        one = Cells(cells.place, cells.values, shape=cells.shape)
        example = chat(one, read_messages(path, one.notes), group=group)
        examples.setdefault(example.messages, example)
    return list(examples.values())


# --- our own form --------------------------------------------------------------------------------


def read_canonical(cells: Cells) -> list[Example]:
    """What `examples.to_canonical` wrote; checked like any other row, so an edited file is safe to read."""
    values = cells.values
    stored = values.get("notes", [])
    if not isinstance(stored, list) or not set(map(str, stored)) <= NOTES.keys():
        raise wrong_type("`notes`", stored)
    cells.notes.extend(stored)
    cells.shape = str(values["shape"])
    kind, tools, group, notes = values["kind"], read_tools(values.get("tools")), cells.group(), cells.notes
    if kind == "text":
        text = cells.text("text") if "text" in values else ""
        if not text.strip():
            raise RowFault("ROW_EMPTY_TEXT", "the text is empty", "Remove the row.")
        return [Example("text", cells.place, cells.shape, text=text, group=group, notes=unique(notes))]
    messages = read_messages(values.get("messages"), notes)
    if kind == "chat":
        return [
            Example("chat", cells.place, cells.shape, trainable(messages, notes), tools=tools, group=group, notes=unique(notes))
        ]
    if kind == "unpaired":
        label = read_label(values.get("label"))
        return [
            Example(
                "unpaired",
                cells.place,
                cells.shape,
                trainable(messages, notes),
                label=label,
                tools=tools,
                group=group,
                notes=unique(notes),
            )
        ]
    if kind != "preference":
        raise RowFault("ROW_UNKNOWN_SHAPE", f"kind {visible(str(kind), 30)!r}", "Kinds are chat, text, preference and unpaired.")
    sides = [check_ending(read_messages(values.get(side), notes), side) for side in ("chosen", "rejected")]
    prompt = prompt_messages(messages, notes)
    return [
        Example(
            "preference",
            cells.place,
            cells.shape,
            prompt,
            chosen=sides[0],
            rejected=sides[1],
            tools=tools,
            group=group,
            notes=unique(notes),
        )
    ]


# --- rows that are recognised but cannot be learned from -------------------------------------------


def refuse_prompt_only(cells: Cells) -> list[Example]:
    key = prompt_columns(frozenset(cells.values))[0]
    shown = visible(json.dumps(cells.values[key], ensure_ascii=False, default=str)[:200], 60)
    hint = "Join the file that holds the answers (often by id), or keep it for evaluation."
    raise RowFault("ROW_NO_ANSWER", f"a prompt without an answer: {shown}", hint)


def refuse_answer_only(cells: Cells) -> list[Example]:
    raise RowFault(
        "ROW_NO_PROMPT",
        f"answers without the question they belong to (column `{cells.shape}`)",
        "Join the file that holds the questions by id.",
    )


def refuse_judge_prompt(cells: Cells) -> list[Example]:
    raise RowFault(
        "ROW_NOT_AN_EXAMPLE",
        "a prompt template for a judge, not an example",
        "Keep it for evaluation; there is nothing to learn from it.",
    )


def refuse_lone_message(cells: Cells) -> list[Example]:
    raise RowFault(
        "ROW_LONE_MESSAGE",
        f"a single message of role {visible(str(cells.values['role']), 30)!r}",
        "Put the turns of one conversation into one row, under `messages`.",
    )


def refuse_unknown(cells: Cells) -> list[Example]:
    names = sorted(cells.values)
    if not names:
        raise RowFault("ROW_UNKNOWN_SHAPE", "no column with a value", "Remove the row.")
    raise RowFault("ROW_UNKNOWN_SHAPE", f"columns {visible(', '.join(names), 100)}", _nearest_columns(names, cells.values))


def _nearest_columns(names: list[str], values: dict[str, Any]) -> str:
    known = ("instruction", *QUESTION_KEYS, "prompt", *ANSWER_KEYS, *TEXT_KEYS, *MESSAGE_KEYS, "chosen", "rejected")
    guesses = [(name, difflib.get_close_matches(name[:60], known, n=1, cutoff=0.75)) for name in names[:20]]
    if lonely := {"chosen", "rejected"} & set(names):
        return f"A preference pair has both `chosen` and `rejected`; there is only `{lonely.pop()}`."
    meant = [f"column `{visible(name, 40)}`: did you mean `{close[0]}`?" for name, close in guesses if close and close[0] != name]
    if meant:
        return f"{'; '.join(meant[:3])} Rename it, or name the columns with a mapping."
    inside = next(
        (name for name in names if isinstance(values[name], list) and values[name] and isinstance(values[name][0], dict)), None
    )
    if inside is not None:
        return f"The examples seem to lie under `{visible(inside, 40)}`: write that list alone to a file."
    return "Name the columns with a mapping (prompt, answer, messages, text, …)."


# --- explicit mapping ------------------------------------------------------------------------------


class MappedReader:
    """Reads rows as a `Mapping` says."""

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        given = {name for name in mapping.__slots__ if getattr(mapping, name)}
        if not (given & {"messages", "text"} or {"prompt", "answer"} <= given or {"chosen", "rejected"} <= given):
            raise DataError(
                "DATASET_BAD_MAPPING",
                f"The mapping names {', '.join(sorted(given)) or 'nothing'}, which is not enough to make an example.",
                remedy="Name `messages`, or `text`, or `prompt` and `answer`, or `chosen` and `rejected`.",
            )

    def read(self, cells: Cells) -> list[Example]:
        mapped = Cells(cells.place, self._values(cells), shape="mapped", notes=cells.notes)
        return self._examples(mapped)

    def _values(self, cells: Cells) -> dict[str, Any]:
        names = {"answer": "output", "text": "text"}
        values: dict[str, Any] = {}
        for role in self._mapping.__slots__:
            source = getattr(self._mapping, role)
            if source:
                value = self._cell(cells, source, role)
                if value is not None:
                    values[names.get(role, role)] = value
        return values

    def _cell(self, cells: Cells, source: str, role: str) -> Any:
        if source in cells.values:
            return cells.values[source]
        columns = COLUMN_IN_TEMPLATE.findall(source)
        missing = next((name for name in columns or [source] if name not in cells.values), None)
        if missing is not None:
            close = difflib.get_close_matches(missing, cells.values, n=1)
            hint = f"Did you mean `{close[0]}`?" if close else f"Columns are: {visible(', '.join(cells.values), 100)}."
            raise RowFault("ROW_MISSING_COLUMN", f"no column `{visible(missing, 40)}` (for {role})", hint)
        return COLUMN_IN_TEMPLATE.sub(lambda match: read_text(cells.values[match[1]], f"`{match[1]}`", cells.notes), source)

    def _examples(self, cells: Cells) -> list[Example]:
        if {"chosen", "rejected"} <= cells.values.keys():
            return [replace(pair, shape="mapped") for pair in read_preference(cells)]
        if "label" in cells.values:
            return read_unpaired(cells)
        if "messages" in cells.values:
            return [replace(example, shape="mapped") for example in read_chat(cells)]
        if "prompt" in cells.values and "output" in cells.values:
            return read_pair(cells)
        if "text" in cells.values:
            return [_text_example(cells)]
        raise RowFault(
            "ROW_NO_ANSWER" if "prompt" in cells.values else "ROW_NO_PROMPT",
            "a mapped column is empty in this row",
            "Fill it, or remove the row.",
        )


def _text_example(cells: Cells) -> Example:
    text = cells.text("text")
    if not text.strip():
        raise RowFault("ROW_EMPTY_TEXT", "the text is empty", "Remove the row.")
    note_placeholders(iter((text,)), cells.notes)
    return Example("text", cells.place, "mapped", text=text, group=cells.group(), notes=unique(cells.notes))
