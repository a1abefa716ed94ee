"""Conversation shapes whose every piece of text is a marker of its own, to see where a template puts it.

Markers: `S1x` system, `U1x` user, `A1x` assistant, `T1x` a thought, `G1x` an argument of a call, `R1x` a tool's result,
`D1x` a tool's description.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from raytune.data.conversations.conversation import Conversation, Message, Origin
from tests.tiny import tiny_tokenizer

BOS, EOS = "<s>", "</s>"
# What chat templates write as one token: <|x|> (with either kind of bar), <|x>, <x|>, <x_y>, [INST], [|x|] and the like.
SPECIAL = re.compile(
    r"<[|｜][^<>{}\n'\"+ ]*?[|｜]>|<\|\w+>|<\w+\|>|</?\w+_\w+>|\[/?[A-Z_]{3,}\]|\[\|\w+\|\]|\[gMASK\]|<sop>|<turn_end>"
)


def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """Bytes, and a token for each text in the template that looks like a special one."""
    tokenizer = tiny_tokenizer()
    special = sorted(set(SPECIAL.findall(template)))
    tokenizer.add_special_tokens({"additional_special_tokens": special, "bos_token": BOS, "eos_token": EOS})
    tokenizer.chat_template = template
    return tokenizer


def _call(city: str, number: int = 1) -> dict[str, Any]:
    return {"type": "function", "id": f"call0000{number}", "function": {"name": "forecast", "arguments": {"city": city}}}


def _said(content: str | None, *cities: str, **more: Any) -> Message:
    calls = {"tool_calls": [_call(city, number) for number, city in enumerate(cities, 1)]} if cities else {}
    return {"role": "assistant", "content": content} | calls | more


def _result(content: str, number: int = 1) -> Message:
    return {"role": "tool", "tool_call_id": f"call0000{number}", "name": "forecast", "content": content}


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


_CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "a city"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "forecast", "description": "D1x", "parameters": _CITY}}]
_SYSTEM = {"role": "system", "content": "S1x"}


def _row(*messages: Message, tools: list[Any] | None = None) -> Conversation:
    return Conversation(messages=messages, tools=tools, origin=Origin("shapes.jsonl", 1))


_THOUGHTS = ("<think>\nT1x\n</think>\n\nA1x", "<think>\nT2x\n</think>\n\nA2x")

SHAPES = {
    "single": _row(_user("U1x"), _said("A1x")),
    "turns": _row(_user("U1x"), _said("A1x"), _user("U2x"), _said("A2x"), _user("U3x"), _said("A3x")),
    "system": _row(_SYSTEM, _user("U1x"), _said("A1x"), _user("U2x"), _said("A2x")),
    "empty": _row(_user("U1x"), _said(""), _user("U2x"), _said("A2x")),
    "empty last": _row(_user("U1x"), _said("A1x"), _user("U2x"), _said("")),
    "repeated": _row(_user("say A1x"), _said("A1x"), _user("say A1x"), _said("A1x")),
    "white space": _row(_user("U1x"), _said("\n A1x\n "), _user("U2x"), _said(" A2x \n")),
    "user last": _row(_user("U1x"), _said("A1x"), _user("U2x")),
    "thought": _row(_user("U1x"), _said(_THOUGHTS[0])),
    "thoughts": _row(_user("U1x"), _said(_THOUGHTS[0]), _user("U2x"), _said(_THOUGHTS[1])),
    "answer in thought": _row(_user("U1x"), _said("<think>\nT1x, so A1x.\n</think>\n\nA1x")),
    "reasoning": _row(_user("U1x"), _said("A1x", reasoning_content="T1x")),
    "reasonings": _row(_user("U1x"), _said("A1x", reasoning_content="T1x"), _user("U2x"), _said("A2x", reasoning_content="T2x")),
    "call": _row(_user("U1x"), _said(None, "G1x"), _result("R1x"), _said("A1x"), tools=TOOLS),
    "call, system": _row(_SYSTEM, _user("U1x"), _said(None, "G1x"), _result("R1x"), _said("A1x"), tools=TOOLS),
    "call, text": _row(_user("U1x"), _said("A1x", "G1x"), _result("R1x"), _said("A2x"), tools=TOOLS),
    "call, reasoning": _row(_user("U1x"), _said("", "G1x", reasoning_content="T1x"), _result("R1x"), _said("A1x"), tools=TOOLS),
    "two calls": _row(_user("U1x"), _said(None, "G1x", "G2x"), _result("R1x"), _result("R2x", 2), _said("A1x"), tools=TOOLS),
    "call, turn": _row(_user("U1x"), _said(None, "G1x"), _result("R1x"), _said("A1x"), _user("U2x"), _said("A2x"), tools=TOOLS),
    "call, call": _row(
        _user("U1x"), _said(None, "G1x"), _result("R1x"), _said(None, "G2x"), _result("R2x"), _said("A1x"), tools=TOOLS
    ),
    "call last": _row(_user("U1x"), _said(None, "G1x"), tools=TOOLS),
    "text, call last": _row(_user("U1x"), _said("A1x", "G1x"), tools=TOOLS),
    "call, no tools": _row(_user("U1x"), _said(None, "G1x"), _result("R1x"), _said("A1x")),
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A marker of a conversation, and whose it is."""

    marker: str
    field: str
    """"content", "thought" (in content), "reasoning_content", "tool_calls", "tools", or the role of another's turn."""
    is_own: bool
    """The assistant writes it."""
    turn: int


