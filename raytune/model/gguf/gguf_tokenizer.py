"""A tokenizer as GGUF holds it: tokens, merges and scores, how text is split before, and which tokens are special.

What llama.cpp would read as other tokens is refused: it knows ways to split text by names, and of others it has none.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tokenizers.models import BPE
from transformers import GenerationConfig, PreTrainedTokenizerBase

from raytune.data.templates.tokenizers import backend_of
from raytune.errors import ModelError
from raytune.model.files.stopping import as_ids

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens, by their numbers in GGUF."""
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_AROUND = r"[^\r\n\p{L}\p{N}]?"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITS: Mapping[tuple[str, ...], tuple[str, bool]] = {
    (GPT2,): ("gpt-2", False),
    (rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",): ("llama-bpe", True),
    (rf"{_LETTERS}|\p{{N}}|{_REST}",): ("qwen2", False),
    (
        rf"{_AROUND}{_WORDS}*{_SMALL}+|{_AROUND}{_WORDS}+{_SMALL}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+"
        rf"|\s+(?!\S)|\s+",
    ): ("tekken", True),
    (r"\p{N}", GPT2): ("smollm", False),
}
"""How text is split before merges: llama.cpp's name of it, and whether it takes a whole word that is a token before any merge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTokenizer:
    """The fields of a file."""

    model: str
    """`gpt2`: merges of bytes. `llama`: merges by scores, as SentencePiece has them."""
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    merges: list[str]
    add_space_prefix: bool | None = None
    ids: Mapping[str, int]
    """Of special tokens, by llama.cpp's names."""
    add_bos: bool
    add_eos: bool
    template: str | None
    notes: tuple[str, ...] = ()


def gguf_tokenizer(tokenizer: PreTrainedTokenizerBase, stops: GenerationConfig | None, num_rows: int) -> GgufTokenizer:
    """The fields that make llama.cpp read text as a tokenizer does.

    Args:
        stops: which tokens end an answer, if anything says it beside the tokenizer.
        num_rows: of the embedding; rows beyond the tokens are no text.

    Raises:
        ModelError: if there is no way to say it.
    """
    if not tokenizer.is_fast:
        raise _refusal(f"a {type(tokenizer).__name__}, which is not of the library `tokenizers`")
    own: dict[str, Any] = json.loads(backend_of(tokenizer).to_str())
    if own["model"]["type"] != "BPE":
        raise _refusal(f"of the kind {own['model']['type']}, not BPE")
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) > num_rows or max(vocabulary.values()) >= num_rows:
        raise ModelError(f"The tokenizer has tokens up to {max(vocabulary.values())}, and the embedding {num_rows} rows.")
    tokens = [f"[PAD{number}]" for number in range(num_rows)]
    kinds = [UNUSED] * num_rows
    for text, number in vocabulary.items():
        tokens[number], kinds[number] = text, NORMAL
    for number, added in tokenizer.added_tokens_decoder.items():
        kinds[number] = CONTROL if added.special else USER_DEFINED
    is_bytes = "ByteLevel" in _types(own["pre_tokenizer"])
    ids, notes = _special_ids(tokenizer, stops)
    bos, eos = (getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos"))
    encoded: list[int] = tokenizer("a")["input_ids"]
    common: dict[str, Any] = {
        "ids": ids,
        "add_bos": bos is not None and encoded[:1] == [bos],
        "add_eos": eos is not None and len(encoded) > 1 and encoded[-1] == eos,
        "template": tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    }
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in own["model"]["merges"]]
    if is_bytes:
        pre, pre_notes = _pre_tokenizer(own, merges)
        return GgufTokenizer(
            model="gpt2",
            pre=pre,
            tokens=tokens,
            kinds=kinds,
            scores=[0.0] * num_rows,
            merges=[" ".join(merge) for merge in merges],
            notes=(*notes, *pre_notes),
            **common,
        )
    for text, number in vocabulary.items():
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kinds[number] = BYTE
    unknown: Any = tokenizer.unk_token_id
    if unknown is not None:
        kinds[unknown] = UNKNOWN
    return GgufTokenizer(
        model="llama",
        pre="default",
        tokens=tokens,
        kinds=kinds,
        scores=_scores(own, merges, vocabulary, num_rows),
        merges=[],
        add_space_prefix=_space_prefix(own),
        notes=notes,
        **common,
    )


def _refusal(what: str) -> ModelError:
    return ModelError(
        f"The tokenizer is {what}: a GGUF of ours cannot say so exactly. With llama.cpp at hand, its converter may know it: "
        f"--converter /path/to/convert_hf_to_gguf.py."
    )


