"""Answers in OpenAI's form: whole, or chunk by chunk as they come."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from raytune.serving.openai_errors import Refusal
from raytune.serving.protocol import Wish
from raytune.serving.requests import Piece, Token

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Begun:
    """Told before any piece of an answer."""

    num_prompt_tokens: int
    """Of all prompts."""


Told = Begun | tuple[int, Piece] | Refusal
"""What the process of an engine tells of a request: that it has begun, then pieces with the number of their choice; or that there
will be none, or no more."""


def event(value: Any) -> bytes:
    """One of a stream of server-sent events."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


@dataclass
class _Choice:
    pieces: list[Piece] = field(default_factory=list)
    num_tokens: int = 0
    num_characters: int = 0
    """Of its tokens' texts, each by itself."""
    finish: str | None = None


class Answer:
    """What has come of an answer.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, wish: Wish, clock: float | None = None) -> None:
        self._wish = wish
        asked = wish.asked
        self._choices = [_Choice() for _ in range(len(asked.prompts) * asked.num_choices)]
        self._num_prompt_tokens = 0
        created = int(time.time() if clock is None else clock)
        whole, part = ("chat.completion", "chat.completion.chunk") if wish.is_chat else ("text_completion",) * 2
        common = {"id": asked.id, "created": created, "model": asked.model, "system_fingerprint": None}
        self._whole, self._part = {"object": whole, **common}, {"object": part, **common}

    @property
    def is_complete(self) -> bool:
        return all(choice.finish for choice in self._choices)

    @property
    def has_text(self) -> bool:
        """Whether anything of it was told that a second attempt would tell again."""
        return any(choice.num_tokens for choice in self._choices)

    @property
    def num_prompt_tokens(self) -> int:
        return self._num_prompt_tokens

    @property
    def num_new_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self._choices)

    def take(self, told: Begun | tuple[int, Piece]) -> None:
        """Take note of what comes next."""
        if isinstance(told, Begun):
            self._num_prompt_tokens = told.num_prompt_tokens
            return
        number, piece = told
        choice = self._choices[number]
        if not self._wish.streams:
            choice.pieces.append(piece)
        choice.num_tokens, choice.finish = piece.num_tokens, piece.finish
        choice.num_characters += sum(len(token.text) for token in piece.tokens)

    def to_json(self) -> dict[str, Any]:
        """The whole answer."""
        return self._whole | {"choices": [self._choice(number) for number in range(len(self._choices))], "usage": self._usage()}

    def opening(self) -> Iterator[bytes]:
        """The chunks that a chat begins with."""
        if self._wish.is_chat:
            for number in range(len(self._choices)):
                yield self._chunk(number, {"delta": {"role": "assistant", "content": ""}, "logprobs": None}, None)

    def chunk(self, number: int, piece: Piece) -> bytes:
        """The chunk for a piece that was just taken."""
        before = self._choices[number].num_characters - sum(len(token.text) for token in piece.tokens)
        logprobs = self._logprobs(piece.tokens, before)
        if not self._wish.is_chat:
            return self._chunk(number, {"text": piece.text, "logprobs": logprobs}, piece.finish)
        delta = {"content": piece.text} if piece.text or not piece.finish else {}
        return self._chunk(number, {"delta": delta, "logprobs": logprobs}, piece.finish)

    def ending(self) -> Iterator[bytes]:
        """What a stream ends with."""
        if self._wish.tells_usage:
            yield event(self._part | {"choices": [], "usage": self._usage()})
        yield DONE

    def _chunk(self, number: int, said: dict[str, Any], finish: str | None) -> bytes:
        usage = {"usage": None} if self._wish.tells_usage else {}
        return event(self._part | {"choices": [{"index": number, **said, "finish_reason": finish}]} | usage)

    def _choice(self, number: int) -> dict[str, Any]:
        choice = self._choices[number]
        text = "".join(piece.text for piece in choice.pieces)
        tokens = [token for piece in choice.pieces for token in piece.tokens]
        logprobs = self._logprobs(tokens, 0)
        if not self._wish.is_chat:
            return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": choice.finish}
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": choice.finish}

    def _usage(self) -> dict[str, int]:
        new = self.num_new_tokens
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._num_prompt_tokens + new,
        }

    def _logprobs(self, tokens: Sequence[Token], first_character: int) -> dict[str, Any] | None:
        most = self._wish.asked.num_logprobs
        if most is None:
            return None
        if self._wish.is_chat:
            return {"content": [_of_chat(token) for token in tokens], "refusal": None}
        offsets, at = [], first_character
        for token in tokens:
            offsets.append(at)
            at += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{text: value for _, text, value in token.likeliest} for token in tokens] if most else None,
            "text_offset": offsets,
        }


def _of_chat(token: Token) -> dict[str, Any]:
    likeliest = [{"token": text, "logprob": value, "bytes": _bytes(text)} for _, text, value in token.likeliest]
    return {"token": token.text, "logprob": token.logprob, "bytes": _bytes(token.text), "top_logprobs": likeliest}


def _bytes(text: str) -> list[int] | None:
    """None where a token is a part of a character, which its text does not tell."""
    return None if "\ufffd" in text else list(text.encode())
