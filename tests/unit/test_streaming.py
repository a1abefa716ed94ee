"""Answers as they are written: piece by piece the same text, tokens and end as written whole, whatever the tokenizer."""

import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from raytune.evaluation.answer_text import AnswerText
from raytune.evaluation.generation import Written, write_answers
from raytune.evaluation.streaming import stream_answer
from raytune.model.inference import Loaded
from raytune.plan.run_plan import SamplingPlan
from tests.tiny import PATIENT, tiny_model, tiny_tokenizer

QUESTION = list(b"Who was it?")
DRAWN = SamplingPlan(temperature=1.5, top_k=None, top_p=0.9, seed=3)


def pieces_and_end(answer: Generator[str, None, Written]) -> tuple[list[str], Written]:
    pieces = []
    while True:
        try:
            pieces.append(next(answer))
        except StopIteration as end:
            return pieces, end.value


def of_words(decoder: Any, words: list[str], *, closes_up: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["[UNK]", *words])}, "[UNK]"))
    if decoder is not None:
        tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", clean_up_tokenization_spaces=closes_up)


def of_sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: words begin with a mark, and what is no word is written in bytes."""
    texts = ["▁", "▁a", "b", "▁b", "é", "▁.", "...", "\ufffd", "c"]
    vocab = {text: number for number, text in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *texts])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": tiny_tokenizer,
    "sentencepiece": of_sentencepiece,
    "metaspace": lambda: of_words(decoders.Metaspace(), ["▁", "▁a", "b", "▁é"]),
    "wordpiece": lambda: of_words(decoders.WordPiece(cleanup=True), ["a", "##b", "'", ".", "n't", "'s", "don"], closes_up=True),
    "words": lambda: of_words(None, ["a", "don", "'", "t", ".", ",", "n't", "'s", "!", "'re"], closes_up=True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_of_any_tokens_are_together_what_decoding_all_of_them_gives(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    euro = tokenizer("é€😀").input_ids if name == "bytes" else [1 + byte for byte in "é€😀".encode()]
    chosen = st.lists(st.integers(0, len(tokenizer) - 1) | st.sampled_from([*euro, 0]), max_size=14)
    whole = st.integers(0, 2).map(lambda count: count * (euro if name in ("bytes", "sentencepiece") else [1]))

    @PATIENT
    @given(st.tuples(chosen, whole, chosen).map(lambda parts: [*parts[0], *parts[1], *parts[2]]))
    def are_together(tokens: list[int]) -> None:
        text = AnswerText(tokenizer)
        pieces = [*map(text.add, tokens), text.end()]
        assert "".join(pieces) == tokenizer.decode(tokens)

    are_together()


def test_no_piece_ends_in_half_of_a_character() -> None:
    tokenizer = tiny_tokenizer()
    text = AnswerText(tokenizer)
    assert [text.add(token) for token in tokenizer("aé€😀").input_ids] == ["a", "", "é", "", "", "€", "", "", "", "😀"]


IN_FRONT: dict[str, Any] = {
    "base": None,
    "lora": LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def loaded(name: str = "base", *, eos: int | None = None) -> Loaded:
    model: Any = tiny_model(tied=False).eval()
    model.generation_config.eos_token_id = eos
    if IN_FRONT[name] is not None:
        model = get_peft_model(model, IN_FRONT[name]).eval()
    return Loaded(model=model, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("sampling", [None, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", IN_FRONT)
def test_a_streamed_answer_is_the_one_that_is_written_whole(name: str, sampling: SamplingPlan | None) -> None:
    one = loaded(name)
    options: dict[str, Any] = {"max_new_tokens": 24, "sampling": sampling}
    (whole,) = write_answers(one.model, one.tokenizer, [QUESTION], batch_size=1, rows=[7], **options)
    pieces, written = pieces_and_end(stream_answer(one, QUESTION, row=7, **options))
    assert ("".join(pieces), written) == (whole.text, whole)
    assert (written.num_tokens, written.has_ended) == (24, False)
    assert len(pieces) > 1


def test_a_streamed_answer_ends_where_the_model_does() -> None:
    free = loaded()
    prompt = torch.tensor([QUESTION])
    ids = free.model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=256)[0, len(QUESTION) :].tolist()
    stop = next(token for token in ids[2:] if token not in ids[:2])
    one = loaded(eos=stop)
    pieces, written = pieces_and_end(stream_answer(one, QUESTION, max_new_tokens=8))
    assert "".join(pieces) == written.text == one.tokenizer.decode(ids[: ids.index(stop)])
    assert (written.num_tokens, written.has_ended) == (ids.index(stop), True)


def test_a_text_that_ends_an_answer_is_told_from_one_that_is_as_long_as_allowed() -> None:
    one = loaded()
    options: dict[str, Any] = {"max_new_tokens": 8, "batch_size": 2}
    prompts = [QUESTION, list(b"And why?")]
    free, other = (written.text for written in write_answers(one.model, one.tokenizer, prompts, **options))
    stop = next(letter for letter in free if letter.isascii() and letter not in other)
    one.model.generation_config.stop_strings = [stop]
    stopped, other = write_answers(one.model, one.tokenizer, prompts, **options)
    assert stopped.has_ended
    assert stopped.text == free[: free.index(stop) + 1]
    assert stopped.num_tokens < 8
    assert (other.num_tokens, other.has_ended) == (8, False)
    assert pieces_and_end(stream_answer(one, QUESTION, max_new_tokens=8))[1] == stopped


def test_who_stops_reading_ends_the_answer() -> None:
    before = set(threading.enumerate())
    answer = stream_answer(loaded(), QUESTION, max_new_tokens=100_000)
    next(answer)
    assert set(threading.enumerate()) > before
    answer.close()
    assert set(threading.enumerate()) == before


def test_what_goes_wrong_while_an_answer_is_written_is_raised_to_who_reads_it(tmp_path: Path) -> None:
    one = loaded()
    with pytest.raises(IndexError, match="out of range"):
        list(stream_answer(one, [10_000], max_new_tokens=3))
