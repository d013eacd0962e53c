"""Examples beyond memory: the spool gives back what went in, from memory and from disk alike."""

from __future__ import annotations

from pathlib import Path

from finetuneflow.data.examples import Example, Message, Place, ToolCall
from finetuneflow.data.spool import Selection, Spool


def make(number: int) -> Example:
    turns = (
        Message("system", "Be brief."),
        Message("user", f"Question {number} é 日本 \u2028"),
        Message("assistant", "", tool_calls=(ToolCall("look", {"n": number, "deep": [1, {"a": None}]}, id=f"c{number}"),)),
        Message("tool", "found", name="look", tool_call_id=f"c{number}"),
        Message("assistant", f"Answer {number}.", weight=0.0 if number % 2 else 1.0),
    )
    tools = ({"type": "function", "function": {"name": "look", "parameters": {}}},)
    return Example(
        "chat",
        Place("a.jsonl", number, number + 1),
        "messages",
        messages=turns,
        tools=tools,
        group=f"g{number % 3}",
        notes=("placeholder",),
    )


def test_examples_on_disk_come_back_equal(tmp_path: Path) -> None:
    examples = [make(n) for n in range(50)]
    spool = Spool(tmp_path, examples, memory_chars=400)
    assert 0 < spool.on_disk < 50
    assert list(spool) == examples and spool[-1] == examples[-1] and spool[7] == examples[7]


def test_small_sets_never_touch_the_disk(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "nowhere", [make(1), make(2)])
    assert spool.on_disk == 0 and len(spool) == 2 and not (tmp_path / "nowhere").exists()


def test_nothing_is_left_when_it_is_closed(tmp_path: Path) -> None:
    spool = Spool(tmp_path, [make(n) for n in range(20)], memory_chars=0)
    assert spool.on_disk == 20
    del spool
    assert list(tmp_path.iterdir()) == []


def test_a_selection_is_a_view_in_its_own_order(tmp_path: Path) -> None:
    spool = Spool(tmp_path, [make(n) for n in range(10)], memory_chars=0)
    picked = Selection(spool, [4, 2, 9])
    assert [e.place.row for e in picked] == [4, 2, 9] and picked[1].place.row == 2 and len(picked[:2]) == 2
    assert [e.place.row for e in spool[3:5]] == [3, 4]
