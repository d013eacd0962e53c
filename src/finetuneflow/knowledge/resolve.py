"""What the `auto` settings of a run file become on a machine, and which wishes it cannot fulfil.

The one home of these rules: the trainer, the memory estimate and the plan all ask here. Each substitution is
returned as a `Decision`, so that it can be shown, logged and kept with the run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from finetuneflow.config import RunConfig
from finetuneflow.knowledge.values import Machine

# The documented rate of supervised adapters. Rates of that size wreck full fine-tuning: from 2e-4 on, 2e-5 is used instead.
ADAPTER_RATE = 2e-4
FULL_RATE = 2e-5
# Methods whose few parameters need larger steps, whatever the objective.
METHOD_RATES = {
    "ia3": (3e-3, "the rate of T-Few, the paper that introduced IA3"),
    "prefix": (1e-2, "the rate of PEFT's examples: a short prefix needs large steps"),
}
# Rates of the other objectives: (full fine-tuning, low-rank adapters, whose).
_FIELD = "adapters take ten times that, as in the alignment handbook's DPO recipes (5e-6)"
_REWARDS = "TRL's default for GRPO and RLOO; the Llama 2 report used it for PPO; adapters take ten times that"
OBJECTIVE_RATES: dict[str, tuple[float, float, str]] = {
    "dpo": (5e-7, 5e-6, f"5e-7 is the documented rate of DPO (Rafailov et al. 2023, their code); {_FIELD}"),
    "kto": (5e-7, 5e-6, f"5e-7 as for DPO (Ethayarajh et al. 2024); {_FIELD}"),
    "cpo": (5e-7, 5e-6, f"as for DPO, which it approximates; {_FIELD}"),
    "simpo": (5e-7, 5e-6, f"SimPO's authors used 3e-7 to 1e-6 (Meng et al. 2024); {_FIELD}"),
    "orpo": (8e-6, 2e-5, "8e-6 is the rate of the ORPO paper (Hong et al. 2024), which has no reference to drift from"),
    "reward": (
        1e-5,
        1e-4,
        "Llama 2's reward models used 5e-6 to 1e-5 (arXiv:2307.09288, section 3.2.2); adapters take ten times that",
    ),
    "grpo": (1e-6, 1e-5, _REWARDS),
    "rloo": (1e-6, 1e-5, _REWARDS),
    "ppo": (1e-6, 1e-5, _REWARDS),
}

TYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, slots=True)
class Decision:
    """A choice made for the user. `warning` is the code of a warning where it goes against what was asked for."""

    setting: str
    value: Any
    reason: str
    warning: str | None = None
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Resolved:
    """How a run computes on its device. `compute_dtype` is the autocast type (float32: none), `storage_dtype` that of the base weights."""

    device: Literal["cuda", "cpu"]
    compute_dtype: str
    storage_dtype: str
    optimizer: str
    gradient_checkpointing: bool
    learning_rate: float
    decisions: tuple[Decision, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def resolve(config: RunConfig, machine: Machine, *, fresh: bool = False) -> Resolved:
    """`resolve_on` for a described machine. A GPU the engine does not drive (Apple's) counts as its processor."""
    device: Literal["cuda", "cpu"] = "cuda" if machine.kind in ("cuda", "rocm") and config.training.device != "cpu" else "cpu"
    return resolve_on(config, device, bf16=bool(machine.device.bf16), fresh=fresh)


def resolve_on(config: RunConfig, device: Literal["cuda", "cpu"], *, bf16: bool, fresh: bool = False) -> Resolved:
    """Decide everything that depends on the hardware. `bf16`: whether the device has units of its own for bfloat16.

    `fresh`: the base has random weights, so that no learning rate can make it forget.
    """
    decisions: list[Decision] = []
    compute = _choose_precision(config, device, bf16, decisions)
    return Resolved(
        device=device,
        compute_dtype=compute,
        storage_dtype=_choose_storage(config, compute, decisions),
        optimizer=_choose_optimizer(config, device, decisions),
        gradient_checkpointing=_choose_checkpointing(config, device, decisions),
        learning_rate=_choose_rate(config, decisions, fresh=fresh),
        decisions=tuple(decisions),
    )


def _choose_precision(config: RunConfig, device: str, bf16: bool, decisions: list[Decision]) -> str:
    wanted = config.training.precision
    if wanted == "fp16" and device == "cpu":
        decisions.append(Decision("training.precision", "fp32", "fp16 training needs a GPU; fp32 is used on the CPU."))
        return "float32"
    if wanted == "bf16" and not bf16:
        other = "fp16" if device == "cuda" else "fp32"
        decisions.append(
            Decision("training.precision", other, f"This {device} has no bf16 units; emulated bf16 would be many times slower.")
        )
        return TYPE_NAMES[other]
    if wanted != "auto":
        return TYPE_NAMES[wanted]
    if bf16:
        decisions.append(Decision("training.precision", "bf16", f"This {device} computes in bfloat16."))
        return "bfloat16"
    chosen = "float16" if device == "cuda" else "float32"
    decisions.append(Decision("training.precision", chosen, f"This {device} has no bfloat16 units."))
    return chosen


def _choose_storage(config: RunConfig, compute: str, decisions: list[Decision]) -> str:
    wanted = config.model.dtype
    if config.method.kind == "full":
        if wanted in ("bfloat16", "float16"):
            decisions.append(
                Decision(
                    "model.dtype",
                    "float32",
                    "Full fine-tuning updates the weights themselves: small updates would be rounded away in 16 bits.",
                )
            )
        return "float32"
    return compute if wanted == "auto" else wanted


def _choose_optimizer(config: RunConfig, device: str, decisions: list[Decision]) -> str:
    wanted = config.training.optimizer
    if wanted == "auto":
        if device == "cuda":
            return "paged_adamw_8bit"
        decisions.append(
            Decision(
                "training.optimizer",
                "adamw_torch_fused",
                "The default paged_adamw_8bit needs CUDA (paged memory); 32-bit AdamW is used on the CPU.",
            )
        )
        return "adamw_torch_fused"
    if wanted == "paged_adamw_8bit" and device == "cpu":
        decisions.append(
            Decision(
                "training.optimizer",
                "adamw_8bit",
                "Paged memory needs CUDA; the same 8-bit AdamW keeps its state in ordinary memory.",
            )
        )
        return "adamw_8bit"
    return wanted


def _choose_checkpointing(config: RunConfig, device: str, decisions: list[Decision]) -> bool:
    wanted = config.training.gradient_checkpointing
    if wanted != "auto":
        return wanted == "on"
    if device == "cpu":
        decisions.append(
            Decision(
                "training.gradient_checkpointing",
                "off",
                "Recomputing activations costs about a third of the time; ordinary memory is rarely what runs out on a CPU.",
            )
        )
    return device == "cuda"


def objective_rate(objective: str, kind: str) -> tuple[float, str] | None:
    """(rate, why) for an objective that has rates of its own, and a method; None where supervised rates hold."""
    if objective not in OBJECTIVE_RATES or kind in METHOD_RATES:
        return None
    full, adapter, why = OBJECTIVE_RATES[objective]
    return (full if kind == "full" else adapter), why


def usual_rate(objective: str, kind: str, *, fresh: bool = False) -> tuple[float, str]:
    """(rate, why) where none is named. `fresh`: random weights have nothing to forget and take a rate of pre-training."""
    own = METHOD_RATES.get(kind) or objective_rate(objective, kind)
    if own is not None:
        return own
    if kind == "full":
        return (ADAPTER_RATE, "a rate for weights that start at random") if fresh else (FULL_RATE, "Alpaca's and Vicuna's")
    return ADAPTER_RATE, "the documented rate for adapters; the QLoRA paper used it to 13B"


def _choose_rate(config: RunConfig, decisions: list[Decision], *, fresh: bool) -> float:
    rate, objective, kind = config.training.learning_rate, config.training.objective, config.method.kind
    usual, why = usual_rate(objective, kind, fresh=fresh)
    if rate is None:
        decisions.append(Decision("training.learning_rate", usual, f"Usual for {objective} with method {kind}: {why}."))
        return usual
    if kind == "full" and rate >= ADAPTER_RATE and not fresh:
        decisions.append(
            Decision(
                "training.learning_rate",
                usual,
                f"{rate:g} is a learning rate for adapters; full fine-tuning with it forgets what the model knew, so {usual:g} is used.",
                warning="LEARNING_RATE_LOWERED",
                advice=f"A value below {ADAPTER_RATE:g} is taken as it is.",
            )
        )
        return usual
    return rate
