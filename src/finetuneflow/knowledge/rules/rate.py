"""Rules about the learning rate, its warm-up and weight decay. Each rule's page has the sources (`rules/CODE.md`)."""

from __future__ import annotations

import math
from typing import Any

from finetuneflow.knowledge.criteria import RATES, WARMUPS, band_at, rate_text
from finetuneflow.knowledge.resolve import ADAPTER_RATE, FULL_RATE, METHOD_RATES
from finetuneflow.knowledge.shapes.shape import ModelShape
from finetuneflow.knowledge.situation import LORA_KINDS, Hit, Situation, count, percent, rule

LOWEST_LORA_RATE = 5e-5  # half of the lowest documented rate for adapters, 1e-4
FORGETTING_RATE = 1e-4  # lesson 1: above it a full model forgets
USELESS_RATE = 1e-6  # lesson 1: below it little changes
IA3_RATE = METHOD_RATES["ia3"][0]
TYPICAL_WEIGHT = 0.02  # `initializer_range` of GPT-2, Llama and most others

# Pre-training rates by parameters: GPT-3 (Brown et al. 2020), table 2.1.
PRETRAINING = (
    (1.25e8, 6e-4),
    (3.5e8, 3e-4),
    (7.6e8, 2.5e-4),
    (1.3e9, 2e-4),
    (2.7e9, 1.6e-4),
    (6.7e9, 1.2e-4),
    (1.3e10, 1e-4),
    (1.75e11, 6e-5),
)
# Highest rates of published full fine-tunings: (up to so many parameters, rate, whose).
PUBLISHED = (
    (1e9, 1e-3, "SmolLM2 135M and 360M used 1e-3"),
    (4e9, 3e-4, "SmolLM2 1.7B used 3e-4"),
    (2e10, 2e-5, "Alpaca 7B, Vicuna and Llama 2-Chat used 2e-5, Tulu 3 8B 5e-6"),
    (math.inf, 2e-5, "LIMA 65B used 1e-5, Llama 2-Chat 70B 2e-5, Tulu 3 70B 2e-6"),
)


def lora_guide(shape: ModelShape) -> float:
    """The rate at which LoRA did best for a model of this width: 5e-4 (2000 / width)^p (Schulman et al. 2025)."""
    exponent = 0.0775 if shape.model_type.startswith("qwen") else 0.781
    return float(5e-4 * (2000 / shape.hidden) ** exponent)


def _rounded(rate: float) -> str:
    """A fitted or interpolated rate: more digits would claim too much."""
    return rate_text(float(f"{rate:.2g}"))


def mean_schedule(scheduler: str) -> float:
    """Mean of the schedule as a share of its peak; a cosine or a line down to zero has half."""
    return 1.0 if scheduler.startswith("constant") else 0.5


@rule("LR_FULL_RATE_ON_ADAPTER", "warning", "An adapter with a learning rate meant for full fine-tuning")
def full_rate_on_adapter(s: Situation) -> Hit | None:
    rate = s.rate
    if s.config.method.kind not in LORA_KINDS or rate >= LOWEST_LORA_RATE or s.traits.family != "supervised":
        return None
    return Hit(
        "training.learning_rate",
        f"{rate_text(rate)} with method {s.config.method.kind}",
        f"Adapters start at zero and need 10 to 50 times the rate of full fine-tuning: {rate_text(ADAPTER_RATE)} is "
        f"{ADAPTER_RATE / rate:.0f} times yours. The loss falls slowly or not at all.",
        {"training.learning_rate": ADAPTER_RATE},
        safe=True,
    )


@rule("LR_ADAPTER_RATE_ON_FULL", "warning", "Full fine-tuning with a learning rate meant for adapters")
def adapter_rate_on_full(s: Situation) -> Hit | None:
    rate = s.config.training.learning_rate  # as it was asked for: the run would lower it
    if rate is None or rate < ADAPTER_RATE or s.config.method.kind != "full" or s.traits.family != "supervised" or s.is_fresh:
        return None
    return Hit(
        "training.learning_rate",
        f"{rate_text(rate)} with method full",
        f"{rate_text(rate)} is an adapter's rate, {rate / FULL_RATE:.0f} times the usual {rate_text(FULL_RATE)} of full "
        f"fine-tuning, and wipes out what the model knew. The run would use {rate_text(FULL_RATE)} instead and warn.",
        {"training.learning_rate": FULL_RATE},
        safe=True,
    )


