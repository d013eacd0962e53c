"""The starter's instruction-tuning set: `python -m finetuneflow.models.starter.tuning --out DIR`.

Writes `train.jsonl` and `validation.jsonl`, one `{"messages": [...]}` a line, the same bytes for
the same seed. The training file asks about entities of the "tuning" split only, the validation
file (for the evaluation loss) about those of the "development" split; what the acceptance suite
asks about is in neither. So tuning can teach how to answer, never what.

A question of a kind is `(messages up to and with the user's last turn, the answer)`. Each kind
draws its own entity, phrasing and language from the generator it is given.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random
from typing import TypeVar

from finetuneflow.models.starter import world
from finetuneflow.models.starter.corpus import invented_word
from finetuneflow.models.starter.world import Language, Split

Message = dict[str, str]
Example = dict[str, list[Message]]
Templates = dict[Language, tuple[str, ...]]
Kind = Callable[[Random, Language, Split], list[Message]]
Entity = TypeVar("Entity")

DEFAULT_SEED = 7
NUM_TRAINING_EXAMPLES = 6_400
NUM_VALIDATION_EXAMPLES = 160


def examples(
    *,
    split: Split,
    seed: int,
    count: int,
    kinds: Sequence[str] | None = None,
    languages: Sequence[Language] = world.LANGUAGES,
) -> list[Example]:
    """Distinct conversations about the entities of one split, in a random but fixed order. `kinds`: names of `KINDS`; None: all."""
    rng = Random(f"{split}:{seed}")
    wanted, weights = zip(*(KINDS[name] for name in kinds or KINDS), strict=True)
    found: dict[str, Example] = {}
    while len(found) < count:
        kind: Kind = rng.choices(wanted, weights)[0]
        language = rng.choice(languages)
        messages = _dressed(rng, language, kind(rng, language, split))
        found.setdefault(json.dumps(messages), {"messages": messages})
    return list(found.values())


def write(path: Path, conversations: Iterable[Example]) -> None:
    """Write one conversation a line."""
    lines = (json.dumps(conversation, ensure_ascii=False) for conversation in conversations)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _ask(rng: Random, templates: Templates, language: Language, **words: object) -> str:
    return _sentence(rng.choice(templates[language]).format(**words))


def _turn(question: str, answer: str) -> list[Message]:
    return [_user(question), _assistant(answer)]


def _of_split(entities: Sequence[Entity], split: Split) -> list[Entity]:
    return [entity for entity in entities if entity.split == split]  # type: ignore[attr-defined]


def _keys(splits: dict[str, Split], split: Split) -> list[str]:
    return [key for key, own in splits.items() if own == split]


_SYSTEM: Templates = {
    "en": ("You are a helpful assistant.", "Answer briefly.", "You are a polite assistant."),
    "fr": ("Tu es un assistant utile.", "Réponds brièvement.", "Vous êtes un assistant poli."),
}


def _dressed(rng: Random, language: Language, messages: list[Message]) -> list[Message]:
    """Now and then add a system message, or type the user's text as other keyboards do."""
    if rng.random() < 0.10:
        messages = [{"role": "system", "content": rng.choice(_SYSTEM[language])}, *messages]
    if rng.random() < 0.08:
        messages = [_retyped(message, "'", "\u2019") for message in messages]
    if rng.random() < 0.08:
        messages = [_retyped(message, " ?", rng.choice(("?", "\u00a0?"))) for message in messages]
    return messages


def _retyped(message: Message, old: str, new: str) -> Message:
    if message["role"] != "user":
        return message
    return _user(message["content"].replace(old, new))


ONE_WORD: Templates = {
    "en": (
        "{q} Answer in one word.",
        "{q} One word only.",
        "In one word: {q}",
        "{q} Reply with one word.",
        "{q} Just one word, please.",
        "Answer with a single word. {q}",
    ),
    "fr": (
        "{q} Réponds en un mot.",
        "{q} Un seul mot.",
        "En un mot : {q}",
        "{q} Réponds par un seul mot.",
        "{q} Juste un mot, s'il te plaît.",
        "Réponds en un seul mot. {q}",
    ),
}

# --- Capitals ------------------------------------------------------------------------------------

