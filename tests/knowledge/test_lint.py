"""The linter: every rule fires where it should and is silent beside it; fixes mend and bring no new error; pages are complete."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from finetuneflow.config import RunConfig, build_config, load_config, load_values
from finetuneflow.data.builtin_templates import BUILT_IN
from finetuneflow.errors import CODES, ConfigError
from finetuneflow.knowledge import lint
from finetuneflow.knowledge.lint import RULES, Finding, Situation, apply_fixes, check, fix, rule_page, rule_pages, skipped
from finetuneflow.knowledge.rules.data import padding_share
from finetuneflow.knowledge.rules.model import CONTROL_TOKENS, NON_COMMERCIAL, TEMPLATE_MARKS
from finetuneflow.knowledge.rules.rate import lora_guide
from finetuneflow.knowledge.shapes import known_shape, shape_from_config, shape_from_size
from finetuneflow.knowledge.shapes.shape import ModelShape
from finetuneflow.knowledge.situation import completed, gb
from finetuneflow.knowledge.values import GB, DataFacts, Device, Machine, ModelFacts

ROOT = Path(__file__).parents[2]
BAD = sorted((ROOT / "examples" / "bad").glob("*.yaml"))
STARTER_DIR = ROOT / "src" / "finetuneflow" / "models" / "starter"

# --- facts --------------------------------------------------------------------------------------------


def card(gigabytes: float = 24, *, bf16: bool = True, count: int = 1, host: float = 64, **more: Any) -> Machine:
    device = Device("test card", "cuda", int(gigabytes * GB), bf16=bf16)
    return Machine((device,) * count, int(host * GB), cores=16, **more)


def processor(gigabytes: float = 24, cores: float = 2, bf16: bool = True) -> Machine:
    return Machine((Device("test CPU", "cpu", int(gigabytes * GB), bf16=bf16),), int(gigabytes * GB), cores=cores)


def shape(name: str) -> ModelShape:
    found = known_shape(name)
    assert found is not None
    return found


def lengths(shortest: int, longest: int) -> tuple[int, ...]:
    return tuple(round(shortest + (longest - shortest) * p / 100) for p in range(101))


STARTER = shape_from_config(json.loads((STARTER_DIR / "config.json").read_text()), name="starter")
LLAMA_8B, QWEN_600M, GPT2 = shape("meta-llama/Llama-3.1-8B"), shape("Qwen/Qwen3-0.6B"), shape("gpt2")
LLAMA_70B = shape("meta-llama/Llama-3.1-70B")
MAMBA = shape_from_config({"model_type": "mamba", "hidden_size": 256, "num_hidden_layers": 6, "vocab_size": 1000}, name="mamba")
EXPERTS = shape_from_config(
    {
        "model_type": "qwen3_moe", "hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 1000, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512, "moe_intermediate_size": 128, "num_experts": 8,
        "num_experts_per_tok": 2, "mlp_only_layers": [0],
    },
    name="experts",
)  # fmt: skip
CHAT = DataFacts(
    examples=9_000, eval_examples=1_000, mean_tokens=200, length_percentiles=lengths(100, 300), supervised_share=0.5,
    kinds=("chat",), turns_mean=2.0, duplicate_share=0.0,
)  # fmt: skip
SPREAD = replace(CHAT, length_percentiles=tuple(round(20 * 1.05**p) for p in range(101)))
MUCH = replace(CHAT, examples=50_000)
TEXT = replace(CHAT, kinds=("text",), supervised_share=1.0)
PAIRS = replace(CHAT, form="pair", kinds=("preference",), both_tokens=380, prompt_tokens=100, length_ratio=1.0)
RATED = replace(CHAT, form="rated", kinds=("unpaired",), prompt_tokens=100, good_share=0.5)
PROMPTS = replace(CHAT, form="prompt", supervised_share=None, prompt_tokens=200, answer_percentiles=lengths(10, 100))
INSTRUCT = ModelFacts(
    "an-instruct-model", model_type="llama", stored_dtype="bfloat16", chat_template="{{ '<|im_start|>' }}", licence="apache-2.0",
    config={"model_type": "llama"},
)  # fmt: skip
BASE = replace(INSTRUCT, name="a-base-model", chat_template=None)


def run(overrides: str = "", /, **facts: Any) -> Situation:
    """A situation with settings written as `section.key=value` separated by blanks, and training data named."""
    config, origins = build_config({"data": {"train": ["a.jsonl"]}}, overrides.split())
    return Situation(config=config, origins=origins, **facts)


def filled(share: float, overrides: str, base: ModelShape) -> Situation:
    """On a card of such a size that the run needs `share` of what may be planned with."""
    estimate = completed(run(overrides, machine=card(10_000), shape=base)).estimate
    assert estimate is not None
    return run(overrides, machine=card(estimate.total_bytes / share / 0.95 / GB), shape=base)


def codes(situation: Situation) -> set[str]:
    return {finding.code for finding in check(situation)}


# --- every rule: a case where it fires, and one near it where it does not ----------------------------------

FULL, LORA, QLORA = "method.kind=full", "method.kind=lora", "method.kind=qlora"
RATE = "training.learning_rate"
OFF = "training.gradient_checkpointing='off'"
DPO = "training.objective=dpo"
GRPO = "training.objective=grpo reinforcement.reward=[ends]"
PPO = "training.objective=ppo reinforcement.reward=[ends]"
STACK = "model.adapter=runs/sft model.adapter_start=stack"

CASES: dict[str, tuple[Situation, Situation]] = {
    # data
    "NO_TRAINING_DATA": (run("data.train=[]"), run()),
    "LOSS_ON_PROMPT": (run("data.supervise=all", data=CHAT), run("data.supervise=all", data=TEXT)),
    "PRETRAIN_ON_CHAT": (run("training.objective=pretrain", data=CHAT), run("training.objective=pretrain", data=TEXT)),
    "SFT_ON_TEXT": (run(data=TEXT), run(data=replace(TEXT, kinds=("chat", "text")))),
    "HAND_FORMATTED_DATA": (run(data=replace(CHAT, hand_formatted="Alpaca")), run(data=CHAT)),
    "ANSWERS_TRUNCATED": (run("data.max_length=280", data=CHAT), run("data.max_length=294", data=CHAT)),
    "LENGTH_BEYOND_CONTEXT": (
        run(shape=STARTER, data=replace(CHAT, length_percentiles=lengths(100, 513))),
        run(shape=STARTER, data=replace(CHAT, length_percentiles=lengths(100, 512))),
    ),
    "POSITIONS_RUN_OUT": (run("data.max_length=1025", shape=GPT2), run("data.max_length=1024", shape=GPT2)),
    "PADDING_WASTE": (run("training.speed=reference", data=SPREAD), run(data=SPREAD)),
    "DUPLICATE_EXAMPLES": (run(data=replace(CHAT, duplicate_share=0.1)), run(data=replace(CHAT, duplicate_share=0.09))),
    "FEW_EXAMPLES": (run(data=replace(CHAT, examples=49)), run(data=replace(CHAT, examples=50))),
    "EVAL_MISSING": (run("data.eval_fraction=0"), run("data.eval_fraction=0 data.eval=[b.jsonl]")),
    "EVAL_SAME_FILE": (run("data.eval=[a.jsonl]"), run("data.eval=[b.jsonl]")),
    "EVAL_OVERLAPS_TRAINING": (
        run("data.eval=[b.jsonl]", data=replace(CHAT, eval_overlap=1)),
        run("data.eval=[b.jsonl]", data=replace(CHAT, eval_overlap=0)),
    ),
    "EVAL_TOO_SMALL": (run(data=replace(CHAT, eval_examples=19)), run(data=replace(CHAT, eval_examples=20))),
    "VOCABULARY_BEYOND_EMBEDDING": (
        run(shape=STARTER, model=replace(INSTRUCT, vocabulary_size=3201)),
        run(shape=STARTER, model=replace(INSTRUCT, vocabulary_size=3200)),
    ),
    # model
    "TEMPLATE_UNLIKE_MODEL": (run("data.template=llama2", model=INSTRUCT), run("data.template=chatml", model=INSTRUCT)),
    "TEMPLATE_REPLACED": (
        run("data.template=llama2 data.template_consent=true", model=INSTRUCT),
        run("data.template=chatml data.template_consent=true", model=INSTRUCT),
    ),
    "BASE_WITHOUT_TEMPLATE": (run(model=BASE), run(model=INSTRUCT)),
    "TEMPLATE_TOKENS_UNTRAINED": (
        run("data.template=chatml", model=BASE, shape=LLAMA_8B),
        run("data.template=chatml method.modules_to_save=[embed_tokens,lm_head]", model=BASE, shape=LLAMA_8B),
    ),
    "MODEL_GATED": (run(model=replace(INSTRUCT, gated=True)), run(model=replace(INSTRUCT, gated=False))),
    "LICENCE_NON_COMMERCIAL": (
        run(model=replace(INSTRUCT, licence="cc-by-nc-4.0")),
        run(model=replace(INSTRUCT, licence="cc-by-4.0")),
    ),
    "LICENCE_WITH_TERMS": (run(model=replace(INSTRUCT, licence="llama3.1")), run(model=INSTRUCT)),
    "MODEL_OWN_CODE": (
        run(model=replace(INSTRUCT, has_own_code=True)),
        run(f"model.trust_remote_code={'a' * 40}", model=replace(INSTRUCT, has_own_code=True)),
    ),
    "BASE_IS_MERGED": (run("model.base=out/llama-merged", model=INSTRUCT), run("model.base=out/llama-emerged", model=INSTRUCT)),
    # adapter
    "RANK_TOO_SMALL": (run("method.r=4", data=MUCH, shape=LLAMA_8B), run("method.r=4", data=CHAT, shape=LLAMA_8B)),
    "RANK_BELOW_GUIDELINE": (run(data=replace(CHAT, examples=100_000)), run(data=replace(CHAT, examples=99_999))),
    "RANK_EXCEEDS_LAYER": (
        run("method.r=128 method.alpha=256", shape=STARTER),
        run("method.r=127 method.alpha=254", shape=STARTER),
    ),
    "ALPHA_NOT_DOUBLE_RANK": (run("method.alpha=16"), run("method.alpha=32")),
    "SCALING_EXTREME": (run("method.r=8 method.alpha=65"), run("method.r=8 method.alpha=64")),
    "TARGETS_HEAD_OR_EMBEDDING": (run("method.target_modules=[q_proj,lm_head]"), run("method.target_modules=[q_proj]")),
    "TARGETS_MISSING": (
        run("method.target_modules=[c_attn]", shape=LLAMA_8B),
        run("method.target_modules=[c_attn]", shape=GPT2),
    ),
    "TARGETS_TOO_FEW": (
        run("method.target_modules=[q_proj,v_proj]", shape=LLAMA_8B, data=replace(CHAT, examples=10_000)),
        run("method.target_modules=[q_proj,up_proj]", shape=LLAMA_8B, data=replace(CHAT, examples=10_000)),
    ),
    "TARGETS_STATE_SPACE": (
        run("method.target_modules=[in_proj,dt_proj]", shape=MAMBA),
        run("method.target_modules=[in_proj,x_proj]", shape=MAMBA),
    ),
    "EXPERTS_WITH_DROPOUT": (
        run("method.target_modules=[gate_proj,up_proj,down_proj]", shape=EXPERTS),
        run("method.target_modules=[gate_proj,up_proj,down_proj] method.dropout=0", shape=EXPERTS),
    ),
    "BASE_NOT_FROZEN": (run(f"{FULL} method.r=16", shape=LLAMA_8B), run(FULL, shape=LLAMA_8B)),
    "METHOD_SETTING_WITHOUT_EFFECT": (run("method.kind=ia3 method.r=8"), run("method.kind=ia3")),
    "MODULES_TO_SAVE_LARGE": (
        run("method.modules_to_save=[lm_head]", shape=LLAMA_8B),
        run("method.modules_to_save=[norm]", shape=LLAMA_8B),
    ),
    "MODULES_TO_SAVE_WITH_FULL": (run(f"{FULL} method.modules_to_save=[lm_head]"), run("method.modules_to_save=[lm_head]")),
    "DORA_WITH_DROPOUT": (run("method.kind=dora"), run("method.kind=dora method.dropout=0")),
    "PREFIX_WITH_CHECKPOINTING": (
        run("method.kind=prefix", machine=card()),
        run("method.kind=prefix", machine=processor()),
    ),
    "METHOD_NOT_FOR_ARCHITECTURE": (run("method.kind=prefix", shape=MAMBA), run("method.kind=prefix", shape=LLAMA_8B)),
    "QLORA_WITHOUT_BITSANDBYTES": (run(QLORA, machine=card(bitsandbytes=False)), run(QLORA, machine=card())),
    "QLORA_NOT_NEEDED": (run(QLORA, machine=card(80), shape=LLAMA_8B), run(QLORA, machine=card(16), shape=LLAMA_8B)),
    "QLORA_UNPAGED_OPTIMIZER": (
        run(f"{QLORA} training.optimizer=adamw_torch method.target_modules=all-linear", machine=card(12), shape=LLAMA_8B),
        run(f"{QLORA} training.optimizer=adamw_torch method.target_modules=all-linear", machine=card(80), shape=LLAMA_8B),
    ),
    "BASE_ALREADY_QUANTIZED": (
        run(QLORA, model=replace(INSTRUCT, quantized_as="gptq")),
        run(LORA, model=replace(INSTRUCT, quantized_as="gptq")),
    ),
    # rate
    "LR_FULL_RATE_ON_ADAPTER": (run(f"{RATE}=4.9e-5"), run(f"{RATE}=5e-5")),
    "LR_ADAPTER_RATE_ON_FULL": (run(f"{FULL} {RATE}=2e-4"), run(f"{FULL} {RATE}=1e-4")),
    "LR_HIGH_FOR_FULL": (run(f"{FULL} {RATE}=1.1e-4", shape=LLAMA_8B), run(f"{FULL} {RATE}=1.1e-4", shape=QWEN_600M)),
    "LR_HIGH_FOR_ADAPTER": (run(f"{RATE}=3e-3", shape=LLAMA_8B), run(f"{RATE}=3e-3", shape=STARTER)),
    "LR_TOO_LOW_TO_LEARN": (run(f"{FULL} {RATE}=9e-7"), run(f"{FULL} {RATE}=1e-6")),
    "LR_BY_MODEL_SIZE": (run(f"{FULL} {RATE}=3e-5", shape=LLAMA_8B), run(f"{FULL} {RATE}=2e-5", shape=LLAMA_8B)),
    "LR_LARGE_MODEL_ADAPTER": (run(QLORA, shape=LLAMA_70B), run(QLORA, shape=LLAMA_8B)),
    "LR_LOW_FOR_IA3": (run(f"method.kind=ia3 {RATE}=2e-4"), run("method.kind=ia3")),
    "WARMUP_NONE": (run(f"{FULL} training.warmup_ratio=0"), run("training.warmup_ratio=0")),
    "WARMUP_BY_STEPS": (run("training.warmup_ratio=0.2", steps=5_000), run("training.warmup_ratio=0.05", steps=5_000)),
    "WARMUP_MOST_OF_RUN": (run("training.warmup_ratio=0.3"), run("training.warmup_ratio=0.29")),
    "WARMUP_WITHOUT_EFFECT": (run("training.scheduler=constant training.warmup_ratio=0.1"), run("training.scheduler=constant")),
    "WEIGHT_DECAY_ERASES": (
        run(f"{FULL} {RATE}=1e-4 training.weight_decay=0.1", steps=20_000),
        run(f"{FULL} {RATE}=1e-4 training.weight_decay=0.01", steps=20_000),
    ),
    # preferences
    "OBJECTIVE_SETTING_WITHOUT_EFFECT": (
        run("training.objective=orpo preference.reference=cached"),
        run(f"{DPO} preference.reference=cached"),
    ),
    "PREFERENCE_LOSS_UNKNOWN": (run(f"{DPO} preference.loss=kto"), run("training.objective=kto preference.loss=kto")),
    "PREFERENCE_BETA_UNUSUAL": (run(f"{DPO} preference.beta=0.51"), run(f"{DPO} preference.beta=0.5")),
    "LR_HIGH_FOR_OBJECTIVE": (run(f"{DPO} {FULL} {RATE}=5.1e-6"), run(f"{DPO} {FULL} {RATE}=5e-6")),
    "PREFERENCE_BEFORE_TUNING": (run(DPO, model=BASE), run(f"{DPO} model.adapter=runs/sft", model=BASE)),
    "STACK_NOT_POSSIBLE": (
        run(f"{STACK} method.kind=dora"),
        run(f"{STACK} method.kind=lora"),
    ),
    "KTO_MICRO_BATCH": (run("training.objective=kto training.batch_size=1"), run("training.objective=kto training.batch_size=2")),
    "KTO_LABELS_UNBALANCED": (
        run("training.objective=kto", data=replace(RATED, good_share=0.6)),
        run("training.objective=kto", data=replace(RATED, good_share=0.57)),
    ),
    "PAIR_LENGTH_BIAS": (run(DPO, data=replace(PAIRS, length_ratio=1.6)), run(DPO, data=replace(PAIRS, length_ratio=1.4))),
    "SPLIT_OF_PAIRS": (run(f"{DPO} data.overlong=split", data=PAIRS), run("data.overlong=split", data=CHAT)),
    # rewards
    "REWARD_MISSING": (run("training.objective=grpo"), run(GRPO)),
    "REWARD_OUTSIDE_FOLDER": (
        run("training.objective=grpo reinforcement.reward=[../mine.py:good] reinforcement.reward_folder=rewards"),
        run("training.objective=grpo reinforcement.reward=[mine.py:good] reinforcement.reward_folder=rewards"),
    ),
    "REWARD_WEIGHTS_MISMATCH": (
        run(f"{GRPO} reinforcement.reward_weights=[1,2]"),
        run(f"{GRPO} reinforcement.reward_weights=[1]"),
    ),
    "GROUP_NOT_WHOLE": (run(f"{GRPO} training.gradient_accumulation=3"), run(f"{GRPO} training.gradient_accumulation=2")),
    "KL_OFF": (run(f"{GRPO} reinforcement.kl_coefficient=0"), run(GRPO)),
    "TEMPERATURE_OFF_POLICY": (run(f"{GRPO} reinforcement.temperature=0.6"), run(f"{GRPO} reinforcement.temperature=0.7")),
    "ROLLOUT_NOT_WHOLE": (run(f"{PPO} reinforcement.rollout_size=24"), run(f"{PPO} reinforcement.rollout_size=32")),
    "ANSWERS_CUT_SHORT": (
        run(GRPO, data=replace(PROMPTS, answer_percentiles=lengths(100, 140))),
        run(GRPO, data=replace(PROMPTS, answer_percentiles=lengths(100, 131))),
    ),
    "EVAL_GROUP_OF_ONE": (run(f"{GRPO} training.eval_batch_size=1"), run(f"{GRPO} training.eval_batch_size=2")),
    "DRAWN_BEYOND_CONTEXT": (
        run(GRPO, shape=STARTER, data=replace(PROMPTS, length_percentiles=lengths(100, 385))),
        run(GRPO, shape=STARTER, data=replace(PROMPTS, length_percentiles=lengths(100, 384))),
    ),
    # steps
    "EFFECTIVE_BATCH_SMALL": (
        run("training.batch_size=1 training.gradient_accumulation=7", data=CHAT),
        run("training.batch_size=1 training.gradient_accumulation=8", data=CHAT),
    ),
    "EFFECTIVE_BATCH_BY_MEMORY": (
        run(FULL, machine=card(24), data=MUCH),
        run(f"{FULL} training.gradient_accumulation=32", machine=card(24), data=MUCH),
    ),
    "BATCH_LARGER_THAN_DATA": (run(data=replace(CHAT, examples=15)), run(data=replace(CHAT, examples=16))),
    "STEPS_TOO_FEW": (run(steps=29), run(steps=30)),
    "STEPS_BY_DATASET_SIZE": (
        run("training.epochs=1 training.gradient_accumulation=64", data=replace(CHAT, examples=114_000)),
        run("training.epochs=3 training.gradient_accumulation=64", data=replace(CHAT, examples=114_000)),
    ),
    "EPOCHS_OVERFIT": (run("training.epochs=6", data=CHAT), run("training.epochs=15", data=replace(CHAT, examples=1_000))),
    "PRETRAIN_REPEATS": (
        run("training.objective=pretrain training.epochs=5", data=TEXT),
        run("training.objective=pretrain training.epochs=4", data=TEXT),
    ),
    "MAX_STEPS_OVERRIDES_EPOCHS": (
        run("training.epochs=3 training.max_steps=100", data=CHAT),
        run("training.max_steps=100", data=CHAT),
    ),
    "EVALS_TOO_FEW": (run(steps=200), run(steps=201)),
    "SAVE_STEPS_BEYOND_RUN": (run(steps=100), run(steps=101)),
    "SAVE_EVAL_MISMATCH": (run("training.save_steps=150"), run("training.save_steps=50")),
    "LOAD_BEST_WITHOUT_EVAL": (run("training.load_best=true data.eval_fraction=0"), run("data.eval_fraction=0")),
    "GPU_COUNT_CHANGED": (run(machine=card(count=4), device_count_before=1), run(machine=card(count=4), device_count_before=4)),
    "BATCH_TIMES_DEVICES": (run("training.batch_size=4", machine=card(count=6)), run(machine=card(count=6))),
    # hardware
    "MEMORY_DOES_NOT_FIT": (run(machine=card(8), shape=LLAMA_8B), run(machine=card(80), shape=LLAMA_8B)),
    "MEMORY_TIGHT": (filled(0.93, LORA, LLAMA_8B), filled(0.80, LORA, LLAMA_8B)),
    "CHECKPOINTING_OFF": (filled(1.2, OFF, LLAMA_8B), filled(0.8, OFF, LLAMA_8B)),
    "CHECKPOINTING_NEEDLESS": (
        run(machine=card(80), shape=QWEN_600M, data=CHAT),
        run(machine=card(24), shape=LLAMA_8B),
    ),
    "MICRO_BATCH_SMALL": (
        run("training.batch_size=1 training.gradient_accumulation=16", machine=card(80), shape=QWEN_600M, data=CHAT),
        run("training.batch_size=1 training.gradient_accumulation=2", machine=card(80), shape=QWEN_600M, data=CHAT),
    ),
    "BF16_UNSUPPORTED": (
        run("training.precision=bf16", machine=card(bf16=False)),
        run("training.precision=auto", machine=card(bf16=False)),
    ),
    "FP16_WITH_BF16_MODEL": (
        run("training.precision=fp16", machine=card(), model=INSTRUCT),
        run("training.precision=fp16", machine=card(), model=replace(INSTRUCT, stored_dtype="float16")),
    ),
    "FP16_ON_CPU": (run("training.precision=fp16 training.device=cpu"), run("training.precision=fp16")),
    "FULL_IN_16_BITS": (run(f"{FULL} model.dtype=bfloat16"), run("model.dtype=bfloat16")),
    "THREADS_MORE_THAN_CORES": (
        run("training.threads=3", machine=processor(cores=1.5)),
        run("training.threads=2", machine=processor(cores=1.5)),
    ),
    "DEVICE_CUDA_MISSING": (run("training.device=cuda", machine=processor()), run("training.device=cuda", machine=card())),
    "DEVICE_CPU_DESPITE_GPU": (run("training.device=cpu", machine=card()), run("training.device=cpu", machine=processor())),
    "STATE_SPACE_ON_CPU": (
        run("data.max_length=129", machine=processor(), shape=MAMBA),
        run("data.max_length=128", machine=processor(), shape=MAMBA),
    ),
}


def test_every_rule_has_both_cases() -> None:
    assert set(CASES) == set(RULES)
    assert len(RULES) >= 40


@pytest.mark.parametrize("code", CASES)
def test_a_rule_fires_and_is_silent_beside_it(code: str) -> None:
    fires, silent = CASES[code]
    found = next((finding for finding in check(fires) if finding.code == code), None)
    assert found is not None, "does not fire"
    assert code not in codes(silent), "fires where it should not"
    rule = RULES[code]
    assert (found.level, rule.missing(completed(silent))) == (rule.level, ()), "silent for lack of facts proves nothing"
    assert found.field in {key for key, *_ in lint.settings()}
    assert found.found and found.why.endswith((".", ")"))
    assert "None" not in found.found + found.why and "nan" not in found.why


@pytest.mark.parametrize("code", CASES)
def test_a_fix_is_a_valid_configuration_and_clears_its_finding(code: str) -> None:
    fires, _ = CASES[code]
    for finding in check(fires):
        if not finding.fix:
            continue
        after = fires.changed(finding.fix)
        if finding.code == code and finding.safe:
            assert code not in codes(after), finding.fix


def test_codes_are_upper_snake_case_and_belong_to_rules_alone() -> None:
    assert all(re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", code) for code in RULES)
    assert not set(RULES) & set(CODES)


def test_findings_have_the_documented_form() -> None:
    found = check(run(f"{RATE}=5e-6 data.eval=[a.jsonl] method.alpha=16"))
    assert [set(finding.to_dict()) for finding in found] == [{"code", "level", "field", "found", "why", "fix"}] * len(found)
    assert [finding.level for finding in found] == ["error", "warning", "advice"]
    json.dumps([finding.to_dict() for finding in found])


def test_a_rule_that_lacks_facts_says_so() -> None:
    lacking = dict(skipped(Situation(RunConfig())))
    assert lacking["ANSWERS_TRUNCATED"] == "data" and "MEMORY_DOES_NOT_FIT" in lacking
    assert "LR_FULL_RATE_ON_ADAPTER" not in lacking
    known = run(machine=card(), shape=LLAMA_8B, model=INSTRUCT, data=CHAT, device_count_before=1)
    assert skipped(known) == []


# --- numbers ------------------------------------------------------------------------------------------


def test_the_best_lora_rate_is_the_published_fit() -> None:
    # tinker-cookbook, hyperparam_utils: 5e-5 x 10 x (2000 / hidden) ^ 0.781 for Llama, 0.0775 for Qwen
    assert lora_guide(LLAMA_8B) == pytest.approx(2.856e-4, rel=1e-3)
    assert lora_guide(QWEN_600M) == pytest.approx(5.266e-4, rel=1e-3)


def test_the_padding_share_is_what_random_batches_show() -> None:
    import random

    data = SPREAD
    random.seed(1)

    def draw() -> float:
        place = random.random() * 100
        low = int(place)
        return data.length_percentiles[low] + (place - low) * (data.length_percentiles[low + 1] - data.length_percentiles[low])

    padded = useful = 0.0
    for _ in range(20_000):
        batch = [min(draw(), 2000) for _ in range(4)]
        padded += 4 * max(batch)
        useful += sum(batch)
    assert padding_share(data, 4, 2000) == pytest.approx(1 - useful / padded, abs=0.01)


def test_numbers_are_of_this_run() -> None:
    by_code = {finding.code: finding for finding in check(run(f"{RATE}=5e-6 data.supervise=all", data=CHAT))}
    assert "40 times" in by_code["LR_FULL_RATE_ON_ADAPTER"].why
    assert "50 %" in by_code["LOSS_ON_PROMPT"].found
    frozen = next(f for f in check(CASES["BASE_NOT_FROZEN"][0]) if f.code == "BASE_NOT_FROZEN")
    assert gb(16 * LLAMA_8B.num_parameters) in frozen.why


def test_the_cheapest_memory_fix_fits() -> None:
    for situation in (CASES["MEMORY_DOES_NOT_FIT"][0], run(f"{FULL} {RATE}=1e-5", machine=card(64), shape=LLAMA_8B)):
        finding = next(f for f in check(situation) if f.code == "MEMORY_DOES_NOT_FIT")
        after = completed(situation.changed(finding.fix)).estimate
        assert after is not None and after.fits


def test_a_memory_fix_that_keeps_the_result_is_preferred_and_safe() -> None:
    situation = filled(1.2, OFF, LLAMA_8B)
    finding = next(f for f in check(situation) if f.code == "MEMORY_DOES_NOT_FIT")
    assert finding.safe and finding.fix == {"training.gradient_checkpointing": "on"}


def test_a_model_that_cannot_fit_gets_no_invented_fix() -> None:
    finding = next(f for f in check(run(FULL, machine=processor(2), shape=LLAMA_70B)) if f.code == "MEMORY_DOES_NOT_FIT")
    assert finding.fix == {} and not finding.safe


@pytest.mark.parametrize(
    "name", ["cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-3.0", "mnpl-0.1", "gemma-nc", "apple-amlr-research"]
)
def test_non_commercial_licences_are_known(name: str) -> None:
    assert NON_COMMERCIAL.search(name)


@pytest.mark.parametrize(
    "name", ["apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "ncsa", "llama3", "gemma", "openrail", "bsd-3-clause"]
)
def test_commercial_licences_are_left_alone(name: str) -> None:
    assert not NON_COMMERCIAL.search(name)


def test_template_marks_and_control_tokens_are_those_of_the_templates() -> None:
    assert set(TEMPLATE_MARKS) == set(BUILT_IN)
    assert all(mark in BUILT_IN[name] for name, mark in TEMPLATE_MARKS.items())
    assert all(token in BUILT_IN[name] for name, tokens in CONTROL_TOKENS.items() for token in tokens)


# --- good settings are left alone -------------------------------------------------------------------------


def serious(situation: Situation) -> list[Finding]:
    return [finding for finding in check(situation) if finding.level != "advice"]


@pytest.mark.parametrize("origins", ["known", "unknown"])
@pytest.mark.parametrize("machine", [None, card(24), card(80), processor()], ids=["any", "24 GB", "80 GB", "cpu"])
@pytest.mark.parametrize("base", [None, STARTER, QWEN_600M, GPT2], ids=["any", "starter", "0.6B", "gpt2"])
def test_defaults_give_no_error_and_no_warning(base: ModelShape | None, machine: Machine | None, origins: str) -> None:
    situation = run(machine=machine, shape=base, data=CHAT, model=INSTRUCT)
    assert serious(situation if origins == "known" else replace(situation, origins=None)) == []


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_bundled_examples_are_clean(path: Path) -> None:
    config, origins = load_config(path)
    base = STARTER if config.model.base == "starter" else known_shape(config.model.base)
    data = TEXT if config.training.objective == "pretrain" else CHAT
    assert check(Situation(config, origins)) == []
    assert serious(Situation(config, origins, machine=card(24), shape=base, data=data)) == []


def test_a_second_look_at_the_same_situation_is_fast() -> None:
    situation = run(f"{QLORA} training.gradient_checkpointing='off'", machine=card(8), shape=LLAMA_70B, data=CHAT, model=INSTRUCT)
    check(situation)
    started = time.perf_counter()
    check(situation)
    assert time.perf_counter() - started < 0.05


# --- bad examples and fixes -------------------------------------------------------------------------------


def bad_situation(path: Path) -> Situation:
    """The situation of a bad example on a plain machine, its data read as it is."""
    config, origins = load_config(path)
    rows = [json.loads(line) for line in (ROOT / config.data.train[0]).read_text().splitlines()]
    sizes = sorted(sum(len(str(value)) for value in row.values()) // 4 for row in rows)
    data = DataFacts(
        examples=len(rows) - len(rows) // 10,
        eval_examples=len(rows) // 10,
        mean_tokens=sum(sizes) / len(sizes),
        length_percentiles=tuple(sizes[p * (len(sizes) - 1) // 100] for p in range(101)),
        supervised_share=0.7,
        kinds=("chat",),
        duplicate_share=1 - len({str(row) for row in rows}) / len(rows),
        hand_formatted="Vicuna" if all("USER: " in str(row) for row in rows) else None,
    )
    base = STARTER if config.model.base == "starter" else shape_from_size(config.model.base)
    model = replace(INSTRUCT, chat_template=(STARTER_DIR / "chat_template.jinja").read_text())
    return Situation(config, origins, machine=processor(), shape=base, model=model, data=data)


def named_findings(path: Path) -> set[str]:
    found = re.search(r"^# .*finds: (.+)$", path.read_text(), re.MULTILINE)
    assert found, "a bad example begins with a comment that names its findings"
    return set(found.group(1).split(", "))


def test_there_are_ten_bad_examples() -> None:
    assert len(BAD) == 10


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_a_bad_example_gives_the_findings_it_names(path: Path) -> None:
    assert {finding.code for finding in serious(bad_situation(path))} == named_findings(path)


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_safe_fixes_clear_their_findings_and_bring_no_error(path: Path) -> None:
    situation, values = bad_situation(path), load_values(path)
    before = check(situation)
    applied = fix(situation, values)
    config, origins = build_config(applied.values)
    after = replace(situation, config=config, origins={**origins, **dict.fromkeys(applied.overrides, "recommended")})
    found = check(after)
    assert not {f.code for f in before if f.safe} & {f.code for f in found}
    assert {f.code for f in found if f.level == "error"} <= {f.code for f in before if f.level == "error"}
    again = fix(after, applied.values)
    assert (again.values, again.overrides, again.difference) == (applied.values, {}, ())
    assert load_values(path) == values, "the settings handed in are left as they were"


def test_applying_findings_gives_overrides_and_a_readable_difference() -> None:
    values = {"data": {"train": ["a.jsonl"]}, "training": {"learning_rate": 5e-6}}
    config, origins = build_config(values)
    applied = apply_fixes(values, check(Situation(config, origins)))
    assert applied.overrides == {"training.learning_rate": 2e-4}
    assert applied.values["training"]["learning_rate"] == 2e-4 and values["training"]["learning_rate"] == 5e-6
    assert applied.difference == ("training.learning_rate: 5e-06 -> 0.0002  (LR_FULL_RATE_ON_ADAPTER)",)


def test_the_first_finding_decides_about_a_setting() -> None:
    one = Finding("A_B", "error", "method.r", "", "", {"method.r": 8}, safe=True)
    two = Finding("C_D", "error", "method.r", "", "", {"method.r": 16, "method.alpha": 32}, safe=True)
    assert apply_fixes({}, [one, two]).overrides == {"method.r": 8}
    assert apply_fixes({"method": None}, [two]).values == {"method": {"r": 16, "alpha": 32}}


def test_unsafe_fixes_wait_for_consent() -> None:
    finding = Finding("A_B", "error", "method.kind", "", "", {"method.kind": "lora"}, safe=False)
    assert apply_fixes({}, [finding]).overrides == {}
    assert apply_fixes({}, [finding], safe_only=False).overrides == {"method.kind": "lora"}


# --- hostile values ---------------------------------------------------------------------------------------

NUMBERS = st.integers(-5, 10**9)
FACTS = st.fixed_dictionaries(
    {
        "machine": st.sampled_from([None, card(0), card(8), card(80, count=8), processor(0.1, cores=0.5), card(12, bf16=False)]),
        "shape": st.sampled_from([None, STARTER, LLAMA_8B, LLAMA_70B, GPT2, MAMBA, EXPERTS]),
        "model": st.sampled_from(
            [None, BASE, INSTRUCT, replace(INSTRUCT, max_position=-1, vocabulary_size=0, quantized_as="awq")]
        ),
        "data": st.none()
        | st.builds(
            DataFacts,
            examples=NUMBERS,
            eval_examples=st.none() | NUMBERS,
            mean_tokens=st.sampled_from([0.0, -1.0, float("nan"), float("inf"), 300.0]),
            length_percentiles=st.sampled_from([(), (0,) * 101, lengths(1, 10**7), lengths(5, 300)]),
            supervised_share=st.none() | st.floats(0, 1),
            kinds=st.sampled_from([(), ("chat",), ("text",), ("chat", "text")]),
            duplicate_share=st.none() | st.floats(0, 1),
            eval_overlap=st.none() | NUMBERS,
            hand_formatted=st.none() | st.just("ChatML"),
        ),
        "steps": st.none() | NUMBERS,
        "cpu_threads": st.none() | NUMBERS,
        "device_count_before": st.none() | NUMBERS,
        "added_tokens": st.none() | st.just(frozenset({"<|im_start|>"})),
    }
)
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "model": st.fixed_dictionaries({"dtype": st.sampled_from(["auto", "float32", "bfloat16", "float16"])}),
        "data": st.fixed_dictionaries(
            {
                "train": st.sampled_from([[], ["a.jsonl"]]),
                "eval": st.sampled_from([[], ["a.jsonl"], ["b.jsonl"]]),
                "eval_fraction": st.sampled_from([0.0, 0.1, 0.5]),
                "template": st.sampled_from(["auto", "own", "chatml", "llama2", "plain", "x.jinja"]),
                "template_consent": st.booleans(),
                "supervise": st.sampled_from(["assistant", "last", "all"]),
                "max_length": st.sampled_from([8, 64, 2048, 1_048_576]),
                "overlong": st.sampled_from(["drop", "cut", "split"]),
            }
        ),
        "method": st.fixed_dictionaries(
            {
                "kind": st.sampled_from(["lora", "qlora", "dora", "ia3", "prefix", "full"]),
                "r": st.integers(1, 1024),
                "alpha": st.floats(1e-6, 1e6),
                "dropout": st.sampled_from([0.0, 0.5]),
                "rslora": st.booleans(),
                "target_modules": st.sampled_from(
                    [
                        "auto",
                        "all-linear",
                        "q_proj",
                        "(",
                        ".*",
                        "",
                        [],
                        ["lm_head"],
                        ["q_proj", "embed_tokens"],
                        ["x"],
                        ["dt_proj"],
                    ]
                ),
                "modules_to_save": st.sampled_from([[], ["lm_head"], ["nothing", "embed_tokens"]]),
                "double_quantization": st.booleans(),
            }
        ),
        "training": st.fixed_dictionaries(
            {
                "objective": st.sampled_from(["sft", "pretrain"]),
                "epochs": st.floats(1e-3, 1000),
                "max_steps": st.none() | st.integers(1, 10**7),
                "learning_rate": st.floats(1e-12, 1),
                "batch_size": st.integers(1, 4096),
                "gradient_accumulation": st.integers(1, 4096),
                "warmup_ratio": st.floats(0, 1),
                "weight_decay": st.floats(0, 1),
                "scheduler": st.sampled_from(["cosine", "linear", "constant", "constant_with_warmup"]),
                "precision": st.sampled_from(["auto", "bf16", "fp16", "fp32"]),
                "gradient_checkpointing": st.sampled_from(["auto", "on", "off"]),
                "device": st.sampled_from(["auto", "cuda", "cpu"]),
                "eval_steps": st.integers(1, 10**6),
                "save_steps": st.integers(1, 10**6),
                "load_best": st.booleans(),
                "patience": st.none() | st.integers(1, 100),
                "oom": st.sampled_from(["stop", "retry"]),
                "threads": st.none() | st.integers(1, 1000),
            }
        ),
    },
)


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=CONFIGS, facts=FACTS, with_origins=st.booleans())
def test_no_valid_configuration_breaks_the_linter(values: dict[str, Any], facts: dict[str, Any], with_origins: bool) -> None:
    config, origins = build_config(values)
    situation = Situation(config, origins if with_origins else None, **facts)
    for finding in check(situation):
        assert finding.found and finding.why
        situation.changed(finding.fix)  # every proposed value is a valid one


@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=CONFIGS, base=st.sampled_from([STARTER, QWEN_600M, GPT2]), machine=st.sampled_from([card(24), processor()]))
def test_fixing_brings_no_new_error_and_comes_to_an_end(values: dict[str, Any], base: ModelShape, machine: Machine) -> None:
    config, origins = build_config(values)
    situation = Situation(config, origins, machine=machine, shape=base, data=CHAT, model=INSTRUCT)
    before = {f.code for f in check(situation) if f.level == "error"}
    applied = fix(situation, values)
    again, _ = build_config(applied.values)
    after = replace(situation, config=again, origins={**origins, **dict.fromkeys(applied.overrides, "recommended")})
    assert {f.code for f in check(after) if f.level == "error"} <= before
    assert fix(after, applied.values).overrides == {}


# --- pages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", RULES)
def test_each_rule_has_a_page(code: str) -> None:
    page = rule_page(code)
    rule = RULES[code]
    assert page.startswith(f"# {code}\n\n*{rule.level}*: {rule.title}\n")
    parts = re.findall(r"^## ([^\n]+)\n\n(.+?)(?=\n\n## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in parts] == ["What it looks at", "Why it matters", "How to fix it", "When to ignore it", "Sources"]
    assert all(text.strip() for _, text in parts)
    block = re.search(r"```yaml\n(.+?)\n```", dict(parts)["How to fix it"], re.DOTALL)
    assert block, "the fix is shown as YAML"
    build_config(yaml.safe_load(block.group(1)) or {})


def test_no_page_is_without_a_rule() -> None:
    folder = ROOT / "src" / "finetuneflow" / "knowledge" / "rules"
    assert {path.name for path in folder.glob("*.md")} == {f"{code}.md" for code in RULES}


def test_the_pages_in_the_documentation_are_current() -> None:
    folder = ROOT / "docs" / "rules"
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")} == rule_pages(), "run: make docs"


def test_the_index_lists_every_rule() -> None:
    index = rule_pages()["README.md"]
    assert all(f"| [`{code}`]({code}.md) | {rule.level} | {rule.title} |" in index for code, rule in RULES.items())


def test_an_unknown_code_is_refused() -> None:
    with pytest.raises(ConfigError):
        rule_page("../../config")
