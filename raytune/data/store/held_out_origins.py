"""Whether rows that a model made of others are measured, or were made of rows in files of validation or the test: what a split
keeps apart by itself, for rows that are held out by name."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from raytune.config.sections.data import DataSource
from raytune.data.conversations.conversation import Origin, RowError
from raytune.data.files.readers import BadRow, read_segment
from raytune.data.files.source_files import find_files
from raytune.data.files.sources import scan
from raytune.data.formats.origins import content_of, origin_of
from raytune.data.rows.split import position_of
from raytune.data.store.place import local_stores
from raytune.errors import DataError
from raytune.plan.data.data_report import StoreReport


def refuse_made_rows(
    train: StoreReport,
    trained: Sequence[DataSource],
    measured: Mapping[str, Sequence[StoreReport]],
    held_out: Mapping[str, Sequence[DataSource]],
    folder: str | Path,
) -> None:
    """Refuse made rows that would be measured, and those that would be trained though their origin is measured.

    Args:
        trained: sources of `train`.
        measured: reports on the rows of `held_out`.
        held_out: by the key that names them.
        folder: of stores.

    Raises:
        DataError: naming one of them.
    """
    for key, reports in measured.items():
        if made := sum(report.total("made") for report in reports):
            raise DataError(
                f"{made} rows of {key} were made by a model of training rows (raytune data reword): what is measured on them "
                f"says nothing of other rows. List them in data.train, or leave them out.",
                keys=(key,),
            )
    if not train.total("made"):
        return
    with TemporaryDirectory(dir=local_stores(folder), prefix="draft-") as downloads:
        for key, sources in held_out.items():
            there = contents_in(sources, downloads)
            for origin, values in _rows(trained if there else (), downloads):
                if (made_of := _origin(values)) is not None and position_of(made_of) in there:
                    raise DataError(
                        f"{origin} was made of a row that {key} holds (raytune data reword): trained, it would tell of what is "
                        f"measured. Make such rows again, with {key} in the config that they are made for, or leave them out.",
                        keys=("data.train", key),
                    )


def contents_in(sources: Sequence[DataSource], downloads: str | Path) -> set[int]:
    """Hashes of what the rows of some sources say.

    Args:
        downloads: folder for files behind URLs.
    """
    return {position_of(content_of(values)) for _, values in _rows(sources, downloads)}


def _origin(values: Mapping[str, Any]) -> str | None:
    try:
        found = origin_of(values)
    except RowError:  # a bad row, told of where it is read for good
        return None
    return found and found.content


def _rows(sources: Sequence[DataSource], downloads: str | Path) -> Iterator[tuple[Origin, Mapping[str, Any]]]:
    for source in sources:
        segments = (part for file in find_files(source, Path(downloads)) for part in scan(file, source.max_rows).segments)
        rows = ((segment.file.name, row) for segment in segments for row in read_segment(segment))
        for name, row in islice(rows, source.max_rows):
            if not isinstance(row, BadRow):
                yield Origin(name, row.line), row.values
