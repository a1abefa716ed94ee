"""Text of answers that is told while tokens come is what is decoded at the end."""

from functools import cache
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from raytune.evaluation.answer_text import AnswerText, token_text
from tests.tiny import PATIENT, tiny_tokenizer

EOS = "</s>"
PIECES = ["▁", "▁the", "▁a", "b", "ab", "▁▁", ".", "▁.", "n't", "▁n't", "é", "▁日", "本", "'", "▁'", "▁ab"]


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerBase:
    if kind == "bytes":
        return tiny_tokenizer()
    if kind == "words":
        words = {word: number for number, word in enumerate([EOS, "the", "##b", "a", ".", "n", "'", "t", "##'", "##t"])}
        one = Tokenizer(models.WordPiece(words, unk_token=EOS))
        one.decoder = decoders.WordPiece(cleanup=False)
        return PreTrainedTokenizerFast(tokenizer_object=one, eos_token=EOS, clean_up_tokenization_spaces=True)
    pieces = [(EOS, 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), *((piece, -1.0) for piece in PIECES)]
    one = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    one.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    one.pre_tokenizer = pre_tokenizers.Metaspace()
    one.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=one, eos_token=EOS)


def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    known = len(tokenizer(kind))
    texts = st.text("aé日🙂 .'nt", max_size=8).map(lambda text: tokenizer(kind).encode(text, add_special_tokens=False))
    return st.lists(st.lists(st.integers(0, known - 1), max_size=6) | texts, max_size=5).map(
        lambda parts: [*chain.from_iterable(parts)]
    )


def told(kind: str, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    text = AnswerText(tokenizer(kind), frozenset(tokenizer(kind).all_special_ids), stop)
    pieces = []
    for token in ids:
        pieces.append(text.add(token))
        if text.is_stopped:
            break
    else:
        pieces.append(text.end())
    return pieces, text.is_stopped


def decoded(kind: str, ids: list[int]) -> str:
    one = tokenizer(kind)
    return str(one.decode([token for token in ids if token not in one.all_special_ids]))


@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
@PATIENT
@given(st.data())
def test_pieces_joined_are_the_text_decoded_at_the_end(kind: str, data: st.DataObject) -> None:
    ids = data.draw(ids_of(kind))
    pieces, is_stopped = told(kind, ids)
    assert "".join(pieces) == decoded(kind, ids)
    assert not is_stopped


@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
@PATIENT
@given(st.data())
def test_a_text_that_ends_an_answer_is_never_told_by_half(kind: str, data: st.DataObject) -> None:
    ids = data.draw(ids_of(kind))
    whole = decoded(kind, ids)
    first = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stop = whole[first : first + data.draw(st.integers(1, 5))] or "never"
    pieces, is_stopped = told(kind, ids, (stop, "not this either"))
    assert "".join(pieces) == whole.split(stop)[0]
    assert is_stopped == (stop in whole)


def test_text_is_told_as_soon_as_it_is_sure() -> None:
    ids = tokenizer("bytes").encode("hé ab", add_special_tokens=False)
    assert told("bytes", ids)[0] == ["h", "", "é", " ", "a", "b", ""]
    assert told("bytes", ids, ("ax",))[0] == ["h", "", "é", " ", "", "ab", ""]


def test_a_token_alone_keeps_the_space_that_begins_it() -> None:
    one: Any = tokenizer("pieces")
    assert token_text(one, one.convert_tokens_to_ids("▁the")) == " the"
    assert token_text(one, one.convert_tokens_to_ids("b")) == "b"
