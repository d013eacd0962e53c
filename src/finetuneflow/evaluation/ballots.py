"""Ballots: two models answer the same questions, and people say blind which answer is better.

    ballots(A, B, examples)  ->  Ballot, shown in a seeded random order  ->  cast  ->  a line of the vote file (`data.votes`)

Answers are generated in small batches as the voting goes on; questions that the file has a vote on already are skipped, so
a session can be left and taken up again. Importing this module loads no torch.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetuneflow.data.examples import Example, message_json
from finetuneflow.data.votes import Choice, Vote, Voted, append_vote, ballot_key, voted_keys
from finetuneflow.errors import EvaluationError
from finetuneflow.evaluation.questions import Question, fitting, prompt_rows, questions

if TYPE_CHECKING:
    from finetuneflow.inference import Generator

AHEAD = 8  # questions answered at once; more would keep people waiting for the first
Side = Literal["a", "b"]


@dataclass(frozen=True, slots=True)
class Ballot:
    """One question with both answers. `first` says whose answer is shown first; the voter does not see it."""

    question: Question
    answers: dict[str, Voted]
    first: Side

    @property
    def shown(self) -> tuple[str, str]:
        """The two texts in the order in which they are shown."""
        other: Side = "b" if self.first == "a" else "a"
        return self.answers[self.first].text, self.answers[other].text

    def vote(self, choice: Literal["1", "2", "tie", "both_bad"], comment: str = "") -> Vote:
        """What the voter said, in terms of the models."""
        other: Side = "b" if self.first == "a" else "a"
        meant: dict[str, Choice] = {"1": self.first, "2": other, "tie": "tie", "both_bad": "both_bad"}
        example = self.question.example
        return Vote(self.question.prompt, dict(self.answers), meant[choice], comment, example.tools)


@dataclass(slots=True)
class Polling:
    """A voting session: which questions are open, and how it stands."""

    a: Generator
    b: Generator
    path: Path
    asked: list[Question]
    already: int
    seed: int
    max_new_tokens: int
    same: int = 0  # both answered the same: nothing to vote on
    counts: Counter[Choice] = field(default_factory=Counter)

    def ballots(self) -> Iterator[Ballot]:
        """The open questions in order, answered a few at a time."""
        for start in range(0, len(self.asked), AHEAD):
            some = self.asked[start : start + AHEAD]
            answers = [_answers(generator, some, self.max_new_tokens) for generator in (self.a, self.b)]
            for question, first, second in zip(some, *answers, strict=True):
                if first.strip() == second.strip():
                    self.same += 1
                    continue
                swapped = random.Random(f"{self.seed} {question.id}").random() < 0.5
                yield Ballot(question, {"a": Voted(self.a.name, first), "b": Voted(self.b.name, second)}, "b" if swapped else "a")

    def cast(self, vote: Vote) -> None:
        """Write a vote down."""
        append_vote(self.path, vote)
        self.counts[vote.vote] += 1

    def to_dict(self) -> dict[str, Any]:
        """How it stands. `same_answers`: questions left out because both models answer them alike; `open`: those without a vote."""
        choices: tuple[Choice, ...] = ("a", "b", "tie", "both_bad")
        return {
            "a": self.a.name,
            "b": self.b.name,
            "file": str(self.path),
            "votes": {choice: self.counts[choice] for choice in choices},
            "already_voted": self.already,
            "same_answers": self.same,
            "open": len(self.asked) - self.same - self.counts.total(),
        }


def open_polling(
    a: Generator,
    b: Generator,
    examples: Sequence[Example],
    path: Path,
    *,
    limit: int | None = None,
    max_new_tokens: int = 128,
    seed: int = 0,
) -> Polling:
    """A session over the questions of `examples` that `path` has no vote on yet.

    Raises `EVALUATION_NO_DATA` where there is nothing to ask, or no way to tell the models apart.
    """
    if a.name == b.name:
        raise EvaluationError(
            "EVALUATION_NO_DATA",
            f"Both sides are called {a.name!r}: a vote could not say which is meant.",
            remedy="Compare two models.",
        )
    asked, left_out = fitting(questions(examples, limit=limit), (a, b))
    if not asked:
        raise EvaluationError(
            "EVALUATION_NO_DATA",
            "No example has a question that both models can take.",
            remedy=left_out[0].hint if left_out else "Give chat examples.",
        )
    done = voted_keys(path)
    names = [a.name, b.name]
    waiting = [q for q in asked if ballot_key([message_json(turn) for turn in q.prompt], names) not in done]
    return Polling(a, b, path, waiting, len(asked) - len(waiting), seed, max_new_tokens)


def _answers(generator: Generator, asked: Sequence[Question], max_new_tokens: int) -> list[str]:
    from finetuneflow.evaluation.samples import answer_all
    from finetuneflow.inference import Decoding

    found = answer_all(generator, prompt_rows(generator, asked), Decoding(max_new_tokens), batch_size=AHEAD)
    return [answer.text for answer in found]
