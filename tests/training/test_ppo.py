"""The loop of PPO: what it draws, what it learns, what stops it, and that a resumed run goes on bit for bit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuneflow.data.examples import Message
from finetuneflow.errors import EvaluationError, TrainingError
from finetuneflow.evaluation.rewards import Drawn, Reward
from finetuneflow.events import metric_lines
from finetuneflow.inference import Decoding, Ending, load_generator
from finetuneflow.models.adapters import TRAINED, AdapterSpec, load_adapters
from finetuneflow.models.load import load_base
from finetuneflow.training import checkpoints
from finetuneflow.training.ppo import DRAWN_TOGETHER, minibatches
from finetuneflow.training.ppo_draw import draw, through_end
from finetuneflow.training.watch import METRICS
from training.ppo_bench import ARMS, END, QUESTIONS, PpoBench, arm_probabilities, even_tokens, paid, state_of, teach_arms, tiny
from training.workbench import Bench, Killed, at, caused_by, dies

HEAD = AdapterSpec(r=8, dropout=0.2, target_modules="all-linear", modules_to_save=["lm_head"])
BANDIT: dict[str, Any] = {
    "training__batch_size": 64,
    "training__gradient_accumulation": 1,
    "training__log_steps": 1,
    "training__eval_steps": 100,
    "training__save_steps": 100,
    "reinforcement__rollout_size": 64,
    "reinforcement__max_new_tokens": 1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("ppo") / "base")


@pytest.fixture
def ppo(tmp_path: Path, base: Path) -> PpoBench:
    return PpoBench(tmp_path, base)


def logged(ppo: PpoBench, name: str = "run") -> list[dict[str, float]]:
    """The figures of all log lines."""
    return [line["metrics"] for line in metric_lines(ppo.root / name / "events.jsonl")]


# --- what it learns: toys whose optimum is known ----------------------------------------------------------


def test_the_best_of_several_arms_is_found_for_each_question(tmp_path: Path) -> None:
    questions = QUESTIONS[:3]
    best = {question: ARMS[2 * number + 1] for number, question in enumerate(questions)}

    def scorer(drawn: Drawn) -> list[float]:
        return [float(ids[0] == best[prompt[0]["content"]]) for prompt, ids in zip(drawn.prompts, drawn.ids, strict=True)]

    ppo = PpoBench(tmp_path, teach_arms(tiny(tmp_path / "base"), questions), None, questions, [Reward("best arm", 1.0, scorer)])
    ppo.train(training__max_steps=30, reinforcement__kl_coefficient=0.0, **BANDIT)
    figures = logged(ppo)
    assert figures[0]["reward"] < 0.3, "nobody told it which arm is which"
    for row in ppo.trainer.prepared.train:
        probabilities = arm_probabilities(ppo.trainer.model, row["input_ids"])
        wanted = best[questions[row["index"]]]
        assert float(probabilities[ARMS.index(wanted)]) >= 0.95


@pytest.mark.parametrize("coefficient", [0.3, 2.0])
def test_with_a_divergence_term_the_optimum_is_the_tilted_reference(tmp_path: Path, coefficient: float) -> None:
    """max E[r] - b KL(p || ref) has the solution p ~ ref exp(r / b): with a large b the policy stays near the reference."""
    pay = torch.tensor([0.0, 0.2, 0.9, 0.4, 1.0, 0.1, 0.6, 0.3], dtype=torch.float64)
    reward = paid(lambda ids: float(pay[ARMS.index(ids[0])]) if ids[0] in ARMS else 0.0)
    ppo = PpoBench(tmp_path, teach_arms(tiny(tmp_path / "base"), QUESTIONS[:1]), HEAD, QUESTIONS[:1] * 4, [reward])
    ppo.train(training__max_steps=25, reinforcement__kl_coefficient=coefficient, reinforcement__update_epochs=3, **BANDIT)
    prompt = ppo.trainer.prepared.train[0]["input_ids"]
    reference, policy = arm_probabilities(ppo.model()[0], prompt), arm_probabilities(ppo.trainer.model, prompt)
    optimum = reference * torch.exp(pay / coefficient)
    optimum *= reference.sum() / optimum.sum()
    assert float((policy - optimum).abs().sum()) / 2 < 0.03
    assert float((reference - optimum).abs().sum()) / 2 > 0.07, "it had some way to go"
    assert (logged(ppo)[-1]["kl"] < 0.1) == (coefficient == 2.0)


def test_answers_learn_to_end_where_that_is_paid(tmp_path: Path) -> None:
    arms = (END, *ARMS)
    base = teach_arms(tiny(tmp_path / "base"), QUESTIONS[:2], arms=arms)
    ppo = PpoBench(tmp_path, base, HEAD, QUESTIONS[:2], [paid(lambda ids: -len(ids) / 6)])
    settings = {**BANDIT, "reinforcement__max_new_tokens": 6, "reinforcement__rollout_size": 32}
    ppo.train(training__max_steps=15, training__learning_rate=0.02, **settings)
    first, last = logged(ppo)[0], logged(ppo)[-1]
    assert first["response_length"] > 3 and first["ended_share"] < 0.8
    assert last["response_length"] < 1.2 and last["ended_share"] == 1.0


@pytest.mark.parametrize(("kind", "share"), [("lora", 0.9), ("full", 0.2)])
def test_the_value_learns_what_a_question_is_worth(ppo: PpoBench, kind: str, share: float) -> None:
    """What is paid depends on the question alone: all of its variance can be explained before the answer is drawn.

    An adapter of the value's own finds nearly all of it; a linear head on states that the policy's updates move, some.
    """

    def scorer(drawn: Drawn) -> list[float]:
        return [float(QUESTIONS.index(prompt[0]["content"]) % 2) for prompt in drawn.prompts]

    ppo.spec = None if kind == "full" else AdapterSpec(r=8, target_modules="all-linear")
    ppo.rewards = [Reward("parity", 1.0, scorer)]
    quick = {**BANDIT, "reinforcement__rollout_size": 24, "reinforcement__max_new_tokens": 3, "reinforcement__update_epochs": 6}
    ppo.train(training__max_steps=14, reinforcement__kl_coefficient=0.0, reinforcement__value_coefficient=1.0, **quick)
    explained = [line["value_explained_variance"] for line in logged(ppo)]
    assert explained[0] == 0.0, "its first estimates are all 0"
    assert sum(explained[-5:]) / 5 > share


# --- an iteration ---------------------------------------------------------------------------------------------


def test_the_ratio_is_exactly_one_before_the_first_update(ppo: PpoBench) -> None:
    """With dropout in the adapter, answers of all lengths, several micro-batches and in every iteration."""
    ppo.train(training__log_steps=1)
    assert [line["first_ratio_error"] for line in logged(ppo)] == [0.0] * 6
    assert all(line["ratio_max"] > 1 for line in logged(ppo)), "later minibatches are no longer at the start"


def test_the_log_line_has_the_figures_that_the_watch_reads(ppo: PpoBench) -> None:
    ppo.train(training__log_steps=1, reinforcement__max_new_tokens=24)
    wanted = {
        "reward",
        "reward_std",
        "kl",
        "kl_coefficient",
        "entropy",
        "clip_fraction",
        "approx_kl",
        "policy_loss",
        "value_loss",
    }
    wanted |= {"value_explained_variance", "response_length", "ended_share", "ratio_mean", "ratio_max", "first_ratio_error"}
    assert wanted <= logged(ppo)[-1].keys()
    assert wanted - {"ratio_mean", "ratio_max", "first_ratio_error"} <= METRICS.keys()
    (first, *_) = metric_lines(ppo.root / "run" / "events.jsonl")
    assert math.isfinite(first["loss"]) and first["grad_norm"] > 0 and first["tokens_seen"] > 8 * 10


def test_the_base_is_untouched_bit_for_bit(ppo: PpoBench) -> None:
    before = state_of(ppo.model()[0])
    ppo.train()
    after = state_of(ppo.trainer.model)
    assert after.keys() == before.keys()
    changed = {name for name in before if after[name] != before[name]}
    assert changed and all("lora_" in name and f".{TRAINED}." in name for name in changed)


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_other_adapters_train_too(ppo: PpoBench, kind: Any) -> None:
    ppo.spec = AdapterSpec(kind=kind, r=4)
    before = state_of(ppo.model()[0])
    ppo.train(training__max_steps=2)
    assert state_of(ppo.trainer.model) != before


def test_how_a_minibatch_is_cut_does_not_change_what_is_learned(ppo: PpoBench) -> None:
    """Losses are means over the tokens of the whole minibatch; the tolerance is that of sums in another order."""
    found = []
    for size, accumulation in ((4, 1), (1, 4), (3, 2)):
        cut = {"training__batch_size": size, "training__gradient_accumulation": accumulation}
        if size == 3:  # a minibatch of 6 is another one
            cut["reinforcement__rollout_size"] = 6
        ppo.train(f"cut {size}", training__max_steps=2, reinforcement__max_new_tokens=12, **cut)
        found.append(torch.cat([p.detach().flatten() for p in ppo.trainer.actors.policy_parameters]))
    assert float((found[0] - found[1]).abs().max()) < 1e-4
    assert float((found[0] - found[2]).abs().max()) > 1e-3


def test_an_answer_does_not_depend_on_what_is_drawn_beside_it(ppo: PpoBench) -> None:
    trainer = ppo.build()
    prompts = [list(row["input_ids"]) for row in trainer.prepared.train]
    keys, decoding = [(3, place) for place in range(len(prompts))], Decoding(8, 1.0, 1.0, seed=5)
    together = draw(trainer.generator, trainer.actors, prompts, keys, decoding, together=6)
    alone = [
        draw(trainer.generator, trainer.actors, [p], [k], decoding, together=1)[0] for p, k in zip(prompts, keys, strict=True)
    ]
    assert together == alone
    again = draw(trainer.generator, trainer.actors, prompts, [(4, place) for place in range(6)], decoding, together=6)
    assert [a.ids for a in again] != [a.ids for a in together]


def test_the_same_prompt_twice_in_an_iteration_gets_two_answers(ppo: PpoBench) -> None:
    trainer = ppo.build()
    prompt = list(trainer.prepared.train[0]["input_ids"])
    first, second = draw(trainer.generator, trainer.actors, [prompt] * 2, [(1, 0), (1, 1)], trainer.decoding, together=2)
    assert first.ids != second.ids


def test_every_prompt_is_drawn_equally_often_and_in_a_new_order(ppo: PpoBench) -> None:
    trainer = ppo.build(reinforcement__rollout_size=4)
    drawn = [trainer._rows(step) for step in range(1, 10)]
    flat = [row for rows in drawn for row in rows]
    epochs = [flat[i : i + 6] for i in range(0, 36, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs) and len(set(map(tuple, epochs))) > 3
    assert ppo.build(reinforcement__rollout_size=4)._rows(7) == drawn[6], "whatever came before"


def test_minibatches_are_a_new_permutation_in_every_pass_and_iteration() -> None:
    found = [minibatches(10, 4, seed=1, iteration=i, number=n) for i in (1, 2) for n in (0, 1)]
    assert all(
        sorted(row for rows in one for row in rows) == list(range(10)) and [len(rows) for rows in one] == [4, 4, 2]
        for one in found
    )
    assert len({str(one) for one in found}) == 4 and found[0] == minibatches(10, 4, seed=1, iteration=1, number=0)


def test_an_answer_that_did_not_end_is_paid_less(ppo: PpoBench) -> None:
    trainer = ppo.build(reinforcement__missing_end_penalty=0.5)
    rows = [trainer.prepared.train[i] for i in range(2)]
    ended, cut = through_end(trainer.generator.ending, [100, 102, END, 0]), through_end(trainer.generator.ending, [100, 102, 104])
    scores, figures = trainer._scores(rows, [ended, cut])
    assert scores.tolist() == pytest.approx([2 / 3, 1.0 - 0.5])
    assert figures["ended_share"] == 0.5 and figures["reward"] == pytest.approx((2 / 3 + 0.5) / 2)


def test_rewards_are_added_up_by_their_weights(ppo: PpoBench) -> None:
    ppo.rewards = [Reward("even", 2.0, paid(even_tokens).scorer), Reward("long", -0.5, paid(len).scorer)]
    trainer = ppo.build()
    scores, figures = trainer._scores([trainer.prepared.train[0]], [through_end(trainer.generator.ending, [100, 101, END])])
    assert scores.tolist() == pytest.approx([2.0 / 3 - 1.5])
    assert figures["reward_even"] == pytest.approx(1 / 3) and figures["reward_long"] == 3.0


class Words:
    """A tokenizer whose ids are characters."""

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("ending", "ids", "kept", "text", "ended"),
    [
        (Ending(Words(), frozenset({1})), "ab\x01\x00", "ab\x01", "ab", True),
        (Ending(Words(), frozenset({1})), "\x01", "\x01", "", True),
        (Ending(Words(), frozenset({1})), "abc", "abc", "abc", False),
        (Ending(Words(), frozenset({1}), "<>"), "ab<>c", "ab<>", "ab", True),
        (Ending(Words(), frozenset({1}), "<>"), "ab\x01<>", "ab\x01", "ab", True),
        (Ending(Words(), frozenset({1}), "<>"), " ab<", " ab<", "ab<", False),
    ],
)
def test_an_answer_is_learned_with_what_ends_it(ending: Ending, ids: str, kept: str, text: str, ended: bool) -> None:
    found = through_end(ending, [ord(sign) for sign in ids])
    assert ("".join(map(chr, found.ids)), found.text, found.ended) == (kept, text, ended)


def test_a_prompt_without_room_for_an_answer_is_refused(ppo: PpoBench) -> None:
    trainer = ppo.build()
    with pytest.raises(EvaluationError) as caught:
        draw(trainer.generator, trainer.actors, [[5] * 512], [(1, 0)], trainer.decoding, together=1)
    assert caught.value.code == "PROMPT_TOO_LONG" and "512" in caught.value.message


def test_the_learning_rate_warms_up_and_is_never_zero(ppo: PpoBench) -> None:
    ppo.train(training__max_steps=10, training__log_steps=1, training__warmup_ratio=0.3, training__scheduler="linear")
    rates = [line["learning_rate"] for line in metric_lines(ppo.root / "run" / "events.jsonl")]
    assert rates[:3] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01]) and rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(0.01 / 8)


def test_the_coefficient_is_steered_to_the_target(ppo: PpoBench) -> None:
    ppo.train(training__log_steps=1, reinforcement__kl_target=1000.0, reinforcement__kl_horizon=80)
    coefficients = [line["kl_coefficient"] for line in logged(ppo)]
    assert coefficients == pytest.approx([0.05 * (1 - 0.2 * 8 / 80) ** n for n in range(6)])


# --- evaluation -----------------------------------------------------------------------------------------------


def test_an_evaluation_is_repeatable_and_leaves_no_trace(ppo: PpoBench) -> None:
    trainer = ppo.build()
    assert trainer.evaluate() == trainer.evaluate()
    ppo.train("often", training__eval_steps=1)
    often = state_of(ppo.trainer.model)
    ppo.train("once", training__eval_steps=100)
    assert state_of(ppo.trainer.model) == often


def test_the_evaluation_loss_is_the_reward_turned_round(ppo: PpoBench) -> None:
    ppo.train(training__eval_steps=2)
    lines = metric_lines(ppo.root / "run" / "events.jsonl", "eval")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line["eval_loss"] == -line["eval_reward"] and {"eval_kl", "eval_response_length"} <= line.keys() for line in lines)
    best = min(lines, key=lambda line: line["eval_loss"])
    assert ppo.trainer.progress.best_step == best["step"]
    assert checkpoints.find_damage(ppo.root / "run" / "checkpoints" / f"step-{best['step']:06d}") is None


def test_the_best_weights_can_be_put_back_afterwards(ppo: PpoBench) -> None:
    trainer = ppo.train(training__keep_checkpoints=10)
    last, folder = state_of(trainer.model), ppo.root / "run" / "checkpoints" / "step-000002"
    trainer._load_from_checkpoint(str(folder))
    assert state_of(trainer.model) != last
    other = load_adapters(load_base(str(ppo.base), dtype="fp32", device="cpu").model, {"default": folder}).eval()
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(other(ids).logits, trainer.model(ids).logits), "the checkpoint's root is the policy's adapter"


def test_patience_ends_a_run_whose_reward_does_not_rise(ppo: PpoBench) -> None:
    ppo.rewards = [paid(lambda ids: 1.0)]
    trainer = ppo.train(training__max_steps=20, training__eval_steps=1, training__patience=2)
    assert trainer.state.global_step == 3 and trainer.monitor.stopped is None


# --- resuming ---------------------------------------------------------------------------------------------------


def outcome(ppo: PpoBench, name: str) -> tuple[Any, ...]:
    """Everything that must be the same bit for bit: log and evaluation lines, and the last checkpoint's weights."""
    path = ppo.root / name / "events.jsonl"
    timed = {
        "seq",
        "time",
        "tokens_per_second",
        "seconds_per_step",
        "eta_seconds",
        "data_wait_share",
        "memory_bytes",
        "peak_memory_bytes",
    }
    lines = [
        {key: value for key, value in line.items() if key not in timed}
        for kind in ("log", "eval")
        for line in metric_lines(path, kind)
    ]
    last = checkpoints.list_complete(ppo.root / name / "checkpoints")[-1].path
    weights = {str(file.relative_to(last)): file.read_bytes() for file in sorted(last.rglob("*.safetensors"))}
    return lines, weights, last.name


