"""What the linter is asked about (`Situation`), what it answers (`Finding`), and what a `Rule` is.

A rule is a plain function of the situation. The facts it cannot do without are its further parameters, named as the
situation's attributes are: `def rule(s, data, shape)` looks only where data and shape are known.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from finetuneflow.config import Origin, RunConfig, settings
from finetuneflow.errors import FineTuneFlowError
from finetuneflow.knowledge.memory import Estimate
from finetuneflow.knowledge.memory import estimate as estimate_memory
from finetuneflow.knowledge.memory_phases import Strategy
from finetuneflow.knowledge.objectives import Traits, rows_per_step, traits_of
from finetuneflow.knowledge.resolve import Resolved, resolve, resolve_on
from finetuneflow.knowledge.shapes.shape import ModelShape
from finetuneflow.knowledge.shapes.targets import adapter_parameters
from finetuneflow.knowledge.steps import steps_of
from finetuneflow.knowledge.values import DataFacts, Machine, ModelFacts
from finetuneflow.knowledge.values import many as many

Level = Literal["error", "warning", "advice"]
LEVELS: tuple[Level, ...] = ("error", "warning", "advice")

LORA_KINDS = ("lora", "qlora", "dora")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found. `fix`: dotted settings and the values to give them, empty where no setting mends it.

    `safe`: the fix undoes a slip or changes how the run is computed; it never takes another base model, method or dataset.
    """

    code: str
    level: Level
    field: str
    found: str
    why: str
    fix: dict[str, Any] = dataclasses.field(default_factory=dict)
    safe: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The object of `ftf lint --json`."""
        return {
            "code": self.code,
            "level": self.level,
            "field": self.field,
            "found": self.found,
            "why": self.why,
            "fix": dict(self.fix),
        }


@dataclass(frozen=True, slots=True)
class Hit:
    """What a rule returns where it applies: a finding without the rule's own code and level."""

    field: str
    found: str
    why: str
    fix: dict[str, Any] = dataclasses.field(default_factory=dict)
    safe: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule with its name. `needs` are the facts it looks at beside the configuration."""

    code: str
    level: Level
    title: str
    needs: tuple[str, ...]
    look: Callable[..., Hit | None]

    def missing(self, situation: Situation) -> tuple[str, ...]:
        """The facts without which this rule says nothing."""
        return tuple(name for name in self.needs if getattr(situation, name) is None)

    def __call__(self, situation: Situation) -> Finding | None:
        if self.missing(situation):
            return None
        hit = self.look(situation, *(getattr(situation, name) for name in self.needs))
        if hit is None:
            return None
        return Finding(self.code, self.level, hit.field, hit.found, hit.why, hit.fix, hit.safe)


def rule(code: str, level: Level, title: str) -> Callable[[Callable[..., Hit | None]], Rule]:
    """Make a rule of a function; the names of its parameters after the first say which facts it needs."""

    def make(look: Callable[..., Hit | None]) -> Rule:
        return Rule(code, level, title, tuple(inspect.signature(look).parameters)[1:], look)

    return make


@dataclass(frozen=True, slots=True)
class Situation:
    """A run that is about to be started, as far as it is known. Only `config` must be given.

    `origins`: where each set value came from (`config.build_config`); without it, what differs from the default counts
    as the user's own. `steps`: optimizer steps in all. `cpu_threads`: those the run would use. `device_count_before`:
    devices of an earlier run with this configuration. `added_tokens`: the control tokens the tokenizer has as one token.
    `correction`: of memory estimates, learned on this machine (`memory.correction_from`).
    `completed` fills `resolved`, `estimate` and `steps` where they follow from the rest.
    """

    config: RunConfig
    origins: Mapping[str, Origin] | None = None
    machine: Machine | None = None
    shape: ModelShape | None = None
    model: ModelFacts | None = None
    data: DataFacts | None = None
    resolved: Resolved | None = None
    estimate: Estimate | None = None
    steps: int | None = None
    cpu_threads: int | None = None
    device_count_before: int | None = None
    added_tokens: frozenset[str] | None = None
    strategy: Strategy = "single"
    correction: float = 1.0

    # --- questions that several rules ask ---------------------------------------------------------

    def chosen(self, *keys: str) -> bool:
        """Whether the user (or a recipe they took) set one of these."""
        return any(self._is_chosen(key) for key in keys)

    def differs(self, key: str) -> bool:
        """Whether a setting has another value than its default."""
        return bool(value_of(self.config, key) != _defaults()[key])

    def _is_chosen(self, key: str) -> bool:
        if self.origins is None:
            return self.differs(key)
        return any(
            origin in ("yours", "recipe") for name, origin in self.origins.items() if name == key or name.startswith(f"{key}.")
        )

    @property
    def traits(self) -> Traits:
        return traits_of(self.config)

    @property
    def positions(self) -> int | None:
        """Tokens of context the base model was built for."""
        stated = [facts.max_position for facts in (self.model, self.shape) if facts is not None]
        return next((positions for positions in stated if positions and positions > 0), None)

    @property
    def evaluates(self) -> bool:
        return bool(self.config.data.eval) or self.config.data.eval_fraction > 0

    @property
    def devices(self) -> int:
        """Devices that train together."""
        on_gpu = self.machine is not None and (self.resolved is None or self.resolved.device == "cuda")
        return self.machine.device_count if self.machine and on_gpu and self.machine.kind in ("cuda", "rocm") else 1

    @property
    def batch(self) -> int:
        """Examples per optimizer step, over all devices."""
        return self.config.training.effective_batch * self.devices

    @property
    def rows(self) -> int:
        """Rows of the data per optimizer step, over all devices: prompts, where several answers to each are drawn."""
        return rows_per_step(self.config) * self.devices

    @property
    def passes(self) -> float | None:
        """How often each example is seen: the epochs, or what `max_steps` makes of them."""
        training = self.config.training
        if training.max_steps is None:
            return training.epochs
        return training.max_steps * self.rows / self.data.examples if self.data and self.data.examples else None

    @property
    def is_fresh(self) -> bool:
        """Whether the base has random weights."""
        return self.model is not None and self.model.fresh

    @property
    def rate(self) -> float:
        """The learning rate that will be used."""
        if self.resolved is not None:
            return self.resolved.learning_rate
        return resolve_on(self.config, "cpu", bf16=False, fresh=self.is_fresh).learning_rate  # the same on every device

    @property
    def warmup_steps(self) -> int:
        return math.ceil(self.config.training.warmup_ratio * (self.steps or 0))

    @property
    def supervised_tokens(self) -> float | None:
        """Tokens of the training data that enter the loss, once each."""
        if self.data is None or not self.data.mean_tokens:
            return None
        share = 1.0 if self.data.supervised_share is None else self.data.supervised_share
        return self.data.examples * self.data.mean_tokens_cut(self.config.data.max_length) * share

    # --- what would be --------------------------------------------------------------------------------

    def changed(self, fix: Mapping[str, Any]) -> Situation:
        """The same with some settings changed; what follows from the configuration is left to `completed`."""
        fixed: dict[str, Origin] = dict.fromkeys(fix, "yours")  # written into the run file, they count as the user's
        origins = None if self.origins is None else {**self.origins, **fixed}
        config = with_settings(self.config, fix)
        return replace(self, config=config, origins=origins, resolved=None, estimate=None, steps=None)

    def memory_with(self, fix: Mapping[str, Any]) -> Estimate | None:
        """The memory estimate once some settings are changed; None where it cannot be made."""
        return _estimate(self.changed(fix))

    def still_fits(self, fix: Mapping[str, Any]) -> bool:
        """False only where a fix is known to need more memory than there is."""
        after = self.memory_with(fix)
        return after is None or after.fits

    def adapter_size(self, **method: Any) -> int | None:
        """Parameters trained with the method as configured, or with some of its settings changed."""
        if self.shape is None:
            return None
        try:
            return adapter_parameters(self.shape, self.config.method.model_copy(update=method))
        except FineTuneFlowError:
            return None


def completed(situation: Situation) -> Situation:
    """Fill in what follows from the configuration and the facts that are there."""
    if situation.resolved is None and situation.machine is not None:
        situation = replace(situation, resolved=resolve(situation.config, situation.machine, fresh=situation.is_fresh))
    if situation.estimate is None:
        situation = replace(situation, estimate=_estimate(situation))
    if situation.steps is None:
        situation = replace(situation, steps=_steps(situation))
    return situation


def _estimate(s: Situation) -> Estimate | None:
    if s.shape is None or s.machine is None:
        return None
    try:
        return estimate_memory(
            s.shape, s.config, s.machine, s.resolved, data=s.data, strategy=s.strategy, correction=s.correction
        )
    except FineTuneFlowError:  # targets that do not exist: a rule of its own says so
        return None


def _steps(s: Situation) -> int | None:
    """Optimizer steps in all; those of `max_steps` where the size of the data is not known."""
    if s.data is None or s.data.examples < 1:
        return s.config.training.max_steps
    return steps_of(s.config, s.data, s.devices).steps


# --- settings by dotted name --------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _defaults() -> dict[str, Any]:
    return {key: default for key, _, default, _ in settings()}


def value_of(config: RunConfig, key: str) -> Any:
    """A setting by its dotted name."""
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)


def with_settings(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The configuration with some settings changed, validated anew."""
    values = config.model_dump()
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    return RunConfig.model_validate(values)


# --- numbers in words ---------------------------------------------------------------------------------


def gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def count(value: float) -> str:
    """1.2M, 350k, 12."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.0f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 or share == 0 else f"{100 * share:.1g} %"
