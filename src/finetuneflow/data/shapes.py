"""Shapes: which format a row has, and how it is read. No registration: every row is recognised by its own columns.

Place in the flow: `sources.read_rows` -> `examples.to_examples` (which calls **ShapeReader**) -> `quality.inspect`.
`detect` is the whole table of formats, in the order in which they are tried.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

from finetuneflow.data.chat_shapes import (
    ANSWER_KEYS,
    COLUMN_IN_TEMPLATE,
    MEDIA_KEYS,
    MESSAGE_KEYS,
    QUESTION_KEYS,
    TEXT_KEYS,
    Cells,
    Reader,
    chat,
    note_placeholders,
    prompt_columns,
    read_chat,
    read_pair,
    read_plain_text,
    read_self_instruct,
    unique,
)
from finetuneflow.data.conversations import (
    CONTENT_KEYS,
    RowFault,
    media_fault,
    prompt_messages,
    read_messages,
    read_text,
    read_tools,
    trainable,
    wrong_type,
)
from finetuneflow.data.examples import NOTES, Example, Mapping, Message, Problem, visible
from finetuneflow.data.preference_shapes import (
    as_number,
    check_ending,
    has_scored_answers,
    rated_chat,
    read_label,
    read_preference,
    read_scored_answers,
    read_unpaired,
    read_vote,
    with_rating,
)
from finetuneflow.data.sources import Row, column_key
from finetuneflow.data.trees import FlatTrees, best_path, every_path, ranked_replies
from finetuneflow.errors import DataError


class ShapeReader:
    """Reads rows one at a time; rows linked by parent ids are held until their tree is complete."""

    def __init__(
        self, mapping: Mapping | None, tree_paths: Literal["best", "all"] = "best", several_answers: bool = False
    ) -> None:
        self._mapping = MappedReader(mapping) if mapping is not None else None
        self._tree_paths: Literal["best", "all"] = tree_paths
        self._several = several_answers
        self._trees = FlatTrees()

    def read(self, row: Row) -> Iterator[Example | Problem]:
        if self._mapping is not None:
            yield from self._read_cells(Cells(row.place, row.fields, shape="mapped"), self._mapping.read)
            return
        cells = Cells(row.place, canonical_cells(row.fields), self._tree_paths, self._several)
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
                cells = Cells(places[0], {"prompt": root}, self._tree_paths, self._several, "oasst-flat")
                for result in self._read_cells(cells, read_tree):
                    yield result
                    if isinstance(result, Problem):  # the whole tree is lost: every row of it counts
                        yield from (replace(result, place=place) for place in places[1:])

    @staticmethod
    def _read_cells(cells: Cells, reader: Reader) -> Iterator[Example | Problem]:
        try:
            refuse_media(cells)
            yield from with_rating(cells, reader(cells))
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
    if {"prompt", "answers", "vote"} <= keys:
        return "vote", read_vote
    if has_scored_answers(keys):
        return "scored-answers", read_scored_answers
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


# --- trees ---------------------------------------------------------------------------------------


def read_tree(cells: Cells) -> list[Example]:
    """An OpenAssistant tree: the path of best-ranked replies, or every path."""
    root = cells.values.get("prompt", cells.values)
    if not isinstance(root, dict):
        raise wrong_type("`prompt`", root)
    group = cells.group() or str(root.get("message_tree_id") or root.get("message_id") or cells.place.row)
    if cells.several_answers:
        ranked = [rated_chat(cells, read_messages(path, cells.notes), -rank, True, group) for path, rank in ranked_replies(root)]
        if not ranked:
            hint = "Pairs need two ranked answers to one message."
            raise RowFault("ROW_NO_PARTNER", "no message of the tree has two ranked answers", hint)
        return ranked
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
    rating = as_number(values.get("rating"))
    if kind == "text":
        text = cells.text("text") if "text" in values else ""
        if not text.strip():
            raise RowFault("ROW_EMPTY_TEXT", "the text is empty", "Remove the row.")
        return [Example("text", cells.place, cells.shape, text=text, group=group, notes=unique(notes))]
    messages = read_messages(values.get("messages"), notes)
    if kind == "chat":
        return [
            Example(
                "chat",
                cells.place,
                cells.shape,
                trainable(messages, notes),
                tools=tools,
                group=group,
                notes=unique(notes),
                rating=rating,
            )
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
        return with_rating(mapped, self._examples(mapped))

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