def interrupted(ppo: PpoBench, name: str, moment: Any, **settings: Any) -> None:
    try:
        ppo.train(name, sinks=[dies(moment)], **settings)
    except BaseException as error:
        assert caused_by(error, Killed)
    else:
        raise AssertionError("the run ended before the moment at which it was to be interrupted")


KINDS: dict[str, tuple[AdapterSpec | None, dict[str, Any]]] = {
    "lora": (AdapterSpec(r=4, dropout=0.2), {"reinforcement__entropy_coefficient": 0.01}),
    "lora-head": (HEAD, {"reinforcement__whiten_rewards": True}),
    "adaptive": (AdapterSpec(r=4), {"reinforcement__kl_target": 0.5, "reinforcement__kl_horizon": 20, "training__epochs": 8}),
    "full": (None, {"training__learning_rate": 1e-3}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(ppo: PpoBench, kind: str) -> None:
    ppo.spec, settings = KINDS[kind]
    ppo.train("straight", **settings)
    interrupted(ppo, "resumed", at("log", step=4), **settings)
    ppo.train("resumed", **settings)
    assert outcome(ppo, "resumed") == outcome(ppo, "straight")


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(at("log", step=3), id="log window of one step"),
        pytest.param(at("eval", step=3), id="between evaluation and its checkpoint"),
        pytest.param(at("phase", name="saving", step=4), id="during a checkpoint"),
        pytest.param(at("checkpoint", step=4), id="right after a checkpoint"),
        pytest.param(at("checkpoint", step=6), id="after the last step"),
    ],
)
def test_any_moment_of_interruption_leads_to_the_same_end(ppo: PpoBench, moment: Any) -> None:
    settings = {"training__log_steps": 3, "reinforcement__rollout_size": 5}
    ppo.train("straight", **settings)
    interrupted(ppo, "resumed", moment, **settings)
    ppo.train("resumed", **settings)
    assert outcome(ppo, "resumed") == outcome(ppo, "straight")


