"""YAML text -> nodes that know their places, and data -> YAML text.

A strict part of YAML 1.2: no tags, no duplicate keys, bounded size and depth. Scalars follow its core schema: `1e-4` is a number,
`1:30` and `on` are text, and only `true` and `false` are booleans.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import yaml

from raytune.config.problems import DUPLICATE_KEY, NOT_YAML, REFUSED_YAML, Place, Problem, dotted, shortened

MAX_ALIASES = 50
MAX_ALIASED_NODES = 10_000
MAX_DEPTH = 32

_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULLS = {"", "~", "null", "Null", "NULL"}
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]{1,4000}|0o[0-7]{1,4000}|0x[0-9a-fA-F]{1,3000}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ENDS = (yaml.ScalarToken, yaml.AliasToken, yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)
"""Tokens that a value can end with."""
_PLAIN_WORDS = {
    "mapping values are not allowed": 'a second ": " in one line; put the text in quotes, or break the line',
    "could not find expected ':'": "a line without `key: value`; is a colon missing above?",
    "did not find expected key": "the indentation matches no section above",
    "expected <block end>": "the indentation matches no section above",
    "did not find expected '-' indicator": "a list and keys are mixed at one level",
    "',' or ']'": "a list in [brackets] is not closed",
    "',' or '}'": "a mapping in {braces} is not closed",
    "unexpected end of stream": "a quote is not closed",
    "cannot start any token": "a value cannot start with this character; put it in quotes",
    "special characters are not allowed": "a control character",
}


@dataclass(frozen=True, slots=True)
class Node:
    """A value and where it, and its key, were written. Mappings are `dict[str, Node]`, lists are `list[Node]`."""

    value: Any
    place: Place
    key_place: Place

    @property
    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain for key, child in self.value.items()}
        return [child.plain for child in self.value] if isinstance(self.value, list) else self.value


def scalar(text: str) -> str | int | float | bool | None:
    """The value of unquoted text (YAML 1.2 core schema)."""
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INTEGER.fullmatch(text):
        return int(text, 0 if text.startswith(("0o", "0x")) else 10)
    if _FLOAT.fullmatch(text):
        return float(text.replace(".", "", 1) if text[-1] in "fFnN" else text)
    return text


def write_yaml(data: Any, *, flow: bool = False) -> str:
    """YAML that `read_nodes` reads as equal data; on one line with `flow`."""
    return yaml.dump(data, Dumper=_Dumper, default_flow_style=flow, sort_keys=False, allow_unicode=True, width=math.inf)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or YAML 1.2 would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> Any:
    # PyYAML folds line ends of other alphabets inside single quotes into plain ones; escapes keep them.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
_NUMBER = re.compile(f"^(?:{_INTEGER.pattern}|{_FLOAT.pattern})$")
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def read_nodes(text: str, place: Place, *, merges: bool = False) -> tuple[Node | None, list[Problem]]:
    """Read one YAML document. Nodes that are refused are left out and reported; broken YAML gives no node at all.

    Args:
        text: the document.
        place: the start of the file it came from, or the override (which has no line).
        merges: take in what merge keys (<<) name, as other programs' files have them, instead of refusing them.
    """
    composer = _Composer(text, place, merges)
    try:
        return composer.document(), composer.problems
    except _RefusedError as refused:
        return None, [*composer.problems, refused.problem]
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        return None, [*composer.problems, _syntax_problem(error, text, place)]


class _RefusedError(Exception):
    """Reading cannot go on."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem


