"""Files and overrides -> `RunConfig`. All that is wrong is reported at once, with its place.

Files are laid over each other from left to right: mappings merge, lists and scalars replace. An override `key.sub=value` is an
overlay of one key, so it follows the same rules; its value is YAML, and a number in its key is a position in a list
(`data.train.0.path=rows.jsonl`). An empty section changes nothing. Where an overlay changes the `method` of a section such as
`adapter`, the keys that the new method does not have are dropped: they were written for another method. Keys that the overlay
itself brings are not. The file that `sweep.run` names lies below everything else.
"""

import glob
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from raytune.config.hints import hint_for_key, hint_for_value
from raytune.config.keys import (
    choices,
    example_of,
    in_words,
    is_open,
    keys,
    names_keys,
    schema_path,
    type_at,
    union_above,
    unions,
)
from raytune.config.problems import (
    BAD_OVERRIDE,
    CONFLICT,
    MISSING_KEY,
    NO_SUCH_FILE,
    NOT_YAML,
    SECRET_VALUE,
    UNKNOWN_KEY,
    UNREADABLE,
    WRONG_VALUE,
    ConfigError,
    Place,
    Problem,
    dotted,
    shortened,
    shown,
)
from raytune.config.readers import unread
from raytune.config.run import RunConfig
from raytune.config.section import SECRET, Section
from raytune.config.space import space_problems
from raytune.config.sweep import KINDS
from raytune.config.yaml_nodes import MAX_DEPTH, Node, read_nodes, write_yaml
from raytune.errors import UserError

MAX_BYTES = 2**20
MAX_PROBLEMS = 200
"""A file with more unknown keys is no config; looking for what each could mean would take minutes."""

_ROW_FILES = (".json", ".jsonl", ".csv", ".parquet", ".txt")

KeyPath = tuple[str | int, ...]
Reading = tuple[Node | None, list[Problem]]
"""What a file or an override says, and what is wrong with how it is written."""
Places = Mapping[str, Place]
"""Where each key was written, by its dotted path."""


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = (), *, check_files: bool = False) -> RunConfig:
    """The run that some files and overrides describe; without any, the defaults.

    Args:
        paths: YAML files; later ones are laid over earlier ones.
        overrides: `key.sub=value`, laid over the files in this order.
        check_files: also look whether local files that the config names exist on this machine.

    Raises:
        ConfigError: with every problem of all files and overrides.
    """
    return load_with_places(paths, overrides, check_files=check_files)[0]


def load_with_places(
    paths: Sequence[str | Path], overrides: Sequence[str] = (), *, check_files: bool = False
) -> tuple[RunConfig, Places]:
    """Like `load_config`; also says where each key was written, for what is found to be wrong later."""
    tree, config = _resolve([_read_file(os.fspath(path), rank) for rank, path in enumerate(paths)], overrides, check_files)
    return config, {dotted(path): place for path, place in _places_in(tree, ())}


def config_from(source: Mapping[str, Any] | RunConfig, overrides: Sequence[str] = ()) -> RunConfig:
    """Like `load_config`, for what Python code already holds.

    Raises:
        ConfigError: with every problem.
    """
    return _resolve([(_node_of(source, Place("config")), [])], overrides, check_files=False)[1]


def config_with(config: RunConfig, values: Mapping[str, Any], places: Places | None = None) -> RunConfig:
    """A config with the values of some dotted keys laid over it, as an overlay file with these keys would be.

    Args:
        places: where to say that the value of a key was written.

    Raises:
        ConfigError: with every problem.
    """
    tree = _node_of(config, Place("config"))
    misplaced: list[Problem] = []
    for key in sorted(values, key=_is_no_method):
        place = (places or {}).get(key, Place(key))
        try:
            tree = _laid_over(tree, _overlay(tree, key.split("."), _node_of(values[key], place)), ())
        except IndexError as error:
            misplaced.append(Problem(BAD_OVERRIDE, place, key, str(error)))
    # What the config held before was written for other values too; see `raytune.sweeps.space`.
    return _validated(tree, misplaced, check_files=False, judged=tuple(values))


def as_one_run(config: RunConfig) -> RunConfig:
    """The same config, if it describes one run.

    Raises:
        UserError: if it describes a sweep.
    """
    if config.sweep is not None:
        raise UserError(
            "This is a sweep (the config has a `sweep` section): run it with `raytune sweep`, and look at it with "
            "`raytune sweep --dry-run`. With sweep=null it is one run."
        )
    return config


