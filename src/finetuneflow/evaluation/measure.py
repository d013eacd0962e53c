"""Evaluate one model: loss, scores of its answers, samples, acceptance suite; written as one JSON file.

    evaluate(run or Generator, data)  ->  Evaluation  ->  evals/<name>.json (written whole or not at all)
                                                         evals/<name>.answers.jsonl (grows while answers come)

A killed evaluation, started again, takes the answers that are there and ends the same.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetuneflow.data.examples import Example, Problem
from finetuneflow.errors import EvaluationError
from finetuneflow.evaluation.judges import Judge
from finetuneflow.evaluation.preferences import PairFigures, pair_figures, reward_figures
from finetuneflow.evaluation.questions import (
    Question,
    as_conversation,
    fitting,
    label_rows,
    prompt_rows,
    questions,
    read_examples,
)
from finetuneflow.evaluation.samples import Progress, Sample, answer_all, make_samples
from finetuneflow.evaluation.scores import TextScores, exact_match, score_answers, token_f1
from finetuneflow.evaluation.suite import Suite, SuiteResult, load_suite, run_suite
from finetuneflow.workspace import check_name, safe_join, write_json

if TYPE_CHECKING:
    from finetuneflow.evaluation.losses import Losses
    from finetuneflow.inference import Generation, Generator


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured and how.

    `limit`: questions answered at most (None: all; the loss is always taken over all examples); 0 generates nothing.
    `max_length` and `supervise` shape the rows of the loss, as in training.
    """

    limit: int | None = 200
    samples: int = 5
    max_new_tokens: int = 128
    batch_size: int = 32
    max_length: int = 2048
    supervise: Literal["assistant", "last", "all"] = "assistant"


@dataclass(frozen=True, slots=True)
class AnsweredItem:
    """One question with both answers and its own scores."""

    id: str
    prompt: str
    expected: str
    answer: str
    stopped: bool
    exact: bool
    token_f1: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All that was measured of one model. `skipped` counts, per code, rows and examples that were left out."""

    name: str
    model: str
    losses: Losses | None
    scores: TextScores | None
    samples: tuple[Sample, ...]
    suite: SuiteResult | None
    items: tuple[AnsweredItem, ...]
    skipped: Mapping[str, int]
    options: Options
    seconds: float
    preferences: PairFigures | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model": self.model,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 2),
            "losses": self.losses.to_dict() if self.losses else None,
            "scores": self.scores.to_dict() if self.scores else None,
            "suite": self.suite.to_dict() if self.suite else None,
            "preferences": self.preferences.to_dict() if self.preferences else None,
            "samples": [sample.to_dict() for sample in self.samples],
            "items": [asdict(item) for item in self.items],
            "skipped": dict(self.skipped),
            "options": asdict(self.options),
        }


def evaluate(
    target: Generator | Path | str,
    data: Sequence[Path | str] | Sequence[Example] | None = None,
    *,
    name: str = "evaluation",
    suite: Suite | Path | str | None = None,
    judges: Mapping[str, Judge] | None = None,
    options: Options | None = None,
    out_dir: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model on examples, on a suite, or on both.

    `target`: a Generator, or what `load_generator` takes. For a run directory, `data` defaults to what the run held out,
    `options` to its settings and `out_dir` to its `evals/`; elsewhere nothing is written without `out_dir`.
    """
    check_name(name, what="an evaluation name")
    started = time.monotonic()
    run = Path(target) if isinstance(target, Path | str) and (Path(target) / "run.yaml").is_file() else None
    options = options or (options_of_run(run) if run else Options())
    out_dir = out_dir or (run / "evals" if run else None)
    suite = load_suite(suite) if isinstance(suite, Path | str) else suite
    examples, problems = _examples(data, run)
    if not examples and suite is None:
        raise EvaluationError(
            "EVALUATION_NO_DATA", "There is neither evaluation data nor a suite.", remedy="Name a data file or a suite."
        )
    if run and objective_of(run) == "reward":
        return _reward_evaluation(run, examples, problems, name, options, out_dir, started)
    generator = _generator(target)
    resume_path = safe_join(out_dir, f"{name}.answers.jsonl") if out_dir else None
    losses, unlabelled = example_losses(generator, examples, options)
    preferences, unpaired = pair_figures(generator, examples, max_length=options.max_length)
    asked, unasked = fitting(questions(examples, limit=options.limit), [generator])
    answers = answer_questions(generator, asked, options, resume_path=resume_path, progress=progress)
    result = Evaluation(
        name=name,
        model=generator.name,
        losses=losses,
        scores=score_answers([a.text for a in answers], [q.expected for q in asked]) if asked else None,
        samples=tuple(make_samples(asked, answers, count=options.samples)),
        suite=_run_suite(generator, suite, judges, options, resume_path, progress),
        items=tuple(_item(question, answer) for question, answer in zip(asked, answers, strict=True)),
        skipped=_count_codes([*problems, *unlabelled, *unpaired, *unasked]),
        options=options,
        seconds=time.monotonic() - started,
        preferences=preferences,
    )
    if out_dir:
        write_json(safe_join(out_dir, f"{name}.json"), result.to_dict())
    return result


