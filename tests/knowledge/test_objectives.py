"""What is known before a run of each objective: memory, steps, time, rates, conflicts, and what to change afterwards."""

from __future__ import annotations

import json
import math
import re
import weakref
from dataclasses import replace
from inspect import getsource
from pathlib import Path
from typing import Any

import pytest

from finetuneflow.config import LOSSES_OF, RunConfig, build_config, settings
from finetuneflow.data import preferences
from finetuneflow.data.batches import RepeatedSampler
from finetuneflow.errors import ConfigError
from finetuneflow.knowledge import memory, memory_heads
from finetuneflow.knowledge.advice import after_failure
from finetuneflow.knowledge.cost import Cost, estimate_cost
from finetuneflow.knowledge.hyperparameters import epochs, learning_rate
from finetuneflow.knowledge.memory import Workload, estimate, workload_of
from finetuneflow.knowledge.memory_heads import Tiles, answer_bytes, drawing_copies, tile_bytes
from finetuneflow.knowledge.objectives import TRAITS, has_live_reference, passes_of, reference_of, rows_per_step
from finetuneflow.knowledge.recommend import options
from finetuneflow.knowledge.resolve import METHOD_RATES, OBJECTIVE_RATES, resolve_on
from finetuneflow.knowledge.rules import preference as preference_rules
from finetuneflow.knowledge.shapes import known_shape, shape_from_config
from finetuneflow.knowledge.shapes.targets import adapter_parameters
from finetuneflow.knowledge.situation import value_of
from finetuneflow.knowledge.steps import steps_of
from finetuneflow.knowledge.values import GB, DataFacts, Device, Machine

