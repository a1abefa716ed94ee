"""A search space -> points. Pure: the same section and seed give the same trials, and more trials keep the first ones.

`space_of(run)` orders the dimensions so that a key comes after those that its expressions refer to; `draw` walks them and asks a
`Chooser` for each value. Random trials, first points, grids and corners are choosers.
"""

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from raytune.config.checks.readers import Unread, unread, without
from raytune.config.checks.space import parsed, references
from raytune.config.load import Places, config_with
from raytune.config.problems import CONFLICT, UNKNOWN_KEY, WRONG_VALUE, ConfigError, Place, Problem, shown
from raytune.config.reading.expressions import Expression, ExpressionError
from raytune.config.sections.run import RunConfig
from raytune.config.sections.sweep import Dimension, SweepSection
from raytune.missing import install_command
from raytune.sweeps.axes import Axis, Chooser, Derived, GivenChooser, Options, RandomChooser, Range, Space
from raytune.sweeps.trial import Trial

MAX_CORNERS = 1024
_MAX_REDRAWS = 100
_MAX_POINTS = 4096
"""A finite space up to this size is searched to its last point; in a larger one redraws find new points."""
_TRIES_PER_VALUE = 32


def space_of(run: RunConfig) -> Space:
    """The space of a loaded config that has a `sweep` section."""
    section = run.sweep
    assert section is not None
    ordered: dict[str, None] = {}

    def add(key: str) -> None:
        if key not in ordered:
            for other in references(section, key):
                add(other)
            ordered[key] = None

    for key in section.space:
        add(key)
    return Space(tuple(_axis(key, section.space[key]) for key in ordered), tuple(section.space), run)


def draw(space: Space, chooser: Chooser) -> dict[str, Any]:
    """One point of a space, in the order in which its keys were written.

    Raises:
        ConfigError: if an expression has no value for it, such as a division by zero.
    """
    values, problems = _point(space, chooser)
    if problems:
        raise ConfigError(problems)
    return values


def _point(space: Space, chooser: Chooser) -> tuple[dict[str, Any], list[Problem]]:
    """A point as far as its expressions have values, and the problems of those that have none."""
    values: dict[str, Any] = {}
    problems: list[Problem] = []

    def value_of(key: str) -> Any:
        return values[key] if key in values else run_value(space.run, key)

    for axis in space.axes:
        try:
            if axis.when is not None and not _holds(axis.when, value_of):
                continue
            values[axis.key] = _drawn(axis, chooser, value_of)
        except ExpressionError as error:
            message = f"{error}{_with(_known(axis, values))}"
            problems.append(Problem(WRONG_VALUE, Place(_space_key(axis.key)), _space_key(axis.key), message))
    return {key: values[key] for key in space.keys if key in values}, problems


def trials_of(run: RunConfig) -> list[Trial]:
    """All trials of a random search: first points, then draws, each crossed with the grid if there is one. No point twice; a
    space with fewer points than trials gives as many as it has.

    Raises:
        ConfigError: if an expression has no value for a point.
    """
    space, section = space_of(run), _section(run)
    grid = [axis for axis in space.axes if isinstance(axis.values, Options) and axis.values.in_grid]
    points: dict[str, dict[str, Any]] = {}
    for i, given in enumerate(section.first if grid else section.first[: section.trials]):
        point = draw(space, GivenChooser(given, _random(section, i, 0)))
        points.setdefault(_identity(point), point)
    if grid:
        drawn = [axis for axis in space.axes if not isinstance(axis.values, Derived) and axis not in grid]
        for i in range(section.trials if drawn else 1):
            for cell in itertools.product(*(axis.values.extremes for axis in grid if isinstance(axis.values, Options))):
                given = dict(zip((axis.key for axis in grid), cell))
                point = draw(space, GivenChooser(given, _random(section, i, 0)))
                points.setdefault(_identity(point), point)
    else:
        while len(points) < section.trials and (point := _new_point(space, points)) is not None:
            points[_identity(point)] = point
    return [Trial(number=number, values=values) for number, values in enumerate(points.values())]


def corners(space: Space) -> list[dict[str, Any]]:
    """Every extreme combination: each option of a choice, both ends of each range; at most `MAX_CORNERS`. Where there are more,
    each extreme at least once, in combinations drawn with the seed of the sweep.

    Raises:
        ConfigError: if an expression has no value at a corner.
    """
    return list({_identity(point): point for point in (draw(space, chooser) for chooser in _corner_choosers(space))}.values())


