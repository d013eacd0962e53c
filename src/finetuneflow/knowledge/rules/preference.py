"""Rules about learning from preferences: dpo, kto, orpo, cpo, simpo, reward. Each rule's page has the sources (`rules/CODE.md`)."""

from __future__ import annotations

from typing import Any

from finetuneflow.config import LOSSES_OF
from finetuneflow.knowledge.criteria import rate_text
from finetuneflow.knowledge.objectives import counts_length_out
from finetuneflow.knowledge.resolve import objective_rate
from finetuneflow.knowledge.situation import Hit, Situation, percent, rule
from finetuneflow.knowledge.values import DataFacts, ModelFacts

LOWEST_BETA, HIGHEST_BETA, USUAL_BETA = 0.1, 0.5, 0.1  # the documented range; Rafailov et al. 2023 used both ends
LOWEST_SIMPO_BETA, USUAL_SIMPO_BETA = 1.0, 2.0  # Meng et al. 2024: 2 to 2.5, 10 for one model
TOO_HIGH = 10  # times the usual rate
LENGTH_RATIO = 1.5  # as `data.preferences`; a test compares
KTO_BALANCE = (1.0, 4 / 3)  # Ethayarajh et al. 2024, section 4.2; as `data.preferences`

# Which settings an objective reads, of those that only some do. What is not named here concerns every objective.
READ_BY: dict[str, frozenset[str]] = {
    "preference.loss": frozenset({"dpo", "kto", "cpo"}),
    "preference.beta": frozenset({"dpo", "kto", "orpo", "cpo", "simpo"}),
    "preference.label_smoothing": frozenset({"dpo", "cpo"}),
    "preference.simpo_gamma": frozenset({"simpo"}),
    "preference.cpo_alpha": frozenset({"cpo"}),
    "preference.desirable_weight": frozenset({"kto"}),
    "preference.undesirable_weight": frozenset({"kto"}),
    "preference.center_rewards": frozenset({"reward"}),
    "preference.reference": frozenset({"dpo"}),
    "data.min_rating_gap": frozenset({"dpo", "orpo", "cpo", "simpo", "reward"}),
    "data.rating_pairs": frozenset({"dpo", "orpo", "cpo", "simpo", "reward"}),
    "data.max_pairs_per_prompt": frozenset({"dpo", "orpo", "cpo", "simpo", "reward"}),
    "data.good_rating": frozenset({"kto"}),
    "data.supervise": frozenset({"sft"}),
    "data.replay": frozenset({"sft", "pretrain"}),
    "training.group_by_length": frozenset({"sft", "pretrain", "dpo", "kto", "orpo", "cpo", "simpo", "reward"}),
    **{
        f"reinforcement.{name}": frozenset({"grpo", "rloo", "ppo"})
        for name in ("reward", "reward_weights", "reward_folder", "max_new_tokens", "temperature", "top_p", "kl_coefficient", "clip_range")
    },
    "reinforcement.samples_per_prompt": frozenset({"grpo", "rloo"}),
    **{
        f"reinforcement.{name}": frozenset({"ppo"})
        for name in (
            "kl_target", "kl_horizon", "value_clip_range", "value_coefficient", "entropy_coefficient", "gamma", "gae_lambda",
            "rollout_size", "update_epochs", "whiten_rewards", "missing_end_penalty",
        )
    },
}  # fmt: skip


# --- settings -----------------------------------------------------------------------------------------


@rule("OBJECTIVE_SETTING_WITHOUT_EFFECT", "advice", "A setting that the objective does not read")
def objective_setting_without_effect(s: Situation) -> Hit | None:
    objective = s.config.training.objective
    # A complete run file names every setting: only one that was changed was meant to do something.
    named = [key for key, readers in READ_BY.items() if objective not in readers and s.chosen(key) and s.differs(key)]
    if not named:
        return None
    readers = ", ".join(sorted(READ_BY[named[0]]))
    return Hit(
        named[0],
        f"{', '.join(named)} with objective {objective}",
        f"{objective} does not use {'it' if len(named) == 1 else f'these {len(named)} settings'}: the run is the same without. "
        f"{named[0]} belongs to {readers}.",
    )


