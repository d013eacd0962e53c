"""The score: the documented example, the direction every input moves a mark, continuity, limits, hostile figures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuneflow.config import RunConfig, build_config
from finetuneflow.errors import ConfigError
from finetuneflow.knowledge.score import Score, Setup, judge, parse_count, score, setup_of
from finetuneflow.knowledge.setups import DOCUMENTED_MARKS, documented_setups
from finetuneflow.knowledge.shapes import shape_from_size
from finetuneflow.knowledge.values import GB, DataFacts, Device, Machine

NAMES = ["learning rate", "batch size", "data quality", "steps", "warm-up", "GPU use", "time", "stability"]
# The reference document's own example, with its marks in its order.
EXAMPLE: dict[str, Any] = {
    "params": 124_000_000,
    "examples": 114_000,
    "steps": 25_000,
    "learning_rate": 5e-6,
    "batch": 192,
    "warmup": 1_000,
    "gpus": 6,
    "hours": 43,
    "memory_gb": 24,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "alpaca": {"params": 7e9, "examples": 52_000, "steps": 3_000, "learning_rate": 2e-5, "batch": 128, "warmup": 100, "hours": 3},
    "vicuna": {
        "params": 7e9,
        "examples": 70_000,
        "steps": 12_000,
        "learning_rate": 2e-5,
        "batch": 128,
        "warmup": 360,
        "hours": 10,
    },
    "dolly": {"params": 12e9, "examples": 15_000, "steps": 2_000, "learning_rate": 1e-5, "batch": 32, "warmup": 50, "hours": 4},
}


def example(**changes: Any) -> Setup:
    return Setup(**{**EXAMPLE, **changes})


def marks(setup: Setup) -> dict[str, float | None]:
    return {criterion.name: criterion.score for criterion in judge(setup)}


def mark(setup: Setup, name: str) -> float:
    value = marks(setup)[name]
    assert value is not None
    return value


setups = st.builds(
    Setup,
    params=st.floats(1e6, 1e12),
    examples=st.floats(10, 1e7),
    steps=st.floats(1, 1e6),
    learning_rate=st.floats(1e-8, 0.1),
    batch=st.floats(1, 4096),
    warmup=st.integers(0, 20_000),
    gpus=st.integers(0, 256),
    hours=st.none() | st.floats(0.01, 1e4),
    method=st.sampled_from(["full", "lora", "qlora", "dora", "ia3", "prefix"]),
    sources=st.none() | st.integers(1, 20),
    curated=st.booleans(),
    duplicate_share=st.floats(0, 1),
    memory_gb=st.none() | st.floats(4, 200),
)


# --- the documented example -----------------------------------------------------------------------------


def test_the_documented_example_gets_its_documented_marks() -> None:
    result = score(example())
    expected, overall = DOCUMENTED_MARKS["conservative"]
    assert [criterion.name for criterion in result.criteria] == NAMES
    assert [criterion.score for criterion in result.criteria] == list(expected)
    assert result.overall == overall
    assert result.mean == pytest.approx(8.375)


def test_the_card_by_name_gives_the_same_marks() -> None:
    result = score(example(memory_gb=None, gpu="RTX 4090"))
    assert [criterion.score for criterion in result.criteria] == list(DOCUMENTED_MARKS["conservative"][0])


def test_the_steps_reason_names_both_rules_honestly() -> None:
    reason = score(example()).criteria[3].reason
    assert "top edge" in reason and "10,000 to 25,000" in reason
    assert "42 passes" in reason and "2 to 5" in reason


def test_strengths_and_weaknesses_are_those_the_document_names() -> None:
    result = score(example())
    strengths, weaknesses = " ".join(result.strengths), " ".join(result.weaknesses)
    assert all(word in strengths for word in ("forgetting", "stable", "dataset", "card"))
    assert "slow (43 h" in weaknesses and "too long" in weaknesses


def test_json_has_the_documented_form() -> None:
    value = json.loads(json.dumps(score(example()).to_dict(), allow_nan=False))
    assert [list(criterion) for criterion in value["criteria"]] == [["name", "score", "reason"]] * 8
    assert {"criteria", "overall", "strengths", "weaknesses", "position", "improvements"} <= set(value)
    assert value["overall"] == 8.5


@pytest.mark.parametrize("name", PUBLISHED)
def test_other_setups_do_not_score_like_the_example(name: str) -> None:
    other = Setup(**PUBLISHED[name], gpus=8, memory_gb=80)
    assert [c.score for c in judge(other)] != [c.score for c in judge(example())]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("learning rate", {"learning_rate": 1e-4}),
        ("learning rate", {"learning_rate": 5e-7}),
        ("batch size", {"batch": 16}),
        ("data quality", {"examples": 500}),
        ("steps", {"steps": 250_000}),
        ("warm-up", {"warmup": 0}),
        ("warm-up", {"warmup": 10_000}),
        ("GPU use", {"gpus": 128}),
        ("GPU use", {"params": 70e9}),
        ("time", {"hours": 400}),
        ("stability", {"warmup": 0}),
        ("stability", {"learning_rate": 1e-3}),
        ("stability", {"batch": 4}),
    ],
)
def test_each_bad_figure_lowers_its_criterion(name: str, changes: dict[str, Any]) -> None:
    assert mark(example(**changes), name) <= mark(example(), name) - 1


def test_above_1e_4_a_full_model_forgets() -> None:
    assert mark(example(learning_rate=1.5e-4), "learning rate") <= 1
    assert "forgets" in judge(example(learning_rate=1.5e-4))[0].reason


@pytest.mark.parametrize(("method", "good", "bad"), [("lora", 2e-4, 5e-6), ("qlora", 3e-4, 5e-6), ("full", 5e-6, 2e-4)])
def test_rates_are_judged_by_method(method: Any, good: float, bad: float) -> None:
    assert mark(example(method=method, learning_rate=good), "learning rate") == 10
    assert mark(example(method=method, learning_rate=bad), "learning rate") <= 2


def test_a_failing_criterion_is_not_averaged_away() -> None:
    adapter = example(method="lora", learning_rate=5e-6, batch=32, steps=10_000, warmup=300, hours=5)
    result = score(adapter)
    lowest = min(c.score for c in result.criteria if c.score is not None)
    assert result.mean > 7.5 and result.overall <= lowest + 4


def test_a_model_that_does_not_fit_gets_no_mark_for_its_cards() -> None:
    assert mark(example(params=7e9, gpus=1), "GPU use") == 0
    assert mark(example(params=7e9, gpus=1, method="qlora"), "GPU use") == 10
    assert "sharded" in judge(example(params=7e9, gpus=8))[5].reason


# --- properties -----------------------------------------------------------------------------------------


@given(setups)
@settings(max_examples=200, deadline=None)
def test_marks_stay_in_range_and_overall_follows_them(setup: Setup) -> None:
    criteria = judge(setup)
    given_marks = [c.score for c in criteria if c.score is not None]
    assert all(0 <= value <= 10 and value * 2 == int(value * 2) for value in given_marks)
    assert (criteria[5].score is None) == (setup.gpus == 0 or setup.memory_gb is None)
    assert (criteria[6].score is None) == (setup.hours is None)
    assert all(c.reason.endswith(".") and "nan" not in c.reason and "inf " not in c.reason for c in criteria)


@given(setups, st.floats(1, 50), st.floats(1, 50))
@settings(max_examples=200, deadline=None)
def test_a_rate_further_from_the_documented_band_is_never_better(setup: Setup, near: float, far: float) -> None:
    near, far = sorted((near, far))
    low, high = {"full": (5e-7, 1e-5), "ia3": (3e-3, 8e-3), "prefix": (1e-3, 1e-2)}.get(setup.method, (1e-4, 5e-4))
    for close, away in ((high * near, high * far), (low / near, low / far)):
        if away < 1:
            closer, farther = replace(setup, learning_rate=close), replace(setup, learning_rate=away)
            if setup.method == "full" and close < high:
                continue  # between the bands of large and small models the order depends on the size
            assert mark(farther, "learning rate") <= mark(closer, "learning rate")


@given(st.floats(1e8, 1e9), st.floats(1e-8, 5e-6), st.floats(1e-8, 5e-6))
@settings(max_examples=100, deadline=None)
def test_below_the_band_of_small_models_a_lower_rate_is_never_better(params: float, a: float, b: float) -> None:
    a, b = sorted((a, b))
    assert mark(example(params=params, learning_rate=a), "learning rate") <= mark(
        example(params=params, learning_rate=b), "learning rate"
    )


@given(setups, st.floats(1e-8, 0.1), st.floats(1e-8, 0.1))
@settings(max_examples=200, deadline=None)
def test_a_higher_rate_is_never_more_stable(setup: Setup, a: float, b: float) -> None:
    a, b = sorted((a, b))
    assert mark(replace(setup, learning_rate=b), "stability") <= mark(replace(setup, learning_rate=a), "stability")


@given(setups, st.floats(1, 1e4), st.floats(1, 1e4))
@settings(max_examples=200, deadline=None)
def test_batches_away_from_128_to_256_are_never_better(setup: Setup, a: float, b: float) -> None:
    near, far = sorted((a, b))
    full = replace(setup, method="full")
    assert mark(replace(full, batch=256 * far), "batch size") <= mark(replace(full, batch=256 * near), "batch size")
    if far < 128:
        assert mark(replace(full, batch=128 / far), "batch size") <= mark(replace(full, batch=128 / near), "batch size")
    assert mark(replace(setup, batch=128 * far), "stability") >= mark(replace(setup, batch=128 * near), "stability")


@given(setups, st.floats(0.01, 1e5), st.floats(0.01, 1e5))
@settings(max_examples=200, deadline=None)
def test_more_hours_never_raise_time(setup: Setup, a: float, b: float) -> None:
    a, b = sorted((a, b))
    assert mark(replace(setup, hours=b), "time") <= mark(replace(setup, hours=a), "time")


@given(setups, st.floats(10, 1e8), st.floats(10, 1e8))
@settings(max_examples=200, deadline=None)
def test_more_data_is_never_worse_data_and_duplicates_never_help(setup: Setup, a: float, b: float) -> None:
    a, b = sorted((a, b))
    assert mark(replace(setup, examples=b), "data quality") >= mark(replace(setup, examples=a), "data quality")
    assert mark(replace(setup, duplicate_share=0.5), "data quality") <= mark(replace(setup, duplicate_share=0), "data quality")
    assert mark(replace(setup, sources=1), "data quality") <= mark(replace(setup, sources=5), "data quality")


@given(setups, st.floats(1, 1000), st.floats(1, 1000))
@settings(max_examples=200, deadline=None)
def test_training_ever_longer_over_the_same_data_never_helps(setup: Setup, a: float, b: float) -> None:
    """From where both documented rules are exceeded on, more steps only overfit."""
    a, b = sorted((a, b))
    longest = max(100_000.0, 5 * setup.examples / setup.batch)
    assert mark(replace(setup, steps=longest * b), "steps") <= mark(replace(setup, steps=longest * a), "steps")


@given(setups, st.integers(1, 100_000), st.integers(1, 100_000))
@settings(max_examples=200, deadline=None)
def test_warm_up_has_one_peak_and_none_is_worst_for_stability(setup: Setup, a: int, b: int) -> None:
    a, b = sorted((a, b))
    values = [mark(replace(setup, warmup=n), "warm-up") for n in (a, (a + b) // 2, b)]
    assert values[1] >= min(values[0], values[2])
    assert (
        mark(replace(setup, warmup=0), "stability")
        <= mark(replace(setup, warmup=a), "stability")
        <= mark(replace(setup, warmup=b), "stability")
    )


@given(setups, st.floats(1, 4096), st.integers(1, 256), st.integers(1, 256))
@settings(max_examples=200, deadline=None)
def test_cards_share_the_batch(setup: Setup, batch: float, a: int, b: int) -> None:
    """Where the model fits one card, more cards for the same batch never use them better; a larger batch never worse."""
    small, (a, b) = replace(setup, params=1e8, memory_gb=80.0), sorted((a, b))
    assert mark(replace(small, gpus=b), "GPU use") <= mark(replace(small, gpus=a), "GPU use")
    busy = replace(small, gpus=a)
    assert mark(replace(busy, batch=batch * 2), "GPU use") >= mark(replace(busy, batch=batch), "GPU use")


CHANGED = ["params", "examples", "steps", "learning_rate", "batch", "hours", "memory_gb"]


@given(setups, st.sampled_from(CHANGED))
@settings(max_examples=500, deadline=None)
def test_a_change_of_five_percent_never_moves_a_mark_by_more_than_three(setup: Setup, name: str) -> None:
    value = getattr(setup, name)
    if value is None:
        return
    before, after = marks(setup), marks(replace(setup, **{name: value * 1.05}))
    for criterion, old in before.items():
        new = after[criterion]
        assert old is None or new is None or abs(old - new) <= 3, criterion


@given(setups)
@settings(max_examples=60, deadline=None)
def test_every_improvement_improves(setup: Setup) -> None:
    result = score(setup)
    gains = [improvement.gain for improvement in result.improvements]
    assert all(gain > 0 for gain in gains) and gains == sorted(gains, reverse=True)
    for improvement in result.improvements:
        assert improvement.settings and improvement.change
        advised = max(setup.passes, 5.001)
        later = replace(setup, **improvement.settings)
        assert later.passes <= advised or "steps" not in improvement.settings
    if result.together is not None:
        singles = [i.gain for i in result.improvements if "examples" not in i.settings]
        assert result.together.gain >= max(singles, default=0) - 1e-9


# --- position, improvements -------------------------------------------------------------------------------


def test_documented_setups_come_from_the_recipes() -> None:
    known = {setup.name: setup for setup in documented_setups()}
    assert (known["alpaca"].steps, known["alpaca"].hours, known["alpaca"].stars) == (3000, 3, 3)
    assert known["lora"].steps == pytest.approx(math.sqrt(5000 * 10000))
    assert known["dolly"].warmup == 50 and known["llama2-chat"].batch == 256
    assert known["qlora"].examples is None  # the document is silent


@pytest.mark.parametrize("name", ["alpaca", "vicuna", "dolly"])
def test_a_documented_setup_is_nearest_to_itself(name: str) -> None:
    place = score(Setup(**PUBLISHED[name], gpus=8, memory_gb=80)).position
    assert place.nearest == name and place.factor == pytest.approx(1)


def test_position_of_the_example_is_longer_and_more_careful_than_most() -> None:
    place = score(example(learning_rate=5.1e-6, steps=24_000)).position
    assert place.nearest == "conservative" and 1 < place.factor < 1.05
    assert place.shares["steps"] > 0.6 and place.shares["learning_rate"] < 0.2
    assert "conservative" in place.text


def test_what_would_raise_the_example() -> None:
    result = score(example())
    best = result.improvements[0]
    assert best.scores["warm-up"][1] > 7 and best.scores["time"][1] > 6
    assert best.settings["steps"] * 192 / 114_000 <= 5.001
    assert result.together is not None and result.together.gain >= best.gain


def test_a_model_too_large_for_its_cards_is_told_of_adapters() -> None:
    changes = [i.settings.get("method") for i in score(example(params=7e9, gpus=1)).improvements]
    assert "qlora" in changes or "lora" in changes
    assert not any(i.settings.get("method") for i in score(example()).improvements)


# --- run files --------------------------------------------------------------------------------------------


def machine(gpus: int) -> Machine:
    card = Device("Some card", "cuda", 24 * GB, bf16=True)
    processor = Device("Some processor", "cpu", 32 * GB)
    return Machine((card,) * gpus if gpus else (processor,), host_memory_bytes=64 * GB)


def config(**training: Any) -> RunConfig:
    return build_config({"data": {"train": ["a.jsonl"]}, "training": training})[0]


def test_a_run_file_becomes_a_setup() -> None:
    made = setup_of(
        config(epochs=3, warmup_ratio=0.03), shape_from_size("1.5B"), machine(2), DataFacts(examples=10_000), hours=2.0
    )
    assert made.batch == 4 * 4 * 2 and made.gpus == 2 and made.memory_gb == 24
    assert made.steps == math.ceil(30_000 / 32) and made.warmup == math.ceil(0.03 * made.steps)
    assert made.method == "lora" and made.learning_rate == 2e-4 and 1.3e9 < made.params < 1.7e9


def test_steps_warm_up_and_the_lowered_rate_of_a_run_file() -> None:
    facts = DataFacts(examples=1_000, duplicate_share=0.2)
    limited = setup_of(config(max_steps=77, scheduler="constant"), shape_from_size("124M"), machine(1), facts)
    assert limited.steps == 77 and limited.warmup == 0 and limited.duplicate_share == 0.2
    full = build_config({"data": {"train": ["a"]}, "method": {"kind": "full"}})[0]
    assert setup_of(full, shape_from_size("124M"), machine(1), facts).learning_rate == 2e-5


def test_a_run_on_the_processor_is_scored_without_cards() -> None:
    result = score(setup_of(config(), shape_from_size("124M"), machine(0), DataFacts(examples=1_000)))
    assert isinstance(result, Score) and [c.name for c in result.criteria if c.score is None] == ["GPU use", "time"]
    assert 0 < result.overall <= 10


# --- hostile ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("124M", 124_000_000),
        ("7B", 7_000_000_000),
        ("52k", 52_000),
        ("1.5b", 1_500_000_000),
        (" 114,000 ", 114_000),
        ("114_000", 114_000),
        ("2e5", 200_000),
        ("0.5 B", 500_000_000),
        ("1T", 10**12),
        (25000, 25000),
        (7e9, 7 * 10**9),
        ("0", 0),
    ],
)
def test_counts_as_people_write_them(text: str | float, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text",
    [
        *("", "M", "-5", "1.5", "7 apples", "nan", "inf", "1e99", "9" * 100, "1,00", "0x10", "٣", "1e400", "7BB", "1..5M"),
        *(None, True, math.nan, math.inf, -1, 1e300, 10**400, [7]),
    ],
)
def test_what_is_no_count_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_count(text)
    assert refused.value.code == "CONFIG_INVALID_VALUE" and len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "changes",
    [{name: value} for name in EXAMPLE for value in (-1, math.nan, math.inf, "7", True, 10**400)]
    + [{"params": 0}, {"steps": 0}, {"examples": 0}, {"batch": 0}, {"learning_rate": 0}, {"learning_rate": 2}, {"hours": 0}]
    + [{"gpus": 1.5}, {"warmup": 0.5}, {"sources": 0}, {"duplicate_share": 1.1}, {"params": None}, {"method": "magic"}],
)
def test_impossible_figures_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        example(**changes)
    assert refused.value.code == "CONFIG_INVALID_VALUE" and refused.value.remedy


def test_the_most_extreme_figures_are_scored() -> None:
    tiny = Setup(params=1, examples=1, steps=1, learning_rate=1e-12, batch=1, hours=1e-6, memory_gb=0.01, duplicate_share=1.0)
    huge = Setup(
        params=1e15, examples=1e15, steps=1e15, learning_rate=1, batch=1e15, warmup=10**15, gpus=10**6, hours=1e15, memory_gb=1e6
    )
    for setup in (tiny, huge, replace(tiny, steps=1e15), replace(huge, examples=1), replace(huge, steps=1)):
        assert 0 <= score(setup).overall <= 10


def test_an_unknown_card_is_an_error_that_says_so() -> None:
    with pytest.raises(ConfigError):
        score(example(memory_gb=None, gpu="no such card at all"))


def test_no_card_named_is_not_judged() -> None:
    assert marks(example(memory_gb=None))["GPU use"] is None
    assert marks(example(gpus=0))["GPU use"] is None
