"""Blind votes on two models: the right model gets the vote, nothing is asked twice, and the file is training data."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from export.run_dir import make_run
from face import Ftf
from finetuneflow.errors import EvaluationError
from finetuneflow.evaluation.ballots import Polling, open_polling
from finetuneflow.evaluation.questions import read_examples
from finetuneflow.voting import vote

QUESTIONS = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    from finetuneflow.inference import load_generator

    run = make_run(tmp_path_factory.mktemp("voting"))
    tuned = load_generator(run)
    return tuned.view(None, name="base"), tuned, run


@pytest.fixture
def examples(tmp_path: Path) -> list[Any]:
    path = tmp_path / "questions.jsonl"
    rows = ({"question": f"What does number {n} say to the big red ball?", "answer": f"It says {n}."} for n in range(QUESTIONS))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples([path])[0]


def polling(models: tuple[Any, Any, Path], examples: list[Any], path: Path, **options: Any) -> Polling:
    return open_polling(models[0], models[1], examples, path, max_new_tokens=6, **options)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def saying(*words: str) -> Callable[[str], str]:
    """A reader of typed lines that ends like the end of input."""
    waiting: Iterator[str] = iter(words)

    def read(prompt: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    return read


def test_whichever_is_shown_first_the_vote_goes_to_the_right_model(
    models: tuple[Any, Any, Path], examples: list[Any], tmp_path: Path
) -> None:
    session = polling(models, examples, tmp_path / "v.jsonl")
    ballots = list(session.ballots())
    assert {ballot.first for ballot in ballots} == {"a", "b"}, "the order must not give the models away"
    for ballot in ballots:
        answers = {side: voted.text for side, voted in ballot.answers.items()}
        expected = models[0].generate([list(ballot.question.prompt)], max_new_tokens=6)[0].text
        assert answers["a"] == expected and ballot.answers["b"].model == models[1].name
        for key, text in zip(("1", "2"), ballot.shown, strict=True):
            cast = ballot.vote(key)  # type: ignore[arg-type]
            assert cast.answers[cast.vote].text == text


def test_the_order_depends_on_the_seed_alone(models: tuple[Any, Any, Path], examples: list[Any], tmp_path: Path) -> None:
    orders = [
        [ballot.first for ballot in polling(models, examples, tmp_path / "v.jsonl", seed=seed).ballots()] for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_a_session_is_left_and_taken_up_again(models: tuple[Any, Any, Path], examples: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    screen = io.StringIO()
    open_questions = len(list(polling(models, examples, path).ballots()))
    assert open_questions > 6
    first = polling(models, examples, path)
    vote(first, Console(file=screen), read=saying("1", "what?", "t", "b too vague", "q", "2"), interactive=False)
    assert [(row["vote"] in ("a", "b"), row.get("comment")) for row in lines(path)] == [
        (True, None),
        (False, None),
        (False, "too vague"),
    ]
    shown = screen.getvalue()
    assert models[0].name not in shown.replace("base", "") and models[1].name not in shown  # blind
    second = polling(models, examples, path)
    assert second.already == 3
    vote(second, Console(file=io.StringIO()), read=saying(*["2"] * 50), interactive=False)
    assert len(lines(path)) == open_questions == len({json.dumps(row["prompt"]) for row in lines(path)})
    assert sum(polling(models, examples, path).to_dict()["votes"].values()) == 0


def test_models_of_one_name_and_files_without_questions_are_refused(
    models: tuple[Any, Any, Path], examples: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(EvaluationError, match="Both sides are called"):
        open_polling(models[1], models[1], examples, tmp_path / "v.jsonl")
    with pytest.raises(EvaluationError, match="No example has a question"):
        open_polling(models[0], models[1], [], tmp_path / "v.jsonl")


def test_the_verb_takes_votes_from_a_pipe_and_the_file_trains(
    ftf: Ftf, models: tuple[Any, Any, Path], examples: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, votes = tmp_path / "questions.jsonl", tmp_path / "votes.jsonl"
    arguments = ("compare", "base", models[2], "--data", data, "--votes", votes, "--max-new-tokens", 6)
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n2 shorter\nt\nq\n"))
    answer = ftf(*arguments, "--json")
    assert answer.code == 0, answer.err
    assert sum(answer.json["votes"].values()) == 3 and answer.json["votes"]["tie"] == 1
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n"))
    again = ftf(*arguments)
    assert again.code == 0 and "1 vote added" in again.out and "3 questions had a vote before" in again.out
    report = ftf("data", "check", votes, "--json").json[0]
    assert report["preferences"]["pair"] == 3 and report["rejected"] == {"ROW_NO_PREFERENCE": 1}
    assert ftf(*arguments, "--suite", "starter").code == 2


def test_no_votes_added_is_told_with_its_reason(
    ftf: Ftf, models: tuple[Any, Any, Path], examples: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, votes = tmp_path / "questions.jsonl", tmp_path / "votes.jsonl"
    arguments = ("compare", "base", models[2], "--data", data, "--votes", votes, "--max-new-tokens", 6, "--limit", 2)
    monkeypatch.setattr("sys.stdin", io.StringIO("q\n"))
    assert f"0 votes added to {votes}: 2 questions left open." in ftf(*arguments).out
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n2\n"))
    assert "2 votes added" in ftf(*arguments).out
    told = ftf(*arguments).out
    assert f"0 votes added to {votes}: 2 questions had a vote before." in told and "--limit" in told


def test_answers_that_are_alike_are_not_voted_on_and_that_is_told(
    ftf: Ftf, models: tuple[Any, Any, Path], examples: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, votes = tmp_path / "questions.jsonl", tmp_path / "votes.jsonl"
    monkeypatch.setattr("finetuneflow.evaluation.ballots._answers", lambda generator, asked, limit: ["So. "] * len(asked))
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n" * QUESTIONS))
    arguments = ("compare", "base", models[2], "--data", data, "--votes", votes)
    assert f"0 votes added to {votes}: both models answer {QUESTIONS} questions alike" in ftf(*arguments).out
    assert not votes.exists()
    assert ftf(*arguments, "--json").json["same_answers"] == QUESTIONS


@pytest.mark.parametrize("arguments", [("compare", "base", "starter"), ("chat", "starter")], ids=lambda arguments: arguments[0])
def test_a_vote_file_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    ftf: Ftf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr("finetuneflow.inference.load_generator", lambda *_, **__: pytest.fail("loaded"))
    answer = ftf(*arguments, "--votes", tmp_path, *(("--message", "Hi", "--json") if arguments[0] == "chat" else ("--json",)))
    assert (answer.code, answer.json["error_code"]) == (10, "STORAGE_UNUSABLE")
