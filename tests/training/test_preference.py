"""Objectives on preferences: equal to TRL and to the papers' formulas on the same rows, exact when resumed, honest in what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuneflow.config import Preference, RunConfig
from finetuneflow.errors import FineTuneFlowError
from finetuneflow.events import metric_lines
from finetuneflow.training import objectives
from finetuneflow.training.callbacks import Monitor
from finetuneflow.training.progress import Progress
from finetuneflow.training.setup import apply_setup, choose_setup
from finetuneflow.training.start import Started, start_model
from training.workbench import Bench, at, weights, write_rows

PAIRED = ("dpo", "orpo", "cpo", "simpo", "reward")


def pairs(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Pairs of answers of unlike lengths to different prompts."""
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {n} plus {n + 1}?"}],
            "chosen": [{"role": "assistant", "content": f"It is {2 * n + 1}." + " Sure." * (n % 3)}],
            "rejected": [{"role": "assistant", "content": f"I do not know {n}." if n % 2 else "No."}],
        }
        for n in range(start, start + count)
    ]


def rated(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {n} plus {n + 1}?"}],
            "completion": [{"role": "assistant", "content": f"It is {2 * n + 1}." if n % 2 else f"Who cares about {n}?"}],
            "label": bool(n % 2),
        }
        for n in range(count)
    ]


def rows_of(objective: str, count: int) -> list[dict[str, Any]]:
    if objective != "kto":
        return pairs(count)
    return [{"messages": [*row["prompt"], *row["completion"]], "label": row["label"]} for row in rated(count)]


@pytest.fixture
def preferring(bench: Bench) -> Bench:
    write_rows(bench.data, pairs(24))
    return bench


def config_of(bench: Bench, objective: str, **settings: Any) -> RunConfig:
    write_rows(bench.data, rows_of(objective, 24))
    return bench.config(training__objective=objective, **settings)


# --- a trainer outside a run ----------------------------------------------------------------------------


def ready_trainer(config: RunConfig, run_dir: Path, bench: Bench) -> tuple[Any, objectives.Materials]:
    """The trainer as a run would build it, with its rows, before the first step."""
    emit = lambda name, /, **fields: {"event": name, **fields}  # noqa: E731
    setup = choose_setup(config)
    apply_setup(setup, seed=config.training.seed)
    materials = objectives.load_materials(config, bench.workspace, emit)
    started = start_model(config, setup, materials.tokenizer, materials.base_commit, emit)
    monitor = Monitor(emit, Progress(), config.training, run_dir, evaluates=True)
    trainer = objectives.build_trainer(config, config.training, setup, materials, started, monitor, run_dir, emit)
    return trainer, materials


