"""Stages of a pipeline: where each one starts, and why. Values in, values out; loads no torch.

placed(head, config, …)   ->  Stage: its start, its rewards and its gates settled
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from finetuneflow.config import Method, Origin, RunConfig, Section, StringList
from finetuneflow.errors import ConfigError
from finetuneflow.knowledge.objectives import traits_of
from finetuneflow.pipeline_gates import Gate, parse_gate

STAGE_PREFIX = "stage:"
SHAPES = ("kind", "r", "alpha", "target_modules", "rslora", "num_virtual_tokens")  # what an adapter cannot change any more
Shape = Mapping[str, Any]
StartKind = Literal["fresh", "model", "continue", "merge", "stack"]


class StageHead(Section):
    """What a stage says besides its settings."""

    name: str = Field(pattern=r"^[a-z0-9]+([_-][a-z0-9]+)*$", max_length=30)
    recipe: str | None = None
    from_: str | None = Field(None, alias="from")
    start: Literal["continue", "merge", "stack", "fresh"] | None = None
    gate: StringList = Field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Start:
    """Where a stage starts. `parent`: the stage whose result it takes, None for a model that no stage made.

    `model`: the parent's whole weights (after full fine-tuning); the other kinds are those of `model.adapter_start`.
    """

    kind: StartKind
    parent: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of a pipeline. `config` is complete but for what is known only when the stage begins: the paths of earlier results."""

    name: str
    config: RunConfig
    origins: dict[str, Origin]
    start: Start
    gates: tuple[Gate, ...] = ()
    recipe: str | None = None
    wanted_from: str | None = None
    wanted_start: str | None = None
    reward_reason: str | None = None

    @property
    def answers(self) -> bool:
        """Whether its result is a language model; a reward model is none."""
        return self.config.training.objective != "reward"


def placed(
    head: StageHead,
    config: RunConfig,
    origins: dict[str, Origin],
    earlier: list[Stage],
    *,
    wanted: set[str],
    own_adapter: bool,
    where: str,
) -> Stage:
    """The stage with its start and its rewards settled. `wanted`: settings of the adapter's shape that somebody chose."""
    parent = _parent(head, earlier, where)
    start, config = _start(head, config, wanted, parent, own_adapter=own_adapter, where=where)
    config, reason = _with_rewards(config, earlier, where)
    gates = tuple(parse_gate(text, f"{where}: gate") for text in head.gate)
    return Stage(
        head.name,
        config,
        origins,
        start,
        gates,
        head.recipe,
        wanted_from=head.from_,
        wanted_start=head.start,
        reward_reason=reason,
    )


def _parent(head: StageHead, earlier: list[Stage], where: str) -> Stage | None:
    """The stage whose result this one starts from, by name or as the newest one that answers."""
    if head.from_ is None:
        return next((stage for stage in reversed(earlier) if stage.answers), None)
    parent = next((stage for stage in earlier if stage.name == head.from_), None)
    if parent is None:
        raise unknown_stage(head.from_, [stage.name for stage in earlier], f"{where}: from", earlier=True)
    if not parent.answers:
        raise ConfigError(
            "CONFIG_CONFLICT",
            f"The stage {parent.name} makes a reward model, which gives no answers: no other stage can start from it.",
            where=f"{where}: from",
            remedy=f"Use it as a reward: reinforcement.reward: {STAGE_PREFIX}{parent.name}.",
        )
    if head.start == "fresh":
        raise ConfigError(
            "CONFIG_CONFLICT",
            f"`start: fresh` takes the base model, and `from: {parent.name}` the result of a stage.",
            where=where,
            remedy="Remove one of them.",
        )
    return parent


def unknown_stage(name: str, known: Sequence[str], where: str, *, earlier: bool = False) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    listed = ", ".join(known) or "none"
    return ConfigError(
        "CONFIG_INVALID_VALUE",
        f"There is no {'earlier ' if earlier else ''}stage {name[:60]!r}{hint}",
        where=where,
        remedy=f"{'Earlier stages' if earlier else 'Stages'}: {listed}.",
    )