def trial_config(run: RunConfig, trial: Trial, places: Places | None = None) -> RunConfig:
    """The run of a trial: its values laid over the run as an overlay file would be, under its own name.

    Keys of the run that nothing reads with these values were written for other trials, and are left out.

    Args:
        places: where the keys of the sweep were written, as `config.load.load_with_places` tells.

    Raises:
        ConfigError: with the key of the space, the value and the reason for each that cannot be.
    """
    config = _laid_over(run, trial, places)
    return without(config, _fixed_unread(config, trial.values))


def _laid_over(run: RunConfig, trial: Trial, places: Places | None) -> RunConfig:
    """The run of a trial, still with keys of the run that only other trials read."""
    where = {key: (places or {}).get(_space_key(key), Place(_space_key(key))) for key in trial.values}
    alone = run.model_copy(update={"sweep": None, "name": trial.name})
    try:
        return config_with(alone, trial.values, where)
    except ConfigError as error:
        raise ConfigError([_of_space(problem, trial.values, run.sweep) for problem in error.problems]) from error


def _fixed_unread(config: RunConfig, values: Mapping[str, Any]) -> list[Unread]:
    """Keys of the run itself that nothing reads in a trial with these values."""
    return [key for key in unread(config) if key.is_refused and not any(f"{key.key}.".startswith(f"{own}.") for own in values)]


def check_space(run: RunConfig, places: Places | None = None) -> None:
    """Refuse a space in which some point is no valid config: all corners, first points and drawn trials are tried.

    Args:
        places: where the keys of the sweep were written, as `config.load.load_with_places` tells.

    Raises:
        ConfigError: with every problem once.
    """
    space, section = space_of(run), _section(run)
    found: dict[tuple[str, str], Problem] = {}
    firsts = [GivenChooser(given, _random(section, i, 0)) for i, given in enumerate(section.first)]
    seen: set[str] = set()
    unread_everywhere: dict[str, Unread] | None = None

    def note(problems: list[Problem]) -> None:
        for problem in problems:
            place = (places or {}).get(problem.key, problem.place)
            found.setdefault((problem.key, problem.message), Problem(problem.id, place, problem.key, problem.message))

    def check(values: Mapping[str, Any]) -> None:
        nonlocal unread_everywhere
        if _identity(values) not in seen:
            seen.add(_identity(values))
            try:
                config = _laid_over(run, Trial(number=0, values=values), places)
            except ConfigError as error:
                note(error.problems)
                return
            here = {key.key: key for key in _fixed_unread(config, values)}
            unread_everywhere = here if unread_everywhere is None else {k: here[k] for k in here if k in unread_everywhere}

    if section.search == "optuna" and find_spec("optuna") is None:
        message = f"needs the package optuna, which is not installed here: {install_command('optuna')}"
        note([Problem(WRONG_VALUE, Place("sweep.search"), "sweep.search", message)])
    for chooser in (*_corner_choosers(space), *firsts):
        values, problems = _point(space, chooser)
        note(problems)
        check(values)
        for key in chooser.given.keys() - values.keys() if chooser in firsts else ():
            message = f"{key} is given in sweep.first, but its condition does not hold there: {shown(section.space[key].when)}"
            note([Problem(CONFLICT, Place("sweep.first"), "sweep.first", message)])
    if not found:
        try:
            for trial in trials_of(run):
                check(trial.values)
        except ConfigError as error:
            note(error.problems)
    for key in (unread_everywhere or {}).values() if not found else ():
        note([Problem(CONFLICT, Place(key.key), key.key, f"{key.message} (so in every trial)")])
    if found:
        raise ConfigError(sorted(found.values(), key=lambda problem: problem.place.order))


def run_value(run: RunConfig, key: str) -> Any:
    """The value of a dotted key of a run, as plain data.

    Raises:
        ExpressionError: if this run has no such key, for example because of its `adapter.method`.
    """
    value: Any = run.model_dump(mode="json")
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ExpressionError(f"{key} is not set in this run")
        value = value[part]
    return value


def _section(run: RunConfig) -> SweepSection:
    assert run.sweep is not None, "a config without a sweep has no space"
    return run.sweep


def _axis(key: str, dimension: Dimension) -> Axis:
    expression, when = parsed(dimension)
    if expression is not None:
        return Axis(key, Derived(expression), when)
    written = getattr(dimension, dimension.kind)
    if dimension.kind in ("choice", "grid"):
        return Axis(key, Options(tuple(written), in_grid=dimension.kind == "grid"), when)
    low, high = written
    is_integer, is_log = "integer" in dimension.kind, dimension.kind.startswith("log_")
    step = dimension.step or (1 if is_integer and not is_log else None)
    values = Range(low, high, int(step) if is_integer and step else step, is_log, is_integer)
    if step:
        # The last number on the grid; a hair above the quotient, for steps such as 0.1 that binary fractions miss.
        values = Range(low, values.at(math.floor((high - low) / step + 1e-9)), values.step, is_log, is_integer)
    return Axis(key, values, when)


