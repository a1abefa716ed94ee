"""Tokens of words that were met before, for byte-level BPE: a text is cut into words as its tokenizer cuts it, and what the model
makes of a word is asked once.

Most words of a text have been met, and looking one up takes a fifth of what tokenising it takes. The cut is the tokenizer's own
regular expression, in Python's words. Whoever cannot be sure that both cut alike is not served: expressions that Python may read
in another way, and characters that were not in Unicode 3.2 as they are today, of which libraries may think differently.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import chain
from random import Random
from typing import Any, Self

MOST_WORDS = 1 << 17
"""That are kept; then all are forgotten. Some 30 MB."""
MOST_LETTERS = 48
"""Of a word that is kept: longer ones are seldom met again."""

_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `ByteLevel` cuts by, unless told not to."""
_WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_FOLDED = "\u017f\u212a"
"""Letters that are a small s and k where case does not count."""
_PROBED = [
    " ", "  ", "\n", "\r\n", "\t", "\x0b", "\x1c", "\x00", "\x85", "\xa0", "\u2003", "\u3000", "\u0301", "\u0903", "\u2019s",
    "'s", "'S", "'ll", "'Re", "'", "a", "B", "word", "Word", "WORD", "wOrD", "x1", "7", "1234567", "½", "²", "é", "Ö", "ß", "я",
    ".", "...", "!?", "/", "_", "-", "#", "$%", "\\", "[", "]", "{}", "<|", "~", "+=", "€", "中文", "ひら", "カタ", "한글", "ع",
]  # fmt: skip


class KnownWords:
    """Makes tokens of texts word by word. What it is asked for by several threads is right; they share what is known."""

    @classmethod
    def of(cls, backend: Any, description: Mapping[str, Any]) -> Self | None:
        """The words of a tokenizer; None if it has to be asked for each text.

        Args:
            backend: the tokenizer of the `tokenizers` library, byte-level BPE whose normaliser leaves normalised text as it is.
            description: what it writes of itself.
        """
        before = description["pre_tokenizer"]
        cuts = _cuts(before.get("pretokenizers", [before]))
        added = [(number, token) for number, token in backend.get_added_tokens_decoder().items() if token.content]
        if not cuts or description["model"].get("dropout") or backend.encode_special_tokens:
            return None
        if any(token.lstrip or token.rstrip or token.single_word for _, token in added):
            return None
        words = cls(backend.model, cuts, {token.content: number for number, token in added})
        words._asked = _any_of(token.content for _, token in added if token.normalized)
        return words if words._cuts_like(backend.pre_tokenizer) else None

    def __init__(self, model: Any, cuts: Sequence["_Cut"], added: Mapping[str, int]) -> None:
        self._cuts, self._added = cuts, _any_of(added)
        self._asked = _any_of(())
        """Tokens that are looked for in what is left between the others."""
        self._known = _Known(model, {content: [number] for content, number in added.items()})

    def tokens_of(self, texts: Sequence[str]) -> list[list[int] | None]:
        """Tokens of each text without any put before or behind; None where the tokenizer has to be asked for them."""
        known = self._known
        if len(known) > MOST_WORDS:  # not emptied: another thread may be in the middle of a text
            known = self._known = known.anew()
        return [self._tokens(text, known) if self._is_plain(text) else None for text in texts]

    def _is_plain(self, text: str) -> bool:
        return (text.isascii() or _known_characters().fullmatch(text) is not None) and self._asked.search(text) is None

    def _tokens(self, text: str, known: "_Known") -> list[int]:
        words: list[str] = []
        for number, part in enumerate(self._added.split(text)):
            words += [part] if number % 2 else self._cut(part)
        return list(chain.from_iterable(map(known.__getitem__, words)))

    def _cut(self, text: str) -> list[str]:
        first, *others = self._cuts
        words = first(text)
        for cut in others:
            words = [piece for word in words for piece in cut(word)]
        return words

    def _cuts_like(self, pre_tokenizer: Any) -> bool:
        """Whether it cuts texts of all kinds of characters as the tokenizer does, which is asked."""
        return all(
            [_in_bytes(word) for word in self._cut(text)] == [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]
            for text in _probes()
        )


class _Known(dict[str, list[int]]):
    """Words and their tokens; one that is not known is asked of the model."""

    def __init__(self, model: Any, added: Mapping[str, list[int]]) -> None:
        super().__init__(added)
        self._model, self._always = model, added

    def __missing__(self, word: str) -> list[int]:
        tokens = [token.id for token in self._model.tokenize(_in_bytes(word))]
        if len(word) <= MOST_LETTERS:
            self[word] = tokens
        return tokens

    def anew(self) -> Self:
        """The same, as it was when no word had been met."""
        return type(self)(self._model, self._always)


# --- Cuts --------------------------------------------------------------------------------------------------------------------


