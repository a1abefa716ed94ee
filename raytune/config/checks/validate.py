"""A tree of what was written -> `RunConfig`, or everything that is wrong with it, each with its place."""

import glob
import math
import os

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from raytune.config.checks.asked import forgotten, is_settings_alone
from raytune.config.checks.readers import Unread, unread, without
from raytune.config.checks.space import space_problems
from raytune.config.problems import (
    CONFLICT,
    MISSING_KEY,
    NO_SUCH_FILE,
    NOT_YAML,
    UNKNOWN_KEY,
    UNREADABLE,
    WRONG_VALUE,
    ConfigError,
    Problem,
    dotted,
    shown,
)
from raytune.config.reading.keys import (
    choices,
    example_of,
    in_words,
    is_open,
    keys,
    keys_in,
    schema_path,
    type_at,
    union_above,
    unions,
)
from raytune.config.reading.overlays import KeyPath, child_of, data_of, deepest, method_of
from raytune.config.reading.presets import is_of_preset, preset_keys
from raytune.config.reading.secrets_in import secret_problems
from raytune.config.sections.model import is_written_as_path
from raytune.config.sections.row_sources import named_models, row_sources
from raytune.config.sections.run import RunConfig
from raytune.config.words.hints import hint_for_key, hint_for_value
from raytune.config.yaml_nodes import Node

MAX_PROBLEMS = 200
"""A file with more unknown keys is no config; looking for what each could mean would take minutes."""

_ROW_FILES = (".json", ".jsonl", ".csv", ".parquet", ".txt")


def validated(tree: Node, unreadable: list[Problem], check_files: bool, judged: tuple[str, ...] | None = None) -> RunConfig:
    """The config that a tree describes.

    Args:
        judged: keys that are refused if nothing reads them, with what is below them; None: all.

    Raises:
        ConfigError: with every problem of the tree, and those that were found before.
    """
    refused = [*secret_problems(tree), *_refused_values(tree, ())]
    # Without a file that could not be read, nothing can be said about keys that miss or contradict each other.
    is_partial = any(problem.id in (NOT_YAML, UNREADABLE) or problem.key == "sweep.run" for problem in unreadable)
    unsaid = (CONFLICT, MISSING_KEY) if is_partial else ()
    try:
        config = RunConfig.model_validate(data_of(tree, ()))
    except ValidationError as error:
        known = {problem.key for problem in refused}
        refused += [problem for problem in _schema_problems(tree, error) if problem.key not in known and problem.id not in unsaid]
        refused += _problems_of_rest(tree, {problem.key for problem in refused})
    else:
        refused += _missing_files(config, tree) if check_files else []
        if check_files and not unreadable and not is_settings_alone(config):
            refused += forgotten(config, lambda key: deepest(tree, tuple(key.split("."))).key_place)
        written = space_problems(config, lambda *path: deepest(tree, path))
        refused += [problem for problem in written if problem.id not in unsaid]
        unread_keys = [] if unsaid else _unread_keys(config, judged)
        refused += [_unread_problem(key, tree) for key in unread_keys if not is_of_preset(deepest(tree, key.path))]
        if not unreadable and not refused:
            return _self_contained(_without_unread_of_preset(config, tree))
    raise ConfigError(sorted(dict.fromkeys(unreadable + refused), key=lambda problem: problem.place.order))


def _without_unread_of_preset(config: RunConfig, tree: Node) -> RunConfig:
    """A config whose preset asks only for what the rest reads. What it set counts as not written: it makes way for another one,
    and for what is laid over the config later."""
    config = without(config, [key for key in unread(config, _drawn(config)) if is_of_preset(deepest(tree, key.path))])
    for section, name, _, _ in preset_keys(config):
        if is_of_preset(deepest(tree, (section, name))):
            getattr(config, section).model_fields_set.discard(name)
    return config


def _self_contained(config: RunConfig) -> RunConfig:
    """A config that means the same wherever it is read: the file that `sweep.run` named is in it."""
    if config.sweep is None:
        return config
    return config.model_copy(update={"sweep": config.sweep.model_copy(update={"run": None})})


def _problems_of_rest(tree: Node, refused: set[str]) -> list[Problem]:
    """What is wrong with those dimensions of a sweep that are well-formed, where something else is not."""
    sweep = child_of(tree, "sweep")
    space = child_of(sweep, "space") if sweep else None
    written = space.value if space and isinstance(space.value, dict) else {}
    blamed = {
        max((key for key in written if f"{problem}.".startswith(f"sweep.space.{key}.")), key=len, default="")
        for problem in refused
    }
    rest = {key: data_of(child, ("sweep", "space", key)) for key, child in written.items() if key not in blamed}
    try:
        config = RunConfig.model_validate({"sweep": {"space": rest}})
    except ValidationError:
        return []
    found = space_problems(config, lambda *path: deepest(tree, path))
    return [problem for problem in found if problem.key.startswith("sweep.space.")]


