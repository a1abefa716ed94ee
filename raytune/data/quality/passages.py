"""Texts as words, and runs of words as numbers that are equal where the words are. Pure, and the same in every process."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

# Scripts that put no space between words: each letter counts as one.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Vowel signs of Hebrew, Arabic and the scripts of India, which Python does not count among the letters.
_MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u0966-\u0dff"
_SIGNS = "+-*/=<>%^&|~@#$\\_{}[]"
_LETTERS = rf"[^\W{_UNSPACED}_]"
_WORDS_AND_SIGNS = re.compile(rf"{_LETTERS}+(?:[{_MARKS}]+{_LETTERS}*)*|[{_UNSPACED}]|[{re.escape(_SIGNS)}]")
_OF_ASCII = re.compile(rf"[a-z0-9]+|[{re.escape(_SIGNS)}]")
_ODD, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


def words_and_signs(text: str) -> list[str]:
    """The words of a text without case, and the signs of sums and code, which tell rows apart that have the same words."""
    if text.isascii():  # more than twice as fast
        return _OF_ASCII.findall(text.lower())
    return _WORDS_AND_SIGNS.findall(unicodedata.normalize("NFKC", text).casefold())


def only_words(words: Sequence[str]) -> list[str]:
    """Without the signs."""
    return [word for word in words if word not in _SIGNS]


def hashes_of(words: Sequence[str]) -> np.ndarray:
    """A uint64 for each word."""
    return np.fromiter(map(_hash_of, words), np.uint64, len(words))


def runs_of(word_hashes: np.ndarray, length: int) -> np.ndarray:
    """A uint64 for each run of `length` words, in their order. None if there are fewer words."""
    num_runs = len(word_hashes) - length + 1
    if num_runs < 1:
        return np.empty(0, np.uint64)
    runs = np.zeros(num_runs, np.uint64)
    for place in range(length):
        runs = runs * _ODD + word_hashes[place : place + num_runs]
    runs ^= runs >> np.uint64(31)
    runs *= _MIX
    return runs ^ (runs >> np.uint64(29))


def shingles_of(word_hashes: np.ndarray, length: int) -> np.ndarray:
    """As `runs_of`; of fewer words, all of them are one run."""
    return runs_of(word_hashes, min(length, len(word_hashes))) if len(word_hashes) else np.empty(0, np.uint64)


def script_of(text: str) -> str:
    """The script of most of a text's first letters, as Unicode names it: "Latin", "Cyrillic", "Han". Empty: no letters."""
    if text.isascii():
        return "Latin" if any(map(str.isalpha, text)) else ""
    scripts = [_script_of_letter(letter) for letter in text[:400] if letter.isalpha()]
    return max(sorted(set(scripts)), key=scripts.count, default="")


@lru_cache(maxsize=1 << 18)
def _hash_of(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


@lru_cache(maxsize=1 << 14)
def _script_of_letter(letter: str) -> str:
    name = unicodedata.name(letter, "?").split()[0].split("-")[0]
    return {"CJK": "Han", "KATAKANA": "Kana", "HIRAGANA": "Kana", "?": "unknown"}.get(name, name.capitalize())
