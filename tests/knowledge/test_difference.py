"""`ftf diff`: only what differs, all that differs, the same both ways."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetuneflow.config import RunConfig, build_config, settings
from finetuneflow.knowledge.difference import Difference, difference
from finetuneflow.knowledge.recipes import complete_values, load_recipe, recipe_names

KEYS = [key for key, *_ in settings()]


def config(*overrides: str) -> RunConfig:
    return build_config({}, list(overrides))[0]


def by_key(found: list[Difference]) -> dict[str, Difference]:
    assert len({entry.key for entry in found}) == len(found)
    return {entry.key: entry for entry in found}


def test_equal_inputs_give_an_empty_list() -> None:
    assert difference(RunConfig(), RunConfig()) == []
    assert difference({}, {}) == []
    assert difference(RunConfig(), {}, examples_a=10, examples_b=10) == [], "defaults are filled in"
    assert difference({"training": {"epochs": 3}}, {"training": {"epochs": 3.0}}) == []
    assert difference({"training": {}}, {"data": {"mapping": {}}}) == []


def test_a_changed_setting_is_listed_with_its_meaning_and_ratio() -> None:
    found = difference(config("training.learning_rate=2e-4"), config("training.learning_rate=2e-5"))
    assert [entry.key for entry in found] == ["training.learning_rate"]
    assert (found[0].a, found[0].b) == (2e-4, 2e-5) and found[0].ratio == pytest.approx(0.1)
    assert found[0].note.startswith("Peak learning rate")
    assert json.loads(json.dumps(found[0].to_dict())) == {
        "key": "training.learning_rate",
        "a": 2e-4,
        "b": 2e-5,
        "ratio": pytest.approx(0.1),
        "note": found[0].note,
    }


def test_the_same_effective_batch_in_other_parts_is_no_derived_difference() -> None:
    found = by_key(difference(RunConfig(), config("training.batch_size=2", "training.gradient_accumulation=8")))
    assert set(found) == {"training.batch_size", "training.gradient_accumulation"}


def test_derived_quantities_by_hand() -> None:
    a, b = RunConfig(), config("training.batch_size=8", "method.alpha=16", "training.warmup_ratio=0.1")
    found = by_key(difference(a, b, examples_a=16_000, examples_b=16_000))
    assert (found["derived.effective_batch"].a, found["derived.effective_batch"].b) == (16, 32)
    assert (found["derived.steps"].a, found["derived.steps"].b) == (3000, 1500)
    assert (found["derived.warmup_steps"].a, found["derived.warmup_steps"].b) == (90, 150)
    assert (found["derived.scaling"].a, found["derived.scaling"].b) == (2, 1)
    assert "derived.epochs" not in found and "derived.examples_seen" not in found


def test_steps_against_epochs() -> None:
    found = by_key(difference(RunConfig(), config("training.max_steps=500"), examples_a=1600, examples_b=1600))
    assert (found["derived.steps"].a, found["derived.steps"].b) == (300, 500)
    assert (found["derived.epochs"].a, found["derived.epochs"].b) == (3, 5)
    unknown = by_key(difference(RunConfig(), config("training.max_steps=500")))
    assert (unknown["derived.steps"].a, unknown["derived.steps"].b) == (None, 500)


def test_different_epochs_are_said_once() -> None:
    found = by_key(difference(RunConfig(), config("training.epochs=5"), examples_a=1600, examples_b=1600))
    assert "training.epochs" in found and "derived.epochs" not in found and "derived.steps" in found


def test_scaling_is_that_of_the_method() -> None:
    stable = by_key(difference(config("method.r=64"), config("method.r=64", "method.rslora=true")))["derived.scaling"]
    assert (stable.a, stable.b) == (0.5, 4)
    assert by_key(difference(RunConfig(), config("method.kind=full")))["derived.scaling"].b is None
    assert "derived.scaling" not in by_key(difference(config("method.kind=full"), config("method.kind=prefix")))


def test_recipes_compare_also_those_not_built_yet() -> None:
    alpaca, dpo = (complete_values(load_recipe(name).phases[0]) for name in ("alpaca", "dpo"))
    found = by_key(difference(alpaca, dpo, examples_a=52002, examples_b=160800))
    assert (found["training.objective"].a, found["training.objective"].b) == ("sft", "dpo")
    assert (found["derived.steps"].a, found["derived.steps"].b) == (1219, 2512)
    for name in recipe_names():
        for phase in load_recipe(name).phases:
            assert difference(complete_values(phase), complete_values(phase)) == []


def test_a_mapping_setting_is_one_setting() -> None:
    found = difference({"data": {"mapping": {"prompt": "q"}}}, {"data": {"mapping": {"prompt": "frage"}}})
    assert [entry.key for entry in found] == ["data.mapping"]


def test_what_only_seems_equal_differs_and_nan_equals_itself() -> None:
    assert [entry.key for entry in difference({"x": 1}, {"x": True})] == ["x"]
    assert [entry.key for entry in difference({"x": [1]}, {"x": [True]})] == ["x"]
    assert [entry.key for entry in difference({"x": {}}, {"x": 1})] == ["x"]
    assert [entry.key for entry in difference({"x": {"y": 1}}, {"x": 1})] == ["x", "x.y"]
    assert difference({"x": math.nan}, {"x": math.nan}) == []
    assert difference({"x": {"y": [math.nan, {"z": 0}]}}, {"x": {"y": [math.nan, {"z": 0}]}}) == []


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 10**400, "many", None, [], {}, True])
@pytest.mark.parametrize("key", ["batch_size", "gradient_accumulation", "epochs", "max_steps", "warmup_ratio"])
def test_settings_that_are_no_sensible_numbers_still_compare(key: str, value: Any) -> None:
    found = difference({"training": {key: value}}, RunConfig(), examples_a=0, examples_b=100)
    assert all(entry.ratio is None or math.isfinite(entry.ratio) for entry in found)
    assert difference({"method": {"r": value, "alpha": value}}, {"method": {"r": value, "alpha": value}}) == []


scalar = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.text("abc", max_size=2), st.lists(st.integers(0, 2), max_size=2)
)
partial = st.dictionaries(st.sampled_from([*KEYS, "extra.key", "other"]), scalar, max_size=8)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in flat.items():
        section, dot, name = key.partition(".")
        if dot:
            values.setdefault(section, {})[name] = value
        else:
            values[section] = value
    return values


@given(partial, partial, st.one_of(st.none(), st.integers(0, 10**6)))
def test_symmetric(a: dict[str, Any], b: dict[str, Any], examples: int | None) -> None:
    there = difference(nested(a), nested(b), examples_a=examples, examples_b=examples)
    back = difference(nested(b), nested(a), examples_a=examples, examples_b=examples)
    assert [(entry.key, repr(entry.a), repr(entry.b), entry.note) for entry in there] == [
        (entry.key, repr(entry.b), repr(entry.a), entry.note) for entry in back
    ]


@given(partial, partial)
def test_complete_and_nothing_more(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Against a plain comparison of JSON texts, setting by setting, over the defaults of RunConfig."""
    defaults = {key: default for key, _, default, _ in settings()}

    def text(value: Any) -> str:
        return json.dumps(float(value) if isinstance(value, int) and not isinstance(value, bool) else value).replace(
            "-0.0", "0.0"
        )

    keys = {*a, *b, *defaults}
    expected = {key for key in keys if text(a.get(key, defaults.get(key))) != text(b.get(key, defaults.get(key)))}
    found = {entry.key for entry in difference(nested(a), nested(b))}
    assert {key for key in found if not key.startswith("derived.")} == expected


@given(partial)
def test_equal_to_itself(a: dict[str, Any]) -> None:
    assert difference(nested(a), nested(a), examples_a=7, examples_b=7) == []


@pytest.mark.parametrize("key", [key for key in KEYS if "." in key])
def test_every_setting_is_compared(key: str) -> None:
    section, _, name = key.partition(".")
    found = by_key(difference({section: {name: "something else"}}, RunConfig()))
    assert found[key].a == "something else" and found[key].note
