"""Shapes of preferences: pairs, rated answers, several answers with scores, votes.

Place in the flow: `shapes.detect` names the reader of a row; these are the readers of rows that say which answer is better.
What ratings become is decided later, when all are known (`preferences`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from finetuneflow.data.chat_shapes import (
    ANSWER_KEYS,
    MESSAGE_KEYS,
    Cells,
    chat,
    conversation,
    join_prompt,
    note_placeholders,
    prompt_columns,
    read_chat,
    read_pair,
    system_turn,
    tools_of,
    transcript_turns,
    unique,
    unwrap_alpaca,
    without_end_marker,
)
from finetuneflow.data.conversations import (
    CONTENT_KEYS,
    RowFault,
    empty_answer,
    is_blank_answer,
    prompt_messages,
    read_messages,
    read_text,
    wrong_type,
)
from finetuneflow.data.examples import Example, Message, visible

RATING_KEYS = ("rating", "score", "overall_score", "stars", "quality", "reward", "upvotes", "votes", "likes")
RANK_KEYS = ("rank",)
ANSWER_LIST_KEYS = ("completions", "answers", "responses", "candidates", "outputs", "generations")
RATING_LIST_KEYS = ("ratings", "scores", "rewards", "ranks")
VOTES = ("a", "b", "tie", "both_bad", "good", "bad")

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


# --- ratings and votes ---------------------------------------------------------------------------


def with_rating(cells: Cells, examples: list[Example]) -> list[Example]:
    """A row's one conversation with the number a rating column gives it; other rows as they are."""
    if len(examples) != 1 or examples[0].kind != "chat" or examples[0].rating is not None:
        return examples
    key = cells.first(RATING_KEYS)
    rating = as_number(cells.values[key]) if key else None
    return examples if rating is None else [replace(examples[0], rating=rating)]