def config_diff(before: RunConfig, after: RunConfig) -> list[tuple[str, Any, Any]]:
    """Keys that differ, as (dotted key, value before, value after); None for a key that one side does not have."""
    old, new = _leaves(before.model_dump(mode="json"), ()), _leaves(after.model_dump(mode="json"), ())
    return [(dotted(path), old.get(path), new.get(path)) for path in {**old, **new} if old.get(path) != new.get(path)]


def overridden(paths: Sequence[str | Path], config: RunConfig) -> list[tuple[str, Any, Any]]:
    """What overrides changed in files that became `config` with them, as `config_diff` says it.

    Nothing if the files are only valid with the overrides: then there was no run before that could have changed.
    """
    try:
        return config_diff(load_config(paths), config)
    except ConfigError:
        return []


def dump_yaml(config: RunConfig, *, full: bool = False) -> str:
    """YAML that loads to an equal config: the keys that differ from their defaults, or all of them."""
    data = config.model_dump(exclude_defaults=not full)
    return write_yaml(data) if data else ""


def dump_written(config: RunConfig) -> str:
    """YAML that loads to an equal config: every key that somebody has set, to its default or not."""
    return write_yaml({key: value for key, value in config.model_dump(exclude_unset=True).items() if key != "sweep"})


def _resolve(readings: list[Reading], overrides: Sequence[str], check_files: bool) -> tuple[Node, RunConfig]:
    """Lay files and overrides over each other and validate the result."""
    # A new method drops keys of the old one, so it goes first: `adapter.rank=8 adapter.method=full` must be refused.
    overrides = sorted(overrides, key=lambda text: _is_no_method(text.partition("=")[0]))
    above = readings + [_read_override(text, _stacked([]), rank=len(readings)) for text in overrides]
    below = _files_below(above)
    tree = _stacked(overlay for overlay, _ in below + readings if overlay)
    readings = below + readings
    for text in overrides:
        overlay, problems = _read_override(text, tree, rank=len(readings))
        tree = _laid_over(tree, overlay, ()) if overlay else tree
        readings = [*readings, (overlay, problems)]
    unreadable = [problem for _, problems in readings for problem in problems]
    unreadable += _same_name(below, tree)
    return tree, _validated(tree, unreadable, check_files)


def _validated(tree: Node, unreadable: list[Problem], check_files: bool, judged: tuple[str, ...] | None = None) -> RunConfig:
    """The config that a tree describes.

    Args:
        judged: keys that are refused if nothing reads them, with what is below them; None: all.

    Raises:
        ConfigError: with every problem of the tree, and those that were found before.
    """
    refused = _refused_values(tree, ())
    # Without a file that could not be read, nothing can be said about keys that miss or contradict each other.
    is_partial = any(problem.id in (NOT_YAML, UNREADABLE) or problem.key == "sweep.run" for problem in unreadable)
    unsaid = (CONFLICT, MISSING_KEY) if is_partial else ()
    try:
        config = RunConfig.model_validate(_data_of(tree, ()))
    except ValidationError as error:
        known = {problem.key for problem in refused}
        refused += [problem for problem in _schema_problems(tree, error) if problem.key not in known and problem.id not in unsaid]
        refused += _problems_of_rest(tree, {problem.key for problem in refused})
    else:
        refused += _missing_files(config, tree) if check_files else []
        written = space_problems(config, lambda *path: _deepest(tree, path))
        refused += [problem for problem in written if problem.id not in unsaid]
        refused += [] if unsaid else _unread_keys(config, tree, judged)
        if not unreadable and not refused:
            return _self_contained(config)
    raise ConfigError(sorted(unreadable + refused, key=lambda problem: problem.place.order))


def _problems_of_rest(tree: Node, refused: set[str]) -> list[Problem]:
    """What is wrong with those dimensions of a sweep that are well-formed, where something else is not."""
    sweep = _child(tree, "sweep")
    space = _child(sweep, "space") if sweep else None
    written = space.value if space and isinstance(space.value, dict) else {}
    blamed = {
        max((key for key in written if f"{problem}.".startswith(f"sweep.space.{key}.")), key=len, default="")
        for problem in refused
    }
    rest = {key: _data_of(child, ("sweep", "space", key)) for key, child in written.items() if key not in blamed}
    try:
        config = RunConfig.model_validate({"sweep": {"space": rest}})
    except ValidationError:
        return []
    found = space_problems(config, lambda *path: _deepest(tree, path))
    return [problem for problem in found if problem.key.startswith("sweep.space.")]


def _stacked(overlays: Iterable[Node | None]) -> Node:
    tree = Node({}, Place("config"), Place("config"))
    for overlay in overlays:
        tree = _laid_over(tree, overlay, ()) if overlay else tree
    return tree