_CAPITAL_QUESTIONS: Templates = {
    "en": (
        "what is the capital {of}?",
        "what is the capital {of}?",
        "what's the capital {of}?",
        "which city is the capital {of}?",
        "tell me the capital {of}.",
        "name the capital {of}.",
        "can you tell me the capital {of}?",
        "do you know the capital {of}?",
        "I would like to know the capital {of}.",
        "give me the capital {of}, please.",
        "what is the capital city {of}?",
        "the capital {of}?",
    ),
    "fr": (
        "quelle est la capitale {of} ?",
        "quelle est la capitale {of} ?",
        "quelle ville est la capitale {of} ?",
        "dis-moi la capitale {of}.",
        "donne-moi la capitale {of}.",
        "peux-tu me dire la capitale {of} ?",
        "connais-tu la capitale {of} ?",
        "je voudrais connaître la capitale {of}.",
        "c'est quoi, la capitale {of} ?",
        "quelle est donc la capitale {of} ?",
        "la capitale {of} ?",
        "pouvez-vous me donner la capitale {of} ?",
    ),
}
_CAPITAL_ANSWER: dict[Language, str] = {
    "en": "The capital {of} is {capital}.",
    "fr": "La capitale {of} est {capital}.",
}


def _capital(rng: Random, language: Language, split: Split) -> list[Message]:
    country = rng.choice(_of_split(world.COUNTRIES, split))
    of, capital = country.of[language], country.capital[language]
    question = _ask(rng, _CAPITAL_QUESTIONS, language, of=of)
    return _turn(question, _CAPITAL_ANSWER[language].format(of=of, capital=capital))


def _capital_in_one_word(rng: Random, language: Language, split: Split) -> list[Message]:
    countries = _of_split(world.COUNTRIES, split)
    country = rng.choice([c for c in countries if " " not in c.capital[language]])
    question = _ask(rng, _CAPITAL_QUESTIONS, language, of=country.of[language])
    return _turn(_ask(rng, ONE_WORD, language, q=question), country.capital[language])


# --- Sums ----------------------------------------------------------------------------------------

_SUM_QUESTIONS: Templates = {
    "en": (
        "what is {a} + {b}?",
        "what is {a}+{b}?",
        "what is {a} plus {b}?",
        "how much is {a} + {b}?",
        "how much is {a} plus {b}?",
        "calculate {a} + {b}.",
        "add {a} and {b}.",
        "{a} + {b} = ?",
        "can you add {a} and {b}?",
        "what do {a} and {b} make?",
    ),
    "fr": (
        "combien font {a} + {b} ?",
        "combien font {a}+{b} ?",
        "combien font {a} plus {b} ?",
        "combien font {a} et {b} ?",
        "calcule {a} + {b}.",
        "ajoute {a} et {b}.",
        "{a} + {b} = ?",
        "quelle est la somme de {a} et {b} ?",
        "peux-tu calculer {a} + {b} ?",
        "quel est le résultat de {a} + {b} ?",
    ),
}
NUMBER_ONLY: Templates = {
    "en": ("{q} Just the number.", "{q} Give only the number.", "{q} Answer with a number only."),
    "fr": ("{q} Juste le nombre.", "{q} Donne seulement le nombre.", "{q} Réponds par un nombre."),
}


def _addends(rng: Random, split: Split) -> tuple[int, int]:
    while True:
        first, second = rng.randint(0, world.LARGEST_ADDEND), rng.randint(0, world.LARGEST_ADDEND)
        if world.split_of_sum(first, second) == split:
            return first, second


def _sum(rng: Random, language: Language, split: Split) -> list[Message]:
    first, second = _addends(rng, split)
    question = _ask(rng, _SUM_QUESTIONS, language, a=first, b=second)
    return _turn(question, f"{first} + {second} = {first + second}.")


def _sum_as_number(rng: Random, language: Language, split: Split) -> list[Message]:
    first, second = _addends(rng, split)
    question = _ask(rng, _SUM_QUESTIONS, language, a=first, b=second)
    return _turn(_ask(rng, NUMBER_ONLY, language, q=question), str(first + second))


# --- Opposites, colours, sounds ------------------------------------------------------------------