LLAMA = shape_from_config(
    {"model_type": "llama", "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1_024, "num_hidden_layers": 4,
     "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False},
    name="small",
)  # fmt: skip
SHAPE_8B = known_shape("meta-llama/Llama-3.1-8B")
OBJECTIVES = sorted(TRAITS)
DRAWING = sorted(name for name, traits in TRAITS.items() if traits.draws)
LENGTHS = tuple(range(100, 201))


def config(objective: str, kind: str = "lora", **changes: Any) -> RunConfig:
    values: dict[str, Any] = {"data": {"train": ["a.jsonl"]}, "training": {"objective": objective}, "method": {"kind": kind}}
    if TRAITS[objective].draws:
        values["reinforcement"] = {"reward": ["ends"]}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value
    return build_config(values)[0]


def machine(kind: str = "cpu", gigabytes: float = 64) -> Machine:
    device = Device("test", kind, int(gigabytes * GB), bandwidth=1e11, flops_bf16=1e13, flops_fp32=1e12, bf16=True)  # type: ignore[arg-type]
    return Machine((device,), int(gigabytes * GB), cores=8)


def facts(objective: str, examples: int = 1_000) -> DataFacts:
    form = TRAITS[objective].form
    more: dict[str, Any] = {} if form == "supervised" else {"prompt_tokens": 60.0, "answer_percentiles": LENGTHS}
    if form == "pair":
        more |= {"both_tokens": 270.0, "length_ratio": 1.1}
    return DataFacts(
        examples,
        mean_tokens=150.0,
        length_percentiles=LENGTHS,
        supervised_share=None if form == "prompt" else 0.5,
        form=form,
        **more,
    )


def parts(run: RunConfig, kind: str = "cpu") -> dict[str, int]:
    return estimate(LLAMA, run, machine(kind), data=facts(run.training.objective)).breakdown


# --- one home per fact ----------------------------------------------------------------------------------


def test_what_is_written_down_twice_is_the_same() -> None:
    from trl import DPOTrainer
    from trl.kernels import chunked_logprob
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    from finetuneflow.training import ppo

    assert (memory_heads.TILE_POSITIONS, memory_heads.TILE_COLUMNS) == (
        chunked_logprob.TOKEN_CHUNK_SIZE,
        _CHUNKED_LOGPROB_CHUNK_SIZE,
    )
    assert memory.DRAWN_TOGETHER == ppo.DRAWN_TOGETHER
    assert set(LOSSES_OF["dpo"]) == {"auto", *re.findall(r'loss_type == "(\w+)"', getsource(DPOTrainer))} - {"sft"}
    assert (preference_rules.LENGTH_RATIO, preference_rules.KTO_BALANCE) == (preferences.LENGTH_RATIO, preferences.KTO_BALANCE)
    known = {key for key, *_ in settings()}
    assert set(preference_rules.READ_BY) <= known
    assert {key for key in known if key.startswith(("preference.", "reinforcement."))} <= set(preference_rules.READ_BY)
    assert set(OBJECTIVE_RATES) == set(TRAITS) - {"sft", "pretrain"}


# --- memory -----------------------------------------------------------------------------------------------


def peak_of(run: Any) -> int:
    """The most bytes that tensors made inside `run` hold at once."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.live = self.peak = 0
            self.users: dict[int, int] = {}

        def gone(self, pointer: int, size: int) -> None:
            self.users[pointer] -= 1
            if not self.users[pointer]:
                self.live -= size
                del self.users[pointer]

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                if not hasattr(tensor, "untyped_storage"):
                    continue
                pointer, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
                if pointer not in self.users:
                    self.live += size
                self.users[pointer] = self.users.get(pointer, 0) + 1
                weakref.finalize(tensor, self.gone, pointer, size)
            self.peak = max(self.peak, self.live)
            return out

    watch = Watch()
    run(watch)
    return watch.peak


def test_a_tile_takes_what_folding_it_takes() -> None:
    """TRL's own functions for devices without Triton, every tensor they make watched."""
    import torch
    from trl.kernels.chunked_logprob import _backward_tile, _forward_tile

    rows, columns = 64, 3_000
    options = {"logit_scale": 1.0, "softcap": 1.0, "inv_t": 1.0, "HAS_SOFTCAP": False, "BLOCK_SIZE": 1}
    flags = {"HAS_ENTROPY": False, "HAS_LOG_SUM_SQ_PROBS": False, "HAS_MEAN_LOGITS": False, "HAS_IS_TOP1": False}
    tile = torch.randn(rows, columns).bfloat16()
    targets, line = torch.zeros(rows, dtype=torch.long), [torch.zeros(rows) for _ in range(6)]

    def forward(watch: Any) -> None:
        with torch.no_grad(), watch:
            _forward_tile(
                tile, columns, targets, line[0] - math.inf, *line[1:5], line[5], line[0].clone(), 0, columns, **options, **flags
            )  # type: ignore[arg-type]

    def backward(watch: Any) -> None:
        kinds = {"HAS_LOGPROB_GRAD": True, "HAS_ENTROPY_GRAD": False}
        with torch.no_grad(), watch:
            _backward_tile(tile, columns, targets, *line[:4], 0, columns, **options, **kinds)  # type: ignore[arg-type]

    assert peak_of(forward) == pytest.approx(rows * columns * memory_heads.TILE_FORWARD, rel=0.05)
    assert peak_of(backward) == pytest.approx(rows * columns * memory_heads.TILE_BACKWARD, rel=0.05)


def test_tiles_are_bounded_and_on_cuda_hold_scored_positions_alone() -> None:
    small = Tiles(vocab=32_000, hidden=512, num_tokens=1_000, scored=250, compute=2, cuda=False)
    assert tile_bytes(small, training=True) == 1_000 * 32_000 * (2 + 29) + 4 * 1_000 * 512
    assert tile_bytes(replace(small, num_tokens=10**6), training=False) == 4_096 * 32_000 * (2 + 12)
    assert tile_bytes(replace(small, cuda=True), training=True) == 250 * 32_768 * 2 + 4 * 250 * 512
    assert tile_bytes(replace(small, vocab=300_000), training=False) == 1_000 * 32_768 * 14
    assert answer_bytes(100, 10, 2, training=True) == 10 * 100 * 12
    assert drawing_copies(1_000, 64, 8, 2, cuda=False) == 8 * 1_000 * 64 * 2
    assert not any(
        (drawing_copies(9, 9, 1, 2, cuda=False), drawing_copies(9, 9, 8, 4, cuda=False), drawing_copies(9, 9, 8, 2, cuda=True))
    )


def test_a_pair_is_two_rows_and_a_drawn_answer_stands_behind_its_prompt() -> None:
    def work(config: RunConfig, data: DataFacts) -> Workload:
        return workload_of(LLAMA, config, resolve_on(config, "cpu", bf16=True), data)

    data = facts("dpo")
    assert (work(config("dpo"), data).batch, work(config("kto"), facts("kto")).batch) == (8, 4)
    assert work(config("dpo"), data).eval_batch == 8 and work(config("dpo"), replace(data, examples=3)).batch == 6
    drawn = work(config("grpo", reinforcement__max_new_tokens=64), facts("grpo"))
    assert (drawn.batch, drawn.tokens, drawn.new_tokens, drawn.drawn) == (4, 200 + 64, 64, 16)
    assert drawn.supervised == pytest.approx(64 / 264)
    assert work(config("ppo"), facts("ppo")).drawn == 16
    few = config("ppo", reinforcement__rollout_size=8, training__gradient_accumulation=2, data__eval_fraction=0)
    assert work(few, facts("ppo")).drawn == 8


def test_what_is_frozen_beside_the_policy() -> None:
    whole = 4 * LLAMA.num_parameters
    for objective in ("dpo", "kto", "grpo", "rloo", "ppo"):
        assert parts(config(objective, "full"))["reference"] == pytest.approx(whole, rel=1e-3)
        assert "reference" not in parts(config(objective))
        continued = config(objective, model__adapter="runs/sft")
        assert parts(continued)["reference"] >= 4 * adapter_parameters(LLAMA, continued.method)
        assert "reference" not in parts(config(objective, model__adapter="runs/sft", model__adapter_start="stack"))
    for objective in ("orpo", "cpo", "simpo", "reward", "sft"):
        assert "reference" not in parts(config(objective, "full"))
    assert reference_of(config("grpo", "full", reinforcement__kl_coefficient=0)) == "none"
    once = config("dpo", "full", preference__reference="cached")
    assert reference_of(once) == "model" and "reference" not in parts(once)  # let go before the first step
    assert not has_live_reference(config("dpo", preference__reference="cached")) and has_live_reference(config("dpo"))


def test_a_reward_model_has_no_output_layer_and_ppo_a_value_adapter() -> None:
    reward, plain = parts(config("reward")), parts(config("orpo"))
    assert plain["embeddings"] - reward["embeddings"] == 2 * LLAMA.head_parameters
    assert "logits" not in reward
    adapter = 4 * adapter_parameters(LLAMA, config("ppo").method)
    assert parts(config("ppo"))["adapters"] == 2 * adapter + 4 * LLAMA.hidden
    own_base = parts(config("ppo", "full", reinforcement__reward=["model:runs/reward"]))
    assert own_base["reward_model"] == pytest.approx(4 * LLAMA.num_parameters, rel=1e-3)
    shared = parts(config("ppo", reinforcement__reward=["model:runs/reward"]))
    assert 0 < shared["reward_model"] < 3 * adapter
    on_cuda = parts(config("grpo", reinforcement__reward=["model:runs/reward"]), "cuda")
    assert "reward_model" not in on_cuda  # scored on the processor


def test_drawing_many_long_answers_is_a_phase_that_can_be_the_peak() -> None:
    run = config("grpo", training__batch_size=1, training__gradient_accumulation=512, reinforcement__max_new_tokens=2_000)
    found = estimate(LLAMA, run, machine("cuda"), data=facts("grpo"))
    assert found.phase == "generation" and found.breakdown["kv_cache"] == 512 * 2 * 4 * 4 * 64 * 2_200 * 2
    assert "generation" not in estimate(LLAMA, config("dpo"), machine(), data=facts("dpo")).phases


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_more_of_anything_never_needs_less(objective: str) -> None:
    base: dict[str, Any] = {"training__batch_size": 2, "training__gradient_accumulation": 8}
    small = estimate(LLAMA, config(objective, **base), machine(), data=facts(objective)).total_bytes
    for change in ({"training__batch_size": 8}, {"method__kind": "full"}):
        assert estimate(LLAMA, config(objective, **{**base, **change}), machine(), data=facts(objective)).total_bytes > small


def test_no_way_out_of_memory_is_one_the_objective_refuses() -> None:
    """kto's micro-batch keeps two answers, groups stay whole, and where drawing is the peak less is drawn."""
    from finetuneflow.knowledge.remedies import _changes

    def remedies(run: RunConfig) -> list[dict[str, Any]]:
        found = estimate(LLAMA, run, machine("cuda", 1), data=facts(run.training.objective))
        return [settings for _, options in _changes(run, "cuda", found, machine("cuda", 1)) for settings in options]

    kto = remedies(config("kto", training__batch_size=4, training__gradient_accumulation=1))
    assert {s["training.batch_size"] for s in kto if "training.batch_size" in s} == {2}
    grpo = config("grpo", training__batch_size=1, training__gradient_accumulation=512, reinforcement__max_new_tokens=2_000)
    fewer = [s["training.gradient_accumulation"] for s in remedies(grpo) if set(s) == {"training.gradient_accumulation"}]
    assert fewer[0] == 504 and all(n % 8 == 0 for n in fewer)
    plan = options(
        LLAMA, config("kto", training__batch_size=8, training__gradient_accumulation=1), machine("cuda", 2), facts("kto")
    )
    assert all(option.settings["training.batch_size"] >= 2 for option in plan.options)


# --- steps and time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [7, 8, 100, 103])
def test_groups_take_the_steps_of_the_runs_own_sampler(prompts: int) -> None:
    run = config("grpo", reinforcement__samples_per_prompt=4, training__epochs=1)  # 16 answers a step: 4 prompts
    sampler = RepeatedSampler(prompts, seed=0, copies=4, prompts=4, rounds=4)
    found = steps_of(run, facts("grpo", prompts))
    assert found.steps == len(list(sampler)) // (16 * 4)
    assert found.examples_seen == 16 * found.steps and found.micro_batches == 4 * found.steps


def test_ppo_goes_on_into_the_next_epoch_and_max_steps_wins() -> None:
    run = config("ppo", training__epochs=2)
    assert steps_of(run, facts("ppo", 100)).steps == math.ceil(2 * 100 / 64)
    assert steps_of(config("ppo", training__max_steps=5), facts("ppo", 100)).examples_seen == 5 * 64
    assert (rows_per_step(run), rows_per_step(config("grpo")), rows_per_step(config("dpo"))) == (64, 2, 16)


def test_both_sides_of_a_pair_are_counted() -> None:
    pair, single = (steps_of(config(objective, training__epochs=1), facts(objective)) for objective in ("dpo", "kto"))
    assert pair.steps == single.steps and pair.examples_seen == 1_000
    assert pair.tokens_seen == pytest.approx(1_000 * 270, rel=0.01) and single.tokens_seen == pytest.approx(1_000 * 150, rel=0.01)
    assert pair.padded_tokens == pytest.approx(2 * single.padded_tokens, rel=0.05)


def cost(run: RunConfig) -> Cost:
    return estimate_cost(LLAMA, run, machine("cuda"), facts(run.training.objective))


def test_passes_are_those_of_each_objective() -> None:
    def passes(*what: Any, **changes: Any) -> tuple[float, float]:
        found = passes_of(config(*what, **changes))
        return found.trained, found.forward

    assert passes("sft") == passes("orpo") == passes("reward") == (1, 0)
    assert passes("dpo") == (1, 1) and passes("dpo", preference__reference="cached") == (1, 0)
    assert passes("kto") == (1, 3) and passes("grpo") == (1, 1) and passes("rloo") == (1, 2)
    assert passes("grpo", reinforcement__kl_coefficient=0) == (1, 0)
    assert passes("ppo") == (8, 3) and passes("ppo", "full") == (4, 7)


def test_a_reference_costs_its_forward_pass_and_drawing_grows_with_the_answers() -> None:
    live, cached = cost(config("dpo")), cost(config("dpo", preference__reference="cached"))
    assert live.flops > cached.flops and live.parts["training"] > cached.parts["training"]
    short, middle, long = (cost(config("grpo", reinforcement__max_new_tokens=n)) for n in (32, 64, 256))
    first, second = (later.parts["drawing"] - short.parts["drawing"] for later in (middle, long))
    assert first > 0 and second / first == pytest.approx((256 - 32) / (64 - 32), rel=0.1)
    assert any("rough" in note for note in long.notes) and "drawing" not in live.parts


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_has_a_plan_with_finite_figures(objective: str, kind: str) -> None:
    assert SHAPE_8B is not None
    shape = LLAMA if kind == "cpu" else SHAPE_8B
    found = options(shape, config(objective), machine(kind, 80), facts(objective), origins={})
    usable = [option for option in found.options if option.fits]
    assert usable and all(option.hours and math.isfinite(option.hours) for option in usable)
    json.dumps(found.to_dict())
    if objective in OBJECTIVE_RATES:
        full = next(option for option in found.options if option.method == "full")
        assert full.settings["training.learning_rate"] == OBJECTIVE_RATES[objective][0] and full.settings["training.epochs"] == 1


# --- rates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", sorted(OBJECTIVE_RATES))
def test_a_rate_is_chosen_where_none_is_named_and_a_named_one_is_kept(objective: str) -> None:
    full, adapter, why = OBJECTIVE_RATES[objective]
    for kind, rate in (("full", full), ("lora", adapter), ("qlora", adapter)):
        found = resolve_on(config(objective, kind), "cpu", bf16=True)
        said = [decision for decision in found.decisions if decision.setting == "training.learning_rate"]
        assert found.learning_rate == rate and len(said) == 1 and why in said[0].reason and said[0].warning is None
        for named in (1.5e-4, *([2e-4] if kind != "full" else [])):
            kept = resolve_on(config(objective, kind, training__learning_rate=named), "cpu", bf16=True)
            assert kept.learning_rate == named and not any(d.setting == "training.learning_rate" for d in kept.decisions)
    lowered = resolve_on(config(objective, "full", training__learning_rate=3e-4), "cpu", bf16=True)
    assert lowered.learning_rate == full
    assert resolve_on(config(objective, "ia3"), "cpu", bf16=True).learning_rate == METHOD_RATES["ia3"][0]
    assert learning_rate("lora", 10**9, objective).value == adapter and epochs(None, objective).value == 1


def test_supervised_rates_are_what_they_were() -> None:
    assert resolve_on(config("sft"), "cpu", bf16=True).learning_rate == 2e-4
    assert resolve_on(config("sft", "full"), "cpu", bf16=True).learning_rate == 2e-5
    assert OBJECTIVE_RATES["dpo"][0] == 5e-7  # the documented rate


# --- conflicts -----------------------------------------------------------------------------------------------

STACKED = {"model__adapter": "runs/sft", "model__adapter_start": "stack"}
CONFLICTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("dpo", {"preference__loss": "kto"}, {"preference__loss": "ipo"}),
    ("kto", {"preference__loss": "sigmoid"}, {"preference__loss": "apo_zero_unpaired"}),
    ("cpo", {"preference__loss": "robust"}, {"preference__loss": "hinge"}),
    ("kto", {"training__batch_size": 1}, {"training__batch_size": 2}),
    ("ppo", {"method__kind": "prefix"}, {"method__kind": "ia3"}),
    ("dpo", {"method__kind": "dora", **STACKED}, {"method__kind": "lora", **STACKED}),
    ("sft", {"method__kind": "qlora", **STACKED}, {"method__kind": "full", **STACKED}),
    ("reward", STACKED, {"model__adapter": "runs/sft"}),
    ("sft", {"method__modules_to_save": ["lm_head"], **STACKED}, {"method__modules_to_save": ["lm_head"]}),
    ("grpo", {"reinforcement__reward": []}, {}),
    ("rloo", {"reinforcement__reward_weights": [1, 2]}, {"reinforcement__reward_weights": [1]}),
    ("ppo", {"reinforcement__reward": ["a.py:f"]}, {"reinforcement__reward": ["a.py:f"], "reinforcement__reward_folder": "r"}),
    ("grpo", {"training__gradient_accumulation": 3}, {"training__gradient_accumulation": 6}),
    ("grpo", {"reinforcement__reward": ["/x/a.py:f"], "reinforcement__reward_folder": "r"}, {"reinforcement__reward": ["regex:a.py"]}),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "bad", "good"), CONFLICTS, ids=[f"{n}-{case[0]}" for n, case in enumerate(CONFLICTS)])
