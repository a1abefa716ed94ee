"""Files whose rows are named to be measured and are trained as well. The same rows in other files `data.quality` finds."""

import os
from collections.abc import Iterator, Sequence

from raytune.config.sections.data import DataSource
from raytune.data.files.source_files import find_files


def trained_too(train: Sequence[DataSource], validation: Sequence[DataSource], test: Sequence[DataSource]) -> list[str]:
    """A line for each file (or split of a data set) that is read for both.

    Raises:
        DataError: if a source has no files.
    """
    measured = [(what, source) for what, sources in (("validation", validation), ("test", test)) for source in sources]
    trained = {place for source in train for place, _ in _places(source)} if measured else set()
    return [
        f"{name} of data.{what} is trained too, so that its loss is none of held-out rows"
        for what, source in measured
        for place, name in _places(source)
        if place in trained
    ]


def _places(source: DataSource) -> Iterator[tuple[tuple[str, str], str]]:
    """Where the rows of a source lie, each with its name."""
    for file in find_files(source, None):
        path = os.path.realpath(file.path) if os.path.exists(file.path) else file.path
        yield (path, f"{file.kind} {file.split}"), file.name
