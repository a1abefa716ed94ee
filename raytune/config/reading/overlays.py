"""Trees of what was written, laid over each other from left to right.

Mappings merge, lists and scalars replace, and an empty section changes nothing; names of trackers alone and the path of a source
alone stand for a mapping, so that what lies over them joins them. Where an overlay changes the `method` of a section such as
`adapter`, the keys that the new method does not have are dropped: they were written for another method. Keys that the overlay
itself brings are not.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from raytune.config.problems import Place, dotted
from raytune.config.reading.keys import keys, schema_path, unions
from raytune.config.sections.section import Section
from raytune.config.sections.sweep import KINDS
from raytune.config.yaml_nodes import Node

KeyPath = tuple[str | int, ...]
TRACKING = "tracking"
"""The section that can be written as a list of names."""


def stacked(overlays: Iterable[Node | None]) -> Node:
    """The tree of all overlays; later ones lie above earlier ones. Those that could not be read (None) are left out."""
    tree = Node({}, Place("config"), Place("config"))
    for overlay in overlays:
        tree = laid_over(tree, overlay, ()) if overlay else tree
    return tree


def laid_over(base: Node, overlay: Node, path: KeyPath) -> Node:
    """A tree with another one laid over it; both lie at `path` of the config."""
    if overlay.value is None and _is_section(path):
        return base if path else replace(base, place=overlay.place, key_place=overlay.key_place)
    if isinstance(overlay.value, dict):
        base = _spelled_out(base, schema_path(path))
        if isinstance(base.value, list) and schema_path(path) == TRACKING:
            return base  # is refused as it stands: nothing joins it, and what would take its place would drop trackers
    if not isinstance(base.value, dict) or not isinstance(overlay.value, dict):
        return overlay
    kept = _still_meant(base.value, overlay.value, path)
    merged = {key: laid_over(kept[key], child, (*path, key)) if key in kept else child for key, child in overlay.value.items()}
    return replace(overlay, value={**kept, **merged})


def _spelled_out(short: Node, key: str) -> Node:
    """Names of trackers, or the path of a source, as the mapping that they stand for; anything else as it is."""
    if isinstance(short.value, str) and f"{key}.path" in keys():
        return _with_path(short)
    listed = [short] if isinstance(short.value, str) else short.value
    if key != TRACKING or not isinstance(listed, list) or not all(isinstance(name.value, str) for name in listed):
        return short
    return replace(short, value={name.value: replace(name, value={}) for name in listed})


def _with_path(source: Node) -> Node:
    """A source of rows that is written as its path alone."""
    return replace(source, value={"path": source})


def _still_meant(base: dict[str, Node], overlay: dict[str, Node], path: KeyPath) -> dict[str, Node]:
    """The keys below an overlay, without those that were written for another method or another kind of dimension than its own."""
    section = schema_path(path)
    if section == "sweep.space" and len(path) == len(("sweep", "space", "key")):
        return {} if any(kind in overlay and kind not in base for kind in KINDS) else base
    if section not in unions():
        return base
    method = method_of(overlay, default=method_of(base, unions()[section]))
    if method == method_of(base, unions()[section]):
        return base
    known = {key: keys().get(f"{section}.{key}") for key in base}
    return {key: child for key, child in base.items() if not (spec := known[key]) or method in spec.methods}


def method_of(section: dict[str, Node], default: str) -> str:
    """The method that a section of a union names, or the default."""
    method = section["method"].value if "method" in section else default
    return method if isinstance(method, str) else default


@lru_cache(maxsize=10_000)
def _is_section(path: KeyPath) -> bool:
    key = keys().get(schema_path(path))
    return not path or (key is not None and key.is_section and not key.can_be_null)


def is_no_method(key: str) -> bool:
    """Whether a dotted key is anything but the `method` of a union."""
    return key.strip() not in {f"{union}.method" for union in unions()}


def overlay_at(below: Node | None, parts: list[str], leaf: Node, at: KeyPath = ()) -> Node:
    """A tree that holds a leaf at a path. A list on the way is copied from the tree below, since lists replace lists.

    Args:
        below: what lies at `at` of the config.

    Raises:
        IndexError: if the path leads to a position that the list does not have, or into a list without saying where.
    """
    if not parts:
        return leaf
    head, *rest = parts
    if not head.isdecimal() or (below and isinstance(below.value, dict) and head in below.value):
        if below and isinstance(below.value, list) and schema_path(at) != TRACKING and schema_path((*at, head)) in keys():
            raise IndexError(
                f"{dotted(at)} is a list of {len(below.value)}, which this would replace: name the one that is meant "
                f"({dotted((*at, 0, *parts))}), or the whole list ({dotted(at)}=[...])"
            )
        inner = below.value.get(head) if below and isinstance(below.value, dict) else None
        return replace(leaf, value={head: overlay_at(inner, rest, leaf, (*at, head))})
    items = below.value if below and isinstance(below.value, list) else [below] if below and below.value is not None else []
    if int(head) > len(items):
        raise IndexError(f"the list has {len(items)} items, so position {head} does not exist (the first is 0)")
    item = items[int(head)] if int(head) < len(items) else None
    if item and rest and isinstance(item.value, str):
        item = _with_path(item)
    changed = overlay_at(item, rest, leaf, (*at, int(head)))
    changed = laid_over(item, changed, ()) if item else changed
    return replace(leaf, value=[*items[: int(head)], changed, *items[int(head) + 1 :]])


def child_of(node: Node, part: str | int) -> Node | None:
    """What lies at a key of a mapping or a position of a list, if anything does."""
    if isinstance(node.value, dict):
        return node.value.get(part)
    return node.value[part] if isinstance(node.value, list) and isinstance(part, int) and part < len(node.value) else None


def deepest(tree: Node, path: KeyPath) -> Node:
    """The node at a path, or the last one on the way to it."""
    node = tree
    for part in path:
        node = child_of(node, part) or node
    return node


def places_in(node: Node, path: KeyPath) -> Iterator[tuple[KeyPath, Place]]:
    """The place of a node, which lies at `path` of the config, and of every key and item below it."""
    yield path, node.key_place
    children = (
        node.value.items() if isinstance(node.value, dict) else enumerate(node.value) if isinstance(node.value, list) else ()
    )
    for key, child in children:
        yield from places_in(child, (*path, key))


def node_of(value: Any, place: Place) -> Node:
    """Nodes of plain Python data; what YAML has no word for stays as it is and is refused by the schema."""
    if isinstance(value, Section):
        value = value.model_dump(exclude_unset=True)
    if isinstance(value, Mapping):
        return Node({str(key): node_of(child, place) for key, child in value.items()}, place, place)
    if isinstance(value, list | tuple):
        return Node([node_of(child, place) for child in value], place, place)
    return Node(os.fspath(value) if isinstance(value, os.PathLike) else value, place, place)


def data_of(node: Node, path: KeyPath) -> Any:
    """Plain data for the schema: empty sections left out, those that have a method with it."""
    if isinstance(node.value, list):
        return [data_of(child, (*path, i)) for i, child in enumerate(node.value)]
    if not isinstance(node.value, dict):
        return node.value
    written = {key: child for key, child in node.value.items() if child.value is not None or not _is_section((*path, key))}
    data = {key: data_of(child, (*path, key)) for key, child in written.items()}
    section = schema_path(path)
    return {"method": unions()[section], **data} if section in unions() else data
