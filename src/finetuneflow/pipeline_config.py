"""The pipeline file: several training stages in one, each starting from what an earlier one left.

    name: rlhf
    model: {base: starter}          # every section given here is the default of every stage
    measure: {suites: [starter]}    # asked of the base, and after every stage whose result answers
    stages:
      - name: sft
        data: {train: sft.jsonl}
        gate: ["eval loss fell"]
      - name: ppo
        training: {objective: ppo}
        data: {train: prompts.jsonl}
        from: sft                   # default: the newest earlier stage whose result answers
        start: continue             # continue | merge | stack | fresh; the default is chosen, with its reason

    load_pipeline(path)   ->  Pipeline(name, measure, stages)     each stage a complete `RunConfig` and where it starts
    dump_pipeline(…)      the same as a file with every setting in it; reads back equal

Order of the settings of a stage, later ones win: defaults < its recipe < the file's sections < its own sections < `--set`.
Importing this module loads no torch.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError

from finetuneflow.config import (
    BUNDLED_SUITES,
    Origin,
    RunConfig,
    Section,
    StringList,
    apply_override,
    build_config,
    dump_config,
    load_values,
    parse_yaml,
)
from finetuneflow.errors import ConfigError
from finetuneflow.pipeline_gates import EVAL_FIGURES, check_gates
from finetuneflow.pipeline_stages import SHAPES, Stage, StageHead, placed, unknown_stage

SECTIONS = tuple(name for name in RunConfig.model_fields if name not in ("version", "name"))
BASE = "base"  # what the first stage starts from, where results are told
BUNDLED = "bundled"
RUN_NAME_LIMIT = 60
MAX_STAGES = 50


class Measure(Section):
    """What is asked of the base and of every stage's result."""

    suites: StringList = Field(
        default_factory=list,
        description="Acceptance prompts (YAML); `starter` and `starter-preferred` are bundled. The first one is `acceptance`.",
    )
    general_text: str | None = Field(
        BUNDLED, description="Text that shows forgetting: `bundled`, a text file of your own, or null: it is not measured."
    )
    judges: str | None = Field(None, description="A Python file of your own with judge functions for the suites. It is run.")


class _Head(Section):
    version: Literal[1] = 1
    name: str = Field("pipeline", pattern=r"^[a-z0-9]+([._-][a-z0-9]+)*$", max_length=40)
    measure: Measure | None = None


@dataclass(frozen=True, slots=True)
class Pipeline:
    name: str
    stages: tuple[Stage, ...]
    measure: Measure | None = None

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def with_absolute_paths(self) -> Pipeline:
        """The same with every local path made absolute, as for a run."""
        measure = self.measure
        if measure is not None:
            text = measure.general_text
            measure = measure.model_copy(
                update={
                    "suites": [path if path in BUNDLED_SUITES else _absolute(path) for path in measure.suites],
                    "general_text": text if text in (None, BUNDLED) else _absolute(str(text)),
                    "judges": measure.judges and _absolute(measure.judges),
                }
            )
        stages = tuple(replace(stage, config=stage.config.with_absolute_paths()) for stage in self.stages)
        return Pipeline(self.name, stages, measure)


def _absolute(text: str) -> str:
    return str(Path(os.path.expanduser(text)).resolve())


# --- reading ----------------------------------------------------------------------------------------


def is_pipeline_file(path: Path) -> bool:
    """Whether a file describes a pipeline: it has the key `stages`. A file that cannot be read is left to whoever reads it."""
    try:
        return "stages" in load_values(path)
    except ConfigError:
        return False


def names_pipeline(path: Path | None, recipe: str | None) -> bool:
    """Whether a run file and a recipe, as typed, mean a pipeline: a file with stages, or a recipe of several phases as a whole."""
    from finetuneflow.knowledge.recipes import load_recipe

    if path is not None and is_pipeline_file(path):
        return True
    return recipe is not None and ":" not in recipe and len(load_recipe(recipe).phases) > 1