def _start(
    head: StageHead, config: RunConfig, wanted: set[str], parent: Stage | None, *, own_adapter: bool, where: str
) -> tuple[Start, RunConfig]:
    """How the stage takes up its parent's result, why, and its settings with what follows from that."""
    if parent is None and head.start not in (None, "fresh"):
        raise ConfigError(
            "CONFIG_CONFLICT",
            f"`start: {head.start}` needs an earlier stage whose result answers, and there is none.",
            where=where,
            remedy="Remove it, or name an adapter of an earlier run in model.adapter.",
        )
    if parent is None or head.start == "fresh":
        named = config.model.base + (f" with the adapter {config.model.adapter}" if config.model.adapter else "")
        why = "no earlier stage has a result to start from" if parent is None else "as the pipeline file says"
        return Start("fresh", None, f"It starts from {named}: {why}."), config
    if config.model.base != parent.config.model.base and head.from_ is None and head.start is None:
        return Start("fresh", None, f"It names a base model of its own, {config.model.base}."), config
    if own_adapter:
        raise ConfigError(
            "CONFIG_CONFLICT",
            f"model.adapter names an adapter to start from, and the stage starts from the result of {parent.name}.",
            where=where,
            remedy="Remove it, or add `start: fresh`.",
        )
    model = parent.config.model.model_copy(update={"adapter": None, "dtype": config.model.dtype})
    config = config.model_copy(update={"model": model})
    start = _start_from(
        head.start, {key: getattr(config.method, key) for key in SHAPES if key in wanted}, config.method, parent, where
    )
    if start.kind == "continue":  # its shape is that of the adapter it goes on with: the run's settings tell the truth
        config = config.model_copy(update={"method": parent.config.method})
    return start, config


def _start_from(asked: str | None, wanted: Shape, method: Method, parent: Stage, where: str) -> Start:
    before, name = parent.config.method, parent.name
    if before.kind == "full":
        if asked in ("merge", "stack"):
            raise _start_conflict(f"`start: {asked}` needs an adapter, and {name} trains the whole model", where)
        return Start("model", name, f"{name} trains the whole model: its weights are what this stage starts from.")
    if method.kind == "full" and "kind" in wanted:
        if asked in ("continue", "stack"):
            raise _start_conflict(
                f"`start: {asked}` goes on with the adapter of {name}, and this stage trains the whole model", where
            )
        return Start("merge", name, f"This stage trains the whole model: the adapter of {name} is written into it first.")
    other = [key for key, value in wanted.items() if value != getattr(before, key)]
    kind: StartKind
    if asked is not None and asked != "fresh":
        kind, reason = asked, "As the pipeline file says."  # type: ignore[assignment]  # one of the three others
        if kind == "continue" and "kind" in other:
            raise _start_conflict(f"an adapter of kind {before.kind} cannot be continued as {method.kind}", where)
        if kind == "continue" and other:
            reason += f" The adapter keeps its shape: {_difference(other, wanted, before)} has no effect."
    elif other:
        kind = "merge"
        reason = f"It wants {_difference(other, wanted, before)}: that adapter is written into the base, and a new one is trained on it."
    else:
        kind = "continue"
        reason = f"Both train an adapter of the same kind and shape ({before.kind}): that of {name} is trained further."
    if kind != "continue" and before.kind == "prefix":
        raise _start_conflict(f"a prefix, as {name} trains it, is no change of weights: it can be continued only", where)
    if kind == "stack" and (method.kind != "lora" or before.kind not in ("lora", "qlora")):
        raise _start_conflict("`start: stack` adds up two LoRA adapters", where)
    return Start(kind, name, reason)


def _difference(keys: Sequence[str], wanted: Shape, before: Method) -> str:
    return " and ".join(f"method.{key} {wanted[key]} where {getattr(before, key)} was" for key in keys)


def _start_conflict(problem: str, where: str) -> ConfigError:
    return ConfigError(
        "CONFIG_CONFLICT", f"{problem[0].upper()}{problem[1:]}.", where=where, remedy="Leave `start` out, or use `start: merge`."
    )


def _with_rewards(config: RunConfig, earlier: list[Stage], where: str) -> tuple[RunConfig, str | None]:
    """Check `stage:NAME` among the rewards; where none is given, take the newest reward stage and say so."""
    if not traits_of(config).draws:
        return config, None
    models = [stage for stage in earlier if not stage.answers]
    settings = config.reinforcement
    if not settings.reward and models:
        chosen = f"{STAGE_PREFIX}{models[-1].name}"
        reason = f"No reward is named: the newest reward stage is {models[-1].name}."
        return config.model_copy(update={"reinforcement": settings.model_copy(update={"reward": [chosen]})}), reason
    for text in settings.reward:
        if text.startswith(STAGE_PREFIX) and (name := text.removeprefix(STAGE_PREFIX)) not in [stage.name for stage in models]:
            if name in [stage.name for stage in earlier]:
                raise ConfigError(
                    "CONFIG_CONFLICT",
                    f"The stage {name} makes no reward model.",
                    where=f"{where}: reinforcement.reward",
                    remedy="Name a stage with training.objective reward.",
                )
            raise unknown_stage(name, [stage.name for stage in models], f"{where}: reinforcement.reward", earlier=True)
    return config, None
