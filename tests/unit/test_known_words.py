"""Tokens of known words are those that the tokenizer gives for the whole text, whatever stands in it."""

import json
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from raytune.data.templates import known_words
from raytune.data.templates.known_words import KnownWords
from tests.tiny import PATIENT

SPECIAL = ["<s>", "<|end|>", "<|end|>er"]
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + ENDINGS + "?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + ENDINGS + r"?|\p{N}{1,3}" + REST
)
DEEPSEEK_3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "It's 1234 words, they're HERE!\n\n  def f(x):\n\treturn x + 1\r\n",
    "größer, плохо 中文です, don't! 3.14 <b>e\u0301</b>",
] * 40


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def to_bytes(use_regex: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


CUTS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: to_bytes(True),
    "llama-3": lambda: pre_tokenizers.Sequence([split(LLAMA_3), to_bytes()]),
    "o200k": lambda: pre_tokenizers.Sequence([split(O200K), to_bytes()]),
    "deepseek-3": lambda: pre_tokenizers.Sequence(
        [split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK_3), to_bytes()]
    ),
    "starcoder": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), to_bytes(True)]),
}


def trained(cut: Any, **model: Any) -> Tokenizer:
    backend = Tokenizer(models.BPE(**model))
    backend.pre_tokenizer, backend.decoder = cut, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def words_of(backend: Tokenizer) -> KnownWords | None:
    return KnownWords.of(backend, json.loads(backend.to_str()))


def asked(backend: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


@pytest.mark.parametrize("kind", CUTS)
def test_words_have_the_tokens_that_the_whole_text_has(kind: str) -> None:
    backend = trained(CUTS[kind]())
    words = words_of(backend)
    assert words is not None
    pieces = [
        *SPECIAL,
        "'s",
        "'LL",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t ",
        "word",
        "WORD",
        "Word",
        "é",
        "7",
        "123456",
        ".",
        "?!",
        "/",
        "中文",
    ]

    @settings(PATIENT, max_examples=2 * settings().max_examples)
    @given(st.lists(st.lists(st.text(max_size=4) | st.sampled_from(pieces), max_size=12).map("".join), max_size=6))
    def holds(texts: list[str]) -> None:
        for found, expected in zip(words.tokens_of(texts), asked(backend, texts), strict=True):
            assert found is None or found == expected

    holds()
    # Every known character, among those that decide where words begin and end.
    letters, chance = known_words._known_letters(), random.Random(0)
    among = [*" \n\r\t'sSLl19.,-/", "\u2028", "\u3000", "\u180e", "\x85", "\x1c"]
    mixed = [" ".join(chance.choices(among, k=2)).join(letters[at : at + 6]) for at in range(0, len(letters), 6)]
    assert words.tokens_of(mixed) == asked(backend, mixed)


def test_texts_of_characters_that_are_not_known_are_left_to_the_tokenizer() -> None:
    words = words_of(trained(to_bytes(True)))
    assert words is not None
    later = ["\U0001f600", "\u1c80", "\u017f", "\u212a", "\ud800", "\u200b"]
    assert words.tokens_of(["yes ’“", *(f"no {letter}" for letter in later)])[1:] == [None] * len(later)
    assert words.tokens_of(["yes ’“"]) != [None]


def test_tokens_that_take_more_than_their_text_or_come_late_are_left_to_the_tokenizer() -> None:
    backend = trained(to_bytes(True))
    backend.add_tokens([AddedToken("late", normalized=True)])
    words = words_of(backend)
    assert words is not None
    assert words.tokens_of(["it is early", "it is late"]) == [asked(backend, ["it is early"])[0], None]
    backend.add_tokens([AddedToken("<wide>", rstrip=True, normalized=False)])
    assert words_of(backend) is None


@pytest.mark.parametrize(
    "pattern",
    [
        "a$",
        "(a)|b",
        r"\bword\b",
        r"\w+|\W+",
        "[[:alpha:]]+",
        "[a-z&&[^b]]+",
        r"\P{L}+",
        "a.b",
        r"\p{Han}+",
        r"[^\S\n]+",
        "(?<!a)b++)",
    ],
)
def test_what_python_may_read_in_another_way_is_not_followed(pattern: str) -> None:
    backend = Tokenizer(models.BPE())
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    description = {"pre_tokenizer": {"pretokenizers": [step, {"type": "ByteLevel", "use_regex": False}]}, "model": {}}
    assert KnownWords.of(backend, description) is None


def test_tokens_drawn_by_chance_are_not_kept() -> None:
    assert words_of(trained(to_bytes(True))) is not None
    assert words_of(trained(to_bytes(True), dropout=0.5)) is None
    assert words_of(trained(to_bytes(False))) is None, "a text that is not cut is one word"


def test_words_are_forgotten_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_words, "MOST_WORDS", 50)
    backend = trained(to_bytes(True))
    words, chance = words_of(backend), random.Random(0)
    assert words is not None
    for _ in range(20):
        texts = ["<s>" + " ".join("".join(chance.choices("abcdé", k=4)) for _ in range(20)) + "<|end|>" + "x" * 60]
        assert words.tokens_of(texts) == asked(backend, texts)
        assert len(words._known) <= 50 + 21 + len(SPECIAL)
        assert "x" * 60 not in words._known


def test_words_that_one_thread_forgets_are_known_to_another_to_the_end_of_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_words, "MOST_WORDS", 10)
    backend, chance = trained(to_bytes(True)), random.Random(0)
    words = words_of(backend)
    assert words is not None
    texts = ["<|end|>".join("".join(chance.choices("abcd", k=4)) for _ in range(20)) for _ in range(40)]
    right, wrong = asked(backend, texts), []

    def encode(number: int) -> None:
        found = [words.tokens_of(texts[number:]) for _ in range(100)]
        wrong.extend(tokens for tokens in found if tokens != right[number:])

    threads = [threading.Thread(target=encode, args=(number,)) for number in range(3)]
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(usual)
    assert not wrong
