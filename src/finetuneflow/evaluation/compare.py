"""Is B better than A? The same prompts and decoding for both, item by item, with a verdict that states its rule.

    compare(A, B, suite or examples)  ->  Comparison
        measures   per measure: win / tie / loss, mean difference with bootstrap interval, sign test, verdict
        items      both answers side by side
        forgetting loss of both on a general text

On a suite the measure is pass or fail. On examples with expected answers it is the loss of the expected answer
(first, the finest), and token F1 and exact match of the generated one. Importing this module loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetuneflow.data.examples import Example, Problem
from finetuneflow.errors import EvaluationError
from finetuneflow.evaluation.judges import Judge
from finetuneflow.evaluation.questions import Question, fitting, label_rows, prompt_rows, questions
from finetuneflow.evaluation.scores import exact_match, token_f1
from finetuneflow.evaluation.statistics import RULE, Interval, Verdict, effect_size, paired_bootstrap, sign_test, verdict
from finetuneflow.evaluation.suite import Suite, SuiteResult, run_suite
from finetuneflow.knowledge.situation import many

if TYPE_CHECKING:
    from finetuneflow.evaluation.losses import Losses
    from finetuneflow.evaluation.samples import Progress
    from finetuneflow.inference import Generation, Generator

Outcome = Literal["win", "tie", "loss"]
GENERAL_TEXT = Path(__file__).with_name("general.txt")
# Losses that differ by less than this (nats per token) are the same to any reader, and rounding in bf16 is larger.
LOSS_TIE = 1e-3


@dataclass(frozen=True, slots=True)
class Measure:
    """One measure of both. Wins and losses are B's; `difference` is turned so that positive means B is better."""

    name: str
    unit: str
    higher_is_better: bool
    items: int
    a: float
    b: float
    wins: int
    ties: int
    losses: int
    difference: Interval
    sign_test_p: float
    effect_size: float | None
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class ComparedItem:
    """One prompt with both answers; `a` and `b` hold each one's value per measure, `outcome` is B's on the first measure."""

    id: str
    prompt: str
    expected: str | None
    a_answer: str
    b_answer: str
    a: Mapping[str, float]
    b: Mapping[str, float]
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Forgetting:
    """Loss of both on a general text that neither was tuned on. `loss_change` above 0: B predicts it worse than A."""

    text: str
    tokens: int
    a_perplexity: float
    b_perplexity: float
    a_bits_per_byte: float
    b_bits_per_byte: float

    @property
    def loss_change(self) -> float:
        """Change of the bits per byte, as a share of A's: 0.05 is five per cent worse."""
        return self.b_bits_per_byte / self.a_bits_per_byte - 1


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that was found; `verdict` is that of the first measure, by `rule`."""

    a: str
    b: str
    measures: tuple[Measure, ...]
    items: tuple[ComparedItem, ...]
    decoding: Mapping[str, Any]
    forgetting: Forgetting | None = None
    rule: str = RULE

    @property
    def verdict(self) -> Verdict:
        return self.measures[0].verdict

    def sentence(self) -> str:
        """The verdict in plain words, with its numbers."""
        m = self.measures[0]
        said = {"better": "is better than", "worse": "is worse than", "no evidence": "shows no evidence of a difference from"}[
            m.verdict
        ]
        return (
            f"{self.b} {said} {self.a}: {m.name} {m.a:.3g} -> {m.b:.3g} on {many(m.items, 'item')} "
            f"(gain {m.difference.mean:+.3g}, 95% interval {m.difference.low:+.3g} to {m.difference.high:+.3g}; "
            f"{m.wins} won, {m.ties} tied, {m.losses} lost; sign test p = {m.sign_test_p:.2g})."
        )

    def to_dict(self) -> dict[str, Any]:
        forgetting = asdict(self.forgetting) | {"loss_change": self.forgetting.loss_change} if self.forgetting else None
        return {
            "a": self.a,
            "b": self.b,
            "verdict": self.verdict,
            "sentence": self.sentence(),
            "rule": self.rule,
            "measures": [asdict(measure) for measure in self.measures],
            "forgetting": forgetting,
            "decoding": dict(self.decoding),
            "items": [asdict(item) for item in self.items],
        }


# --- comparing numbers ------------------------------------------------------------------------------


def measure_pairs(
    name: str,
    a: Sequence[float],
    b: Sequence[float],
    *,
    higher_is_better: bool = True,
    unit: str = "",
    tie_within: float = 0.0,
    seed: int = 0,
) -> Measure:
    """Compare paired values. Pairs that differ by at most `tie_within` are ties, but keep their value in the mean."""
    if not a or len(a) != len(b):
        raise EvaluationError("EVALUATION_NO_DATA", f"{name}: {len(a)} values of A cannot be paired with {len(b)} of B.")
    differences = [(y - x) if higher_is_better else (x - y) for x, y in zip(a, b, strict=True)]
    outcomes = [outcome(difference, tie_within) for difference in differences]
    wins, losses = outcomes.count("win"), outcomes.count("loss")
    interval = paired_bootstrap(differences, seed=seed)
    return Measure(
        name=name,
        unit=unit,
        higher_is_better=higher_is_better,
        items=len(a),
        a=sum(a) / len(a),
        b=sum(b) / len(b),
        wins=wins,
        ties=outcomes.count("tie"),
        losses=losses,
        difference=interval,
        sign_test_p=sign_test(wins, losses),
        effect_size=effect_size(differences),
        verdict=verdict(interval, wins + losses),
    )


def outcome(difference: float, tie_within: float = 0.0) -> Outcome:
    """B's outcome for a difference in its favour."""
    if abs(difference) <= tie_within:
        return "tie"
    return "win" if difference > 0 else "loss"


