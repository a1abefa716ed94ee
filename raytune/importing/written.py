"""An imported config in words: YAML with where each value comes from, and a summary."""

from collections import Counter
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

from raytune.config.problems import shortened, shown
from raytune.config.reading.keys import keys
from raytune.config.yaml_nodes import write_yaml
from raytune.importing.draft import Account, Draft

FATES = {
    "converted": "converted",
    "same": "what raytune does anyway",
    "no_effect": "without effect on what is trained",
    "left": "without counterpart",
}
_WIDTH = 110


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted keys as sections."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, leaf = key.split(".")
        below = tree
        for section in sections:
            below = below.setdefault(section, {})
        if not (isinstance(below.get(leaf), dict) and value == {}):
            below[leaf] = value
    return tree


def as_yaml(draft: Draft, file: str) -> str:
    """The config, each value with where it comes from, and at the end what was left and is to be decided."""
    order = list(keys())
    tree = nested(dict(sorted(draft.values.items(), key=lambda item: order.index(item[0]))))
    lines = [f"# Imported from {file} of {draft.project.title} by `raytune import`."]
    for section in tree:
        lines += _lines(tree[section], section, 0, draft.origins)
    left = [account for account in accounts_of(draft) if account.fate == "left"]
    for title, sentences in (("Without counterpart:", [_sentence(account) for account in left]),
                             ("To be decided:", draft.open_questions)):  # fmt: skip
        if sentences:
            lines += ["", f"# {title}"]
            for sentence in sentences:
                lines += [f"# {line}" for line in wrap(sentence, _WIDTH, initial_indent="- ", subsequent_indent="  ")]
    return "\n".join(lines) + "\n"


def _lines(value: Any, path: str, depth: int, origins: Mapping[str, str], lead: str = "") -> list[str]:
    margin, key = "  " * depth, path.rpartition(".")[2]
    start = f"{margin}{lead}{_key(key)}:"
    if isinstance(value, dict) and value and (depth == 0 or f"{path}" not in origins):
        return [start, *(line for name, child in value.items() for line in _lines(child, f"{path}.{name}", depth + 1, origins))]
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        lines = [start]
        for position, item in enumerate(value):
            for number, (name, child) in enumerate(item.items()):
                comment = _comment(origins.get(f"{path}.{position}.{name}", ""))
                lead = "- " if number == 0 else "  "
                lines.append(f"{margin}  {lead}{name}: {_flow(child)}{comment}")
        return lines
    return [f"{start} {_flow(value)}{_comment(origins.get(path, ''))}"]


def _key(name: str) -> str:
    return _flow(name)


def _flow(value: Any) -> str:
    """A value on one line."""
    return write_yaml([value], flow=True).strip()[1:-1]


def _comment(words: str) -> str:
    return f"  # {shortened(words, 140)}" if words else ""


def accounts_of(draft: Draft) -> list[Account]:
    """In the order of the file."""
    return sorted(draft.accounts.values(), key=lambda account: account.place.order)


def _sentence(account: Account) -> str:
    end = "" if account.note.endswith(".") else "."
    return f"{account.key}: {shown(account.value)} (line {account.place.line}): {account.note}{end}"


def summary(title: str, file: str, accounts: Sequence[Account], open_questions: Sequence[str]) -> list[str]:
    """What became of the keys, for people."""
    counts = Counter(account.fate for account in accounts)
    said = ", ".join(f"{counts[fate]} {words}" for fate, words in FATES.items() if counts[fate])
    lines = [f"{file} is of {title}: {len(accounts)} keys, {said}."]
    noted = [account for account in accounts if account.fate == "converted" and account.note]
    idle = [account for account in accounts if account.fate == "no_effect"]
    left = [account for account in accounts if account.fate == "left"]
    parts = {"Without counterpart:": left, "Converted, but:": noted, "Without effect on what is trained:": idle}
    for heading, chosen in parts.items():
        if chosen:
            lines += [heading, *(f"  {_sentence(account)}" for account in chosen)]
    if open_questions:
        lines += ["To be decided:", *(f"  {question}" for question in open_questions)]
    return lines
