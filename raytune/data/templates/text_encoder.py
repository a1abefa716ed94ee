"""A tokenizer, and where its tokens lie in the text: by the tokens' own lengths where they tell, else as the tokenizer tracks it.

For byte-level BPE the place of a token follows from the lengths of those before it, and the tokenizer need not track offsets,
which takes it twice as long; most of its words it need not see at all (`known_words`).
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from raytune.data.templates.known_words import KnownWords
from raytune.data.templates.tokenizers import adds_bos
from raytune.errors import DataError


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """Tokens of several texts, one after the other. Places are bytes (UTF-8) in the concatenation of all texts."""

    input_ids: np.ndarray
    first_tokens: np.ndarray
    """Index of each text's first token, and the number of tokens."""
    starts: np.ndarray
    ends: np.ndarray
    first_bytes: np.ndarray
    """Place of each text's first byte, and the number of bytes."""
    token_bytes: np.ndarray
    """Bytes of text that each token adds; 0 for special tokens."""


class TextEncoder:
    """A tokenizer, and where its tokens lie in the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        self._backend.no_truncation()
        self._backend.no_padding()
        self._eos: Any = tokenizer.eos_token_id
        self.bos: int | None = tokenizer.bos_token_id  # pyright: ignore[reportAttributeAccessIssue]
        self._bos: list[Any] = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        self._name = tokenizer.name_or_path
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        added = self._backend.get_added_tokens_decoder()
        size = max(vocabulary.values(), default=0) + 1
        self.is_special = np.zeros(size, bool)
        self.is_special[[i for i, token in added.items() if token.special]] = True
        self.is_special[tokenizer.all_special_ids] = True
        special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        self._specials = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        description = json.loads(self._backend.to_str())
        self._normaliser, is_byte_level = _byte_level_bpe(description)
        self._lengths: np.ndarray | None = None
        self._words = KnownWords.of(self._backend, description) if is_byte_level else None
        if is_byte_level:
            self._lengths = np.zeros(size, np.int64)
            self._lengths[list(vocabulary.values())] = [len(token) for token in vocabulary]
            for i, token in added.items():
                self._lengths[i] = len(token.content.encode())

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Tokenise texts as they are: no special token is added."""
        sizes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
        first_bytes = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        return self._encode_by_length(texts, first_bytes) or self._encode_by_offset(texts, first_bytes)

    def starts_of(self, text: str) -> list[int]:
        """Where the tokens of a text begin, in characters."""
        starts = self.encode([text]).starts
        return (starts if text.isascii() else np.searchsorted(bytes_before(text), starts)).tolist()

    def decode(self, token: int) -> str:
        return self._backend.decode([token], skip_special_tokens=False)

    def text_of(self, tokens: Sequence[int]) -> str:
        """Text of tokens in a row, special ones included."""
        return self._backend.decode(list(tokens), skip_special_tokens=False)

    def special_in(self, text: str) -> str | None:
        """The first special token that a text has, in letters, where it is tokenised as such."""
        found = self._specials.search(text)
        return found and found[0]

    def around_documents(self) -> tuple[list[int], list[int]]:
        """The tokens that stand before and behind those of a plain document.

        Raises:
            DataError: if the tokenizer has no end-of-text token.
        """
        if self._eos is None:
            raise DataError(
                f"Plain text needs an end-of-text token, but the tokenizer '{self._name}' has none. "
                f"Set eos_token in its tokenizer_config.json."
            )
        return self._bos, [self._eos]

    def _encode_by_length(self, texts: Sequence[str], first_bytes: np.ndarray) -> EncodedTexts | None:
        """Places from the lengths of the tokens, or None where they do not add up to the texts."""
        if self._lengths is None:
            return None
        if self._normaliser == "NFC" and not all(unicodedata.is_normalized("NFC", text) for text in texts):
            return None
        input_ids, first_tokens = _flat(self._ids(texts))
        lengths = self._lengths[input_ids]
        ends = np.cumsum(lengths)
        # A token that swallows white space beside it, for one, makes the sums differ.
        if not np.array_equal(np.concatenate([[0], ends])[first_tokens], first_bytes):
            return None
        token_bytes = np.where(self.is_special[input_ids], 0, lengths)
        return EncodedTexts(input_ids, first_tokens, ends - lengths, ends, first_bytes, token_bytes)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts that are normalised."""
        found = self._words.tokens_of(texts) if self._words else [None] * len(texts)
        others = [text for text, ids in zip(texts, found) if ids is None]
        asked = iter(self._backend.encode_batch_fast(others, add_special_tokens=False))
        return [next(asked).ids if ids is None else ids for ids in found]

    def _encode_by_offset(self, texts: Sequence[str], first_bytes: np.ndarray) -> EncodedTexts:
        """Places that the tokenizer has tracked, from characters to bytes."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        input_ids, first_tokens = _flat([encoding.ids for encoding in encodings])
        numbers = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings))
        places = np.fromiter(numbers, np.int64, 2 * len(input_ids)).reshape(-1, 2)
        for index, text in enumerate(texts):
            in_text = slice(first_tokens[index], first_tokens[index + 1])
            if not text.isascii():
                places[in_text] = bytes_before(text)[places[in_text]]
            places[in_text] += first_bytes[index]
        # Neither may ever decrease; a token without text of its own lies where the one before it ended.
        starts, ends = np.maximum.accumulate(places[:, 0]), np.maximum.accumulate(places[:, 1])
        covered = np.concatenate([[0], ends[:-1]])
        token_bytes = np.where(self.is_special[input_ids], 0, np.maximum(0, ends - np.maximum(starts, covered)))
        return EncodedTexts(input_ids, first_tokens, starts, ends, first_bytes, token_bytes)


def _flat(ids: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of texts, one after the other, and where each text's begin."""
    first_tokens = np.concatenate([[0], np.cumsum([len(one) for one in ids], dtype=np.int64)])
    return np.fromiter(chain.from_iterable(ids), np.int32, int(first_tokens[-1])), first_tokens


def bytes_before(text: str) -> np.ndarray:
    """UTF-8 bytes before each character of a text, and its size."""
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (code_points >= 0x80).astype(np.int64) + (code_points >= 0x800) + (code_points >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])


def _byte_level_bpe(description: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The normaliser's name, and whether a token's characters are the bytes of the text that it stands for.

    Args:
        description: what a tokenizer writes of itself.
    """
    normaliser = (description["normalizer"] or {}).get("type")
    before = description["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    is_byte_level = (
        description["model"]["type"] == "BPE"
        and normaliser in (None, "NFC")
        and sum(step.get("type") == "ByteLevel" for step in steps) == 1
        and all(
            not step.get("add_prefix_space")
            if step.get("type") == "ByteLevel"
            else step.get("type") == "Digits" or step.get("behavior") == "Isolated"
            for step in steps
        )
    )
    return normaliser, is_byte_level