def load_pipeline(path: Path | None, overrides: Iterable[str] | None = None, *, recipe: str | None = None) -> Pipeline:
    """A pipeline from a file, from a recipe of several phases, or of such a recipe's phases with a file's sections.

    `overrides`: `section.key=value` for every stage, `stages.NAME.section.key=value` for one.
    """
    values = load_values(path) if path else {}
    where = str(path) if path else f"recipe {recipe}"
    if recipe is not None:
        if "stages" in values:
            raise ConfigError(
                "CONFIG_CONFLICT",
                "A pipeline file and a recipe both say which stages there are.",
                where=where,
                remedy="Name recipes in the file: `recipe: NAME:PHASE` in a stage.",
            )
        values = {"name": recipe, **values, "stages": _phases_as_stages(recipe)}
    return build_pipeline(values, overrides, where=where)


def _phases_as_stages(recipe: str) -> list[dict[str, Any]]:
    from finetuneflow.knowledge.recipes import load_recipe

    return [{"name": phase.name, "recipe": f"{recipe}:{phase.name}"} for phase in load_recipe(recipe).phases]


def build_pipeline(
    values: Mapping[str, Any], overrides: Iterable[str] | None = None, *, where: str = "pipeline file", complete: bool = False
) -> Pipeline:
    """Validate a pipeline. `complete`: its stages hold every setting, as `dump_pipeline` writes them."""
    shared, listed, asked = _with_overrides(values, overrides or [], where)
    head = _validated(_Head, {key: value for key, value in shared.items() if key not in SECTIONS}, where, also=SECTIONS)
    suites = _suite_names(head.measure)
    stages: list[Stage] = []
    for number, own in enumerate(listed):
        place = f"{where}: stages[{number}]" + (f" ({own['name']})" if isinstance(own.get("name"), str) else "")
        named = {key: value for key, value in own.items() if key not in SECTIONS}
        stage_head = _validated(StageHead, named, place, also=SECTIONS)
        _check_name(head.name, stage_head.name, stages, place)
        sections = {key: value for key, value in own.items() if key in SECTIONS}
        config, origins = _settings(stage_head, shared, sections, asked, place, complete=complete)
        config = config.model_copy(update={"name": f"{head.name}-{stage_head.name}"})
        own_adapter = bool((own.get("model") or {}).get("adapter"))
        wanted = set(SHAPES) if complete else {key for key in SHAPES if origins.get(f"method.{key}", "default") != "default"}
        stage = placed(stage_head, config, origins, stages, wanted=wanted, own_adapter=own_adapter, where=place)
        has_text = head.measure is not None and head.measure.general_text is not None
        check_gates(
            stage.gates,
            suites,
            objective=config.training.objective,
            has_text=has_text,
            where=f"{where}: stages.{stage.name}.gate",
        )
        stages.append(stage)
    return Pipeline(head.name, tuple(stages), head.measure)


def _with_overrides(
    values: Mapping[str, Any], overrides: Iterable[str], where: str
) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """(what is shared, the stages, what is set for every stage and comes last)."""
    listed = values.get("stages")
    if not isinstance(listed, list) or not listed or not all(isinstance(stage, dict) for stage in listed):
        raise ConfigError(
            "CONFIG_INVALID_VALUE",
            "`stages` is a list with at least one stage, each a mapping with a name.",
            where=where,
            remedy="See docs/pipelines.md and examples/pipelines/.",
        )
    if len(listed) > MAX_STAGES:
        raise ConfigError(
            "CONFIG_INVALID_VALUE",
            f"`stages` has {len(listed)} stages; a pipeline has at most {MAX_STAGES}.",
            where=where,
            remedy="Make several pipelines of it: a stage can start from an earlier run that model.adapter names.",
        )
    shared = _copied({key: value for key, value in values.items() if key != "stages"})
    stages = [_copied(stage) for stage in listed]
    everywhere = []
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key.startswith("stages."):
            name, _, setting = key.removeprefix("stages.").partition(".")
            stage = next((stage for stage in stages if stage.get("name") == name), None)
            if stage is None:
                raise unknown_stage(name, [str(stage.get("name")) for stage in stages], f"--set {key}")
            if not setting:
                raise ConfigError(
                    "CONFIG_INVALID_VALUE",
                    f"{override.strip()[:80]!r} names a stage and none of its settings.",
                    where=f"--set {key}",
                    remedy=f"Name one too, e.g. `--set stages.{name}.training.epochs=1`.",
                )
            apply_override(stage, override.strip().removeprefix(f"stages.{name}."), where=f"--set {key}")
        elif key.split(".")[0] in SECTIONS:
            everywhere.append(override)
        else:
            apply_override(shared, override)
    return shared, stages, everywhere


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in values.items()}


