"""Learning rate, rank, epochs, warm-up: what suits a method, a model size and a dataset size, each with its reason.

The bands are those of the reference documents; where published runs say something narrower, their value is taken. Nothing
here depends on the hardware.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from finetuneflow.config import RunConfig
from finetuneflow.knowledge.resolve import METHOD_RATES, objective_rate
from finetuneflow.knowledge.shapes.shape import ModelShape
from finetuneflow.knowledge.values import DataFacts


class Chosen(NamedTuple):
    """A value and, in one sentence, why."""

    value: Any
    reason: str


# --- learning rate ------------------------------------------------------------------------------------

# (parameters below which the rate holds, rate, source). Documented: 5e-6 to 1e-5 below 1B, 1e-6 to 5e-6 to 7B, less above; nine
# models in ten use 5e-6 to 2e-5. Tülu 3 (arXiv:2411.15124) trained 8B with 5e-6 and 70B with 2e-6.
FULL_RATES = (
    (1e9, 1e-5, "the upper end of the documented 5e-6 to 1e-5 below 1B"),
    (10e9, 5e-6, "the upper end of the documented band to 7B; Tülu 3 trained 8B with it"),
    (math.inf, 2e-6, "Tülu 3 trained 70B with it"),
)
# Documented: 2e-4 for LoRA and QLoRA. The QLoRA paper (arXiv:2305.14314, table 9): 2e-4 to 13B, 1e-4 for 33B and 65B.
ADAPTER_RATES = (
    (20e9, 2e-4, "the documented rate for adapters; the QLoRA paper used it to 13B"),
    (math.inf, 1e-4, "the QLoRA paper's rate for 33B and 65B"),
)


def learning_rate(kind: str, num_parameters: int, objective: str = "sft") -> Chosen:
    """Peak rate for a method, a model size and an objective."""
    own = METHOD_RATES.get(kind) or objective_rate(objective, kind)
    if own is not None:
        return Chosen(own[0], f"{own[1][0].upper()}{own[1][1:]}.")
    rates = FULL_RATES if kind == "full" else ADAPTER_RATES
    rate, source = next((rate, source) for below, rate, source in rates if num_parameters < below)
    whose = "Full fine-tuning" if kind == "full" else "An adapter on a model"
    return Chosen(rate, f"{whose} of {count_text(num_parameters)} parameters: {source}.")


# --- adapter ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Guideline:
    """A row of the chapter's table (13.1.7): `targets` is "auto" (queries and values), "attention" or "all-linear"."""

    below: float
    r: int
    targets: str
    size: str
    ranks: str
    layers: str


# The upper end of each row's ranks: a rank too small is the costlier mistake (the chapter, error 1).
GUIDELINES = (
    Guideline(10_000, 16, "auto", "fewer than 10,000 examples", "8-16", "queries and values"),
    Guideline(100_000, 32, "attention", "10,000 to 100,000 examples", "16-32", "all of attention"),
    Guideline(1_000_000, 64, "attention", "100,000 examples and more", "32-64", "all of attention"),
    Guideline(math.inf, 128, "all-linear", "a million examples and more", "64-128", "attention and feed-forward layers"),
)


def guideline(data: DataFacts | None) -> Guideline:
    """The row for a dataset's size; the first where nothing is known."""
    examples = 0 if data is None else data.examples
    return next(row for row in GUIDELINES if examples < row.below)


def adapter_settings(shape: ModelShape, data: DataFacts | None) -> dict[str, Chosen]:
    """Rank, alpha and target modules by the guideline table."""
    row = guideline(data)
    size = f"Taken as {row.size}, their number is not known" if data is None else f"{data.examples:,} examples"
    return {
        "method.r": Chosen(row.r, f"{size}: {row.ranks} for {row.size} (chapter 13.1.7)."),
        "method.alpha": Chosen(2.0 * row.r, "alpha = 2 r, so that the update is scaled by 2 (chapter 13.1.7)."),
        "method.target_modules": Chosen(_targets(shape, row.targets), f"{size}: {row.layers} for {row.size} (chapter 13.1.7)."),
    }


def _targets(shape: ModelShape, wanted: str) -> str | list[str]:
    if wanted != "attention":
        return wanted
    names = {linear.name for linear in shape.linears if linear.part == "attention" and linear.is_linear_module}
    return sorted(names) or "all-linear"


# --- how long -----------------------------------------------------------------------------------------

