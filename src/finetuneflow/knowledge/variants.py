"""The ways to fine-tune that a plan offers, and the settings of each that do not depend on memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from finetuneflow.config import Origin, RunConfig
from finetuneflow.config import settings as all_settings
from finetuneflow.errors import ModelError
from finetuneflow.knowledge import hyperparameters
from finetuneflow.knowledge.cost import Efficiency
from finetuneflow.knowledge.hyperparameters import Chosen
from finetuneflow.knowledge.search import LENGTH_MULTIPLE
from finetuneflow.knowledge.shapes.shape import Linear, ModelShape
from finetuneflow.knowledge.shapes.targets import target_linears, trains_fused_experts
from finetuneflow.knowledge.values import DataFacts, Machine

HELD_PERCENTILE = 99
LONGEST = 1_048_576  # the highest data.max_length


@dataclass(frozen=True, slots=True)
class Asked:
    """What every option is computed from. `kept`: settings that the user or a recipe has decided."""

    shape: ModelShape
    config: RunConfig
    machine: Machine
    data: DataFacts | None
    kept: frozenset[str]
    country: str | None
    efficiency: Efficiency | None
    correction: float

    @property
    def wanted_length(self) -> int:
        """The length to keep if memory allows: yours, else one that holds 99 % of the examples (split ones lose nothing); the
        model's positions at most."""
        wanted, free = self.config.data.max_length, "data.max_length" not in self.kept and self.config.data.overlong != "split"
        if free and self.data is not None and self.data.length_percentiles:
            wanted = max(wanted, -(-self.data.length_percentiles[HELD_PERCENTILE] // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
        return min(wanted, self.shape.max_position or wanted, LONGEST)


def kept_settings(config: RunConfig, origins: Mapping[str, Origin] | None) -> frozenset[str]:
    if origins is not None:
        return frozenset(key for key, origin in origins.items() if origin in ("yours", "recipe"))
    values = config.model_dump()
    return frozenset(
        key for key, _, default, _ in all_settings() if "." in key and values[key.split(".")[0]][key.split(".")[1]] != default
    )


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to fine-tune. `method`: settings of its own, over the guideline's; `optimizers`: narrows the machine's choice."""

    name: str
    title: str
    kind: str
    method: Mapping[str, Chosen] = field(default_factory=dict)
    optimizers: tuple[str, ...] | None = None
    research: str = ""


_ALL_LINEAR = Chosen(
    "all-linear", "Adapters on every linear layer do better than on attention alone, at the same number of parameters."
)
VARIANTS = (
    Variant("full", "full, 32-bit AdamW", "full", optimizers=("adamw_torch_fused",)),
    Variant("full-8bit", "full, 8-bit AdamW", "full", optimizers=("adamw_8bit", "paged_adamw_8bit")),
    Variant("lora", "LoRA", "lora"),
    Variant(
        "lora-all-linear",
        "LoRA on all linear layers",
        "lora",
        method={"method.target_modules": _ALL_LINEAR},
        research="On all layers it matches full fine-tuning where attention alone does not (LoRA Without Regret, 2025; QLoRA, figure 2).",
    ),
    Variant("dora", "DoRA", "dora"),
    Variant("qlora", "QLoRA", "qlora"),
    Variant(
        "qlora-r64",
        "QLoRA r64 on all linear layers",
        "qlora",
        method={
            "method.r": Chosen(64, "The QLoRA paper's rank for its Guanaco models."),
            "method.alpha": Chosen(16.0, "The QLoRA paper's alpha, at its learning rate."),
            "method.target_modules": Chosen(
                "all-linear", "The QLoRA paper found all linear layers necessary to match 16-bit fine-tuning."
            ),
        },
        research="The paper's own setting (arXiv:2305.14314).",
    ),
)


def variants_for(asked: Asked) -> tuple[list[Variant], list[str]]:
    """Those that this machine and these settings allow, and in words those they do not."""
    gpu, bitsandbytes = asked.machine.kind != "cpu", asked.machine.bitsandbytes
    optimizer_given = asked.config.training.optimizer != "auto"
    found: list[Variant] = []
    for variant in VARIANTS:
        if variant.kind == "qlora" and not bitsandbytes:
            continue
        if variant.name == "full-8bit" and (optimizer_given or not (gpu and bitsandbytes)):
            continue
        if variant.name == "full" and optimizer_given:
            variant = replace(variant, title="full", optimizers=None)
        if variant.method and any(_same(asked, variant, other) for other in found):
            continue
        found.append(variant)
    own = asked.config.method.kind
    if own in ("ia3", "prefix"):
        found.append(Variant(own, {"ia3": "IA3", "prefix": "prefix tuning"}[own], own))
    missing = "QLoRA and 8-bit optimizers are not offered: bitsandbytes is not installed (pip install bitsandbytes)."
    return found, [] if bitsandbytes else [missing]


def _same(asked: Asked, one: Variant, other: Variant) -> bool:
    """Whether two variants come to the same adapter, by other words."""
    if one.kind != other.kind:
        return False
    first, second = (values_of(method_settings(asked, variant)) for variant in (one, other))
    names = [{linear.name for linear in _targets(asked, values)} for values in (first, second)]
    return names[0] == names[1] and all(first[key] == second[key] for key in ("method.r", "method.alpha"))


def _targets(asked: Asked, values: Mapping[str, Any]) -> tuple[Linear, ...]:
    try:
        return target_linears(asked.shape, values["method.target_modules"], kind=values["method.kind"])
    except ModelError:  # said where the option is worked out
        return ()


def values_of(chosen: Mapping[str, Chosen]) -> dict[str, Any]:
    return {key: choice.value for key, choice in chosen.items()}


def method_settings(asked: Asked, variant: Variant) -> dict[str, Chosen]:
    """`method.*` of a variant: the guideline's, what is kept, the variant's own."""
    chosen = {"method.kind": Chosen(variant.kind, f"{variant.title}, one of the options of this plan.")}
    if variant.kind in ("full", "prefix"):
        return chosen
    suggested = hyperparameters.adapter_settings(asked.shape, asked.data)
    if variant.kind == "ia3":
        suggested = {}
    for key, choice in suggested.items():
        value = getattr(asked.config.method, key.split(".")[1])
        chosen[key] = Chosen(value, "As you set it.") if key in asked.kept else choice
    if "method.r" in asked.kept and "method.alpha" not in asked.kept:
        chosen["method.alpha"] = Chosen(
            2.0 * asked.config.method.r, "alpha = 2 r, so that the update is scaled by 2 (chapter 13.1.7)."
        )
    return chosen | dict(variant.method)


def _dropout(asked: Asked, kind: str, chosen: Mapping[str, Chosen]) -> dict[str, Chosen]:
    """No dropout where PEFT bears none, or where it costs most. Raises `ModelError` (ADAPTER_UNSUPPORTED) where that does not help."""
    method = asked.config.method.model_copy(update={key.split(".")[1]: choice.value for key, choice in chosen.items()})
    fused = trains_fused_experts(asked.shape, method)
    if kind == "dora" and not fused and "method.dropout" not in asked.kept:
        return {
            "method.dropout": Chosen(0.0, "Without dropout DoRA reuses the base layer's result instead of computing it twice.")
        }
    if not method.dropout or not fused:
        return {}
    if kind == "dora" or "method.dropout" in asked.kept:
        raise ModelError(
            "ADAPTER_UNSUPPORTED",
            "The experts of this model are fused tensors, which PEFT adapts without dropout only, and not with DoRA.",
            remedy="Use lora with method.dropout 0.",
        )
    return {"method.dropout": Chosen(0.0, "The experts are fused tensors: PEFT adapts them without dropout only.")}


def chosen_settings(asked: Asked, variant: Variant, effective_batch: int) -> dict[str, Chosen]:
    """Everything about the option that does not depend on memory."""
    chosen, training = method_settings(asked, variant), asked.config.training
    chosen |= _dropout(asked, variant.kind, chosen)
    own_kind = _rate_family(variant.kind) == _rate_family(asked.config.method.kind)
    rate = hyperparameters.learning_rate(variant.kind, asked.shape.num_parameters, training.objective)
    suggested = {"training.learning_rate": rate, "training.epochs": hyperparameters.epochs(asked.data, training.objective)}
    for key, choice in suggested.items():
        # A rate that was set for one kind of method says nothing about another.
        keep = key in asked.kept and (key != "training.learning_rate" or own_kind)
        chosen[key] = Chosen(getattr(training, key.split(".")[1]), "As you set it.") if keep else choice
    steps = None
    if asked.data is not None:
        passes = chosen["training.epochs"].value
        steps = hyperparameters.total_steps(asked.data.examples, effective_batch, passes, training.max_steps)
    if "training.warmup_ratio" not in asked.kept:
        chosen["training.warmup_ratio"] = hyperparameters.warmup(steps)
    if not asked.kept & {"training.eval_steps", "training.save_steps"}:
        chosen |= hyperparameters.step_intervals(asked.config, steps)
    if training.device == "cuda" and asked.machine.kind == "cpu":
        chosen["training.device"] = Chosen("cpu", "There is no CUDA GPU on the machine this plan is for.")
    return chosen


def _rate_family(kind: str) -> str:
    """Methods that share learning rates."""
    return "low rank" if kind in ("lora", "qlora", "dora") else kind
