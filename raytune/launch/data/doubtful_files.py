"""Files that may be read for what they are not: those whose rows are measured and trained, or trained as rows of two sources, and
those that are trained although their names say that they are a test's. The same rows in other files `data.quality` finds."""

import os
from collections.abc import Iterator, Sequence
from glob import has_magic
from pathlib import PurePath

from raytune.config.sections.data import DataSource
from raytune.data.files.source_files import find_files, split_in_name

_Place = tuple[str, str]


def doubtful_files(train: Sequence[DataSource], validation: Sequence[DataSource], test: Sequence[DataSource]) -> list[str]:
    """A line for each such file (or split of a data set).

    Raises:
        DataError: if a source has no files.
    """
    return [*_of_another_split(train), *_read_twice(train, validation, test)]


def _of_another_split(train: Sequence[DataSource]) -> Iterator[str]:
    """Folders all of whose files say so, while neither the folder's name nor the config does."""
    for source in train:
        is_asked = source.split != DataSource.model_fields["split"].default or has_magic(source.path)
        if is_asked or split_in_name(PurePath(source.path).name):
            continue
        splits = {split_in_name(PurePath(file.name).name) for file in find_files(source, None) if not file.split}
        if len(splits) == 1 and (split := splits.pop()) not in (None, "train"):
            yield (
                f"{source.path} of data.train has files of the split {split} alone, by their names, and they are trained "
                f"(split: {split} beside its path says that this is meant)"
            )


def _read_twice(train: Sequence[DataSource], validation: Sequence[DataSource], test: Sequence[DataSource]) -> list[str]:
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