def _reward_evaluation(
    run: Path, examples: list[Example], problems: list[Problem], name: str, options: Options, out_dir: Path | None, started: float
) -> Evaluation:
    """A reward model writes no answers: what it can be measured by is how it ranks pairs."""
    result = Evaluation(
        name=name,
        model=run.resolve().name,
        losses=None,
        scores=None,
        samples=(),
        suite=None,
        items=(),
        skipped=_count_codes(problems),
        preferences=reward_figures(run, examples),
        options=options,
        seconds=time.monotonic() - started,
    )
    if out_dir:
        write_json(safe_join(out_dir, f"{name}.json"), result.to_dict())
    return result


def objective_of(run: Path) -> str:
    """What a run was trained for."""
    from finetuneflow.config import load_config

    return load_config(run / "run.yaml")[0].training.objective


def options_of_run(run: Path) -> Options:
    """The evaluation settings a run was made with."""
    from finetuneflow.config import load_config
    from finetuneflow.knowledge.objectives import supervise_of

    config, _ = load_config(run / "run.yaml")
    return Options(
        samples=config.evaluation.samples,
        max_new_tokens=config.evaluation.max_new_tokens,
        max_length=config.data.max_length,
        supervise=supervise_of(config),
    )


def _generator(target: Generator | Path | str) -> Generator:
    from finetuneflow.inference import load_generator

    return load_generator(target) if isinstance(target, Path | str) else target


def _examples(data: Sequence[Path | str] | Sequence[Example] | None, run: Path | None) -> tuple[list[Example], list[Problem]]:
    if data is None:
        held_out = run / "data" / "eval.jsonl" if run else None
        return read_examples([held_out]) if held_out and held_out.is_file() else ([], [])
    given = [item for item in data if isinstance(item, Example)]
    paths = [item for item in data if isinstance(item, Path | str)]
    from_files, problems = read_examples(paths) if paths else ([], [])
    return [*given, *from_files], problems


def example_losses(generator: Generator, examples: Sequence[Example], options: Options) -> tuple[Losses | None, list[Problem]]:
    """Loss over all examples that have a supervised token, and why others have none."""
    from finetuneflow.data.tokens import Policy
    from finetuneflow.evaluation.losses import measure_losses

    policy = Policy(options.supervise, min(options.max_length, generator.context_length), "cut")
    good = [e if e.kind == "text" else as_conversation(e) for e in examples]
    outcomes = label_rows(generator, [example for example in good if example is not None], policy)
    rows = [row for outcome in outcomes if not isinstance(outcome, Problem) for row in outcome]
    problems = [outcome for outcome in outcomes if isinstance(outcome, Problem)]
    if not rows:
        return None, problems
    with generator.ready() as model:
        return measure_losses(model, rows), problems


def answer_questions(
    generator: Generator,
    asked: Sequence[Question],
    options: Options,
    *,
    resume_path: Path | None = None,
    progress: Progress | None = None,
) -> list[Generation]:
    """Answer questions greedily, in their order."""
    from finetuneflow.inference import Decoding

    decoding = Decoding(max_new_tokens=options.max_new_tokens)
    prompts = prompt_rows(generator, asked)
    return answer_all(generator, prompts, decoding, batch_size=options.batch_size, resume_path=resume_path, progress=progress)


def _run_suite(
    generator: Generator,
    suite: Suite | None,
    judges: Mapping[str, Judge] | None,
    options: Options,
    resume_path: Path | None,
    progress: Progress | None,
) -> SuiteResult | None:
    if suite is None:
        return None
    return run_suite(generator, suite, judges=judges, batch_size=options.batch_size, resume_path=resume_path, progress=progress)


def _item(question: Question, answer: Generation) -> AnsweredItem:
    return AnsweredItem(
        id=question.id,
        prompt=question.prompt[-1].content,
        expected=question.expected,
        answer=answer.text,
        stopped=answer.stopped,
        exact=exact_match(answer.text, question.expected),
        token_f1=token_f1(answer.text, question.expected),
    )


def _count_codes(problems: Sequence[Problem]) -> dict[str, int]:
    """Rows per code; a row left out of the loss and of the questions for the same reason counts once."""
    return dict(Counter(code for _, code in dict.fromkeys((problem.place, problem.code) for problem in problems)))


def sample_answers(
    generator: Generator, examples: Sequence[Example], *, count: int = 5, max_new_tokens: int = 128
) -> list[Sample]:
    """A few held-out prompts with the expected and the actual answer: what a run shows when it ends."""
    asked, _ = fitting(questions(examples, limit=2 * count), [generator])
    options = replace(Options(), max_new_tokens=max_new_tokens)
    return make_samples(asked[:count], answer_questions(generator, asked[:count], options), count=count)