def as_number(value: Any) -> float | None:
    """A finite number, also one written as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def has_scored_answers(keys: frozenset[str]) -> bool:
    """Whether a row holds several answers with scores: in lists side by side, or as objects under `completions`."""
    has_prompt = bool(prompt_columns(keys)) or not keys.isdisjoint(MESSAGE_KEYS)
    in_lists = not keys.isdisjoint(ANSWER_LIST_KEYS) and not keys.isdisjoint(RATING_LIST_KEYS)
    return has_prompt and (in_lists or "completions" in keys)


def read_scored_answers(cells: Cells) -> list[Example]:
    """Several answers to one prompt with their scores: the best one, or all of them.

    Where one answer is wanted and the scores cannot be used, the row is read as if they were not there.
    """
    try:
        answers = scored_answers(cells)
    except RowFault:
        if cells.several_answers:
            raise
        if cells.first(MESSAGE_KEYS):
            return read_chat(cells)
        if cells.first(ANSWER_KEYS) is None:
            raise
        return read_pair(cells)
    shape = cells.shape
    prompt, _ = shared_prompt(cells, (Message("assistant", ""),))
    cells.shape = shape
    if prompt is None:
        raise RowFault("ROW_NO_PROMPT", "several answers without the prompt they answer", "Add a `prompt` column.")
    if prompt[-1].role == "assistant":  # a whole conversation, and the lists are about something else
        return read_chat(cells)
    answers = [answer for answer in answers if answer[0].strip()]
    if not answers:
        raise empty_answer("every answer is empty")
    if not cells.several_answers:
        answers = [max(answers, key=lambda answer: answer[1])]
        cells.notes.append("best_of_several")
    return [rated_chat(cells, (*prompt, Message("assistant", text)), rating, ranked) for text, rating, ranked in answers]


def scored_answers(cells: Cells) -> list[tuple[str, float, bool]]:
    """(text, rating, whether it is a rank) of each answer that has a score."""
    answers = cells.values[next(key for key in ANSWER_LIST_KEYS if key in cells.values)]
    scores_key = cells.first(RATING_LIST_KEYS)
    scores = cells.values[scores_key] if scores_key else [None] * (len(answers) if isinstance(answers, list) else 0)
    if not isinstance(answers, list) or not isinstance(scores, list) or len(answers) != len(scores):
        raise RowFault(
            "ROW_BAD_RATING",
            f"{_how_many(answers)} answers and {_how_many(scores)} scores",
            "Give as many scores as answers, each a list.",
        )
    ranked = scores_key == "ranks"
    found = [_scored_answer(answer, score, ranked, cells.notes) for answer, score in zip(answers, scores, strict=True)]
    if not (known := [answer for answer in found if answer is not None]):
        hint = "Give each answer a numeric score, such as `overall_score`, or a list `scores` beside the answers."
        raise RowFault("ROW_BAD_RATING", "no answer has a score that is a number", hint)
    return known


def _how_many(value: Any) -> str:
    return str(len(value)) if isinstance(value, list) else "no list of"


def _scored_answer(answer: Any, score: Any, ranked: bool, notes: list[str]) -> tuple[str, float, bool] | None:
    if isinstance(answer, dict):
        if score is None:
            key = next((key for key in (*RATING_KEYS, *RANK_KEYS) if as_number(answer.get(key)) is not None), None)
            score, ranked = (answer[key], key in RANK_KEYS) if key else (None, False)
        answer = next((answer[key] for key in (*ANSWER_KEYS, *CONTENT_KEYS) if answer.get(key) is not None), None)
    number = as_number(score)
    if number is None:
        return None
    return without_end_marker(read_text(answer, "an answer", notes), notes), -number if ranked else number, ranked


def rated_chat(cells: Cells, turns: tuple[Message, ...], rating: float, ranked: bool, group: str | None = None) -> Example:
    """One rated answer as a conversation; notes of the row go to each."""
    one = replace(cells, notes=[*cells.notes, *(["ranked_only"] if ranked else [])])
    return replace(chat(one, turns, tools=tools_of(cells), group=group), rating=rating)


def read_vote(cells: Cells) -> list[Example]:
    """One line of a vote file (`votes`): a preferred answer beside the other one, or answers called good or bad."""
    vote, answers = cells.values["vote"], cells.values["answers"]
    if vote not in VOTES or not isinstance(answers, dict):
        raise RowFault("ROW_BAD_LABEL", f"the vote {visible(repr(vote), 40)}", f"A vote is one of {', '.join(VOTES)}.")
    if vote == "tie":
        raise RowFault("ROW_NO_PREFERENCE", "a tie", "Nothing to do: a vote for neither side teaches nothing.")
    prompt = prompt_messages(read_messages(cells.values["prompt"], cells.notes), cells.notes)
    said = {side: _voted_answer(answers, side, cells) for side in ("a", "b") if side in answers}
    needed = ("a",) if vote in ("good", "bad") else ("a", "b")
    if not all(side in said for side in needed):
        raise RowFault("ROW_BAD_PREFERENCE", f"the vote {vote!r} without the answers it compares", "Keep vote lines whole.")
    common: dict[str, Any] = {"tools": tools_of(cells), "group": cells.group(), "notes": unique(cells.notes)}
    if vote in ("a", "b"):
        chosen, rejected = (said["a"], said["b"]) if vote == "a" else (said["b"], said["a"])
        if chosen == rejected:
            raise RowFault("ROW_BAD_PREFERENCE", "both answers are the same", "A pair teaches only by its difference.")
        return [Example("preference", cells.place, "vote", prompt, chosen=(chosen,), rejected=(rejected,), **common)]
    return [Example("unpaired", cells.place, "vote", (*prompt, said[side]), label=vote == "good", **common) for side in needed]


def _voted_answer(answers: dict[str, Any], side: str, cells: Cells) -> Message:
    value = answers[side]
    text = read_text(value.get("text") if isinstance(value, dict) else value, f"answer {side}", cells.notes)
    if not text.strip():
        raise empty_answer(f"answer {side} is empty")
    return Message("assistant", text)
