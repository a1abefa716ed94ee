"""What an unknown key or value was probably meant to be: the spelling of another trainer, or a word that is near."""

from typing import Any

from raytune.config.reading.keys import choices, is_in_list, keys, keys_in, unions
from raytune.config.words.foreign_names import Answer, answer_for_name, answer_for_value
from raytune.config.words.near_words import are_opposite, near_words


def hint_for_key(section: str, name: str, method: str, value: object = None) -> str:
    """A sentence that follows "unknown key", or nothing if no key is near.

    Args:
        section: dotted path of the section that holds the key, `""` for the top level.
        name: the key as written.
        method: the method of the union, such as `adapter`, that the section is or lies in.
        value: what was written under the key.
    """
    path = f"{section}.{name}".lstrip(".")
    if path in keys():
        return f" for method {method}; it belongs to method {' or '.join(keys()[path].methods)}"
    plain = name.lower().replace("-", "_")
    here = [key.path.rpartition(".")[2] for key in keys_in(section) if not key.methods or method in key.methods]
    elsewhere = [known for known in keys() if known.rpartition(".")[2] == plain and not known.startswith(f"{path}.")]
    # A key of a list's sections is meant where the list is written, and no other key has its name.
    elsewhere = [known for known in elsewhere if not is_in_list(keys()[known])] or elsewhere
    below = [known for known in elsewhere if section and known.startswith(f"{section}.")]
    answer = answer_for_name(section, name, value)
    near = [plain] if plain in here else near_words(plain, here, cutoff=0.75)
    if near and (plain in here or answer is None or answer == Answer(f"{section}.{near[0]}")):
        return f'. Did you mean "{near[0]}"?'
    if answer and not below:
        return _sentence(answer)
    if elsewhere:
        return f" here; it belongs to {' or '.join((below or elsewhere)[:3])}"
    near = near_words(plain, here) or _near_paths(path.lower(), plain) or _near_leaves(plain)
    if near:
        return f'. Did you mean "{near[0]}"?'
    return f". Known here: {', '.join(here)}" if here and len(here) <= 12 else f". `raytune explain {section}` lists the keys"


def hint_for_value(path: str, annotation: Any, value: object) -> str:
    """A sentence that names the allowed value next to the one that was written, or nothing."""
    if not isinstance(value, str | bool | int):
        return ""
    if path in unions():
        known = [method for method in choices(keys()[f"{path}.method"].annotation) if method == value]
        answer = Answer(known[0]) if known else answer_for_value(f"{path}.method", value)
        return _sentence_of_value(Answer(f"method: {answer.ours}", answer.note) if answer and answer.ours else answer)
    if answer := answer_for_value(path, value):
        return _sentence_of_value(answer)
    near = near_words(value.lower(), [str(choice) for choice in choices(annotation)]) if isinstance(value, str) else []
    return f'. Did you mean "{near[0]}"?' if near else ""


def why_there_is_none(path: str) -> str:
    """A sentence about a name of another trainer that nothing here stands for, or nothing."""
    section, _, leaf = path.rpartition(".")
    answer = answer_for_name(section, leaf)
    return f"{answer.note}." if answer and not answer.ours else ""


def nearest_keys(path: str) -> list[str]:
    """Paths of keys that a mistyped path could mean: the spelling of another tool, the same leaf elsewhere, or near letters."""
    plain = path.lower().replace("-", "_")
    leaf = plain.rpartition(".")[2]
    answer = answer_for_name(plain.rpartition(".")[0], leaf)
    known = [answer.ours.partition(":")[0]] if answer and answer.ours else []
    same = [key for key in keys() if key.rpartition(".")[2] == leaf]
    return list(dict.fromkeys([*known, *same, *near_words(plain, keys(), 3), *_near_leaves(leaf)]))[:5]


def _sentence(answer: Answer) -> str:
    meant = f'. Did you mean "{answer.ours}"?' if answer.ours else "."
    return f"{meant} {answer.note}" if answer.note else meant


def _sentence_of_value(answer: Answer | None) -> str:
    if answer is None:
        return ""
    return _sentence(answer) if answer.ours else f"; {answer.note}"


def _near_paths(path: str, name: str) -> list[str]:
    """Keys whose whole path is near one, of which a section may have the word that its key negates."""
    near = near_words(path, keys(), cutoff=0.75)
    return [known for known in near if not are_opposite(name, known.rpartition(".")[2])]


def _near_leaves(name: str) -> list[str]:
    """Keys anywhere whose last part is near a name."""
    by_leaf: dict[str, str] = {}
    for path in keys():
        by_leaf.setdefault(path.rpartition(".")[2], path)
    return [by_leaf[leaf] for leaf in near_words(name, by_leaf, 2, cutoff=0.75)]