@rule("PREFERENCE_LOSS_UNKNOWN", "error", "A loss that the objective does not know")
def preference_loss_unknown(s: Situation) -> Hit | None:
    objective, loss = s.config.training.objective, s.config.preference.loss
    if objective not in LOSSES_OF or loss in LOSSES_OF[objective]:
        return None
    owner = next((name for name, losses in LOSSES_OF.items() if loss in losses), "dpo")
    return Hit(
        "preference.loss",
        f"{loss} with objective {objective}",
        f"{loss} is a loss of {owner}; {objective} knows {len(LOSSES_OF[objective])}: {', '.join(LOSSES_OF[objective])}. "
        "The run refuses it.",
        {"preference.loss": "auto"},
    )


@rule("PREFERENCE_BETA_UNUSUAL", "warning", "A beta outside the documented range")
def preference_beta_unusual(s: Situation) -> Hit | None:
    objective = s.config.training.objective
    beta = s.config.preference.beta_of(objective)
    if objective == "simpo" and beta < LOWEST_SIMPO_BETA:
        return Hit(
            "preference.beta",
            f"{beta:g} with objective simpo",
            f"SimPO scales the mean log-probability per token by beta, so it needs {USUAL_SIMPO_BETA / beta:.0f} times as much as dpo: "
            f"its authors used 2 to 2.5. At {beta:g} both answers look alike and the gradient is nearly the same for every pair.",
            {"preference.beta": USUAL_SIMPO_BETA},
            safe=True,
        )
    if objective not in ("dpo", "kto") or LOWEST_BETA <= beta <= HIGHEST_BETA:
        return None
    what = (
        "The policy may drift far from the reference: preferred answers are overfitted, and what the model could do before is lost"
        if beta < LOWEST_BETA
        else "The policy is held so closely to the reference that it hardly learns the preference"
    )
    return Hit(
        "preference.beta",
        f"{beta:g} with objective {objective}",
        f"The documented range is {LOWEST_BETA:g} to {HIGHEST_BETA:g}. {what}.",
        {"preference.beta": USUAL_BETA if beta < LOWEST_BETA else HIGHEST_BETA},
    )


@rule("LR_HIGH_FOR_OBJECTIVE", "warning", "A learning rate far above those of the objective")
def high_for_objective(s: Situation) -> Hit | None:
    objective, kind = s.config.training.objective, s.config.method.kind
    usual = objective_rate(objective, kind)
    if usual is None or s.rate <= TOO_HIGH * usual[0] * (1 + 1e-9):
        return None
    return Hit(
        "training.learning_rate",
        f"{rate_text(s.rate)} for {objective} with method {kind}",
        f"That is {s.rate / usual[0]:.0f} times the usual {rate_text(usual[0])} ({usual[1]}). Preferences and rewards say "
        "little per example; large steps follow their noise, and answers fall apart before the figures show it.",
        {"training.learning_rate": usual[0]},
        safe=True,
    )


# --- models -------------------------------------------------------------------------------------------


@rule("PREFERENCE_BEFORE_TUNING", "warning", "Preferences for a base model that was never taught to answer")
def preference_before_tuning(s: Situation, model: ModelFacts) -> Hit | None:
    config = s.config
    if s.traits.family == "supervised" or config.training.objective in ("orpo", "reward"):  # orpo teaches answers by itself
        return None
    if config.model.adapter is not None or model.chat_template is not None or not model.config:
        return None  # without a config no file of the model was read
    rows = f" {s.data.examples:,} comparisons cannot make up for it." if s.data else ""
    return Hit(
        "model.adapter",
        f"{config.training.objective} on {model.name}, which has no chat template, from no adapter",
        "It seems a plain base model: its own answers are nothing like the compared ones, so both are out of its range and there is "
        f"little to prefer.{rows} Train objective sft on good answers first, then start from that run with model.adapter.",
    )


