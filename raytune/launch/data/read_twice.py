"""Files whose rows are read for two things: measured and trained, or trained as rows of two sources. The same rows in other files
`data.quality` finds."""

import os
from collections.abc import Iterator, Sequence

from raytune.config.sections.data import DataSource
from raytune.data.files.source_files import find_files

_Place = tuple[str, str]


def read_twice(train: Sequence[DataSource], validation: Sequence[DataSource], test: Sequence[DataSource]) -> list[str]:
    """A line for each such file (or split of a data set).

    Raises:
        DataError: if a source has no files.
    """
    if len(train) + len(validation) + len(test) < 2:
        return []
    lines: list[str] = []
    trained: set[_Place] = set()
    for source in train:
        places = dict(_places(source))
        lines += [
            f"{name} is read by more than one source of data.train, each of which has its rows in an epoch"
            for place, name in places.items()
            if place in trained
        ]
        trained.update(places)
    for what, sources in (("validation", validation), ("test", test)):
        lines += [
            f"{name} of data.{what} is trained too, so that its loss is none of held-out rows"
            for source in sources
            for place, name in _places(source)
            if place in trained
        ]
    return lines


def _places(source: DataSource) -> Iterator[tuple[_Place, str]]:
    """Where the rows of a source lie, each with its name."""
    for file in find_files(source, None):
        path = os.path.realpath(file.path) if os.path.exists(file.path) else file.path
        yield (path, f"{file.kind} {file.split}"), file.name
