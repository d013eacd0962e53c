"""The small world the starter model knows: every entity and fact, stated once, in two languages.

`corpus` writes pre-training text about all of it. `tuning` asks only about the entities whose
split is "tuning", so the instruction set teaches the *form* of an answer and never its content.
The entities of the other two splits are asked about by `development.yaml` and `acceptance.yaml`.

Facts are general knowledge, chosen to be undisputed: countries with a contested or shared seat
of government are left out, and so are opposites and colours with more than one good answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Language = Literal["en", "fr"]
Split = Literal["tuning", "development", "acceptance"]
LANGUAGES: tuple[Language, ...] = ("en", "fr")

Phrase = dict[Language, str]


@dataclass(frozen=True)
class Country:
    """A country as each language says it: alone, after "of", after "in", and as an owner."""

    name: Phrase
    of: Phrase
    inside: Phrase
    verb: Phrase
    its: Phrase
    capital: Phrase
    continent: Phrase
    split: Split


@dataclass(frozen=True)
class Opposites:
    """Two words that mean the reverse of each other; one pair of words for each language."""

    pair: dict[Language, tuple[str, str]]
    split: Split


@dataclass(frozen=True)
class ColouredThing:
    """Something with one well-known colour; `agreeing` is the colour as it follows the thing."""

    name: Phrase
    colour: Phrase
    agreeing: Phrase
    split: Split


@dataclass(frozen=True)
class AnimalSound:
    """An animal and the verb for its cry, as it follows the animal ("barks", "aboie")."""

    animal: Phrase
    verb: Phrase
    split: Split


@dataclass(frozen=True)
class Category:
    """A plural noun and well-known members of it, the most familiar first."""

    plural: Phrase
    members: dict[Language, tuple[str, ...]]
    split: Split


@dataclass(frozen=True)
class Word:
    """An everyday object, to be listed, copied and repeated; nothing is said about it."""

    word: Phrase
    split: Split


@dataclass(frozen=True)
class Person:
    """A first name and the pronoun that stands for it."""

    name: str
    pronoun: Phrase
    split: Split


def _rows(table: str) -> list[list[str]]:
    """Read a table with one fact a line and cells between bars."""
    lines = (line for line in table.strip().splitlines() if line.strip())
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def _words(text: str) -> list[str]:
    return text.split()


def _in_pairs(rows: list[list[str]]) -> Iterator[tuple[list[str], list[str]]]:
    return zip(rows[::2], rows[1::2], strict=True)


def _split_of(key: str, development: frozenset[str], acceptance: frozenset[str]) -> Split:
    if key in acceptance:
        return "acceptance"
    return "development" if key in development else "tuning"


# --- Countries -----------------------------------------------------------------------------------

_CONTINENTS: dict[str, str] = {
    "Europe": "Europe",
    "Asia": "Asie",
    "Africa": "Afrique",
    "North America": "Amérique du Nord",
    "South America": "Amérique du Sud",
    "Oceania": "Océanie",
}

# English name | French article | French name | capital | capitale (if different) | continent
_COUNTRIES = """
France | la | France | Paris | | Europe
Germany | l' | Allemagne | Berlin | | Europe
Spain | l' | Espagne | Madrid | | Europe
Italy | l' | Italie | Rome | | Europe
Portugal | le | Portugal | Lisbon | Lisbonne | Europe
Belgium | la | Belgique | Brussels | Bruxelles | Europe
Austria | l' | Autriche | Vienna | Vienne | Europe
Greece | la | Grèce | Athens | Athènes | Europe
Poland | la | Pologne | Warsaw | Varsovie | Europe
Hungary | la | Hongrie | Budapest | | Europe
Romania | la | Roumanie | Bucharest | Bucarest | Europe
Bulgaria | la | Bulgarie | Sofia | | Europe
Croatia | la | Croatie | Zagreb | | Europe
Serbia | la | Serbie | Belgrade | | Europe
Slovenia | la | Slovénie | Ljubljana | | Europe
Slovakia | la | Slovaquie | Bratislava | | Europe
Norway | la | Norvège | Oslo | | Europe
Sweden | la | Suède | Stockholm | | Europe
Finland | la | Finlande | Helsinki | | Europe
Denmark | le | Danemark | Copenhagen | Copenhague | Europe
Iceland | l' | Islande | Reykjavik | | Europe
Ireland | l' | Irlande | Dublin | | Europe
Ukraine | l' | Ukraine | Kyiv | | Europe
Estonia | l' | Estonie | Tallinn | | Europe
Latvia | la | Lettonie | Riga | | Europe
Lithuania | la | Lituanie | Vilnius | | Europe
Albania | l' | Albanie | Tirana | | Europe
Russia | la | Russie | Moscow | Moscou | Europe
the United Kingdom | le | Royaume-Uni | London | Londres | Europe
the Netherlands | les | Pays-Bas | Amsterdam | | Europe
Switzerland | la | Suisse | Bern | Berne | Europe
Czechia | la | Tchéquie | Prague | | Europe
Japan | le | Japon | Tokyo | | Asia
China | la | Chine | Beijing | Pékin | Asia
India | l' | Inde | New Delhi | | Asia
South Korea | la | Corée du Sud | Seoul | Séoul | Asia
Thailand | la | Thaïlande | Bangkok | | Asia
Vietnam | le | Vietnam | Hanoi | Hanoï | Asia
Cambodia | le | Cambodge | Phnom Penh | | Asia
the Philippines | les | Philippines | Manila | Manille | Asia
Mongolia | la | Mongolie | Ulaanbaatar | Oulan-Bator | Asia
Nepal | le | Népal | Kathmandu | Katmandou | Asia
Pakistan | le | Pakistan | Islamabad | | Asia
Afghanistan | l' | Afghanistan | Kabul | Kaboul | Asia
Iran | l' | Iran | Tehran | Téhéran | Asia
Iraq | l' | Irak | Baghdad | Bagdad | Asia
Turkey | la | Turquie | Ankara | | Asia
Syria | la | Syrie | Damascus | Damas | Asia
Lebanon | le | Liban | Beirut | Beyrouth | Asia
Jordan | la | Jordanie | Amman | | Asia
Bangladesh | le | Bangladesh | Dhaka | Dacca | Asia
Saudi Arabia | l' | Arabie saoudite | Riyadh | Riyad | Asia
Qatar | le | Qatar | Doha | | Asia
Georgia | la | Géorgie | Tbilisi | Tbilissi | Asia
Armenia | l' | Arménie | Yerevan | Erevan | Asia
Laos | le | Laos | Vientiane | | Asia
Uzbekistan | l' | Ouzbékistan | Tashkent | Tachkent | Asia
Egypt | l' | Égypte | Cairo | Le Caire | Africa
Morocco | le | Maroc | Rabat | | Africa
Algeria | l' | Algérie | Algiers | Alger | Africa
Tunisia | la | Tunisie | Tunis | | Africa
Libya | la | Libye | Tripoli | | Africa
Senegal | le | Sénégal | Dakar | | Africa
Mali | le | Mali | Bamako | | Africa
Niger | le | Niger | Niamey | | Africa
Nigeria | le | Nigeria | Abuja | | Africa
Ghana | le | Ghana | Accra | | Africa
Kenya | le | Kenya | Nairobi | | Africa
Uganda | l' | Ouganda | Kampala | | Africa
Ethiopia | l' | Éthiopie | Addis Ababa | Addis-Abeba | Africa
Somalia | la | Somalie | Mogadishu | Mogadiscio | Africa
Sudan | le | Soudan | Khartoum | | Africa
Angola | l' | Angola | Luanda | | Africa
Zambia | la | Zambie | Lusaka | | Africa
Zimbabwe | le | Zimbabwe | Harare | | Africa
Namibia | la | Namibie | Windhoek | | Africa
Madagascar | | Madagascar | Antananarivo | | Africa
Mozambique | le | Mozambique | Maputo | | Africa
Rwanda | le | Rwanda | Kigali | | Africa
Cameroon | le | Cameroun | Yaoundé | | Africa
Gabon | le | Gabon | Libreville | | Africa
Togo | le | Togo | Lomé | | Africa
Burkina Faso | le | Burkina Faso | Ouagadougou | | Africa
the United States | les | États-Unis | Washington | | North America
Canada | le | Canada | Ottawa | | North America
Mexico | le | Mexique | Mexico City | Mexico | North America
Cuba | | Cuba | Havana | La Havane | North America
Jamaica | la | Jamaïque | Kingston | | North America
Nicaragua | le | Nicaragua | Managua | | North America
Peru | le | Pérou | Lima | | South America
Chile | le | Chili | Santiago | | South America
Argentina | l' | Argentine | Buenos Aires | | South America
Brazil | le | Brésil | Brasilia | | South America
Colombia | la | Colombie | Bogota | | South America
Venezuela | le | Venezuela | Caracas | | South America
Ecuador | l' | Équateur | Quito | | South America
Uruguay | l' | Uruguay | Montevideo | | South America
Australia | l' | Australie | Canberra | | Oceania
New Zealand | la | Nouvelle-Zélande | Wellington | | Oceania
Fiji | les | Fidji | Suva | | Oceania
"""

_ACCEPTANCE_COUNTRIES = frozenset(
    _words("France Italy Japan Spain Germany Norway Greece Kenya Peru Poland Canada Australia Turkey Morocco")
)
_DEVELOPMENT_COUNTRIES = frozenset(_words("Portugal Sweden China Senegal Chile Austria Vietnam Tunisia Hungary Ireland"))

# French article -> the words for "of", "in", "is" and "its"
_FRENCH_ARTICLES: dict[str, tuple[str, str, str, str]] = {
    "la": ("de la ", "en ", "est", "sa"),
    "le": ("du ", "au ", "est", "sa"),
    "l'": ("de l'", "en ", "est", "sa"),
    "les": ("des ", "aux ", "sont", "leur"),
    "": ("de ", "à ", "est", "sa"),
}


def _with_article(article: str, noun: str) -> str:
    return f"{article}{noun}" if article.endswith("'") else f"{article} {noun}".strip()


def _country(row: list[str]) -> Country:
    english, article, french, capital, capitale, continent = row
    of, inside, verb, its = _FRENCH_ARTICLES[article]
    return Country(
        name={"en": english, "fr": _with_article(article, french)},
        of={"en": f"of {english}", "fr": of + french},
        inside={"en": f"in {english}", "fr": inside + french},
        verb={"en": "is", "fr": verb},
        its={"en": "its", "fr": its},
        capital={"en": capital, "fr": capitale or capital},
        continent={"en": continent, "fr": _CONTINENTS[continent]},
        split=_split_of(english, _DEVELOPMENT_COUNTRIES, _ACCEPTANCE_COUNTRIES),
    )


COUNTRIES: tuple[Country, ...] = tuple(_country(row) for row in _rows(_COUNTRIES))


# --- Opposites -----------------------------------------------------------------------------------

# English word | its opposite | mot français | son contraire
_OPPOSITES = """
hot | cold | chaud | froid
big | small | grand | petit
fast | slow | rapide | lent
high | low | haut | bas
open | closed | ouvert | fermé
full | empty | plein | vide
light | heavy | léger | lourd
bright | dark | clair | sombre
young | old | jeune | vieux
rich | poor | riche | pauvre
strong | weak | fort | faible
hard | soft | dur | mou
wet | dry | mouillé | sec
clean | dirty | propre | sale
long | short | long | court
wide | narrow | large | étroit
thick | thin | épais | mince
easy | difficult | facile | difficile
happy | sad | heureux | triste
true | false | vrai | faux
good | bad | bon | mauvais
early | late | tôt | tard
near | far | près | loin
inside | outside | dedans | dehors
above | below | dessus | dessous
before | after | avant | après
always | never | toujours | jamais
everything | nothing | tout | rien
left | right | gauche | droite
north | south | nord | sud
day | night | jour | nuit
first | last | premier | dernier
buy | sell | acheter | vendre
give | take | donner | prendre
laugh | cry | rire | pleurer
love | hate | aimer | détester
win | lose | gagner | perdre
push | pull | pousser | tirer
enter | leave | entrer | sortir
war | peace | guerre | paix
friend | enemy | ami | ennemi
life | death | vie | mort
beginning | end | début | fin
success | failure | succès | échec
summer | winter | été | hiver
morning | evening | matin | soir
noisy | quiet | bruyant | calme
brave | cowardly | courageux | lâche
polite | rude | poli | impoli
possible | impossible | possible | impossible
identical | different | identique | différent
smooth | rough | lisse | rugueux
public | private | public | privé
modern | ancient | moderne | ancien
simple | complicated | simple | compliqué
"""

_ACCEPTANCE_OPPOSITES = frozenset(_words("hot big full rich clean easy open"))
_DEVELOPMENT_OPPOSITES = frozenset(_words("strong wet fast happy high"))

OPPOSITES: tuple[Opposites, ...] = tuple(
    Opposites(
        pair={"en": (english, reverse), "fr": (french, contraire)},
        split=_split_of(english, _DEVELOPMENT_OPPOSITES, _ACCEPTANCE_OPPOSITES),
    )
    for english, reverse, french, contraire in _rows(_OPPOSITES)
)


# --- Colours -------------------------------------------------------------------------------------

# English colour -> French masculine, French feminine
_COLOUR_WORDS: dict[str, tuple[str, str]] = {
    "green": ("vert", "verte"),
    "blue": ("bleu", "bleue"),
    "white": ("blanc", "blanche"),
    "black": ("noir", "noire"),
    "red": ("rouge", "rouge"),
    "yellow": ("jaune", "jaune"),
    "orange": ("orange", "orange"),
    "brown": ("marron", "marron"),
    "grey": ("gris", "grise"),
    "pink": ("rose", "rose"),
    "purple": ("violet", "violette"),
}

# thing | chose | French gender | colour
_COLOURED_THINGS = """
grass | l'herbe | f | green
the sky | le ciel | m | blue
snow | la neige | f | white
coal | le charbon | m | black
blood | le sang | m | red
a banana | la banane | f | yellow
a lemon | le citron | m | yellow
a carrot | la carotte | f | orange
a strawberry | la fraise | f | red
a tomato | la tomate | f | red
milk | le lait | m | white
chocolate | le chocolat | m | brown
the sun | le soleil | m | yellow
a frog | la grenouille | f | green
an elephant | l'éléphant | m | grey
a crow | le corbeau | m | black
a flamingo | le flamant | m | pink
a pig | le cochon | m | pink
a swan | le cygne | m | white
a cucumber | le concombre | m | green
spinach | l'épinard | m | green
an aubergine | l'aubergine | f | purple
lavender | la lavande | f | purple
a plum | la prune | f | purple
a cherry | la cerise | f | red
an emerald | l'émeraude | f | green
a ruby | le rubis | m | red
a sapphire | le saphir | m | blue
ash | la cendre | f | grey
salt | le sel | m | white
a ladybird | la coccinelle | f | red
a canary | le canari | m | yellow
a leaf | la feuille | f | green
a mouse | la souris | f | grey
a dolphin | le dauphin | m | grey
cocoa | le cacao | m | brown
a chestnut | la châtaigne | f | brown
the sea | la mer | f | blue
a poppy | le coquelicot | m | red
a sunflower | le tournesol | m | yellow
a daffodil | la jonquille | f | yellow
a pumpkin | la citrouille | f | orange
a crocodile | le crocodile | m | green
cotton | le coton | m | white
butter | le beurre | m | yellow
"""

_ACCEPTANCE_THINGS = frozenset(("grass", "the sky", "snow", "a banana", "a carrot", "a strawberry"))
_DEVELOPMENT_THINGS = frozenset(("a lemon", "coal", "milk", "a frog", "the sea"))


def _coloured_thing(row: list[str]) -> ColouredThing:
    thing, chose, gender, colour = row
    masculine, feminine = _COLOUR_WORDS[colour]
    return ColouredThing(
        name={"en": thing, "fr": chose},
        colour={"en": colour, "fr": masculine},
        agreeing={"en": colour, "fr": feminine if gender == "f" else masculine},
        split=_split_of(thing, _DEVELOPMENT_THINGS, _ACCEPTANCE_THINGS),
    )


COLOURED_THINGS: tuple[ColouredThing, ...] = tuple(_coloured_thing(row) for row in _rows(_COLOURED_THINGS))


# --- Animal sounds -------------------------------------------------------------------------------

# animal | French animal | its cry | son cri
_ANIMAL_SOUNDS = """
a dog | le chien | barks | aboie
a cat | le chat | meows | miaule
a cow | la vache | moos | meugle
a sheep | le mouton | bleats | bêle
a horse | le cheval | neighs | hennit
a lion | le lion | roars | rugit
a wolf | le loup | howls | hurle
a duck | le canard | quacks | cancane
a frog | la grenouille | croaks | coasse
a bee | l'abeille | buzzes | bourdonne
a snake | le serpent | hisses | siffle
a pig | le cochon | grunts | grogne
a donkey | l'âne | brays | brait
a crow | le corbeau | caws | croasse
an owl | le hibou | hoots | hulule
a rooster | le coq | crows | chante
a mouse | la souris | squeaks | couine
an elephant | l'éléphant | trumpets | barrit
a hen | la poule | clucks | caquette
a dove | la colombe | coos | roucoule
a cricket | le grillon | chirps | grésille
a goose | l'oie | honks | cacarde
a hyena | la hyène | laughs | ricane
a fox | le renard | yelps | glapit
a bear | l'ours | growls | gronde
"""

_ACCEPTANCE_ANIMALS = frozenset(("a dog", "a cow", "a lion", "a horse"))
_DEVELOPMENT_ANIMALS = frozenset(("a cat", "a duck", "a wolf"))

ANIMAL_SOUNDS: tuple[AnimalSound, ...] = tuple(
    AnimalSound(
        animal={"en": animal, "fr": french_animal},
        verb={"en": verb, "fr": french_verb},
        split=_split_of(animal, _DEVELOPMENT_ANIMALS, _ACCEPTANCE_ANIMALS),
    )
    for animal, french_animal, verb, french_verb in _rows(_ANIMAL_SOUNDS)
)


# --- Categories ----------------------------------------------------------------------------------

# Two lines a category, English then French: plural | members, the best known first
_CATEGORIES = """
fruits | apple pear cherry peach grape melon
fruits | pomme poire cerise pêche raisin melon
vegetables | potato onion leek cabbage turnip pea
légumes | poireau oignon chou navet haricot radis
farm animals | sheep goat donkey hen pig goose
animaux de la ferme | mouton chèvre âne poule cochon oie
wild animals | tiger bear fox giraffe zebra monkey
animaux sauvages | tigre ours renard girafe zèbre singe
birds | eagle robin swallow pigeon parrot owl
oiseaux | aigle moineau hirondelle pigeon perroquet hibou
fish | salmon trout tuna cod sardine carp
poissons | saumon truite thon morue sardine carpe
insects | ant bee fly wasp beetle butterfly
insectes | fourmi abeille mouche guêpe scarabée papillon
trees | oak pine birch maple willow poplar
arbres | chêne pin bouleau érable saule peuplier
flowers | rose tulip daisy lily violet orchid
fleurs | rose tulipe marguerite lilas violette orchidée
items of clothing | shirt coat skirt dress sock scarf
vêtements | chemise manteau jupe robe chaussette écharpe
tools | hammer saw drill pliers screwdriver file
outils | marteau scie perceuse pince tournevis lime
vehicles | car bus truck bicycle train tram
véhicules | voiture bus camion vélo train tramway
musical instruments | piano violin guitar flute drum harp
instruments de musique | piano violon guitare flûte tambour harpe
sports | football tennis rugby swimming judo golf
sports | football tennis rugby natation judo golf
drinks | water tea coffee juice lemonade cider
boissons | eau thé café jus limonade cidre
days of the week | Monday Tuesday Wednesday Thursday Friday Sunday
jours de la semaine | lundi mardi mercredi jeudi vendredi dimanche
months of the year | January February March April June July
mois de l'année | janvier février mars avril juin juillet
planets | Mars Venus Jupiter Saturn Mercury Neptune
planètes | Mars Vénus Jupiter Saturne Mercure Neptune
metals | iron gold silver copper lead zinc
métaux | fer or argent cuivre plomb zinc
languages | English French Spanish Italian German Arabic
langues | anglais français espagnol italien allemand arabe
jobs | baker doctor farmer nurse plumber tailor
métiers | boulanger médecin fermier infirmier plombier tailleur
parts of the body | head arm leg hand foot knee
parties du corps | tête bras jambe main pied genou
rooms of the house | kitchen bedroom bathroom hall attic cellar
pièces de la maison | cuisine chambre salon couloir grenier cave
pieces of furniture | table chair bed sofa desk shelf
meubles | table chaise lit canapé bureau armoire
shapes | circle square triangle oval star cube
formes | cercle carré triangle ovale étoile cube
board games | chess draughts dominoes lotto ludo backgammon
jeux de société | échecs dames dominos loto oie mikado
school subjects | history geography science music art grammar
matières scolaires | histoire géographie science musique dessin grammaire
family members | mother father sister brother aunt uncle
membres de la famille | mère père sœur frère tante oncle
spices | pepper ginger cinnamon saffron cumin clove
épices | poivre gingembre cannelle safran cumin muscade
desserts | cake pie pudding trifle custard sorbet
desserts | gâteau tarte flan mousse crème sorbet
kitchen tools | spoon fork knife pan whisk ladle
ustensiles de cuisine | cuillère fourchette couteau casserole fouet louche
toys | doll ball kite puzzle robot teddy
jouets | poupée balle toupie puzzle robot peluche
materials | wood glass stone paper leather plastic
matériaux | bois verre pierre papier cuir plastique
shops | bakery bookshop pharmacy florist butcher grocery
magasins | boulangerie librairie pharmacie fleuriste boucherie épicerie
buildings | house church school castle hospital tower
bâtiments | maison église école château hôpital tour
dances | waltz tango polka salsa foxtrot rumba
danses | valse tango polka salsa samba rumba
gems | diamond ruby emerald sapphire pearl topaz
pierres précieuses | diamant rubis émeraude saphir perle topaze
rivers | Nile Amazon Danube Rhine Thames Volga
fleuves | Nil Amazone Danube Rhin Seine Loire
cheeses | cheddar brie gouda feta parmesan camembert
fromages | brie comté gouda feta parmesan camembert
hats | cap beret helmet bonnet turban hood
chapeaux | casquette béret casque bonnet turban capuche
"""

_ACCEPTANCE_CATEGORIES = frozenset(("fruits", "sports", "musical instruments", "trees"))
_DEVELOPMENT_CATEGORIES = frozenset(("flowers", "planets", "tools"))

CATEGORIES: tuple[Category, ...] = tuple(
    Category(
        plural={"en": plural, "fr": pluriel},
        members={"en": tuple(members.split()), "fr": tuple(membres.split())},
        split=_split_of(plural, _DEVELOPMENT_CATEGORIES, _ACCEPTANCE_CATEGORIES),
    )
    for (plural, members), (pluriel, membres) in _in_pairs(_rows(_CATEGORIES))
)


# --- People, pets and towns ----------------------------------------------------------------------

_MEN = _words(
    "Tom Jack Henry Oliver Sam Peter David George Harry Adam Luke Ben Daniel Simon Oscar Max Leo "
    "Felix Arthur Edward Martin Frank Walter Victor Noah Ethan Liam Alan Robert Philip Paul Pierre "
    "Jean Marc Luc Hugo Louis Jules Théo Antoine Nicolas Julien Thomas Rémi Étienne Mathieu Bruno "
    "Gilles Karim Yves Olivier Benoît Raphaël Gabriel Lucas Denis Fabrice Loïc Cédric Samir"
)
_WOMEN = _words(
    "Anna Lucy Emma Alice Sarah Mary Kate Julia Sophie Grace Ruby Nora Ella Clara Helen Jane Rose "
    "Eva Olivia Amy Laura Diana Maya Zoe Lily Nina Iris Hannah Martha Rachel Marie Camille Léa "
    "Chloé Inès Manon Juliette Claire Hélène Élodie Margaux Louise Jeanne Céline Nadia Fatou "
    "Amélie Pauline Aurélie Sylvie Lucie Mathilde Zoé Agathe Noémie Solène Odile Brigitte Valérie"
)
_ACCEPTANCE_NAMES = frozenset(_words("Oscar Clara Iris Victor Hélène Hugo Camille Bruno Nora Étienne"))
_DEVELOPMENT_NAMES = frozenset(_words("Max Alice Théo Léa Adam Juliette"))


def _people(names: list[str], pronoun: Phrase) -> list[Person]:
    return [Person(name, pronoun, _split_of(name, _DEVELOPMENT_NAMES, _ACCEPTANCE_NAMES)) for name in names]


PEOPLE: tuple[Person, ...] = (
    *_people(_MEN, {"en": "he", "fr": "il"}),
    *_people(_WOMEN, {"en": "she", "fr": "elle"}),
)

PETS: dict[str, Split] = {
    name: _split_of(name, frozenset(("Milo", "Filou")), frozenset(("Rocky", "Caramel")))
    for name in _words(
        "Rex Rocky Bella Luna Milo Daisy Filou Caramel Biscuit Simba Toby Coco Pepper Minou "
        "Ginger Snowy Titus Praline Gribouille Noisette Plume Ficelle Gaston Balou"
    )
}

# Towns that are the capital of no country, so that living somewhere never states a capital.
TOWNS: dict[str, Split] = {
    name: _split_of(name, frozenset(("Nantes", "Leeds")), frozenset(("Lyon", "Boston")))
    for name in _words(
        "Leeds Bristol Oxford Boston Chicago Seattle Dallas Sydney Glasgow Liverpool Manchester "
        "York Lyon Marseille Nantes Lille Toulouse Bordeaux Nice Rennes Strasbourg Grenoble Dijon "
        "Montpellier Brest Tours Milan Porto Cologne"
    )
}


HOBBIES: dict[Language, tuple[str, ...]] = {
    "en": ("music", "painting", "dancing", "cooking", "reading", "gardening", "sailing", "walking"),
    "fr": (
        "la musique",
        "la peinture",
        "la danse",
        "la cuisine",
        "la lecture",
        "le jardinage",
        "la voile",
        "la marche",
    ),
}


# --- Words ---------------------------------------------------------------------------------------

_ENGLISH_WORDS = _words(
    "lantern umbrella basket key letter hat candle ticket coat mirror bottle clock ribbon stamp "
    "button pencil ladder blanket pocket feather suitcase notebook shell bell rope box ring map"
)
_FRENCH_WORDS = _words(
    "lanterne parapluie panier clé lettre chapeau bougie billet manteau miroir bouteille horloge "
    "ruban timbre bouton crayon échelle couverture poche plume valise carnet coquillage cloche "
    "corde boîte bague carte"
)
_ACCEPTANCE_WORDS = frozenset(("lantern", "umbrella"))
_DEVELOPMENT_WORDS = frozenset(("candle", "mirror"))

WORDS: tuple[Word, ...] = tuple(
    Word({"en": english, "fr": french}, _split_of(english, _DEVELOPMENT_WORDS, _ACCEPTANCE_WORDS))
    for english, french in zip(_ENGLISH_WORDS, _FRENCH_WORDS, strict=True)
)


# --- Sums ----------------------------------------------------------------------------------------

LARGEST_ADDEND = 12
_ACCEPTANCE_SUMS = frozenset(
    (
        (2, 2),
        (3, 4),
        (1, 6),
        (5, 5),
        (2, 7),
        (4, 8),
        (3, 9),
        (6, 7),
        (1, 9),
        (5, 8),
        (8, 9),
        (10, 4),
    )
)
_DEVELOPMENT_SUMS = frozenset(((3, 3), (2, 5), (4, 6), (7, 8), (1, 8), (6, 9), (10, 3), (5, 11)))


def split_of_sum(first: int, second: int) -> Split:
    """The split of an addition; the order of the two numbers does not matter."""
    orders = {(first, second), (second, first)}
    if orders & _ACCEPTANCE_SUMS:
        return "acceptance"
    return "development" if orders & _DEVELOPMENT_SUMS else "tuning"