def _is_no_method(key: str) -> bool:
    return key.strip() not in {f"{union}.method" for union in unions()}


def _self_contained(config: RunConfig) -> RunConfig:
    """A config that means the same wherever it is read: the file that `sweep.run` named is in it."""
    if config.sweep is None:
        return config
    return config.model_copy(update={"sweep": config.sweep.model_copy(update={"run": None})})


# --- the run of a sweep


def _files_below(above: list[Reading]) -> list[Reading]:
    """The file that `sweep.run` names, the file that this one names, and so on; the lowest first."""
    below: list[Reading] = []
    seen = {_real_path(overlay.place.file) for overlay, _ in above if overlay and overlay.place.line}
    named = _named_run(above)
    while named is not None:
        folder = os.path.dirname(named.place.file) if named.place.line else ""
        path = os.path.join(folder, named.value)
        if _real_path(path) in seen:
            return [(None, [Problem(CONFLICT, named.place, "sweep.run", f"{shown(path)} would be laid over itself")]), *below]
        seen.add(_real_path(path))
        overlay, problems = _read_file(path, rank=len(above) + len(below))
        # A file that cannot be opened is named where somebody asked for it.
        problems = [
            problem if problem.place.line else Problem(problem.id, named.place, "sweep.run", f"{shown(path)}: {problem.message}")
            for problem in problems
        ]
        below = [(overlay, problems), *below]
        named = _named_run([(overlay, problems)])
    return below


def _named_run(readings: list[Reading]) -> Node | None:
    """What the topmost `sweep.run` says, if it can be the name of a file."""
    for overlay, _ in reversed(readings):
        sweep = _child(overlay, "sweep") if overlay else None
        run = _child(sweep, "run") if sweep else None
        if run and isinstance(run.value, str) and run.value:
            return run
    return None


def _same_name(below: list[Reading], tree: Node) -> list[Problem]:
    """A sweep that shares its name, and so its folder, with the run that it is laid over."""
    run = _named_run([(tree, [])])
    names = [_child(each, "name") for each in (_stacked(overlay for overlay, _ in below), tree)]
    theirs, mine = (name.value if name else RunConfig().name for name in names)
    if run is None or mine != theirs or not isinstance(mine, str) or not any(overlay for overlay, _ in below):
        return []
    message = f"the sweep has the name of its run, {shown(mine)}, and so its folder; give it another, such as name: {mine}-sweep"
    return [Problem(CONFLICT, run.place, "sweep.run", message)]


def _real_path(path: str) -> str:
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):
        return path


def _places_in(node: Node, path: KeyPath) -> Iterator[tuple[KeyPath, Place]]:
    children = node.value.items() if isinstance(node.value, dict) else ()
    for key, child in children:
        yield (*path, key), child.key_place
        yield from _places_in(child, (*path, key))


# --- reading


def _read_file(path: str, rank: int) -> Reading:
    place = Place(path if path.isprintable() else shown(path), rank=rank)
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        folder, name = os.path.split(path)
        near = get_close_matches(name, os.listdir(folder or "."), 1) if os.path.isdir(folder or ".") else []
        hint = f'. Did you mean "{os.path.join(folder, near[0])}"?' if near else ""
        return None, [Problem(UNREADABLE, place, "", f"no such file{hint}")]
    except IsADirectoryError:
        return None, [Problem(UNREADABLE, place, "", "a folder, not a file")]
    except (OSError, ValueError) as error:
        return None, [Problem(UNREADABLE, place, "", f"cannot be read: {getattr(error, 'strerror', None) or error}")]
    if len(content) > MAX_BYTES:
        return None, [Problem(UNREADABLE, place, "", f"larger than {MAX_BYTES // 2**20} MiB, which no config is")]
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode("utf-8", "replace")
        place = replace(place, line=before.count("\n") + 1, column=len(before) - before.rfind("\n"))
        return None, [Problem(UNREADABLE, place, "", f"not UTF-8 text: byte 0x{error.object[error.start]:02x}")]
    tree, problems = read_nodes(text, replace(place, line=1, column=1))
    if tree and tree.value is not None and not isinstance(tree.value, dict):
        message = f"a config is a mapping (`key: value` lines), got {shown(tree.plain)}"
        return None, [*problems, Problem(WRONG_VALUE, tree.place, "", message)]
    return tree, problems


