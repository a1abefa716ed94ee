"""Tokenizers of bases: opened, told apart, and the library's own below them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase, TokenizersBackend

from raytune.config.sections.model import NewToken
from raytune.errors import ModelError
from raytune.hub.snapshot import described
from raytune.plan.model.base_model import DEMO, is_on_hub, model_files
from raytune.plan.model.model_folder import check_tokenizer_code, reading
from raytune.plan.strategies.new_tokens import Vocabulary, next_number


def open_tokenizer(
    path: str, revision: str | None = None, trust_remote_code: bool = False, new_tokens: Sequence[NewToken] = ()
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can say where in the text its tokens lie, with new tokens.

    Raises:
        ModelError: if there is none at that path, or it is not backed by the `tokenizers` library.
        ClusterError: if a hub has to be asked for it and does not answer.
    """
    if is_on_hub(path):
        revision = described(path, revision, with_code=trust_remote_code)
    tokenizer = load_tokenizer(path, revision, trust_remote_code)
    if not tokenizer.is_fast:
        raise ModelError(
            f"The tokenizer at '{path}' is a {type(tokenizer).__name__}, which is not backed by the `tokenizers` library. "
            f"Convert it once: AutoTokenizer.from_pretrained(path, use_fast=True).save_pretrained(folder)."
        )
    return with_tokens(tokenizer, new_tokens)


def with_tokens(tokenizer: PreTrainedTokenizerBase, new_tokens: Sequence[NewToken]) -> PreTrainedTokenizerBase:
    """A tokenizer with tokens added; the same object. One that it has already stays as it is."""
    for one in new_tokens:
        tokenizer.add_tokens([AddedToken(one.token, special=one.special, normalized=False)], special_tokens=one.special)
    return tokenizer


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """What a tokenizer says of tokens that are to be added to it."""
    own = backend_of(tokenizer).get_vocab_size(with_added_tokens=False)
    return Vocabulary(known=tokenizer.get_vocab(), next_number=next_number(own, tokenizer.added_tokens_decoder))


def load_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer that comes with a model, of any kind.

    Raises:
        ModelError: if there is none at that path, or it cannot be read.
    """
    if trust_remote_code:
        check_tokenizer_code(path, Path(model_files(path, revision, with_code=True)))
    if path == DEMO:  # whose class is known: AutoTokenizer asks the model's config for it too, and three seconds of imports
        return TokenizersBackend.from_pretrained(model_files(path, revision))
    from transformers import AutoTokenizer  # loads torch

    with reading(f"There is no usable tokenizer at '{path}'"):
        return AutoTokenizer.from_pretrained(
            model_files(path, revision, with_code=trust_remote_code), revision=revision, trust_remote_code=trust_remote_code
        )


def token_numbers(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Numbers of tokens by their texts in the vocabulary.

    Raises:
        ModelError: naming the first that is none, and how the vocabulary writes it.
    """
    known = tokenizer.get_vocab()
    for token in tokens:
        if token not in known:
            pieces = tokenizer.tokenize(token)
            said = (
                f"which the vocabulary writes as {pieces[0]!r}"
                if len(pieces) == 1
                else f"which is {len(pieces)} tokens: {pieces}"
            )
            raise ModelError(
                f"adapter.trainable_tokens names {token!r}, {said[:200]}. Name tokens as the vocabulary writes them; "
                f"model.new_tokens makes a text one token.",
                keys=("adapter.trainable_tokens",),
            )
    return [known[token] for token in tokens]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything in a tokenizer that decides which tokens a text becomes. Its chat template is not part of it."""
    parts = [backend_of(tokenizer).to_str(), json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer by itself puts a beginning-of-text token before a text."""
    ids = backend_of(tokenizer).encode("a").ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer of the `tokenizers` library below, with neither padding nor truncation left on by an earlier call."""
    backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    backend.no_truncation()
    backend.no_padding()
    return backend
