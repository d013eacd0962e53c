"""The chat: switches the adapter, remembers what fits, forgets what failed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetuneflow.chat import Chat, talk
from finetuneflow.errors import FineTuneFlowError


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    from export.run_dir import make_run
    from finetuneflow.inference import load_generator

    yield load_generator(make_run(tmp_path_factory.mktemp("chat")))


def ask(chat: Chat, line: str) -> dict[str, str]:
    return {name: "".join(pieces) for name, pieces in chat.answer(line)}


def test_base_and_tuned_answer_as_the_generator_does_with_and_without_its_adapter(chat_model: object) -> None:
    chat = Chat(chat_model, max_new_tokens=8)  # type: ignore[arg-type]
    chat.command("/both")
    said = ask(chat, "hello")
    from finetuneflow.data.examples import Message

    prompt = [[Message("user", "hello")]]
    expected = {
        "base": chat_model.view(None).generate(prompt, max_new_tokens=8)[0].text,  # type: ignore[attr-defined]
        "tuned": chat_model.generate(prompt, max_new_tokens=8)[0].text,  # type: ignore[attr-defined]
    }
    assert said == expected


def test_the_conversation_is_kept_and_reset(chat_model: object) -> None:
    chat = Chat(chat_model, system="Be brief.", max_new_tokens=4)  # type: ignore[arg-type]
    ask(chat, "hello")
    ask(chat, "again")
    assert [m.role for m in chat.history] == ["system", "user", "assistant", "user", "assistant"]
    chat.command("/reset")
    assert [m.role for m in chat.history] == ["system"]


def test_a_long_conversation_drops_its_oldest_turns_instead_of_failing(chat_model: object) -> None:
    chat = Chat(chat_model, max_new_tokens=4)  # type: ignore[arg-type]
    for _ in range(12):
        ask(chat, "tell me more about the big red ball " * 4)
    assert len(chat.history) < 24 and chat.history[0].role == "user"


def test_a_question_that_cannot_be_asked_is_not_remembered(chat_model: object) -> None:
    chat = Chat(chat_model, max_new_tokens=4)  # type: ignore[arg-type]
    with pytest.raises(FineTuneFlowError):
        ask(chat, "word " * 2000)
    assert chat.history == []


def test_an_unknown_adapter_is_told_and_the_voice_kept(chat_model: object) -> None:
    chat = Chat(chat_model, max_new_tokens=4)  # type: ignore[arg-type]
    with pytest.raises(FineTuneFlowError, match="No adapter 'other'"):
        chat.command("/use other")
    assert chat.voices == ["active"]


def test_the_loop_ends_with_quit_and_with_the_end_of_input(chat_model: object, capsys: pytest.CaptureFixture[str]) -> None:
    lines = iter(["/help", "hello", "/quit", "never"])
    talk(Chat(chat_model, max_new_tokens=4), read=lambda prompt: next(lines), interactive=False)  # type: ignore[arg-type]
    assert "/both" in capsys.readouterr().out and next(lines) == "never"

    def ended(prompt: str) -> str:
        raise EOFError

    talk(Chat(chat_model), read=ended, interactive=False)  # type: ignore[arg-type]


# --- votes -----------------------------------------------------------------------------------------------------------


def votes_in(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def test_an_answer_is_rated_once_with_its_whole_prompt(chat_model: object, tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    chat = Chat(chat_model, system="Be brief.", votes=path, max_new_tokens=4)  # type: ignore[arg-type]
    assert "no answer" in chat.command("/good")
    ask(chat, "hello")
    said = ask(chat, "again")
    assert "Noted" in chat.command("/good so polite") and "no answer" in chat.command("/bad")
    [vote] = votes_in(path)
    assert [turn["role"] for turn in vote["prompt"]] == ["system", "user", "assistant", "user"]  # type: ignore[attr-defined]
    assert vote["answers"] == {"a": {"model": chat_model.name, "text": said["tuned"]}}  # type: ignore[attr-defined]
    assert (vote["vote"], vote["comment"]) == ("good", "so polite")


def test_of_two_answers_one_is_preferred(chat_model: object, tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    chat = Chat(chat_model, votes=path, max_new_tokens=4)  # type: ignore[arg-type]
    chat.command("/both")
    said = ask(chat, "hello")
    assert "/1, /2 or /tie" in chat.command("/good") and not votes_in(path)
    chat.command("/2")
    ask(chat, "more")
    chat.command("/tie")
    first, second = votes_in(path)
    name = chat_model.name  # type: ignore[attr-defined]
    assert first["vote"] == "b" and second["vote"] == "tie"
    assert first["answers"] == {
        "a": {"model": f"{name} (base)", "text": said["base"]},
        "b": {"model": name, "text": said["tuned"]},
    }


def test_two_answers_that_are_alike_take_no_vote(chat_model: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "votes.jsonl"
    chat = Chat(chat_model, votes=path, max_new_tokens=4)  # type: ignore[arg-type]
    monkeypatch.setattr(type(chat_model), "stream", lambda *_, **__: iter(["So", "."]))
    chat.command("/both")
    ask(chat, "hello")
    for choice in ("/1", "/2", "/tie"):
        assert "are the same" in chat.command(choice) and not path.exists()


def test_what_cannot_be_voted_on_is_told(chat_model: object, tmp_path: Path) -> None:
    chat = Chat(chat_model, max_new_tokens=4)  # type: ignore[arg-type]
    ask(chat, "hello")
    assert "--votes FILE" in chat.command("/good")
    path = tmp_path / "votes.jsonl"
    chat = Chat(chat_model, votes=path, max_new_tokens=4)  # type: ignore[arg-type]
    ask(chat, "hello")
    assert "/good or /bad" in chat.command("/1")
    chat.command("/system Be kind.")
    assert "no answer" in chat.command("/bad") and not path.exists()
    ask(chat, "hello")
    with pytest.raises(FineTuneFlowError):
        ask(chat, "word " * 2000)
    assert "no answer" in chat.command("/bad")  # the vote would be on a question that had no answer