def _read_override(text: str, tree: Node, rank: int) -> Reading:
    """The overlay that an override means for a tree."""
    key, equals, value = text.partition("=")
    place = Place(f"command line: {shortened(text)}", rank=rank)
    parts = _parts(key.strip())
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        return None, [Problem(BAD_OVERRIDE, place, "", "an override is key=value, for example training.learning_rate=2e-4")]
    leaf, problems = read_nodes(value, place)
    problems = [replace(problem, key=dotted(tuple(parts))) for problem in problems]
    if leaf is None:
        return None, problems
    try:
        return _overlay(tree, parts, leaf), problems
    except IndexError as error:
        return None, [*problems, Problem(BAD_OVERRIDE, place, dotted(tuple(parts)), str(error))]


def _parts(key: str) -> list[str]:
    """The parts of a dotted key. In a mapping whose names are keys, such a name is one part: `sweep.space`, `adapter.rank`."""
    parts = key.split(".")
    for i in range(1, min(len(parts), MAX_DEPTH)):
        if names_keys(tuple(int(part) if part.isdecimal() else part for part in parts[:i])):
            known = [end for end in range(i + 1, min(len(parts), MAX_DEPTH) + 1) if _without_positions(parts[i:end]) in keys()]
            end = max(known, default=len(parts))
            return [*parts[:i], ".".join(parts[i:end]), *parts[end:]]
    return parts


def _without_positions(parts: list[str]) -> str:
    return ".".join(part for part in parts if not part.isdecimal())


def _overlay(below: Node | None, parts: list[str], leaf: Node) -> Node:
    """A tree that holds a leaf at a path. A list on the way is copied from the tree below, since lists replace lists.

    Raises:
        IndexError: if the path leads to a position that the list does not have.
    """
    if not parts:
        return leaf
    head, *rest = parts
    if not head.isdecimal() or (below and isinstance(below.value, dict) and head in below.value):
        inner = below.value.get(head) if below and isinstance(below.value, dict) else None
        return replace(leaf, value={head: _overlay(inner, rest, leaf)})
    items = below.value if below and isinstance(below.value, list) else [below] if below and below.value is not None else []
    if int(head) > len(items):
        raise IndexError(f"the list has {len(items)} items, so position {head} does not exist (the first is 0)")
    item = items[int(head)] if int(head) < len(items) else None
    if item and rest and isinstance(item.value, str):
        item = replace(item, value={"path": item})
    changed = _overlay(item, rest, leaf)
    changed = _laid_over(item, changed, ()) if item else changed
    return replace(leaf, value=[*items[: int(head)], changed, *items[int(head) + 1 :]])


def _node_of(value: Any, place: Place) -> Node:
    """Nodes of plain Python data; what YAML has no word for stays as it is and is refused by the schema."""
    if isinstance(value, Section):
        value = value.model_dump(exclude_unset=True)
    if isinstance(value, Mapping):
        return Node({str(key): _node_of(child, place) for key, child in value.items()}, place, place)
    if isinstance(value, list | tuple):
        return Node([_node_of(child, place) for child in value], place, place)
    return Node(os.fspath(value) if isinstance(value, os.PathLike) else value, place, place)


# --- merging


def _laid_over(base: Node, overlay: Node, path: KeyPath) -> Node:
    if overlay.value is None and _is_section(path):
        return base
    if not isinstance(base.value, dict) or not isinstance(overlay.value, dict):
        return overlay
    kept = _still_meant(base.value, overlay.value, path)
    merged = {key: _laid_over(kept[key], child, (*path, key)) if key in kept else child for key, child in overlay.value.items()}
    return replace(overlay, value={**kept, **merged})


def _still_meant(base: dict[str, Node], overlay: dict[str, Node], path: KeyPath) -> dict[str, Node]:
    """The keys below an overlay, without those that were written for another method or another kind of dimension than its own."""
    section = schema_path(path)
    if section == "sweep.space" and len(path) == len(("sweep", "space", "key")):
        return {} if any(kind in overlay and kind not in base for kind in KINDS) else base
    if section not in unions():
        return base
    method = _method_of(overlay, default=_method_of(base, unions()[section]))
    if method == _method_of(base, unions()[section]):
        return base
    known = {key: keys().get(f"{section}.{key}") for key in base}
    return {key: child for key, child in base.items() if not (spec := known[key]) or method in spec.methods}


def _method_of(section: dict[str, Node], default: str) -> str:
    method = section["method"].value if "method" in section else default
    return method if isinstance(method, str) else default


@lru_cache(maxsize=10_000)
def _is_section(path: KeyPath) -> bool:
    key = keys().get(schema_path(path))
    return not path or (key is not None and key.is_section and not key.can_be_null)


