"""The demo's task: one sentence about an order in, compact JSON out. Pure: a seed in, rows out.

Names and cities are invented from syllables, and a stable hash gives each of them to one split only. So whoever answers a
held-out row must copy from its sentence; nothing of it can have been memorised. The embedded base model (`model/demo.py`)
is pre-trained on the split "pretraining", which asks other questions about such sentences and never shows JSON.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from random import Random
from typing import Any, TypeVar

from raytune.errors import DataError

# Sixteenths of all invented words that belong to each split.
SPLIT_SHARES = {"pretraining": 8, "train": 5, "validation": 1, "test": 2}
INSTRUCTION = "Reply in JSON."

ITEMS = (
    "apron",
    "basket",
    "bell",
    "blanket",
    "book",
    "bottle",
    "bowl",
    "candle",
    "carpet",
    "chair",
    "clock",
    "drum",
    "flute",
    "hammer",
    "helmet",
    "kettle",
    "ladder",
    "lamp",
    "mirror",
    "mug",
    "pillow",
    "plate",
    "rope",
    "saw",
    "spoon",
    "stool",
    "table",
    "tent",
    "towel",
    "vase",
    "violin",
    "wheel",
)
COLOURS = ("black", "blue", "brown", "green", "grey", "pink", "red", "white")
MONTHS = ("January", "March", "April", "May", "June", "July", "August", "October")
TEMPLATES = (
    "{who} from {city} ordered {goods}{date}.",
    "{who} in {city} bought {goods}{date}.",
    "{goods} went to {who} in {city}{date}.",
    "In {city}, {who} paid for {goods}{date}.",
    "{who} wants {goods} sent to {city}{date}.",
    "{city}: {goods} for {who}{date}.",
)

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "st", "tr")
_VOWELS = ("a", "e", "i", "o", "u")
_NAME_ENDINGS = ("", "", "l", "n", "r", "s")
_CITY_ENDINGS = ("", "by", "ham", "holm", "wick")

Choice = TypeVar("Choice")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What one sentence says. The keys of the answer are the names of the fields."""

    who: str
    city: str
    qty: int
    item: str


