"""A conversation with a model as a value, the settings of its answers, and what a typed line means. Pure."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from raytune.data.conversations.conversation import Message
from raytune.errors import UserError
from raytune.evaluation.sampling import sampling_plan
from raytune.plan.run_plan import SamplingPlan

BLOCK = '"""'
"""Begins and ends what has several lines."""

COMMANDS: Mapping[str, str] = {
    "/model": "/model NAME        ask another model from now on; the conversation stays",
    "/models": "/models            names of the models that can be asked",
    "/system": "/system TEXT       set the system message; without a text: none",
    "/set": "/set NAME=VALUE    temperature, top_p, top_k, seed, max_new_tokens; without any: show them",
    "/retry": "/retry             ask the last question again",
    "/reset": "/reset             begin another conversation",
    "/save": "/save FILE         append the conversation to FILE, as a row that can be trained on",
    "/help": "/help              this list",
    "/quit": "/quit              end (Ctrl-D)",
}


@dataclass(frozen=True, slots=True)
class Command:
    name: str
    """One of COMMANDS."""
    argument: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Talk:
    """What was said so far, questions and answers in turn."""

    system: str | None = None
    turns: tuple[Message, ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        """As chat templates take them."""
        return (*([{"role": "system", "content": self.system}] if self.system else []), *self.turns)

    def asked(self, question: str) -> "Talk":
        return replace(self, turns=(*self.turns, {"role": "user", "content": question}))

    def answered(self, answer: str) -> "Talk":
        return replace(self, turns=(*self.turns, {"role": "assistant", "content": answer}))

    def without_last_answer(self) -> "Talk":
        """The same, ending with the last question.

        Raises:
            UserError: if there is none.
        """
        if not self.turns:
            raise UserError("Nothing was asked yet.")
        return replace(self, turns=self.turns[:-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How answers are written."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: the likeliest token each time."""
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0

    @property
    def sampling(self) -> SamplingPlan | None:
        """None: nothing is drawn."""
        drawn = {"top_p": self.top_p, "top_k": self.top_k} if self.temperature else {"top_p": None, "top_k": None}
        return sampling_plan(temperature=self.temperature, seed=self.seed, **drawn)

    def changed(self, text: str) -> "Style":
        """With other values: `temperature=0.7 top_k=40`.

        Raises:
            UserError: if there is no such setting, or a value is none for it.
        """
        values: dict[str, Any] = {}
        for part in text.split():
            name, _, value = part.partition("=")
            if name not in _READ:
                raise UserError(f"There is no setting {name!r}: {', '.join(_READ)} are.")
            read, fits, what = _READ[name]
            try:
                values[name] = None if value == "none" and what.endswith("none") else read(value)
            except ValueError:
                raise UserError(f"{name} is {value!r}, expected {what}.") from None
            if values[name] is not None and not fits(values[name]):
                raise UserError(f"{name} is {value}, expected {what}.")
        return replace(self, **values)

    def __str__(self) -> str:
        is_idle = not self.temperature and (self.top_p is not None or self.top_k is not None)
        note = "  (nothing is drawn at temperature 0)" if is_idle else ""
        return "  ".join(f"{one.name}={_shown(getattr(self, one.name))}" for one in fields(self)) + note


_READ: Mapping[str, tuple[Any, Any, str]] = {
    "max_new_tokens": (int, lambda value: value > 0, "a number of tokens"),
    "temperature": (float, lambda value: 0 <= value < float("inf"), "0 or more"),
    "top_p": (float, lambda value: 0 < value <= 1, "a share in 0..1, or none"),
    "top_k": (int, lambda value: value > 0, "a number of tokens, or none"),
    "seed": (int, lambda value: value >= 0, "0 or more"),
}
"""By the name of a setting: how it is read, which values it has, and what that is in words."""


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def meaning(typed: str) -> Command | str:
    """What somebody types asks for: a command, or an answer to the text. Between marks of a block all is text.

    Raises:
        UserError: if it is written as a command and there is no such one.
    """
    text = typed.strip()
    if text.startswith(BLOCK):
        return text.removeprefix(BLOCK).removesuffix(BLOCK).strip("\n")
    if not text.startswith("/"):
        return text
    name, _, argument = text.partition(" ")
    if name not in COMMANDS:
        raise UserError(f"There is no command {name}: {' '.join(COMMANDS)}. To ask what begins with a /, put it between {BLOCK}.")
    return Command(name, argument.strip())


def path_in(argument: str) -> str:
    """A file name as one types it, in quotes or not.

    Raises:
        UserError: if there is none, or more than one.
    """
    try:
        names = shlex.split(argument)
    except ValueError:
        names = []
    if len(names) != 1:
        raise UserError("Name one file, as in /save chat.jsonl; in quotes if it has spaces.")
    return names[0]
