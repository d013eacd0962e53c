"""Steps against the trainer's own count, operations against PyTorch's, times against published ones."""

from __future__ import annotations

import itertools
import math
import random
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuneflow.config import RunConfig, build_config
from finetuneflow.errors import ConfigError
from finetuneflow.knowledge.cost import Cost, efficiency_from, estimate_cost, flops_per_token, share_reached, steps_of
from finetuneflow.knowledge.documented import documented_table, documented_times
from finetuneflow.knowledge.facts import cpu_device, gpu, machine_named
from finetuneflow.knowledge.flops import traffic
from finetuneflow.knowledge.resolve import resolve, resolve_on
from finetuneflow.knowledge.shapes import ModelShape, shape_from_config, shape_from_size
from finetuneflow.knowledge.steps import STRETCH, Cutting, mean_width, smaller_budgets, token_budget
from finetuneflow.knowledge.values import DataFacts, Device, Machine

DOCS = Path(__file__).parents[2] / "docs" / "time-and-cost.md"
SEVEN = shape_from_size("7B")


def config_of(kind: str = "lora", *, data: dict[str, Any] | None = None, r: int = 16, **training: Any) -> RunConfig:
    values = {
        "data": {"train": ["x"], **(data or {})},
        "method": {"kind": kind, "r": r, "target_modules": "all-linear"},
        "training": training,
    }
    return build_config(values)[0]


def equal_rows(examples: int, tokens: int) -> DataFacts:
    return DataFacts(examples=examples, eval_examples=0, mean_tokens=tokens, length_percentiles=(tokens,) * 101)


def estimate(
    config: RunConfig, data: DataFacts, *, card: str = "A100", count: int = 1, shape: ModelShape = SEVEN, **options: Any
) -> Cost:
    machine = machine_named(card, count)
    return estimate_cost(shape, config, machine, data, resolve(config, machine), **options)


# --- steps ------------------------------------------------------------------------------------------


