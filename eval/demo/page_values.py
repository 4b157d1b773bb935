"""The values on the demo's pages, split by a hash into training and held-out values.

Numbers, dates, amounts and codes are split as whole strings. Words and names are split word by
word, so that a held-out name contains no word that a training page has ever shown. Half of the
words are real, and half are made of syllables: neither can be guessed, so they have to be read.
"""

from __future__ import annotations

import hashlib
import random

TYPES = ("number", "date", "amount", "code", "word", "name")
SPLITS = ("train", "heldout")

# Strings are split here because the formatter would give each word of a list a line of its own.
_WORDS = """
amber anchor apple apricot aspen atlas autumn bamboo banner barley basket beacon birch blanket
bottle branch breeze bridge bronze bucket butter button cabin candle canvas canyon carbon carpet
castle cedar cement chalk cherry chestnut cinder circle clover cobalt coffee comet copper coral
cotton cradle crystal cypress dagger daisy desert diamond dolphin dragon drift eagle ebony elbow
ember engine falcon feather fern fiddle flame flint flower forest fossil fountain frost galaxy
garden garlic ginger glacier glass globe granite grape gravel guitar hammer harbour hazel helmet
hollow honey hunter jacket jade jasmine jungle kernel kettle ladder lantern laurel lemon lilac
linen lizard lotus lunar magnet mango maple marble market meadow mercury mirror mosaic mountain
mustard nectar needle nickel nutmeg oak ocean olive onyx orange orchid otter oxygen oyster paddle
palace panther paper parsley pebble pepper pewter pigeon pillow pine planet plaster plum pocket
poplar prairie pumpkin purple quartz quilt rabbit radar radish raven ribbon river rocket saddle
saffron salmon sandal sapphire satin scarlet shadow silk silver slate solar spiral spruce steel
stone summer sunset swallow talon tango teak temple thistle thunder timber topaz tulip tunnel
turquoise valley vanilla velvet violet walnut water wheat willow window winter wool yellow zebra
zinc
""".split()  # noqa: SIM905

_FIRST = """
Adam Agnes Alan Alice Amara Anders Anna Ben Bianca Boris Bruno Carla Carmen Cecil Chloe Clara Dana
Daniel Derek Diana Dora Edgar Elena Elias Emma Erik Esther Eva Felix Fiona Frank Freya George
Gloria Grace Greta Hanna Hector Helen Henry Hugo Jack Jana Jasper Joan Jonas Julia Karl Kate Kenji
Lars Laura Lena Leo Linda Lucas Lucy Magda Marco Maria Martin Maya Mei Miguel Mila Milan Nadia Nina
Noah Nora Olga Oliver Omar Oscar Paula Pavel Peter Petra Priya Quinn Rafael Ravi Rita Robert Rosa
Ruth Samir Sara Simon Sofia Stella Sven Tara Teresa Thomas Tina Tomas Ursula Vera Victor Viola
Walter Wanda Xenia Yara Yusuf Zara Zoe
""".split()  # noqa: SIM905

_LAST = """
Abbott Adler Alvarez Amato Baker Barros Becker Berg Blake Bianchi Brandt Brown Carver Castro Chen
Clarke Conti Costa Cruz Dahl Diaz Dubois Duran Eklund Evans Farkas Fischer Flores Fontana Foster
Garcia Gupta Haas Hansen Harris Hayashi Horvat Hughes Jansen Jensen Kaplan Keller Khan Kim Klein
Kovacs Kowal Kumar Lange Larsen Lee Lopez Marino Mayer Meyer Moreno Moss Mueller Murphy Nagy Nakano
Novak Nowak Olsen Ortega Osman Palmer Park Patel Pereira Petrov Popov Porter Quist Ramos Reyes
Ricci Rivera Rossi Ruiz Russo Salas Sato Schmidt Silva Singh Smith Sokolov Stone Suzuki Tanaka
Taylor Torres Turner Vargas Vega Vogel Wagner Walsh Weber White Wolf Wright Yamada Young Zeller
Zhang
""".split()  # noqa: SIM905

