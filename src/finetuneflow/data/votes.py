"""Votes: what people say about answers, one JSON object per line, written as they say it.

    {"prompt":  [{"role": "user", "content": "…"}],
     "answers": {"a": {"model": "base", "text": "…"}, "b": {"model": "my-run", "text": "…"}},
     "vote":    "a" | "b" | "tie" | "both_bad"      of two answers
                "good" | "bad"                      of one, which stands under "a"
     "time":    "2026-01-31T12:00:00+00:00",
     "comment": "…", "tools": […]}                  both optional

Place in the flow: `ftf compare --votes` and `ftf chat --votes` write it, `preference_shapes.read_vote` reads it as preferences. A line
is written whole and synced before the next question; a line torn by a full disk is passed over and the next one begins anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from finetuneflow.data.examples import Message, message_json
from finetuneflow.errors import StorageError
from finetuneflow.workspace import translate_os_errors

Choice = Literal["a", "b", "tie", "both_bad", "good", "bad"]


@dataclass(frozen=True, slots=True)
class Voted:
    """An answer and the model that gave it."""

    model: str
    text: str


@dataclass(frozen=True, slots=True)
class Vote:
    """One judgement. `answers` holds `a` and `b`, or `a` alone where one answer was rated."""

    prompt: tuple[Message, ...]
    answers: dict[str, Voted]
    vote: Choice
    comment: str = ""
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """Equal for votes on the same prompt about the same models."""
        return ballot_key([message_json(turn) for turn in self.prompt], [voted.model for voted in self.answers.values()])


def ballot_key(prompt: list[dict[str, Any]], models: list[str]) -> str:
    """What a vote is about, whoever stands left or right."""
    return json.dumps([prompt, sorted(models)], sort_keys=True)


def require_vote_file(path: Path) -> None:
    """Raise where votes cannot be added to `path`: to be found before anybody is asked, and before a model is loaded."""
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not (path.is_file() if nearest == path else nearest.is_dir()):
        raise StorageError(
            "STORAGE_UNUSABLE",
            f"Votes cannot be written to {path}: {nearest} is {'a folder' if nearest.is_dir() else 'no folder'}.",
            where=str(path),
            remedy="Name a file with --votes, such as votes.jsonl; it is made with the first vote.",
        )
    if not os.access(nearest, os.W_OK):
        raise StorageError(
            "STORAGE_NOT_WRITABLE",
            f"Votes cannot be written to {path}: this user may not write to {nearest}.",
            where=str(path),
            remedy="Ask for write access, or name another file with --votes.",
        )


def append_vote(path: Path, vote: Vote, *, now: datetime | None = None) -> None:
    """Add one vote at the end of a file, which is made where there is none."""
    record: dict[str, Any] = {
        "prompt": [message_json(turn) for turn in vote.prompt],
        "answers": {side: {"model": voted.model, "text": voted.text} for side, voted in vote.answers.items()},
        "vote": vote.vote,
        "time": (now or datetime.now(UTC)).isoformat(timespec="seconds"),
    }
    if vote.comment:
        record["comment"] = vote.comment
    if vote.tools:
        record["tools"] = list(vote.tools)
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    with translate_os_errors(path, needed_bytes=len(line)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.tell() and not _ends_with_newline(file):
                line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def voted_keys(path: Path) -> set[str]:
    """What a vote file has votes about (`Vote.key`); lines that are no votes are passed over (`ftf data check` names them)."""
    return set(_keys(path)) if path.exists() else set()


def _keys(path: Path) -> Iterator[str]:
    with translate_os_errors(path), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
                yield ballot_key(record["prompt"], [voted["model"] for voted in record["answers"].values()])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
