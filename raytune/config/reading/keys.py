"""Every key of a run config as a flat table, and types in words. What loading, hints, `explain` and tables share."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from raytune.config.sections.run import RunConfig
from raytune.config.sections.section import Section
from raytune.config.sections.sweep import ConfigKey

REQUIRED = object()
"""Stands where a default would be, for a key that must be given."""


@dataclass(frozen=True, slots=True)
class Key:
    path: str
    """Dotted, without list positions: `data.train.path`."""
    annotation: Any
    """The type as the schema writes it, with its constraints."""
    default: Any
    sentence: str
    methods: tuple[str, ...] = ()
    """Methods of the surrounding union (`adapter`, `sweep.stopping`) that have this key; empty for keys outside of one."""
    other_defaults: tuple[tuple[str, Any], ...] = ()
    """Methods under which the default is another one, with it."""

    @property
    def union(self) -> str:
        """Path of the section tagged by `method` that holds this key, if its `methods` are not empty."""
        return next((path for path in unions() if self.path.startswith(f"{path}.")), "")

    @property
    def is_section(self) -> bool:
        return bool(_sections(self.annotation)) and _container(self.annotation) is None

    @property
    def can_be_null(self) -> bool:
        return type(None) in _alternatives(self.annotation)


@cache
def keys() -> dict[str, Key]:
    """All keys by path, in the order of the schema."""
    found: dict[str, Key] = {}
    for key in _keys_below("", RunConfig, ()):
        found[key.path] = _merged(found[key.path], key) if key.path in found else key
    return found


def keys_in(section: str) -> list[Key]:
    """The keys directly below a section; `""` is the top level."""
    return [key for path, key in keys().items() if path.rpartition(".")[0] == section]


@cache
def unions() -> dict[str, str]:
    """Sections of which each method has its own keys: their paths, and the method that holds where none is written."""
    found = {path: key for path, key in keys().items() if key.is_section and len(_methods_of_all(key.annotation)) > 1}
    return {path: key.default.method for path, key in found.items()}


def union_above(path: tuple[str | int, ...]) -> str:
    """The union that a written path leads into or to, or nothing."""
    return next((union for union in unions() if f"{schema_path(path)}.".startswith(f"{union}.")), "")


def is_mapping(annotation: Any) -> bool:
    """Whether a type is a mapping of any names to values."""
    return get_origin(_container(annotation)) is dict


def is_in_list(key: Key) -> bool:
    """Whether a key lies in a section of a list, where its position has to be written before it: not in a list for which one
    section may stand, such as `data.train`."""
    above = keys().get(key.path.rpartition(".")[0])
    if above is None or get_origin(_container(above.annotation)) is not list:
        return False
    return not any(field.title for field in _fields(above.annotation))


def names_keys(path: tuple[str | int, ...]) -> bool:
    """Whether the names in the mapping at a path are dotted keys themselves, as in `sweep.space`."""
    container = _container(type_at(path))
    return container is not None and get_args(container)[0] == ConfigKey


@lru_cache(maxsize=10_000)
def schema_path(path: tuple[str | int, ...]) -> str:
    """The dotted path of a written key, without its positions in lists and the names in mappings of sections."""
    known, is_name = "", False
    for part in path:
        if is_name or not isinstance(part, str):
            is_name = False
            continue
        known = f"{known}.{part}".lstrip(".")
        container = _container(keys()[known].annotation) if known in keys() else None
        is_name = get_origin(container) is dict and bool(_sections(container))
    return known


@lru_cache(maxsize=10_000)
def type_at(path: tuple[str | int, ...]) -> Any:
    """The type of what is written at a path, which may lead into lists and free mappings."""
    annotation, known = Any, ()
    for part in path:
        above, known = schema_path(known), (*known, part)
        key = keys().get(schema_path(known)) if schema_path(known) != above else None
        annotation = key.annotation if key else _item(annotation)
    return annotation


def choices(annotation: Any) -> list[Any]:
    """The fixed values that a type allows, such as those of a Literal."""
    return [value for part in _alternatives(annotation) if get_origin(part) is Literal for value in get_args(part)]


def is_open(annotation: Any) -> bool:
    """Whether the words for a type leave open what a value looks like: `an integer >= 1` does, `true or false` does not."""
    parts = [part for part in _alternatives(annotation) if get_origin(part) is not Literal and part not in (bool, type(None))]
    return any(not field.title for part in parts for field in _fields(part) or [FieldInfo()])


def in_words(annotation: Any) -> str:
    """A type as a person would say it: `an integer >= 1 or auto`."""
    words = [_words(part) for part in _alternatives(annotation) if get_origin(part) is not Literal and part is not type(None)]
    words += [_value_in_words(value) for value in choices(annotation)]
    words += ["null"] * (type(None) in _alternatives(annotation))
    words = list(dict.fromkeys(words))
    return ", ".join(words[:-1]) + " or " + words[-1] if len(words) > 1 else words[0]


def example_of(key: Key) -> Any:
    """A value that the key accepts: one that its type declares, else its default, else one made from the type."""
    declared = [example for part in (key.annotation, *_alternatives(key.annotation)) for example in _examples(part)]
    if declared:
        return declared[0]
    telling = key.default is not REQUIRED and key.default not in (None, "auto", [], {})
    return key.default if telling else _sample(key.annotation)


def _keys_below(prefix: str, section: type[Section], methods: tuple[str, ...]) -> Iterator[Key]:
    hints = get_type_hints(section, include_extras=True)
    for name, field in section.model_fields.items():
        default = REQUIRED if field.is_required() else field.default
        key = Key(prefix + name, hints[name], default, " ".join((field.description or "").split()), methods)
        yield key
        for nested in _sections(key.annotation):
            yield from _keys_below(f"{key.path}.", nested, _methods(nested) or methods)


def _merged(first: Key, second: Key) -> Key:
    """One key for the same name in two methods of a union."""
    default = second.default if first.default is REQUIRED else first.default
    others = tuple((method, second.default) for method in second.methods if second.default not in (default, REQUIRED))
    both = replace(
        first,
        default=default,
        methods=(*first.methods, *second.methods),
        other_defaults=(*first.other_defaults, *others),
        sentence=_merged_sentence(first, second),
    )
    if not first.path.endswith(".method"):
        return both
    methods = Literal[tuple(choices(first.annotation) + choices(second.annotation))]
    lines = [f"`{key.methods[-1]}`: {key.sentence}" if len(key.methods) == 1 else key.sentence for key in (first, second)]
    return replace(both, annotation=methods, sentence=" ".join(lines))


def _merged_sentence(first: Key, second: Key) -> str:
    """The first one's, and where a later method says something else of the same key, that behind it."""
    if second.sentence in first.sentence:
        return first.sentence
    words, methods = f"{second.sentence[:1].lower()}{second.sentence[1:]}", "`, `".join(second.methods)
    said = re.compile(rf"`: {re.escape(words)}(?=$| With `)")
    if said.search(first.sentence):
        return said.sub(lambda match: f"`, `{methods}{match[0]}", first.sentence)
    return f"{first.sentence} With `{methods}`: {words}"