def loss_and_gradients(trainer: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.train()
    trainer.model.zero_grad(set_to_none=True)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    gradients = {
        name.replace(".default", ""): parameter.grad.clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None and ".ref." not in name
    }
    return float(loss.detach()), gradients


def moved(model: Any) -> None:
    """Give the trained adapter weights of its own, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and ".ref." not in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def assert_close_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and ours
    norm = math.sqrt(sum(float(g.square().sum()) for g in theirs.values()))
    apart = math.sqrt(sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs))
    assert norm > 1e-4 and apart <= 1e-5 * norm


def trl_trainer(kind: str, base: Path, rows: list[dict[str, Any]], run_dir: Path, **settings: Any) -> Any:
    """TRL's own trainer on raw conversations: it renders, tokenizes, masks and collates by itself."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    loader = AutoModelForSequenceClassification if kind == "Reward" else AutoModelForCausalLM
    extra = {"num_labels": 1} if kind == "Reward" else {}
    model = loader.from_pretrained(base, dtype=torch.float32, **extra)
    task = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if kind == "Reward" else {"task_type": "CAUSAL_LM"}
    model = get_peft_model(
        model,
        LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], **task),  # type: ignore[arg-type]
    )
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(run_dir),
        per_device_train_batch_size=len(rows),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        max_length=None,
        **settings,
    )
    return getattr(trl, f"{kind}Trainer")(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


# --- equality with the field ------------------------------------------------------------------------------

SAME = {
    "method__target_modules": ["q_proj", "v_proj"],
    "method__dropout": 0.0,
    "data__eval_fraction": 0.0,
    "training__batch_size": 8,
}


def copied_weights(source: Any, target: Any) -> None:
    """TRL's adapter (and score head) takes the weights of ours, so that both start alike."""
    held = {name: parameter for name, parameter in source.named_parameters() if parameter.requires_grad and ".ref." not in name}
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if name in held:
                parameter.copy_(held[name])


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "robust", "apo_zero", "sigmoid_norm"])
def test_dpo_equals_trl_on_raw_conversations(bench: Bench, tmp_path: Path, loss: str) -> None:
    smoothing = 0.1 if loss == "robust" else 0.0
    config = config_of(bench, "dpo", **SAME, preference__loss=loss, preference__label_smoothing=smoothing, preference__beta=0.3)
    ours, materials = ready_trainer(config, tmp_path / "ours", bench)
    theirs = trl_trainer("DPO", bench.base, pairs(8), tmp_path, loss_type=[loss], beta=0.3, label_smoothing=smoothing)
    moved(ours.model)
    copied_weights(ours.model, theirs.model)
    mine = ours.data_collator([materials.prepared.train[i] for i in range(8)])
    mine.pop("row_ids")
    raw = theirs.data_collator([theirs.train_dataset[i] for i in range(8)])
    # The template writes a line break behind the turn's end: TRL has the model learn it, our labels do not.
    newline = materials.tokenizer.convert_tokens_to_ids("Ċ")
    raw["completion_mask"][raw["input_ids"] == newline] = 0
    loss_a, gradients_a = loss_and_gradients(ours, mine)
    loss_b, gradients_b = loss_and_gradients(theirs, raw)
    assert abs(loss_a - loss_b) <= 1e-5 * max(abs(loss_b), 1)
    assert_close_gradients(gradients_a, gradients_b)


def test_kto_equals_trl_on_raw_conversations(bench: Bench, tmp_path: Path) -> None:
    config = config_of(bench, "kto", **SAME, preference__beta=0.3, preference__desirable_weight=1.2)
    ours, materials = ready_trainer(config, tmp_path / "ours", bench)
    theirs = trl_trainer("KTO", bench.base, rated(8), tmp_path, beta=0.3, desirable_weight=1.2)
    moved(ours.model)
    copied_weights(ours.model, theirs.model)
    mine = ours.data_collator([materials.prepared.train[i] for i in range(8)])
    mine.pop("row_ids")
    raw = theirs.data_collator([theirs.train_dataset[i] for i in range(8)])
    newline = materials.tokenizer.convert_tokens_to_ids("Ċ")
    for prefix in ("", "KL_"):
        raw[f"{prefix}completion_mask"][raw[f"{prefix}input_ids"] == newline] = 0
    loss_a, gradients_a = loss_and_gradients(ours, mine)
    loss_b, gradients_b = loss_and_gradients(theirs, raw)
    assert abs(loss_a - loss_b) <= 1e-5
    assert_close_gradients(gradients_a, gradients_b)


def test_the_reward_model_equals_trl_on_raw_conversations(bench: Bench, tmp_path: Path) -> None:
    config = config_of(bench, "reward", **SAME, preference__center_rewards=0.01)
    ours, materials = ready_trainer(config, tmp_path / "ours", bench)
    theirs = trl_trainer("Reward", bench.base, pairs(8), tmp_path, center_rewards_coefficient=0.01)
    moved(ours.model)
    copied_weights(ours.model, theirs.model)
    mine = ours.data_collator([materials.prepared.train[i] for i in range(8)])
    mine.pop("row_ids")
    raw = theirs.data_collator([theirs.train_dataset[i] for i in range(8)])
    loss_a, gradients_a = loss_and_gradients(ours, mine)
    loss_b, gradients_b = loss_and_gradients(theirs, raw)
    assert abs(loss_a - loss_b) <= 1e-5
    assert_close_gradients(gradients_a, gradients_b)