def _drawn(axis: Axis, chooser: Chooser, value_of: Any) -> Any:
    match axis.values:
        case Options(values):
            return chooser.choice(axis.key, values)
        case Range(low, high, step, is_log, is_integer):
            return chooser.number(axis.key, low, high, step, is_log, is_integer)
        case Derived(expression):
            return expression.value(value_of)


def _holds(when: Expression, value_of: Any) -> bool:
    holds = when.value(value_of)
    if not isinstance(holds, bool):
        raise ExpressionError(f"when: {when.text} is {holds!r}, neither true nor false")
    return holds


def _random(section: SweepSection, number: int, attempt: int) -> RandomChooser:
    """Draws of one trial; they depend on nothing that other trials drew."""
    return RandomChooser(random.Random(f"{section.seed}/{number}/{attempt}"))


def _new_point(space: Space, points: Mapping[str, Any]) -> dict[str, Any] | None:
    """A point that was not tried yet, or None if there is none."""
    section = _section(space.run)
    for attempt in range(_MAX_REDRAWS):
        point = draw(space, _random(section, len(points), attempt))
        if _identity(point) not in points:
            return point
    left = [point for point in _all_points(space) if _identity(point) not in points]
    return random.Random(f"{section.seed}/{len(points)}").choice(left) if left else None


def _all_points(space: Space) -> list[dict[str, Any]]:
    """Every point of a small finite space; nothing for others."""
    options = [(axis.key, _finite(axis.values)) for axis in space.axes if not isinstance(axis.values, Derived)]
    if math.prod(len(values) for _, values in options) not in range(1, _MAX_POINTS + 1):
        return []
    return [draw(space, chooser) for chooser in _crossed(options)]


def _finite(values: Options | Range | Derived) -> Sequence[Any]:
    """All values of a dimension that has few; nothing for others."""
    match values:
        case Options(options):
            return options
        case Range(num_steps=int(num_steps)) if num_steps < _MAX_POINTS:
            return [values.at(k) for k in range(num_steps + 1)]
        case Range(low, high, is_integer=True) if high - low < _MAX_POINTS:
            return range(int(low), int(high) + 1)
    return ()


def _corner_choosers(space: Space) -> Iterator[GivenChooser]:
    extremes = [(axis.key, axis.values.extremes) for axis in space.axes if not isinstance(axis.values, Derived)]
    if math.prod(len(values) for _, values in extremes) <= MAX_CORNERS:
        yield from _crossed(extremes)
        return
    generator = random.Random(_section(space.run).seed)
    # A key may be conditional, so each extreme is tried with several values of the others.
    wanted = [(key, value) for key, values in extremes for value in values]
    tries = max(1, min(_TRIES_PER_VALUE, MAX_CORNERS // len(wanted)))
    for key, value in wanted:
        for _ in range(tries):
            others = {other: values[generator.randrange(len(values))] for other, values in extremes}
            yield GivenChooser({**others, key: value}, RandomChooser(generator))


def _crossed(options: Sequence[tuple[str, Sequence[Any]]]) -> Iterator[GivenChooser]:
    for cell in itertools.product(*(values for _, values in options)):
        yield GivenChooser(dict(zip((key for key, _ in options), cell)), RandomChooser(random.Random(0)))


def _identity(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def _space_key(key: str) -> str:
    return f"sweep.space.{key}"


def _of_space(problem: Problem, values: Mapping[str, Any], section: SweepSection | None) -> Problem:
    """A problem of a trial's config as one of the space, with what of the point it is about."""
    own = problem.key if problem.key in values else next((key for key in values if problem.key.startswith(f"{key}.")), None)
    involved = {key: value for key, value in values.items() if key.startswith(f"{problem.key}.")}
    message = problem.message
    if own is None and involved:
        message, own = f"{problem.key}: {message}{_with(involved)}", next(iter(involved))
    elif own is not None and problem.id == UNKNOWN_KEY:
        message += "; draw it `when` the method has it"
    elif own is not None and problem.id == CONFLICT and problem.key == own:
        message += "; or draw it `when` something reads it"
    elif own is not None and section and own in section.space:
        message += _with(_known(_axis(own, section.space[own]), values))
    return Problem(problem.id, problem.place, _space_key(own) if own else problem.key, message)


def _known(axis: Axis, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a point that a key depends on."""
    expressions = [axis.when, axis.values.expression if isinstance(axis.values, Derived) else None]
    return {name: values[name] for expression in expressions if expression for name in expression.names if name in values}


def _with(values: Mapping[str, Any]) -> str:
    return f" (with {', '.join(f'{key} {shown(value)}' for key, value in values.items())})" if values else ""