def counted_by_hand(
    rows: int, batch: int, accumulation: int, devices: int, epochs: float, max_steps: int | None
) -> tuple[int, int, int]:
    """(steps, examples of all devices, micro-batches of one) by walking through accelerate's batches as the trainer does."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, SequentialSampler

    batches = BatchSampler(SequentialSampler(range(rows)), batch, drop_last=False)
    shards = [batches] if devices == 1 else [BatchSamplerShard(batches, devices, rank) for rank in range(devices)]
    epoch = [list(shard) for shard in shards]
    assert len({len(batches) for batches in epoch}) == 1
    steps_per_epoch = math.ceil(len(epoch[0]) / accumulation)
    total = max_steps or math.ceil(epochs * steps_per_epoch)
    steps = examples = micro = 0
    while steps < total:
        for start in range(0, len(epoch[0]), accumulation):
            if steps == total:
                break
            for place in range(start, min(start + accumulation, len(epoch[0]))):
                micro += 1
                examples += sum(len(batches[place]) for batches in epoch)
            steps += 1
    return steps, examples, micro


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_steps_are_those_of_the_trainer(devices: int) -> None:
    draw = random.Random(devices)
    for _ in range(60):
        rows, batch, accumulation = draw.randint(1, 90), draw.randint(1, 7), draw.randint(1, 5)
        epochs, most = draw.choice([0.3, 1, 2.5, 3]), draw.choice([None, None, 1, 7, 40])
        found = steps_of(
            config_of(batch_size=batch, gradient_accumulation=accumulation, epochs=epochs, max_steps=most),
            equal_rows(rows, 64),
            devices,
        )
        by_hand = counted_by_hand(rows, batch, accumulation, devices, epochs, most)
        if (
            devices > 1 and rows % batch
        ):  # accelerate repeats rows to fill the last batches; few rows may be repeated more than once
            assert (found.steps, found.micro_batches) == (by_hand[0], by_hand[2])
            assert found.examples_seen == pytest.approx(by_hand[1], abs=batch * devices * math.ceil(found.epochs))
        else:
            assert (found.steps, found.examples_seen, found.micro_batches) == by_hand


def test_steps_agree_with_transformers_own_arithmetic(tmp_path: Path) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    for rows, batch, accumulation, epochs, most in [(10, 3, 2, 2.5, -1), (100, 8, 4, 3, -1), (7, 8, 4, 1, -1), (50, 4, 3, 1, 17)]:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, num_train_epochs=epochs,
            max_steps=most, warmup_steps=0.05, use_cpu=True, report_to="none",
        )  # fmt: skip
        trainer = Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=[{"x": 0}] * rows)
        told = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())
        most_steps = told[-1]
        config = config_of(
            batch_size=batch,
            gradient_accumulation=accumulation,
            epochs=epochs,
            max_steps=None if most < 0 else most,
            warmup_ratio=0.05,
        )
        found = steps_of(config, equal_rows(rows, 64))
        assert found.steps == most_steps
        assert found.warmup_steps == arguments.get_warmup_steps(most_steps)
        assert found.effective_batch == batch * accumulation


def test_a_constant_schedule_has_no_warm_up() -> None:
    assert steps_of(config_of(scheduler="constant", warmup_ratio=0.5), equal_rows(100, 64)).warmup_steps == 0


def test_long_examples_are_cut_dropped_or_split() -> None:
    half_long = DataFacts(examples=1000, length_percentiles=(100,) * 50 + (1000,) * 51)
    counts = {
        how: steps_of(
            config_of(data={"max_length": 400, "overlong": how}, batch_size=1, gradient_accumulation=1, epochs=1), half_long
        )
        for how in ("cut", "drop", "split")
    }
    assert counts["cut"].examples_seen == 1000 and counts["cut"].row_tokens == pytest.approx(250, rel=0.03)
    assert counts["drop"].examples_seen == pytest.approx(500, rel=0.03) and counts["drop"].row_tokens == 100
    assert counts["split"].examples_seen == pytest.approx(500 + 500 * 3, rel=0.03)  # 400 + 400 + 200
    assert counts["split"].tokens_seen == pytest.approx(550_000, rel=0.03)  # nothing is lost


# --- padding ----------------------------------------------------------------------------------------


def lengths_like_instructions(count: int) -> list[int]:
    draw = random.Random(1)
    return [max(8, round(draw.lognormvariate(5, 0.8))) for _ in range(count)]


def facts_about(lengths: list[int]) -> DataFacts:
    ordered = sorted(lengths)
    percentiles = tuple(ordered[round(p / 100 * (len(ordered) - 1))] for p in range(101))
    return DataFacts(examples=len(lengths), mean_tokens=statistics.mean(lengths), length_percentiles=percentiles)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("batch", "accumulation"), [(1, 16), (4, 4), (16, 1), (2, 64)])
def test_padding_is_what_the_sampler_and_the_collator_make_of_such_rows(grouped: bool, batch: int, accumulation: int) -> None:
    from finetuneflow.data.batches import EpochSampler

    assert STRETCH == EpochSampler.STRETCH
    lengths = [min(length, 1024) for length in lengths_like_instructions(6_000)]
    config = config_of(
        data={"max_length": 1024}, batch_size=batch, gradient_accumulation=accumulation, epochs=1, group_by_length=grouped
    )
    sampler = EpochSampler(len(lengths), seed=3, lengths=lengths if grouped else None, group_size=batch * accumulation)
    order = list(sampler)
    padded = sum(
        len(rows) * math.ceil(max(lengths[i] for i in rows) / 8) * 8
        for rows in (order[start : start + batch] for start in range(0, len(order), batch))
    )
    found = steps_of(config, facts_about(lengths))
    assert found.padded_tokens == pytest.approx(padded, rel=0.04)
    assert found.tokens_seen == pytest.approx(sum(lengths), rel=0.02)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("rows", "budget"), [(16, 1024), (16, 2048), (64, 2048), (8, 16_384), (32, 1500)])
def test_the_fast_path_cuts_steps_as_its_collator_does(packed: bool, rows: int, budget: int) -> None:
    from finetuneflow.data.batches import StepCollator

    lengths = [min(length, 1024) for length in lengths_like_instructions(6_400)]
    config = config_of(data={"max_length": 1024}, batch_size=4, gradient_accumulation=rows // 4, epochs=1)
    collator = StepCollator(0, budget=budget, packed=packed)
    passes = padded = 0
    for start in range(0, len(lengths), rows):
        here = lengths[start : start + rows]
        parts = collator._cut(here)
        passes += len(parts)
        padded += sum(here) if packed else sum(len(part) * collator.padded.width(here[part[0]]) for part in parts)
    found = steps_of(config, facts_about(lengths), cutting=Cutting(budget, packed))
    plain = steps_of(config, facts_about(lengths))
    assert found.padded_tokens == pytest.approx(padded, rel=0.06)
    assert found.micro_batches == pytest.approx(passes, rel=0.15)
    assert (found.steps, found.examples_seen, found.tokens_seen) == (plain.steps, plain.examples_seen, plain.tokens_seen)
    assert found.padding_share == 0 or not packed


def test_a_budget_is_what_was_asked_or_what_the_device_gains_from() -> None:
    training = config_of(batch_size=8).training
    asked = training.model_copy(update={"token_budget": 700})
    assert [
        token_budget(training, 512, device, longest=longest).tokens
        for device, longest in (("cpu", None), ("cpu", 100), ("cuda", None))
    ] == [2048, 800, 4096]
    assert token_budget(training, 4096, "cpu").tokens == 4096 and token_budget(asked, 4096, "cpu").tokens == 700
    assert smaller_budgets(asked) == [350] and smaller_budgets(training) == []


def test_grouping_by_length_pads_less_and_larger_batches_pad_more() -> None:
    data = facts_about(lengths_like_instructions(5_000))
    shares = [steps_of(config_of(batch_size=batch), data).padding_share for batch in (1, 2, 8, 32)]
    assert shares == sorted(shares) and shares[0] < 0.05 < 0.4 < shares[-1]
    assert steps_of(config_of(batch_size=32, group_by_length=True), data).padding_share < shares[-1] / 2


def test_a_mean_alone_gets_a_usual_spread_and_says_so() -> None:
    lengths = lengths_like_instructions(5_000)
    known, guessed = facts_about(lengths), DataFacts(examples=5_000, mean_tokens=statistics.mean(lengths))
    found = steps_of(config_of(batch_size=8), guessed)
    assert found.padded_tokens == pytest.approx(steps_of(config_of(batch_size=8), known).padded_tokens, rel=0.25)
    assert any("spread" in note for note in found.notes)
    assert any("512 tokens each" in note for note in steps_of(config_of(data={"max_length": 512}), DataFacts(examples=9)).notes)


# --- operations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize("kind", ["full", "lora", "dora", "ia3", "prefix"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_operations_are_those_that_pytorch_counts(family: str, kind: str, checkpointing: str) -> None:
    if family == "mixtral" and kind != "full":
        pytest.skip("PEFT's adapters on fused experts are a matter of their own")
    if family == "gpt2" and kind == "prefix" and checkpointing == "on":
        pytest.skip("transformers passes no cache through checkpointed GPT-2 blocks")
    if kind == "prefix" and checkpointing == "on":
        pytest.skip("transformers drops the cache, and with it the prefix, when it checkpoints")
    import peft
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": 300, "tie_word_embeddings": False}
    llama = {
        **common,
        "hidden_size": 64,
        "num_hidden_layers": 10,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
    }
    gpt2 = {**common, "n_embd": 64, "n_layer": 10, "n_head": 4, "n_positions": 128, "tie_word_embeddings": True}
    mixtral = {**llama, "num_local_experts": 4, "num_experts_per_tok": 2}
    raw = AutoConfig.for_model(family, **{"llama": llama, "gpt2": gpt2, "mixtral": mixtral}[family])
    model = AutoModelForCausalLM.from_config(
        raw, attn_implementation="eager", **({"experts_implementation": "eager"} if family == "mixtral" else {})
    )
    shape = shape_from_config(raw.to_dict() | {"model_type": family})
    adapters = {
        "lora": lambda: peft.LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.05, task_type="CAUSAL_LM"),
        "dora": lambda: peft.LoraConfig(
            r=8, target_modules="all-linear", lora_dropout=0.05, use_dora=True, task_type="CAUSAL_LM"
        ),
        "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
    }
    if kind != "full":
        model = peft.get_peft_model(model, adapters[kind]())
    if checkpointing == "on":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    ids = torch.randint(0, 300, (8, 96))  # DoRA's norms are computed once per batch, however many rows it has
    with FlopCounterMode(display=False) as counter:
        model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=kind == "prefix"
        ).logits.float().square().sum().backward()
    config = config_of(kind, r=8, gradient_checkpointing=checkpointing, batch_size=8)
    if kind in ("ia3", "prefix"):
        config = config.model_copy(update={"method": config.method.model_copy(update={"target_modules": "auto"})})
    flops = flops_per_token(shape, config, resolve_on(config, "cuda", bf16=True), 96)
    # PEFT's DoRA multiplies by the transposed weights of GPT-2's layers once more.
    assert flops.total * ids.numel() == pytest.approx(
        counter.get_total_flops(), rel=0.2 if (family, kind) == ("gpt2", "dora") else 0.06
    )


def test_full_fine_tuning_is_six_operations_per_parameter_and_adapters_are_a_third_less() -> None:
    # Kaplan et al. 2020: 6N per token without attention; a frozen model spares the weights' own gradients.
    full = flops_per_token(
        SEVEN, config_of("full"), resolve_on(config_of("full", gradient_checkpointing="off"), "cuda", bf16=True), 1
    )
    weights = SEVEN.num_parameters - SEVEN.embedding_parameters
    assert full.total == pytest.approx(6 * weights, rel=0.01) and full.recompute == 0
    lora = flops_per_token(
        SEVEN, config_of("lora"), resolve_on(config_of("lora", gradient_checkpointing="off"), "cuda", bf16=True), 1
    )
    assert lora.total == pytest.approx(4 * weights, rel=0.03)
    again = flops_per_token(SEVEN, config_of("lora"), resolve_on(config_of("lora"), "cuda", bf16=True), 1)
    assert again.recompute == pytest.approx(lora.forward, rel=0.03)


def test_of_a_mixture_only_the_active_experts_count() -> None:
    values = {"model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
              "intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}  # fmt: skip
    shape = shape_from_config(values)
    flops = flops_per_token(shape, config_of("full"), resolve_on(config_of("full"), "cuda", bf16=True), 1)
    assert flops.forward == pytest.approx(2 * (shape.active_parameters - shape.embedding_parameters), rel=0.01)
    assert shape.active_parameters == pytest.approx(12.9e9, rel=0.01)  # the model card's figure


def test_a_lone_row_needs_no_mask_and_half_the_attention() -> None:
    alone, together = (
        flops_per_token(SEVEN, config_of("full", batch_size=n), resolve_on(config_of("full"), "cuda", bf16=True), 4096).forward
        for n in (1, 2)
    )
    assert together - alone == pytest.approx(2 * 32 * 4096 * 4096, rel=0.01)


def test_optimizers_with_small_states_move_fewer_bytes() -> None:
    moved = []
    for optimizer in ("adamw_torch", "adafactor", "adamw_8bit"):
        config = config_of("full", optimizer=optimizer)
        moved.append(traffic(SEVEN, config, resolve_on(config, "cuda", bf16=True)).per_step)
    assert moved == sorted(moved, reverse=True) and moved[0] == pytest.approx(36 * SEVEN.num_parameters, rel=0.01)


# --- times against published ones -------------------------------------------------------------------

# QwenLM/Qwen, README, "Profiling of Memory and Speed": seconds for 8 micro-batches of one row on one A100 80 GB, with flash
# attention, r = 64 and checkpointing. Rows of 256, 512, 1024, 2048, 4096, 8192 tokens.
QWEN = {"1.8B": (2048, 24, 16, 5504), "7B": (4096, 32, 32, 11008), "14B": (5120, 40, 40, 13696)}
QWEN_LORA = {
    "1.8B": (1.0, 1.0, 1.1, 1.7, 3.3, 6.8),
    "7B": (1.2, 1.5, 2.8, 5.2, 10.1, 21.3),
    "14B": (1.6, 2.4, 4.4, 8.4, 17.0, 36.0),
}
QWEN_QLORA = {
    "1.8B": (1.4, 1.4, 1.4, 2.0, 3.4, 6.5),
    "7B": (3.0, 3.0, 3.5, 7.0, 11.6, 22.3),
}  # with another 4-bit format than NF4


def qwen(size: str) -> ModelShape:
    hidden, layers, heads, inner = QWEN[size]
    return shape_from_config({"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
                              "num_key_value_heads": heads, "intermediate_size": inner, "vocab_size": 151_936,
                              "tie_word_embeddings": False})  # fmt: skip


@pytest.mark.parametrize(("kind", "table", "band"), [("lora", QWEN_LORA, 1.3), ("qlora", QWEN_QLORA, 1.9)])
def test_step_times_on_an_a100_are_those_that_qwen_measured(kind: str, table: dict[str, tuple[float, ...]], band: float) -> None:
    ratios = []
    for size, row in table.items():
        for tokens, measured in zip((256, 512, 1024, 2048, 4096, 8192), row, strict=True):
            config = config_of(
                kind,
                r=64,
                data={"max_length": tokens},
                batch_size=1,
                gradient_accumulation=8,
                max_steps=100,
                gradient_checkpointing="on",
            )
            cost = estimate(config, equal_rows(8_000, tokens), shape=qwen(size))
            ratios.append(cost.parts["training"] / 100 / measured)
            low, high = (cost.seconds[i] / cost.seconds.expected * ratios[-1] for i in (0, 2))
            assert 1 / band < ratios[-1] < band, (size, tokens)
            assert low < 1.25 and high > 0.8, (size, tokens)
    assert statistics.geometric_mean(ratios) == pytest.approx(1.0, abs=0.2)


def test_llama_2s_pretraining_hours_imply_the_assumed_efficiency() -> None:
    # Llama 2 (arXiv:2307.09288), table 2: 184,320 and 368,640 A100 hours for 2e12 tokens of 4,096 each.
    for size, hours in (("7B", 184_320), ("13B", 368_640)):
        shape = shape_from_size(size)
        config = config_of("full", batch_size=1)  # no padding
        flops = flops_per_token(
            shape, config, resolve_on(config_of("full", gradient_checkpointing="off"), "cuda", bf16=True), 4096
        )
        share = share_reached(flops.total * 2e12, hours * 3600, gpu("A100"))
        assert share == pytest.approx(0.43, abs=0.05)


def test_guanaco_65b_takes_a_day_on_one_card_of_48_gb() -> None:
    # QLoRA (arXiv:2305.14314): abstract and appendix B.2: 1,875 steps of 16 OASST1 conversations.
    row = next(row for row in documented_times() if "65B" in row.name)
    assert row.estimate[0] < 24 < row.estimate[2] * 1.2


def test_alpaca_on_eight_a100_is_under_the_published_three_hours() -> None:
    # crfm.stanford.edu/2023/03/13/alpaca.html. The published run was sharded, which costs more than arithmetic: a lower bound.
    config = config_of("full", data={"max_length": 512}, epochs=3, batch_size=4, gradient_accumulation=4, learning_rate=2e-5)
    cost = estimate(config, DataFacts(examples=52_002, eval_examples=0, mean_tokens=130), count=8)
    assert cost.steps.steps == 1219 or cost.steps.steps == 1221
    assert 0.2 < cost.hours < 3


# --- behaviour --------------------------------------------------------------------------------------


def test_more_of_anything_takes_longer() -> None:
    data = facts_about(lengths_like_instructions(2_000))
    base = estimate(config_of(), data).seconds.expected
    assert estimate(config_of(epochs=6), data).seconds.expected > 1.7 * base
    assert estimate(config_of(), data, shape=shape_from_size("13B")).seconds.expected > 1.4 * base
    assert estimate(config_of(), data, card="T4").seconds.expected > 2 * base
    assert estimate(config_of("qlora"), data).seconds.expected > base
    assert estimate(config_of(gradient_checkpointing="off"), data).seconds.expected < base
    assert estimate(config_of(), data, count=8).seconds.expected < base / 3
    assert estimate(config_of(data={"eval_fraction": 0.3}), replace(data, eval_examples=None)).parts["evaluation"] > 0


def test_the_range_holds_the_expected_time_and_the_parts_add_up() -> None:
    for kind, card, count in itertools.product(
        ("full", "lora", "qlora", "dora", "ia3", "prefix"), ("T4", "H100", "MI300X"), (1, 16)
    ):
        cost = estimate(auto_targets(kind), equal_rows(500, 300), card=card, count=count)
        assert cost.seconds.low < cost.seconds.expected < cost.seconds.high
        assert sum(cost.parts.values()) == pytest.approx(cost.seconds.expected)
        assert cost.bound in ("operations", "memory", "launching")


def auto_targets(kind: str) -> RunConfig:
    return build_config({"data": {"train": ["x"]}, "method": {"kind": kind}})[0]


def test_small_models_wait_for_launches_and_large_ones_for_operations() -> None:
    assert estimate(config_of("full", batch_size=1), equal_rows(100, 64), shape=shape_from_size("124M")).bound == "launching"
    assert estimate(config_of("full", batch_size=8), equal_rows(100, 2048)).bound == "operations"


def test_price_energy_and_carbon_follow_from_hours() -> None:
    config, data = config_of(), equal_rows(20_000, 500)
    cost = estimate(config, data, card="RTX 4090", count=2, country="FRA", price_per_hour=0.5)
    assert cost.price_usd == pytest.approx(0.5 * 2 * cost.hours)
    assert cost.energy_kwh == pytest.approx((450 * 0.8 + 75) * 2 / 1000 * cost.hours * 1.54)
    assert cost.co2_kg == pytest.approx(cost.energy_kwh * 0.056)
    assert cost.electricity_usd == pytest.approx(cost.energy_kwh * 0.22)
    coal = estimate(config, data, card="RTX 4090", count=2, country="POL")
    assert coal.co2_kg > 10 * cost.co2_kg
    assert coal.price_usd == pytest.approx(0.45 * 2 * coal.hours)  # the table's
    assert estimate(config, data, card="RTX 3060").price_usd is None
    with pytest.raises(ConfigError):
        estimate(config, data, country="Atlantis")


def test_a_machine_that_was_looked_at_has_no_building_around_it() -> None:
    config, data = config_of(), equal_rows(100, 100)
    named = machine_named("RTX 4090")
    away, here = (estimate_cost(SEVEN, config, machine, data) for machine in (named, replace(named, observed=True)))
    assert away.energy_kwh == pytest.approx(1.54 * here.energy_kwh)


def test_an_unknown_card_gets_a_wide_range_and_says_so() -> None:
    machine = Machine((Device("Card 9000", "cuda", 24 * 2**30, bf16=True),), 64 * 2**30)
    cost = estimate_cost(SEVEN, config_of(), machine, equal_rows(1_000, 300))
    assert cost.seconds.high > 8 * cost.seconds.low
    assert any("Card 9000 are not known" in note for note in cost.notes)


def test_the_processor_computes_where_the_engine_does_not_drive_the_gpu() -> None:
    cost = estimate(config_of(), equal_rows(100, 100), card="M4 Max")
    assert any("Apple" in note for note in cost.notes)
    forced = estimate(config_of(device="cpu"), equal_rows(100, 100), card="RTX 4090")
    assert forced.seconds.expected > 20 * estimate(config_of(), equal_rows(100, 100), card="RTX 4090").parts["training"]


def test_a_processors_time_comes_from_its_rates() -> None:
    slow = cpu_device(name="x", cores=4, features=("AVX2",), memory_bytes=32 * 2**30)
    shape, config, data = shape_from_size("1B"), config_of(batch_size=1), equal_rows(1_000, 512)
    times = [
        estimate_cost(shape, config, Machine((device,), 32 * 2**30), data).parts["training"]
        for device in (slow, replace(slow, flops_fp32=2 * (slow.flops_fp32 or 0)))
    ]
    assert times[0] == pytest.approx(2 * times[1], rel=0.1)


def test_a_processor_with_matrix_units_is_not_expected_to_keep_them_busy() -> None:
    # Two cores of a Xeon with AMX, shared with others: seconds per step of 2 x 256 tokens, 135M (SmolLM2's shape), after warming up.
    shape = shape_from_config({"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                               "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152,
                               "tie_word_embeddings": True})  # fmt: skip
    xeon = cpu_device(name="x", cores=2, features=("AVX2", "AVX-512", "AMX BF16"), memory_bytes=24 * 2**30)
    for kind, precision, measured in (
        ("lora", "fp32", 2.17),
        ("full", "fp32", 2.10),
        ("lora", "bf16", 1.66),
        ("full", "bf16", 1.18),
    ):
        config = config_of(kind, batch_size=2, gradient_accumulation=1, max_steps=100, precision=precision, learning_rate=2e-5)
        cost = estimate_cost(shape, config, Machine((xeon,), 24 * 2**30), equal_rows(4_000, 256))
        step = cost.parts["training"] / 100
        assert 0.4 < step / measured < 2, (kind, precision, step)


# --- learning ---------------------------------------------------------------------------------------


def test_efficiency_is_learned_from_runs_and_says_from_how_many() -> None:
    device = gpu("A100")
    shares = [share_reached(312e12 * 100 * share, 100, device) for share in (0.3, 0.5, 0.4)]
    learned = efficiency_from([share for share in shares if share is not None])
    assert learned is not None
    assert (learned.expected, learned.runs) == (pytest.approx(0.4), 3)
    assert learned.low == pytest.approx(0.3) and learned.high == pytest.approx(0.5) and "3 earlier runs" in learned.source
    one = efficiency_from([0.2])
    assert one is not None and (one.low, one.expected, one.high) == (pytest.approx(0.14), 0.2, pytest.approx(0.26))
    cost = estimate(config_of(), equal_rows(9_000, 500), efficiency=learned)
    assert cost.efficiency == learned.expected and "3 earlier runs" in cost.efficiency_source
    assert "assumed" in estimate(config_of(), equal_rows(9_000, 500)).efficiency_source
    assert cost.parts["training"] > estimate(config_of(), equal_rows(9_000, 500), efficiency=0.8).parts["training"]


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1.5, 1e-9])
def test_impossible_shares_teach_nothing(bad: float) -> None:
    assert efficiency_from([bad]) is None and efficiency_from([]) is None
    found = efficiency_from([bad, 0.4])
    assert found is not None and found.runs == 1
    with pytest.raises(ConfigError):
        estimate(config_of(), equal_rows(10, 10), efficiency=bad if bad != 1e-9 else 0.0)


@pytest.mark.parametrize(("flops", "seconds"), [(0, 1), (1e12, 0), (math.nan, 1), (1e12, math.inf), (-1e12, 1), (1e18, 1)])
def test_a_run_of_impossible_figures_reached_nothing(flops: float, seconds: float) -> None:
    assert share_reached(flops, seconds, gpu("A100")) is None
    assert share_reached(1e12, 1.0, Device("x", "cuda", 1)) is None


# --- hostile figures --------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    examples=st.integers(-5, 10**12),
    mean=st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.integers(-5, 10**9)),
    percentiles=st.one_of(
        st.just(()), st.lists(st.integers(-10, 10**9), min_size=1, max_size=101).map(lambda v: tuple(sorted(v)))
    ),
    batch=st.integers(1, 4096),
    how=st.sampled_from(["cut", "drop", "split"]),
    grouped=st.booleans(),
    count=st.integers(1, 64),
)
def test_any_data_facts_give_finite_figures(
    examples: int, mean: float, percentiles: tuple[int, ...], batch: int, how: str, grouped: bool, count: int
) -> None:
    data = DataFacts(examples=examples, mean_tokens=mean, length_percentiles=percentiles)
    cost = estimate(config_of(data={"overlong": how}, batch_size=batch, group_by_length=grouped), data, count=count)
    figures = (*cost.seconds, cost.flops, cost.energy_kwh, cost.co2_kg, *cost.parts.values())
    assert all(math.isfinite(figure) and figure >= 0 for figure in figures)
    assert 0 <= cost.steps.tokens_seen <= max(cost.steps.padded_tokens, 0) + 1 + cost.steps.examples_seen
    if examples <= 0:
        assert cost.steps.steps == 0 and "training" not in cost.parts


def test_widths_of_hostile_batches_stay_within_the_lengths() -> None:
    assert mean_width([5.0], 1) == 8
    assert mean_width([float(i) for i in range(1, 101)], 10**6) == pytest.approx(104)
    assert mean_width([1.0, 100.0], 4, groups=10**9) == pytest.approx((8 + 104) / 2)
    with pytest.raises(ValueError):
        steps_of(config_of(), DataFacts(examples=1), 0)


# --- the documents' times ---------------------------------------------------------------------------


def test_the_table_in_the_docs_is_the_one_that_is_computed() -> None:
    text = DOCS.read_text(encoding="utf-8")
    found = re.search(r"<!-- documented times -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert found is not None, "docs/time-and-cost.md has no marked table"
    assert found.group(1) == documented_table()


def test_documented_times_are_the_documents() -> None:
    stated = {row.name: row.documented for row in documented_times()}
    assert stated["Alpaca"] == (3, 3) and stated["Vicuna"] == (10, 10) and stated["LoRA"] == (4, 8) and stated["Dolly"] == (4, 4)
    assert (
        stated["Llama 2-Chat"] == (100, 100) and stated["Conservative"] == (43, 43) and stated["QLoRA, chapter 13.2.6"] == (6, 8)
    )
    assert [stated[f"Conservative, {name}"] for name in ("fast", "ultra-fast", "max quality")] == [(20, 20), (8, 8), (87, 87)]
    assert stated["MambaSWELU, quick"] == (6, 6) and stated["MambaSWELU, chat"] == (20, 20)
    for row in documented_times():
        assert row.cost.steps.steps > 0 and row.why and row.estimate[0] < row.estimate[1] < row.estimate[2]