# --- comparing suite results ------------------------------------------------------------------------


def compare_suites(a: SuiteResult, b: SuiteResult, *, names: tuple[str, str] = ("A", "B"), seed: int = 0) -> Comparison:
    """Compare two results of one suite, for instance saved ones; the prompts must be the same."""
    if [(i.id, i.prompt) for i in a.items] != [(i.id, i.prompt) for i in b.items]:
        raise EvaluationError(
            "EVALUATION_RECORD_INVALID",
            f"The results of {names[0]} and {names[1]} are not of the same prompts.",
            remedy="Evaluate both with the same version of the suite.",
        )
    passed_a, passed_b = ([float(item.passed) for item in result.items] for result in (a, b))
    items = [
        ComparedItem(x.id, x.prompt, None, x.answer, y.answer, {"pass": p}, {"pass": q}, outcome(q - p))
        for x, y, p, q in zip(a.items, b.items, passed_a, passed_b, strict=True)
    ]
    measure = measure_pairs("pass", passed_a, passed_b, unit="share of prompts", seed=seed)
    return Comparison(names[0], names[1], (measure,), tuple(items), {"suite": a.suite, "temperature": 0.0})


# --- comparing models -------------------------------------------------------------------------------


def compare(
    a: Generator,
    b: Generator,
    items: Suite | Sequence[Example],
    *,
    names: tuple[str, str] | None = None,
    judges: Mapping[str, Judge] | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    general_text: Path | None = GENERAL_TEXT,
    limit: int | None = None,
    resume_dir: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Ask both the same, greedily, and compare. `a` and `b` may be views of one model (base and tuned).

    `limit` bounds the number of examples; `general_text` None leaves forgetting out; `resume_dir` keeps the answers
    of an interrupted comparison. A suite brings its own length limit.
    """
    names = names or (a.name, b.name)
    paths = [resume_dir / f"{side}.answers.jsonl" if resume_dir else None for side in ("a", "b")]
    forgetting = measure_forgetting(a, b, general_text) if general_text else None
    if isinstance(items, Suite):
        results = [
            run_suite(g, items, judges=judges, batch_size=batch_size, resume_path=path, progress=progress)
            for g, path in zip((a, b), paths, strict=True)
        ]
        compared = compare_suites(results[0], results[1], names=names, seed=seed)
        decoding: dict[str, Any] = {"suite": items.name, "max_new_tokens": items.max_new_tokens, "temperature": 0.0}
        return Comparison(*names, compared.measures, compared.items, decoding, forgetting)
    asked, left_out = fitting(questions(items, limit=limit), (a, b))
    if not asked:
        why = f" The first was refused: {left_out[0].found}" if left_out else ""
        raise EvaluationError(
            "EVALUATION_NO_DATA",
            f"No example has an assistant's answer to compare with.{why}",
            remedy=left_out[0].hint if left_out else "Give chat examples.",
        )
    answers_a, answers_b = (
        _answers(g, asked, max_new_tokens, batch_size, path, progress) for g, path in zip((a, b), paths, strict=True)
    )
    losses, unit = _answer_losses(a, b, asked)
    values_a, values_b = _values(asked, answers_a, losses[0]), _values(asked, answers_b, losses[1])
    measures = _measures(values_a, values_b, unit=unit, seed=seed)
    compared_items = _items(asked, answers_a, answers_b, values_a, values_b)
    decoding = {"max_new_tokens": max_new_tokens, "temperature": 0.0, "left_out": len(left_out)}
    return Comparison(*names, measures, compared_items, decoding, forgetting)


def _answers(
    generator: Generator, asked: Sequence[Question], limit: int, batch_size: int, path: Path | None, progress: Progress | None
) -> list[Generation]:
    from finetuneflow.evaluation.samples import answer_all
    from finetuneflow.inference import Decoding

    prompts = prompt_rows(generator, asked)
    return answer_all(generator, prompts, Decoding(limit), batch_size=batch_size, resume_path=path, progress=progress)


def _answer_losses(a: Generator, b: Generator, asked: Sequence[Question]) -> tuple[list[list[float]], str]:
    """Loss of each expected answer, per token; per byte where the two cut text into different tokens."""
    both = [expected_losses(generator, asked) for generator in (a, b)]
    if all(x.tokens == y.tokens for x, y in zip(both[0].per_example, both[1].per_example, strict=True)):
        return [[item.mean for item in losses.per_example] for losses in both], "nats per token"
    sizes = [len(question.expected.encode()) for question in asked]
    return [[item.nll / size for item, size in zip(losses.per_example, sizes, strict=True)] for losses in both], "nats per byte"


def expected_losses(generator: Generator, asked: Sequence[Question]) -> Losses:
    """Loss of each question's expected answer after its prompt, in their order; all must fit the context (`fitting`)."""
    from finetuneflow.data.tokens import Policy
    from finetuneflow.evaluation.losses import measure_losses

    policy = Policy(supervise="last", max_length=generator.context_length, overlong="drop")
    rows = label_rows(generator, [question.example for question in asked], policy)
    with generator.ready() as model:
        return measure_losses(model, [row[0] for row in rows if not isinstance(row, Problem)])


def _values(asked: Sequence[Question], answers: Sequence[Generation], losses: Sequence[float]) -> list[dict[str, float]]:
    return [
        {"loss": loss, "token_f1": token_f1(answer.text, q.expected), "exact": float(exact_match(answer.text, q.expected))}
        for q, answer, loss in zip(asked, answers, losses, strict=True)
    ]


def _measures(a: Sequence[Mapping[str, float]], b: Sequence[Mapping[str, float]], *, unit: str, seed: int) -> tuple[Measure, ...]:
    def of(name: str, unit: str, **options: Any) -> Measure:
        return measure_pairs(name, [v[name] for v in a], [v[name] for v in b], unit=unit, seed=seed, **options)

    return (
        of("loss", unit, higher_is_better=False, tie_within=LOSS_TIE),
        of("token_f1", "0 to 1"),
        of("exact", "share of items"),
    )


def _items(
    asked: Sequence[Question],
    answers_a: Sequence[Generation],
    answers_b: Sequence[Generation],
    a: Sequence[Mapping[str, float]],
    b: Sequence[Mapping[str, float]],
) -> tuple[ComparedItem, ...]:
    return tuple(
        ComparedItem(q.id, q.prompt[-1].content, q.expected, x.text, y.text, v, w, outcome(v["loss"] - w["loss"], LOSS_TIE))
        for q, x, y, v, w in zip(asked, answers_a, answers_b, a, b, strict=True)
    )


@dataclass(frozen=True, slots=True)
class GeneralText:
    """One model's loss on a plain text; bits per byte compare models with different tokenizers too."""

    text: str
    tokens: int
    perplexity: float
    bits_per_byte: float


def measure_general(generator: Generator, text_path: Path = GENERAL_TEXT) -> GeneralText:
    """How well a model predicts a plain text."""
    from finetuneflow.evaluation.losses import text_losses

    text = text_path.read_text(encoding="utf-8")
    with generator.ready() as model:
        measured = text_losses(model, generator.tokenizer, text, context=min(generator.context_length, 1024))
    bits = measured.loss * measured.tokens / math.log(2) / len(text.encode())
    return GeneralText(text_path.name, measured.tokens, measured.perplexity, bits)


def measure_forgetting(a: Generator, b: Generator, text_path: Path = GENERAL_TEXT) -> Forgetting:
    """Perplexity of both on a plain text."""
    x, y = measure_general(a, text_path), measure_general(b, text_path)
    return Forgetting(x.text, x.tokens, x.perplexity, y.perplexity, x.bits_per_byte, y.bits_per_byte)