def test_what_the_trainer_would_stop_at_is_refused_before(objective: str, bad: dict[str, Any], good: dict[str, Any]) -> None:
    assert len(config(objective, **bad).conflicts()) == 1
    assert config(objective, **good).conflicts() == []


def test_a_recipe_phase_says_no_more_than_it_may() -> None:
    from finetuneflow.knowledge.recipes import recipe_config
    from finetuneflow.knowledge.recipes.schema import load_recipe, load_recipe_text

    values, _ = recipe_config(load_recipe("rlhf"), "ppo")
    assert values["reinforcement"] == {"rollout_size": 512, "update_epochs": 1, "clip_range": 0.2, "kl_coefficient": 0.01}
    assert recipe_config(load_recipe("dpo"))[0]["preference"]["beta"] == 0.1
    text = Path(preference_rules.__file__).parents[1] / "recipes" / "rlhf.yaml"
    named = text.read_text().replace("rollout_size: 512", "reward: [evil.py:run], rollout_size: 512")
    with pytest.raises(ConfigError, match=r"reinforcement\.reward"):
        load_recipe_text(named, where="test")


# --- afterwards -------------------------------------------------------------------------------------------------


def curve(*losses: float) -> dict[str, Any]:
    return {"eval_loss_curve": [{"step": n, "loss": loss} for n, loss in enumerate(losses)], "steps": 20_000}