@rule("LR_HIGH_FOR_FULL", "warning", "Full fine-tuning above the rate where models forget")
def high_for_full(s: Situation) -> Hit | None:
    config, rate = s.config, s.rate
    if config.method.kind != "full" or config.training.objective != "sft" or not FORGETTING_RATE < rate < ADAPTER_RATE:
        return None
    if s.shape is not None and s.shape.num_parameters < 4e9:
        return None  # small models are tuned at such rates: see PUBLISHED
    return Hit(
        "training.learning_rate",
        f"{rate_text(rate)} with method full",
        f"Above {rate_text(FORGETTING_RATE)} full fine-tuning overwrites what the model knew; nine published models in ten "
        f"used 5e-6 to 2e-5, you are {rate / FULL_RATE:.1f} times above.",
        {"training.learning_rate": FULL_RATE},
        safe=True,
    )


@rule("LR_HIGH_FOR_ADAPTER", "warning", "An adapter rate at which training tends to diverge")
def high_for_adapter(s: Situation, shape: ModelShape) -> Hit | None:
    rate, guide = s.rate, lora_guide(shape)
    if s.config.method.kind not in LORA_KINDS or rate <= 4 * guide or s.traits.family != "supervised":
        return None
    fix = float(f"{guide:.0e}")
    return Hit(
        "training.learning_rate",
        f"{rate_text(rate)} for a model of width {shape.hidden:,}",
        f"LoRA did best near {_rounded(guide)} at this width; {rate_text(rate)} is {rate / guide:.0f} times that. "
        "The loss jumps, or becomes NaN.",
        {"training.learning_rate": fix},
        safe=True,
    )


@rule("LR_TOO_LOW_TO_LEARN", "warning", "A learning rate at which full fine-tuning changes next to nothing")
def too_low_to_learn(s: Situation) -> Hit | None:
    training, rate = s.config.training, s.rate
    if s.config.method.kind != "full" or training.objective != "sft" or rate >= USELESS_RATE:
        return None
    if s.steps:
        moved = rate * s.steps * mean_schedule(training.scheduler)
        effect = (
            f"In {s.steps:,} steps no weight moves by more than about {rate_text(moved)}, "
            f"{percent(moved / TYPICAL_WEIGHT)} of a typical weight ({TYPICAL_WEIGHT})."
        )
    else:
        effect = f"Published full fine-tunings use 5e-6 to 2e-5, {5e-6 / rate:.0f} times as much and more."
    return Hit(
        "training.learning_rate", f"{rate_text(rate)} with method full", effect, {"training.learning_rate": 1e-5}, safe=True
    )


@rule("LR_BY_MODEL_SIZE", "advice", "A full fine-tuning rate unusual for the model's size")
def by_model_size(s: Situation, shape: ModelShape) -> Hit | None:
    training, rate, size = s.config.training, s.rate, shape.num_parameters
    if s.config.method.kind != "full" or training.objective != "sft" or not USELESS_RATE <= rate < ADAPTER_RATE:
        return None
    low, high = band_at(size, RATES)
    highest, whose = next((rate, text) for up_to, rate, text in PUBLISHED if size <= up_to)
    if low <= rate <= highest:
        return None
    before = pretraining_rate(size)
    return Hit(
        "training.learning_rate",
        f"{rate_text(rate)} for {count(size)} parameters",
        f"The rule of thumb for this size says {_rounded(low)} to {_rounded(high)}; {whose}. Pre-training at this size ran "
        f"at about {_rounded(before)}; a 60th to a 30th of that is {_rounded(before / 60)} to {_rounded(before / 30)}.",
        {"training.learning_rate": min(highest, FULL_RATE) if rate > highest else float(f"{high:.0e}")},
    )


def pretraining_rate(num_parameters: float) -> float:
    """A usual peak rate of pre-training at this size: GPT-3's table, interpolated in logarithms."""
    return band_at(num_parameters, [(size, (rate,)) for size, rate in PRETRAINING])[0]


@rule("LR_LARGE_MODEL_ADAPTER", "advice", "An adapter on a very large model at a small model's rate")
def large_model_adapter(s: Situation, shape: ModelShape) -> Hit | None:
    rate, size = s.rate, shape.num_parameters
    if s.config.method.kind not in ("lora", "qlora") or size < 3e10 or not 2e-4 <= rate <= 4 * lora_guide(shape):
        return None
    if s.traits.family != "supervised":
        return None
    return Hit(
        "training.learning_rate",
        f"{rate_text(rate)} for {count(size)} parameters",
        f"QLoRA's authors used 2e-4 up to 13B and halved it to 1e-4 for 33B and 65B. LoRA's best rate at this width "
        f"({shape.hidden:,}) is near {_rounded(lora_guide(shape))}.",
        {"training.learning_rate": 1e-4},
    )


