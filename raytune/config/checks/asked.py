"""What a run has to name: its model and its rows. The demo is trained where it is asked for by name, never because a key was
forgotten. Pure."""

from collections.abc import Callable, Mapping
from typing import Any

from raytune.config.problems import MISSING_KEY, ConfigError, Place, Problem, shown
from raytune.config.sections.run import RunConfig

DEMO_MODEL, DEMO_ROWS = "demo", "demo:"
"""`model.base`, and what `data.train` begins with, for the tiny model and the task that ship with raytune."""

NAMED = ("model.base", "data.train")
NEITHER = "Neither model.base nor data.train is named: good to lay over a run, but `train` refuses it alone."
"""Said of settings alone."""

PlaceOf = Callable[[str], Place]
"""Where a key was written, or would have been."""


def forgotten(config: RunConfig, place_of: PlaceOf) -> list[Problem]:
    """A problem for each of the two keys that nobody wrote, unless the other one names the demo's."""
    base, train = (is_named(config, key) for key in NAMED)
    rows = ", ".join(source.path for source in config.data.train)
    is_demo_model = _is_written(config, "model.base") and config.model.base == DEMO_MODEL
    are_demo_rows = _is_written(config, "data.train") and all(each.path.startswith(DEMO_ROWS) for each in config.data.train)
    found = []
    if not base and not are_demo_rows:
        learner = f"which model is to learn from {shown(rows)}" if train else "which model is to be trained"
        message = f"is missing: nothing says {learner}. Name a hub id or a folder, or the built-in toy: model.base: demo"
        found.append(Problem(MISSING_KEY, place_of("model.base"), "model.base", message))
    if not train and not is_demo_model:
        learner = shown(config.model.base) if base else "the model"
        message = f"is missing: nothing says what {learner} is to learn from. Name your rows, or the built-in toy's: demo:train"
        found.append(Problem(MISSING_KEY, place_of("data.train"), "data.train", message))
    return found


def require_named(config: RunConfig, keys: tuple[str, ...] = NAMED, places: Mapping[str, Place] | None = None) -> RunConfig:
    """The same config, if it names what is trained and on what.

    Args:
        keys: that count; a plan that is told the amount of data needs no rows.
        places: where each key was written.

    Raises:
        ConfigError: if a key was forgotten.
    """
    found = [problem for problem in forgotten(config, _nearest(places or {})) if problem.key in keys]
    if found:
        raise ConfigError(found)
    return config


def is_settings_alone(config: RunConfig) -> bool:
    """Whether somebody wrote something, but neither a model nor rows: to be laid over a run, or because both were forgotten."""
    return bool(config.model_fields_set) and not any(is_named(config, key) for key in NAMED)


def is_named(config: RunConfig, key: str) -> bool:
    """Whether somebody wrote one of `NAMED`, or a sweep varies it."""
    varied = config.sweep.space if config.sweep else ()
    return _is_written(config, key) or any(f"{other}.".startswith(f"{key}.") for other in varied)


def _is_written(config: RunConfig, key: str) -> bool:
    section, _, name = key.partition(".")
    return section in config.model_fields_set and name in getattr(config, section).model_fields_set


def named_values(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Those of `NAMED` that somebody wrote, as plain data by section: what a dump without defaults must keep."""
    rows = [source.model_dump(exclude_defaults=True) for source in config.data.train]
    values = {"model.base": {"model": {"base": config.model.base}}, "data.train": {"data": {"train": rows}}}
    return {section: keys for key in NAMED if _is_written(config, key) for section, keys in values[key].items()}


def _nearest(places: Mapping[str, Place]) -> PlaceOf:
    def place_of(key: str) -> Place:
        section = key.partition(".")[0]
        return places.get(key) or places.get(section) or places.get("") or Place("config")

    return place_of
