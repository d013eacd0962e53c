"""Recipes: the packaged ones against their sources, arithmetic by hand, merging, and recipe files from strangers."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from finetuneflow.config import RunConfig, build_config, settings
from finetuneflow.errors import ConfigError
from finetuneflow.knowledge import recipes
from finetuneflow.knowledge.recipes import (
    Phase,
    Recipe,
    Span,
    build_with_recipe,
    load_phase,
    load_recipe,
    load_recipe_text,
    merge,
    recipe_arithmetic,
    recipe_config,
    recipe_for_devices,
    recipe_names,
    recipe_tables,
)
from finetuneflow.knowledge.recipes.schema import RECIPE_SETTINGS

ROOT = Path(__file__).parents[2]
FOLDER = Path(recipes.__file__).parent

EXPECTED = [
    "alpaca",
    "vicuna",
    "lora",
    "llama2-chat",
    "dolly",
    "qlora",
    "lima",
    "dpo",
    "rlhf",
    "multi-stage",
    "conservative",
    "conservative-fast",
    "conservative-ultra-fast",
    "conservative-max-quality",
    "mamba-swelu-quick",
    "mamba-swelu-chat",
    "mamba-swelu-expert",
    "metropole",
    "instruction",
    "domain",
    "style",
    "full-capability",
]
PHASES = [pytest.param(phase, id=f"{name}:{phase.name}") for name in EXPECTED for phase in load_recipe(name).phases]

MINIMAL: dict[str, Any] = {
    "name": "mine",
    "title": "Mine",
    "summary": "A test.",
    "source": [{"title": "me", "where": "here"}],
    "phases": [
        {
            "name": "sft",
            "objective": "sft",
            "settings": {"training.epochs": 2, "method": {"r": 8}},
            "dataset": {"name": "d", "kind": "k", "examples": 100},
        }
    ],
    "needs": {"base": "any", "gpus": "1"},
    "suits": "Tests.",
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """MINIMAL with the value at a slash-separated path replaced (numbers index lists)."""
    found: Any = (values := copy.deepcopy(MINIMAL))
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for part in parents:
        found = found.setdefault(part, {}) if isinstance(found, dict) else found[part]
    found[last] = value
    return values


def load(values: dict[str, Any]) -> Recipe:
    return load_recipe_text(yaml.safe_dump(values), "mine.yaml")


def phase_of(**parts: Any) -> Phase:
    return load({**MINIMAL, "phases": [{**MINIMAL["phases"][0], **parts}]}).phases[0]


# --- the packaged recipes -------------------------------------------------------------------------


def test_every_promised_recipe_is_there_and_no_other() -> None:
    assert sorted(EXPECTED) == recipe_names() == sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_has_its_files_name_and_tells_where_it_comes_from(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.source and recipe.caution
    assert all(phase.documented or phase.published for phase in recipe.phases)
    assert json.loads(json.dumps(recipe.to_dict(), allow_nan=False))["name"] == name


@pytest.mark.parametrize("phase", PHASES)
def test_settings_are_valid_and_marked_as_the_recipes(phase: Phase) -> None:
    config = build_config(phase.settings)[0]
    assert config.data.train == [] and config.model == RunConfig().model, "data and base model are the user's"
    recipe = next(load_recipe(name) for name in EXPECTED if phase in load_recipe(name).phases)
    values, origins = recipe_config(recipe, phase.name)
    assert build_config(values)[0].training.objective == phase.objective
    assert origins and set(origins.values()) == {"recipe"}
    assert "training.learning_rate" in origins


@pytest.mark.parametrize("phase", PHASES)
def test_the_batch_of_the_settings_is_a_batch_of_a_source(phase: Phase) -> None:
    batches = [figures.batch for figures in (phase.published or phase.documented, phase.documented) if figures and figures.batch]
    if batches:
        config = build_config(phase.settings)[0]
        got = config.reinforcement.rollout_size if phase.objective == "ppo" else config.training.effective_batch
        assert (batches[0].low or 0) <= got <= (batches[0].high or math.inf)


@pytest.mark.parametrize("phase", PHASES)
def test_rate_length_and_rank_of_the_settings_are_those_of_a_source(phase: Phase) -> None:
    config, checked = build_config(phase.settings)[0], phase.published or phase.documented
    assert checked is not None
    pairs = [
        (checked.learning_rate, config.training.learning_rate),
        (checked.rank, config.method.r),
        (checked.alpha, config.method.alpha),
        (checked.epochs, config.training.epochs),
    ]
    for span, value in pairs:
        if span is not None:
            assert (span.low or 0) <= value <= (span.high or math.inf), (phase.name, value)


def test_figures_of_the_primary_sources() -> None:
    def published(name: str) -> tuple[Any, ...]:
        figures = load_recipe(name).phases[0].published
        assert figures is not None
        return tuple(
            getattr(span, "exact", None) for span in (figures.examples, figures.epochs, figures.batch, figures.learning_rate)
        )

    assert published("alpaca") == (52002, 3, 128, 2e-5)
    assert published("vicuna") == (70000, 3, 128, 2e-5)
    assert published("llama2-chat") == (27540, 2, 64, 2e-5)
    assert published("qlora") == (9209, None, 16, 2e-4)
    assert published("metropole") == (4081, 3, 8, 2e-5)
    lima = load_recipe("lima").phases[0].published
    assert lima and lima.epochs and lima.epochs.exact == 15 and str(lima.batch) == "32 to 64"


def test_figures_of_the_reference_documents() -> None:
    def documented(name: str) -> tuple[Any, ...]:
        figures = load_recipe(name).phases[0].documented
        assert figures is not None
        return tuple(str(span) for span in (figures.steps, figures.learning_rate, figures.batch, figures.warmup_steps))

    assert documented("alpaca") == ("3,000", "2e-05", "128", "100")
    assert documented("vicuna") == ("12,000", "2e-05", "128", "360")
    assert documented("llama2-chat") == ("75,000", "5e-06 to 1e-05", "256", "150")
    assert documented("dolly") == ("2,000", "1e-05", "32", "50")
    assert documented("conservative") == ("25,000", "5e-06", "192", "1,000")
    assert documented("conservative-fast") == ("15,000", "1e-05", "96", "500")
    assert documented("conservative-ultra-fast") == ("5,000", "2e-05", "384", "200")
    assert documented("mamba-swelu-chat") == ("25,000", "5e-06", "32", "1,000")
    stages = [str(phase.documented.steps) for phase in load_recipe("multi-stage").phases if phase.documented]
    assert stages == ["10,000", "10,000", "5,000"]
    rates = [build_config(phase.settings)[0].training.learning_rate for phase in load_recipe("multi-stage").phases]
    assert rates == [1e-5, 5e-6, 2e-6]


def test_the_guideline_table_of_the_chapter() -> None:
    found = {}
    for name in ("instruction", "domain", "style", "full-capability"):
        phase = load_recipe(name).phases[0]
        assert phase.documented is not None
        method = build_config(phase.settings)[0].method
        found[name] = (str(phase.documented.rank), str(phase.documented.alpha), method.target_modules)
        assert method.alpha == 2 * method.r
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert found == {
        "instruction": ("8 to 16", "16 to 32", ["q_proj", "v_proj"]),
        "domain": ("16 to 32", "32 to 64", attention),
        "style": ("32 to 64", "64 to 128", attention),
        "full-capability": ("64 to 128", "128 to 256", "all-linear"),
    }


# --- phases -------------------------------------------------------------------------------------


def test_a_recipe_of_several_phases_asks_for_one() -> None:
    with pytest.raises(ConfigError) as caught:
        load_phase("multi-stage")
    assert "multi-stage:conversational" in str(caught.value)
    assert load_phase("multi-stage:conversational")[1].name == "conversational"
    assert load_phase("alpaca")[1].name == "sft"
    for wrong in ("alpaca:nope", "multi-stage:", "multi-stage:GENERAL"):
        with pytest.raises(ConfigError):
            load_phase(wrong)


@pytest.mark.parametrize("name", ["", "alpacca", "../alpaca", "alpaca.yaml", "ALPACA", "x" * 10_000, "\x1b[2J"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(name)
    assert caught.value.code == "CONFIG_INVALID_VALUE" and "alpaca" in str(caught.value)
    assert len(str(caught.value)) < 1000 and "\x1b" not in str(caught.value)


def test_a_near_name_is_suggested() -> None:
    with pytest.raises(ConfigError, match="did you mean conservative"):
        load_recipe("conservativ")


# --- arithmetic -----------------------------------------------------------------------------------


def exact(span: Span | None) -> float | None:
    return span.exact if span else None


def test_alpaca_by_hand() -> None:
    sums = recipe_arithmetic(load_recipe("alpaca").phases[0])
    assert sums.documented and sums.published
    assert exact(sums.documented.epochs_implied) == pytest.approx(3000 * 128 / 52000) == pytest.approx(7.38, abs=0.01)
    assert exact(sums.published.steps_implied) == exact(sums.recipe.steps_implied) == round(3 * 52002 / 128) == 1219
    assert exact(sums.documented.warmup_share) == pytest.approx(100 / 3000)
    assert exact(sums.documented.examples_per_second) == pytest.approx(3000 * 128 / (3 * 3600))
    assert exact(sums.recipe.tokens_at_most) == 3 * 52002 * 512
    assert any("3 epochs" in text and "7.4 epochs" in text for text in sums.contradictions)


@pytest.mark.parametrize(
    ("name", "epochs"),
    [
        ("vicuna", 12000 * 128 / 70000),
        ("dolly", 2000 * 32 / 15000),
        ("conservative", 25000 * 192 / 114000),
        ("conservative-fast", 15000 * 96 / 114000),
        ("conservative-ultra-fast", 5000 * 384 / 114000),
        ("conservative-max-quality", 50000 * 288 / 214000),
        ("mamba-swelu-chat", 25000 * 32 / 250000),
    ],
)
def test_documented_steps_as_epochs(name: str, epochs: float) -> None:
    sums = recipe_arithmetic(load_recipe(name).phases[0]).documented
    assert sums and exact(sums.epochs_implied) == pytest.approx(epochs)


@pytest.mark.parametrize(("name", "steps"), [("vicuna", 1641), ("llama2-chat", 861), ("dolly", 617), ("metropole", 1530)])
def test_steps_of_the_primary_sources(name: str, steps: int) -> None:
    sums = recipe_arithmetic(load_recipe(name).phases[0])
    assert sums.published and exact(sums.published.steps_implied) == exact(sums.recipe.steps_implied) == steps


def test_the_notebooks_own_count_of_steps_is_met() -> None:
    figures = load_recipe("metropole").phases[0].published  # its output reads: Total steps = 1,530
    assert figures and figures.steps and figures.steps.exact == 1530


def test_the_variants_keep_the_documented_ratio_of_examples_seen() -> None:
    def epochs(name: str) -> tuple[float, float]:
        phase = load_recipe(name).phases[0]
        sums = recipe_arithmetic(phase).documented
        assert sums and sums.epochs_implied and sums.epochs_implied.exact
        return sums.epochs_implied.exact, build_config(phase.settings)[0].training.epochs

    documented, ours = epochs("conservative")
    for name in ("conservative-fast", "conservative-ultra-fast", "conservative-max-quality"):
        theirs, set_epochs = epochs(name)
        assert set_epochs == max(1, round(ours * theirs / documented))


def test_ranges_stay_ranges_and_nothing_is_guessed() -> None:
    quick = recipe_arithmetic(load_recipe("mamba-swelu-quick").phases[0]).documented
    assert quick and quick.epochs_implied
    assert (quick.epochs_implied.low, quick.epochs_implied.high) == pytest.approx((5000 * 32 / 52000, 10000 * 32 / 52000))
    llama = recipe_arithmetic(load_recipe("llama2-chat").phases[0]).documented
    assert llama and llama.epochs_implied and llama.epochs_implied.low is None and llama.epochs_implied.high == 19.2
    lora = recipe_arithmetic(load_recipe("lora").phases[0])
    assert lora.documented and lora.documented.epochs_implied is None and lora.recipe.steps_implied is None
    qlora = recipe_arithmetic(load_recipe("qlora").phases[0]).documented
    assert qlora and qlora.batch_assumed and qlora.examples_assumed


@given(st.integers(1, 10**9), st.integers(1, 10**6), st.integers(1, 10**9), st.floats(0.1, 1000))
def test_steps_and_epochs_undo_each_other(steps: int, batch: int, examples: int, hours: float) -> None:
    figures = {"steps": steps, "batch": batch, "examples": examples, "hours": hours, "warmup_steps": steps}
    sums = recipe_arithmetic(phase_of(documented=figures)).documented
    assert sums and sums.epochs_implied and sums.epochs_implied.exact
    assert sums.epochs_implied.exact * examples / batch == pytest.approx(steps)
    assert exact(sums.warmup_share) == pytest.approx(1)
    back = recipe_arithmetic(phase_of(published={"epochs": 3, "batch": batch, "examples": examples})).published
    assert back and exact(back.steps_implied) == exact(sums.steps_for_3_epochs) == max(1, round(3 * examples / batch))


def test_contradictions_are_found_where_they_are_and_only_there() -> None:
    fits = {"steps": 3000, "batch": 100, "examples": 100_000, "epochs": 3}
    assert recipe_arithmetic(phase_of(documented=fits)).contradictions == ()
    assert len(recipe_arithmetic(phase_of(documented={**fits, "epochs": 2})).contradictions) == 1
    assert len(recipe_arithmetic(phase_of(documented={**fits, "steps": 6000, "epochs": None})).contradictions) == 1
    near = {"epochs": 4, "batch": 100, "examples": 100_000}
    assert recipe_arithmetic(phase_of(documented=fits, published=near)).contradictions == ()
    assert len(recipe_arithmetic(phase_of(documented=fits, published={**near, "epochs": 1})).contradictions) == 1


def test_the_page_shows_the_tables_the_code_computes() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    table = page.split("<!-- tables -->\n", 1)[1].split("<!-- end of tables -->", 1)[0]
    assert table.strip() == recipe_tables().strip(), "put the output of knowledge.recipes.recipe_tables() between the marks"
    assert all(f"`{name}" in table for name in EXPECTED)


# --- merging --------------------------------------------------------------------------------------


def test_defaults_then_recipe_then_run_file_then_set() -> None:
    user = {"data": {"train": "a.jsonl"}, "training": {"epochs": 5, "seed": 1}}
    config, origins = build_with_recipe(load_recipe("qlora"), None, user, ["training.seed=7", "method.r=8"])
    assert (config.training.epochs, config.training.seed, config.method.r) == (5, 7, 8)
    assert config.method.kind == "qlora" and config.training.max_grad_norm == 0.3
    assert config.training.eval_steps == RunConfig().training.eval_steps
    assert {key for key, origin in origins.items() if origin == "yours"} == {
        "data.train",
        "training.epochs",
        "training.seed",
        "method.r",
    }
    assert origins["method.kind"] == "recipe" and "training.eval_steps" not in origins
    assert load_recipe("qlora").phases[0].settings["method"]["r"] == 64, "the recipe itself is unchanged"


def test_a_mistake_in_the_users_file_is_told_as_theirs() -> None:
    with pytest.raises(ConfigError) as caught:
        build_with_recipe(load_recipe("lora"), None, {"training": {"epoch": 1}}, where="run.yaml")
    assert caught.value.where == "run.yaml" and caught.value.code == "CONFIG_UNKNOWN_KEY"


def test_merging_lists_replaces_them_and_changes_no_input() -> None:
    below = {"method": {"target_modules": ["a", "b"], "r": 4}}
    above = {"method": {"target_modules": ["c"]}, "name": "x"}
    kept = copy.deepcopy((below, above))
    merged, origins = merge(below, above)
    assert merged == {"method": {"target_modules": ["c"], "r": 4}, "name": "x"}
    assert origins == {"method.target_modules": "yours", "method.r": "recipe", "name": "yours"}
    merged["method"]["target_modules"].append("d")
    assert (below, above) == kept


leaf = st.one_of(st.integers(), st.text("abc", max_size=3), st.lists(st.integers(), max_size=2))
tree = st.dictionaries(st.sampled_from("abc"), st.dictionaries(st.sampled_from("xyz"), leaf, max_size=3), max_size=3)


@given(tree, tree)
def test_the_users_leaves_win_and_the_recipes_others_stay(below: dict[str, Any], above: dict[str, Any]) -> None:
    merged, origins = merge(below, above)
    for section in merged:
        for key, value in merged[section].items():
            yours = key in above.get(section, {})
            assert value == (above if yours else below)[section][key]
            assert origins[f"{section}.{key}"] == ("yours" if yours else "recipe")
    assert sum(map(len, merged.values())) == len({(s, k) for part in (below, above) for s in part for k in part[s]})
    assert merge(merged, above)[0] == merged


# --- several devices ------------------------------------------------------------------------------


def batch_of(values: dict[str, Any]) -> tuple[int, int]:
    training = build_config(values)[0].training
    return training.batch_size, training.gradient_accumulation


def test_accumulation_is_divided_first() -> None:
    values, _ = recipe_config(load_recipe("conservative"))
    spread, note = recipe_for_devices(values, 6)  # the document: 4 per GPU, 8 accumulated, 6 GPUs
    assert batch_of(spread) == (4, 8) and note is None
    assert batch_of(values) == (4, 48)
    assert spread["method"] == values["method"] and spread["training"]["learning_rate"] == 5e-6


def test_a_rest_changes_the_micro_batch_or_is_said() -> None:
    twelve = {"training": {"batch_size": 4, "gradient_accumulation": 3}}
    assert recipe_for_devices(twelve, 2) == ({"training": {"batch_size": 3, "gradient_accumulation": 2}}, None)
    spread, note = recipe_for_devices({"training": {"batch_size": 4, "gradient_accumulation": 32}}, 6)
    assert batch_of(spread) == (3, 7) and note is not None and "128" in note and "126" in note


@pytest.mark.parametrize("count", [0, -1, 17, 10**9, True])
def test_impossible_device_counts_are_refused(count: int) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_for_devices({}, count)  # the default batch is 16
    assert caught.value.code == "CONFIG_INVALID_VALUE" and caught.value.remedy


@given(st.integers(1, 64), st.integers(1, 256), st.integers(1, 64))
def test_the_global_batch_is_kept_or_the_note_tells_the_new_one(micro: int, accumulation: int, devices: int) -> None:
    values = {"training": {"batch_size": micro, "gradient_accumulation": accumulation}}
    wanted = micro * accumulation
    if wanted < devices:
        with pytest.raises(ConfigError):
            recipe_for_devices(values, devices)
        return
    spread, note = recipe_for_devices(values, devices)
    new_micro, new_accumulation = batch_of(spread)
    got = new_micro * new_accumulation * devices
    assert new_micro <= micro, "a device never needs more memory than the recipe asks for"
    assert (note is None) == (got == wanted)
    assert got == wanted or (wanted % devices and abs(got - wanted) <= devices / 2)
    assert note is None or f"{got:,}" in note


# --- recipe files from strangers ------------------------------------------------------------------


def test_a_users_own_recipe_is_read_like_a_packaged_one() -> None:
    recipe = load(MINIMAL)
    assert recipe.phases[0].settings == {"training": {"epochs": 2}, "method": {"r": 8}}
    assert exact(recipe_arithmetic(recipe.phases[0]).recipe.steps_implied) == round(2 * 100 / 16)
    assert load_recipe_text((FOLDER / "alpaca.yaml").read_text(encoding="utf-8"), "x") == load_recipe("alpaca")


def test_the_example_of_the_page_is_a_recipe() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").split("```yaml\n", 1)[1].split("```", 1)[0]
    recipe = load_recipe_text(text, "docs/recipes.md")
    sums = recipe_arithmetic(recipe.phases[0])
    assert exact(sums.recipe.steps_implied) == round(3 * 4200 / 16) and sums.contradictions == ()


WRONG = [
    ("extra", 1, "CONFIG_UNKNOWN_KEY"),
    ("phases/0/extra", 1, "CONFIG_UNKNOWN_KEY"),
    ("phases/0/documented", {"stepps": 3}, "CONFIG_UNKNOWN_KEY"),
    ("phases/0/settings", {"training": {"epochs": -1}}, "CONFIG_INVALID_VALUE"),
    ("phases/0/settings", {"training": {"epochs": "many"}}, "CONFIG_INVALID_VALUE"),
    ("phases/0/settings", {"training": {"epochs": float("nan")}}, "CONFIG_INVALID_VALUE"),
    ("phases/0/settings", {"training": {"learning_rate": float("inf")}}, "CONFIG_INVALID_VALUE"),
    ("phases/0/settings", {"training": {"epochs": 1}, "training.epochs": 2}, "CONFIG_INVALID_VALUE"),
    ("phases/0/settings", {"training": 5}, "CONFIG_INVALID_VALUE"),
    ("phases/0/settings", {1: 2}, "CONFIG_INVALID_VALUE"),
    ("phases/0/settings", [1], "CONFIG_INVALID_VALUE"),
    ("phases/0/settings", {"training": {"epochs": {"a": {"b": 1}}}}, "CONFIG_INVALID_VALUE"),
    ("phases/0/objective", "magic", "CONFIG_INVALID_VALUE"),
    ("phases/0/name", "Not A Name", "CONFIG_INVALID_VALUE"),
    ("phases/0/dataset/examples", 0, "CONFIG_INVALID_VALUE"),
    ("phases/0/dataset/examples", "100", "CONFIG_INVALID_VALUE"),
    ("phases/0/dataset/examples", True, "CONFIG_INVALID_VALUE"),
    ("phases/0/dataset/examples", 10**30, "CONFIG_INVALID_VALUE"),
    ("phases/0/documented/steps", -3, "CONFIG_INVALID_VALUE"),
    ("phases/0/documented/steps", 0, "CONFIG_INVALID_VALUE"),
    ("phases/0/documented/steps", 2.5, "CONFIG_INVALID_VALUE"),
    ("phases/0/documented/steps", True, "CONFIG_INVALID_VALUE"),
    ("phases/0/documented/steps", "3000", "CONFIG_INVALID_VALUE"),
    ("phases/0/documented/steps", [5, 3], "CONFIG_INVALID_VALUE"),
    ("phases/0/documented/steps", [1, 2, 3], "CONFIG_INVALID_VALUE"),
    ("phases/0/documented/steps", [None, None], "CONFIG_INVALID_VALUE"),
    ("phases/0/documented/steps", [1, [2]], "CONFIG_INVALID_VALUE"),
    ("phases/0/documented/hours", float("nan"), "CONFIG_INVALID_VALUE"),
    ("phases/0/documented/hours", float("inf"), "CONFIG_INVALID_VALUE"),
    ("phases/0/documented/batch", 1e300, "CONFIG_INVALID_VALUE"),
    ("phases", [], "CONFIG_INVALID_VALUE"),
    ("phases", {"a": 1}, "CONFIG_INVALID_VALUE"),
    ("phases", [copy.deepcopy(MINIMAL["phases"][0]) for _ in range(2)], "CONFIG_INVALID_VALUE"),
    ("phases", [changed("phases/0/name", f"p{n}")["phases"][0] for n in range(11)], "CONFIG_INVALID_VALUE"),
    ("name", "../x", "CONFIG_INVALID_VALUE"),
    ("name", "a\n", "CONFIG_INVALID_VALUE"),
    ("name", None, "CONFIG_INVALID_VALUE"),
    ("title", "\x1b[31mred", "CONFIG_INVALID_VALUE"),
    ("title", "x" * 301, "CONFIG_INVALID_VALUE"),
    ("summary", "", "CONFIG_INVALID_VALUE"),
    ("quality", 6, "CONFIG_INVALID_VALUE"),
    ("source", [], "CONFIG_INVALID_VALUE"),
    ("needs/memory_gb", -1, "CONFIG_INVALID_VALUE"),
]


@pytest.mark.parametrize(("path", "value", "code"), WRONG, ids=[f"{path}={str(value)[:20]!r}" for path, value, _ in WRONG])
def test_a_wrong_recipe_is_refused_with_the_place(path: str, value: Any, code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(changed(path, value))
    assert caught.value.code == code
    assert caught.value.where is not None and caught.value.where.startswith("mine.yaml")
    assert len(str(caught.value)) < 5000 and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("key", [key for key, *_ in settings() if key not in RECIPE_SETTINGS] + ["training.nonsense", "x.y"])
def test_a_recipe_cannot_set_what_is_the_users(key: str) -> None:
    if key in ("version", "name"):
        values = {key: 1}
    else:
        section, _, name = key.partition(".")
        values = {section: {name: None}}
    with pytest.raises(ConfigError):
        load(changed("phases/0/settings", values))


def test_settings_that_run_code_or_name_places_are_the_users() -> None:
    dangerous = {"model.trust_remote_code", "model.base", "data.train", "data.template", "data.template_consent"}
    assert not RECIPE_SETTINGS & (dangerous | {"training.report_to", "training.device", "evaluation.suite", "training.objective"})
    assert not RECIPE_SETTINGS & {"reinforcement.reward", "reinforcement.reward_folder", "reinforcement.reward_weights"}
    assert {"training.epochs", "method.kind", "data.max_length", "preference.beta", "reinforcement.clip_range"} <= RECIPE_SETTINGS


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "just text",
        "a: &x [1]\nb: *x",
        "name: a\nname: b",
        "a: !!python/object/apply:os.system [ls]",
        "a: " + "[" * 5000,
        "a: [" * 400,
        "a: b: c",
        "x: " + "1" * 5000,
        "x: 2001-99-99",
        "x: !!int ''",
        "x: !!timestamp foo",
        "\x00",
        "#" * 1_000_001,
    ],
    ids=lambda text: repr(text[:24]),
)
def test_text_that_is_no_recipe_is_unreadable(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe_text(text, "mine.yaml")
    assert caught.value.code == "CONFIG_UNREADABLE"


def test_several_mistakes_are_told_at_once_and_near_keys_suggested() -> None:
    values = changed("qualty", 3) | {"title": 5}
    with pytest.raises(ConfigError) as caught:
        load(values)
    assert "did you mean quality" in str(caught.value) and "title" in str(caught.value)


TEXT = st.text("ab.-_:é\n\x1b\x00", max_size=5)
json_value = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=5,
)
PATHS = ["name", "phases", "phases/0", "phases/0/settings", "phases/0/documented", "phases/0/documented/steps", "needs"]


@given(st.sampled_from([*PATHS, "source", "quality", "phases/0/dataset", "phases/0/settings/training.epochs"]), json_value)
def test_any_value_anywhere_is_a_recipe_or_a_config_error(path: str, value: Any) -> None:
    try:
        recipe = load_recipe_text(json.dumps(changed(path, value)), "mine.yaml")
    except ConfigError:
        return
    json.dumps(recipe.to_dict(), allow_nan=False)


def test_recipes_need_no_torch() -> None:
    code = (
        "import sys; from finetuneflow.knowledge.recipes import recipe_tables; recipe_tables();"
        "print([m for m in ('torch', 'transformers', 'peft', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
