"""One turn of a chat as files have it, made a `Message`: role, text, tool calls, and whether its row wants it trained."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from raytune.data.conversations.conversation import Message, RowError, kind_of
from raytune.data.conversations.fields import REASONING
from raytune.data.conversations.strict_json import strict_json

ROLES = ("system", "user", "assistant", "tool")

_MEANT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "function": "tool",
    "function_call": "assistant",
    "observation": "tool",
}
"""What others call them."""
DEVELOPER = "developer"
"""OpenAI's later name for `system`, which most templates do not know."""

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""ShareGPT's `from`, in small letters, -> the role."""
_CALLS = ("function_call", "tool_call")
"""Speakers whose value is a call, as JSON."""

_KNOWN_KEYS = frozenset({"role", "content", "tool_calls", "tool_call_id", "name", "train", "weight", *REASONING})
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6
"""Of a turn that is trained. What lies beyond is a slip of the pen, and would be lost beside the other weights in 32 bits."""
# OpenAI's exports have them in every turn, nearly always with nothing in them.
_OFTEN_EMPTY_KEYS = frozenset({"refusal", "audio", "annotations", "function_call"})


def is_empty(value: Any) -> bool:
    """Whether a value says nothing. Numbers and booleans always say something."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def message_of(turn: Any, place: str) -> Message:
    """A turn in OpenAI's form.

    Args:
        place: where in its row it is, for messages.

    Raises:
        RowError: if it is no turn, or asks for what cannot be done.
    """
    if not isinstance(turn, dict):
        raise RowError(f"'{place}' is {kind_of(turn)}, expected an object with role and content")
    if turn.keys() >= {"from", "value"} and "role" not in turn:
        column = place.partition("[")[0]
        raise RowError(f"'{place}' has 'from' and 'value': write `format: sharegpt` with `columns: {{conversations: {column}}}`")
    if turn.get("role") == DEVELOPER:
        turn = turn | {"role": "system"}
    role, content, calls = turn.get("role"), turn.get("content"), turn.get("tool_calls")
    if role not in ROLES:
        meant = _MEANT_ROLES.get(role) if isinstance(role, str) else None
        hint = f'. Did you mean "{meant}"?' if meant else ""
        raise RowError(f"'{place}.role' is {role!r}, expected one of {', '.join(ROLES)}{hint}")
    if not is_empty(turn.get("function_call")):
        raise RowError(f"'{place}.function_call' is OpenAI's older form of a call; write it as an entry of tool_calls")
    message = turn
    if not _OFTEN_EMPTY_KEYS.isdisjoint(turn):
        message = {key: value for key, value in turn.items() if key not in _OFTEN_EMPTY_KEYS or not is_empty(value)}
    if "weight" in message or "train" in message:
        message = _decided(message, place)
    if isinstance(content, list):
        message = message | {"content": _text_of_parts(content, f"{place}.content")}
    elif not isinstance(content, str) and not (content is None and calls and role == "assistant"):
        raise RowError(f"'{place}.content' is {kind_of(content)}, expected text")
    if "tool_calls" in message:
        # An empty list stands for no call, as null does; templates may ask for the key alone.
        message = {key: value for key, value in message.items() if key != "tool_calls"}
        if not is_empty(calls):
            message["tool_calls"] = _tool_calls(calls, f"{place}.tool_calls")
    for key in REASONING:
        if not isinstance(turn.get(key), str | None):
            raise RowError(f"'{place}.{key}' is {kind_of(turn[key])}, expected text")
    return message


def sharegpt_message_of(turn: Any, place: str) -> Message:
    """A turn in ShareGPT's form: `from` who it is and its `value`.

    Raises:
        RowError: as for `message_of`.
    """
    if not isinstance(turn, dict):
        raise RowError(f"'{place}' is {kind_of(turn)}, expected an object with from and value")
    if turn.keys() >= {"role", "content"} and "from" not in turn:
        column = place.partition("[")[0]
        raise RowError(f"'{place}' has 'role' and 'content': write `format: messages` with `columns: {{messages: {column}}}`")
    if twice := next((key for key in ("role", "content") if turn.get(key) is not None), None):
        raise RowError(f"'{place}' has '{twice}' beside 'from' and 'value', so that it does not say which of them counts")
    speaker, value = turn.get("from"), turn.get("value")
    said = speaker.lower() if isinstance(speaker, str) else ""
    role = SHAREGPT_ROLES.get(said)
    if role is None:
        raise RowError(f"'{place}.from' is {speaker!r}, expected one of {', '.join(SHAREGPT_ROLES)}")
    if not isinstance(value, str):
        raise RowError(f"'{place}.value' is {kind_of(value)}, expected text")
    message = {"role": role, "content": value} | {key: field for key, field in turn.items() if key not in ("from", "value")}
    if said in _CALLS:
        message |= {"content": "", "tool_calls": _calls_in(value, f"{place}.value")}
    return message_of(message, place)


_REQUESTS = ("train: true", "weight: 1")
"""That a turn is trained."""


def obeyed_requests(targets: str | tuple[str, ...]) -> set[str]:
    """Those of `unread_keys` that `data.targets` fulfils: it means turns of these roles too."""
    if targets == "all":
        return {_request(what, role) for what in _REQUESTS for role in ROLES}
    return {_request(what, role) for what in _REQUESTS for role in targets} if isinstance(targets, tuple) else set()


def _request(what: str, role: str) -> str:
    return f"{what} of {role}"


def unread_keys(turns: Iterable[Any], messages: Iterable[Message]) -> tuple[str, ...]:
    """Keys of turns with something in them that we do not know, and what is read otherwise than it is written: requests to train
    turns of other roles, which `data.targets` alone decides, and OpenAI's developer."""
    unknown: dict[str, None] = {}
    for turn, message in zip(turns, messages, strict=True):
        if turn.get("role") == DEVELOPER:
            unknown["role: developer, as system"] = None
        if not _KNOWN_KEYS.issuperset(message):
            unknown |= dict.fromkeys(key for key, value in message.items() if key not in _KNOWN_KEYS and not is_empty(value))
        if message["role"] != "assistant" and (turn.get("train") is True or turn.get("weight") == 1):
            what = _REQUESTS[0] if turn.get("train") is True else _REQUESTS[1]
            unknown[_request(what, message["role"])] = None
    return tuple(unknown)


