"""Answers of a model: generated in batches, kept as they come, shown as samples.

A killed evaluation continues where it stopped: each finished batch is appended to a JSONL file, each line keyed
by everything that determines the answer (weights, prompt, decoding, batching). Batches are planned over all
prompts and only whole ones are kept, so the result after a resume is the same to the last token.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuneflow.workspace import sha256_json, translate_os_errors

if TYPE_CHECKING:
    from finetuneflow.evaluation.questions import Question
    from finetuneflow.inference import Decoding, Generation, Generator

Progress = Callable[[int, int], None]


def answer_all(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    batch_size: int = 32,
    resume_path: Path | None = None,
    progress: Progress | None = None,
) -> list[Generation]:
    """Answer all prompts (token ids of `Generator.prompt_ids`) in their order; with `resume_path`, answers found there are not generated again.

    `progress(done, total)` is called after each batch.
    """
    batches = generator.plan_batches(prompts, decoding, batch_size=batch_size)
    record = AnswerRecord(resume_path, _batch_identity(generator, decoding)) if resume_path else None
    answers: dict[int, Generation] = {}
    for batch in batches:
        of_batch = [prompts[i] for i in batch]
        found = record.find(of_batch) if record else None
        if found is None:
            found = generator.generate_batch(of_batch, decoding)
            if record:
                record.append(of_batch, found)
        answers.update(zip(batch, found, strict=True))
        if progress:
            progress(len(answers), len(prompts))
    return [answers[i] for i in range(len(prompts))]


def _batch_identity(generator: Generator, decoding: Decoding) -> str:
    ending = generator.ending
    stops = {"tokens": sorted(ending.tokens), "text": ending.text}
    return sha256_json({"weights": generator.fingerprint(), "decoding": asdict(decoding), "ending": stops})


class AnswerRecord:
    """The file of finished batches, one JSON line each. A torn last line (a kill, a full disk) is cut off."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.identity = identity
        self._known = self._read()

    def find(self, prompts: Sequence[Sequence[int]]) -> list[Generation] | None:
        """The answers to exactly this batch, if it was finished before."""
        return self._known.get(self._key(prompts))

    def append(self, prompts: Sequence[Sequence[int]], answers: Sequence[Generation]) -> None:
        line = json.dumps({"key": self._key(prompts), "answers": [asdict(a) for a in answers]}, ensure_ascii=False) + "\n"
        with translate_os_errors(self.path, needed_bytes=len(line)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(line.encode("utf-8", "surrogatepass"))
                file.flush()
                os.fsync(file.fileno())

    def _key(self, prompts: Sequence[Sequence[int]]) -> str:
        return sha256_json([self.identity, [list(prompt) for prompt in prompts]])

    def _read(self) -> dict[str, list[Generation]]:
        from finetuneflow.inference import Generation

        known: dict[str, list[Generation]] = {}
        if not self.path.exists():
            return known
        whole = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                try:
                    item = json.loads(line)
                    known[item["key"]] = [Generation(**(a | {"ids": tuple(a["ids"])})) for a in item["answers"]]
                except (ValueError, KeyError, TypeError):
                    continue  # a damaged line costs one batch, not the evaluation
        if whole != self.path.stat().st_size:
            os.truncate(self.path, whole)
        return known


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with the expected and the actual answer, for people to read. `output_length` counts tokens."""

    instruction: str
    input: str
    expected_output: str
    model_output: str
    output_length: int
    stopped: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_samples(asked: Sequence[Question], answers: Sequence[Generation], *, count: int = 5) -> list[Sample]:
    """The first `count` answered questions as samples: the last turn is the instruction, what came before it the input."""
    return [
        Sample(
            instruction=question.prompt[-1].content,
            input="\n".join(f"{m.role}: {m.content}" for m in question.prompt[:-1]),
            expected_output=question.expected,
            model_output=answer.text,
            output_length=len(answer.ids),
            stopped=answer.stopped,
        )
        for question, answer in list(zip(asked, answers, strict=True))[:count]
    ]
