"""Errors of the plan, the data and the model -> the line of the config that caused them. In one place, at the rim."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from raytune.config.problems import NOT_POSSIBLE, ConfigError, Place, Problem
from raytune.config.reading.keys import keys, schema_path
from raytune.config.sections.row_sources import row_sources
from raytune.config.sections.run import RunConfig
from raytune.errors import UserError

_NAMED = re.compile(r"(?<![\w/.-])[a-z]+(?:\.[a-z0-9_]+)+")

Places = Mapping[str, Place]
"""Where each key was written, by its dotted path; `""` is the start of the file."""


@contextmanager
def errors_at(config: RunConfig, places: Places) -> Iterator[None]:
    """Errors that leave the block say where the key that caused them was written."""
    try:
        yield
    except UserError as error:
        locate(error, config, places)
        raise


def locate(error: UserError, config: RunConfig, places: Places) -> None:
    """Let an error say where the key that caused it was written, if somebody wrote it."""
    key = None if isinstance(error, ConfigError) or error.place else culprit(error, config, places)
    if key is not None:
        error.place = f"{places[key]}  {key}"


def problem_of(error: UserError, config: RunConfig, places: Places) -> Problem:
    """An error as one of several problems of a config."""
    key = culprit(error, config, places)
    return Problem(NOT_POSSIBLE, places[key] if key else places.get("", Place("config")), key or "", str(error))


def culprit(error: UserError, config: RunConfig, places: Places) -> str | None:
    """The written key that an error is about; None if nobody wrote one of those that it names.

    An error may carry its keys. Else its message names keys as users write them, what is wrong before what could be set instead:
    the first one counts that was written, in a section or as what a sweep varies. A message about rows names their file, and so
    the key that names the file.
    """
    carried = [above for key in error.keys for above in _upwards(key)]
    message = str(error)
    named = [key for key in _NAMED.findall(message) if _is_key(key)]
    candidates = [candidate for key in (*carried, *named) for candidate in (key, f"sweep.space.{key}")]
    written = next((key for key in candidates if key in places), None)
    return written or _source_of(message, config, places)


def _upwards(key: str) -> list[str]:
    """A key, then the sections that hold it, but the top level's."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), min(1, len(parts) - 1), -1)]


def _is_key(name: str) -> bool:
    return schema_path(tuple(name.split("."))) in keys()


def _source_of(message: str, config: RunConfig, places: Places) -> str | None:
    """The key of the longest path in a message."""
    rows = {key: [source.path for source in sources] for key, sources in row_sources(config).items()}
    sources = rows | {"model.base": [config.model.base]}
    named = {path: key for key, paths in sources.items() for path in paths if key in places and _says(message, path)}
    return named[max(named, key=len)] if named else None


def _says(message: str, path: str) -> bool:
    return re.search(rf"(?<![\w/]){re.escape(path)}(?![\w/])", message) is not None