def _decided(turn: Mapping[str, Any], place: str) -> Message:
    """The turn with `train: False` if it says that it carries no loss, with its `weight` if that is neither 0 nor 1, and with
    neither if not."""
    weight, train = turn.get("weight"), turn.get("train")
    if weight is not None and (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not (weight == 0 or LEAST_WEIGHT <= weight <= MOST_WEIGHT)
    ):
        raise RowError(
            f"'{place}.weight' is {weight!r}, expected a number: 0 (the turn is not trained), or how much each of its tokens "
            f"counts, from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"
        )
    if train is not None and not isinstance(train, bool):
        raise RowError(f"'{place}.train' is {train!r}, expected true or false")
    if weight is not None and train is not None and bool(weight) != train:
        raise RowError(f"'{place}' has weight {weight!r} and train {json.dumps(train)}, which contradict each other")
    others = {key: value for key, value in turn.items() if key not in ("weight", "train")}
    if weight == 0 or train is False:
        return others | {"train": False}
    return others if weight in (None, 1) else others | {"weight": float(weight)}


def _text_of_parts(parts: list[Any], place: str) -> str:
    """The text of OpenAI's list form, `[{"type": "text", "text": ...}]`."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RowError(f"'{place}' has a part that is not text; only text can be trained on")
    return "".join(part["text"] for part in parts)


def _tool_calls(calls: Any, place: str) -> list[Any]:
    """Tool calls with their arguments as objects: OpenAI sends them as JSON in a string, which templates would quote again."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"'{place}' is not a list of objects")
    return [
        call | {"function": _with_arguments(call["function"], f"{place}[{index}].function")}
        if isinstance(call.get("function"), dict)
        else _with_arguments(call, f"{place}[{index}]")
        for index, call in enumerate(calls)
    ]


def _with_arguments(function: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What is called, with its arguments as an object: an empty one where there are none, an empty text or null."""
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise RowError(
            f"'{place}.name' is {'empty' if isinstance(name, str) else kind_of(name)}, expected the name of what is called"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = from_json(arguments, f"{place}.arguments") if arguments.strip() else None
    if not isinstance(arguments, dict | None):
        raise RowError(f"'{place}.arguments' is {kind_of(arguments)}, expected an object or one as JSON")
    return {**function, "arguments": arguments or {}}


def _calls_in(text: str, place: str) -> list[Any]:
    """The calls in a `function_call`: `{"name": ..., "arguments": ...}`, or a list of such."""
    value = from_json(text, place)
    functions = value if isinstance(value, list) else [value]
    if not functions or not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in functions):
        raise RowError(f"'{place}' is not a call with name and arguments, nor a list of such")
    return [{"type": "function", "function": {"name": one["name"], "arguments": one.get("arguments", {})}} for one in functions]


def from_json(text: str, place: str) -> Any:
    """The value of a field that holds JSON as text.

    Raises:
        RowError: if it does not.
    """
    try:
        return strict_json(text)
    except ValueError as error:
        usable = "usable " * (not isinstance(error, json.JSONDecodeError))
        raise RowError(f"'{place}' is text that is not {usable}JSON ({error})") from error