class _Composer:
    """Turns parser events into nodes; the parser runs only as far as the limits allow."""

    def __init__(self, text: str, place: Place, merges: bool) -> None:
        self.merges = merges
        self.events: Iterator[Any] = yaml.parse(text, Loader=_PARSER)
        self.source = place
        self.anchors: dict[str, Node] = {}
        self.num_aliases = 0
        self.num_aliased_nodes = 0
        self.problems: list[Problem] = []

    def document(self) -> Node:
        empty = Node(None, self.source, self.source)
        next(self.events)
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return empty
        node = self.node(next(self.events), (), None)
        next(self.events)
        after = next(self.events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise self.refused(after, (), "a second document (`---`); give one document per file")
        return node or empty

    def node(self, event: Any, path: tuple[str | int, ...], key_place: Place | None) -> Node | None:
        """The node that starts with `event`, or None if it was refused and reported."""
        place = self.place_at(event.start_mark)
        key_place = key_place or place
        if len(path) > MAX_DEPTH:
            raise self.refused(event, path[:1], f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, path, key_place)
        if isinstance(event, yaml.ScalarEvent):
            node = Node(scalar(event.value) if event.implicit[0] else event.value, place, key_place)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = Node(self.items(path), place, key_place)
        else:
            node = Node(self.mapping(path), place, key_place)
        if event.tag not in (None, "!"):
            message = f"tags such as {event.tag.replace('tag:yaml.org,2002:', '!!')} are not allowed; write the value plainly"
            self.problems.append(self.refused(event, path, message).problem)
            return None
        if isinstance(node.value, str) and _SURROGATE.search(node.value):
            self.problems.append(self.refused(event, path, "half a Unicode character (a lone surrogate)").problem)
            return None
        if event.anchor:
            self.anchors[event.anchor] = node
        return node

    def alias(self, event: Any, path: tuple[str | int, ...], key_place: Place) -> Node:
        target = self.anchors.get(event.anchor)
        if target is None:
            raise self.refused(event, path, f"*{event.anchor} refers to nothing above; text that starts with * needs quotes")
        size, levels = _extent(target)
        self.num_aliases += 1
        self.num_aliased_nodes += size
        if self.num_aliases > MAX_ALIASES or self.num_aliased_nodes > MAX_ALIASED_NODES:
            message = f"more than {MAX_ALIASES} aliases (*name), or more than {MAX_ALIASED_NODES:,} values in them"
            raise self.refused(event, path, message)
        if len(path) + levels > MAX_DEPTH:
            raise self.refused(event, path[:1], f"nested more than {MAX_DEPTH} levels deep")
        return replace(target, key_place=key_place)

    def items(self, path: tuple[str | int, ...]) -> list[Node]:
        nodes: list[Node] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            node = self.node(event, (*path, len(nodes)), None)
            if node is not None:
                nodes.append(node)
        return nodes

    def mapping(self, path: tuple[str | int, ...]) -> dict[str, Node]:
        nodes: dict[str, Node] = {}
        lines: dict[str, Place] = {}
        merged: dict[str, Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent) or _SURROGATE.search(event.value):
                raise self.refused(event, path, "a key must be plain text")
            key, place = event.value, self.place_at(event.start_mark)
            node = self.node(next(self.events), (*path, key), place)
            if key == "<<" and event.implicit[0] and self.merges:
                merged = self.merged(event, node, path) | merged
                continue
            if key == "<<" and event.implicit[0]:
                message = "merge keys (<<) are not supported; write the keys, or give a second file as an overlay"
                self.problems.append(Problem(REFUSED_YAML, place, dotted((*path, key)), message))
            elif key in lines:
                first = f"first on line {lines[key].line}" if lines[key].line else "given twice"
                self.problems.append(Problem(DUPLICATE_KEY, place, dotted((*path, key)), f"duplicate key, {first}"))
            elif node is not None:
                nodes[key] = node
            lines.setdefault(key, place)
        return merged | nodes

    def merged(self, event: Any, node: Node | None, path: tuple[str | int, ...]) -> dict[str, Node]:
        """What a merge key takes in: a mapping, or several, of which the first that has a key counts."""
        parts = node.value if node and isinstance(node.value, list) else [node]
        found: dict[str, Node] = {}
        for part in parts:
            if part is None or not isinstance(part.value, dict):
                raise self.refused(event, (*path, "<<"), "a merge key (<<) names a mapping, or a list of mappings")
            found = part.value | found
        return found

    def place_at(self, mark: Any) -> Place:
        return self.source if self.source.line is None else replace(self.source, line=mark.line + 1, column=mark.column + 1)

    def refused(self, event: Any, path: tuple[str | int, ...], message: str) -> _RefusedError:
        return _RefusedError(
            Problem(REFUSED_YAML, self.place_at(event.start_mark), dotted(path), shortened(message, len(message)))
        )


def comment_behind(text: str) -> str:
    """What stands behind the value that a text is read as, and is no part of it."""
    ends = [token.end_mark.index for token in yaml.scan(text, Loader=_PARSER) if isinstance(token, _ENDS)]
    return text[max(ends, default=0) :].strip()


def _extent(node: Node) -> tuple[int, int]:
    """How many nodes a node is, aliases written out, and how many levels deep."""
    children = node.value.values() if isinstance(node.value, dict) else node.value if isinstance(node.value, list) else ()
    extents = [_extent(child) for child in children]
    return 1 + sum(size for size, _ in extents), 1 + max((levels for _, levels in extents), default=0)


def _syntax_problem(error: Exception, text: str, place: Place) -> Problem:
    mark = getattr(error, "problem_mark", None)
    position = getattr(error, "position", None)
    if mark is not None:
        line, column = mark.line, mark.column
    else:
        before = text[: position or 0]
        line, column = before.count("\n"), len(before) - (before.rfind("\n") + 1)
    words = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).splitlines()[0]
    at = (text.splitlines() or [""])[line : line + 1]
    if at and at[0][column : column + 1] == "\t" and not at[0][:column].strip():
        words = "a tab in the indentation; YAML wants spaces"
    else:
        words = next((plain for fragment, plain in _PLAIN_WORDS.items() if fragment in words), words)
    where = place if place.line is None else replace(place, line=line + 1, column=column + 1)
    return Problem(NOT_YAML, where, "", f"not valid YAML: {shortened(words, len(words))}")


