"""What a recipe file may say, and how one is read.

The schema is strict: unknown keys, wrong types, numbers out of range and control characters are errors. A recipe can
come from anywhere, so its settings are limited to `RECIPE_SETTINGS`: none of them runs code, names a path, a base
model or a dataset, or sends anything anywhere.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from finetuneflow.config import Objective, build_config, parse_yaml, settings
from finetuneflow.errors import ConfigError

# The phase says the objective; the machine decides device and threads; trackers send data to others.
NOT_OF_A_RECIPE = {"training.objective", "training.device", "training.threads", "training.report_to"}
# A reward can be a file of code or a folder; weights belong to the rewards.
NOT_OF_A_RECIPE |= {"reinforcement.reward", "reinforcement.reward_folder", "reinforcement.reward_weights"}
DATA_SETTINGS = {"data.supervise", "data.max_length", "data.overlong", "data.eval_fraction", "data.eval_limit"}
RECIPE_SETTINGS = frozenset(
    key
    for key, *_ in settings()
    if key in DATA_SETTINGS
    or key == "evaluation.at_steps"
    or (key.startswith(("method.", "training.", "preference.", "reinforcement.")) and key not in NOT_OF_A_RECIPE)
)

MAX_NUMBER = 1e12
_PLAIN = r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*$"  # no escape sequences for somebody's terminal
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=40)]
Line = Annotated[str, StringConstraints(min_length=1, max_length=300, pattern=_PLAIN)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=2000, pattern=_PLAIN)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Span(Part):
    """A number, or a range as documents give them. In YAML: `3`, `[5000, 10000]`, `[null, 10000]` (at most), `[100000, null]`."""

    low: float | None = Field(None, ge=0, le=MAX_NUMBER)
    high: float | None = Field(None, ge=0, le=MAX_NUMBER)

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"low": value, "high": value}
        if isinstance(value, list | tuple):
            if len(value) != 2:
                raise ValueError("a range has two ends, such as [5000, 10000]")
            return {"low": value[0], "high": value[1]}
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Span:
        if self.low is None and self.high is None:
            raise ValueError("a range needs at least one end")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError("a range starts with its smaller end")
        return self

    @property
    def exact(self) -> float | None:
        """The number, where it is one."""
        return self.low if self.low == self.high else None

    def __str__(self) -> str:
        if self.exact is not None:
            return number_text(self.exact)
        if self.low is None or self.high is None:
            return f"< {number_text(self.high or 0)}" if self.low is None else f"> {number_text(self.low)}"
        return f"{number_text(self.low)} to {number_text(self.high)}"


def number_text(value: float) -> str:
    """`52,000`, `7.4`, `2e-05`: whole numbers in full, others with three digits."""
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _whole(span: Span) -> Span:
    if any(end is not None and end != int(end) for end in (span.low, span.high)):
        raise ValueError("a count is a whole number")
    return span


def _positive(span: Span) -> Span:
    if span.low == 0 or span.high == 0:
        raise ValueError("must be greater than 0")
    return span


Amount = Annotated[Span, AfterValidator(_positive)]
Count = Annotated[Span, AfterValidator(_whole), AfterValidator(_positive)]


class Source(Part):
    title: Line
    where: Line = Field(description="Section, file or address.")


class Figures(Part):
    """What one source says of a phase. Batch and steps are global: over all devices."""

    examples: Count | None = None
    steps: Count | None = None
    epochs: Amount | None = None
    batch: Count | None = None
    learning_rate: Amount | None = None
    warmup_steps: Annotated[Span, AfterValidator(_whole)] | None = None
    warmup_ratio: Span | None = None
    max_length: Count | None = None
    rank: Count | None = None
    alpha: Amount | None = None
    beta: Amount | None = None
    hours: Amount | None = None
    hardware: Line | None = None
    remark: Line | None = None


class Dataset(Part):
    """What the phase was trained on. `examples`: training examples, where a whole number is known."""

    name: Line
    kind: Line
    examples: int | None = Field(None, ge=1, le=int(MAX_NUMBER))


class Needs(Part):
    """`base`: the kind of model it was made for. `memory_gb`: of each GPU, where it is known to have sufficed."""

    base: Line
    gpus: Line
    memory_gb: float | None = Field(None, gt=0, le=100_000)


class Phase(Part):
    """One run of a recipe. `documented`: the reference document's figures; `published`: the primary source's."""

    name: Name
    objective: Objective
    settings: dict[str, Any]
    dataset: Dataset
    documented: Figures | None = None
    published: Figures | None = None

    @field_validator("settings", mode="before")
    @classmethod
    def _nested_settings(cls, value: Any) -> Any:
        return nested(value) if isinstance(value, Mapping) else value

    @property
    def method(self) -> str:
        return str(self.settings.get("method", {}).get("kind", "lora"))


class Recipe(Part):
    name: Name
    title: Line
    summary: Text
    source: list[Source] = Field(min_length=1, max_length=20)
    phases: list[Phase] = Field(min_length=1, max_length=10)
    needs: Needs
    quality: int | None = Field(None, ge=1, le=5, description="Stars the reference document gives, of five.")
    suits: Text
    caution: list[Text] = Field(default_factory=list, max_length=20)

    @model_validator(mode="after")
    def _phases_differ(self) -> Recipe:
        if len({phase.name for phase in self.phases}) < len(self.phases):
            raise ValueError("two phases have the same name")
        return self

    @property
    def memory_note(self) -> str:
        """What is known of the memory it takes, or how to find out."""
        if self.needs.memory_gb is not None:
            return f"{self.needs.memory_gb:g} GB per GPU were enough for {self.needs.base} ({self.needs.gpus})."
        return "Depends on the base model: `ftf plan` estimates it from the settings, the model and the machine."

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values: ranges as two-element lists, with what is computed beside it."""
        from finetuneflow.knowledge.recipes.arithmetic import recipe_arithmetic

        values: dict[str, Any] = plain(self)
        values["memory"] = self.memory_note
        for written, phase in zip(values["phases"], self.phases, strict=True):
            written["arithmetic"] = recipe_arithmetic(phase).to_dict()
        return values


