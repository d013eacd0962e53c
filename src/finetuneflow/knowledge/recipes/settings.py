"""A recipe's settings as a run configuration: merged with the user's, and spread over several devices.

Order, later ones win: defaults < recipe < the user's run file < `--set`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from finetuneflow.config import Origin, RunConfig, build_config
from finetuneflow.errors import ConfigError
from finetuneflow.knowledge.recipes.schema import Phase, Recipe, load_recipe, number_text


def load_phase(text: str) -> tuple[Recipe, Phase]:
    """`NAME` or `NAME:PHASE` as typed after `--recipe`. Raises `ConfigError` for an unknown or missing phase."""
    name, _, phase = text.partition(":")
    recipe = load_recipe(name)
    return recipe, find_phase(recipe, phase or None)


def find_phase(recipe: Recipe, name: str | None = None) -> Phase:
    """The phase of that name; without a name the only one there is."""
    names = [phase.name for phase in recipe.phases]
    if name is None and len(names) == 1:
        return recipe.phases[0]
    if name in names:
        return recipe.phases[names.index(name)]
    problem = f"no phase {name[:60]!r}" if name else f"{len(names)} phases, each a run of its own"
    raise ConfigError(
        "CONFIG_INVALID_VALUE",
        f"The recipe {recipe.name} has {problem}.",
        where="recipe",
        remedy="Name one: " + ", ".join(f"{recipe.name}:{phase}" for phase in names) + ".",
        context={"phases": names},
    )


def recipe_config(recipe: Recipe, phase: str | None = None) -> tuple[dict[str, Any], dict[str, Origin]]:
    """What a phase sets, nested as in a run file, and the origin "recipe" of each dotted key.

    Raises `ConfigError` CONFIG_INVALID_VALUE for a phase that is not there.
    """
    found = find_phase(recipe, phase)
    values = _values(found)
    return values, {key: "recipe" for key in _leaves(values)}


def complete_values(phase: Phase) -> dict[str, Any]:
    """Every setting of a phase with defaults filled in, for comparing."""
    values: dict[str, Any] = build_config(phase.settings)[0].model_dump(mode="json")
    values["training"]["objective"] = phase.objective
    return values


def _values(phase: Phase) -> dict[str, Any]:
    values = copy.deepcopy(phase.settings)
    values.setdefault("training", {})["objective"] = phase.objective
    return values


def merge(recipe_values: Mapping[str, Any], user_values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Origin]]:
    """Both nested settings in one, the user's winning leaf by leaf, and who set each dotted key. Changes neither input."""
    merged = _merged(recipe_values, user_values)
    yours = set(_leaves(user_values))
    return merged, {key: "yours" if key in yours else "recipe" for key in _leaves(merged) if key != "version"}


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    values = copy.deepcopy(dict(below))
    for key, value in above.items():
        inner = values.get(key)
        both = isinstance(value, Mapping) and isinstance(inner, Mapping)
        values[key] = _merged(inner, value) if both else copy.deepcopy(value)  # type: ignore[arg-type]
    return values


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in values.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [f"{prefix}{key}"]
    return found


def build_with_recipe(
    recipe: Recipe,
    phase: str | None = None,
    user_values: Mapping[str, Any] | None = None,
    overrides: list[str] | None = None,
    *,
    where: str = "run file",
) -> tuple[RunConfig, dict[str, Origin]]:
    """The run configuration of a recipe under the user's run file and `--set` overrides, and each key's origin.

    Raises what `recipe_config` and `config.build_config` raise.
    """
    values, _ = recipe_config(recipe, phase)
    _, yours = build_config(user_values or {}, overrides, where=where)  # a mistake of the user's is told as the user's
    merged, _ = merge(values, user_values or {})
    config, all_set = build_config(merged, overrides, where=where)
    return config, {key: "yours" if key in yours else "recipe" for key in all_set}


def recipe_for_devices(values: Mapping[str, Any], device_count: int) -> tuple[dict[str, Any], str | None]:
    """The same global batch on several devices: (settings, a note where it could not be kept exactly).

    A recipe's batch is for one device. Accumulation is divided first; where that leaves a rest, the micro-batch becomes
    the largest one that divides a device's share. A batch no whole share of which exists is rounded to the nearest
    one, and the note says so. Raises `ConfigError` for fewer examples in a step than devices, or less than one device.
    """
    if isinstance(device_count, bool) or device_count < 1:
        raise ConfigError(
            "CONFIG_INVALID_VALUE", f"{device_count!r} devices cannot train.", where="device count", remedy="Give 1 or more."
        )
    training = build_config(values)[0].training
    wanted = training.effective_batch
    if wanted < device_count:
        raise ConfigError(
            "CONFIG_INVALID_VALUE",
            f"A batch of {wanted} cannot be shared by {device_count} devices: each needs at least one example a step.",
            where="training.batch_size x training.gradient_accumulation",
            remedy=f"Use {wanted} devices or fewer, or raise training.gradient_accumulation.",
        )
    spread = copy.deepcopy(dict(values))
    if training.gradient_accumulation % device_count == 0:
        micro, accumulation = training.batch_size, training.gradient_accumulation // device_count
    else:
        share = max(1, round(wanted / device_count))
        micro = next(size for size in range(min(training.batch_size, share), 0, -1) if share % size == 0)
        accumulation = share // micro
    spread["training"] = {**values.get("training", {}), "batch_size": micro, "gradient_accumulation": accumulation}
    got = micro * accumulation * device_count
    if got == wanted:
        return spread, None
    note = (
        f"A global batch of {number_text(wanted)} has no equal shares on {device_count} devices: "
        f"{micro} x {accumulation} on each makes {number_text(got)}."
    )
    return spread, note
