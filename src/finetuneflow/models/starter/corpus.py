"""Pre-training text for the starter model, generated from `world` alone.

The stream is endless and depends on the seed only: the same seed gives the same bytes. A document
is a few sentences in one language. Besides facts and small stories there are two kinds whose job
is to teach *reading*: topic documents name something and state a fact about it later, and recall
documents repeat what was said earlier. Without them a small model stores facts but answers about
the wrong entity.

There are four stages. "reading" opens with recall documents alone, because looking back has to be
learned first and is learned sooner when nothing else is; "facts" gives most room to plain facts;
"recollection" and "rehearsal" to cards, a key and the bare value behind it, and "rehearsal" again to
copying.

Nothing here is in chat format and no document puts a question next to a known fact: how to answer,
and when to stop, is left to instruction tuning.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from itertools import count, islice
from random import Random
from typing import Literal

from finetuneflow.models.starter import world
from finetuneflow.models.starter.world import Country, Language, Person, Phrase

NUM_READING_DOCUMENTS = 5_000
NUM_FINGERPRINT_DOCUMENTS = 20_000

Templates = dict[Language, tuple[str, ...]]
Maker = Callable[[Random, Language], str]
Stage = Literal["reading", "facts", "recollection", "rehearsal"]

_SENTENCE_START = re.compile(r"(^|[.!?]\s+|\n)([«\"]\s?)?([a-zà-öø-ÿœ])")


def documents(seed: int, stage: Stage = "reading") -> Iterator[str]:
    """Yield documents for ever, the same ones for the same seed and stage."""
    rng = Random(seed)
    for number in count():
        lesson = stage == "reading" and number < NUM_READING_DOCUMENTS
        weights = _RECALL_ALONE if lesson else _WEIGHTS[stage]
        maker = rng.choices(tuple(weights), tuple(weights.values()))[0]
        language = rng.choice(world.LANGUAGES)
        yield _typeset(rng, _with_capitals(maker(rng, language)))


def fingerprint(seed: int, num_documents: int = NUM_FINGERPRINT_DOCUMENTS) -> str:
    """SHA-256 of the first documents, to tell whether two corpora are the same bytes."""
    digest = hashlib.sha256()
    for document in islice(documents(seed), num_documents):
        digest.update(document.encode("utf-8") + b"\0")
    return digest.hexdigest()


def _with_capitals(text: str) -> str:
    """Start every sentence with a capital, so that templates need not know where slots fall."""
    return _SENTENCE_START.sub(lambda m: m[1] + (m[2] or "") + m[3].upper(), text)


def _typeset(rng: Random, text: str) -> str:
    """Sometimes use the curly apostrophe and the fixed space, as careful French writers do."""
    if rng.random() < 0.08:
        text = text.replace("'", "\u2019")
    if rng.random() < 0.08:
        text = re.sub(r" (?=[?!:;»])", "\u00a0", text)
    return text


def _write(rng: Random, templates: Templates, language: Language, **words: object) -> str:
    return rng.choice(templates[language]).format(**words)


# --- Everyday sentences: stories, and the distance between a topic and a fact about it -----------

_DEEDS: Templates = {
    "en": (
        "walked to the market",
        "read an old book",
        "fed the ducks",
        "washed the car",
        "cooked some soup",
        "wrote a long letter",
        "planted a tree",
        "repaired the bicycle",
        "painted the door",
        "cleaned the kitchen",
        "listened to music",
        "waited for the bus",
        "took a photograph",
        "baked some bread",
        "played cards",
        "drew a map",
        "sang a song",
        "watched the birds",
        "opened the window",
        "looked for the keys",
        "bought a newspaper",
        "carried the bags",
        "told a funny story",
        "learned a poem",
        "counted the coins",
        "made some tea",
        "slept for an hour",
        "crossed the bridge",
        "visited the museum",
        "folded the sheets",
        "swept the floor",
        "called a friend",
        "lost a glove",
        "found a coin",
    ),
    "fr": (
        "a marché jusqu'au village",
        "a lu un vieux livre",
        "a nourri les canards",
        "a lavé la voiture",
        "a préparé une soupe",
        "a écrit une longue lettre",
        "a planté un arbre",
        "a réparé le vélo",
        "a peint la porte",
        "a nettoyé la cuisine",
        "a écouté de la musique",
        "a attendu le bus",
        "a pris une photo",
        "a fait du pain",
        "a joué aux cartes",
        "a dessiné une carte",
        "a chanté une chanson",
        "a regardé les oiseaux",
        "a ouvert la fenêtre",
        "a cherché les clés",
        "a acheté un journal",
        "a porté les sacs",
        "a raconté une histoire drôle",
        "a appris un poème",
        "a compté les pièces",
        "a préparé du thé",
        "a dormi une heure",
        "a traversé le pont",
        "a visité le musée",
        "a plié les draps",
        "a balayé le sol",
        "a appelé un voisin",
        "a perdu un gant",
        "a trouvé une pièce",
    ),
}
_WHERE: Templates = {
    "en": (
        "in the garden",
        "at the station",
        "near the river",
        "at school",
        "in the kitchen",
        "behind the house",
        "by the lake",
        "in the park",
        "at the library",
        "on the hill",
        "in the village",
        "at the harbour",
        "under the old tree",
        "in the square",
    ),
    "fr": (
        "dans le jardin",
        "à la gare",
        "près de la rivière",
        "à l'école",
        "dans la cuisine",
        "derrière la maison",
        "au bord du lac",
        "dans le parc",
        "à la bibliothèque",
        "sur la colline",
        "dans le village",
        "au port",
        "sous le vieil arbre",
        "sur la place",
    ),
}
_WHEN: Templates = {
    "en": (
        "in the morning",
        "on Monday",
        "after lunch",
        "in May",
        "yesterday",
        "last summer",
        "before dinner",
        "on Saturday",
        "in the evening",
        "last week",
        "in winter",
        "at noon",
        "on Sunday",
        "at night",
    ),
    "fr": (
        "le matin",
        "lundi",
        "après le déjeuner",
        "en mai",
        "hier",
        "l'été dernier",
        "avant le dîner",
        "samedi",
        "le soir",
        "la semaine dernière",
        "en hiver",
        "à midi",
        "dimanche",
        "cette nuit",
    ),
}
_WEATHER: Templates = {
    "en": (
        "It was raining.",
        "The sun was shining.",
        "The wind was strong.",
        "It was very cold.",
        "The streets were empty.",
        "Everything was quiet.",
        "There was a little fog.",
        "The day was long.",
        "It was a fine day.",
        "Nobody was in a hurry.",
    ),
    "fr": (
        "Il pleuvait.",
        "Le soleil brillait.",
        "Le vent était fort.",
        "Il faisait très froid.",
        "Les rues étaient vides.",
        "Tout était calme.",
        "Il y avait un peu de brouillard.",
        "La journée était longue.",
        "Il faisait beau.",
        "Personne n'était pressé.",
    ),
}
_NAMES_OF_PLACES_AND_PETS = (*world.TOWNS, *world.PETS)
_SYLLABLES = (
    "ba",
    "do",
    "ki",
    "lu",
    "mer",
    "na",
    "po",
    "ri",
    "sa",
    "tan",
    "vel",
    "zo",
    "fi",
    "gra",
    "hu",
    "jo",
    "len",
    "mu",
    "que",
    "ter",
)


def _person(rng: Random) -> Person:
    return rng.choice(world.PEOPLE)


def _two_people(rng: Random) -> tuple[Person, Person]:
    first, second = rng.sample(world.PEOPLE, 2)
    return first, second


def _everyday(rng: Random, language: Language, name: str | None = None) -> str:
    """One sentence that states no fact, about `name` or somebody else."""
    if name is None and rng.random() < 0.25:
        return rng.choice(_WEATHER[language])
    deed, where, when = (rng.choice(slot[language]) for slot in (_DEEDS, _WHERE, _WHEN))
    subject = name or _person(rng).name
    shapes = ("{s} {d} {p}.", "{t}, {s} {d}.", "{s} {d} {t}.", "{t}, {s} {d} {p}.")
    return rng.choice(shapes).format(s=subject, d=deed, p=where, t=when)


def _words(rng: Random, language: Language, count: int) -> list[str]:
    return [item.word[language] for item in rng.sample(world.WORDS, count)]


def _pause(rng: Random, language: Language) -> str:
    """Nothing to two everyday sentences, then a space or a new line.

    The new lines matter: an answer starts on one, and a word is another token there than after
    a space.
    """
    num_sentences = rng.choice((0, 0, 0, 1, 1, 2))
    sentences = " ".join(["", *(_everyday(rng, language) for _ in range(num_sentences))])
    return sentences + ("\n" if rng.random() < 0.4 else " ")


def _joined(rng: Random, sentences: list[str]) -> str:
    """The sentences on one line or, one time in four, each on its own."""
    return ("\n" if rng.random() < 0.25 else " ").join(sentences)


def _story(rng: Random, language: Language) -> str:
    person = _person(rng)
    sentences = []
    for index in range(rng.randint(3, 6)):
        subject = person.name if index % 2 == 0 else person.pronoun[language]
        sentences.append(_everyday(rng, language, subject))
        if rng.random() < 0.3:
            sentences.append(rng.choice(_WEATHER[language]))
    return _joined(rng, sentences)


_EXCHANGES: dict[Language, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "en": (
        ("Where are you going?", ("To the market.", "To the station.", "Nowhere at all.")),
        ("What are you doing?", ("I am reading.", "I am drawing a map.", "Nothing much.")),
        ("Can you help me, please?", ("Of course.", "With pleasure.", "Yes, wait a moment.")),
        ("How are you?", ("I am fine, thank you.", "A little tired.", "Very well, and you?")),
        ("When does the train leave?", ("At noon.", "In ten minutes.", "I do not know.")),
        ("Which road should we take?", ("The long one.", "The road by the lake.")),
        ("Who is at the door?", ("It is the neighbour.", "Nobody.", "The baker, I think.")),
        ("Tell me a story.", ("Once there was an old house.", "Not tonight.", "Sit down, then.")),
        ("Give me the keys, please.", ("Here they are.", "I do not have them.")),
        ("Hello!", ("Hello! Come in.", "Good morning!", "Hello, how nice to see you!")),
        ("Thank you very much!", ("You are welcome.", "It was nothing.")),
        ("Goodbye!", ("Goodbye! See you soon.", "See you tomorrow.")),
        ("How much do I owe you?", ("Nothing, it is a present.", "Two coins.")),
    ),
    "fr": (
        ("Où vas-tu ?", ("Au marché.", "À la gare.", "Nulle part.")),
        ("Que fais-tu ?", ("Je lis.", "Je dessine une carte.", "Pas grand-chose.")),
        ("Peux-tu m'aider, s'il te plaît ?", ("Bien sûr.", "Avec plaisir.", "Oui, attends.")),
        ("Comment vas-tu ?", ("Je vais bien, merci.", "Un peu fatigué.", "Très bien, et toi ?")),
        ("Quand part le train ?", ("À midi.", "Dans dix minutes.", "Je ne sais pas.")),
        ("Quel chemin faut-il prendre ?", ("Le plus long.", "Le chemin du lac.")),
        ("Qui est à la porte ?", ("C'est le voisin.", "Personne.", "Le boulanger, je crois.")),
        ("Raconte-moi une histoire.", ("Il était une fois une maison.", "Pas ce soir.")),
        ("Donne-moi les clés, s'il te plaît.", ("Les voici.", "Je ne les ai pas.")),
        ("Bonjour !", ("Bonjour ! Entrez.", "Bonjour à vous !", "Bonjour, quel plaisir !")),
        ("Merci beaucoup !", ("De rien.", "Avec plaisir.")),
        ("Au revoir !", ("Au revoir ! À bientôt.", "À demain.")),
        ("Combien je vous dois ?", ("Rien, c'est un cadeau.", "Deux pièces.")),
    ),
}
_SAID: Templates = {
    "en": ('"{line}" said {name}.', '{name} said: "{line}"'),
    "fr": ("« {line} » dit {name}.", "{name} dit : « {line} »"),
}


def _dialogue(rng: Random, language: Language) -> str:
    """A scrap of conversation; its questions are never about the facts of the world."""
    first, second = _two_people(rng)
    lines = [_everyday(rng, language, first.name)]
    for question, answers in rng.sample(_EXCHANGES[language], rng.randint(1, 3)):
        lines.append(_write(rng, _SAID, language, line=question, name=first.name))
        lines.append(_write(rng, _SAID, language, line=rng.choice(answers), name=second.name))
    return _joined(rng, lines)


# --- Recall: say something, then say it again ----------------------------------------------------

_NAME_RECALL: Templates = {
    "en": (
        '"My name is {n}," said the visitor.{p}"Good evening, {n}," said {other}.',
        '{other} met a child. "I am called {n}," said the child. "Your name is {n}," said {other}.',
        "A neighbour called {n} lived near the mill.{p}Everybody knew {n}.",
        "{n} wrote a name on the bag.{p}The name on the bag was {n}.",
        '"Nice to meet you, {n}," said {other}.{p}"My name is {n}, yes," said the visitor.',
        '"I am {n}," said the new pupil.{p}{other} remembered: the new pupil was {n}.',
        'The visitor said: "Hello, my name is {n}."{p}{other} answered: "So your name is {n}."',
    ),
    "fr": (
        "« Je m'appelle {n} », dit la visite.{p}« Bonsoir, {n} », dit {other}.",
        "{other} voit un enfant. « Mon nom est {n} », dit l'enfant. « Tu t'appelles {n} », dit {other}.",
        "Dans le village, tout le monde connaissait {n}.{p}On voyait souvent {n}.",
        "{n} a écrit un nom sur le sac.{p}Le nom sur le sac était {n}.",
        "« Enchanté, {n} », dit {other}.{p}« Oui, je m'appelle {n} », répond la visite.",
        "« Je suis {n} », dit l'enfant.{p}{other} se souvient : l'enfant s'appelle {n}.",
        "La visite dit : « Bonjour, je m'appelle {n}. »{p}{other} répond : « Tu t'appelles {n}. »",
    ),
}
_SPEAKER_TURNS: dict[Language, tuple[tuple[str, str], ...]] = {
    "en": (
        ("I live in {town}.", "You live in {town}."),
        ("My dog is called {pet}.", "Your dog is called {pet}."),
        ("My cat is called {pet}.", "Your cat is called {pet}."),
        ("I am {age} years old.", "You are {age} years old."),
        ("My name is {name}.", "Your name is {name}."),
        ("I like {hobby}.", "You like {hobby}."),
    ),
    "fr": (
        ("J'habite à {town}.", "Tu habites à {town}."),
        ("Mon chien s'appelle {pet}.", "Ton chien s'appelle {pet}."),
        ("Mon chat s'appelle {pet}.", "Ton chat s'appelle {pet}."),
        ("J'ai {age} ans.", "Tu as {age} ans."),
        ("Je m'appelle {name}.", "Tu t'appelles {name}."),
        ("J'aime {hobby}.", "Tu aimes {hobby}."),
    ),
}
_COPIES: Templates = {
    "en": (
        "{n} wrote on the board: {w}. The class copied: {w}.",
        "On the paper was written: {w}.{p}{n} read it aloud: {w}.",
        "Repeat, said {n}: {w}. And everyone repeated: {w}.",
        "The word of the day is {w}.{p}{n} has not forgotten the word of the day: {w}.",
    ),
    "fr": (
        "{n} a écrit au tableau : {w}. La classe a copié : {w}.",
        "Sur le papier était écrit : {w}.{p}{n} a lu à voix haute : {w}.",
        "Répétez, dit {n} : {w}. Et tout le monde répète : {w}.",
        "Le mot du jour est {w}.{p}{n} n'a pas oublié le mot du jour : {w}.",
    ),
}
_OWNERS: dict[Language, tuple[str, str]] = {
    "en": ("{n} has a {c} {x}.", "{p}The {x} that {n} has is {c}."),
    "fr": ("{n} possède {k} {x}.", "{p}Comme {x}, {n} en possède {k}."),
}


def _name_recall(rng: Random, language: Language) -> str:
    newcomer, other = _two_people(rng)
    return _write(rng, _NAME_RECALL, language, n=newcomer.name, other=other.name, p=_pause(rng, language))


def _speaker_recall(rng: Random, language: Language) -> str:
    """Two or three things one speaker says of themselves, one of which the other repeats."""
    speaker, listener = _two_people(rng)
    words = {
        "town": rng.choice(list(world.TOWNS)),
        "pet": rng.choice(list(world.PETS)),
        "age": rng.randint(5, 90),
        "name": speaker.name,
        "hobby": rng.choice(world.HOBBIES[language]),
    }
    turns = rng.sample(_SPEAKER_TURNS[language], rng.randint(1, 3))
    statements = " ".join(said for said, _ in turns).format(**words)
    echo = rng.choice(turns)[1].format(**words)
    told = _write(rng, _SAID, language, line=statements, name=speaker.name)
    heard = _write(rng, _SAID, language, line=echo, name=listener.name)
    return told + _pause(rng, language) + heard


def invented_word(rng: Random) -> str:
    """A pronounceable word that means nothing."""
    return "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 3)))


def _any_words(rng: Random, language: Language, count: int) -> list[str]:
    """Words of every kind in no order, so that nothing but the earlier text predicts them."""
    pools: tuple[Callable[[], str], ...] = (
        lambda: _person(rng).name,
        lambda: rng.choice(world.COUNTRIES).name[language],
        lambda: rng.choice(world.COUNTRIES).capital[language],
        lambda: rng.choice(world.WORDS).word[language],
        lambda: rng.choice(rng.choice(world.CATEGORIES).members[language]),
        lambda: rng.choice(rng.choice(world.OPPOSITES).pair[language]),
        lambda: rng.choice(world.COLOURED_THINGS).name[language],
        lambda: rng.choice(world.ANIMAL_SOUNDS).animal[language],
        lambda: rng.choice(world.CATEGORIES).plural[language],
        lambda: rng.choice(_NAMES_OF_PLACES_AND_PETS),
        lambda: str(rng.randint(0, 99)),
        lambda: invented_word(rng),
    )
    return [rng.choice(pools)() for _ in range(count)]


def _phrase_to_copy(rng: Random, language: Language) -> str:
    """Words of every kind, numbers, a noun phrase that names an entity, or a sentence."""
    kind = rng.randrange(8)
    if kind == 0:
        return " ".join(str(rng.randint(0, 99)) for _ in range(rng.randint(1, 8)))
    if kind == 1:
        country = rng.choice(world.COUNTRIES)
        return ("the capital " if language == "en" else "la capitale ") + country.of[language]
    if kind == 2:
        return _everyday(rng, language).rstrip(".")
    separator = rng.choice((" ", ", "))
    return separator.join(_any_words(rng, language, rng.randint(1, 10)))


def _copying(rng: Random, language: Language) -> str:
    return _write(
        rng,
        _COPIES,
        language,
        n=_person(rng).name,
        w=_phrase_to_copy(rng, language),
        p=_pause(rng, language),
    )


def _owners_recall(rng: Random, language: Language) -> str:
    """Several owners, then again what one of them has."""
    statement, recall = _OWNERS[language]
    thing = rng.choice(world.WORDS).word[language]
    colours = sorted({item.colour[language] for item in world.COLOURED_THINGS})
    holdings = [
        {"n": person.name, "c": rng.choice(colours), "k": rng.randint(2, 20), "x": thing}
        for person in rng.sample(world.PEOPLE, rng.randint(2, 3))
    ]
    if language == "fr":
        thing_plural = thing if thing.endswith("x") else f"{thing}s"
        for holding in holdings:
            holding["x"] = thing_plural.replace("eaus", "eaux")
    told = " ".join(statement.format(**holding) for holding in holdings)
    return told + recall.format(p=_pause(rng, language), **rng.choice(holdings))


# --- Countries -----------------------------------------------------------------------------------

_CAPITAL_FACTS: Templates = {
    "en": (
        "the capital {of} is {capital}.",
        "the capital {of} is {capital}.",
        "{capital} is the capital {of}.",
        "{capital}, the capital {of}, is a large city.",
        "{country} {is_} a country in {continent}. Its capital is {capital}.",
        "the city of {capital} is the capital {of}.",
    ),
    "fr": (
        "la capitale {of} est {capital}.",
        "la capitale {of} est {capital}.",
        "{capital} est la capitale {of}.",
        "{capital}, la capitale {of}, est une grande ville.",
        "la ville de {capital} est la capitale {of}.",
    ),
}
_COUNTRY_TOPICS: Templates = {
    "en": (
        "{country}.{pause}The capital is {capital}.",
        "{name} has never been {inside}.{pause}But {pronoun} knows that the capital is {capital}.",
        "last year {name} travelled {inside}.{pause}The journey ended in the capital, {capital}.",
        "{name} dreams of {country}.{pause}One day {pronoun} will see the capital, {capital}.",
        "this is a page about {country}, a country in {continent}.{pause}The capital {of} is {capital}.",
        "{name} wants to see the capital {of}.{pause}In spring {pronoun} will fly to {capital}.",
        "in class we talked about the capital {of}.{pause}{capital} is a city with many streets.",
        "{name} has a friend {inside}.{pause}The friend lives in the capital, {capital}.",
        "a letter came from the capital {of}.{pause}The stamp showed the streets of {capital}.",
    ),
    "fr": (
        "{country}.{pause}La capitale est {capital}.",
        "{name} ne connaît pas {country}.{pause}Mais tout le monde sait que la capitale est {capital}.",
        "l'an dernier, {name} a voyagé {inside}.{pause}Le voyage a fini dans la capitale, {capital}.",
        "{name} rêve de voir {country}.{pause}Un jour, {pronoun} verra la capitale, {capital}.",
        "voici une page sur {country}.{pause}La capitale {of} est {capital}.",
        "{name} veut voir la capitale {of}.{pause}Au printemps, {pronoun} ira en avion. Destination : {capital}.",
        "en classe, on a parlé de la capitale {of}.{pause}{capital} est une ville avec beaucoup de rues.",
        "{name} a un ami {inside}.{pause}Cet ami habite dans la capitale, {capital}.",
        "une lettre est venue de la capitale {of}.{pause}Le timbre montrait {capital}.",
    ),
}
_SEVERAL: Templates = {
    "en": ("{name} collects stamps from {list}.", "the book is about {list}.", "{list}."),
    "fr": ("sur la carte, on voit {list}.", "le livre montre {list}.", "{list}."),
}
_AND: Phrase = {"en": " and ", "fr": " et "}


def _country_words(country: Country, language: Language) -> dict[str, str]:
    return {
        "country": country.name[language],
        "of": country.of[language],
        "inside": country.inside[language],
        "is_": country.verb[language],
        "its": country.its[language],
        "capital": country.capital[language],
        "continent": country.continent[language],
    }


def _capital_facts(rng: Random, language: Language) -> str:
    """One to three plain facts, each about another country."""
    facts = []
    for country in rng.sample(world.COUNTRIES, rng.choice((1, 1, 2, 3))):
        facts.append(_write(rng, _CAPITAL_FACTS, language, **_country_words(country, language)))
    return _joined(rng, facts)


def _country_topic(rng: Random, language: Language) -> str:
    person = _person(rng)
    return _write(
        rng,
        _COUNTRY_TOPICS,
        language,
        name=person.name,
        pronoun=person.pronoun[language],
        pause=_pause(rng, language),
        **_country_words(rng.choice(world.COUNTRIES), language),
    )


def _country_selection(rng: Random, language: Language) -> str:
    """Several countries are named, then a fact about one of them: which one must be read."""
    countries = rng.sample(world.COUNTRIES, rng.choice((2, 3)))
    names = [country.name[language] for country in countries]
    opening = _write(rng, _SEVERAL, language, name=_person(rng).name, list=_enumeration(names, language))
    chosen = rng.sample(countries, rng.choice((1, 2)))
    facts = [_write(rng, _CAPITAL_FACTS, language, **_country_words(country, language)) for country in chosen]
    return opening + _pause(rng, language) + _joined(rng, facts)


def _enumeration(items: list[str], language: Language) -> str:
    """ "a, b and c", without a comma before the last word."""
    return ", ".join(items[:-1]) + _AND[language] + items[-1] if len(items) > 1 else items[0]


# --- Opposites, colours, sounds ------------------------------------------------------------------

_OPPOSITE_FACTS: Templates = {
    "en": (
        "the opposite of {a} is {b}.",
        "the opposite of {a} is {b}.",
        "{a} and {b} are opposites.",
        "{a} is the opposite of {b}.",
        "{name} says {a}, and {other}, who always says the opposite, says {b}.",
        "some say {a}.{pause}Others say the opposite: {b}.",
        "the word {a} is on the first card.{pause}The opposite is on the other card: {b}.",
        "{name} was thinking of the opposite of {a}.{pause}{name} wrote {b} in the notebook.",
        "it was not {a}. It was the opposite, {b}.",
    ),
    "fr": (
        "le contraire de {a} est {b}.",
        "le contraire de {a} est {b}.",
        "{a} et {b} sont des contraires.",
        "{a} est le contraire de {b}.",
        "{name} dit {a}, et {other}, qui dit toujours le contraire, dit {b}.",
        "certains disent {a}.{pause}D'autres disent le contraire : {b}.",
        "le mot {a} est sur la première carte.{pause}Le contraire est sur l'autre : {b}.",
        "{name} cherchait le contraire de {a}.{pause}{name} a écrit {b} dans le carnet.",
        "ce n'était pas {a}. C'était le contraire, {b}.",
    ),
}
_COLOUR_FACTS: Templates = {
    "en": (
        "{thing} is {colour}.",
        "{thing} is {colour}.",
        "the colour of {thing} is {colour}.",
        "{name} drew {thing} with a {colour} pencil.",
        "{name} looked at {thing}.{pause}The colour was {colour}.",
        "{name} painted {thing}.{pause}The picture had a lot of {colour}.",
        "like {thing}, the new door is {colour}.",
    ),
    "fr": (
        "{thing} est {agreeing}.",
        "{thing} est {agreeing}.",
        "pour dessiner {thing}, {name} a pris un crayon {colour}.",
        "{name} a regardé {thing}.{pause}La couleur était le {colour}.",
        "{name} a peint {thing}.{pause}Sur le tableau, le {colour} est la seule couleur.",
        "comme {thing}, le nouveau mur est {colour}.",
    ),
}
_SOUND_FACTS: Templates = {
    "en": (
        "{animal} {verb}.",
        "{animal} {verb}.",
        "when {animal} makes a sound, it {verb}.",
        "{name} heard {animal} near the farm.{pause}An animal like that {verb}.",
        "{name} likes the sound of {animal}.{pause}{animal} {verb} all day.",
        "there was {animal} in the story.{pause}At night, it {verb}.",
    ),
    "fr": (
        "{animal} {verb}.",
        "{animal} {verb}.",
        "le soir, {animal} {verb}.",
        "{name} écoute {animal} près de la ferme.{pause}Cet animal {verb}.",
        "{name} aime le cri de l'animal : {animal}.{pause}{animal} {verb} toute la journée.",
        "dans l'histoire, il y a {animal}.{pause}La nuit, {animal} {verb}.",
    ),
}


def _opposites(rng: Random, language: Language) -> str:
    facts = []
    for opposites in rng.sample(world.OPPOSITES, rng.choice((1, 2, 2))):
        first, second = rng.sample(opposites.pair[language], 2)
        name, other = _two_people(rng)
        pause = _pause(rng, language)
        words = {"a": first, "b": second, "name": name.name, "other": other.name, "pause": pause}
        facts.append(_write(rng, _OPPOSITE_FACTS, language, **words))
    return _joined(rng, facts)


def _colours(rng: Random, language: Language) -> str:
    return " ".join(
        _write(
            rng,
            _COLOUR_FACTS,
            language,
            thing=item.name[language],
            colour=item.colour[language],
            agreeing=item.agreeing[language],
            name=_person(rng).name,
            pause=_pause(rng, language),
        )
        for item in rng.sample(world.COLOURED_THINGS, rng.choice((1, 2, 2)))
    )


def _sounds(rng: Random, language: Language) -> str:
    return " ".join(
        _write(
            rng,
            _SOUND_FACTS,
            language,
            animal=item.animal[language],
            verb=item.verb[language],
            name=_person(rng).name,
            pause=_pause(rng, language),
        )
        for item in rng.sample(world.ANIMAL_SOUNDS, rng.choice((1, 2, 2)))
    )


# --- Lists of members ----------------------------------------------------------------------------

_LISTS: Templates = {
    "en": (
        "{plural}: {list}.",
        "{plural}. {list}.",
        "{list} are {plural}.",
        "the pupils learn the names of {plural}.{pause}{list}: these words are on the board.",
        "{name} spoke about {plural}.{pause}On the list were {list}.",
        "among {plural} there are {list}.",
        "there is a page about {plural}.{pause}{list}. That is the whole page.",
        "{name} knows some {plural}: {list}.",
    ),
    "fr": (
        "{plural} : {list}.",
        "{plural}. {list}.",
        "{list} : voilà des noms {of_plural}.",
        "les élèves apprennent des noms {of_plural}.{pause}{list} : ces mots sont au tableau.",
        "{name} a parlé {of_plural}.{pause}Sur la liste, il y avait {list}.",
        "parmi les {plural}, il y a {list}.",
        "voici une page sur les {plural}.{pause}{list}. C'est toute la page.",
        "{name} connaît quelques {plural} : {list}.",
    ),
}
_SHOPPING: Templates = {
    "en": ("{name} wrote a list: {list}.{pause}{name} read the list again: {list}.",),
    "fr": ("{name} a écrit une liste : {list}.{pause}{name} a relu la liste : {list}.",),
}


def _of_french_plural(plural: str) -> str:
    return f"d'{plural}" if plural[0] in "aeiouéœ" else f"de {plural}"


def _members(rng: Random, language: Language) -> str:
    """A category and some members; the most familiar members are named first half of the time."""
    category = rng.choice(world.CATEGORIES)
    members = category.members[language]
    count = rng.choice((2, 3, 3, 3, 3, 4))
    named = list(members[:count]) if rng.random() < 0.5 else rng.sample(members, count)
    return _write(
        rng,
        _LISTS,
        language,
        plural=category.plural[language],
        of_plural=_of_french_plural(category.plural["fr"]),
        list=_enumeration(named, language),
        name=_person(rng).name,
        pause=_pause(rng, language),
    )


def _shopping_list(rng: Random, language: Language) -> str:
    things = _words(rng, language, rng.randint(2, 5))
    return _write(
        rng,
        _SHOPPING,
        language,
        name=_person(rng).name,
        list=_enumeration(things, language),
        pause=_pause(rng, language),
    )


# --- Sums ----------------------------------------------------------------------------------------

_SUMS: Templates = {
    "en": (
        "{a} + {b} = {c}.",
        "{a}+{b}={c}.",
        "{a} plus {b} is {c}.",
        "{a} and {b} make {c}.",
        "{name} had {a} coins. Then {name} found {b} more.{pause}Now {name} has {c} coins.",
        "{name} added {a} and {b}.{pause}The total was {c}.",
        "take {a} and add {b}: {a} + {b} = {c}.",
    ),
    "fr": (
        "{a} + {b} = {c}.",
        "{a}+{b}={c}.",
        "{a} plus {b} font {c}.",
        "{a} et {b} font {c}.",
        "{name} avait {a} pièces, puis en a trouvé {b}.{pause}Maintenant, {name} a {c} pièces.",
        "{name} a ajouté {a} et {b}.{pause}Le total était {c}.",
        "prenez {a} et ajoutez {b} : {a} + {b} = {c}.",
    ),
}


def _sums(rng: Random, language: Language) -> str:
    facts = []
    for _ in range(rng.choice((1, 2, 3, 4))):
        first, second = rng.randint(0, world.LARGEST_ADDEND), rng.randint(0, world.LARGEST_ADDEND)
        words = {"a": first, "b": second, "c": first + second, "name": _person(rng).name}
        facts.append(_write(rng, _SUMS, language, pause=_pause(rng, language), **words))
    return _joined(rng, facts)


# --- Cards: a fact called for by its key, alone on its line -------------------------------------------

# What a topic is about, then the fact without the words that usually lead to it. A model that has only read
# "the capital of Kenya is Nairobi" finds Nairobi behind these very words and nowhere else.
_CARDS: Templates = {
    "en": (
        "{key}.{pause}{value}.",
        "{key}.\n{value}.",
        "{key}: {value}.",
        "on the card: {key}.{pause}{value}.",
        "{name} turned the card over. {key}.\n{value}.",
        "{key}, in one word: {value}.",
    ),
    "fr": (
        "{key}.{pause}{value}.",
        "{key}.\n{value}.",
        "{key} : {value}.",
        "sur la carte : {key}.{pause}{value}.",
        "{name} a retourné la carte. {key}.\n{value}.",
        "{key}, en un mot : {value}.",
    ),
}
_CARD_KEYS: dict[str, Phrase] = {
    "capital": {"en": "the capital {0}", "fr": "la capitale {0}"},
    "opposite": {"en": "the opposite of {0}", "fr": "le contraire de {0}"},
    "colour": {"en": "the colour of {0}", "fr": "une couleur pour {0}"},
    "sound": {"en": "what {0} does with its voice", "fr": "le cri de cet animal, {0}"},
    "sum": {"en": "{0} + {1}", "fr": "{0} + {1}"},
    "total": {"en": "the total of {0} and {1}", "fr": "le total de {0} et {1}"},
    "list": {"en": "three {0}", "fr": "trois {0}"},
    "word": {"en": "the word {0}", "fr": "le mot {0}"},
}


def _card_of(rng: Random, language: Language) -> tuple[str, str]:
    """(key, value) of one card; capitals most often, because there are most of them."""
    kind = rng.choices(tuple(_CARD_KEYS), (30, 11, 9, 4, 6, 4, 14, 8))[0]
    key = _CARD_KEYS[kind][language]
    if kind == "capital":
        country = rng.choice(world.COUNTRIES)
        return key.format(country.of[language]), country.capital[language]
    if kind == "opposite":
        first, second = rng.sample(rng.choice(world.OPPOSITES).pair[language], 2)
        return key.format(first), second
    if kind == "colour":
        thing = rng.choice(world.COLOURED_THINGS)
        return key.format(thing.name[language]), thing.colour[language]
    if kind == "sound":
        animal = rng.choice(world.ANIMAL_SOUNDS)
        return key.format(animal.animal[language]), animal.verb[language]
    if kind in ("sum", "total"):
        first_number, second_number = rng.randint(0, world.LARGEST_ADDEND), rng.randint(0, world.LARGEST_ADDEND)
        return key.format(first_number, second_number), str(first_number + second_number)
    if kind == "list":
        category = rng.choice(world.CATEGORIES)
        return key.format(category.plural[language]), _enumeration(rng.sample(category.members[language], 3), language)
    word = _any_words(rng, language, 1)[0]
    return key.format(word), word


def _cards(rng: Random, language: Language) -> str:
    """One to three cards."""
    made = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        key, value = _card_of(rng, language)
        made.append(_write(rng, _CARDS, language, key=key, value=value, name=_person(rng).name, pause=_pause(rng, language)))
    return "\n".join(made)


_RECALL_ALONE: dict[Maker, float] = {
    _copying: 25,
    _shopping_list: 4,
    _name_recall: 4,
    _speaker_recall: 6,
    _owners_recall: 3,
}
_WEIGHTS: dict[Stage, dict[Maker, float]] = {
    "reading": {
        _capital_facts: 9,
        _country_topic: 15,
        _country_selection: 6,
        _opposites: 9,
        _colours: 7,
        _sounds: 5,
        _members: 12,
        _shopping_list: 2,
        _sums: 9,
        _name_recall: 4,
        _speaker_recall: 6,
        _copying: 12,
        _owners_recall: 2,
        _story: 4,
        _dialogue: 5,
    },
    "facts": {
        _capital_facts: 7,
        _country_topic: 18,
        _country_selection: 5,
        _opposites: 12,
        _colours: 9,
        _sounds: 4,
        _members: 16,
        _shopping_list: 1,
        _sums: 13,
        _name_recall: 3,
        _speaker_recall: 4,
        _copying: 4,
        _owners_recall: 1,
        _story: 2,
        _dialogue: 3,
    },
    "recollection": {
        _cards: 40,
        _capital_facts: 4,
        _country_topic: 14,
        _country_selection: 4,
        _opposites: 7,
        _colours: 6,
        _sounds: 4,
        _members: 10,
        _shopping_list: 1,
        _sums: 8,
        _name_recall: 3,
        _speaker_recall: 4,
        _copying: 5,
        _owners_recall: 1,
        _story: 2,
        _dialogue: 5,
    },
    "rehearsal": {
        _cards: 36,
        _capital_facts: 3,
        _country_topic: 10,
        _country_selection: 3,
        _opposites: 9,
        _colours: 5,
        _sounds: 3,
        _members: 8,
        _shopping_list: 2,
        _sums: 9,
        _name_recall: 5,
        _speaker_recall: 5,
        _copying: 18,
        _owners_recall: 2,
        _story: 2,
        _dialogue: 5,
    },
}