_Cut = Callable[[str], list[str]]
"""Cuts a text into pieces, of which none is empty."""


def _cuts(steps: Sequence[Mapping[str, Any]]) -> list[_Cut] | None:
    """What the steps of a pre-tokenizer cut texts by, one after the other, before its last step writes bytes; none if they do not
    cut, or cannot be followed."""
    patterns: list[str | None] = []
    for number, step in enumerate(steps):
        match step:
            case {"type": "ByteLevel", "use_regex": True} if number == len(steps) - 1:
                patterns.append(_in_python(_GPT_2))
            case {"type": "ByteLevel", "use_regex": False} if number == len(steps) - 1:
                pass
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                patterns.append(_in_python(pattern))
            case {"type": "Digits", "individual_digits": each}:
                patterns.append(f"[{_letters_of('N')}]" + "+" * (not each))
            case _:
                return None
    cuts = [_cut_by(pattern) for pattern in patterns if pattern is not None]
    known = [cut for cut in cuts if cut is not None]
    return known if len(known) == len(patterns) else None


def _cut_by(pattern: str) -> _Cut | None:
    try:
        found = re.compile(pattern)
    except re.error:
        return None
    if found.groups:
        return None
    if all("".join(found.findall(probe)) == probe for probe in _probes()):
        return found.findall  # nothing lies between what is found
    around = re.compile(f"({pattern})")
    return lambda text: [piece for piece in around.split(text) if piece]


@cache
def _probes() -> list[str]:
    """Texts of known characters."""
    chance, pieces = Random(0), [piece for piece in _PROBED if _known_characters().fullmatch(piece)]
    return ["".join(chance.choices(pieces, k=60)) for _ in range(60)]


def _in_python(pattern: str) -> str | None:
    """A regular expression of the `tokenizers` library as Python writes it, of known characters; None if it has something that
    both may read in different ways."""
    written, in_class, at = [], False, 0
    while at < len(pattern):
        sign, behind = pattern[at], pattern[at + 1 : at + 2]
        at += 1
        if sign == "\\":
            at += 1
            if behind == "p" and (found := re.match(r"\{([A-Z][a-z]?)\}", pattern[at:])):
                at += found.end()
                letters = _letters_of(found[1])
                written.append(letters if in_class else f"[{letters}]" if letters else "(?!)")
            elif behind == "s":
                written.append(_WHITE_SPACE if in_class else f"[{_WHITE_SPACE}]")
            elif behind == "S" and not in_class:
                written.append(f"[^{_WHITE_SPACE}]")
            elif behind in ("r", "n", "t") or (behind and behind.isascii() and not behind.isalnum()):
                written.append(sign + behind)
            else:
                return None
        elif in_class:
            if sign == "[" or (sign in "&-~|" and behind == sign):
                return None
            in_class = sign != "]"
            written.append(sign)
        elif sign in "^$.#":
            return None
        else:
            in_class = sign == "["
            if in_class and behind == "^":
                sign, at = "[^", at + 1
            if in_class and pattern[at : at + 1] == "]":
                return None
            written.append(sign)
    return "".join(written)


@cache
def _letters_of(category: str) -> str:
    """The known characters of a category of Unicode, or of all that begin with its letter, as a class of `re` has them."""
    return _ranges(ord(letter) for letter in _known_letters() if unicodedata.category(letter).startswith(category))


@cache
def _known_characters() -> re.Pattern[str]:
    return re.compile(f"[{_ranges(map(ord, _known_letters()))}]*")


@cache
def _known_letters() -> list[str]:
    """Characters of two bytes at most that have been in Unicode, and what they are, ever since version 3.2."""
    old = unicodedata.ucd_3_2_0
    every = map(chr, range(1 << 16))
    known = [one for one in every if unicodedata.category(one) == old.category(one) and unicodedata.category(one) not in _UNKNOWN]
    return [letter for letter in known if letter not in _FOLDED]


_UNKNOWN = ("Cn", "Cs", "Co")


def _ranges(code_points: Iterable[int]) -> str:
    """Code points, which rise, as the inside of a class of `re`."""
    ranges: list[list[int]] = []
    for point in code_points:
        if ranges and point == ranges[-1][1] + 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    return "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in ranges)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds any of some texts, of several that begin in one place the longest."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(texts, key=len, reverse=True))) or '(?!)'})")


def _in_bytes(word: str) -> str:
    """A word in the letters that stand for its bytes."""
    as_bytes = word if word.isascii() else word.encode().decode("latin-1")
    return as_bytes.translate(_letters_of_bytes())


@cache
def _letters_of_bytes() -> dict[int, str]:
    return dict(enumerate(byte_letters()))


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte: itself where it prints, else the next one from U+0100 on."""
    prints = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in prints else next(stand_ins)) for byte in range(256)]
