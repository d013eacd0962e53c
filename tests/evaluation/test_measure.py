"""`evaluate`: everything of one model in one file; killed and started again, it ends the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evaluation.asking import PROMPTS, chat, tiny_generator
from export.run_dir import EVAL_ROWS, make_run
from finetuneflow.data.examples import Example, Message, Place
from finetuneflow.errors import EvaluationError, StorageError
from finetuneflow.evaluation.measure import Options, evaluate, options_of_run, sample_answers
from finetuneflow.evaluation.samples import AnswerRecord, answer_all
from finetuneflow.evaluation.scores import score_answers
from finetuneflow.inference import Decoding, Generation, Generator, load_generator

EXAMPLES = [chat(f"{prompt[0].content} {i}", "It is 7.", i) for i, prompt in enumerate(PROMPTS * 2)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path, evaluation__max_new_tokens=6)


def test_a_run_is_measured_on_what_it_held_out_with_its_own_settings(run: Path) -> None:
    evaluation = evaluate(run)
    assert evaluation.options == options_of_run(run) and evaluation.options.max_new_tokens == 6
    saved = json.loads((run / "evals" / "evaluation.json").read_text())
    assert saved["losses"]["examples"] == len(EVAL_ROWS) == saved["scores"]["answers"] == len(saved["items"])
    assert saved["losses"]["perplexity"] > 1 and 0 <= saved["losses"]["token_accuracy"] <= 1
    assert set(saved["samples"][0]) == {"instruction", "input", "expected_output", "model_output", "output_length", "stopped"}
    assert saved["samples"][0]["instruction"] == "What is 3 + 4?"


def test_scores_samples_and_items_are_of_the_answers_the_model_gives() -> None:
    generator = tiny_generator()
    evaluation = evaluate(generator, EXAMPLES, options=Options(max_new_tokens=5, samples=7))
    answers = generator.generate([e.messages[:1] for e in EXAMPLES], max_new_tokens=5)
    assert evaluation.scores == score_answers([a.text for a in answers], ["It is 7."] * len(EXAMPLES))
    assert [item.answer for item in evaluation.items] == [a.text for a in answers]
    assert [(s.model_output, s.output_length) for s in evaluation.samples] == [(a.text, len(a.ids)) for a in answers[:7]]


def test_a_suite_alone_and_a_limit_of_zero_generate_only_what_is_asked(tmp_path: Path) -> None:
    suite = tmp_path / "s.yaml"
    suite.write_text(
        "version: 1\nname: s\nmax_new_tokens: 2\nprompts: [{id: a, messages: [{role: user, content: Q}], check: {regex: .}}]\n"
    )
    alone = evaluate(tiny_generator(), suite=suite)
    assert (alone.losses, alone.scores, alone.items) == (None, None, ()) and alone.suite is not None
    losses_only = evaluate(tiny_generator(), EXAMPLES, options=Options(limit=0))
    assert losses_only.losses is not None and losses_only.scores is None and not losses_only.samples
    with pytest.raises(EvaluationError):
        evaluate(tiny_generator())


def test_nothing_is_written_without_a_folder_and_never_outside_it(run: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    evaluate(load_generator(run), EXAMPLES[:1], options=Options(max_new_tokens=2))
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(StorageError):
        evaluate(run, name="../outside")


def test_rows_left_out_are_counted_by_their_code(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"messages": [{"role": "bot", "content": "?"}]}\n{"instruction": "a", "output": "b"}\n')
    evaluation = evaluate(tiny_generator("gpt2"), [data], options=Options(max_new_tokens=2))
    unanswerable = Example(
        "chat", Place("d", 2), "messages", (Message("user", "a"), Message("user", "b" * 4000), Message("assistant", "c"))
    )
    both = evaluate(tiny_generator("gpt2"), [*EXAMPLES[:1], unanswerable], options=Options(max_new_tokens=2, max_length=300))
    assert all(count == 1 for count in both.skipped.values()) and both.skipped
    assert sum(evaluation.skipped.values()) == 1 and evaluation.scores is not None and evaluation.scores.answers == 1


def test_samples_for_the_end_of_a_run_have_expected_and_actual_answers() -> None:
    samples = sample_answers(tiny_generator(), EXAMPLES, count=3, max_new_tokens=4)
    assert [(s.instruction, s.expected_output) for s in samples] == [(e.messages[0].content, "It is 7.") for e in EXAMPLES[:3]]


# --- resuming -----------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from evaluation.test_measure import EXAMPLES
from finetuneflow.evaluation.measure import Options, evaluate
def progress(done, total):
    if done >= 8:
        os.kill(os.getpid(), signal.SIGKILL)
evaluate(Path(sys.argv[1]), EXAMPLES, options=Options(max_new_tokens=6, batch_size=4), progress=progress)
"""


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches generated from now on."""
    sizes: list[int] = []
    original = Generator.generate_batch

    def count(self: Generator, prompts: Any, decoding: Decoding) -> list[Generation]:
        sizes.append(len(prompts))
        return original(self, prompts, decoding)

    monkeypatch.setattr(Generator, "generate_batch", count)
    return sizes


def test_an_evaluation_killed_half_way_continues_and_ends_as_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, "full")
    command = [sys.executable, "-c", KILLED, str(run), str(Path(__file__).parents[1])]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    record = run / "evals" / "evaluation.answers.jsonl"
    assert len(record.read_text().splitlines()) == 2 and not (run / "evals" / "evaluation.json").exists()
    with record.open("a") as file:
        file.write('{"key": "torn')
    sizes = counted(monkeypatch)
    options = Options(max_new_tokens=6, batch_size=4)
    resumed = evaluate(run, EXAMPLES, options=options).to_dict()
    assert sizes == [4]
    undisturbed = evaluate(run, EXAMPLES, options=options, out_dir=tmp_path / "other").to_dict()
    assert sizes == [4, 4, 4, 4]
    for result in (resumed, undisturbed):
        del result["seconds"], result["time"]
    assert resumed == undisturbed


def test_answers_of_other_weights_or_other_decoding_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    generator, path = tiny_generator(), tmp_path / "a.jsonl"
    prompts = [generator.prompt_ids(p) for p in PROMPTS]
    sizes = counted(monkeypatch)
    first = answer_all(generator, prompts, Decoding(4), resume_path=path)
    assert answer_all(generator, prompts, Decoding(4), resume_path=path) == first and sizes == [6]
    answer_all(generator, prompts, Decoding(5), resume_path=path)
    assert sizes == [6, 6]
    with torch.no_grad():
        generator.model.lm_head.weight.add_(0.1 * torch.randn_like(generator.model.lm_head.weight))
    answer_all(generator, prompts, Decoding(4), resume_path=path)
    assert sizes == [6, 6, 6]


def test_a_damaged_line_of_the_record_costs_that_batch_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    record = AnswerRecord(path, "identity")
    answers = [Generation("été 🙂 \ud800", (1, 2), True, 3)]
    for prompt in ([1], [2], [3]):
        record.append([prompt], answers)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\xff garbage\n" + lines[2] + lines[1][:20])
    again = AnswerRecord(path, "identity")
    assert [again.find([p]) is not None for p in ([1], [2], [3])] == [True, False, True]
    assert again.find([[1]]) == answers
    again.append([[2]], answers)
    assert AnswerRecord(path, "identity").find([[2]]) == answers