def answer_logps(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probability and number of learned tokens of each row, from plain logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    targets, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:].double()
    tokens = torch.log_softmax(logits, dim=-1).gather(2, targets[..., None])[..., 0]
    return (tokens * mask).sum(dim=1), mask.sum(dim=1)


@pytest.mark.parametrize("objective", ["orpo", "cpo", "simpo"])
def test_objectives_without_a_reference_follow_their_papers(bench: Bench, tmp_path: Path, objective: str) -> None:
    beta, gamma = 0.4, 0.6
    config = config_of(bench, objective, **SAME, preference__beta=beta, preference__simpo_gamma=gamma)
    trainer, materials = ready_trainer(config, tmp_path / "ours", bench)
    moved(trainer.model)
    batch = trainer.data_collator([materials.prepared.train[i] for i in range(8)])
    batch.pop("row_ids")
    logps, counts = answer_logps(trainer.model, batch)
    (chosen, rejected), (n_chosen, n_rejected) = logps.chunk(2), counts.chunk(2)
    nll = -chosen.sum() / n_chosen.sum()
    if objective == "orpo":
        odds = [torch.log(p.exp() / (1 - p.exp())) for p in (chosen / n_chosen, rejected / n_rejected)]
        expected = nll - beta * torch.nn.functional.logsigmoid(odds[0] - odds[1]).mean()
    elif objective == "cpo":
        expected = nll - torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()
    else:
        expected = -torch.nn.functional.logsigmoid(beta * (chosen / n_chosen - rejected / n_rejected) - gamma).mean()
    trainer.model.zero_grad(set_to_none=True)
    expected.backward()
    wanted = {n.replace(".default", ""): p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    loss, gradients = loss_and_gradients(trainer, batch)
    assert abs(loss - float(expected.detach())) <= 1e-5 * max(abs(loss), 1)
    assert_close_gradients(gradients, wanted)


def test_dpo_follows_its_paper_with_the_adapter_off_as_reference(bench: Bench, tmp_path: Path) -> None:
    config = config_of(bench, "dpo", **SAME, preference__beta=0.2)
    trainer, materials = ready_trainer(config, tmp_path / "ours", bench)
    assert list(trainer.model.peft_config) == ["default"]  # no second copy of anything
    batch = trainer.data_collator([materials.prepared.train[i] for i in range(8)])
    batch.pop("row_ids")
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(math.log(2), abs=1e-6)
    moved(trainer.model)
    with torch.no_grad():
        policy, _ = answer_logps(trainer.model, batch)
        with trainer.model.disable_adapter():
            reference, _ = answer_logps(trainer.model, batch)
    chosen, rejected = (policy - reference).chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.2 * (chosen - rejected)).mean()
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(float(expected), abs=1e-5)


# --- whole runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [*PAIRED, "kto"])
def test_a_run_learns_what_is_preferred(bench: Bench, objective: str) -> None:
    beta = {"simpo": 2.0, "orpo": 8.0}.get(objective, 0.1)
    settings = {"training__epochs": 6, "training__learning_rate": 0.02, "preference__beta": beta, "preference__cpo_alpha": 0.0}
    result = bench.train(config_of(bench, objective, **settings))
    assert result.status == "succeeded"
    margins = [line["eval_margin"] for line in metric_lines(result.run_dir / "events.jsonl", "eval")]
    assert margins[-1] > margins[0] + 0.05, margins
    named = {"reward": "margin", "kto": "kl"}.get(objective, "logp_chosen")
    assert all(named in line for line in result.metrics["metrics_curve"])
    assert result.metrics["eval_metrics"]["eval_loss"] == result.metrics["eval_loss"]
    if objective not in ("kto", "cpo"):  # kto has no pairs; cpo compares sums, in which a longer answer starts far behind
        assert result.metrics["eval_metrics"]["eval_accuracy"] >= 0.8
    (manifest,) = [json.loads((result.run_dir / "data" / "manifest.json").read_text())]
    assert manifest["train_examples"] > 0 and (result.run_dir / "adapter" / "adapter_model.safetensors").is_file()