FEW, MANY = 1_000, 100_000
LEAST_WARMUP, MOST_WARMUP = 10, 2_000


def epochs(data: DataFacts | None, objective: str = "sft") -> Chosen:
    """Passes over the data: 2 to 5 by the documented rule of thumb, more for less data; one where preferences are learned."""
    if objective not in ("sft", "pretrain"):
        return Chosen(
            1.0, "Preferences and rewards are learned in one pass; a second one overfits (Llama 2, section 3.2.2; DPO)."
        )
    if data is None:
        return Chosen(3.0, "The documented default; the size of the data is not known.")
    if data.examples < FEW:
        return Chosen(
            5.0,
            f"{data.examples:,} examples: the upper end of the documented 2 to 5 passes; early stopping ends it when it overfits.",
        )
    if data.examples < MANY:
        return Chosen(3.0, f"{data.examples:,} examples: the documented default, as in Alpaca and Vicuna.")
    return Chosen(2.0, f"{data.examples:,} examples: the lower end of the documented 2 to 5 passes, as in Tülu 3.")


def total_steps(examples: int, effective_batch: int, passes: float, max_steps: int | None = None) -> int:
    """Optimizer steps of a run: the incomplete last batch of each pass counts. At least 1."""
    steps = max(1, math.ceil(passes * math.ceil(max(examples, 1) / effective_batch)))
    return min(steps, max_steps) if max_steps else steps


def warmup(steps: int | None) -> Chosen:
    """Share of steps: the documented 3 %, but at least ten steps (never over 10 %) and at most 2,000."""
    if steps is None:
        return Chosen(0.03, "The documented default.")
    ratio, number = 0.03, round(0.03 * steps)
    if number > MOST_WARMUP:
        ratio = _rounded(MOST_WARMUP / steps)
        return Chosen(ratio, f"{MOST_WARMUP:,} of {steps:,} steps, the most that is documented.")
    if number < LEAST_WARMUP:
        ratio = max(0.03, _rounded(min(0.1, LEAST_WARMUP / steps)))
        return Chosen(ratio, f"3 % of {steps:,} steps would be {number}; adaptive optimizers need some ten to settle.")
    return Chosen(ratio, f"{number:,} of {steps:,} steps: the documented 3 %.")


def _rounded(share: float) -> float:
    return float(f"{share:.2g}")


def step_intervals(config: RunConfig, steps: int | None) -> dict[str, Chosen]:
    """Evaluation and checkpoint intervals, shortened where a run would end before its first ones."""
    if steps is None or steps >= 5 * config.training.eval_steps:
        return {}
    interval = max(1, -(-steps // 5))
    reason = f"Five times in a run of {steps:,} steps, so that the best state can be found."
    return {"training.eval_steps": Chosen(interval, reason), "training.save_steps": Chosen(interval, reason)}


# --- expected quality ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Quality:
    """`documented`: share of full fine-tuning's quality as the chapter's summary has it; None: it has no such figure.

    `research`: what was measured, with its source. Neither is a prediction for this data; `ftf compare` measures that.
    """

    documented: str | None
    research: str

    def to_dict(self) -> dict[str, Any]:
        return {"documented": self.documented, "research": self.research}


_WITHOUT_REGRET = "LoRA Without Regret (Schulman et al., 2025)"
QUALITY = {
    "full": Quality(
        "100 %",
        "Learns most and forgets most: better on code and mathematics, worse on what the model knew before "
        "(LoRA Learns Less and Forgets Less, arXiv:2405.09673).",
    ),
    "lora": Quality(
        "95-98 %",
        "Learns less and forgets less than full fine-tuning (arXiv:2405.09673); matches it on datasets that do not fill the "
        f"adapter, if it is on all layers and the rate is about 10 times as high ({_WITHOUT_REGRET}).",
    ),
    "qlora": Quality(
        "94-97 %",
        "With NF4 and adapters on all linear layers on a par with 16-bit fine-tuning to 65B (QLoRA, arXiv:2305.14314).",
    ),
    "dora": Quality(None, "Above LoRA at the same rank in its authors' tests, most at low ranks (DoRA, arXiv:2402.09353)."),
    "ia3": Quality(None, "Trains scales alone; close to full fine-tuning with few examples (T-Few, arXiv:2205.05638)."),
    "prefix": Quality(None, "Close to full fine-tuning on generation tasks (arXiv:2101.00190); holds little."),
}


def count_text(number: float) -> str:
    """1_240_000_000 as "1.2B"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"