def pieces_of(row: Conversation) -> list[Piece]:
    """All markers of a conversation, turn by turn."""
    pieces = [Piece("D1x", "tools", False, -1)] if row.tools else []
    for turn, message in enumerate(row.messages):
        own = message["role"] == "assistant"
        if thought := message.get("reasoning_content"):
            pieces.append(Piece(thought, "reasoning_content", own, turn))
        for marker in re.findall(r"[A-Z]\dx", message.get("content") or ""):
            field = "thought" if marker[0] == "T" else "content" if own else message["role"]
            pieces.append(Piece(marker, field, own, turn))
        calls = message.get("tool_calls") or ()
        pieces += [Piece(call["function"]["arguments"]["city"], "tool_calls", own, turn) for call in calls]
    return pieces


def placed(text: str, pieces: list[Piece]) -> list[int]:
    """Where each piece stands in a text; -1 if nowhere. A marker that comes twice stands at its first and second place."""
    seen: dict[str, int] = {}
    places = []
    for piece in pieces:
        place = text.find(piece.marker, seen.get(piece.marker, 0))
        seen[piece.marker] = place + 1 if place >= 0 else len(text)
        places.append(place)
    return places


def lost_fields(text: str, row: Conversation, *, earlier_thoughts: bool = False) -> list[str]:
    """Fields of the conversation that a text does not show.

    Args:
        earlier_thoughts: count those of turns before the last question too, which many templates drop from the history.
    """
    pieces = pieces_of(row)
    last_question = max(turn for turn, message in enumerate(row.messages) if message["role"] == "user")
    thoughts = ("thought", "reasoning_content")
    return sorted(
        {
            piece.field
            for piece, place in zip(pieces, placed(text, pieces))
            if place < 0 and (earlier_thoughts or piece.field not in thoughts or piece.turn > last_question)
        }
    )


class Unrendered(Exception):
    """A template takes a conversation in none of the forms that were tried."""

    def __init__(self, failures: list[str]) -> None:
        super().__init__(" / ".join(dict.fromkeys(failures)))
        self.failures = failures


def plainly_rendered(template: str, row: Conversation, *, num_turns: int | None = None) -> tuple[str, list[tuple[int, int]]]:
    """transformers' own rendering: text and what it marks as the assistant's.

    Null content is "". Arguments are text only where the template takes no objects, and contents are lists of parts only where
    it does not show them otherwise.

    Args:
        num_turns: only so many turns, and the generation prompt behind them.

    Raises:
        Unrendered: with what the template raises, one for each form that was tried.
    """
    failures = []
    found: tuple[str, list[tuple[int, int]]] | None = None
    for changed in (_with_text_for_null, _with_arguments_as_text, _with_parts):
        messages = [changed(message) for message in row.messages[:num_turns]]
        try:
            rendered: Any = render_jinja_template(
                conversations=[messages],
                tools=row.tools,
                chat_template=template,
                add_generation_prompt=num_turns is not None,
                return_assistant_tokens_mask=num_turns is None,
                bos_token=BOS,
                eos_token=EOS,
                pad_token=EOS,
            )
        except Exception as error:  # whatever a template raises
            failures.append(str(error))
            continue
        texts, spans = rendered
        text = texts[0], spans[0] if spans else []
        if any(question in text[0] for question in _questions(row)):
            return text
        found = found or text
    if found is None:
        raise Unrendered(failures)
    return found


def _questions(row: Conversation) -> list[str]:
    return [message["content"] for message in row.messages if message["role"] == "user"]


def _with_parts(message: Message) -> Message:
    return message | {"content": [{"type": "text", "text": message.get("content") or ""}]}


def _with_text_for_null(message: Message) -> Message:
    return message | {"content": message.get("content") or ""}


def _with_arguments_as_text(message: Message) -> Message:
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls") or ()
    ]
    return _with_text_for_null(message) | ({"tool_calls": calls} if calls else {})