def figures(run_dir: Path) -> list[Any]:
    """All log and evaluation lines without their times."""
    path = run_dir / "events.jsonl"
    free = (
        "seq",
        "time",
        "tokens_per_second",
        "seconds_per_step",
        "eta_seconds",
        "data_wait_share",
        "memory_bytes",
        "peak_memory_bytes",
    )
    return [{k: v for k, v in line.items() if k not in free} for kind in ("log", "eval") for line in metric_lines(path, kind)]


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo", "reward"])
def test_a_killed_run_resumes_to_the_same_weights_and_lines(bench: Bench, objective: str) -> None:
    config_of(bench, objective)
    settings = {"training__objective": objective, "training__gradient_accumulation": 1, "training__batch_size": 4}
    straight = bench.train(**settings).run_dir
    resumed = bench.interrupted(at("log", step=6), **settings)
    bench.resume(resumed)
    assert figures(straight) == figures(resumed) and len(figures(straight)) > 3
    assert weights(straight) == weights(resumed) and weights(straight)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_cached_reference_gives_the_loss_of_the_live_one_and_is_computed_once(bench: Bench, kind: str) -> None:
    config_of(bench, "dpo")
    settings = {"training__objective": "dpo", "method__kind": kind}
    live = bench.train(**settings).run_dir
    cached = bench.train(**settings, preference__reference="cached").run_dir
    assert [e for e in bench.events if e["event"] == "phase" and e["name"] == "reference"]
    for one, two in zip(figures(live), figures(cached), strict=True):
        key = "loss" if "loss" in one else "eval_loss"
        assert one[key] == pytest.approx(two[key], abs=1e-5)
    bench.train(**settings, preference__reference="cached")
    assert not [e for e in bench.events if e["event"] == "phase" and e["name"] == "reference"]


def test_full_fine_tuning_is_measured_against_a_frozen_copy(bench: Bench, tmp_path: Path) -> None:
    config = config_of(bench, "dpo", method__kind="full", training__learning_rate=1e-4, preference__beta=0.3)
    trainer, materials = ready_trainer(config, tmp_path / "ours", bench)
    batch = trainer.data_collator([materials.prepared.train[i] for i in range(4)])
    batch.pop("row_ids")
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(math.log(2), abs=1e-6)
    moved(trainer.model)
    assert trainer.compute_loss(trainer.model, dict(batch)).item() != pytest.approx(math.log(2), abs=1e-3)
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())


def test_a_frozen_copy_that_was_asked_for_the_last_time_holds_no_memory(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Started] = []
    original = start_model

    def noted(*arguments: Any) -> Started:
        made.append(original(*arguments))
        return made[0]

    config = config_of(bench, "dpo", method__kind="full", preference__reference="cached")
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "start_model", noted)
        trainer, _ = ready_trainer(config, tmp_path / "ours", bench)
    assert trainer.ref_model is None and made[0].reference is not None
    assert all(parameter.is_meta for parameter in made[0].reference.parameters())
    assert not any(parameter.is_meta for parameter in trainer.model.parameters())


def test_a_loss_that_is_not_finite_names_the_pairs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetuneflow.training.preference import ORPO

    config = config_of(bench, "orpo")
    monkeypatch.setattr(
        ORPO, "objective", lambda self, chosen, *_: (chosen.sum() * float("nan"), chosen.detach(), chosen.detach())
    )
    with pytest.raises(FineTuneFlowError) as caught:
        bench.train(config)
    assert caught.value.code == "TRAINING_NON_FINITE" and str(bench.data) in (caught.value.where or "")


# --- where a run starts from ------------------------------------------------------------------------------


@pytest.fixture
def tuned(bench: Bench) -> Path:
    """A finished supervised run whose adapter later runs start from."""
    from training.workbench import sums

    write_rows(bench.data, sums(24))
    return bench.train(name="sft", training__max_steps=8, training__learning_rate=0.02).run_dir