H = TypeVar("H", bound=Section)


def _validated(model: type[H], values: Mapping[str, Any], where: str, *, also: Sequence[str]) -> H:
    """`values` as `model`, or one error with all mistakes; `also`: further keys to suggest for an unknown one."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        known = [field.alias or name for name, field in model.model_fields.items()] + list(also)
        lines, unknown = [], False
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                unknown = True
                near = difflib.get_close_matches(key.rsplit(".", 1)[-1], [*known, *Measure.model_fields], n=1)
                lines.append(f"{key}: unknown key" + (f"; did you mean {near[0]!r}?" if near else "."))
            else:
                lines.append(f"{key}: {item['msg']} (found {str(item['input'])[:60]!r}).")
        raise ConfigError(
            "CONFIG_UNKNOWN_KEY" if unknown else "CONFIG_INVALID_VALUE",
            ("\n  " if len(lines) > 1 else "") + "\n  ".join(lines),
            where=where,
            remedy="docs/pipelines.md describes the file; `ftf config` lists the settings of a stage.",
        ) from error


def suite_label(path: str) -> str:
    """Under which name a suite's results and gates go: a bundled one by its own, else by what its file says."""
    from finetuneflow.evaluation.suite import load_suite

    return path if path in BUNDLED_SUITES else load_suite(path).name


def _suite_names(measure: Measure | None) -> list[str]:
    names = [suite_label(path) for path in measure.suites] if measure else []
    for name in names:
        if names.count(name) > 1 or name in EVAL_FIGURES:
            raise ConfigError(
                "CONFIG_INVALID_VALUE",
                f"Two suites, or a suite and a figure, are named {name!r}: results could not be told apart.",
                where="measure.suites",
                remedy="Change the `name` in one of the suite files.",
            )
    return names


def _check_name(pipeline: str, name: str, earlier: Sequence[Stage], where: str) -> None:
    problem = None
    if name == BASE:
        problem = f"A stage cannot be named {BASE!r}: results of the base model are told under that name."
    elif name in [stage.name for stage in earlier]:
        problem = f"Two stages are named {name!r}."
    elif len(f"{pipeline}-{name}") > RUN_NAME_LIMIT:
        problem = f"The runs of this stage would be named {pipeline}-{name}, which is longer than {RUN_NAME_LIMIT} characters."
    if problem:
        raise ConfigError("CONFIG_INVALID_VALUE", problem, where=where, remedy="Choose another name.")


def _settings(
    head: StageHead,
    shared: Mapping[str, Any],
    own: Mapping[str, Any],
    overrides: list[str],
    where: str,
    *,
    complete: bool,
) -> tuple[RunConfig, dict[str, Origin]]:
    """The stage's settings and where each came from."""
    from finetuneflow.knowledge.recipes import build_with_recipe, load_phase, merge

    values, _ = merge({key: shared[key] for key in SECTIONS if key in shared}, own)
    if head.recipe is None:
        config, origins = build_config(values, overrides, where=where)
        recipe_values: dict[str, Any] = {}
    else:
        try:
            recipe, phase = load_phase(head.recipe)
        except ConfigError as error:
            error.where = f"{where}: recipe"
            raise
        config, origins = build_with_recipe(recipe, phase.name, values, overrides, where=where)
        recipe_values = phase.settings
    if complete:
        origins = _origins_of_complete(config, recipe_values)
    return config, origins


