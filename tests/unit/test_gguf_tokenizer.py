"""A tokenizer in GGUF reads text as it does itself, or is refused."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from raytune.errors import ModelError
from raytune.model.files.whole_model import whole_model
from raytune.model.gguf.gguf_file import GgufModel
from raytune.model.gguf.gguf_tokenizer import SPLITS, gguf_tokenizer
from tests.tiny import tiny_model

CORPUS = [
    "The quick brown fox's den isn't far: 1234 steps, 56 turns. Ganz schön weit!",
    "don't we'll THEY'RE  12345  naïve café\n\n\tindent(x) // comment",
] * 20
TEXTS = [*CORPUS[:2], "quick   brown\r\nfox 2024 we're  ", "日本語 and emoji 🙂", ""]
QWEN2, GPT2, LLAMA3 = (
    next(key for key, (name, _) in SPLITS.items() if name == wanted) for wanted in ("qwen2", "gpt-2", "llama-bpe")
)


def of_bytes(split: str | None, *, normalizer: Any = None, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    isolated = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([*isolated, bytes_of]), decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def of_scores(scheme: Any = "always") -> PreTrainedTokenizerFast:
    """As SentencePiece's: merges by the score of what they make, of all pairs that make it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=240, show_progress=False))
    own = sorted(trained.get_vocab().items(), key=lambda entry: entry[1])
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(text for text, _ in own)]
    vocabulary = {text: number for number, text in enumerate(words)}
    known = {text for text, _ in own}
    made = sorted((text for text in known if len(text) > 1), key=lambda text: vocabulary[text])
    pairs = [[(text[:cut], text[cut:]) for cut in range(1, len(text)) if {text[:cut], text[cut:]} <= known] for text in made]
    merges = [pair for of_text in pairs for pair in of_text]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def written(tokenizer: PreTrainedTokenizerFast, folder: Path) -> GgufModel:
    tiny_model(vocab_size=700).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    model = whole_model(folder / "model")
    gguf = GgufModel(model.weights, model.config, tokenizer, model.stops, "fp16", "it")
    gguf.write(folder / "it.gguf")
    gguf.check(folder / "it.gguf")
    return gguf


@pytest.mark.parametrize("split", [QWEN2, GPT2, None], ids=["qwen2", "gpt-2", "gpt-2 of bytes"])
def test_merges_of_bytes_are_read_back_as_the_same_tokens(split: Any, tmp_path: Path) -> None:
    tokenizer = of_bytes(split[0] if split else None)
    written(tokenizer, tmp_path)
    found = gguf_tokenizer(tokenizer, None, 700)
    assert (found.model, found.pre) == ("gpt2", "qwen2" if split == QWEN2 else "gpt-2")
    assert found.tokens[len(tokenizer) :] == [f"[PAD{number}]" for number in range(len(tokenizer), 700)]
    if split == QWEN2:  # transformers splits all others as GPT-2 does, or as Llama
        read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="it.gguf")
        assert [read(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]


def test_merges_by_scores_are_read_back_as_the_same_tokens(tmp_path: Path) -> None:
    tokenizer = of_scores()
    written(tokenizer, tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="it.gguf")
    for text in TEXTS[:-1]:
        assert read(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids
    found = gguf_tokenizer(tokenizer, None, 700)
    assert (found.model, found.add_space_prefix, found.add_bos) == ("llama", True, False)
    assert [found.kinds[number] for number in (0, 1, 3, 259, 699)] == [2, 3, 6, 1, 5]


def test_llama_3s_words_and_qwens_composing_are_seen() -> None:
    assert gguf_tokenizer(of_bytes(LLAMA3[0], ignore_merges=True), None, 700).pre == "llama-bpe"
    # All of its tokens are reached by merges, so that whole words make no difference.
    assert gguf_tokenizer(of_bytes(LLAMA3[0]), None, 700).pre == "llama-bpe"
    composed = gguf_tokenizer(of_bytes(QWEN2[0], normalizer=normalizers.NFC()), None, 700)
    assert composed.notes == ("The tokenizer composes characters (NFC), which llama.cpp does not.",)


def test_ends_of_answers_are_named() -> None:
    tokenizer = of_bytes(QWEN2[0])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|call|>"]})
    turn, call = (tokenizer.get_vocab()[token] for token in ("<|turn|>", "<|call|>"))
    found = gguf_tokenizer(tokenizer, GenerationConfig(eos_token_id=[turn, tokenizer.eos_token_id, call]), 700)
    assert found.ids == {"eos": tokenizer.eos_token_id, "eot": turn}
    assert found.notes == ("Answers also end at <|call|>, which GGUF has no field for.",)
    assert [found.kinds[number] for number in (turn, call)] == [3, 3]


def test_tokenizers_that_a_gguf_would_read_otherwise_are_refused() -> None:
    def refused(tokenizer: Any, match: str, num_rows: int = 700) -> None:
        with pytest.raises(ModelError, match=match):
            gguf_tokenizer(tokenizer, None, num_rows)

    refused(of_bytes(r"\w+|\W+"), r"splits text by .*--converter")
    refused(of_bytes(QWEN2[0], normalizer=normalizers.Lowercase()), "changes text before .Lowercase.*--converter")
    refused(of_scores("first"), "before the first piece of a text only.*--converter")
    vocabulary = {text: number for number, text in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    lacking = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("b", "c"), ("ab", "c")], byte_fallback=True))
    refused(PreTrainedTokenizerFast(tokenizer_object=lacking), "does not merge 'a' with 'bc', as scores .*--converter")
    pieces = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")))
    refused(pieces, "of the kind WordPiece, not BPE.*--converter")
    refused(of_bytes(QWEN2[0]), "tokens up to [0-9]+, and the embedding 300 rows", 300)