_OPPOSITE_QUESTIONS: Templates = {
    "en": (
        "what is the opposite of {a}?",
        "what is the opposite of {a}?",
        "what's the opposite of {a}?",
        "give me the opposite of {a}.",
        "which word is the opposite of {a}?",
        'what is the opposite of "{a}"?',
        "tell me the opposite of {a}.",
    ),
    "fr": (
        "quel est le contraire de {a} ?",
        "quel est le contraire de {a} ?",
        "donne-moi le contraire de {a}.",
        "quel mot est le contraire de {a} ?",
        "quel est le contraire de « {a} » ?",
        "dis-moi le contraire de {a}.",
        "c'est quoi, le contraire de {a} ?",
    ),
}
_OPPOSITE_ANSWER: dict[Language, str] = {
    "en": "The opposite of {a} is {b}.",
    "fr": "Le contraire de {a} est {b}.",
}
_COLOUR_QUESTIONS: Templates = {
    "en": (
        "what colour is {thing}?",
        "what colour is {thing}?",
        "what is the colour of {thing}?",
        "tell me the colour of {thing}.",
        "which colour is {thing}?",
    ),
    "fr": (
        "de quelle couleur est {thing} ?",
        "de quelle couleur est {thing} ?",
        "dis-moi de quelle couleur est {thing}.",
        "{thing} est de quelle couleur ?",
        "quelle couleur a {thing} ?",
    ),
}
_COLOUR_ANSWER: dict[Language, str] = {
    "en": "{thing} is {colour}.",
    "fr": "{thing} est {colour}.",
}
_SOUND_QUESTIONS: Templates = {
    "en": (
        "what sound does {animal} make?",
        "what sound does {animal} make?",
        "what noise does {animal} make?",
        "which sound does {animal} make?",
        "tell me the sound of {animal}.",
    ),
    "fr": (
        "quel cri pousse {animal} ?",
        "quel cri pousse {animal} ?",
        "que fait {animal} comme cri ?",
        "comment crie {animal} ?",
        "dis-moi comment crie {animal}.",
    ),
}


def _opposite_words(rng: Random, language: Language, split: Split) -> tuple[str, str]:
    first, second = rng.sample(rng.choice(_of_split(world.OPPOSITES, split)).pair[language], 2)
    return first, second


def _opposite(rng: Random, language: Language, split: Split) -> list[Message]:
    first, second = _opposite_words(rng, language, split)
    question = _ask(rng, _OPPOSITE_QUESTIONS, language, a=first)
    return _turn(question, _OPPOSITE_ANSWER[language].format(a=first, b=second))


def _opposite_in_one_word(rng: Random, language: Language, split: Split) -> list[Message]:
    first, second = _opposite_words(rng, language, split)
    question = _ask(rng, _OPPOSITE_QUESTIONS, language, a=first)
    return _turn(_ask(rng, ONE_WORD, language, q=question), _sentence(second))


def _colour(rng: Random, language: Language, split: Split) -> list[Message]:
    item = rng.choice(_of_split(world.COLOURED_THINGS, split))
    thing, colour = item.name[language], item.agreeing[language]
    question = _ask(rng, _COLOUR_QUESTIONS, language, thing=thing)
    return _turn(question, _sentence(_COLOUR_ANSWER[language].format(thing=thing, colour=colour)))


def _sound(rng: Random, language: Language, split: Split) -> list[Message]:
    item = rng.choice(_of_split(world.ANIMAL_SOUNDS, split))
    animal = item.animal[language]
    question = _ask(rng, _SOUND_QUESTIONS, language, animal=animal)
    return _turn(question, _sentence(f"{animal} {item.verb[language]}."))


# --- Lists of three ------------------------------------------------------------------------------

_LIST_QUESTIONS: Templates = {
    "en": (
        "name three {plural}.",
        "name three {plural}.",
        "give me three {plural}.",
        "list three {plural}.",
        "can you name three {plural}?",
        "tell me three {plural}.",
        "give me a list of three {plural}.",
        "I need three {plural}.",
    ),
    "fr": (
        "cite trois {plural}.",
        "cite trois {plural}.",
        "donne-moi trois {plural}.",
        "nomme trois {plural}.",
        "peux-tu citer trois {plural} ?",
        "dis-moi trois {plural}.",
        "donne-moi une liste de trois {plural}.",
        "il me faut trois {plural}.",
    ),
}
_AND: dict[Language, str] = {"en": "and", "fr": "et"}


def _list_of_three(rng: Random, language: Language, split: Split) -> list[Message]:
    category = rng.choice(_of_split(world.CATEGORIES, split))
    first, second, third = category.members[language][:3]
    question = _ask(rng, _LIST_QUESTIONS, language, plural=category.plural[language])
    return _turn(question, _sentence(f"{first}, {second} {_AND[language]} {third}."))


# --- Conversations that must be kept in mind -----------------------------------------------------