def _refused_values(node: Node, path: KeyPath) -> list[Problem]:
    """What pydantic lets pass: numbers that are not finite or do not fit 64 bits, and `true` where 1 is a choice."""
    if isinstance(node.value, dict | list):
        children = node.value.items() if isinstance(node.value, dict) else enumerate(node.value)
        return [problem for part, child in children for problem in _refused_values(child, (*path, part))]
    if isinstance(node.value, float) and not math.isfinite(node.value):
        return [Problem(WRONG_VALUE, node.place, dotted(path), f"must be a finite number, got {shown(node.value)}")]
    if isinstance(node.value, int) and abs(node.value) >= 2**63:
        return [Problem(WRONG_VALUE, node.place, dotted(path), "must be a number that fits 64 bits")]
    if any(choice == node.value and type(choice) is not type(node.value) for choice in choices(type_at(path))):
        return [Problem(WRONG_VALUE, node.place, dotted(path), f"must be {in_words(type_at(path))}, got {shown(node.value)}")]
    return []


def _schema_problems(tree: Node, error: ValidationError) -> list[Problem]:
    """One problem per key, up to `MAX_PROBLEMS`; a union reports once per alternative, of which the deepest place says most."""
    by_path: dict[KeyPath, ErrorDetails] = {}
    for details in error.errors(include_url=False):
        by_path.setdefault(_written_path(tree, details), details)
    above = {path[:i] for path in by_path for i in range(len(path))}
    deepest = [path for path in by_path if path not in above]
    return [_schema_problem(tree, path, by_path[path]) for path in deepest[:MAX_PROBLEMS]]


def _schema_problem(tree: Node, path: KeyPath, details: ErrorDetails) -> Problem:
    node, key = deepest(tree, path), keys().get(schema_path(path))
    if details["type"] == "extra_forbidden":
        union = union_above(path[:-1])
        method = method_of(deepest(tree, tuple(union.split("."))).value, unions()[union]) if union else ""
        message = f"unknown key{hint_for_key(schema_path(path[:-1]), str(path[-1]), method, node.plain)}"
        return Problem(UNKNOWN_KEY, node.key_place, dotted(path), message)
    said = str(details.get("ctx", {}).get("error", "")) if details["type"] == "value_error" else ""
    if said and isinstance(node.value, dict | list):
        return Problem(CONFLICT, node.key_place, dotted(path), said)
    if said.startswith("must "):
        return Problem(WRONG_VALUE, node.place, dotted(path), f"{said}, got {shown(node.plain)}")
    expected = in_words(type_at(path))
    if details["type"] == "missing":
        return Problem(MISSING_KEY, node.key_place, dotted(path), f"is missing; it must be {expected}")
    hint = hint_for_value(schema_path(path), type_at(path), node.plain)
    if not hint and key and key.is_section:
        below = [inner.path for inner in keys_in(key.path)]
        hint = f". Name one of its keys: {', '.join(below[:3])}{', ...' * (len(below) > 3)}"
    elif not hint and key and key.annotation == type_at(path) and is_open(key.annotation):
        hint = f" (for example {shown(example_of(key))})"
    return Problem(WRONG_VALUE, node.place, dotted(path), f"must be {expected}, got {shown(node.plain)}{hint}")


def _written_path(tree: Node, details: ErrorDetails) -> KeyPath:
    """pydantic's location as the user wrote it: without the names of union members and positions in lists nobody wrote."""
    location = details["loc"]
    tag = next((i for i in range(1, len(location)) if schema_path(location[:i]) in unions()), len(location))
    location = location[:tag] + location[tag + 1 :]
    if details["type"].startswith("union_tag"):
        location = (*location, "method")
    path: KeyPath = ()
    node: Node | None = tree
    for i, part in enumerate(location):
        child = child_of(node, part) if node else None
        if child or (details["type"] == "missing" and i == len(location) - 1):
            path, node = (*path, part), child
    return path


def _missing_files(config: RunConfig, tree: Node) -> list[Problem]:
    """Local files that the config names and this machine lacks. Not checked where the files lie elsewhere, with the cluster."""
    if config.cluster.address:
        return []
    named: list[tuple[KeyPath, str]] = [
        ((*_parts(key), i, "path"), source.path) for key, rows in row_sources(config).items() for i, source in enumerate(rows)
    ]
    local = [(path, name) for path, name in named if name.endswith(_ROW_FILES)]
    local += [(_parts(key), name) for key, name in named_models(config).items() if is_written_as_path(name)]
    local += [(("data", "template"), config.data.template)] if config.data.template.endswith((".jinja", ".j2")) else []
    return [
        Problem(NO_SUCH_FILE, deepest(tree, path).place, dotted(path), f"{shown(name)} is not on this machine")
        for path, name in local
        if "://" not in name and not _exists(name)
    ]


def _parts(key: str) -> KeyPath:
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def _unread_keys(config: RunConfig, judged: tuple[str, ...] | None) -> list[Unread]:
    """Keys that nothing reads, whatever a sweep draws, though something is asked for by them."""
    return [
        key
        for key in unread(config, _drawn(config))
        if key.is_refused and (judged is None or any(f"{key.key}.".startswith(f"{name}.") for name in judged))
    ]


def _drawn(config: RunConfig) -> tuple[str, ...]:
    return tuple(config.sweep.space) if config.sweep else ()


def _unread_problem(key: Unread, tree: Node) -> Problem:
    return Problem(CONFLICT, deepest(tree, key.path).key_place, key.key, key.message)


def _exists(name: str) -> bool:
    path = os.path.expanduser(name)
    return os.path.exists(path) or bool(glob.glob(path, recursive=True))
