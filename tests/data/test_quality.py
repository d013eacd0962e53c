"""Judging: counts are right against counts made by hand or by brute force, and bad datasets are stopped."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetuneflow.data.examples import Example, Message, Place, Problem
from finetuneflow.data.quality import FileReport, check_threshold, inspect, inspect_examples
from finetuneflow.data.similarity import NEAR_THRESHOLD, near_clusters, words_of
from finetuneflow.errors import CODES, DataError

REQUIRED_KEYS = {"file", "shapes", "rows", "usable", "rejected", "duplicates"}


def pair(row: int, question: str, answer: str) -> Example:
    return Example("chat", Place("f", row), "question+answer", (Message("user", question), Message("assistant", answer)))


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_report_counts_every_row_once(tmp_path: Path) -> None:
    rows = [
        {"question": "q1", "answer": "a1"},
        {"question": "q1", "answer": "a1"},
        {"question": " q1 ", "answer": "a1\n"},
        {"question": "q2", "answer": ""},
        {"text": "a document"},
        {"instruction": "i", "instances": [{"output": "x"}, {"output": "y"}]},
        {"foo": 1},
    ]
    path = write_rows(tmp_path / "d.jsonl", rows)
    path.write_text(path.read_text() + "{broken\n")
    report = inspect(path)
    assert (report.rows, report.usable, report.examples, report.rejected_rows) == (8, 5, 6, 3)
    assert report.rejected == {"ROW_EMPTY_ANSWER": 1, "ROW_UNKNOWN_SHAPE": 1, "ROW_BAD_JSON": 1}
    assert report.shapes == {"question+answer": 4, "text": 1, "self-instruct": 1}
    assert report.duplicates == 2
    assert [problem.place.line for problem in report.problems["ROW_BAD_JSON"]] == [8]


def test_json_has_the_promised_keys_and_plain_values(tmp_path: Path) -> None:
    report = inspect(write_rows(tmp_path / "d.jsonl", [{"question": "q", "answer": "a"}, {"foo": "\x1b[31m"}]))
    value = json.loads(json.dumps(report.to_json()))
    assert value.keys() >= REQUIRED_KEYS
    assert (value["rows"], value["usable"], value["rejected"]) == (2, 1, {"ROW_UNKNOWN_SHAPE": 1})
    assert value["problems"]["ROW_UNKNOWN_SHAPE"][0]["line"] == 2
    assert "\x1b" not in json.dumps(value, ensure_ascii=False)


def test_at_most_three_problems_per_reason_are_kept(tmp_path: Path) -> None:
    report = inspect(write_rows(tmp_path / "d.jsonl", [{"foo": i} for i in range(50)]))
    assert report.rejected == {"ROW_UNKNOWN_SHAPE": 50} and len(report.problems["ROW_UNKNOWN_SHAPE"]) == 3


# --- duplicates ------------------------------------------------------------------------------------


def varied(seed: int, count: int, changes: int, words: int = 60) -> list[Example]:
    """Unrelated texts, each followed by a copy of it with some words changed."""
    generator = random.Random(seed)
    examples = []
    for row in range(0, 2 * count, 2):
        text = [f"w{generator.randrange(5000)}" for _ in range(words)]
        examples.append(pair(row, "q", " ".join(text)))
        for _ in range(changes):
            text[generator.randrange(words)] = f"x{generator.randrange(5000)}"
        examples.append(pair(row + 1, "q", " ".join(text)))
    return examples


def jaccard(first: Example, second: Example) -> float:
    def pairs_of(example: Example) -> set[tuple[str, str]]:
        words = "\n".join(message.content for message in example.messages).lower().split()
        return set(itertools.pairwise(words))

    one, two = pairs_of(first), pairs_of(second)
    return len(one & two) / len(one | two)


def test_near_duplicates_agree_with_exact_jaccard_by_brute_force() -> None:
    examples = [example for changes in (0, 1, 2, 4, 8, 20) for example in varied(changes, 25, changes)]
    roots = near_clusters(examples)
    for first in range(len(examples)):
        for second in range(first + 1, len(examples)):
            similarity = jaccard(examples[first], examples[second])
            if similarity >= NEAR_THRESHOLD + 0.12:
                assert roots[first] == roots[second]
            if similarity <= NEAR_THRESHOLD - 0.15 and second == first + 1:
                assert roots[first] != roots[second]


def test_near_duplicates_are_counted_beyond_the_exact_ones() -> None:
    texts = [
        "The quick brown fox jumps over the lazy dog near the river bank, then it runs home to sleep until the next morning comes around again",
        "Une phrase tout autre, sans rapport avec la première, en français",
    ]
    questions = [texts[0], texts[0], texts[0] + "!", texts[0].upper(), texts[1], texts[1]]
    report = inspect_examples([pair(i, question, "yes") for i, question in enumerate(questions)], file="f")
    assert report.duplicates == 2 and report.near_duplicates == 2


def test_a_long_shared_system_prompt_does_not_make_rows_alike() -> None:
    system = Message("system", "You are Socrates and never answer. " * 20)
    examples = [
        Example(
            "chat",
            Place("f", i),
            "s",
            (system, *pair(i, f"question {i} about {i * 7} things", f"answer {i} is {i * 13}").messages),
        )
        for i in range(30)
    ]
    assert len(set(near_clusters(examples))) == 30


def test_scripts_without_spaces_are_compared_by_characters() -> None:
    text = "识别并解释给定列表中的两个科学理论：细胞理论和日心说。细胞理论是生物科学的一个理论。"
    assert words_of(text)[:3] == ["识", "别", "并"]
    alike = [
        pair(0, text, "好"),
        pair(1, text.replace("两个", "三个"), "好"),
        pair(2, "今天天气很好，我们去公园散步吧，晚上再回家吃饭看电视。", "好"),
    ]
    assert near_clusters(alike) == [0, 0, 2]


# --- tokens, languages, warnings -------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    total_tokens: int
    supervised_tokens: int
    answer_tokens_lost: int


def measure_words(examples: Sequence[Example]) -> Iterable[Size | Problem]:
    for example in examples:
        prompt, answer = (len(message.content.split()) for message in example.messages)
        if prompt == 13:
            yield Problem(example.place, "ROW_BAD_TOOL_CALL", "template refuses", "…", example.shape)
        else:
            yield Size(prompt + answer, answer, max(0, min(answer, prompt + answer - 40)))


def test_token_counts_follow_the_measure(tmp_path: Path) -> None:
    examples = [
        pair(i, "w " * prompt, "v " * answer)
        for i, (prompt, answer) in enumerate([(10, 10), (20, 30), (50, 10), (13, 1), (1, 99)])
    ]
    report = inspect_examples(examples, file="f", measure=measure_words, max_length=40)
    tokens = report.tokens
    assert tokens is not None
    assert (tokens.total, tokens.supervised, tokens.shortest, tokens.longest) == (230, 149, 20, 100)
    assert (tokens.rows_over, tokens.answer_tokens_lost) == (3, 10 + 10 + 60)
    assert (
        tokens.histogram["<=32"] == 1
        and tokens.histogram["<=64"] == 2
        and tokens.histogram["<=128"] == 1
        and sum(tokens.histogram.values()) == 4
    )
    assert tokens.supervised_share == 149 / 230
    assert (report.rows, report.usable, report.rejected) == (5, 4, {"ROW_BAD_TOOL_CALL": 1})
    assert report.to_json()["tokens"]["supervised_share"] == 149 / 230


def test_languages_are_identified() -> None:
    english = [
        pair(i, f"What is the capital of the country number {i}, please?", "I am not sure about that one.") for i in range(6)
    ]
    french = [
        pair(10 + i, f"Quelle est la capitale du pays numéro {i}, s'il vous plaît ?", "Je ne sais pas, désolé.") for i in range(3)
    ]
    assert inspect_examples(english + french, file="f").languages == {"en": 6, "fr": 3}


@pytest.mark.parametrize(
    ("rows", "word"), [([], "no rows"), ([{"foo": 1}], "No row can be used"), ([{"text": "one"}], "Only 1 usable")]
)
def test_too_few_rows_are_warned_about_with_the_minimum(tmp_path: Path, rows: list[Any], word: str) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps(rows))
    report = inspect(path)
    assert word in report.warnings[0]


def test_placeholders_and_bare_strings_are_warned_about(tmp_path: Path) -> None:
    report = inspect(write_rows(tmp_path / "d.jsonl", ["I am {{name}}", "two"]))
    assert report.notes == {"bare_string": 2, "placeholder": 1} and len(report.warnings) == 2


# --- the guard -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "limit", "stops"), [(1, 0.1, False), (2, 0.1, True), (2, 0.25, False), (0, 0.0, False), (1, 0.0, True)]
)
def test_the_threshold_stops_a_run_above_its_limit_only(tmp_path: Path, bad: int, limit: float, stops: bool) -> None:
    rows: list[Any] = [{"question": f"q{i}", "answer": "a"} for i in range(10 - bad)] + [{"foo": i} for i in range(bad)]
    report = inspect(write_rows(tmp_path / "d.jsonl", rows))
    if not stops:
        check_threshold(report, limit)
        return
    with pytest.raises(DataError) as caught:
        check_threshold(report, limit)
    assert caught.value.code == "DATASET_TOO_MANY_REJECTED"
    assert caught.value.where is not None and caught.value.where.endswith(f"d.jsonl:{10 - bad + 1}")
    assert "ROW_UNKNOWN_SHAPE" in str(caught.value)


def test_nothing_usable_and_no_dataset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        check_threshold(FileReport("f"))
    assert caught.value.code == "DATASET_NOTHING_USABLE"
    with pytest.raises(DataError) as caught:
        check_threshold(FileReport("f", error=DataError("DATASET_EMPTY", "empty").to_dict()))
    assert caught.value.code == "DATASET_EMPTY"
    assert {"DATASET_TOO_MANY_REJECTED", "DATASET_NOTHING_USABLE"} <= CODES.keys()


# --- speed -----------------------------------------------------------------------------------------


@pytest.mark.shared_data
def test_alpaca_is_checked_in_six_seconds_of_processor_time(shared_data: Path) -> None:
    code = f"""
import time
from finetuneflow.data.quality import inspect
report = inspect({str(shared_data / "alpaca/alpaca_data.json.gz")!r})
assert (report.rows, report.usable) == (52002, 51974) and report.near_duplicates_checked == 51974
print(time.process_time())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 6


def test_many_copies_of_one_row_stay_fast() -> None:
    started = time.process_time()
    report = inspect_examples((pair(i, "the same question", "the same answer") for i in range(20_000)), file="f")
    assert report.duplicates == 19_999 and report.near_duplicates == 0
    assert time.process_time() - started < 8