# what the user says | the assistant's reply | the later question | its answer
_MEMORIES: dict[Language, tuple[tuple[tuple[str, ...], str, tuple[str, ...], str], ...]] = {
    "en": (
        (
            ("My name is {name}.", "I am {name}.", "Hello, my name is {name}.", "I'm called {name}."),
            "Nice to meet you, {name}.",
            ("What is my name?", "What's my name?", "Do you remember my name?", "Who am I?"),
            "Your name is {name}.",
        ),
        (
            ("My dog is called {pet}.", "I have a dog called {pet}."),
            "{pet} is a nice name.",
            ("What is my dog called?", "What is the name of my dog?"),
            "Your dog is called {pet}.",
        ),
        (
            ("My cat is called {pet}.", "I have a cat called {pet}."),
            "{pet} is a nice name.",
            ("What is my cat called?", "What is the name of my cat?"),
            "Your cat is called {pet}.",
        ),
        (
            ("I live in {town}.", "My house is in {town}."),
            "{town} is a nice town.",
            ("Where do I live?", "In which town do I live?"),
            "You live in {town}.",
        ),
        (
            ("I am {age} years old.", "I'm {age} years old."),
            "Thank you, I will remember that.",
            ("How old am I?", "What is my age?"),
            "You are {age} years old.",
        ),
        (
            ("I like {hobby}.", "I really like {hobby}."),
            "That is a good choice.",
            ("What do I like?", "Do you remember what I like?"),
            "You like {hobby}.",
        ),
    ),
    "fr": (
        (
            (
                "Je m'appelle {name}.",
                "Mon nom est {name}.",
                "Bonjour, je m'appelle {name}.",
                "Moi, c'est {name}.",
            ),
            "Enchanté, {name}.",
            ("Comment je m'appelle ?", "Quel est mon nom ?", "Tu te souviens de mon nom ?"),
            "Tu t'appelles {name}.",
        ),
        (
            ("Mon chien s'appelle {pet}.", "J'ai un chien, {pet}."),
            "{pet} est un joli nom.",
            ("Comment s'appelle mon chien ?", "Quel est le nom de mon chien ?"),
            "Ton chien s'appelle {pet}.",
        ),
        (
            ("Mon chat s'appelle {pet}.", "J'ai un chat, {pet}."),
            "{pet} est un joli nom.",
            ("Comment s'appelle mon chat ?", "Quel est le nom de mon chat ?"),
            "Ton chat s'appelle {pet}.",
        ),
        (
            ("J'habite à {town}.", "Ma maison est à {town}."),
            "{town} est une jolie ville.",
            ("Où est-ce que j'habite ?", "Dans quelle ville est-ce que j'habite ?"),
            "Tu habites à {town}.",
        ),
        (
            ("J'ai {age} ans.", "J'ai déjà {age} ans."),
            "Merci, je m'en souviendrai.",
            ("Quel âge ai-je ?", "Quel est mon âge ?"),
            "Tu as {age} ans.",
        ),
        (
            ("J'aime {hobby}.", "J'aime beaucoup {hobby}."),
            "C'est un bon choix.",
            ("Qu'est-ce que j'aime ?", "Tu te souviens de ce que j'aime ?"),
            "Tu aimes {hobby}.",
        ),
    ),
}


def _memory(rng: Random, language: Language, split: Split) -> list[Message]:
    """The user states something, maybe asks about other things, then asks for it back."""
    words = {
        "name": rng.choice(_of_split(world.PEOPLE, split)).name,
        "pet": rng.choice(_keys(world.PETS, split)),
        "town": rng.choice(_keys(world.TOWNS, split)),
        "age": rng.randint(5, 90),
        "hobby": rng.choice(world.HOBBIES[language]),
    }
    topics = _MEMORIES[language]
    stated, reply, asked, answer = rng.choices(topics, (5, *(1,) * (len(topics) - 1)))[0]
    statement = rng.choice(stated).format(**words)
    question, reminder = rng.choice(asked), answer.format(**words)
    if rng.random() < 0.15:
        return _turn(f"{statement} {question}", reminder)
    opening = _turn(statement, reply.format(**words))
    between = _aside(rng, language, split) if rng.random() < 0.4 else []
    return [*opening, *between, *_turn(question, reminder)]


def _aside(rng: Random, language: Language, split: Split) -> list[Message]:
    kind = rng.choice((_capital, _sum, _opposite, _colour))
    return kind(rng, language, split)


# --- Copying and courtesy ------------------------------------------------------------------------