def test_a_stop_saves_and_changes_nothing_of_the_result(ppo: PpoBench) -> None:
    from finetuneflow.training.status import request_stop

    ppo.train("straight", training__log_steps=1)

    def stop(event: Any) -> None:
        if at("log", step=3)(event):
            request_stop(ppo.root / "stopped", save=True)

    trainer = ppo.train("stopped", sinks=[stop], training__log_steps=1)
    assert (trainer.state.global_step, trainer.monitor.stopped) == (3, "asked to stop")
    ppo.train("stopped", training__log_steps=1)
    assert outcome(ppo, "stopped") == outcome(ppo, "straight")


def test_a_reward_that_draws_at_random_goes_on_where_it_was(ppo: PpoBench) -> None:
    import random

    ppo.rewards = [paid(lambda ids: random.random())]
    random.seed(1)
    ppo.train("straight")
    random.seed(1)
    interrupted(ppo, "resumed", at("log", step=6))
    random.seed(99)
    ppo.train("resumed")
    assert outcome(ppo, "resumed") == outcome(ppo, "straight")


# --- as a run of the product ------------------------------------------------------------------------------------------


def test_a_run_answers_with_the_weights_of_any_of_its_checkpoints(bench: Bench) -> None:
    """Through run file, data, report and result; an adapter that is continued is measured against itself as it was."""
    settings = {"training__objective": "ppo", "reinforcement__reward": ["length:4", "ends"], "reinforcement__rollout_size": 8}
    settings |= {
        "reinforcement__max_new_tokens": 6,
        "training__max_steps": 4,
        "training__save_steps": 2,
        "training__log_steps": 1,
    }
    earlier = bench.train(training__max_steps=6, training__learning_rate=0.02).run_dir
    run_dir = bench.train(**settings, model__adapter=str(earlier), training__load_best=False).run_dir
    first, *_, last = metric_lines(run_dir / "events.jsonl")
    assert first["metrics"]["kl"] == 0.0 != last["metrics"]["kl"]
    answers = {}
    for checkpoint in (None, 2, 4):
        generator = load_generator(run_dir, checkpoint=checkpoint, device="cpu")
        ids = torch.tensor([list(generator.prompt_ids([Message("user", "What is 3 plus 4?")]))])
        with generator.ready() as model:
            answers[checkpoint] = model(ids).logits[0, -1]
    assert torch.equal(answers[None], answers[4]) and not torch.equal(answers[2], answers[4])