@rule("STACK_NOT_POSSIBLE", "error", "Adapters of kinds that cannot be added up")
def stack_not_possible(s: Situation) -> Hit | None:
    if not s.config.cannot_stack():
        return None
    kind = s.config.method.kind
    scored = s.config.training.objective == "reward"
    what = f"method {kind}" if kind not in ("lora", "full") else "objective reward" if scored else "modules_to_save"
    return Hit(
        "model.adapter_start",
        f"stack with {what}",
        "Stacking saves two LoRA adapters as one by putting their matrices side by side. Only plain LoRA on unquantised weights has that "
        "form, with 2 matrices a layer and nothing else; the run refuses the rest.",
        {"model.adapter_start": "continue" if kind != "qlora" else "merge"},
    )


# --- data ---------------------------------------------------------------------------------------------


@rule("KTO_MICRO_BATCH", "error", "KTO with one answer per micro-batch")
def kto_micro_batch(s: Situation) -> Hit | None:
    training = s.config.training
    if training.objective != "kto" or training.batch_size >= 2:
        return None
    return Hit(
        "training.batch_size",
        "1 with objective kto",
        "KTO estimates how far the policy has moved from answers given to other prompts of the same micro-batch; with 1 there is "
        "no other, and the library refuses it.",
        {"training.batch_size": 2, "training.gradient_accumulation": max(1, training.gradient_accumulation // 2)},
        safe=True,
    )


@rule("KTO_LABELS_UNBALANCED", "warning", "Good and bad answers out of balance")
def kto_labels_unbalanced(s: Situation, data: DataFacts) -> Hit | None:
    if s.config.training.objective != "kto" or data.good_share is None or not 0 < data.good_share < 1:
        return None
    settings, good = s.config.preference, data.good_share
    low, high = KTO_BALANCE
    balance = settings.desirable_weight * good / (settings.undesirable_weight * (1 - good))
    if low * 0.99 <= balance <= high * 1.01:
        return None
    plain = good / (1 - good)
    fix = {
        "preference.desirable_weight": 1.0 if plain >= low else _upwards(low / plain),
        "preference.undesirable_weight": 1.0 if plain <= high else _upwards(plain / high),
    }
    return Hit(
        "preference.undesirable_weight" if balance > high else "preference.desirable_weight",
        f"{percent(good)} of the answers are good: weighted {balance:.2f} to 1",
        f"KTO was found to work best with {low:g} to {high:.2f} to 1 between the weighted counts. "
        f"{'Bad' if balance > high else 'Good'} answers count too little here.",
        fix,
        safe=True,
    )


def _upwards(weight: float) -> float:
    """To the second place, upwards: that stays within the range."""
    return min(float(-(-weight * 100 // 1) / 100), 100.0)


@rule("PAIR_LENGTH_BIAS", "warning", "Preferred answers that differ in length")
def pair_length_bias(s: Situation, data: DataFacts) -> Hit | None:
    objective, ratio = s.config.training.objective, data.length_ratio
    if data.form != "pair" or not ratio or 1 / LENGTH_RATIO <= ratio <= LENGTH_RATIO or counts_length_out(s.config):
        return None
    fix: dict[str, Any] = {"preference.loss": "sigmoid_norm"} if objective == "dpo" else {}
    return Hit(
        "data.train",
        f"chosen answers are {ratio:.2f} times as long as rejected ones",
        f"Beyond {LENGTH_RATIO:g} (or its inverse) length alone tells the sides apart, and that is what is learned. Add pairs in which the "
        "other length wins, or compare per token: simpo, or dpo with loss sigmoid_norm.",
        fix,
    )


@rule("SPLIT_OF_PAIRS", "advice", "Long rows that cannot be split")
def split_of_pairs(s: Situation) -> Hit | None:
    if s.config.data.overlong != "split" or s.traits.form == "supervised":
        return None
    noun = {"pair": "pair", "rated": "rated answer", "prompt": "prompt"}[s.traits.form]
    share = s.data.share_above(s.config.data.max_length) if s.data else None
    concerned = f" That concerns {percent(share)} of the rows." if share is not None else ""
    return Hit(
        "data.overlong",
        f"split with objective {s.config.training.objective}",
        f"A {noun} is one comparison and cannot be parted: rows over {s.config.data.max_length:,} tokens are cut instead.{concerned}",
        {"data.overlong": "cut"},
        safe=True,
    )
