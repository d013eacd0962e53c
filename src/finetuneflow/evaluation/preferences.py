"""Does a model prefer what people preferred? Accuracy on held-out pairs, by log-probability or by a reward model's scores.

A pair counts as told apart where the chosen answer has the higher score. Log-probabilities are compared per token, because a
sum prefers the shorter answer whatever it says; the accuracy of sums, which dpo trains on, stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuneflow.data.examples import Example, Problem, message_json
from finetuneflow.errors import EvaluationError
from finetuneflow.evaluation.statistics import paired_bootstrap

if TYPE_CHECKING:
    from finetuneflow.inference import Generator


@dataclass(frozen=True, slots=True)
class PairFigures:
    """`accuracy`: share of pairs told apart, with its 95 % interval; `margin`: mean difference of the scores.

    `by`: "log-probability per token" or "reward". `accuracy_of_sums`: by log-probability of whole answers; None by reward.
    """

    by: str
    pairs: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    margin: float
    accuracy_of_sums: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def pair_figures(
    generator: Generator, examples: Sequence[Example], *, max_length: int
) -> tuple[PairFigures | None, list[Problem]]:
    """How a model that answers ranks the preference pairs among `examples`, and the pairs that could not be used."""
    from finetuneflow.data.forms import tokenize_sides
    from finetuneflow.data.tokens import Policy
    from finetuneflow.evaluation.losses import measure_losses

    pairs = [example for example in examples if example.kind == "preference"]
    if not pairs:
        return None, []
    policy = Policy(max_length=min(max_length, generator.context_length))
    outcomes = list(tokenize_sides(pairs, generator.template, policy))  # type: ignore[arg-type]
    usable = [outcome for outcome in outcomes if not isinstance(outcome, Problem)]
    problems = [outcome for outcome in outcomes if isinstance(outcome, Problem)]
    if not usable:
        return None, problems
    with generator.ready() as model:
        losses = measure_losses(model, [row for sides in usable for row in sides.rows]).per_example
    chosen, rejected = losses[::2], losses[1::2]
    per_token = [-a.mean + b.mean for a, b in zip(chosen, rejected, strict=True)]
    sums = [-a.nll + b.nll for a, b in zip(chosen, rejected, strict=True)]
    return figures_of(per_token, by="log-probability per token", sums=sums), problems


def reward_figures(run_dir: Path, examples: Sequence[Example]) -> PairFigures:
    """How a finished reward run ranks preference pairs."""
    from finetuneflow.evaluation.reward_model import load_reward_model

    pairs = [example for example in examples if example.kind == "preference"]
    if not pairs:
        raise EvaluationError(
            "EVALUATION_NO_DATA",
            "A reward model is evaluated on preference pairs, and there is none.",
            remedy="Name a file with chosen and rejected answers.",
        )
    model = load_reward_model(run_dir)
    chosen, rejected = (model(_drawn(pairs, side)) for side in ("chosen", "rejected"))
    return figures_of([a - b for a, b in zip(chosen, rejected, strict=True)], by="reward")


def _drawn(pairs: Sequence[Example], side: str) -> Any:
    """One side of each pair as answers to be scored: what stands before the last turn is the prompt."""
    from finetuneflow.evaluation.rewards import Drawn

    endings = [getattr(pair, side) for pair in pairs]
    return Drawn(
        prompts=[
            [message_json(turn) for turn in (*pair.messages, *ending[:-1])] for pair, ending in zip(pairs, endings, strict=True)
        ],
        completions=[ending[-1].content for ending in endings],
        answers=[None] * len(pairs),
        ids=[()] * len(pairs),
        rows=[str(pair.place) for pair in pairs],
    )


def figures_of(margins: Sequence[float], *, by: str, sums: Sequence[float] | None = None) -> PairFigures:
    """Figures from the differences chosen minus rejected; a tie is half told apart."""
    told = [1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins]
    interval = paired_bootstrap(told)
    return PairFigures(
        by=by,
        pairs=len(margins),
        accuracy=interval.mean,
        accuracy_low=interval.low,
        accuracy_high=interval.high,
        margin=sum(margins) / len(margins),
        accuracy_of_sums=None if sums is None else sum(value > 0 for value in sums) / len(sums),
    )