def plain(value: Any) -> Any:
    """For JSON: a range as a number or a list of two, figures without what is not stated, whole numbers whole."""
    if isinstance(value, Span):
        return plain(value.exact) if value.exact is not None else [plain(value.low), plain(value.high)]
    if isinstance(value, BaseModel):
        return {key: plain(inner) for key, inner in value if inner is not None or not isinstance(value, Figures)}
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value == int(value) else value


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings written `training.epochs: 3` or nested, as nested. Raises `ValueError` for a setting no recipe may hold."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, dot, name = str(key).partition(".")
        if not dot and not isinstance(value, Mapping):
            raise ValueError(f"{key!r} is not a group of settings")
        for inner, leaf in ({name: value} if dot else value).items():
            if f"{section}.{inner}" not in RECIPE_SETTINGS:
                raise ValueError(f"a recipe cannot set {section}.{inner}" + _meant(f"{section}.{inner}", RECIPE_SETTINGS))
            if inner in found.setdefault(section, {}):
                raise ValueError(f"{section}.{inner} stands here twice")
            found[section][inner] = leaf
    return dict(found)


# --- reading --------------------------------------------------------------------------------------


def recipe_names() -> list[str]:
    """The packaged recipes, sorted."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in resources.files(__package__).iterdir() if entry.name.endswith(".yaml")
    )


def load_recipe(name: str) -> Recipe:
    """A packaged recipe. Raises `ConfigError` CONFIG_INVALID_VALUE with near names for one that does not exist."""
    if name not in (names := recipe_names()):
        raise ConfigError(
            "CONFIG_INVALID_VALUE",
            f"There is no recipe {name[:60]!r}" + _meant(name[:60], names),
            where="recipe",
            remedy="`ftf recipes` lists them: " + ", ".join(names) + ".",
            context={"recipes": names},
        )
    return _load_packaged(name)


@lru_cache(maxsize=64)
def _load_packaged(name: str) -> Recipe:
    text = resources.files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return load_recipe_text(text, where=f"{name}.yaml")


def load_recipe_text(text: str, where: str) -> Recipe:
    """A recipe from the text of its YAML file, checked like the packaged ones. `where` names it in errors.

    Raises `ConfigError`: CONFIG_UNREADABLE (not YAML, too large, aliases), CONFIG_UNKNOWN_KEY, CONFIG_INVALID_VALUE.
    """
    values = parse_yaml(text, where=where)
    if not isinstance(values, dict):
        raise ConfigError(
            "CONFIG_UNREADABLE", "A recipe is a mapping with name, phases and more.", where=where, remedy="See docs/recipes.md."
        )
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise _explain(error, where) from error
    for phase in recipe.phases:
        build_config(phase.settings, where=f"{where}: settings of phase {phase.name}")
    return recipe


def _explain(error: ValidationError, where: str) -> ConfigError:
    """All mistakes of a recipe file in one error."""
    known = {name for model in (Recipe, Phase, Figures, Dataset, Needs, Source) for name in model.model_fields}
    lines, unknown = [], False
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            unknown = True
            lines.append(f"{key}: unknown key" + _meant(str(item["loc"][-1]), known))
        else:
            found = "" if item["type"] in ("value_error", "missing") else f" (found {str(item['input'])[:60]!r})"
            lines.append(f"{key}: {item['msg'].removeprefix('Value error, ')}{found}")
    return ConfigError(
        "CONFIG_UNKNOWN_KEY" if unknown else "CONFIG_INVALID_VALUE",
        "The recipe cannot be used:\n  " + "\n  ".join(lines),
        where=where,
        remedy="docs/recipes.md describes the format; `ftf recipes show lora` is an example.",
    )


def _meant(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else "."