def _data_of(node: Node, path: KeyPath) -> Any:
    """Plain data for the schema: empty sections left out, those that have a method with it."""
    if isinstance(node.value, list):
        return [_data_of(child, (*path, i)) for i, child in enumerate(node.value)]
    if not isinstance(node.value, dict):
        return node.value
    written = {key: child for key, child in node.value.items() if child.value is not None or not _is_section((*path, key))}
    data = {key: _data_of(child, (*path, key)) for key, child in written.items()}
    section = schema_path(path)
    return {"method": unions()[section], **data} if section in unions() else data


# --- validating


def _refused_values(node: Node, path: KeyPath) -> list[Problem]:
    """What pydantic lets pass: secrets, numbers that are not finite or do not fit 64 bits, and `true` where 1 is a choice."""
    if isinstance(node.value, dict | list):
        children = node.value.items() if isinstance(node.value, dict) else enumerate(node.value)
        return [problem for part, child in children for problem in _refused_values(child, (*path, part))]
    if isinstance(node.value, str) and SECRET.search(node.value):
        message = "looks like a secret; it belongs in the node's own login or a mounted file, never in a config"
        return [Problem(SECRET_VALUE, node.place, dotted(path), message)]
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
    node, key = _deepest(tree, path), keys().get(schema_path(path))
    if details["type"] == "extra_forbidden":
        union = union_above(path[:-1])
        method = _method_of(_deepest(tree, tuple(union.split("."))).value, unions()[union]) if union else ""
        message = f"unknown key{hint_for_key(schema_path(path[:-1]), str(path[-1]), method)}"
        return Problem(UNKNOWN_KEY, node.key_place, dotted(path), message)
    if details["type"] == "value_error" and isinstance(node.value, dict):
        return Problem(CONFLICT, node.key_place, dotted(path), str(details.get("ctx", {})["error"]))
    expected = in_words(type_at(path))
    if details["type"] == "missing":
        return Problem(MISSING_KEY, node.key_place, dotted(path), f"is missing; it must be {expected}")
    hint = hint_for_value(schema_path(path), type_at(path), node.plain)
    if not hint and key and key.annotation == type_at(path) and is_open(key.annotation):
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
        child = _child(node, part) if node else None
        if child or (details["type"] == "missing" and i == len(location) - 1):
            path, node = (*path, part), child
    return path


def _child(node: Node, part: str | int) -> Node | None:
    if isinstance(node.value, dict):
        return node.value.get(part)
    return node.value[part] if isinstance(node.value, list) and isinstance(part, int) and part < len(node.value) else None


def _deepest(tree: Node, path: KeyPath) -> Node:
    """The node at a path, or the last one on the way to it."""
    node = tree
    for part in path:
        node = _child(node, part) or node
    return node


def _missing_files(config: RunConfig, tree: Node) -> list[Problem]:
    """Local files that the config names and this machine lacks. Not checked where the files lie elsewhere, with the cluster."""
    if config.cluster.address:
        return []
    generation = config.evaluation.generation
    sources = {
        ("data", "train"): config.data.train,
        ("data", "validation"): config.data.validation,
        ("evaluation", "generation", "rows"): generation.rows if generation else [],
    }
    named: list[tuple[KeyPath, str]] = [
        ((*key, i, "path"), source.path) for key, rows in sources.items() for i, source in enumerate(rows)
    ]
    local = [(path, name) for path, name in named if name.endswith(_ROW_FILES)]
    local += [(("model", "base"), config.model.base)] if config.model.base.startswith((".", "/", "~")) else []
    local += [(("data", "template"), config.data.template)] if config.data.template.endswith((".jinja", ".j2")) else []
    return [
        Problem(NO_SUCH_FILE, _deepest(tree, path).place, dotted(path), f"{shown(name)} is not on this machine")
        for path, name in local
        if "://" not in name and not _exists(name)
    ]


def _unread_keys(config: RunConfig, tree: Node, judged: tuple[str, ...] | None) -> list[Problem]:
    """Keys that nothing reads, whatever a sweep draws."""
    drawn = tuple(config.sweep.space) if config.sweep else ()
    return [
        Problem(CONFLICT, _deepest(tree, key.path).key_place, key.key, key.message)
        for key in unread(config, drawn)
        if key.is_refused and (judged is None or any(f"{key.key}.".startswith(f"{name}.") for name in judged))
    ]


def _exists(name: str) -> bool:
    path = os.path.expanduser(name)
    return os.path.exists(path) or bool(glob.glob(path, recursive=True))


def _leaves(value: Any, path: KeyPath) -> dict[KeyPath, Any]:
    if isinstance(value, dict) and value:
        return {leaf: inner for key, child in value.items() for leaf, inner in _leaves(child, (*path, key)).items()}
    return {path: value}