# --- what stops it ------------------------------------------------------------------------------------------------


def spoil_weight(trainer: Any) -> None:
    trainer.actors.policy_parameters[1].data.view(-1)[0] = math.nan


def spoil_gradient(trainer: Any) -> None:
    trainer.actors.value_parameters[-1].register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize(("spoil", "word"), [(spoil_weight, "loss became nan"), (spoil_gradient, "gradient norm became")])
def test_a_number_that_is_none_stops_the_run_before_the_optimizer_moves(ppo: PpoBench, spoil: Any, word: str) -> None:
    trainer = ppo.build()
    spoil(trainer)
    before = state_of(trainer.model)
    with pytest.raises(TrainingError) as caught:
        trainer._iteration(1)
    error = caught.value
    assert error.code == "TRAINING_NON_FINITE" and word in error.message and "step 1" in error.message
    assert error.where is not None and "prompts.jsonl:" in error.where and len(error.context["rows"]) == 4
    assert state_of(trainer.model) == before


def test_a_reward_that_fails_names_itself_and_the_row(ppo: PpoBench) -> None:
    ppo.rewards = [paid(lambda ids: math.nan, "odd")]
    with pytest.raises(TrainingError) as caught:
        ppo.train()
    assert (
        caught.value.code == "REWARD_FAILED" and "'odd'" in caught.value.message and "prompts.jsonl:" in str(caught.value.where)
    )


def test_out_of_memory_passes_through(ppo: PpoBench, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = ppo.build()

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.actors, "values", full)
    with pytest.raises(torch.OutOfMemoryError):
        trainer._iteration(1)


def test_answers_are_drawn_in_batches_that_shrink_with_the_micro_batch(ppo: PpoBench, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = ppo.build(training__batch_size=1, training__gradient_accumulation=4)
    sizes: Counter[int] = Counter()
    generate = trainer.model.generate
    monkeypatch.setattr(trainer.model, "generate", lambda **given: sizes.update([len(given["input_ids"])]) or generate(**given))
    trainer._iteration(1)
    assert max(sizes) == DRAWN_TOGETHER