def _methods(section: type[Section]) -> tuple[str, ...]:
    method = section.model_fields.get("method")
    return tuple(choices(method.annotation)) if method else ()


def _methods_of_all(annotation: Any) -> list[str]:
    return [method for section in _sections(annotation) for method in _methods(section)]


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, UnionType):
        return [inner for part in get_args(annotation) for inner in _alternatives(part)]
    if get_origin(annotation) is Annotated and get_origin(get_args(annotation)[0]) in (Union, UnionType):
        return _alternatives(get_args(annotation)[0])
    return [annotation]


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _container(annotation: Any) -> Any:
    """The list or dict among the alternatives of a type, without its annotations."""
    bare = [_bare(part) for part in _alternatives(annotation)]
    return next((part for part in bare if get_origin(part) in (list, dict)), None)


def _item(annotation: Any) -> Any:
    container = _container(annotation)
    return get_args(container)[-1] if container else Any


def _sections(annotation: Any) -> list[type[Section]]:
    inside = [_bare(part) for part in (*_alternatives(annotation), *_alternatives(_item(annotation)))]
    return [part for part in inside if isinstance(part, type) and issubclass(part, Section)]


def _fields(annotation: Any) -> list[FieldInfo]:
    notes = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return [note for note in notes if isinstance(note, FieldInfo)]


def _examples(annotation: Any) -> list[Any]:
    return [example for field in _fields(annotation) for example in field.examples or []]


def _sample(annotation: Any) -> Any:
    """Some value of a type."""
    fixed = [choice for choice in choices(annotation) if choice != "auto"]
    bare = [_bare(part) for part in _alternatives(annotation)]
    if _container(annotation) is not None:
        inner = _sample(_item(annotation))
        return [inner] if get_origin(_container(annotation)) is list else {"name": inner}
    return fixed[0] if fixed else {int: 8, float: 0.1, bool: True, str: "text"}.get(bare[0])


def _words(annotation: Any) -> str:
    titles = [field.title for field in _fields(annotation) if field.title]
    if titles:
        return titles[0]
    bare = _bare(annotation)
    limits = [limit for field in _fields(annotation) for limit in field.metadata]
    if get_origin(bare) is list:
        return f"a list ({in_words(get_args(bare)[0])})"
    if get_origin(bare) is dict:
        return f"a mapping of names to {in_words(get_args(bare)[1])}"
    if isinstance(bare, type) and issubclass(bare, Section):
        return "a section (indented keys)"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return names.get(bare, "anything") + _limits_in_words(limits)


def _limits_in_words(limits: list[Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [f"{sign} {getattr(limit, name):g}" for name, sign in signs.items() for limit in limits if hasattr(limit, name)]
    return " " + " and ".join(bounds) if bounds else ""


def _value_in_words(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