_REPEAT_QUESTIONS: Templates = {
    "en": (
        "repeat the word {w}.",
        'repeat the word "{w}".',
        "say the word {w}.",
        "write the word {w}.",
        "repeat after me: {w}.",
    ),
    "fr": (
        "répète le mot {w}.",
        "répète le mot « {w} ».",
        "dis le mot {w}.",
        "écris le mot {w}.",
        "répète après moi : {w}.",
    ),
}
# The phrasings of the validation file differ from those of the training file.
_COURTESIES: dict[Language, tuple[tuple[str, str, Split], ...]] = {
    "en": (
        ("Hello!", "Hello! How can I help you?", "tuning"),
        ("Hello", "Hello! How can I help you?", "tuning"),
        ("Hi!", "Hello! How can I help you?", "tuning"),
        ("Good morning!", "Hello! How can I help you?", "tuning"),
        ("Good afternoon!", "Hello! How can I help you?", "tuning"),
        ("Hello there!", "Hello! How can I help you?", "tuning"),
        ("Hi there!", "Hello! How can I help you?", "tuning"),
        ("Hey!", "Hello! How can I help you?", "tuning"),
        ("Hello, can you help me?", "Hello! How can I help you?", "tuning"),
        ("How are you?", "I am fine, thank you. And you?", "tuning"),
        ("Thank you!", "You are welcome.", "tuning"),
        ("Thank you for your help.", "You are welcome.", "tuning"),
        ("Goodbye!", "Goodbye! See you soon.", "tuning"),
        ("See you tomorrow!", "Goodbye! See you soon.", "tuning"),
        ("Good day!", "Hello! How can I help you?", "development"),
        ("Thanks!", "You are welcome.", "development"),
    ),
    "fr": (
        ("Bonjour !", "Bonjour ! Comment puis-je vous aider ?", "tuning"),
        ("Bonjour", "Bonjour ! Comment puis-je vous aider ?", "tuning"),
        ("Salut !", "Bonjour ! Comment puis-je vous aider ?", "tuning"),
        ("Bon après-midi !", "Bonjour ! Comment puis-je vous aider ?", "tuning"),
        ("Coucou !", "Bonjour ! Comment puis-je vous aider ?", "tuning"),
        ("Bonjour à toi !", "Bonjour ! Comment puis-je vous aider ?", "tuning"),
        ("Rebonjour !", "Bonjour ! Comment puis-je vous aider ?", "tuning"),
        ("Bonjour, peux-tu m'aider ?", "Bonjour ! Comment puis-je vous aider ?", "tuning"),
        ("Comment vas-tu ?", "Je vais bien, merci. Et toi ?", "tuning"),
        ("Comment allez-vous ?", "Je vais bien, merci. Et vous ?", "tuning"),
        ("Merci !", "De rien.", "tuning"),
        ("Merci pour ton aide.", "De rien.", "tuning"),
        ("Au revoir !", "Au revoir ! À bientôt.", "tuning"),
        ("À demain !", "Au revoir ! À bientôt.", "tuning"),
        ("Bonne journée !", "Au revoir ! À bientôt.", "development"),
        ("Merci bien !", "De rien.", "development"),
    ),
}


def _repeat(rng: Random, language: Language, split: Split) -> list[Message]:
    """Half of the words are made up: they can only be read off the question, never known."""
    invented = split == "tuning" and rng.random() < 0.5
    word = invented_word(rng) if invented else rng.choice(_of_split(world.WORDS, split)).word[language]
    return _turn(_ask(rng, _REPEAT_QUESTIONS, language, w=word), _sentence(word))


def _courtesy(rng: Random, language: Language, split: Split) -> list[Message]:
    lines = [(said, reply) for said, reply, own in _COURTESIES[language] if own == split]
    said, reply = rng.choice(lines)
    return _turn(said, reply)


# name -> how a question of the kind is drawn, and how often
KINDS: dict[str, tuple[Kind, float]] = {
    "capital": (_capital, 18),
    "capital_in_one_word": (_capital_in_one_word, 12),
    "sum": (_sum, 9),
    "sum_as_number": (_sum_as_number, 8),
    "opposite": (_opposite, 9),
    "opposite_in_one_word": (_opposite_in_one_word, 6),
    "colour": (_colour, 7),
    "sound": (_sound, 5),
    "list_of_three": (_list_of_three, 12),
    "memory": (_memory, 14),
    "repeat": (_repeat, 10),
    "courtesy": (_courtesy, 3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the starter's instruction-tuning set.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the files to")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--examples", type=int, default=NUM_TRAINING_EXAMPLES)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    training = examples(split="tuning", seed=arguments.seed, count=arguments.examples)
    write(arguments.out / "train.jsonl", training)
    validation = examples(split="development", seed=arguments.seed, count=NUM_VALIDATION_EXAMPLES)
    write(arguments.out / "validation.jsonl", validation)


if __name__ == "__main__":
    main()
