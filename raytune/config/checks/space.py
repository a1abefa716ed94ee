"""What is wrong with a search space as it is written: keys, values and expressions, each at its place. Pure.

Whether values fit each other is asked later, of whole configs (`raytune.sweeps.space`).
"""

from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError

from raytune.config.problems import CONFLICT, UNKNOWN_KEY, WRONG_VALUE, Place, Problem, dotted, shown
from raytune.config.reading.expressions import Expression, ExpressionError, parse_expression
from raytune.config.reading.keys import in_words, is_mapping, keys, keys_in, schema_path, type_at
from raytune.config.sections.run import RunConfig
from raytune.config.sections.section import Section
from raytune.config.sections.sweep import Dimension, SweepSection
from raytune.config.words.hints import hint_for_value, nearest_keys, why_there_is_none
from raytune.config.words.metric_names import is_of_validation, measured, metric_refusal, mode_refusal

FIXED = (
    "version",
    "name",
    "preset",
    "storage",
    "sweep",
    "cluster",
    "provider",
    "data.fold",
    "data.split",
    "data.test",
    "data.test_fraction",
    "evaluation.generation",
    "evaluation.suites",
    "checkpoint.metric",
    "checkpoint.mode",
    "checkpoint.resume",
)
"""Keys that are the same for all trials, with what is below them."""

Path = tuple[str | int, ...]


class Written(Protocol):
    """Something written in a file: where it, and its key, stand."""

    @property
    def place(self) -> Place: ...
    @property
    def key_place(self) -> Place: ...


class NodeAt(Protocol):
    def __call__(self, *path: str | int) -> Written: ...


def space_problems(config: RunConfig, node_at: NodeAt) -> list[Problem]:
    """Everything that is wrong with the sweep of a config, if it has one, and with the metrics that rank and stop.

    Args:
        node_at: finds what was written at a path.
    """
    return [*_early_stopping_problems(config, node_at), *_sweep_problems(config, node_at)]


def _early_stopping_problems(config: RunConfig, node_at: NodeAt) -> list[Problem]:
    early = config.training.early_stopping
    return _judge_problems(config, ("training", "early_stopping"), early.metric, early.mode, node_at) if early else []


def _judge_problems(config: RunConfig, section: tuple[str, ...], metric: str, mode: str, node_at: NodeAt) -> list[Problem]:
    """What is wrong with the metric of a section, or with its mode."""
    for name, message in (
        ("metric", metric_refusal(config, dotted((*section, "metric")), metric)),
        ("mode", mode_refusal(config, metric, mode)),
    ):
        if message:
            return [Problem(CONFLICT, node_at(*section, name).place, dotted((*section, name)), message)]
    return []


def _sweep_problems(config: RunConfig, node_at: NodeAt) -> list[Problem]:
    if config.sweep is None:
        return _judge_problems(config, ("checkpoint",), config.checkpoint.metric, config.checkpoint.mode, node_at)
    circle = _circle(config.sweep)
    found = [problem for key in config.sweep.space for problem in _dimension_problems(config.sweep, key, node_at)]
    found += [problem for i in range(len(config.sweep.first)) for problem in _point_problems(config.sweep, i, node_at)]
    if circle:
        message = f"depends on itself: {' -> '.join(circle)}"
        found.append(Problem(CONFLICT, node_at("sweep", "space", circle[0]).key_place, f"sweep.space.{circle[0]}", message))
    message = _not_compared(config, config.sweep.metric)
    if message:
        return [*found, Problem(CONFLICT, node_at("sweep", "metric").place, "sweep.metric", message)]
    return found + _judge_problems(config, ("sweep",), config.sweep.metric, config.sweep.mode, node_at)


def _not_compared(config: RunConfig, metric: str) -> str | None:
    """Why trials cannot be compared by a metric, whichever others there are: they are compared where they are evaluated."""
    if metric in measured(config):
        return None
    if not is_of_validation(metric):
        what = "what is measured on validation rows (validation/loss, ...), or on suites (evaluation.while_training)"
        return f"trials are compared by {what}, got {shown(metric)}"
    if not config.data.validation and not config.data.holds_out:
        return "no trial would measure it: there are no validation rows (data.validation, data.validation_fraction)"
    return None


def parsed(dimension: Dimension) -> tuple[Expression | None, Expression | None]:
    """The expression and the condition of a dimension.

    Raises:
        ExpressionError: if one is not valid, which loading has refused.
    """
    texts = (dimension.expression, dimension.when)
    first, second = (parse_expression(text) if text is not None else None for text in texts)
    return first, second


def references(section: SweepSection, key: str) -> list[str]:
    """Keys of the space that must be known before a key can be drawn."""
    expressions = [expression for expression in parsed(section.space[key]) if expression]
    return [name for expression in expressions for name in expression.names if name in section.space]


def _dimension_problems(section: SweepSection, key: str, node_at: NodeAt) -> Iterator[Problem]:
    dimension, path = section.space[key], ("sweep", "space", key)
    refused = _key_refusal(key, section)
    if refused:
        yield Problem(refused[0], node_at(*path).key_place, dotted(path), refused[1])
    else:
        for value_path, value in _values(dimension):
            message = _value_refusal(key, value, dimension)
            if message:
                yield Problem(WRONG_VALUE, node_at(*path, *value_path).place, dotted((*path, *value_path[-1:])), message)
    for name in ("expression", "when"):
        text = getattr(dimension, name)
        refusal = _expression_refusal(text) if text is not None else None
        if refusal:
            yield Problem(refusal[0], node_at(*path, name).place, dotted(path), f"{shown(text)} {refusal[1]}")