def _special_ids(tokenizer: Any, stops: GenerationConfig | None) -> tuple[dict[str, int], tuple[str, ...]]:
    """Numbers of special tokens; and what is lost of them, in sentences."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {ours: number for name, ours in names.items() if (number := getattr(tokenizer, f"{name}_token_id")) is not None}
    ends = as_ids(stops.eos_token_id) if stops is not None else []
    if ends:
        ids.setdefault("eos", ends[0])
    if others := [number for number in ends if number != ids.get("eos")]:
        ids["eot"] = others[0]  # llama.cpp ends an answer at it, too
    lost = [tokenizer.convert_ids_to_tokens(number) for number in others[1:]]
    return ids, tuple(f"Answers also end at {token}, which GGUF has no field for." for token in lost)


def _types(part: Any) -> list[str]:
    """Of a normalizer or a pre-tokenizer, with those of its parts."""
    if part is None:
        return []
    parts = part.get("pretokenizers") or part.get("normalizers")
    return [kind for one in parts for kind in _types(one)] if parts is not None else [part["type"]]


def _pre_tokenizer(own: dict[str, Any], merges: Sequence[tuple[str, ...]]) -> tuple[str, tuple[str, ...]]:
    """llama.cpp's name of how text is split into words, and what is to be said of it."""
    parts = own["pre_tokenizer"].get("pretokenizers") or [own["pre_tokenizer"]]
    splits: list[str] = []
    for part in parts:
        if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"] and "Regex" in part["pattern"]:
            splits.append(part["pattern"]["Regex"])
        elif part["type"] == "Digits" and part["individual_digits"]:
            splits.append(r"\p{N}")
        elif part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            splits += [GPT2] if part["use_regex"] else []
        else:
            raise _refusal(f"one that splits text by {part['type']} {json.dumps(part)[:80]}")
    normalizers = {*_types(own["normalizer"])}
    if normalizers - {"NFC"}:
        raise _refusal(f"one that changes text before ({', '.join(sorted(normalizers))})")
    notes = ["The tokenizer composes characters (NFC), which llama.cpp does not."] if normalizers else []
    if not merges:  # single bytes, however text is split
        return "gpt-2", (*notes, "The tokenizer has no merges; llama.cpp asks for at least one, other readers do not.")
    if tuple(splits) not in SPLITS:
        raise _refusal(f"one that splits text by {splits or 'nothing'}")
    pre, takes_words = SPLITS[tuple(splits)]
    takes_words_here = bool(own["model"].get("ignore_merges"))
    if takes_words != takes_words_here and (word := _unreachable(own, merges)):
        takes = "takes" if takes_words_here else "does not take"
        raise _refusal(f"one that {takes} whole words before merges, unlike {pre}, which matters for {word!r}")
    return pre, tuple(notes)


def _unreachable(own: dict[str, Any], merges: Sequence[tuple[str, ...]]) -> str | None:
    """A token that merges do not lead to, so that it matters whether whole words are looked up before."""
    vocabulary: dict[str, int] = own["model"]["vocab"]
    bare = BPE(vocab=vocabulary, merges=[(left, right) for left, right in merges])
    found_before = {added["content"] for added in own["added_tokens"]}
    return next((word for word in vocabulary if word not in found_before and len(bare.tokenize(word)) != 1), None)


def _space_prefix(own: dict[str, Any]) -> bool:
    """Whether a space stands before each piece of text, as llama.cpp puts it: at the start and behind special tokens."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer, pre = own["normalizer"], own["pre_tokenizer"]
    parts = [] if normalizer is None else normalizer.get("normalizers") or [normalizer]
    prepends = [part for part in parts if part["type"] == "Prepend"]
    others = [part for part in parts if part not in prepends and part != spaces]
    if others or any(part["prepend"] != "▁" for part in prepends):
        raise _refusal(f"one that changes text before ({', '.join(_types(normalizer))})")
    if pre is None and spaces in parts:
        return bool(prepends)
    if pre is not None and pre["type"] == "Metaspace" and not parts and pre["replacement"] == "▁" and not pre["split"]:
        if pre["prepend_scheme"] in ("always", "never"):
            return pre["prepend_scheme"] == "always"
        raise _refusal("one that puts a space before the first piece of a text only, where llama.cpp puts it before each")
    raise _refusal(f"one that splits text by {', '.join(_types(pre)) or 'nothing'}, without bytes")


def _scores(own: dict[str, Any], merges: Sequence[tuple[str, ...]], vocabulary: Mapping[str, int], num_rows: int) -> list[float]:
    """Scores by which the same merges come first as by their order in the tokenizer."""
    if not own["model"].get("byte_fallback"):
        raise _refusal("one that has no bytes for characters that it does not know")
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
        last[left + right] = rank
    made = sorted(first, key=lambda text: first[text])
    if mixed := next((text for text, after in pairwise(made) if last[text] > first[after]), None):
        raise _refusal(f"one whose merges are in an order that scores of tokens cannot give (of {mixed!r})")
    known = {*merges}
    for text in made:
        pairs = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        if unknown := next((pair for pair in pairs if pair not in known and {*pair} <= vocabulary.keys()), None):
            raise _refusal(f"one that does not merge {unknown[0]!r} with {unknown[1]!r}, as scores of tokens would")
    scores = [0.0] * num_rows
    for place, text in enumerate(made):
        scores[vocabulary[text]] = -float(place + 1)
    return scores