_ONSETS = """
b br c ch cl d dr f fl g gr h j k kr l m n p pl qu r s sh sk sl st t th tr v w y z
""".split()  # noqa: SIM905
_VOWELS = "a a e e i i o o u ai ea ee ou oa".split()  # noqa: SIM905
_CODAS = "b ck d g l ld m mp n nd ng nt p r rd rk rn s sk st t th x".split()  # noqa: SIM905
_MONTHS = """
January February March April May June July August September October November December
""".split()  # noqa: SIM905
_CODE_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"  # no I, O, Q, which look like 1 and 0; real codes avoid them too
_CODE_SHAPES = """
AA-99999 AAA-9999 9999-AA AA999999 A99-999 AA-99-99 999-9999 A9A-9A9 99AA9999 AAA99 A-99999 AAAA-99
99-999-AA A999-99A
""".split()  # noqa: SIM905
_UNITS = ("kg", "g", "km", "cm", "mm", "m", "l", "h", "min", "%")


def split_of(value: str) -> str:
    """Return "heldout" for an eighth of all strings (only for evaluation), else "train"."""
    is_heldout = hashlib.sha256(value.lower().encode()).digest()[0] % 8 == 0
    return "heldout" if is_heldout else "train"


def _number(rng: random.Random) -> str:
    shape = rng.random()
    if shape < 0.55:
        return str(rng.randrange(10 ** rng.randint(0, 5), 10**6) % 10 ** rng.randint(2, 6))
    if shape < 0.7:
        return f"{rng.randrange(1000, 1000000):,}"
    whole = str(rng.randrange(1, 1000))
    if shape < 0.85:
        whole = f"{rng.randrange(0, 1000)}.{rng.randrange(0, 100)}"
    return whole + " " + rng.choice(_UNITS) if rng.random() < 0.6 else whole


def _date(rng: random.Random) -> str:
    year, month, day = rng.randrange(1950, 2040), rng.randrange(1, 13), rng.randrange(1, 29)
    name = _MONTHS[month - 1]
    return rng.choice(
        (
            f"{year}-{month:02}-{day:02}",
            f"{day:02}/{month:02}/{year}",
            f"{day:02}.{month:02}.{year}",
            f"{day} {name[:3]} {year}",
            f"{name[:3]} {day}, {year}",
            f"{day} {name} {year}",
        )
    )


def _amount(rng: random.Random) -> str:
    value = f"{rng.randrange(1, 10 ** rng.randint(1, 5)):,}.{rng.randrange(100):02}"
    return rng.choice(("${}", "${}", "$ {}", "{}", "{} USD", "{} EUR", "EUR {}")).format(value)


def _code(rng: random.Random) -> str:
    alphabets = {"A": _CODE_LETTERS, "9": "0123456789"}
    return "".join(rng.choice(alphabets[c]) if c in alphabets else c for c in rng.choice(_CODE_SHAPES))


def _syllables(rng: random.Random) -> str:
    word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, 2)))
    return word + (rng.choice(_CODAS) if rng.random() < 0.75 or len(word) < 4 else "")


def _draw_word(rng: random.Random, real: list[str], split: str) -> str:
    while True:
        word = rng.choice(real) if rng.random() < 0.5 else _syllables(rng)
        if split_of(word) == split:
            return word


def _words(rng: random.Random, split: str) -> str:
    words = " ".join(_draw_word(rng, _WORDS, split) for _ in range(rng.choice((1, 1, 2))))
    return words.capitalize() if rng.random() < 0.4 else words


def _name(rng: random.Random, split: str) -> str:
    first, last = (
        _draw_word(rng, _FIRST, split).capitalize(),
        _draw_word(rng, _LAST, split).capitalize(),
    )
    style = rng.random()
    if style < 0.2:
        return f"{rng.choice(_CODE_LETTERS)}. {last}"
    return f"{rng.choice(('Dr.', 'Mr.', 'Mrs.'))} {last}" if style < 0.3 else f"{first} {last}"


_WHOLE = {"number": _number, "date": _date, "amount": _amount, "code": _code}
_BY_WORD = {"word": _words, "name": _name}


def draw_value(rng: random.Random, value_type: str, split: str, longest: int) -> str:
    """Draw a value of the given type and split.

    `longest`, its greatest number of characters, is at least 11.
    """
    while True:
        value = _WHOLE[value_type](rng) if value_type in _WHOLE else _BY_WORD[value_type](rng, split)
        if len(value) <= longest and (value_type in _BY_WORD or split_of(value) == split):
            return value