def _key_refusal(key: str, section: SweepSection) -> tuple[str, str] | None:
    """The id and the reason why a key cannot be searched over."""
    path = _path(key)
    schema = schema_path(path)
    fixed = next((fixed for fixed in FIXED if f"{schema}.".startswith(f"{fixed}.")), None)
    if fixed:
        return UNKNOWN_KEY, f"{fixed} is the same for all trials and cannot be searched over"
    if schema not in keys() and not _is_in_free_mapping(path):
        near = [near for near in nearest_keys(key) if near.split(".")[0] not in FIXED]
        hint = f'Did you mean "{near[0]}"?' if near else "`raytune explain` lists the keys"
        return UNKNOWN_KEY, f"unknown key. {why_there_is_none(key) or hint}"
    if schema in keys() and keys()[schema].is_section:
        inner = [inner.path for inner in keys_in(schema)][:3]
        return WRONG_VALUE, f"is a section; name one of its keys, written in full: {', '.join(inner)}, ..."
    above = next((other for other in section.space if key.startswith(f"{other}.")), None)
    return (CONFLICT, f"lies in {above}, which is drawn as a whole") if above else None


def _point_problems(section: SweepSection, position: int, node_at: NodeAt) -> Iterator[Problem]:
    for key, value in section.first[position].items():
        path = ("sweep", "first", position, key)
        node = node_at(*path)
        dimension = section.space.get(key)
        if dimension is None:
            near = get_close_matches(key, section.space, 1)
            message = f"is no key of sweep.space{f'. Did you mean {shown(near[0])}?' if near else ''}"
            yield Problem(UNKNOWN_KEY, node.key_place, dotted(path), message)
        elif dimension.kind == "expression":
            yield Problem(WRONG_VALUE, node.key_place, dotted(path), f"follows from {shown(dimension.expression)}; leave it out")
        elif not holds(dimension, value):
            limits = shown(getattr(dimension, dimension.kind))
            step = f" in steps of {dimension.step:g}" if dimension.step else ""
            message = f"must be a point of the space, {dimension.kind} {limits}{step}, got {shown(value)}"
            yield Problem(WRONG_VALUE, node.place, dotted(path), message)


def holds(dimension: Dimension, value: Any) -> bool:
    """Whether a dimension can give a value."""
    if dimension.kind in ("choice", "grid"):
        options = getattr(dimension, dimension.kind)
        return any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in options)
    if isinstance(value, bool) or not isinstance(value, int if "integer" in dimension.kind else int | float):
        return False
    low, high = getattr(dimension, dimension.kind)
    steps = (value - low) / dimension.step if dimension.step else 0
    return low <= value <= high and abs(steps - round(steps)) < 1e-6


def _values(dimension: Dimension) -> Iterator[tuple[Path, Any]]:
    """What a dimension can be, as far as it is written: options, or the ends of a range."""
    if dimension.kind != "expression":
        for i, value in enumerate(getattr(dimension, dimension.kind)):
            yield (dimension.kind, i), value


def _value_refusal(key: str, value: Any, dimension: Dimension) -> str | None:
    annotation = type_at(_path(key))
    try:
        _type(key).validate_python(value)
    except ValidationError as error:
        expected = in_words(annotation)
        if dimension.kind in ("uniform", "log_uniform") and _accepts(key, int(value)) and not _accepts(key, float(int(value))):
            return f"{key} must be {expected}; draw it with integer or log_integer"
        reasons = [str(each.get("ctx", {})["error"]) for each in error.errors() if each["type"] == "value_error"]
        hint = hint_for_value(schema_path(_path(key)), annotation, value)
        return f"{key} must be {expected}, got {shown(value)}{hint}{f' ({reasons[0]})' if reasons else ''}"
    return None


def _accepts(key: str, value: Any) -> bool:
    try:
        _type(key).validate_python(value)
    except ValidationError:
        return False
    return True


@cache
def _type(key: str) -> TypeAdapter[Any]:
    annotation = type_at(_path(key))
    is_section = isinstance(annotation, type) and issubclass(annotation, Section)
    return TypeAdapter(annotation, config=None if is_section else Section.model_config)


def _expression_refusal(text: str) -> tuple[str, str] | None:
    """The id and the reason why an expression is refused."""
    try:
        expression = parse_expression(text)
    except ExpressionError as error:
        return WRONG_VALUE, str(error)
    for name in expression.names:
        if name in keys() and not keys()[name].is_section:
            continue
        if name in keys():
            return WRONG_VALUE, f"names the section {name}; name a key in it"
        if _is_in_free_mapping(_path(name)):
            continue
        near = nearest_keys(name)
        hint = f'. Did you mean "{near[0]}"?' if near else ""
        quotes = "" if "." in name else f"; text needs quotes inside an expression: '{name}'"
        return UNKNOWN_KEY, f"names an unknown key, {name}{hint}{quotes}"
    return None


def _circle(section: SweepSection) -> list[str]:
    """Keys that depend on each other in a circle, the first one again at the end; empty if there is none."""
    try:
        graph = {key: references(section, key) for key in section.space}
    except ExpressionError:
        return []

    def search(key: str, trail: tuple[str, ...]) -> list[str]:
        if key in trail:
            return [*trail[trail.index(key) :], key]
        if key in done:
            return []
        found = next((circle for other in graph[key] if (circle := search(other, (*trail, key)))), [])
        done.add(key)
        return found

    done: set[str] = set()
    return next((circle for key in graph if (circle := search(key, ()))), [])


def _is_in_free_mapping(path: Path) -> bool:
    """Whether a path leads below a key that holds a mapping of any names, such as `adapter.rank_pattern`."""
    return any(schema_path(path[:i]) in keys() and is_mapping(type_at(path[:i])) for i in range(1, len(path)))


def _path(key: str) -> Path:
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))
