"""Files and overrides -> `RunConfig`. All that is wrong is reported at once, with its place.

`reading.files` reads what was written, `reading.overlays` lays it over each other, `checks.validate` makes a config of it.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raytune.config.checks.asked import named_values
from raytune.config.checks.validate import validated
from raytune.config.problems import BAD_OVERRIDE, ConfigError, Place, Problem, dotted
from raytune.config.reading.files import Reading, files_below, read_file, read_override, same_name
from raytune.config.reading.overlays import KeyPath, is_no_method, laid_over, node_of, overlay_at, places_in, stacked
from raytune.config.reading.presets import over_its_preset, preset_keys
from raytune.config.reading.secrets_in import secret_problems
from raytune.config.sections.run import RunConfig
from raytune.config.sections.user_code import with_files
from raytune.config.yaml_nodes import Node, write_yaml
from raytune.errors import UserError

Places = Mapping[str, Place]
"""Where each key was written, by its dotted path; `""` is the start of the file."""


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = (), *, check_files: bool = False) -> RunConfig:
    """The run that some files and overrides describe; without any, the defaults.

    Args:
        paths: YAML files; later ones are laid over earlier ones.
        overrides: `key.sub=value`, laid over the files in this order.
        check_files: also look whether local files that the config names exist on this machine, and whether one that names a
            model names rows, and the other way round.

    Raises:
        ConfigError: with every problem of all files and overrides.
    """
    return load_with_places(paths, overrides, check_files=check_files)[0]


def load_with_places(
    paths: Sequence[str | Path], overrides: Sequence[str] = (), *, check_files: bool = False
) -> tuple[RunConfig, Places]:
    """Like `load_config`; also says where each key was written, for what is found to be wrong later."""
    tree, config = _resolve([read_file(os.fspath(path), rank) for rank, path in enumerate(paths)], overrides, check_files)
    return config, {dotted(path): place for path, place in places_in(tree, ())}


def config_from(source: Mapping[str, Any] | RunConfig, overrides: Sequence[str] = ()) -> RunConfig:
    """Like `load_config`, for what Python code already holds.

    Raises:
        ConfigError: with every problem.
    """
    return _resolve([(node_of(source, Place("config")), [])], overrides, check_files=False)[1]


def config_with(config: RunConfig, values: Mapping[str, Any], places: Places | None = None) -> RunConfig:
    """A config with the values of some dotted keys laid over it, as an overlay file with these keys would be.

    Args:
        places: where to say that the value of a key was written.

    Raises:
        ConfigError: with every problem.
    """
    tree = node_of(config, Place("config"))
    misplaced: list[Problem] = []
    for key in sorted(values, key=is_no_method):
        place = (places or {}).get(key, Place(key))
        try:
            tree = laid_over(tree, overlay_at(tree, key.split("."), node_of(values[key], place)), ())
        except IndexError as error:
            misplaced.append(Problem(BAD_OVERRIDE, place, key, str(error)))
    # What the config held before was written for other values too; see `raytune.sweeps.space`.
    return validated(over_its_preset(tree), misplaced, check_files=False, judged=tuple(values))


def as_one_run(config: RunConfig) -> RunConfig:
    """The same config, if it describes one run.

    Raises:
        UserError: if it describes a sweep.
    """
    if config.sweep is not None:
        raise UserError(
            "This is a sweep (the config has a `sweep` section): run it with `raytune sweep`, and look at it with "
            "`raytune sweep --dry-run`. With sweep=null it is one run.",
            keys=("sweep",),
        )
    return config


def config_diff(before: RunConfig, after: RunConfig) -> list[tuple[str, Any, Any]]:
    """Keys that differ, as (dotted key, value before, value after); None for a key that one side does not have."""
    old, new = _leaves(before.model_dump(mode="json"), ()), _leaves(after.model_dump(mode="json"), ())
    return [(dotted(path), old.get(path), new.get(path)) for path in {**old, **new} if old.get(path) != new.get(path)]


def overridden(paths: Sequence[str | Path], config: RunConfig) -> list[tuple[str, Any, Any]]:
    """What overrides changed in files that became `config` with them, as `config_diff` says it; in a list of sections that has as
    many as before, by position.

    Nothing if the files are only valid with the overrides: then there was no run before that could have changed.
    """
    try:
        changes = config_diff(load_config(paths), config)
    except ConfigError:
        return []
    return [inner for change in changes for inner in _by_position(*change)]


def dump_yaml(config: RunConfig, *, full: bool = False) -> str:
    """YAML that loads to an equal config: the keys that differ from their defaults, those that a run names and those that its
    preset would set, or all of them."""
    data = asked_values(config, full=full)
    return write_yaml(data) if data else ""


def asked_values(config: RunConfig, *, full: bool = False) -> dict[str, Any]:
    """What `dump_yaml` writes, by section."""
    data = _with_preset(config.model_dump(exclude_defaults=not full), config)
    named = {section: keys | data.get(section, {}) for section, keys in named_values(config).items()}
    return {section: (data | named)[section] for section in RunConfig.model_fields if section in data | named}


def dump_written(config: RunConfig) -> str:
    """YAML that loads to an equal config, whatever becomes of presets: every key that somebody has set, to its default or not."""
    data = _with_preset(config.model_dump(exclude_unset=True), config)
    return write_yaml({section: data[section] for section in RunConfig.model_fields if section in data and section != "sweep"})


def _with_preset(data: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """A dump of a config, with its own values of what the preset sets."""
    for section, name, _, _ in preset_keys(config):
        data[section] = data.get(section, {}) | {name: getattr(getattr(config, section), name)}
    return data


def _resolve(readings: list[Reading], overrides: Sequence[str], check_files: bool) -> tuple[Node, RunConfig]:
    """Lay files and overrides over each other and validate the result."""
    # A new method drops keys of the old one, so it goes first: `adapter.rank=8 adapter.method=full` must be refused.
    overrides = sorted(overrides, key=lambda text: is_no_method(text.partition("=")[0]))
    above = readings + [read_override(text, stacked([]), rank=len(readings)) for text in overrides]
    below = files_below(above)
    tree = stacked(overlay for overlay, _ in below + readings if overlay)
    readings = below + readings
    whole = tree
    for text in overrides:
        overlay, problems = read_override(text, tree, rank=len(readings))
        tree = laid_over(tree, overlay, ()) if overlay else tree
        readings = [*readings, (overlay, problems)]
    tree = over_its_preset(with_files(tree))
    if whole.place.line is not None:  # what is missing is missing in the file, not on the command line
        tree = replace(tree, place=whole.place, key_place=whole.key_place)
    unreadable = [problem for _, problems in readings for problem in problems]
    unreadable += [problem for overlay, _ in readings if overlay for problem in secret_problems(overlay)]
    unreadable += same_name(below, tree)
    return tree, validated(tree, unreadable, check_files)


def _by_position(key: str, before: Any, after: Any) -> list[tuple[str, Any, Any]]:
    """What of two lists of sections differs, if they are as long; of anything else the whole."""
    both = isinstance(before, list) and isinstance(after, list) and len(before) == len(after)
    if not both or not all(isinstance(item, dict) for item in [*before, *after]):
        return [(key, before, after)]
    old, new = _leaves(dict(enumerate(before)), (key,)), _leaves(dict(enumerate(after)), (key,))
    return [(dotted(path), old.get(path), new.get(path)) for path in {**old, **new} if old.get(path) != new.get(path)]


def _leaves(value: Any, path: KeyPath) -> dict[KeyPath, Any]:
    if isinstance(value, dict) and value:
        return {leaf: inner for key, child in value.items() for leaf, inner in _leaves(child, (*path, key)).items()}
    return {path: value}
