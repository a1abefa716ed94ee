"""The text of an answer while its tokens come: whole characters, no half of a text that ends it, and joined what is decoded at
the end."""

import re
from collections.abc import Collection, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A token of sentencepiece that stands for a byte. A run of these is decoded as one: a bad byte at its end spoils all of it."""
_CLEANED_LENGTH = 4
"""Characters, at most, of a space and what stands behind it, from which decoding may take that space away (" n't")."""


class AnswerText:
    """Decodes one answer.

    Args:
        left_out: ids that are no part of a text.
        stop: texts that end it and are no part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, left_out: Collection[int] = (), stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._left_out, self._stop = tokenizer, left_out, stop
        self._cleans = _cleans_spaces(tokenizer)
        self._ids: list[int] = []
        self._run = self._next_run = self._run_length = 0
        """Where the ids begin that are decoded together, where the next such run will, and what of its text is known."""
        self._text = ""
        """Known and not given out."""
        self.is_stopped = False
        """Whether one of the texts has ended the answer."""

    def add(self, token: int) -> str:
        """What is new, and sure, once a token has come."""
        if self.is_stopped or token in self._left_out:
            return ""
        self._ids.append(token)
        self._decode(is_last=False)
        return self._give(is_last=False)

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        if self.is_stopped:
            return ""
        self._decode(is_last=True)
        return self._give(is_last=True)

    def _decode(self, *, is_last: bool) -> None:
        """Learn the text of tokens behind those whose text is known.

        It depends on those before (a space at the beginning is dropped) and, until it is whole, on those behind. So it is what
        the text of a run of ids has more than that of the same run had without them; a run goes back to the text before.
        """
        text = self._decoded(self._run)
        if len(text) == self._run_length or (not is_last and self._may_change(text)):
            return  # a token without text begins no run: what stands behind it would be decoded as if nothing stood before
        self._text += text[self._run_length :]
        if self._cleans:  # from the first space to the last, so that only all of it is decoded as one
            self._run_length = len(text)
        else:
            self._run, self._next_run = self._next_run, len(self._ids)
            self._run_length = len(self._decoded(self._run))

    def _may_change(self, text: str) -> bool:
        if text.endswith(_UNFINISHED) or (self._cleans and " " in text[-_CLEANED_LENGTH:]):
            return True
        piece = self._tokenizer.convert_ids_to_tokens(self._ids[-1])
        return isinstance(piece, str) and _BYTE.fullmatch(piece) is not None

    def _decoded(self, first: int) -> str:
        return self._tokenizer.decode(self._ids[first:])  # pyright: ignore[reportReturnType]

    def _give(self, *, is_last: bool) -> str:
        text = self._text
        found = [place for place in (text.find(one) for one in self._stop) if place >= 0]
        if found:
            self.is_stopped = True
            return text[: min(found)]
        held = 0 if is_last else self._half_a_stop(text)
        self._text = text[len(text) - held :]
        return text[: len(text) - held]

    def _half_a_stop(self, text: str) -> int:
        """Characters at the end of a text that may become one that ends the answer."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(one.startswith(text[-n:]) for one in self._stop)), 0)


def _cleans_spaces(tokenizer: Any) -> bool:
    """Whether decoding takes spaces away in front of punctuation: transformers 5.23 does so where it is asked to, but for BPE,
    whose files often ask for it in vain."""
    is_bpe = tokenizer.is_fast and type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)) and (not is_bpe or forced)


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of a token alone, with the space that begins it."""
    text: str = tokenizer.decode([token])  # pyright: ignore[reportAssignmentType]
    piece = tokenizer.convert_ids_to_tokens(token)
    return f" {text}" if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" ") else text
