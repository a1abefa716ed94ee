"""Rows that a model is asked, in any format of `data.train`, and the prompts that they are for a model: text in its own template,
tokens as in training. An answer that a row brings is left out of what is asked, and kept beside it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from raytune.config.sections.data import DataSource
from raytune.data.conversations.conversation import Conversation, Message, Origin, RowError, kind_of
from raytune.data.conversations.fields import REASONING
from raytune.data.formats.recognising import AS_MESSAGES, read_row
from raytune.data.rows.shards import Tally
from raytune.data.rows.source_rows import read_conversations
from raytune.data.templates.rendering import Job, Renderer
from raytune.data.templates.text import name_of
from raytune.data.templates.tokenizers import adds_bos
from raytune.errors import UserError
from raytune.evaluation.questions import ids_of

IN_PYTHON = "prompts"
"""Stands for a file where rows come from no file."""
_BESIDE_TEXT = ("tool_calls", *REASONING)


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedRow:
    """A row without its answer."""

    origin: Origin
    messages: tuple[Message, ...] = ()
    tools: list[Any] | None = None
    text: str | None = None
    """Of a row that is a text; it has no messages."""
    expected: Any = None
    """The answer that the row has: its text, or the whole turn where that is more than text. None: it has none."""


def read_asked_rows(sources: Sequence[DataSource], downloads: Path, tally: Tally) -> Iterator[AskedRow]:
    """The rows of sources in their order.

    Args:
        tally: of rows that were read, and of those that cannot be asked.

    Raises:
        DataError: if a source is missing, or the format of its rows cannot be told.
    """
    for source in sources:
        for conversation in read_conversations(source, downloads, tally, are_asked=True):
            try:
                yield asked_row(conversation)
            except RowError as error:
                tally.add("bad", conversation.origin, str(error))


def asked_row(conversation: Conversation) -> AskedRow:
    """A row without the answer that it ends with.

    Raises:
        RowError: if nothing else is left.
    """
    if conversation.text is not None:
        return AskedRow(origin=conversation.origin, text=conversation.text)
    *before, last = conversation.messages
    row = AskedRow(origin=conversation.origin, messages=conversation.messages, tools=conversation.tools)
    if last["role"] != "assistant":
        return row
    if not before:
        raise RowError("is an answer to nothing, so that there is nothing to ask")
    more = any(last.get(key) for key in _BESIDE_TEXT)
    return replace(row, messages=tuple(before), expected=last if more else last.get("content") or None)


class TooLong(RowError):
    """A prompt that leaves a model no position for an answer."""


def with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """Turns behind another system message than their own; None: as they are."""
    if system is None:
        return tuple(messages)
    return ({"role": "system", "content": system}, *(turn for turn in messages if turn["role"] != "system"))


class Prompter:
    """Prompts for a model.

    Args:
        template: that turns are written in; empty: none, and texts are continued as they are.
        vocab: tokens that the model has embeddings for.
        positions: of a prompt and its answer together; None: no limit is known.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, *, vocab: int, positions: int | None) -> None:
        self.positions = positions
        self._tokenizer, self._vocab = tokenizer, vocab
        self._renderer = Renderer(tokenizer, template, name_of(template, tokenizer)) if template else None
        self._bos: list[Any] = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []

    @property
    def asks_in_turns(self) -> bool:
        """Whether there is a template; a text is the turn of a user then."""
        return self._renderer is not None

    def turns_of(self, row: AskedRow) -> tuple[Message, ...] | str:
        """What a model is asked of a row: turns, or a text that it continues."""
        if row.text is None:
            return row.messages
        return ({"role": "user", "content": row.text},) if self.asks_in_turns else row.text

    def prompt_ids(self, asked: Sequence[Message] | str, tools: list[Any] | None = None) -> tuple[int, ...]:
        """Tokens that end where the answer begins.

        Raises:
            RowError: if the template cannot render turns or there is none, the model has no embedding for a token, or the prompt
                leaves it no position for an answer; or if half of a character is in it.
        """
        if isinstance(asked, str):
            return self.checked((*self._bos, *self._ids_of(asked)))
        return self.checked(self._ids_of(self.rendered(asked, tools)))

    def rendered(self, turns: Sequence[Message], tools: list[Any] | None = None) -> str:
        """Turns in the template of the model, up to where the answer begins.

        Raises:
            RowError: if the template cannot render them, or there is none.
        """
        if self._renderer is None:
            raise RowError("these are turns, and the model has no chat template to be asked them in (--template names one)")
        text = self._renderer.one(Job(turns, tools, True))
        if isinstance(text, RowError):
            raise text
        return text

    def checked(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens of a prompt, if the model can go on from them.

        Raises:
            RowError: if there are none, the model has no embedding for one, or they leave no position for an answer.
        """
        if not ids:
            raise RowError("the prompt is empty, and there is nothing to go on from")
        if (unknown := next((token for token in ids if not 0 <= token < self._vocab), None)) is not None:
            text = self._tokenizer.convert_ids_to_tokens(unknown) if 0 <= unknown < len(self._tokenizer) else None
            raise RowError(
                f"the prompt has the token {'' if text is None else f'{text!r}, '}number {unknown}, and the model has embeddings "
                f"for {self._vocab} tokens"
            )
        if self.positions is not None and len(ids) >= self.positions:
            raise TooLong(f"the prompt has {len(ids)} tokens, and the model has {self.positions} positions for it and its answer")
        return ids

    def _ids_of(self, text: str) -> tuple[int, ...]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # from an argument or a pipe that is not UTF-8, or code
            half = ord(error.object[error.start])
            raise RowError(f"the prompt has half of a surrogate pair (\\u{half:04x}), which is no character") from None
        return tuple(ids_of(self._tokenizer, text))

    def room(self, prompt_ids: Sequence[int], max_new_tokens: int) -> int:
        """Tokens that an answer may have, 1 or more."""
        return max_new_tokens if self.positions is None else min(max_new_tokens, self.positions - len(prompt_ids))


def rows_of_prompts(prompts: Sequence[str | Sequence[Message] | Mapping[str, Any]], tally: Tally) -> Iterator[AskedRow]:
    """Rows that come from no file: questions of a user, lists of turns, or rows in the format `messages`."""
    if isinstance(prompts, str):
        raise UserError("prompts is a text, expected a list of prompts: put it into one, as in prompts=['Who?'].")
    for number, prompt in enumerate(prompts, 1):
        origin = Origin(IN_PYTHON, number)
        tally.add("rows")
        try:
            yield _row_of_prompt(prompt, origin)
        except RowError as error:
            tally.add("bad", origin, str(error))


def _row_of_prompt(prompt: str | Sequence[Message] | Mapping[str, Any], origin: Origin) -> AskedRow:
    if isinstance(prompt, str):
        return AskedRow(origin=origin, text=prompt)
    if not isinstance(prompt, Sequence | Mapping):
        raise RowError(f"is {kind_of(prompt)}, expected a text, turns, or a row with 'messages'")
    row = prompt if isinstance(prompt, Mapping) else {"messages": list(prompt)}
    return asked_row(read_row(row, AS_MESSAGES, origin))
