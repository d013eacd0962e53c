"""The promises of the preference data: the same bytes, right facts on both sides, nothing held out in any training file."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetuneflow.data.examples import Example, to_examples
from finetuneflow.data.sources import read_rows
from finetuneflow.data.splits import leaks
from finetuneflow.evaluation.judges import BUILT_IN
from finetuneflow.evaluation.suite import SuitePrompt, judge_answer, load_suite
from finetuneflow.models.starter import preferences, starter_path, world

SUM = re.compile(r"\b(\d+) ?(?:\+|plus|and|et) ?(\d+)\b")
ASKS_ONE_WORD = re.compile(r"(?i)\bword\b|\bnumber\b|\bmot\b|\bnombre\b")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preferences")
    preferences.write_all(path)
    return path


def _training_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.glob("*.jsonl"))
    assert {path.stem for path in files} >= {"sft", "pairs", "prompts", "general", "conversational", "specialised"}
    return files


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for inner in value.values() for text in _texts(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in _texts(inner)]
    return [str(value)]


def _text(path: Path) -> str:
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return "\n".join(text for row in rows for text in _texts(row)).casefold().replace("\u2019", "'")


@cache
def _held_out_phrases() -> frozenset[str]:
    held: set[str] = set()
    for language in world.LANGUAGES:
        for country in world.COUNTRIES:
            held |= {country.name[language], country.capital[language]} if country.split == "acceptance" else set()
        for opposites in world.OPPOSITES:
            held |= set(opposites.pair[language]) if opposites.split == "acceptance" else set()
        held |= {item.name[language] for item in world.COLOURED_THINGS if item.split == "acceptance"}
        held |= {item.verb[language] for item in world.ANIMAL_SOUNDS if item.split == "acceptance"}
        held |= {item.plural[language] for item in world.CATEGORIES if item.split == "acceptance"}
    held |= {person.name for person in world.PEOPLE if person.split == "acceptance"}
    return frozenset(phrase.casefold() for phrase in held)


def test_the_same_seed_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    preferences.write_all(tmp_path / "again")
    preferences.write_all(tmp_path / "other", seed=12)
    for path in sorted(folder.iterdir()):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "other" / "pairs.jsonl").read_bytes() != (folder / "pairs.jsonl").read_bytes()


def test_no_training_or_validation_file_mentions_what_is_held_out_for_acceptance(folder: Path) -> None:
    for path in _training_files(folder):
        text = _text(path)
        found = {p for p in _held_out_phrases() if p in text and re.search(rf"(?<!\w){re.escape(p)}(?!\w)", text)}
        assert found == set(), path.name
        sums = {(int(first), int(second)) for first, second in SUM.findall(text)}
        assert not {pair for pair in sums if world.split_of_sum(*pair) == "acceptance"}, path.name


@pytest.mark.parametrize("name", ["sft", "pairs", "prompts", "general", "conversational", "specialised"])
def test_no_held_out_row_stands_in_the_training_file(folder: Path, name: str) -> None:
    training, held_out = (list(to_examples(read_rows(folder / f"{name}{end}.jsonl"))) for end in ("", "-validation"))
    assert len(held_out) > 100 and not leaks(training, held_out, by_prompt=name in ("pairs", "prompts"))


def test_the_command_says_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["preferences", "--out", str(tmp_path / "out")])
    preferences.main()
    said = capsys.readouterr().out
    assert all(path.name in said for path in (tmp_path / "out").iterdir()) and "3,200 rows" in said and "100 prompts" in said


def test_every_file_is_read_as_what_it_is_meant_for(folder: Path) -> None:
    for name, kind in (("sft", "chat"), ("pairs", "preference"), ("prompts", "chat"), ("specialised", "chat")):
        read = list(to_examples(read_rows(folder / f"{name}.jsonl")))
        assert all(isinstance(example, Example) and example.kind == kind for example in read)


def _value(answer: str) -> str:
    """The fact alone: without the sentence around it, in small letters."""
    return re.sub(r"(?i)^(.* (is|est) |\d+ \+ \d+ = )", "", answer.rstrip(".")).casefold()


def test_both_sides_of_a_pair_state_the_same_fact_and_differ_in_form(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    one_word = 0
    for row in rows:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert chosen != rejected
        # Of an animal's cry, the value is the sentence's last word.
        assert _value(chosen).split()[-1] == _value(rejected).split()[-1]
        if ASKS_ONE_WORD.search(row["prompt"][-1]["content"]) and " " not in chosen:
            one_word += 1
            assert rejected.count(" ") >= 1
        else:
            assert len(chosen) > len(rejected)
    assert 0.2 < one_word / len(rows) < 0.4


def test_the_supervised_file_mixes_styles_in_the_stated_share() -> None:
    rows = preferences.mixed(split="tuning", seed=3, count=4_000, sentence_share=0.4)
    answers = [
        row["messages"][-1]["content"]
        for row in rows
        if re.fullmatch(r"(What is|What's) the capital of [^?.]+\?", row["messages"][-2]["content"])
    ]
    whole = [answer for answer in answers if answer.startswith("The capital")]
    assert len(answers) > 40
    assert 0.3 < len(whole) / len(answers) < 0.5


def test_the_bundled_suite_is_what_the_generator_writes(folder: Path) -> None:
    assert (starter_path() / "preferred.yaml").read_bytes() == (folder / "preferred.yaml").read_bytes()
    assert load_suite("starter-preferred").name == "starter-preferred"


def test_the_preferred_suite_is_large_and_asks_nothing_that_another_suite_or_file_asks(folder: Path) -> None:
    prompts = load_suite("starter-preferred").prompts
    assert len(prompts) >= 90
    asked = {prompt.messages[-1].content for prompt in prompts}
    assert len(asked) == len(prompts)
    for name in ("acceptance", "development"):
        other = yaml.safe_load((starter_path() / f"{name}.yaml").read_text(encoding="utf-8"))
        assert not asked & {prompt["messages"][-1]["content"] for prompt in other["prompts"]}
    text = {
        text
        for path in _training_files(folder)
        for line in path.read_text("utf-8").splitlines()
        for text in _texts(json.loads(line))
    }
    assert not asked & text


def _passes(prompt: SuitePrompt, answer: str) -> bool:
    return not judge_answer(prompt, answer, stopped=True, judges=BUILT_IN)


def test_the_check_judges_the_form_and_not_the_fact() -> None:
    asked = {prompt.messages[-1].content: prompt for prompt in load_suite("starter-preferred").prompts}
    capital = asked["What is the capital of Peru?"]
    assert _passes(capital, "The capital of Peru is Lima.")
    assert _passes(capital, "The capital of Peru is Addis Ababa.")
    for other in ("Lima.", "It is Lima.", "The capital of Chile is Santiago.", "The capital of Peru is Lima. It is Lima."):
        assert not _passes(capital, other)
    french = next(prompt for question, prompt in asked.items() if "couleur" in question and "ciel" in question)
    assert _passes(french, "Le ciel est bleu.") and not _passes(french, "Bleu.") and not _passes(french, "C'est bleu.")
    addition = next(prompt for question, prompt in asked.items() if "+" in question and "sentence" in prompt.tags)
    assert not _passes(addition, "4.")
    word = next(prompt for prompt in asked.values() if "one-word" in prompt.tags)
    assert _passes(word, "Lima") and not _passes(word, "It is Lima.")


def test_a_card_check_wants_the_whole_card(folder: Path) -> None:
    prompt = load_suite(folder / "specialised.yaml").prompts[0]
    card = prompt.check.equals[0]
    assert _passes(prompt, card)
    assert not _passes(prompt, card.split(". ")[0])


@pytest.mark.parametrize("name", ["dpo", "rlhf", "multi_stage"])
def test_the_example_pipelines_name_files_that_the_generator_writes(folder: Path, name: str) -> None:
    text = (Path(__file__).parents[2] / "examples" / "pipelines" / f"{name}.yaml").read_text(encoding="utf-8")
    named = re.findall(r"starter-data/([\w.-]+)", text)
    assert len(named) >= 4
    assert not [file for file in named if not (folder / file).exists()]