def test_after_a_run_that_failed_its_prompts_rate_steps_and_data_are_named() -> None:
    run = config("sft", "full", training__learning_rate=1e-5)
    found = after_failure(run, {**curve(3, 2.5, 2.2, 2.0, 1.9, 1.8), "suite_pass_share": 0.4})
    assert [item.settings for item in found] == [{"training.learning_rate": 5e-6}, {"training.max_steps": 40_000}, {}]
    assert "40 %" in found[0].reason
    most = after_failure(run, {**curve(), "steps": 30_000, "suite_pass_share": 0.0})
    assert most[1].settings == {"training.max_steps": 50_000}
    assert len(after_failure(run, {**curve(), "steps": 50_000, "suite_pass_share": 0.0})) == 2


def test_a_rising_loss_asks_for_half_the_rate_and_a_standing_one_for_other_data() -> None:
    run = config("sft", "full", training__learning_rate=1e-5)
    (rises,) = after_failure(run, curve(3, 2, 1.5, 1.6, 1.9, 2.2))
    assert rises.settings == {"training.learning_rate": 5e-6} and "rose" in rises.reason
    random_base = config("sft", "full", training__learning_rate=1e-3)  # on trained weights it would have been lowered
    (rises,) = after_failure(random_base, curve(3, 2, 1.5, 1.6, 1.9, 2.2), fresh=True)
    assert rises.settings == {"training.learning_rate": 5e-4}
    (stands,) = after_failure(run, curve(3, 2, 1.5, 1.5, 1.5, 1.5, 1.5))
    assert stands.settings == {} and "stands still" in stands.reason
    assert after_failure(run, curve(3, 2.5, 2, 1.5, 1, 0.5)) == []
    assert after_failure(run, {**curve(3, 2, 1.5, 1.6, 1.9, 2.2), "suite_pass_share": 0.9}) == []


@pytest.mark.parametrize(
    "metrics", [{}, {"suite_pass_share": "x"}, {"eval_loss_curve": 7}, {"train_loss_curve": [{"loss": "nan"}, 3]}]
)
def test_odd_metrics_give_no_advice(metrics: dict[str, Any]) -> None:
    assert after_failure(config("sft"), metrics) == []
    assert value_of(config("sft"), "training.epochs") == 3