@rule("LR_LOW_FOR_IA3", "warning", "IA3 with a LoRA-sized learning rate")
def low_for_ia3(s: Situation) -> Hit | None:
    rate = s.rate
    if s.config.method.kind != "ia3" or rate >= 1e-3 or s.traits.family != "supervised":
        return None
    return Hit(
        "training.learning_rate",
        f"{rate_text(rate)} with method ia3",
        f"IA3 trains one factor per channel and was published with {rate_text(IA3_RATE)}, {IA3_RATE / rate:.0f} times yours.",
        {"training.learning_rate": IA3_RATE},
        safe=True,
    )


@rule("WARMUP_NONE", "advice", "Full fine-tuning without warm-up")
def no_warmup(s: Situation) -> Hit | None:
    training = s.config.training
    if s.config.method.kind != "full" or training.warmup_ratio > 0:
        return None
    fix: dict[str, Any] = {"training.warmup_ratio": 0.03}
    if training.scheduler == "constant":
        fix["training.scheduler"] = "constant_with_warmup"
    return Hit(
        "training.warmup_ratio",
        "0",
        f"Adam's first steps have the full size ({rate_text(s.rate)} on every weight, whatever the gradient), before its "
        "averages mean anything. 3 % of the steps is the usual warm-up (Alpaca, Vicuna, QLoRA).",
        fix,
        safe=True,
    )


@rule("WARMUP_BY_STEPS", "advice", "A warm-up unusual for the length of the run")
def warmup_by_steps(s: Situation, steps: int) -> Hit | None:
    ratio, warmup = s.config.training.warmup_ratio, s.warmup_steps
    if not s.chosen("training.warmup_ratio") or not 0 < ratio < 0.3 or steps < 1000:
        return None
    low, high = band_at(steps, WARMUPS)
    if low / 2 <= warmup <= high * 2:
        return None
    middle = math.sqrt(low * high)
    return Hit(
        "training.warmup_ratio",
        f"{warmup:,} of {steps:,} steps",
        f"For {steps:,} steps the rule of thumb is {low:.0f} to {high:.0f} warm-up steps. "
        + ("A long one spends steps at a rate that learns little." if warmup > high else "A short one risks an unstable start."),
        {"training.warmup_ratio": float(f"{middle / steps:.2g}")},
    )


@rule("WARMUP_MOST_OF_RUN", "warning", "A warm-up that takes a large part of the run")
def warmup_most_of_run(s: Situation) -> Hit | None:
    training = s.config.training
    if training.warmup_ratio < 0.3 or training.scheduler == "constant":
        return None
    steps = f" (step {s.warmup_steps:,} of {s.steps:,})" if s.steps else ""
    return Hit(
        "training.warmup_ratio",
        f"{training.warmup_ratio:g}",
        f"The learning rate reaches {rate_text(s.rate)} only after {percent(training.warmup_ratio)} of the run{steps}. "
        "The setting is a share of all steps, not a number of steps; 0.03 is usual.",
        {"training.warmup_ratio": 0.03},
        safe=True,
    )


@rule("WARMUP_WITHOUT_EFFECT", "warning", "A warm-up that the scheduler ignores")
def warmup_without_effect(s: Situation) -> Hit | None:
    training = s.config.training
    if training.scheduler != "constant" or training.warmup_ratio == 0 or not s.chosen("training.warmup_ratio"):
        return None
    return Hit(
        "training.scheduler",
        f"constant, with warmup_ratio {training.warmup_ratio:g}",
        f"The scheduler `constant` has no warm-up: the first step runs at {rate_text(s.rate)}.",
        {"training.scheduler": "constant_with_warmup"},
        safe=True,
    )


@rule("WEIGHT_DECAY_ERASES", "warning", "Weight decay that shrinks the base model's weights")
def weight_decay_erases(s: Situation, steps: int) -> Hit | None:
    training = s.config.training
    if s.config.method.kind != "full" or training.objective != "sft" or not training.weight_decay:
        return None

    def shrink(decay: float) -> float:
        return 1 - math.exp(-s.rate * decay * steps * mean_schedule(training.scheduler))

    if (lost := shrink(training.weight_decay)) <= 0.05:
        return None
    fix = 0.01 if shrink(0.01) <= 0.05 else 0.0
    return Hit(
        "training.weight_decay",
        f"{training.weight_decay:g} over {steps:,} steps at {rate_text(s.rate)}",
        f"Decay pulls every weight towards zero, not towards the base model: {percent(lost)} of each weight would be gone "
        f"at the end; with {fix:g} it is {percent(shrink(fix))}.",
        {"training.weight_decay": fix},
        safe=True,
    )
