"""Files and overrides -> trees of what they say. The file that `sweep.run` names lies below the file that names it.

An override `key.sub=value` is an overlay of one key, so it follows the same rules as a file; its value is YAML, and a number in
its key is a position in a list (`data.train.0.path=rows.jsonl`).
"""

import os
from dataclasses import replace
from difflib import get_close_matches

from raytune.config.problems import BAD_OVERRIDE, CONFLICT, UNREADABLE, WRONG_VALUE, Place, Problem, dotted, shortened, shown
from raytune.config.reading.keys import keys, names_keys
from raytune.config.reading.overlays import child_of, overlay_at, stacked
from raytune.config.sections.run import RunConfig
from raytune.config.yaml_nodes import MAX_DEPTH, Node, comment_behind, read_nodes
from raytune.credentials import find_secret_value

MAX_BYTES = 2**20

Reading = tuple[Node | None, list[Problem]]
"""What a file or an override says, and what is wrong with how it is written."""


def read_file(path: str, rank: int, *, merges: bool = False) -> Reading:
    """What a YAML file says; `rank` is its position among all files and overrides, `merges` as in `read_nodes`."""
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
    tree, problems = read_nodes(text, replace(place, line=1, column=1), merges=merges)
    if tree and tree.value is not None and not isinstance(tree.value, dict):
        message = f"a config is a mapping (`key: value` lines), got {shown(tree.plain)}"
        return None, [*problems, Problem(WRONG_VALUE, tree.place, "", message)]
    return tree, problems


def read_override(text: str, tree: Node, rank: int) -> Reading:
    """The overlay that an override means for the tree that it is laid over; `rank` as in `read_file`."""
    key, equals, value = text.partition("=")
    written = shortened(text) if find_secret_value(key, value) is None else f"{shortened(key)}=..."
    place = Place(f"command line: {written}", rank=rank)
    parts = _parts(key.strip())
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        return None, [Problem(BAD_OVERRIDE, place, "", "an override is key=value, for example training.learning_rate=2e-4")]
    leaf, problems = read_nodes(value, place)
    problems = [replace(problem, key=dotted(tuple(parts))) for problem in problems]
    if leaf is None:
        return None, problems
    if "#" in value and (comment := comment_behind(value)):
        message = f"{shown(comment)} would be a comment, no part of the value; put this in quotes within the shell's: '\"...\"'"
        return None, [*problems, Problem(BAD_OVERRIDE, place, dotted(tuple(parts)), message)]
    try:
        return overlay_at(tree, parts, leaf), problems
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


def files_below(above: list[Reading]) -> list[Reading]:
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
        overlay, problems = read_file(path, rank=len(above) + len(below))
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
        sweep = child_of(overlay, "sweep") if overlay else None
        run = child_of(sweep, "run") if sweep else None
        if run and isinstance(run.value, str) and run.value:
            return run
    return None


def same_name(below: list[Reading], tree: Node) -> list[Problem]:
    """A sweep that shares its name, and so its folder, with the run that it is laid over."""
    run = _named_run([(tree, [])])
    names = [child_of(each, "name") for each in (stacked(overlay for overlay, _ in below), tree)]
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
