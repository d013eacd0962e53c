"""Vote files: written line by line, read back as preferences and rated answers."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from finetuneflow.data.examples import Example, Message, Place, Problem, to_examples
from finetuneflow.data.preferences import FormReader
from finetuneflow.data.sources import Row, read_rows
from finetuneflow.data.votes import Choice, Vote, Voted, append_vote, require_vote_file, voted_keys
from finetuneflow.errors import StorageError

PROMPT = (Message("system", "Be brief."), Message("user", "Why?"))


def vote(choice: Choice, *, one: str = "So.", other: str | None = "Because.", question: str = "Why?", **more: Any) -> Vote:
    answers = {"a": Voted("base", one)} | ({"b": Voted("tuned", other)} if other is not None else {})
    return Vote((Message("system", "Be brief."), Message("user", question)), answers, choice, **more)


def read(path: Path, form: Any) -> list[Example | Problem]:
    return list(FormReader(form).read(to_examples(read_rows(path), several_answers=True)))


def test_a_line_of_the_file_is_the_documented_object(tmp_path: Path) -> None:
    path = tmp_path / "new" / "votes.jsonl"
    append_vote(path, vote("b", comment="kürzer"), now=datetime(2026, 1, 31, 12, tzinfo=UTC))
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
        "answers": {"a": {"model": "base", "text": "So."}, "b": {"model": "tuned", "text": "Because."}},
        "vote": "b",
        "time": "2026-01-31T12:00:00+00:00",
        "comment": "kürzer",
    }


def test_votes_are_pairs_and_rated_answers(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    for number, choice in enumerate(("a", "b", "tie", "both_bad")):
        append_vote(path, vote(choice, question=f"Why {number}?"))  # type: ignore[arg-type]
    append_vote(path, vote("good", one="Fine.", other=None))
    append_vote(path, vote("bad", one="Awful.", other=None))
    pairs = read(path, "pair")
    made = [item for item in pairs if isinstance(item, Example) and item.kind == "preference"]
    assert [(item.chosen[0].content, item.rejected[0].content) for item in made] == [("So.", "Because."), ("Because.", "So.")]
    assert made[0].messages == (PROMPT[0], Message("user", "Why 0?")) and made[0].shape == "vote"
    assert [item.code for item in pairs if isinstance(item, Problem)] == ["ROW_NO_PREFERENCE"]
    rated = [(item.messages[-1].content, item.label) for item in read(path, "rated") if isinstance(item, Example)]
    assert rated == [
        ("So.", True), ("Because.", False), ("Because.", True), ("So.", False), ("So.", False), ("Because.", False),
        ("Fine.", True), ("Awful.", False),
    ]  # fmt: skip


def test_a_torn_last_line_costs_one_vote(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    append_vote(path, vote("a"))
    path.write_bytes(path.read_bytes() + b'{"prompt": [{"role": "us')
    append_vote(path, vote("b", question="How?"))
    items = read(path, "pair")
    assert [item.kind for item in items if isinstance(item, Example)] == ["preference", "preference"]
    assert len([item for item in items if isinstance(item, Problem)]) == 1
    assert voted_keys(path) == {vote("a").key, vote("b", question="How?").key}


def test_a_line_that_nests_too_deep_is_a_bad_row_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    path.write_text('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + ', "answers": {}, "vote": "a"}\n')
    append_vote(path, vote("a"))
    assert voted_keys(path) == {vote("a").key}
    bad, good = read(path, "pair")
    assert isinstance(bad, Problem) and (bad.code, bad.place.line) == ("ROW_TOO_DEEP", 1) and bad.found and bad.hint
    assert isinstance(good, Example)


def test_a_place_that_takes_no_votes_is_found_before_the_first_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "votes.jsonl"
    for path in (file, tmp_path / "new" / "deep" / "votes.jsonl"):
        require_vote_file(path)
    assert not list(tmp_path.iterdir()), "looking leaves nothing behind"
    file.write_text("")
    require_vote_file(file)
    for path in (tmp_path, file / "votes.jsonl"):
        with pytest.raises(StorageError, match="cannot be written") as caught:
            require_vote_file(path)
        assert caught.value.code == "STORAGE_UNUSABLE"
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    for path in (file, tmp_path / "other.jsonl"):
        with pytest.raises(StorageError, match="may not write") as caught:
            require_vote_file(path)
        assert caught.value.code == "STORAGE_NOT_WRITABLE"


def test_what_a_vote_is_about_is_the_prompt_and_both_models() -> None:
    assert vote("a").key == vote("tie", one="other text").key
    assert vote("a").key != vote("a", question="How?").key
    swapped = Vote(PROMPT, {"a": Voted("tuned", "x"), "b": Voted("base", "y")}, "a")
    assert swapped.key == vote("a").key != Vote(PROMPT, {"a": Voted("base", "x")}, "good").key
    assert voted_keys(Path("/nowhere/votes.jsonl")) == set()


WHOLE = {
    "prompt": [{"role": "user", "content": "Why?"}],
    "answers": {"a": {"model": "m", "text": "x"}, "b": {"model": "n", "text": "y"}},
    "vote": "a",
    "time": "2026-01-31T12:00:00+00:00",
}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"vote": "c"}, "ROW_BAD_LABEL"),
        ({"vote": ["a"]}, "ROW_BAD_LABEL"),
        ({"vote": True}, "ROW_BAD_LABEL"),
        ({"answers": ["x", "y"]}, "ROW_BAD_LABEL"),
        ({"answers": {"a": {"text": "x"}}}, "ROW_BAD_PREFERENCE"),
        ({"answers": {}, "vote": "good"}, "ROW_BAD_PREFERENCE"),
        ({"answers": {"a": {"text": "x"}, "b": {"text": "x"}}}, "ROW_BAD_PREFERENCE"),
        ({"answers": {"a": {"text": "x"}, "b": {"text": " "}}}, "ROW_EMPTY_ANSWER"),
        ({"answers": {"a": {"text": "x"}, "b": {"model": "n"}}}, "ROW_EMPTY_ANSWER"),
        ({"answers": {"a": {"text": "x"}, "b": {"text": {"deep": 1}}}}, "ROW_WRONG_TYPE"),
        ({"prompt": []}, "ROW_NO_MESSAGES"),
        ({"prompt": "Why?"}, "ROW_NO_MESSAGES"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "ROW_NO_PROMPT"),
        ({"prompt": [{"role": "narrator", "content": "x"}]}, "ROW_UNKNOWN_ROLE"),
    ],
)
def test_hostile_votes_are_problems(change: dict[str, Any], code: str) -> None:
    [item] = to_examples([Row(Place("v.jsonl", 0, 1), {**WHOLE, **change})])
    assert isinstance(item, Problem) and item.code == code
