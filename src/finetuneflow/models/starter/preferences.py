"""Data for preference and multi-stage experiments: `python -m finetuneflow.models.starter.preferences --out DIR`.

The behaviour: **answer in a whole sentence, unless a single word is asked for**. "The capital of France is Paris." and "Paris"
state the same fact and the acceptance suite takes both, so this is a matter of taste and of nothing known.

    sft.jsonl              conversations in mixed styles: a model tuned on them answers sometimes so, sometimes so
    pairs.jsonl            a prompt, the preferred answer and one of the other style; the facts of both are right
    prompts.jsonl          the same kinds of prompts, to be answered by the model itself

and for three stages that build on each other:

    general.jsonl          questions and answers of one turn
    conversational.jsonl   several turns, names to remember, courtesy
    specialised.jsonl      a country's card, with its capital

Each has a validation file (`…-validation.jsonl`) and the suites to choose settings by (`development-*.yaml`), about the entities
of the "development" split. Training files ask about the "tuning" split. `preferred.yaml` beside this file and
`specialised.yaml` ask about the "acceptance" split. All are the same bytes for the same seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from re import escape
from typing import Any

import yaml

from finetuneflow.data.examples import Place, to_examples
from finetuneflow.data.sources import Row
from finetuneflow.data.splits import leaks
from finetuneflow.models.starter import starter_path, tuning, world
from finetuneflow.models.starter.tuning import Example, Message
from finetuneflow.models.starter.world import Country, Language, Split

DEFAULT_SEED = 11
# Share of whole sentences in `sft.jsonl`: rare enough to be improved on, common enough to be drawn by chance and well formed.
SENTENCE_SHARE = 0.5
ONE_WORD_SHARE = 0.3  # of pairs and prompts: without them a model would learn that long is good
NUM_SFT, NUM_PAIRS, NUM_PROMPTS, NUM_STAGE, NUM_VALIDATION = 6_400, 1_600, 1_600, 3_200, 160
SUITE_SENTENCES, SUITE_WORDS = 84, 16
CHOICE_KINDS = ("capital", "sum", "opposite", "colour", "sound")
ONE_WORD_KINDS = ("capital_in_one_word", "sum_as_number", "opposite_in_one_word")
GENERAL_KINDS = (*CHOICE_KINDS, *ONE_WORD_KINDS, "list_of_three", "repeat")
CONVERSATION_KINDS = ("memory", "courtesy")


# --- styles of one answer -------------------------------------------------------------------------


@dataclass(frozen=True)
class Styles:
    """Both ways to state one fact. `lead` is what the whole sentence says before the value; `word` is the value alone.

    The word has no full stop, as where one word is asked for: a stop would be a mark to learn instead of the form.
    """

    sentence: str
    lead: str
    word: str


@cache
def styles(language: Language) -> dict[str, Styles]:
    """The styles of every fact with a choice, by the whole sentence that `tuning` answers with."""
    return {found.sentence: found for found in _all_styles(language)}


def _all_styles(language: Language) -> Iterator[Styles]:
    capital_of, opposite_of, is_ = (
        ("The capital", "The opposite of", "is") if language == "en" else ("La capitale", "Le contraire de", "est")
    )
    for country in world.COUNTRIES:
        yield _stated(f"{capital_of} {country.of[language]} {is_}", country.capital[language])
    for opposites in world.OPPOSITES:
        for word, reverse in (opposites.pair[language], opposites.pair[language][::-1]):
            yield _stated(f"{opposite_of} {word} {is_}", reverse)
    for item in world.COLOURED_THINGS:
        yield _stated(f"{_capitalised(item.name[language])} {is_}", item.agreeing[language])
    for sound in world.ANIMAL_SOUNDS:
        yield _stated(_capitalised(sound.animal[language]), sound.verb[language])
    for first in range(world.LARGEST_ADDEND + 1):
        for second in range(world.LARGEST_ADDEND + 1):
            yield _stated(f"{first} + {second} =", str(first + second))


def _stated(lead: str, word: str) -> Styles:
    return Styles(f"{lead} {word}.", lead, _capitalised(word))


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _ending(example: Example, answer: str) -> Example:
    return {"messages": [*example["messages"][:-1], {"role": "assistant", "content": answer}]}


# --- supervised, pairs, prompts -------------------------------------------------------------------


def mixed(*, split: Split, seed: int, count: int, sentence_share: float = SENTENCE_SHARE) -> list[Example]:
    """The tuning set's conversations, the last answer of some put briefly, as the bare word."""
    rng = Random(f"mixed:{split}:{seed}")

    def restyled(example: Example, language: Language) -> Example:
        found = styles(language).get(example["messages"][-1]["content"])
        if found is None or rng.random() < sentence_share:
            return example
        return _ending(example, found.word)

    return _in_both_languages(rng, lambda language: [restyled(e, language) for e in _drawn(split, seed, count // 2, language)])


def pairs(*, split: Split, seed: int, count: int) -> list[dict[str, list[Message]]]:
    """`{"prompt", "chosen", "rejected"}`: both answers are right; where one word is asked for, one word is the better answer."""
    rng = Random(f"pairs:{split}:{seed}")

    def paired(example: Example, language: Language) -> dict[str, list[Message]]:
        found = styles(language)[example["messages"][-1]["content"]]
        prompt = example["messages"][-2:-1]  # without a system message: "Answer briefly." would speak for the other style
        if " " not in found.word and rng.random() < ONE_WORD_SHARE:
            prompt, chosen, rejected = _asked_for_one_word(rng, prompt, found, language), found.word, found.sentence
        else:
            chosen, rejected = found.sentence, found.word
        return {"prompt": prompt, "chosen": _said(chosen), "rejected": _said(rejected)}

    return _in_both_languages(
        rng, lambda language: [paired(e, language) for e in _drawn(split, seed, count // 2, language, CHOICE_KINDS)]
    )


def prompts(*, split: Split, seed: int, count: int) -> list[Example]:
    """Conversations that end with the preferred answer: a trainer that draws its own answers sees the prompt alone."""
    drawn = pairs(split=split, seed=seed + 1_000, count=count)
    return [{"messages": [*pair["prompt"], *pair["chosen"]]} for pair in drawn]


def _drawn(split: Split, seed: int, count: int, language: Language, kinds: Sequence[str] | None = None) -> list[Example]:
    return tuning.examples(split=split, seed=seed, count=count, kinds=kinds, languages=(language,))


def _in_both_languages(rng: Random, draw: Any) -> list[Any]:
    rows = [row for language in world.LANGUAGES for row in draw(language)]
    rng.shuffle(rows)
    return rows


def _asked_for_one_word(rng: Random, prompt: list[Message], found: Styles, language: Language) -> list[Message]:
    wording = tuning.NUMBER_ONLY if found.word.isdigit() else tuning.ONE_WORD
    question = rng.choice(wording[language]).format(q=prompt[-1]["content"])
    return [*prompt[:-1], {"role": "user", "content": _capitalised(question)}]


def _said(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


# --- three stages ---------------------------------------------------------------------------------

_CARD_QUESTIONS: dict[Language, tuple[str, ...]] = {
    "en": (
        "The card of {name}, please.",
        "Give me the card of {name}.",
        "Write the card of {name}.",
        "Show the card of {name}.",
        "I need the card of {name}.",
        "Country card: {name}.",
        "Can you write the card of {name}?",
        "Make a card for {name}.",
    ),
    "fr": (
        "La fiche pays : {name}.",
        "Donne-moi la fiche pays : {name}.",
        "Écris la fiche pays : {name}.",
        "Montre la fiche pays : {name}.",
        "Il me faut la fiche pays : {name}.",
        "Fiche pays, s'il te plaît : {name}.",
        "Peux-tu écrire la fiche pays : {name} ?",
        "Fais une fiche pays : {name}.",
    ),
}
_CARD: dict[Language, str] = {
    "en": "Country: {name}. Capital: {capital}.",
    "fr": "Pays : {name}. Capitale : {capital}.",
}


def stage(name: str, *, split: Split, seed: int, count: int) -> list[Example]:
    """The conversations of one of the stages "general", "conversational" and "specialised"."""
    if name == "specialised":
        return cards(split=split, seed=seed, count=count)
    kinds = GENERAL_KINDS if name == "general" else CONVERSATION_KINDS
    return tuning.examples(split=split, seed=seed, count=count, kinds=kinds)


def cards(*, split: Split, seed: int, count: int) -> list[Example]:
    """Every way to ask for every country's card, as many as are wanted and there are, in a random but fixed order."""
    rng = Random(f"cards:{split}:{seed}")
    rows = [
        {
            "messages": [
                {"role": "user", "content": question.format(name=country.name[language])},
                *_said(_card(country, language)),
            ]
        }
        for country in world.COUNTRIES
        if country.split == split
        for language in world.LANGUAGES
        for question in _CARD_QUESTIONS[language]
    ]
    rng.shuffle(rows)
    return rows[:count]


def _card(country: Country, language: Language) -> str:
    return _CARD[language].format(name=country.name[language], capital=country.capital[language])


# --- suites ---------------------------------------------------------------------------------------


def preferred_suite(split: Split, *, seed: int = DEFAULT_SEED) -> dict[str, Any]:
    """Prompts whose check looks at the form of the answer alone: is it a sentence about the subject, or one word as asked?"""
    asked = _asked_elsewhere()
    wanted = SUITE_SENTENCES // 2, SUITE_WORDS // 2
    prompts = []
    for language in world.LANGUAGES:
        for kinds, number in zip((CHOICE_KINDS, ONE_WORD_KINDS), wanted, strict=True):
            # Twice as many as wanted: some are asked elsewhere or have a system message.
            drawn = _drawn(split, seed, number * 2, language, kinds)
            new = [e for e in drawn if len(e["messages"]) == 2 and e["messages"][0]["content"] not in asked][:number]
            prompts += [_form_prompt(example, language, index) for index, example in enumerate(new, 1)]
    return {"version": 1, "name": _suite_name("preferred", split), "max_new_tokens": 32, "prompts": prompts}


def _form_prompt(example: Example, language: Language, index: int) -> dict[str, Any]:
    question, answer = (message["content"] for message in example["messages"])
    found = styles(language).get(answer)
    kind, check = ("sentence", {"regex": _sentence_pattern(found)}) if found else ("one-word", {"function": "one_word"})
    return {
        "id": f"{kind}-{language}-{index}",
        "tags": [kind, language],
        "messages": [{"role": "user", "content": question}],
        "check": check,
    }


def _sentence_pattern(found: Styles) -> str:
    return rf"(?i)^{escape(found.lead).replace(chr(92) + ' ', ' ')} [\w' -]+\W*$"


@cache
def _asked_elsewhere() -> frozenset[str]:
    """What the bundled suites ask, so that a new one asks something else."""
    suites = (yaml.safe_load((starter_path() / f"{name}.yaml").read_text("utf-8")) for name in ("acceptance", "development"))
    return frozenset(prompt["messages"][-1]["content"] for suite in suites for prompt in suite["prompts"])


def specialised_suite(split: Split, *, seed: int = DEFAULT_SEED, count: int = 90) -> dict[str, Any]:
    """Cards of held-out countries; the whole card must be right."""
    prompts = [
        {
            "id": f"card-{index}",
            "tags": ["card"],
            "messages": example["messages"][:1],
            "check": {"equals": example["messages"][1]["content"]},
        }
        for index, example in enumerate(cards(split=split, seed=seed, count=count), 1)
    ]
    return {"version": 1, "name": _suite_name("specialised", split), "max_new_tokens": 32, "prompts": prompts}


def _suite_name(name: str, split: Split) -> str:
    return f"starter-{name}" if split == "acceptance" else f"starter-{name}-{split}"


def suite_text(suite: dict[str, Any], remark: str) -> str:
    """A suite as YAML with a remark on top."""
    body = yaml.safe_dump(suite, sort_keys=False, allow_unicode=True, width=10_000)
    return "".join(f"# {line}\n" for line in remark.splitlines()) + body


PREFERRED_REMARK = (
    "What a model that prefers whole sentences must show: the form of the answer alone is judged, not its fact.\n"
    "Written by `finetuneflow.models.starter.preferences`; it asks about entities that no training file mentions,\n"
    "and asks nothing that the acceptance suite asks."
)
SPECIALISED_REMARK = "Country cards of held-out countries. Written by `finetuneflow.models.starter.preferences`."


# --- files ----------------------------------------------------------------------------------------


def write_all(folder: Path, *, seed: int = DEFAULT_SEED) -> dict[str, int]:
    """Write every training file, its validation file, and the suites; returns the rows or prompts of each by its name."""
    written: dict[str, int] = {}
    folder.mkdir(parents=True, exist_ok=True)
    makers: tuple[tuple[str, Any, int], ...] = (
        ("sft", mixed, NUM_SFT),
        ("pairs", pairs, NUM_PAIRS),
        ("prompts", prompts, NUM_PROMPTS),
        *((name, _stage_maker(name), NUM_STAGE) for name in ("general", "conversational", "specialised")),
    )
    for name, make, count in makers:
        training = make(split="tuning", seed=seed, count=count)
        validation = _unseen(make(split="development", seed=seed, count=NUM_VALIDATION), training)
        for file, rows in ((f"{name}.jsonl", training), (f"{name}-validation.jsonl", validation)):
            _write_lines(folder / file, rows)
            written[file] = len(rows)
    for split in ("development", "acceptance"):
        prefix = "development-" if split == "development" else ""
        suites = (("preferred", preferred_suite, PREFERRED_REMARK), ("specialised", specialised_suite, SPECIALISED_REMARK))
        for name, make_suite, remark in suites:
            suite = make_suite(split)
            (folder / f"{prefix}{name}.yaml").write_text(suite_text(suite, remark), "utf-8")
            written[f"{prefix}{name}.yaml"] = len(suite["prompts"])
    return written


def _stage_maker(name: str) -> Any:
    return lambda **options: stage(name, **options)


def _unseen(validation: Sequence[Any], training: Sequence[Any]) -> list[Any]:
    """The rows that training does not hold, exactly or nearly: ages and hobbies, unlike names and towns, belong to no split."""
    seen = {leak.eval_index for leak in leaks(_examples(training), _examples(validation))}
    return [row for index, row in enumerate(validation) if index not in seen]


def _examples(rows: Sequence[Any]) -> list[Any]:
    return list(to_examples(Row(Place("", index), row) for index, row in enumerate(rows)))


def _write_lines(path: Path, rows: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the data of the starter's preference and multi-stage experiments.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the files to")
    parser.add_argument(
        "--seed", type=int, default=DEFAULT_SEED, help=f"the same seed gives the same files (default: {DEFAULT_SEED})"
    )
    arguments = parser.parse_args()
    written = write_all(arguments.out, seed=arguments.seed)
    print(f"Wrote {len(written)} files to {arguments.out}:")
    for name, count in written.items():
        print(f"  {name:<32}{count:>6,} {'prompts' if name.endswith('.yaml') else 'rows'}")


if __name__ == "__main__":
    main()