def answers_logits(run_dir: Path) -> torch.Tensor:
    from finetuneflow.inference import load_generator

    generator = load_generator(run_dir, dtype="fp32")
    with generator.ready() as model:
        return model(input_ids=torch.tensor([[5, 17, 40, 99, 7, 300]])).logits.clone()


def test_a_continued_adapter_is_its_own_reference(bench: Bench, tuned: Path, tmp_path: Path) -> None:
    config = config_of(bench, "dpo", model__adapter=str(tuned), data__eval_fraction=0.0)
    trainer, materials = ready_trainer(config, tmp_path / "ours", bench)
    assert sorted(trainer.model.peft_config) == ["default", "ref"]
    batch = trainer.data_collator([materials.prepared.train[i] for i in range(4)])
    batch.pop("row_ids")
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(math.log(2), abs=1e-6)
    with torch.no_grad():
        policy, _ = answer_logps(trainer.model, batch)
        with trainer.model.disable_adapter():
            base, _ = answer_logps(trainer.model, batch)
    assert (policy - base).abs().max() > 0.05  # the reference is the tuned model, not the base
    assert trainer.model.active_adapter == "default"


@pytest.mark.parametrize("start", ["continue", "merge", "stack"])
def test_each_start_ends_as_a_model_that_answers_alone(bench: Bench, tuned: Path, start: str) -> None:
    before = answers_logits(tuned)
    # No step that moves anything: what comes out must answer as what was started from.
    settings = {"training__max_steps": 1, "training__learning_rate": 1e-12, "training__weight_decay": 0.0}
    run = bench.train(config_of(bench, "dpo", model__adapter=str(tuned), model__adapter_start=start, **settings)).run_dir
    assert torch.allclose(answers_logits(run), before, atol=2e-4)
    assert not torch.allclose(answers_logits(run), bare_logits(bench), atol=2e-2)


def bare_logits(bench: Bench) -> torch.Tensor:
    from finetuneflow.inference import load_generator

    with load_generator(bench.base, dtype="fp32").ready() as model:
        return model(input_ids=torch.tensor([[5, 17, 40, 99, 7, 300]])).logits.clone()


def test_a_stacked_adapter_holds_both(bench: Bench, tuned: Path) -> None:
    """Trained on: the sum on the original base answers as the two of them did in training."""
    from finetuneflow.models.adapters import load_adapters, merge_into
    from finetuneflow.models.load import load_base

    settings = {"training__max_steps": 4, "training__learning_rate": 0.02, "training__save_steps": 4, "method__r": 4}
    run = bench.train(
        config_of(bench, "dpo", model__adapter=str(tuned), model__adapter_start="stack", training__load_best=False, **settings)
    ).run_dir
    merged = merge_into(load_base(str(bench.base), dtype="fp32").model, tuned / "adapter")
    both = load_adapters(merged, {"upper": run / "checkpoints" / "step-000004"}).eval()
    with torch.no_grad():
        expected = both(input_ids=torch.tensor([[5, 17, 40, 99, 7, 300]])).logits
    assert torch.allclose(answers_logits(run), expected, atol=1e-5)


def test_a_stacked_adapter_of_other_layers_and_scalings(bench: Bench, tuned: Path) -> None:
    from finetuneflow.models.adapters import load_adapters, merge_into
    from finetuneflow.models.load import load_base

    settings = {
        "training__max_steps": 4,
        "training__learning_rate": 0.02,
        "training__save_steps": 4,
        "training__load_best": False,
    }
    shape = {"method__r": 4, "method__alpha": 3, "method__rslora": True, "method__target_modules": ["o_proj", "v_proj"]}
    run = bench.train(
        config_of(bench, "orpo", model__adapter=str(tuned), model__adapter_start="stack", **settings, **shape)
    ).run_dir
    merged = merge_into(load_base(str(bench.base), dtype="fp32").model, tuned / "adapter")
    both = load_adapters(merged, {"upper": run / "checkpoints" / "step-000004"}).eval()
    with torch.no_grad():
        expected = both(input_ids=torch.tensor([[5, 17, 40, 99, 7, 300]])).logits
    assert torch.allclose(answers_logits(run), expected, atol=1e-5)


