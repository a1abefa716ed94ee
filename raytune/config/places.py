"""Errors of the plan, the data and the model -> the line of the config that caused them. In one place, at the rim."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from raytune.config.keys import keys, schema_path
from raytune.config.problems import ConfigError, Place
from raytune.config.run import RunConfig
from raytune.errors import UserError

_NAMED = re.compile(r"(?<![\w/.-])[a-z]+(?:\.[a-z0-9_]+)+")

Places = Mapping[str, Place]
"""Where each key was written, by its dotted path."""


@contextmanager
def errors_at(config: RunConfig, places: Places) -> Iterator[None]:
    """Errors that leave the block say where the key that caused them was written."""
    try:
        yield
    except UserError as error:
        key = culprit(error, config, places)
        if key is not None and not isinstance(error, ConfigError) and not error.place:
            error.place = f"{places[key]}  {key}"
        raise


def culprit(error: UserError, config: RunConfig, places: Places) -> str | None:
    """The written key that an error is about; None if nobody wrote one of those that it names.

    A message names keys as users write them, what is wrong before what could be set instead. The first one counts that was
    written, in a section or as what a sweep varies. An error about rows names their file, and so the key that names the file.
    """
    message = str(error)
    named = [*error.keys, *_NAMED.findall(message)]
    candidates = [candidate for key in named for candidate in (key, f"sweep.space.{key}") if key == "sweep" or _is_key(key)]
    written = next((key for key in candidates if key in places), None)
    return written or _source_of(message, config, places)


def _is_key(name: str) -> bool:
    return schema_path(tuple(name.split("."))) in keys()


def _source_of(message: str, config: RunConfig, places: Places) -> str | None:
    generation = config.evaluation.generation
    sources = {
        "data.train": [source.path for source in config.data.train],
        "data.validation": [source.path for source in config.data.validation],
        "evaluation.generation": [source.path for source in generation.rows] if generation else [],
        "model.base": [config.model.base],
        "storage": [config.storage],
    }
    found = {key: max((len(path) for path in paths if path in message), default=0) for key, paths in sources.items()}
    longest = max(found, key=lambda key: found[key])
    return longest if found[longest] and longest in places else None
