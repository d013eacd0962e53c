"""Plans: the search against brute force, what more memory does, what each option says, and the run file it becomes."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from finetuneflow.config import RunConfig, build_config, dump_config, load_config, settings
from finetuneflow.errors import ConfigError
from finetuneflow.knowledge import hyperparameters
from finetuneflow.knowledge.advice import GOALS, whether_to_tune
from finetuneflow.knowledge.cost import Efficiency, estimate_cost
from finetuneflow.knowledge.facts import cpu_device, gpu, machine_named
from finetuneflow.knowledge.lint import check
from finetuneflow.knowledge.memory import Estimate, estimate
from finetuneflow.knowledge.recommend import Option, Plan, options, to_run_config
from finetuneflow.knowledge.resolve import resolve
from finetuneflow.knowledge.search import Candidate, Found, Grid, divisors, lengths, resident, search, with_settings
from finetuneflow.knowledge.shapes import ModelShape, known_shape, shape_from_config, shape_from_size
from finetuneflow.knowledge.situation import Situation
from finetuneflow.knowledge.values import GB, DataFacts, Device, Machine


def card(gb: float, *, count: int = 1, **changes: Any) -> Machine:
    """Cards like an RTX 4090 but for their memory."""
    device = replace(gpu("RTX 4090"), name=f"{gb:g} GB card", memory_bytes=round(gb * GB))
    return Machine((device,) * count, host_memory_bytes=128 * GB, **changes)


def processor(gb: float, **changes: Any) -> Machine:
    device = cpu_device(name="two cores", cores=2, features=("AMX BF16",), memory_bytes=round(gb * GB))
    return Machine((device,), host_memory_bytes=round(gb * GB), cores=2, **changes)


def some_data(examples: int = 12_000, longest: int = 2_500, **changes: Any) -> DataFacts:
    """Many short examples and a few long ones."""
    percentiles = tuple(round(50 + (p / 100) ** 3 * (longest - 50)) for p in range(101))
    values: dict[str, Any] = {"mean_tokens": 50 + (longest - 50) / 4, "supervised_share": 0.6, "counted": True} | changes
    return DataFacts(examples, length_percentiles=percentiles, **values)


CONFIG = RunConfig()
SMALL = shape_from_size("124M")


def option(plan: Plan, name: str) -> Option:
    return next(o for o in plan.options if o.name == name)


# --- the search is exact ------------------------------------------------------------------------------


def best_by_brute_force(grid: Grid, memory: dict[Candidate, Estimate], seconds: dict[Candidate, float]) -> set[Candidate]:
    """Every candidate that the stated rule may choose, found by looking at every point of the grid."""
    plain = {"adamw_torch_fused": 0, "adamw_8bit": 1, "paged_adamw_8bit": 2}
    for length in grid.lengths:
        points = [c for c in memory if c.max_length == length]
        roomy = [c for c in points if memory[c].verdict == "fits"]
        if roomy:
            fastest = min(seconds[c] for c in roomy)
            fast = [c for c in roomy if seconds[c] <= 1.01 * fastest]
            return {
                min(
                    fast,
                    key=lambda c: (c.checkpointing, plain[c.optimizer], ("single", "ddp", "fsdp").index(c.strategy), -c.batch),
                )
            }
        if tight := [c for c in points if memory[c].verdict == "tight"]:
            least = min(resident(memory[c]) for c in tight)
            return {c for c in tight if resident(memory[c]) == least}
    shortest = [c for c in memory if c.max_length == grid.lengths[-1]]
    least = min(resident(memory[c]) for c in shortest)
    return {c for c in shortest if resident(memory[c]) == least}


def compare_with_brute_force(grid: Grid, memory: dict[Candidate, Estimate], seconds: dict[Candidate, float]) -> Found:
    found = search(grid, memory.__getitem__, seconds.__getitem__)
    assert found.candidate in best_by_brute_force(grid, memory, seconds)
    assert found.estimate is memory[found.candidate] and found.seconds == seconds[found.candidate]
    assert found.fits == any(estimate.fits for estimate in memory.values())
    return found


def all_points(grid: Grid) -> list[Candidate]:
    return [candidate for length in grid.lengths for candidate in grid.candidates(length)]


def made_up(total: int, usable: int, paged: int) -> Estimate:
    verdict = "fits" if total <= 0.85 * usable else "tight" if total - paged <= usable else "no"
    parts = {"weights": total - paged, "optimizer_paged": paged}
    return Estimate(parts, total, usable, usable, verdict, "training step", {}, 0, 0)  # type: ignore[arg-type]


@given(
    examples=st.integers(1, 48),
    wanted=st.sampled_from([200, 512, 1000, 2048]),
    usable=st.integers(10, 4_000),
    base=st.integers(0, 1_000),
    per_token=st.floats(0.001, 0.5),
    saved=st.floats(0.0, 1.0),
    states=st.integers(0, 400),
    times=st.randoms(use_true_random=False),
)
@hypothesis_settings(max_examples=300, deadline=None)
def test_the_search_finds_what_brute_force_finds(examples, wanted, usable, base, per_token, saved, states, times) -> None:  # type: ignore[no-untyped-def]
    """Over grids with memory that grows with batch and length, and times that follow no rule at all."""
    optimizers = ("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit")
    grid = Grid(lengths(wanted), {"single": examples}, (False, True), optimizers)
    memory, seconds = {}, {}
    for c in all_points(grid):
        activations = per_token * c.batch * c.max_length * (1 - saved if c.checkpointing else 1)
        held = states if c.optimizer == "adamw_torch_fused" else states // 4
        paged = held if c.optimizer == "paged_adamw_8bit" else 0
        memory[c] = made_up(base + held + round(activations), usable, paged)
        seconds[c] = times.choice([1.0, 1.005, 1.01, 1.02, 5.0, 5.04, 5.06, 20.0])
    compare_with_brute_force(grid, memory, seconds)


@pytest.mark.parametrize("kind", ["lora", "qlora", "full", "dora"])
@pytest.mark.parametrize("gb", [4, 7, 11, 16, 24, 48, 141])
def test_the_search_is_exact_with_the_real_estimate(kind: str, gb: float) -> None:
    config = with_settings(CONFIG, {"method.kind": kind, "training.learning_rate": 1e-5})
    shape, machine, data = shape_from_size("1.5B"), card(gb, count=2), some_data()
    grid = Grid(
        (2048, 1024, 512, 256), {"single": 12, "ddp": 6, "fsdp": 6}, (False, True), ("adamw_torch_fused", "paged_adamw_8bit")
    )
    memory, seconds = {}, {}
    for c in all_points(grid):
        changed = with_settings(config, c.settings)
        memory[c] = estimate(shape, changed, machine, resolve(changed, machine), data=data, strategy=c.strategy)
        seconds[c] = c.max_length * (4 / 3 if c.checkpointing else 1) * (1 + 1 / c.batch) / (1 if c.strategy == "single" else 2)
    found = compare_with_brute_force(grid, memory, seconds)
    if found.fits:
        assert found.estimate.total_bytes - found.estimate.breakdown.get("optimizer_paged", 0) <= found.estimate.usable_bytes


@pytest.mark.parametrize("kind", ["lora", "qlora", "full", "dora"])
@pytest.mark.parametrize("machine", [card(24), processor(24)], ids=["cuda", "cpu"])
def test_what_the_search_takes_for_granted(kind: str, machine: Machine) -> None:
    """Memory never shrinks with the micro-batch or the length: without this, passing over larger ones would not be exact."""
    config = with_settings(CONFIG, {"method.kind": kind, "training.learning_rate": 1e-5})
    for shape, checkpointing in itertools.product((SMALL, shape_from_size("8B"), known_shape("gpt2") or SMALL), (False, True)):
        for lines in (
            [Candidate(1024, batch, 32 // batch, checkpointing, "adamw_torch_fused") for batch in divisors(32)],
            [Candidate(length, 2, 8, checkpointing, "adamw_torch_fused") for length in reversed(lengths(8192))],
        ):
            totals = []
            for c in lines:
                changed = with_settings(config, c.settings)
                totals.append(
                    resident(estimate(shape, changed, machine, resolve(changed, machine), data=some_data(longest=9_000)))
                )
            assert totals == sorted(totals)


def test_divisors_accumulate_to_the_batch_and_lengths_halve() -> None:
    assert divisors(16) == [1, 2, 4, 8, 16]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1] and divisors(17) == [1, 17] and divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert lengths(2048) == (2048, 1024, 512, 256)
    assert lengths(300) == (300,) and lengths(8) == (8,)
    assert all(length >= 256 and length % 8 == 0 for length in lengths(5001)[1:])


# --- a plan -------------------------------------------------------------------------------------------


def test_a_large_card_gets_unquantised_lora_without_checkpointing() -> None:
    plan = options(shape_from_size("1.5B"), CONFIG, card(80), some_data(longest=2_000))
    assert plan.chosen is not None and plan.choice == "lora-all-linear"
    assert plan.chosen.settings["training.gradient_checkpointing"] == "off"
    assert plan.chosen.settings["training.optimizer"] == "adamw_torch_fused"
    assert plan.chosen.settings["data.max_length"] == 2048
    assert plan.chosen.reason.startswith("Chosen: ")


def test_where_16_bits_do_not_fit_qlora_is_chosen() -> None:
    plan = options(shape_from_size("13B"), CONFIG, card(24), some_data())
    assert plan.chosen is not None and plan.chosen.method == "qlora"
    lora = option(plan, "lora")
    assert not lora.fits and lora.hours is None and lora.cost_usd is None
    assert lora.memory_gb > 24 and "weights" in lora.reason


@pytest.mark.parametrize("size", ["124M", "1.5B", "8B"])
@pytest.mark.parametrize("where", [card, processor], ids=["cuda", "cpu"])
def test_more_memory_never_makes_a_choice_worse(size: str, where: Any) -> None:
    """Per option: what fits keeps fitting, the length never shrinks, and at the same length the time does not grow (to 1 %)."""
    shape, before = shape_from_size(size), {}
    for gb in (3, 5, 8, 12, 16, 20, 24, 40, 64, 100, 200):
        for o in options(shape, CONFIG, where(gb), some_data()).options:
            if (earlier := before.get(o.name)) and earlier.fits:
                assert o.fits, (o.name, gb)
                assert o.settings["data.max_length"] >= earlier.settings["data.max_length"], (o.name, gb)
                if o.settings["data.max_length"] == earlier.settings["data.max_length"]:
                    assert o.hours <= 1.02 * earlier.hours, (o.name, gb)  # hours are shown to three digits
            before[o.name] = o
    assert any(o.fits for o in before.values())


@pytest.mark.parametrize("batch, accumulation", [(4, 4), (1, 1), (3, 5), (1, 17), (12, 8), (2, 1)])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_the_effective_batch_stays_over_all_devices(batch: int, accumulation: int, count: int) -> None:
    config = with_settings(CONFIG, {"training.batch_size": batch, "training.gradient_accumulation": accumulation})
    wanted = batch * accumulation
    for o in options(SMALL, config, card(24, count=count), some_data()).options:
        product = o.settings["training.batch_size"] * o.settings["training.gradient_accumulation"] * o.devices
        if wanted % o.devices == 0:
            assert product == wanted
        else:
            assert abs(product - wanted) <= max(o.devices / 2, o.devices - wanted)
            assert str(wanted) in o.why["training.gradient_accumulation"] and "nearest" in o.why["training.gradient_accumulation"]


def test_the_length_is_lowered_last_and_says_whom_it_cuts() -> None:
    data = some_data(longest=8_000)
    config = with_settings(CONFIG, {"data.max_length": 8192})
    o = option(options(shape_from_size("8B"), config, card(10.5), data), "qlora")
    assert o.fits and o.shortened
    chosen = o.settings["data.max_length"]
    assert o.share_cut == data.share_above(chosen) and o.share_cut
    assert f"{o.share_cut:.0%}" in o.why["data.max_length"] and "8,192" in o.why["data.max_length"]
    assert o.settings["training.batch_size"] == 1 or o.verdict == "fits"
    longer = with_settings(config, {"data.max_length": chosen * 2, "method.kind": "qlora", "training.batch_size": 1})
    longer = with_settings(longer, {"training.gradient_checkpointing": "on", "training.eval_batch_size": 1})
    assert not estimate(shape_from_size("8B"), longer, card(10.5), data=data).fits
    unknown = option(options(shape_from_size("8B"), config, card(10.5), None), "qlora")
    assert unknown.shortened and unknown.share_cut is None and "not known" in unknown.why["data.max_length"]


def test_the_length_stays_within_the_model_s_positions() -> None:
    gpt2 = known_shape("gpt2")
    assert gpt2 is not None and gpt2.max_position == 1024
    o = option(options(gpt2, CONFIG, card(24), some_data()), "lora")
    assert o.settings["data.max_length"] == 1024 and not o.shortened
    assert "1,024" in o.why["data.max_length"] and "2,048" in o.why["data.max_length"]


def test_values_given_stay() -> None:
    config, origins = build_config(
        {
            "method": {"kind": "qlora", "r": 8, "target_modules": ["q_proj"]},
            "training": {
                "learning_rate": 7e-5,
                "epochs": 1,
                "warmup_ratio": 0.2,
                "gradient_checkpointing": "on",
                "optimizer": "adafactor",
            },
        }
    )
    plan = options(shape_from_size("1.5B"), config, card(80), some_data(), origins=origins)
    assert plan.choice == "qlora"
    qlora, full = option(plan, "qlora"), option(plan, "full")
    assert (
        qlora.settings["method.r"] == 8
        and qlora.settings["method.alpha"] == 16
        and qlora.settings["method.target_modules"] == ["q_proj"]
    )
    assert qlora.settings["training.learning_rate"] == 7e-5 and option(plan, "lora").settings["training.learning_rate"] == 7e-5
    assert full.settings["training.learning_rate"] < 7e-5  # a rate for adapters is none for the whole model
    for o in plan.options:
        assert o.settings["training.epochs"] == 1 and "training.warmup_ratio" not in o.settings
        assert o.settings["training.gradient_checkpointing"] == "on" and o.settings["training.optimizer"] == "adafactor"
        assert o.why["training.optimizer"] == "As you set it."
    assert [o.name for o in plan.options if o.method == "full"] == ["full"]
    free = options(shape_from_size("1.5B"), config, card(80), some_data(), origins={})
    assert free.choice != "qlora" and option(free, "qlora").settings["method.r"] == 32
    assert options(shape_from_size("1.5B"), config, card(80), some_data()).choice == "qlora"  # not a default: somebody set it


def test_without_bitsandbytes_nothing_of_it_is_offered() -> None:
    plan = options(shape_from_size("1.5B"), CONFIG, card(24, bitsandbytes=False), some_data())
    assert {o.method for o in plan.options} == {"full", "lora", "dora"}
    assert not any("8bit" in o.settings["training.optimizer"] for o in plan.options)
    assert any("bitsandbytes is not installed" in note for note in plan.notes)


def test_a_processor_gets_a_plan_with_hours() -> None:
    plan = options(SMALL, CONFIG, processor(24), some_data(examples=500))
    assert plan.chosen is not None and plan.chosen.hours and plan.chosen.hours > 0
    low, high = plan.chosen.hours_range or (0, 0)
    assert low <= plan.chosen.hours <= high
    assert "full-8bit" not in {o.name for o in plan.options}
    assert any("No CUDA GPU" in note for note in plan.notes)
    assert {o.settings["training.optimizer"] for o in plan.options} == {"adamw_torch_fused"}


def test_apple_amd_and_several_gpus_are_named() -> None:
    apple = Machine((Device("Apple M2 Max", "mps", 32 * GB, flops_bf16=13e12),), 32 * GB, cores=12)
    plan = options(SMALL, CONFIG, apple, some_data(examples=500))
    assert plan.hardware["planned_kind"] == "cpu" and plan.hardware["devices"][0]["kind"] == "mps"
    assert any("Apple" in note for note in plan.notes) and plan.chosen is not None
    slower = options(SMALL, CONFIG, processor(32), some_data(examples=500)).chosen
    assert slower is not None and plan.chosen.hours and slower.hours and plan.chosen.hours < 100 * slower.hours

    amd = Machine((replace(gpu("RTX 4090"), name="AMD card", kind="rocm"),), 64 * GB)
    plan = options(SMALL, CONFIG, amd, some_data())
    assert plan.chosen is not None and any("ROCm" in note for note in plan.notes)

    several = options(shape_from_size("8B"), CONFIG, card(80, count=4), some_data())
    assert several.chosen is not None and several.chosen.strategy == "single"
    spread = [o for o in several.options if o.devices == 4]
    assert spread and all(o.strategy in ("ddp", "fsdp") and not o.startable for o in spread)
    one, four = option(several, "lora"), option(several, "lora-ddp")
    assert one.hours and four.hours and four.hours < one.hours

    only_spread = options(shape_from_size("70B"), CONFIG, card(24, count=8), some_data())
    assert only_spread.choice is None and any("No option fits on one device" in note for note in only_spread.notes)


def test_the_gpu_can_be_left_out_and_one_that_is_missing_is_said() -> None:
    plan = options(SMALL, with_settings(CONFIG, {"training.device": "cpu"}), card(24), some_data())
    assert plan.hardware["planned_kind"] == "cpu" and plan.chosen is not None
    plan = options(SMALL, with_settings(CONFIG, {"training.device": "cuda"}), processor(24), some_data())
    assert plan.chosen is not None and plan.chosen.settings["training.device"] == "cpu"


def test_nothing_fits_and_the_plan_says_what_would() -> None:
    plan = options(shape_from_size("70B"), CONFIG, card(8), some_data())
    assert plan.choice is None and plan.chosen is None
    assert any("Nothing fits" in note for note in plan.notes)
    assert all(not o.fits and o.reason.startswith("Does not fit") for o in plan.options)
    json.dumps(plan.to_dict())


def test_much_data_or_plain_text_brings_full_fine_tuning_first() -> None:
    big = card(80)
    assert options(SMALL, CONFIG, big, some_data(examples=2_000_000)).choice == "full"
    assert options(SMALL, with_settings(CONFIG, {"training.objective": "pretrain"}), big, some_data()).choice == "full"
    assert options(SMALL, CONFIG, big, some_data()).choice == "lora-all-linear"


def test_ia3_is_offered_to_those_who_ask() -> None:
    plan = options(SMALL, with_settings(CONFIG, {"method.kind": "ia3"}), card(24), some_data())
    assert plan.choice == "ia3" and plan.chosen is not None
    assert plan.chosen.settings["training.learning_rate"] == 3e-3 and "method.r" not in plan.chosen.settings
    assert "ia3" not in {o.name for o in options(SMALL, CONFIG, card(24), some_data()).options}


def test_targets_that_do_not_exist_leave_an_option_out_with_the_reason() -> None:
    config = with_settings(CONFIG, {"method.target_modules": ["no_such_layer"]})
    plan = options(SMALL, config, card(24), some_data())
    assert "lora" not in {o.name for o in plan.options} and "lora-all-linear" in {o.name for o in plan.options}
    assert any("LoRA is left out" in note and "no_such_layer" in note for note in plan.notes)


def test_fused_experts_get_adapters_without_dropout() -> None:
    """PEFT moves adapters meant for the dense layers of such a model onto its experts too, and wants no dropout there."""
    mixture = known_shape("deepseek-ai/deepseek-v3")
    assert mixture is not None
    plan = options(mixture, CONFIG, card(141), some_data())
    assert option(plan, "lora-all-linear").settings["method.dropout"] == 0.0
    assert any("experts are fused" in note for note in plan.notes)
    config, origins = build_config({"method": {"dropout": 0.1, "target_modules": "all-linear"}})
    plan = options(mixture, config, card(141), some_data(), origins=origins)
    assert not {"lora", "dora", "qlora"} & {o.name for o in plan.options}
    assert any("DoRA is left out: The experts" in note for note in plan.notes)


def test_variants_that_come_to_the_same_are_shown_once() -> None:
    mixture = known_shape("Qwen/Qwen3-30B-A3B")  # its only linear modules are those of attention
    assert mixture is not None
    assert "lora-all-linear" not in {o.name for o in options(mixture, CONFIG, card(141), some_data()).options}
    assert "lora-all-linear" not in {o.name for o in options(SMALL, CONFIG, card(24), some_data(examples=2_000_000)).options}


def test_dora_goes_without_dropout() -> None:
    assert option(options(SMALL, CONFIG, card(24), some_data()), "dora").settings["method.dropout"] == 0.0
    given = options(SMALL, with_settings(CONFIG, {"method.dropout": 0.1}), card(24), some_data())
    assert "method.dropout" not in option(given, "dora").settings


def test_the_length_holds_the_data_unless_you_set_it() -> None:
    data = some_data(longest=4_000)
    free = option(options(SMALL, CONFIG, card(24), data), "lora")
    assert free.settings["data.max_length"] % 8 == 0 and free.settings["data.max_length"] >= data.length_percentiles[99] > 2048
    assert "99 %" in free.why["data.max_length"] and not free.shortened
    config, origins = build_config({"data": {"max_length": 2048}})
    assert option(options(SMALL, config, card(24), data, origins=origins), "lora").settings["data.max_length"] == 2048
    split = with_settings(CONFIG, {"data.overlong": "split"})
    assert option(options(SMALL, split, card(24), data), "lora").settings["data.max_length"] == 2048
    endless = DataFacts(100, mean_tokens=9e9, length_percentiles=(10**10,) * 101)
    for o in options(SMALL, CONFIG, card(24), endless).options:
        assert o.settings["data.max_length"] <= 8192


LINTED = [("124M", processor(24)), ("1.5B", card(24)), ("8B", card(24)), ("8B", card(12.5)), ("13B", card(80))]


@pytest.mark.parametrize("size, machine", LINTED, ids=lambda value: value if isinstance(value, str) else value.device.name)
@pytest.mark.parametrize("examples", [500, 20_000, 400_000])
def test_the_linter_agrees_with_the_plan(size: str, machine: Machine, examples: int) -> None:
    """What the plan writes raises no error, and no warning that other settings could have spared."""
    shape, data = shape_from_size(size), some_data(examples=examples, eval_examples=200)
    config, origins = build_config({"data": {"train": ["my.jsonl"]}})
    chosen = options(shape, config, machine, data, origins=origins).chosen
    assert chosen is not None
    planned, marks, _ = to_run_config(chosen, config, origins=origins)
    found = check(Situation(config=planned, origins=marks, machine=machine, shape=shape, data=data))
    unavoidable = {"MEMORY_TIGHT", "STEPS_TOO_FEW"} | ({"ANSWERS_TRUNCATED"} if chosen.shortened else set())
    assert not {f.code for f in found if f.level != "advice"} - unavoidable


@pytest.mark.parametrize(
    "targets", ["auto", "all-linear", ["q_proj", "o_proj"], ["layers.0.self_attn.q_proj"], r".*\.[01]\.mlp\.up_proj"]
)
def test_the_search_sees_the_same_memory_as_the_run(targets: Any) -> None:
    """Whole names, dotted names and patterns: the search may simplify the shape, never the figure."""
    config = with_settings(CONFIG, {"method.target_modules": targets})
    shape = shape_from_size("1.5B")
    for o in options(shape, config, card(24), some_data()).options:
        planned, _, _ = to_run_config(o, config)
        assert estimate(shape, planned, card(24), data=some_data()).breakdown == o.breakdown


@pytest.mark.parametrize("data", [None, DataFacts(0), DataFacts(0, length_percentiles=(0,) * 101)])
def test_without_data_there_are_settings_but_no_hours(data: DataFacts | None) -> None:
    plan = options(shape_from_size("8B"), CONFIG, card(24), data)
    assert plan.chosen is not None
    assert all(o.hours is None and o.cost_usd is None for o in plan.options)
    assert plan.chosen.settings["method.r"] in (16, 64)
    assert any("hours and cost are left out" in note for note in plan.notes)


@pytest.mark.parametrize(
    "data",
    [
        DataFacts(1, mean_tokens=1, length_percentiles=(1,) * 101),
        DataFacts(3, mean_tokens=5e5, length_percentiles=(500_000,) * 101, supervised_share=0.0),
        DataFacts(10**9, mean_tokens=300),
        some_data(duplicate_share=1.0, eval_examples=0),
    ],
)
def test_odd_data_gives_a_plan_all_the_same(data: DataFacts) -> None:
    for machine in (card(0), card(24), processor(2)):
        plan = options(shape_from_size("1.5B"), CONFIG, machine, data)
        text = json.dumps(plan.to_dict(), allow_nan=False)
        assert plan.options and "NaN" not in text
        for o in plan.options:
            assert 0 < o.settings["training.warmup_ratio"] <= 0.1 and o.settings["data.max_length"] >= 256


def test_what_was_learned_from_runs_is_used() -> None:
    shape, machine = shape_from_size("3B"), card(24)
    plain = option(options(shape, CONFIG, machine, some_data()), "lora")
    corrected = option(options(shape, CONFIG, machine, some_data(), correction=2.0), "lora")
    assert (
        plain.settings["training.gradient_checkpointing"] == "off"
        and corrected.settings["training.gradient_checkpointing"] == "on"
    )
    half = Efficiency(0.1, 0.1, 0.1, runs=3, source="three runs")
    slower = option(options(shape, CONFIG, machine, some_data(), efficiency=half), "lora")
    assert slower.hours and plain.hours and slower.hours > 2 * plain.hours


def test_hours_and_cost_are_those_of_the_estimate() -> None:
    shape, machine, data = shape_from_size("1.5B"), card(24), some_data()
    for o in options(shape, CONFIG, machine, data, country="FRA").options:
        if o.fits:
            config, _, _ = to_run_config(o, CONFIG)
            cost = estimate_cost(shape, config, machine, data, resolve(config, machine), country="FRA")
            assert o.hours == pytest.approx(cost.hours, rel=0.006)
            assert o.cost_usd == pytest.approx(cost.price_usd, abs=0.006)
            assert any("France" in note for note in o.notes)


def test_a_variant_that_takes_much_longer_is_passed_over() -> None:
    """Checkpointing for the wider adapter alone: a third more time, for gains that are not known."""
    apple = machine_named("M2 Max")
    plan = options(shape_from_size("8B"), CONFIG, apple, some_data())
    wide, narrow = option(plan, "lora-all-linear"), option(plan, "lora")
    assert wide.hours and narrow.hours
    assert (wide.hours > 1.25 * narrow.hours) == (plan.choice == "lora")
    assert "days" in (plan.chosen.reason if plan.chosen else "")


def test_a_plan_as_json_has_the_documented_keys() -> None:
    plan = json.loads(json.dumps(options(SMALL, CONFIG, card(24), some_data()).to_dict(), allow_nan=False))
    assert {"hardware", "model", "options", "choice"} <= set(plan)
    for o in plan["options"]:
        assert {"method", "fits", "memory_gb", "breakdown", "hours", "cost", "settings", "why"} <= set(o)
        assert sum(o["breakdown"].values()) == pytest.approx(o["memory_gb"] * GB, abs=0.006 * GB)
        assert set(o["settings"]) == set(o["why"]) and all(o["why"].values())
    assert plan["choice"] in [o["name"] for o in plan["options"]]
    assert len({o["name"] for o in plan["options"]}) == len(plan["options"])


def test_quality_is_shown_as_documented_and_never_made_up() -> None:
    shown = {o.name: o.quality for o in options(SMALL, CONFIG, card(24), some_data()).options}
    assert shown["full"].documented == "100 %"
    assert shown["lora"].documented == shown["lora-all-linear"].documented == "95-98 %"
    assert shown["qlora"].documented == shown["qlora-r64"].documented == "94-97 %"
    assert shown["dora"].documented is None
    assert all("arXiv" in quality.research for quality in shown.values())


def test_every_option_that_fits_really_does_by_the_estimate() -> None:
    shape, machine, data = shape_from_size("8B"), card(24), some_data()
    for o in options(shape, CONFIG, machine, data).options:
        config, _, _ = to_run_config(o, CONFIG)
        again = estimate(shape, config, machine, data=data)
        assert again.fits == o.fits and round(again.total_bytes / GB, 2) == o.memory_gb and again.breakdown == o.breakdown


def test_a_plan_takes_less_than_300_ms() -> None:
    plans = [(shape_from_size("8B"), card(24)), (shape_from_size("70B"), card(24)), (SMALL, processor(24))]
    moe = known_shape("mistralai/Mixtral-8x7B-v0.1")
    assert moe is not None
    for shape, machine in [*plans, (moe, card(48)), (shape_from_size("70B"), card(80, count=8))]:
        durations = []
        for _ in range(3):
            started = time.process_time()
            options(shape, CONFIG, machine, some_data())
            durations.append(time.process_time() - started)
        assert min(durations) < 0.3, shape.name


# --- the run file -------------------------------------------------------------------------------------


def test_an_option_becomes_a_complete_run_file(tmp_path: Any) -> None:
    config, origins = build_config({"data": {"train": ["my.jsonl"]}, "training": {"epochs": 2, "batch_size": 4}})
    plan = options(shape_from_size("8B"), config, card(24), some_data(), origins=origins)
    for o in plan.options:
        planned, marks, reasons = to_run_config(o, config, origins=origins)
        path = tmp_path / f"{o.name}.yaml"
        path.write_text(dump_config(planned, marks, reasons), encoding="utf-8")
        assert load_config(path)[0] == planned
        for key, value in o.settings.items():
            section, name = key.split(".")
            assert getattr(getattr(planned, section), name) == value
        assert planned.data.train == ["my.jsonl"] and marks["data.train"] == "yours"
        assert marks["training.epochs"] == "yours" and planned.training.epochs == 2
        assert marks["training.gradient_accumulation"] == "recommended"
        assert {key for key, *_ in settings()} == set(reasons) and all(reasons.values())


def test_what_was_solved_anew_is_no_longer_yours() -> None:
    config, origins = build_config({"training": {"batch_size": 16, "gradient_accumulation": 1}})
    o = option(options(shape_from_size("8B"), config, card(12), some_data(), origins=origins), "qlora")
    planned, marks, _ = to_run_config(o, config, origins=origins)
    assert planned.training.batch_size < 16 and marks["training.batch_size"] == "recommended"
    assert planned.training.effective_batch == 16


def test_a_plan_of_its_own_plan_changes_nothing() -> None:
    """The run file that a plan writes, planned again, gives the same settings."""
    shape, machine, data = shape_from_size("8B"), card(24), some_data()
    first = options(shape, CONFIG, machine, data)
    assert first.chosen is not None
    config, marks, _ = to_run_config(first.chosen, CONFIG)
    again = options(shape, config, machine, data, origins=marks)
    assert option(again, first.chosen.name).settings == first.chosen.settings


# --- what suits data and model ------------------------------------------------------------------------


def test_learning_rates_by_method_and_size() -> None:
    rate = hyperparameters.learning_rate
    assert [rate("full", n).value for n in (10**6, 124 * 10**6, 10**9, 8 * 10**9, 70 * 10**9)] == [1e-5, 1e-5, 5e-6, 5e-6, 2e-6]
    for kind in ("lora", "qlora", "dora"):
        assert [rate(kind, n).value for n in (10**8, 13 * 10**9, 33 * 10**9, 65 * 10**9)] == [2e-4, 2e-4, 1e-4, 1e-4]
        for n in (10**8, 8 * 10**9, 70 * 10**9):  # adapters bear at least ten times the rate
            assert rate(kind, n).value >= 10 * rate("full", n).value


@pytest.mark.parametrize(
    "examples, r, alpha, targets",
    [
        (1, 16, 32, "auto"),
        (9_999, 16, 32, "auto"),
        (10_000, 32, 64, ["k_proj", "o_proj", "q_proj", "v_proj"]),
        (99_999, 32, 64, ["k_proj", "o_proj", "q_proj", "v_proj"]),
        (100_000, 64, 128, ["k_proj", "o_proj", "q_proj", "v_proj"]),
        (1_000_000, 128, 256, "all-linear"),
    ],
)
def test_the_adapter_follows_the_guideline_table(examples: int, r: int, alpha: float, targets: Any) -> None:
    chosen = hyperparameters.adapter_settings(SMALL, DataFacts(examples))
    assert [chosen[f"method.{key}"].value for key in ("r", "alpha", "target_modules")] == [r, alpha, targets]
    assert f"{examples:,}" in chosen["method.r"].reason


def test_attention_is_named_as_the_architecture_names_it() -> None:
    gpt2 = known_shape("gpt2")
    assert gpt2 is not None
    names = hyperparameters.adapter_settings(gpt2, DataFacts(50_000))["method.target_modules"].value
    assert "c_attn" in names
    mamba: ModelShape = shape_from_config(
        {
            "model_type": "mamba",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "vocab_size": 100,
            "state_size": 16,
            "intermediate_size": 128,
        }
    )
    assert hyperparameters.adapter_settings(mamba, DataFacts(50_000))["method.target_modules"].value == "all-linear"


def test_epochs_fall_with_the_size_of_the_data() -> None:
    sizes = (1, 100, 999, 1_000, 52_000, 99_999, 100_000, 10**9)
    values = [hyperparameters.epochs(DataFacts(n)).value for n in sizes]
    assert values == sorted(values, reverse=True) and set(values) == {5, 3, 2}
    assert hyperparameters.epochs(None).value == 3


def test_steps_count_the_incomplete_batch_of_each_pass() -> None:
    assert hyperparameters.total_steps(52_002, 128, 3) == 1221
    assert hyperparameters.total_steps(10, 16, 3) == 3
    assert hyperparameters.total_steps(1, 4096, 0.01) == 1
    assert hyperparameters.total_steps(10**6, 16, 3, max_steps=50) == 50


@given(st.integers(1, 10**8))
def test_the_warm_up_stays_within_its_bounds(steps: int) -> None:
    ratio = hyperparameters.warmup(steps).value
    assert 0 < ratio <= 0.1
    assert ratio * steps <= 2_000 * 1.05  # the share is rounded to two digits
    if steps >= 100:
        assert ratio * steps >= 9.5
    if 500 <= steps <= 66_000:
        assert ratio == 0.03


def test_a_short_run_is_evaluated_five_times() -> None:
    found = hyperparameters.step_intervals(CONFIG, 40)
    assert found["training.eval_steps"].value == found["training.save_steps"].value == 8
    assert hyperparameters.step_intervals(CONFIG, 1)["training.eval_steps"].value == 1
    assert hyperparameters.step_intervals(CONFIG, 500) == {} == hyperparameters.step_intervals(CONFIG, None)


# --- whether to tune ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "examples, verdict", [(0, "try_first"), (9, "try_first"), (49, "try_first"), (99, "try_first"), (100, "tune")]
)
def test_few_examples_belong_into_a_prompt(examples: int, verdict: str) -> None:
    advice = whether_to_tune(DataFacts(examples), CONFIG)
    assert advice.verdict == verdict
    assert bool(advice.try_first) == (verdict == "try_first")
    assert f"{examples:,} example" in advice.reasons[0].text and advice.reasons[0].source


@pytest.mark.parametrize(("examples", "said"), [(1, "1 pair:"), (30, "30 pairs:"), (200, "200 pairs:")])
def test_pairs_are_called_pairs(examples: int, said: str) -> None:
    data = DataFacts(examples, eval_examples=10, form="pair")
    assert whether_to_tune(data, CONFIG).reasons[0].text.startswith(said)
    findings = {
        finding.code: finding for finding in check(Situation(build_config({"training": {"objective": "dpo"}})[0], data=data))
    }
    if examples < 50:
        found = findings["FEW_EXAMPLES"]
        assert found.found == said.rstrip(":") and "50 pairs" in found.why and "chosen answers" in found.why
    assert findings["EVAL_TOO_SMALL"].found == "10 held-out pairs"


def test_duplicates_do_not_count() -> None:
    advice = whether_to_tune(DataFacts(1_000, duplicate_share=0.97), CONFIG)
    assert advice.verdict == "try_first" and "30 different examples" in advice.reasons[0].text
    assert whether_to_tune(DataFacts(1_000, duplicate_share=0.1), CONFIG).verdict == "tune"
    assert whether_to_tune(DataFacts(100, duplicate_share=7.0), CONFIG).verdict == "try_first"


def test_goals_lead_to_what_serves_them() -> None:
    plenty = DataFacts(50_000, eval_examples=1_000)
    facts = whether_to_tune(plenty, CONFIG, "facts")
    assert facts.verdict == "try_first" and any("Retrieval" in way for way in facts.try_first)
    assert {"2312.05934", "2405.05904"} <= {reason.source[-10:] for reason in facts.reasons}
    form = whether_to_tune(plenty, CONFIG, "format")
    assert form.verdict == "try_first" and any("Structured output" in way for way in form.try_first)
    for goal in set(GOALS) - {"facts", "format"}:
        assert whether_to_tune(plenty, CONFIG, goal).verdict == "tune"
    assert whether_to_tune(None, CONFIG).verdict == "tune" and not whether_to_tune(None, CONFIG).reasons


def test_an_unknown_goal_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'format'") as caught:
        whether_to_tune(None, CONFIG, "formats")
    assert caught.value.code == "CONFIG_INVALID_VALUE"


def test_plain_text_and_missing_evaluation_are_remarked() -> None:
    text = whether_to_tune(DataFacts(50_000), with_settings(CONFIG, {"training.objective": "pretrain"}))
    assert text.verdict == "try_first" and any("Retrieval" in way for way in text.try_first)
    unheld = whether_to_tune(DataFacts(50_000, eval_examples=0), CONFIG)
    assert unheld.verdict == "tune" and any("held out" in reason.text for reason in unheld.reasons)
    json.dumps(text.to_dict())