def with_value(text: str, section: str, name: str, value: str) -> str:
    """A document with a key of a section set, and no other character changed: comments, order and quotes stay.

    Whether it now says what it should is the caller's to check: anchors may lead elsewhere.

    Args:
        value: as it is to be written.
    """
    end = "\r\n" if "\r\n" in text else "\n"
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None:
        return f"{text}{'' if not text or text.endswith(end) else end}{section}:{end}  {name}: {value}{end}"
    assert isinstance(root, yaml.MappingNode), "a config is a mapping"
    pairs = {key.value: (key, child) for key, child in root.value}
    if section not in pairs:
        if root.flow_style:
            return _inside(text, root, f"{section}: {{{name}: {value}}}")
        whole = text if text.endswith(("\n", "\r")) else text + end
        margin = " " * root.start_mark.column
        return f"{whole}{margin}{section}:{end}{margin}  {name}: {value}{end}"
    key, child = pairs[section]
    if isinstance(child, yaml.MappingNode):
        found = next((old for own, old in child.value if own.value == name), None)
        if found is not None:
            start, stop = found.start_mark.index, found.end_mark.index
            return f"{text[:start]}{' ' if start == stop else ''}{value}{text[stop:]}"
        if child.flow_style:
            return _inside(text, child, f"{name}: {value}")
        margin = " " * child.value[0][0].start_mark.column
    else:
        margin = " " * (key.start_mark.column + 2)
    line_end = next((place for place in range(key.end_mark.index, len(text)) if text[place] in "\r\n"), len(text))
    return f"{text[:line_end]}{end}{margin}{name}: {value}{text[line_end:]}"


def _inside(text: str, node: Any, pair: str) -> str:
    """A pair as the first of a mapping in braces."""
    first = text.index("{", node.start_mark.index) + 1
    return f"{text[:first]}{pair}{', ' if node.value else ''}{text[first:]}"
