"""Comparisons: the same prompts for both, wins as counted by hand, a verdict that follows its rule."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.asking import PROMPTS, chat, naive_greedy, tiny_generator
from export.run_dir import make_run
from finetuneflow.data.examples import Example, Message, Place
from finetuneflow.errors import EvaluationError
from finetuneflow.evaluation.compare import GENERAL_TEXT, compare, compare_suites, measure_forgetting, measure_pairs
from finetuneflow.evaluation.questions import fitting, questions, read_examples
from finetuneflow.evaluation.suite import SuiteItem, SuiteResult, parse_suite, run_suite
from finetuneflow.inference import load_generator


def result(*passed: bool, prompt: str = "Q") -> SuiteResult:
    return SuiteResult("s", tuple(SuiteItem(f"p{i}", (), prompt, "A", True, p, ()) for i, p in enumerate(passed)))


# --- numbers ------------------------------------------------------------------------------------


def test_wins_ties_and_losses_are_those_of_b() -> None:
    measure = measure_pairs("f1", [0.0, 0.5, 1.0, 0.2], [1.0, 0.5, 0.0, 0.3])
    assert (measure.wins, measure.ties, measure.losses) == (2, 1, 1)
    assert measure.difference.mean == pytest.approx(0.025)
    lower_is_better = measure_pairs("loss", [2.0, 2.0, 1.0], [1.0, 2.0005, 3.0], higher_is_better=False, tie_within=1e-3)
    assert (lower_is_better.wins, lower_is_better.ties, lower_is_better.losses) == (1, 1, 1)
    assert lower_is_better.difference.mean == pytest.approx((1.0 - 0.0005 - 2.0) / 3)


def test_the_verdict_turns_round_when_the_two_are_exchanged() -> None:
    a, b = [float(i % 5 == 0) for i in range(60)], [float(i % 5 != 1) for i in range(60)]
    assert measure_pairs("pass", a, b).verdict == "better"
    assert measure_pairs("pass", b, a).verdict == "worse"
    assert measure_pairs("pass", a, a).verdict == "no evidence"


def test_saved_suite_results_are_compared_and_others_refused() -> None:
    compared = compare_suites(result(*[False] * 9, True), result(*[True] * 9, True), names=("base", "tuned"))
    assert (compared.verdict, compared.measures[0].wins, compared.measures[0].ties) == ("better", 9, 1)
    assert "tuned is better than base" in compared.sentence()
    assert [item.outcome for item in compared.items] == ["win"] * 9 + ["tie"]
    with pytest.raises(EvaluationError, match="same prompts"):
        compare_suites(result(True), result(True, prompt="another"))
    with pytest.raises(EvaluationError):
        measure_pairs("pass", [], [])


# --- models -------------------------------------------------------------------------------------


def learned(generator: Any, count: int) -> list[Example]:
    """Questions whose expected answers are what this very model says: nobody can do better."""
    asked = [f"{prompt[0].content} {i}" for i, prompt in enumerate((PROMPTS * 3)[:count])]
    return [chat(question, _says(generator, question), i) for i, question in enumerate(asked)]


def _says(generator: Any, question: str) -> str:
    ids = naive_greedy(generator.model, generator.prompt_ids((Message("user", question),)), 12)
    return str(generator.tokenizer.decode(ids, skip_special_tokens=True).strip()) or "x"


def test_the_model_that_wrote_the_answers_is_found_better_than_another() -> None:
    author, other = tiny_generator(scale=2.0), tiny_generator(scale=2.0, seed=1)
    compared = compare(other, author, learned(author, 12), names=("other", "author"), max_new_tokens=12)
    assert compared.verdict == "better"
    assert [m.name for m in compared.measures] == ["loss", "token_f1", "exact"]
    loss = compared.measures[0]
    assert loss.wins >= 10 and loss.a > loss.b and not loss.higher_is_better
    assert json.loads(json.dumps(compared.to_dict()))["verdict"] == "better"


def test_the_loss_of_an_expected_answer_equals_a_loop_over_its_tokens() -> None:
    a, b = tiny_generator(), tiny_generator(seed=1)
    compared = compare(a, b, [chat("What is 3 + 4?", "It is 7.")], max_new_tokens=2, general_text=None)
    prompt = list(a.prompt_ids((Message("user", "What is 3 + 4?"),)))
    answer = a.tokenizer("It is 7.", add_special_tokens=False)["input_ids"] + [a.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    with torch.no_grad():
        log_likelihood = torch.log_softmax(a.model(input_ids=torch.tensor([prompt + answer])).logits[0], dim=-1)
    nll = [-float(log_likelihood[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]
    assert compared.items[0].a["loss"] == pytest.approx(sum(nll) / len(nll), rel=1e-4)
    assert compared.measures[0].unit == "nats per token"


def test_a_model_against_itself_ties_on_every_item() -> None:
    generator = tiny_generator()
    compared = compare(generator, generator, [chat(p[0].content, "It is 7.", i) for i, p in enumerate(PROMPTS)], max_new_tokens=4)
    assert all(m.ties == len(PROMPTS) and m.verdict == "no evidence" and m.sign_test_p == 1.0 for m in compared.measures)
    assert compared.forgetting is not None and compared.forgetting.loss_change == 0.0


def test_base_and_tuned_on_one_set_of_weights_equal_two_separate_models(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    examples = [chat(p[0].content, "It is 7.", i) for i, p in enumerate(PROMPTS)]
    tuned = load_generator(run, dtype="fp32")
    shared = compare(tuned.view(None), tuned, examples, max_new_tokens=4)
    separate = compare(
        load_generator(run, adapter=False, dtype="fp32"), load_generator(run, dtype="fp32"), examples, max_new_tokens=4
    )
    assert shared.items == separate.items and shared.forgetting == separate.forgetting
    assert shared.items[0].a["loss"] != shared.items[0].b["loss"]


def test_a_suite_is_asked_of_both_with_its_own_limit() -> None:
    prompts = [
        {"id": str(i), "messages": [{"role": "user", "content": p[0].content}], "check": {"regex": "."}, "must_stop": False}
        for i, p in enumerate(PROMPTS)
    ]
    suite = parse_suite({"version": 1, "name": "s", "max_new_tokens": 3, "prompts": prompts})
    a, b = tiny_generator(), tiny_generator(seed=1)
    compared = compare(a, b, suite, general_text=None)
    assert [item.b_answer for item in compared.items] == [item.answer for item in run_suite(b, suite).items]
    assert compared.decoding == {"suite": "s", "max_new_tokens": 3, "temperature": 0.0}


def test_perplexity_on_the_general_text_equals_a_direct_computation(tmp_path: Path) -> None:
    text = GENERAL_TEXT.read_text(encoding="utf-8")[:600]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    a, b = tiny_generator(), tiny_generator(seed=1)
    forgetting = measure_forgetting(a, b, tmp_path / "text.txt")
    ids = torch.tensor([a.tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        loss = float(a.model(input_ids=ids, labels=ids).loss)
    assert forgetting.a_perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    assert forgetting.a_bits_per_byte == pytest.approx(loss * (ids.shape[1] - 1) / math.log(2) / len(text.encode()), rel=1e-4)


def test_the_general_text_is_two_to_three_kilobytes_of_english_and_french() -> None:
    text = GENERAL_TEXT.read_text(encoding="utf-8")
    assert 2000 <= len(text.encode()) <= 3500
    assert "the" in text.split() and "les" in text.split()


# --- questions ----------------------------------------------------------------------------------


def test_a_question_is_the_conversation_before_its_last_answer_with_text(tmp_path: Path) -> None:
    lines = [
        {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
            ]
        },
        {"instruction": "add", "input": "1 2", "output": "3"},
        {"text": "a document"},
        {"messages": [{"role": "bot", "content": "?"}]},
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    examples, problems = read_examples([tmp_path / "d.jsonl"])
    asked = questions(examples)
    assert [(len(q.prompt), q.expected) for q in asked] == [(2, "b"), (1, "3")]
    assert len(problems) == 1
    assert len(questions(examples, limit=1)) == 1


def test_files_without_a_usable_example_are_an_error_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"messages": [{"role": "bot", "content": "?"}]}\n')
    with pytest.raises(EvaluationError, match=r"d\.jsonl.*1 rows were rejected"):
        read_examples([tmp_path / "d.jsonl"])


def test_an_example_too_long_for_either_model_is_left_out_for_both_and_counted() -> None:
    generator = tiny_generator("gpt2")
    long = chat("été " * 600, "no", 1)
    kept, left_out = fitting(questions([chat("a", "b"), long]), [generator, tiny_generator()])
    assert [q.expected for q in kept] == ["b"] and len(left_out) == 1
    assert (
        compare(generator, tiny_generator(), [chat("a", "b"), long], max_new_tokens=2, general_text=None).decoding["left_out"]
        == 1
    )
    with pytest.raises(EvaluationError):
        compare(generator, generator, [Example("text", Place("t", 0), "text", text="x")], general_text=None)