def _origins_of_complete(config: RunConfig, recipe: Mapping[str, Any]) -> dict[str, Origin]:
    """Where the values of a file that holds every setting came from, as far as the values tell."""
    found: dict[str, Origin] = {}
    defaults = RunConfig().model_dump(mode="json")
    for section, inner in config.model_dump(mode="json").items():
        if not isinstance(inner, dict):
            continue
        for key, value in inner.items():
            from_recipe = key in recipe.get(section, {})
            if from_recipe and recipe[section][key] == value:
                found[f"{section}.{key}"] = "recipe"
            elif from_recipe or value != defaults[section][key]:
                found[f"{section}.{key}"] = "yours"
    return found


# --- checking and writing -----------------------------------------------------------------------------


def require_runnable_pipeline(pipeline: Pipeline, *, where: str = "pipeline file") -> None:
    """Raise `CONFIG_CONFLICT` with every combination of every stage that cannot work."""
    problems = []
    for stage in pipeline.stages:
        for problem in stage.config.conflicts():
            problems.append(f"{stage.name}: {problem.replace('--set data.', f'--set stages.{stage.name}.data.')}")
    if problems:
        raise ConfigError("CONFIG_CONFLICT", "\n  ".join(["", *problems]), where=where, remedy="Change the settings named above.")


def dump_pipeline(pipeline: Pipeline) -> str:
    """The complete pipeline file: every setting of every stage with where it came from. `build_pipeline(complete=True)` reads it."""
    lines = ["# Written by FineTuneFlow. Every setting of every stage; the remark says where its value came from.", "version: 1"]
    lines += [
        f"name: {pipeline.name}",
        f"measure: {_flow(pipeline.measure.model_dump() if pipeline.measure else None)}",
        "stages:",
    ]
    for stage in pipeline.stages:
        lines += [
            f"  - name: {stage.name}",
            f"    recipe: {_flow(stage.recipe)}",
            f"    from: {_flow(stage.wanted_from)}  # {stage.start.parent or 'no stage'}",
            f"    start: {_flow(stage.wanted_start)}  # {stage.start.kind}: {_remark(stage.start.reason)}",
            f"    gate: {_flow([gate.text for gate in stage.gates])}",
        ]
        settings = dump_config(stage.config, stage.origins).split("\n")[:-1]
        lines += [f"    {line}" for line in settings if not line.startswith(("#", "version:", "name:"))]
    return "\n".join(lines) + "\n"


def _remark(text: str) -> str:
    """A text as a comment can hold it: on one line, and without characters that YAML refuses even there."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def require_readable(pipeline: Pipeline) -> None:
    """Raise where the pipeline's own copy of its file would not say the same when a resume reads it."""
    remedy = "Use fewer stages or fewer files (a folder's files joined into one), and plain characters in names and paths."
    try:
        again = build_pipeline(parse_yaml(dump_pipeline(pipeline), where="pipeline.yaml"), where="pipeline.yaml", complete=True)
    except ConfigError as error:
        raise ConfigError(
            "CONFIG_INVALID_VALUE",
            f"The pipeline cannot be kept: its complete file could not be read again. {error.message}",
            where=error.where,
            remedy=remedy,
        ) from error
    for before, after in zip(pipeline.stages, again.stages, strict=True):
        same_start = (before.start.kind, before.start.parent) == (after.start.kind, after.start.parent)
        if not same_start or before.config != after.config or before.gates != after.gates or pipeline.measure != again.measure:
            raise ConfigError(
                "CONFIG_INVALID_VALUE",
                f"The pipeline cannot be kept: its complete file would read back as something else for the stage {before.name}.",
                where=f"stage {before.name}",
                remedy=remedy,
            )


def read_pipeline(directory: Path) -> Pipeline:
    """The pipeline's own copy of its file, in its directory."""
    path = directory / "pipeline.yaml"
    return build_pipeline(load_values(path), where=str(path), complete=True)
