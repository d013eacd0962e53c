"""The promises of the bundled starter model: reproducible text, honest splits, a loadable base."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetuneflow.models.starter import corpus, starter_path, tuning, world

CORPUS_SHA256 = "78984398c3230113f7d43c26309c260088236ef89221f09eb837bda1f0bdd8d0"
HELD_OUT_LOSS_LIMIT = 1.3
SIZE_LIMIT_BYTES = 12_000_000
SUITES = ("acceptance", "development")
SUM = re.compile(r"\b(\d+) ?(?:\+|plus|and|et) ?(\d+)\b")


@cache
def _suite(name: str) -> dict[str, Any]:
    return yaml.safe_load((starter_path() / f"{name}.yaml").read_text(encoding="utf-8"))


@cache
def _tuning_conversations() -> tuple[tuple[dict[str, str], ...], ...]:
    """Every conversation of the written training and validation files, at the default settings."""
    training = tuning.examples(split="tuning", seed=tuning.DEFAULT_SEED, count=tuning.NUM_TRAINING_EXAMPLES)
    validation = tuning.examples(split="development", seed=tuning.DEFAULT_SEED, count=tuning.NUM_VALIDATION_EXAMPLES)
    return tuple(tuple(example["messages"]) for example in (*training, *validation))


@cache
def _tuning_text() -> str:
    texts = (message["content"] for turns in _tuning_conversations() for message in turns)
    return "\n".join(texts).casefold().replace("\u2019", "'")


def _mentions(text: str, phrase: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(phrase.casefold())}(?!\w)", text) is not None


def _held_out_phrases() -> set[str]:
    """What only acceptance may ask about or answer; colours and numbers are shared by nature."""
    held: set[str] = set()
    for language in world.LANGUAGES:
        for country in world.COUNTRIES:
            if country.split == "acceptance":
                held |= {country.name[language], country.capital[language]}
        for opposites in world.OPPOSITES:
            if opposites.split == "acceptance":
                held |= set(opposites.pair[language])
        held |= {item.name[language] for item in world.COLOURED_THINGS if item.split == "acceptance"}
        held |= {item.verb[language] for item in world.ANIMAL_SOUNDS if item.split == "acceptance"}
        held |= {item.plural[language] for item in world.CATEGORIES if item.split == "acceptance"}
        held |= {item.word[language] for item in world.WORDS if item.split == "acceptance"}
    held |= {person.name for person in world.PEOPLE if person.split == "acceptance"}
    for names in (world.PETS, world.TOWNS):
        held |= {name for name, split in names.items() if split == "acceptance"}
    return held


def test_the_same_seed_gives_the_same_corpus() -> None:
    assert corpus.fingerprint(1) == CORPUS_SHA256
    assert corpus.fingerprint(2) != CORPUS_SHA256


def test_the_same_seed_gives_the_same_tuning_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        tuning.write(tmp_path / name, tuning.examples(split="tuning", seed=3, count=200))
    first, second = ((tmp_path / name).read_bytes() for name in ("a.jsonl", "b.jsonl"))
    assert first == second
    assert set(json.loads(first.splitlines()[0])) == {"messages"}


def test_every_tuning_conversation_ends_with_an_answer() -> None:
    for turns in _tuning_conversations():
        roles = [message["role"] for message in turns if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_nothing_held_out_for_acceptance_appears_in_tuning() -> None:
    leaked = {phrase for phrase in _held_out_phrases() if _mentions(_tuning_text(), phrase)}
    assert leaked == set()


def test_no_sum_held_out_for_acceptance_appears_in_tuning_in_either_order() -> None:
    pairs = {(int(first), int(second)) for first, second in SUM.findall(_tuning_text())}
    assert pairs
    assert not {pair for pair in pairs if world.split_of_sum(*pair) == "acceptance"}


@pytest.mark.parametrize("name", SUITES)
def test_no_suite_prompt_is_a_tuning_prompt(name: str) -> None:
    training = tuning.examples(split="tuning", seed=tuning.DEFAULT_SEED, count=tuning.NUM_TRAINING_EXAMPLES)
    asked = {json.dumps(example["messages"][:-1]) for example in training}
    assert not [prompt["id"] for prompt in _suite(name)["prompts"] if json.dumps(prompt["messages"]) in asked]


def test_acceptance_and_development_suites_share_no_prompt() -> None:
    acceptance, development = ({json.dumps(prompt["messages"]) for prompt in _suite(name)["prompts"]} for name in SUITES)
    assert len(acceptance) >= 60
    assert not acceptance & development


@pytest.mark.parametrize("name", SUITES)
def test_suite_follows_the_schema(name: str) -> None:
    suite = _suite(name)
    assert suite["version"] == 1
    identifiers = [prompt["id"] for prompt in suite["prompts"]]
    assert len(set(identifiers)) == len(identifiers)
    keys = {"contains", "not_contains", "equals", "regex", "function"}
    for prompt in suite["prompts"]:
        assert prompt["check"] and set(prompt["check"]) <= keys
        assert prompt["messages"][-1]["role"] == "user"
        re.compile(prompt["check"].get("regex", ""))


def test_the_facts_of_acceptance_are_in_the_corpus() -> None:
    text = "\n".join(islice(corpus.documents(1), 40_000)).casefold()
    for country in world.COUNTRIES:
        fact_en = f"the capital {country.of['en']} is {country.capital['en']}."
        fact_fr = f"la capitale {country.of['fr']} est {country.capital['fr']}."
        assert fact_en.casefold() in text
        assert fact_fr.casefold() in text
    for item in world.COLOURED_THINGS:
        for language, verb in (("en", "is"), ("fr", "est")):
            assert f"{item.name[language]} {verb} {item.agreeing[language]}.".casefold() in text
    for opposites in world.OPPOSITES:
        assert "the opposite of {} is {}.".format(*opposites.pair["en"]) in text


def test_the_corpus_is_not_in_chat_format() -> None:
    text = "\n".join(islice(corpus.documents(1), 5_000))
    assert "<|" not in text
    assert not re.search(r"capital [^.\n]*\?", text)


def test_the_package_data_stays_small() -> None:
    files = [path for path in starter_path().rglob("*") if path.is_file()]
    data = [path for path in files if "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in data) <= SIZE_LIMIT_BYTES


def test_importing_the_starter_does_not_import_torch() -> None:
    code = "import sys, finetuneflow.models.starter; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(starter_path())


def test_the_tokenizer_returns_what_it_was_given(tokenizer: Any) -> None:
    for text in (
        "L'été, à Nîmes, où l\u2019on naît : « ça va ? » — œuf, ÉTÉ.",
        "12 + 305 = 317",
        "<|im_start|>user\nBonjour<|im_end|>\n",
        "日本語 and emoji 🙂",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_digit_is_a_token_of_its_own(tokenizer: Any) -> None:
    tokens = tokenizer.tokenize("2024 and 17+5")
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("2024175")


def test_special_tokens_are_single_and_distinct(tokenizer: Any) -> None:
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
    for token in specials:
        assert len(tokenizer(token)["input_ids"]) == 1
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_chat_template_marks_only_what_the_assistant_says(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    encoded = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == "Good day<|im_end|>"


def test_the_model_knows_its_corpus(tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from finetuneflow.models.starter.pretrain import held_out_loss

    model = AutoModelForCausalLM.from_pretrained(starter_path(), dtype=torch.float32)
    assert model.config.tie_word_embeddings
    loss = held_out_loss(model, tokenizer, seed=1, row_tokens=256)
    assert loss < HELD_OUT_LOSS_LIMIT