def demo_rows(split: str, num_rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Draw rows of one split, in the OpenAI messages format; the same ones on every machine and Python version.

    Args:
        split: "train", "validation" or "test"; "pretraining" gives the base model's own rows, without any JSON.
        num_rows: how many. Fewer rows are a prefix of more rows.
        seed: another seed gives other rows of the same split.

    Returns:
        Rows `{"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}`.

    Raises:
        DataError: if there is no such split.
    """
    if split not in SPLIT_SHARES:
        raise DataError(f"The demo has no split '{split}'. Its splits are {', '.join(SPLIT_SHARES)}.")
    return json.loads(_drawn(split, num_rows, seed))


@lru_cache(maxsize=8)  # a plan alone reads most of them twice
def _drawn(split: str, num_rows: int, seed: int) -> str:
    """Rows of a split as JSON, so that whoever is given them may change them."""
    random = Random(f"raytune demo {split} {seed}")
    draw_row = _pretraining_row if split == "pretraining" else _extraction_row
    return json.dumps([draw_row(random, split) for _ in range(num_rows)])


def echo_rows(num_rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Draw the base model's first lessons: random printable ASCII to repeat. Copying is learned fastest from these."""
    random = Random(f"raytune demo echo {seed}")
    return [_echo_row(random) for _ in range(num_rows)]


def split_of(word: str) -> str:
    """The one split whose rows may contain this invented name or city."""
    sixteenth = hashlib.sha256(word.encode()).digest()[0] % 16
    for split, share in SPLIT_SHARES.items():
        if sixteenth < share:
            return split
        sixteenth -= share
    raise AssertionError("the shares must add up to 16")


def _extraction_row(random: Random, split: str) -> dict[str, Any]:
    sentence, order = _draw_sentence(random, split)
    answer = {"who": order.who, "city": order.city, "qty": order.qty, "item": order.item}
    return _conversation([(f"{sentence} {INSTRUCTION}", json.dumps(answer, separators=(",", ":")))])


def _pretraining_row(random: Random, split: str) -> dict[str, Any]:
    """One to three questions about a sentence, or in one row of eight, a string to echo."""
    if random.random() < 1 / 8:
        return _echo_row(random)
    sentence, order = _draw_sentence(random, split)
    questions = [_draw_question(random, sentence, order) for _ in range(_pick(random, (1, 2, 3)))]
    first_question, first_answer = questions[0]
    return _conversation([(f"{sentence} {first_question}", first_answer), *questions[1:]])


def _echo_row(random: Random) -> dict[str, Any]:
    text = "".join(chr(_pick(random, range(33, 127))) for _ in range(_pick(random, range(4, 25))))
    return _conversation([(f"Echo {text}", text)])


def _draw_question(random: Random, sentence: str, order: Order) -> tuple[str, str]:
    """Draw a question and its answer: a single field, a field in quotes or brackets, some fields as a list, or a copy."""
    values = {"who": order.who, "city": order.city, "qty": str(order.qty), "item": order.item}
    key = _pick(random, tuple(values))
    kind = random.random()
    if kind < 0.3:
        return {"who": "Who?", "city": "Where?", "qty": "How many?", "item": "What?"}[key], values[key]
    if kind < 0.4:
        left, right = _pick(random, ('""', "{}", "[]", "()", "::", ",,"))
        return f"Put {key} in {left}{right}.", f"{left}{values[key]}{right}"
    if kind < 0.9:
        keys = _shuffle(random, tuple(values))[: _pick(random, (2, 3, 4))]
        return f"List {', '.join(keys)}.", "; ".join(f"{key}={values[key]}" for key in keys)
    return "Repeat.", sentence


def _draw_sentence(random: Random, split: str) -> tuple[str, Order]:
    """Draw an order and a sentence that tells it, at times with a colour and a date that nobody asks for."""
    who = _draw_word(random, split, _NAME_ENDINGS)
    city = _draw_word(random, split, _CITY_ENDINGS, unlike=who)
    order = Order(who=who, city=city, qty=_pick(random, range(2, 100)), item=_pick(random, ITEMS))
    colour = f"{_pick(random, COLOURS)} " if random.random() < 0.4 else ""
    date = f" on {_pick(random, MONTHS)} {_pick(random, range(1, 29))}" if random.random() < 0.3 else ""
    goods = f"{order.qty} {colour}{order.item}s"
    return _pick(random, TEMPLATES).format(who=order.who, city=order.city, goods=goods, date=date), order


def _draw_word(random: Random, split: str, endings: Sequence[str], unlike: str = "") -> str:
    """Invent a capitalised word of two or three syllables that belongs to this split.

    A model this small finds its place in a word by the last two letters or so. Hence no pair of letters comes twice in the
    invented words of a sentence, and they begin differently; without this, the base mixed up one sentence in twenty.
    """
    taken = set(pairwise(unlike.lower()))
    while True:
        syllables = [_pick(random, _ONSETS) + _pick(random, _VOWELS) for _ in range(_pick(random, (2, 2, 3)))]
        word = "".join(syllables).capitalize() + _pick(random, endings)
        pairs = set(pairwise(word.lower()))
        if split_of(word) == split and len(pairs) == len(word) - 1 and not pairs & taken and word[0] != unlike[:1]:
            return word


def _conversation(turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return {
        "messages": [
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
    }


# Python promises the same sequence in every version for `Random.random()` alone, not for `choice` or `shuffle`.
def _pick(random: Random, choices: Sequence[Choice]) -> Choice:
    return choices[int(random.random() * len(choices))]


def _shuffle(random: Random, choices: Sequence[Choice]) -> list[Choice]:
    return sorted(choices, key=lambda _: random.random())
