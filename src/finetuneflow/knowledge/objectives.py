"""What sets the objectives apart: the form of their rows, who trains on them, what is in memory. The one home of these facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetuneflow.config import RunConfig

Family = Literal["supervised", "preference", "group", "ppo"]
Form = Literal["supervised", "pair", "rated", "prompt"]
# What becomes of the last hidden states: logits of all positions; log-probabilities in tiles of the vocabulary, which are thrown
# away at once; logits from the first answer token on; or a single score.
Head = Literal["logits", "tiles", "answers", "score"]
# What a policy is measured against: nothing; the base below its adapter; a frozen copy of the adapter; a second model.
Reference = Literal["none", "base", "adapter", "model"]


@dataclass(frozen=True, slots=True)
class Traits:
    """`family`: who trains on the rows; `form`: what examples become. `reference`: the objective is measured against weights that stay as they were. `dropout`: the method's dropout is applied."""

    family: Family = "supervised"
    form: Form = "supervised"
    head: Head = "logits"
    reference: bool = False
    dropout: bool = False

    @property
    def sides(self) -> int:
        """Rows that pass through the model for each example."""
        return 2 if self.form == "pair" else 1

    @property
    def draws(self) -> bool:
        """Whether answers are drawn from the model before it learns from them."""
        return self.form == "prompt"


_SUPERVISED = Traits(dropout=True)
_PAIR = Traits("preference", "pair", "tiles")
_GROUP = Traits("group", "prompt", "tiles", reference=True)

TRAITS: dict[str, Traits] = {
    "sft": _SUPERVISED,
    "pretrain": _SUPERVISED,
    "dpo": Traits("preference", "pair", "tiles", reference=True),
    "kto": Traits("preference", "rated", "tiles", reference=True),
    "orpo": _PAIR,
    "cpo": _PAIR,
    "simpo": _PAIR,
    "reward": Traits("preference", "pair", "score"),
    "grpo": _GROUP,
    "rloo": _GROUP,
    "ppo": Traits("ppo", "prompt", "answers", reference=True),
}


def traits_of(config: RunConfig) -> Traits:
    return TRAITS[config.training.objective]


def takes_fast_path(config: RunConfig) -> bool:
    """Whether the run asks for the fast path (`models/fast.py`)."""
    return config.training.speed == "auto" and traits_of(config).family == "supervised"


def counts_length_out(config: RunConfig) -> bool:
    """Whether answers are compared per token, so that the longer of two has no advantage."""
    objective = config.training.objective
    return objective in ("simpo", "orpo") or (objective == "dpo" and config.preference.loss == "sigmoid_norm")


def supervise_of(config: RunConfig) -> Literal["assistant", "last", "all"]:
    """Which tokens of a supervised row are in the loss: pre-training learns all of them, whatever `data.supervise` says."""
    return "all" if config.training.objective == "pretrain" else config.data.supervise


def reference_of(config: RunConfig) -> Reference:
    """What the run's policy is measured against, and so what is in memory for it (`training/start.py`)."""
    traits = traits_of(config)
    if not traits.reference or (traits.family == "group" and not config.reinforcement.kl_coefficient):
        return "none"
    if config.method.kind == "full":
        return "model"
    return "adapter" if config.model.adapter is not None and config.model.adapter_start == "continue" else "base"


def has_live_reference(config: RunConfig) -> bool:
    """Whether every step asks the reference anew; dpo may have asked it once before training."""
    cached = config.training.objective == "dpo" and config.preference.reference == "cached"
    return reference_of(config) != "none" and not cached


def reward_models(config: RunConfig) -> int:
    """How many rewards are models of their own."""
    return sum(name.startswith("model:") for name in config.reinforcement.reward) if traits_of(config).draws else 0


# --- steps --------------------------------------------------------------------------------------------


def rows_per_step(config: RunConfig) -> int:
    """Rows of the dataset that one device takes in an optimizer step (ppo: in a round of updates)."""
    family, batch = traits_of(config).family, config.training.effective_batch
    if family == "group":
        return max(1, batch // config.reinforcement.samples_per_prompt)
    return config.reinforcement.rollout_size if family == "ppo" else batch


def least_batch(config: RunConfig) -> int:
    """The smallest micro-batch the objective can be trained with: kto compares answers within one."""
    return 2 if config.training.objective == "kto" else 1


@dataclass(frozen=True, slots=True)
class Passes:
    """How often each row of a step passes through the model: `trained` forward and back, `forward` without gradients."""

    trained: float
    forward: float


def passes_of(config: RunConfig) -> Passes:
    """Passes per row. kto: mismatched answers once, and both again under the reference; rloo: the answers as they were drawn;
    ppo: policy, reference and value once, then policy and value in every pass of updates (a full model's value is read off the
    policy's states without a gradient)."""
    objective, live = config.training.objective, has_live_reference(config)
    if objective == "kto":
        return Passes(1.0, 1.0 + 2.0 * live)
    if objective == "ppo":
        updates, rewards = float(config.reinforcement.update_epochs), reward_models(config)
        full = config.method.kind == "full"
        return Passes(updates * (1 if full else 2), 3.0 + rewards + (updates if full else 0.0))
    again = 1.0 if objective == "rloo" else 0.0
    return Passes(1.0, live + again + reward_models(config))
