"""A config of raytune in the making: what another file said, what of it was written, and an account of each of its keys."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

from raytune.config.problems import WRONG_VALUE, Place, Problem, shown
from raytune.config.sections.adapter import LoraAdapter
from raytune.config.sections.run import RunConfig
from raytune.config.words.foreign_names import answer_for_name
from raytune.config.words.near_words import near_words
from raytune.config.yaml_nodes import Node, scalar
from raytune.credentials import find_secret, find_secret_value, is_secret_name
from raytune.importing.facts import Project, counterpart

Fate = Literal["converted", "same", "no_effect", "left"]
"""What became of a key: written here; what raytune does anyway; without effect on what is trained; without counterpart."""
_VARIABLE = re.compile(r"\$\{|\$[A-Z_]{2,}")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


@dataclass(frozen=True, slots=True)
class Account:
    """What became of a key of the file."""

    key: str
    """Dotted, with positions in lists: `datasets.0.path`."""
    place: Place
    value: Any
    fate: Fate
    ours: tuple[tuple[str, Any], ...] = ()
    """Keys of raytune and the values that were written for it."""
    note: str = ""


@dataclass(slots=True)
class Draft:
    """Reads the file key by key (`number`, `text`, ...) and takes down what is made of it (`write`, `same`, `idle`, `leave`)."""

    project: Project
    nodes: dict[str, Node]
    """The keys of the file by their paths; those below a key once that was opened."""
    gpus: int | None = None
    accounts: dict[str, Account] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    """By our dotted keys."""
    origins: dict[str, str] = field(default_factory=dict)
    """Where each of these values comes from, in words."""
    places: dict[str, Place] = field(default_factory=dict)
    open_questions: list[str] = field(default_factory=list)
    """What the file does not say and somebody has to."""
    problems: list[Problem] = field(default_factory=list)
    opened: set[str] = field(default_factory=set)
    assumed: dict[str, Any] = field(default_factory=dict)
    """What holds for keys without a word, where another key of the file says it."""

    # What the file says

    def says(self, key: str) -> bool:
        """Whether the file has something under a key."""
        return key in self.nodes and self.nodes[key].plain not in (None, "", [], {}) and not _unknown(self.nodes[key].plain)

    def asks_for(self, key: str) -> bool:
        """Whether it has something there that is not a way to say no."""
        return self.says(key) and not _is_off(self.nodes[key].plain)

    def raw(self, key: str) -> Any:
        """What holds: what the file says, or what the project does where it says nothing."""
        if not self.says(key):
            return self.assumed.get(key, self.project.defaults.get(key))
        value = self.nodes[key].plain
        is_grouped = isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+(_[0-9]+)+", value)
        return int(value) if is_grouped else value

    def number(self, key: str) -> float | int | None:
        value = self.raw(key)
        if isinstance(value, str):
            value = scalar(value)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        return self.wrong(key, "a number")

    def count(self, key: str) -> int | None:
        value = self.number(key)
        if value is None or value != value // 1:
            return None if value is None else self.wrong(key, "a whole number")
        return int(value)

    def truth(self, key: str) -> bool:
        value = self.raw(key)
        word = str(value).lower()
        if value is None or word in _FALSE or value == 0:
            return False
        if word not in _TRUE and value != 1:
            self.wrong(key, "true or false")
        return True

    def text(self, key: str) -> str:
        value = self.raw(key)
        if value is None or isinstance(value, str):
            return value or ""
        return self.wrong(key, "text") or ""

    def texts(self, key: str) -> list[str]:
        """A list, or words between commas."""
        value = self.raw(key)
        if isinstance(value, str):
            return [word.strip() for word in value.split(",") if word.strip()]
        if value is None or (isinstance(value, list) and all(isinstance(word, str) for word in value)):
            return value or []
        return self.wrong(key, "text or a list of texts") or []

    def open(self, key: str) -> list[str]:
        """The paths of what lies below a key, each of which is accounted for by itself from now on."""
        value = self.nodes[key].value
        children = dict(enumerate(value)) if isinstance(value, list) else value
        if not isinstance(children, dict):
            return []
        self.opened.add(key)
        below = {f"{key}.{name}": node for name, node in children.items()}
        self.nodes |= below
        return list(below)

    def wrong(self, key: str, expected: str) -> None:
        """Take down that a value is not what it has to be there: then nothing is converted."""
        node = self.nodes[key]
        self.problems.append(Problem(WRONG_VALUE, node.place, key, f"expected {expected}, got {shown(node.plain)}"))

    # What is made of it

    def write(self, ours: str, value: Any, *keys: str, note: str = "") -> None:
        """Set a key of raytune for some keys of the file, or for what the project does where it says none of them. A value that
        raytune has anyway is not written."""
        said = [key for key in keys if self.says(key)]
        default = _default(ours)
        is_default = default is not None and default == value and isinstance(value, bool) == isinstance(default, bool)
        for key in said:
            before = self.accounts.get(key)
            written = dict(before.ours if before else ()) | ({} if is_default else {ours: value})
            words = "; ".join(filter(None, (before.note if before else "", note)))
            if is_default and not written and not words:
                words = f"{ours} is {shown(value)} by default"
            self._account(key, "converted" if written else "same", words, tuple(written.items()))
        if not is_default:
            self.values[ours] = value
            title = self.project.title
            self.origins[ours] = ", ".join(said) if said else f"{title}'s default" + (f" of {keys[0]}" if keys else "")
            if said:
                self.places[ours] = self.nodes[said[0]].place

    def take_back(self, ours: str, why: str) -> None:
        """Take out a value of ours, and leave the keys of the file that it was written for and nothing else."""
        section, _, name = ours.rpartition(".")
        if ours in self.values:
            del self.values[ours]
        elif section.rpartition(".")[0] in self.values:  # of a source
            sources, _, position = section.rpartition(".")
            del self.values[sources][int(position)][name]
        self.origins.pop(ours, None)
        for key, account in self.accounts.items():
            written = tuple(pair for pair in account.ours if pair[0] != ours)
            if written != account.ours:
                fate = "converted" if written else "left"
                self.accounts[key] = replace(account, ours=written, fate=fate, note=account.note if written else why)

    def same(self, key: str, why: str) -> None:
        """A key that asks for what raytune does anyway."""
        self._once(key, "same", why)

    def idle(self, key: str, why: str) -> None:
        """A key without effect on what is trained."""
        self._once(key, "no_effect", why)

    def leave(self, key: str, why: str) -> None:
        """A key without counterpart, that may change what is trained."""
        self._once(key, "left", why)

    def add_note(self, key: str, note: str) -> None:
        """More words about a key that has an account."""
        if key in self.accounts and note and note not in self.accounts[key].note:
            self.accounts[key] = replace(self.accounts[key], note="; ".join(filter(None, (self.accounts[key].note, note))))

    def _once(self, key: str, fate: Fate, why: str) -> None:
        if key in self.nodes and key not in self.accounts:
            if unknown := _unknown(self.nodes[key].plain):
                self._account(key, "left", unknown)
            elif self.says(key):
                self._account(key, fate, why)
            else:
                self._account(key, "same", "says nothing")

    def _account(self, key: str, fate: Fate, note: str, ours: tuple[tuple[str, Any], ...] = ()) -> None:
        node = self.nodes[key]
        self.accounts[key] = Account(key, node.key_place, _without_secrets(node.plain, key), fate, ours, note)

    def account_for_the_rest(self) -> None:
        """Say of every key that no rule has looked at why nothing is made of it."""
        for key in self.nodes:
            if key not in self.accounts and key not in self.opened:
                self._account_for(key)

    def _account_for(self, key: str) -> None:
        value = self.nodes[key].plain
        leaf = key.rpartition(".")[2]
        answer = answer_for_name("", leaf)
        if not self.says(key):
            return self.same(key, "says nothing")
        if answer and answer.changes_nothing:
            return self.idle(key, answer.note.partition(": ")[2] or answer.note)
        ours = counterpart(leaf)
        if (answer or ours) and _is_off(value) and leaf not in _NO_MATTERS:
            return self.same(key, "asks for nothing")
        if answer and answer.note.startswith("raytune has no such setting"):
            return self.leave(key, answer.note.partition(": ")[2])
        if ours.startswith(_CHANGE_NOTHING):
            return self.idle(key, f"{ours} is what raytune has for it")
        if ours:
            return self.leave(key, f"convert it by hand: {ours} is what raytune has. {answer.note if answer else ''}".strip())
        known = {*self.project.known_by, *self.project.carried, *self.project.defaults}
        near = near_words(leaf, known, cutoff=0.85)
        hint = f', is "{near[0]}" meant?' if near else ""
        return self.leave(key, f"raytune knows no such key of {self.project.title}{hint}")


_CHANGE_NOTHING = (
    "cluster.",
    "tracking",
    "name",
    "storage",
    "evaluation.",
    "training.zero",
    "training.compile",
    "training.liger",
    "training.loss",
    "training.logging_steps",
    "training.gradient_checkpointing",
    "training.tf32",
    "model.attention",
    "data.store",
)
"""Beginnings of our keys with which, whatever they say, the same is trained."""
_NO_MATTERS = {"ignore_pad_token_for_loss", "train_on_eos", "train_on_eot", "average_tokens_across_devices"}
"""Keys whose `false` or `none` asks for something."""


def _unknown(value: Any) -> str:
    """Why what is written is no value here, or nothing."""
    if isinstance(value, str) and _VARIABLE.search(value):
        return "names a variable, and raytune's files have none: write its value"
    if isinstance(value, str) and find_secret(value):
        return "looks like a secret, which belongs into the node's own login"
    return ""


def _without_secrets(value: Any, key: str) -> Any:
    """A value as it may be shown: of a key whose name says that it is secret, none is. A token by its name may be one of text."""
    if isinstance(value, dict):
        return {name: _without_secrets(child, str(name)) for name, child in value.items()}
    if isinstance(value, list):
        return [_without_secrets(child, key) for child in value]
    name = key.rpartition(".")[2]
    if isinstance(value, str) and (find_secret_value(name, value) or (is_secret_name(name) and not name.endswith("token"))):
        return "..."
    return value


def _is_off(value: Any) -> bool:
    return value in (None, "", [], {}, False, 0) or str(value).lower() in (*_FALSE, "none", "null")


@cache
def _defaults() -> Mapping[str, Any]:
    data = RunConfig().model_dump() | {"adapter": LoraAdapter().model_dump()}
    flat = {f"{section}.{key}": value for section, keys in data.items() if isinstance(keys, dict) for key, value in keys.items()}
    return flat | {key: value for key, value in data.items() if not isinstance(value, dict)}


def _default(ours: str) -> Any:
    """What raytune has where nothing is written; None: it depends."""
    return None if ours in ("model.base", "data.train", "adapter.method") else _defaults().get(ours)
