"""Who answers in a conversation: models of an endpoint that speaks OpenAI's protocol (`raytune serve`, vLLM and their like)."""

import http.client
import json
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from raytune.data.conversations.conversation import Message
from raytune.errors import ClusterError, UserError
from raytune.evaluation.generation import Written
from raytune.plan.run_plan import SamplingPlan
from raytune.printable import in_a_line

TOKEN = "RAYTUNE_API_KEY"
"""Environment variable with the token that an endpoint wants."""
WAIT_S = 600.0
"""For the first piece of an answer, and from one to the next."""
MOST_BYTES = 1 << 20
"""Of a line, or of what an endpoint says of itself."""


def is_endpoint(model: str) -> bool:
    return model.startswith(("http://", "https://"))


class FarSpeaker:
    """Models of an endpoint.

    Args:
        url: up to the version, as in http://127.0.0.1:8000/v1.

    Raises:
        UserError: if the endpoint refuses, or is none.
        ClusterError: if it cannot be reached.
    """

    def __init__(self, url: str) -> None:
        try:
            self._url = urlsplit(url.rstrip("/"))
            is_address = bool(self._url.hostname and self._url.hostname.encode("idna")) and self._url.port != 0
            is_address &= not (self._url.username or self._url.query) and url.isprintable() and " " not in url
        except ValueError:  # a port or a host that cannot be one
            is_address = False
        if not is_address:
            raise UserError(
                f"An endpoint is named by its address alone, as in http://127.0.0.1:8000/v1; the token is in {TOKEN}."
            )
        with closing(self._connected()) as connection:
            found = _json(self._read(self._asked(connection, "GET", "models")))
        listed = found.get("data") if isinstance(found, dict) else None
        names = [one["id"] for one in listed or () if isinstance(one, dict) and isinstance(one.get("id"), str)]
        if not names:
            raise UserError(f"{url} lists no models, so it is no endpoint of OpenAI's protocol. Its address ends in /v1, mostly.")
        self._models = dict.fromkeys(names, url)

    @property
    def models(self) -> Mapping[str, str]:
        return self._models

    def answer(
        self, model: str, messages: Sequence[Message], max_new_tokens: int, sampling: SamplingPlan | None, number: int
    ) -> Generator[str, None, Written]:
        asked: dict[str, Any] = {
            "model": model,
            "messages": list(messages),
            "max_tokens": max_new_tokens,
            "temperature": sampling.temperature if sampling else 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if sampling:
            drawn = {"top_p": sampling.top_p, "top_k": sampling.top_k, "seed": sampling.seed + number}
            asked |= {name: value for name, value in drawn.items() if value is not None}
        read: list[str] = []
        finish, num_tokens = None, None
        with closing(self._connected()) as connection:
            for event in _events(self._asked(connection, "POST", "chat/completions", asked)):
                if error := event.get("error"):
                    raise UserError(f"{model} ended its answer: {_said(error)}")
                num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
                for choice in event.get("choices") or ():
                    finish = choice.get("finish_reason") or finish
                    if piece := (choice.get("delta") or {}).get("content"):
                        read.append(piece)
                        yield piece
        if finish is None:
            raise ClusterError(f"The endpoint ended in the middle of an answer of {model}. Ask again.")
        return Written(
            text="".join(read), num_tokens=len(read) if num_tokens is None else num_tokens, has_ended=finish != "length"
        )

    def close(self) -> None:
        pass

    def _connected(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        assert self._url.hostname
        return kind(self._url.hostname, self._url.port, timeout=WAIT_S)

    def _asked(
        self, connection: http.client.HTTPConnection, method: str, what: str, body: Mapping[str, Any] | None = None
    ) -> http.client.HTTPResponse:
        """The answer to a request, of which nothing is read yet.

        Raises:
            UserError: if it is refused.
            ClusterError: if nobody answers.
        """
        token = os.environ.get(TOKEN)
        if token and not (token.isascii() and token.isprintable()):
            raise UserError(f"{TOKEN} has characters that no token has: a line break, or something beyond ASCII.")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        try:
            connection.request(method, f"{self._url.path}/{what}", None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise ClusterError(f"Nobody answers at {self._url.geturl()}: {in_a_line(error)}.") from error
        if response.status != 200:
            said = _said(_json(self._read(response)))
            wants_token = f" The token is taken from {TOKEN}." if response.status in (401, 403) else ""
            raise UserError(f"{self._url.geturl()} refuses ({response.status}): {said}{wants_token}")
        return response

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.read(MOST_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise ClusterError(f"{self._url.geturl()} broke off what it said: {in_a_line(error)}. Ask again.") from error


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The events of a stream up to its end.

    Raises:
        ClusterError: if the endpoint is lost in between.
    """
    while True:
        try:
            line = response.readline(MOST_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise ClusterError(f"The endpoint was lost in the middle of an answer: {in_a_line(error)}. Ask again.") from error
        name, _, data = line.partition(b":")
        if not line or data.strip() == b"[DONE]":
            return
        if name == b"data" and isinstance(event := _json(data), dict):
            yield event


def _json(data: bytes) -> Any:
    """What an endpoint says; its text, where that is no JSON."""
    try:
        return json.loads(data)
    except ValueError:
        return data.decode(errors="replace")


def _said(error: Any) -> str:
    """The message in what an endpoint says of an error."""
    inner = error.get("error", error) if isinstance(error, dict) else error
    return in_a_line(inner.get("message", inner) if isinstance(inner, dict) else inner)
