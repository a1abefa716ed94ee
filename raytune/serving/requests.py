"""What is asked of an engine that answers, and what it gives back, piece by piece."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Finish = Literal["stop", "length", "cancelled"]
"""Why an answer ended, in OpenAI's words where these have one: the model's end or a text of `stop`, as many tokens as asked for,
or nobody wants the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to be continued."""

    id: str
    model: str
    """Name of one of the engine's models."""
    prompt: tuple[int, ...]
    """Token ids, ending where the answer begins; at least one."""
    max_new_tokens: int
    """1 or more."""
    temperature: float = 0.0
    """0: the likeliest token each time."""
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    """Of what is drawn: equal requests with equal seeds have equal answers, whatever else is in the engine. None: any."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, and are not part of it."""
    num_logprobs: int | None = None
    """Likeliest tokens to tell at each place, besides the chosen one; None: no log-probabilities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of an answer, with log-probabilities under the model before temperature."""

    id: int
    text: str
    logprob: float
    likeliest: tuple[tuple[int, str, float], ...]
    """Id, text and log-probability of others, the likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What is new of an answer. Joined, the texts are the answer; a piece ends at no half of a character or of a stop text."""

    text: str
    num_tokens: int
    """Generated so far, with those whose text is still held back."""
    tokens: tuple[Token, ...] = ()
    """New ones, if log-probabilities are asked for."""
    finish: Finish | None = None
    """In the last piece, and in no other."""


Deliver = Callable[[Piece | Exception], None]
"""Called from the engine's thread with each piece, or with what went wrong, which is the last thing told of a request. Returns at
once: who needs longer hands it on."""
