"""What the functions of the Python API are given: files, or configs in whatever form, with keys laid over them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from raytune.config.load import config_from, load_with_places
from raytune.config.sections.run import RunConfig
from raytune.config.words.places import Places

File = str | PathLike[str]
Config = File | Sequence[File] | Mapping[str, Any] | RunConfig


def resolved_config(config: Config, overrides: Mapping[str, Any]) -> tuple[RunConfig, Places]:
    """The config, and where its keys were written, if that was in files."""
    texts = as_overrides(overrides)
    if isinstance(config, RunConfig | Mapping):
        return config_from(config, texts), {}
    return load_with_places(files_of(config), texts)


def files_of(config: Config) -> list[str]:
    """The files that a config is written in; of a mapping, none."""
    if isinstance(config, RunConfig | Mapping):
        return []
    return [fspath(path) for path in ([config] if isinstance(config, str | PathLike) else config)]


def as_overrides(overrides: Mapping[str, Any]) -> list[str]:
    """Keys and values as they are written on the command line."""
    return [f"{key}={json.dumps(value, default=fspath)}" for key, value in _leaves(overrides)]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