def test_a_reward_model_starts_from_the_adapter_that_answers(bench: Bench, tuned: Path, tmp_path: Path) -> None:
    config = config_of(bench, "reward", model__adapter=str(tuned))
    trainer, _ = ready_trainer(config, tmp_path / "ours", bench)
    from safetensors.torch import load_file

    saved = load_file(tuned / "adapter" / "adapter_model.safetensors")
    held = {name.replace(".default", ""): p for name, p in trainer.model.named_parameters() if "lora_" in name}
    assert saved.keys() == held.keys()
    assert all(torch.equal(held[name], saved[name]) for name in saved)
    assert any("score" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


def test_settings_reach_trl(bench: Bench, tmp_path: Path) -> None:
    settings = Preference(beta=0.25, label_smoothing=0.05)
    config = config_of(bench, "dpo", preference__beta=0.25, preference__label_smoothing=0.05, **SAME)
    trainer, _ = ready_trainer(config, tmp_path / "ours", bench)
    assert (trainer.beta, trainer.label_smoothing, trainer.loss_types) == (settings.beta, settings.label_smoothing, ["sigmoid"])
    assert isinstance(Started(trainer.model), Started) and trainer.args.gradient_checkpointing is False


@pytest.mark.parametrize(("kind", "target"), [("lora", "adapter"), ("lora", "merged"), ("full", "merged")])
def test_a_reward_model_is_exported_and_evaluated(bench: Bench, kind: str, target: str) -> None:
    from finetuneflow.evaluation.measure import evaluate
    from finetuneflow.evaluation.reward_model import load_reward_model
    from finetuneflow.export import export
    from finetuneflow.inference import load_generator

    rate = 0.01 if kind == "lora" else 1e-4
    settings = {"training__epochs": 4, "training__learning_rate": rate, "method__kind": kind}
    run = bench.train(config_of(bench, "reward", **settings)).run_dir
    result = export(run, to=target)  # type: ignore[arg-type]
    assert result.check.passed and result.check.prompts > 6
    if target == "merged":
        assert load_reward_model(result.dir).max_length > 0
    figures = evaluate(run).preferences
    assert (figures is not None and figures.by == "reward" and figures.pairs == 4) or figures.pairs == 5
    assert 0 <= figures.accuracy_low <= figures.accuracy <= figures.accuracy_high <= 1
    with pytest.raises(FineTuneFlowError) as caught:
        load_generator(run)
    assert caught.value.code == "MODEL_SCORES_ONLY"


def test_an_export_of_other_scores_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetuneflow.export import export, scoring

    run = bench.train(config_of(bench, "reward", training__epochs=1)).run_dir
    write = scoring._write_whole

    def spoiled(record: Any, source: Path, stage: Path, stored: str) -> int:
        from safetensors.torch import load_file, save_file

        matrices = write(record, source, stage, stored)
        tensors = load_file(stage / "model.safetensors")
        tensors["score.weight"] = -tensors["score.weight"]
        save_file(tensors, stage / "model.safetensors", metadata={"format": "pt"})
        return matrices

    monkeypatch.setattr(scoring, "_write_whole", spoiled)
    with pytest.raises(FineTuneFlowError) as caught:
        export(run, to="merged")
    assert caught.value.code == "EXPORT_CHECK_FAILED" and not (run / "exports" / "merged").exists()


def test_an_answering_model_is_measured_on_pairs(bench: Bench) -> None:
    from finetuneflow.evaluation.measure import evaluate

    run = bench.train(config_of(bench, "dpo", training__epochs=6, training__learning_rate=0.02)).run_dir
    figures = evaluate(run).preferences
    assert figures is not None and figures.by == "log-probability per token" and figures.accuracy == 1.0
    assert figures.accuracy_of_sums is not None and figures.accuracy_of_sums < 1.0  # the longer answers start far behind
    saved = json.loads((run / "evals" / "evaluation.json").read_text())
    assert saved["preferences"]["pairs"] == figures.pairs and saved["losses"]["eval_loss"] > 0
