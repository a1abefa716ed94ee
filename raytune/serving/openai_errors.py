"""Answers of an endpoint that are no answer, in OpenAI's form."""

from dataclasses import dataclass
from typing import Any

INVALID, UNAUTHORISED, NOT_FOUND, BUSY, FAILED = (
    "invalid_request_error",
    "authentication_error",
    "not_found_error",
    "rate_limit_error",
    "server_error",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a request gets no answer, or no more of it."""

    status: int
    """Of HTTP."""
    message: str
    type: str = INVALID
    param: str | None = None
    """The parameter that is to blame."""
    code: str | None = None
    """By which programs tell them apart."""
    headers: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class Refused(Exception):
    """Raised where a request ends without an answer."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal

    def __str__(self) -> str:
        return self.refusal.message


def bad(message: str, param: str | None = None, code: str | None = None) -> Refused:
    """What is wrong with a request as it is written."""
    return Refused(Refusal(status=400, message=message, param=param, code=code))


NO_RETRY = (("x-should-retry", "false"),)
"""Obeyed by OpenAI's clients, which else ask again where it would only cost the same time once more."""
UNKNOWN_TOKEN = Refusal(
    status=401,
    message="The token is missing or wrong: send the one that this endpoint was started with, as Authorization: Bearer TOKEN.",
    type=UNAUTHORISED,
    code="invalid_api_key",
    headers=(("WWW-Authenticate", "Bearer"),),
)
TOO_BUSY = Refusal(
    status=429,
    message="As many requests wait as this endpoint holds. Ask again later.",
    type=BUSY,
    code="queue_full",
    headers=(("Retry-After", "1"),),
)
LOST = Refusal(
    status=503,
    message="The process that was writing this answer died. Ask again.",
    type=FAILED,
    code="replica_lost",
    headers=(("Retry-After", "2"),),
)
NOT_READY = Refusal(
    status=503, message="No model is ready to answer.", type=FAILED, code="not_ready", headers=(("Retry-After", "2"),)
)
FAULT = Refusal(
    status=500,
    message="The endpoint failed on this request; its logs say why.",
    type=FAILED,
    code="internal_error",
    headers=NO_RETRY,
)


def too_late(timeout_s: float) -> Refusal:
    return Refusal(
        status=504,
        message=f"The answer was not complete after {timeout_s:g} s, which is as long as this endpoint works on one (--timeout). "
        f"Ask for fewer tokens, or stream.",
        type=FAILED,
        code="timeout",
        headers=NO_RETRY,
    )


def unknown_model(name: str, names: list[str]) -> Refusal:
    return Refusal(
        status=404,
        message=f"There is no model {name!r} here. There are: {', '.join(names)}.",
        type=NOT_FOUND,
        param="model",
        code="model_not_found",
    )
