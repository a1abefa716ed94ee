"""From sources to conversations: in which format a source is, and its rows in order, bad ones tallied."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from raytune.config.sections.data import DataSource
from raytune.data.conversations.conversation import Conversation, Origin, RowError
from raytune.data.files.readers import BadRow, FileRow, read_segment
from raytune.data.files.source_files import find_files
from raytune.data.files.sources import ScannedFile, scan
from raytune.data.formats.augmenting import Augmentation, copies_of
from raytune.data.formats.origins import origin_of
from raytune.data.formats.recognising import Reading, read_row, reading_of, reading_of_asked, with_answer
from raytune.data.rows.shards import ShardPart, Tally, bad_rows_error
from raytune.data.rows.split import EVERY_ROW_TRAINS, Side, Split, side_of
from raytune.errors import DataError

_ELSEWHERE: Mapping[Side | Literal["nowhere", "all"], str] = {
    "train": "other_side",
    "validation": "other_side",
    "test": "test_side",
    "nowhere": "origin_held_out",
}
"""How rows of each side are counted where another one is wanted."""


def readings_of(
    sources: Sequence[DataSource], scanned: Sequence[Sequence[ScannedFile]], *, are_asked: bool = False
) -> list[Reading]:
    """How each source is read, by its first good row.

    Args:
        are_asked: whether rows need no answer.

    Raises:
        DataError: if a source has no good row, or its format cannot be told.
    """
    readings = []
    for source, files in zip(sources, scanned, strict=True):
        tally = Tally()
        rows = ((file.file.name, row) for file in files for part in file.segments for row in read_segment(part))
        for name, row in rows:
            if not isinstance(row, BadRow):
                readings.append((reading_of_asked if are_asked else reading_of)(source, row.values))
                break
            tally.add("bad", Origin(name, row.line), row.reason)
        else:
            if tally.counts:
                raise bad_rows_error(tally)
            raise DataError(f"{source.path} has no rows.")
    return readings


def read_conversations(
    source: DataSource,
    downloads: Path,
    tally: Tally,
    side: Side | Literal["all"] = "all",
    split: Split = EVERY_ROW_TRAINS,
    *,
    are_asked: bool = False,
) -> Iterator[Conversation]:
    """All conversations of a source up to `max_rows`, in order; for previews, generated answers and calibration.

    Args:
        tally: of rows that were read, and of those that cannot be used.
        side: of the split that is wanted.
        are_asked: whether rows need no answer; one that lacks it has an empty one.

    Raises:
        DataError: if no row can be used, or their format cannot be told.
    """
    scanned = [scan(file, source.max_rows) for file in find_files(source, downloads)]
    (reading,) = readings_of([source], [scanned], are_asked=are_asked)
    parts = [
        ShardPart(segment=segment, file_index=0, reading=reading, fingerprint=file.fingerprint)
        for file in scanned
        for segment in file.segments
    ]
    rows = read_parts(parts, source.max_rows, tally, side, split, are_asked=are_asked)
    return (conversation for conversation, _ in rows)


def read_parts(
    parts: Sequence[ShardPart],
    max_rows: int | None,
    tally: Tally,
    side: Side | Literal["all"],
    split: Split,
    *,
    are_asked: bool = False,
    left_out: Sequence[bool] | np.ndarray | None = None,
    augmentation: Augmentation | None = None,
) -> Iterator[tuple[Conversation, int]]:
    """Conversations of the wanted side, each with the number of its file and before what is made of it; bad rows are tallied.

    Args:
        left_out: of each of them, whether it is left out, and tallied as `filtered`. None: none is.
    """
    is_out = None if left_out is None else iter(left_out)
    rows = ((part, row) for part in parts for row in read_segment(part.segment))
    for part, row in islice(rows, max_rows):
        if part.only_line not in (None, row.line):
            continue
        conversation = conversation_of(row, part.reading, part.segment.file.name, tally, side, split, are_asked=are_asked)
        if conversation is None:
            continue
        if is_out is not None and next(is_out):
            tally.add("filtered")
            continue
        assert isinstance(row, FileRow)
        for one in with_copies(row, conversation, part.reading, augmentation, tally):
            yield one, part.file_index


def conversation_of(
    row: FileRow | BadRow,
    reading: Reading,
    file: str,
    tally: Tally,
    side: Side | Literal["all"] = "all",
    split: Split = EVERY_ROW_TRAINS,
    *,
    are_asked: bool = False,
) -> Conversation | None:
    """The conversation of a row, which is tallied; None if it is a bad one, or not of the wanted side."""
    tally.add("rows")
    origin = Origin(file, row.line)
    if isinstance(row, BadRow):
        tally.add("bad", origin, row.reason)
        return None
    try:
        if origin_of(row.values) is not None:
            tally.add("made")
        found = side if side == "all" else side_of(row.values, split)
        if found != side:
            tally.add(_ELSEWHERE[found])
            return None
        conversation = read_row(with_answer(row.values, reading) if are_asked else row.values, reading, origin)
    except RowError as error:
        tally.add("bad", origin, str(error))
        return None
    tally.unread_columns.update(conversation.unread_columns)
    tally.unread_keys.update(conversation.unread_keys)
    return conversation


def with_copies(
    row: FileRow, conversation: Conversation, reading: Reading, augmentation: Augmentation | None, tally: Tally
) -> Iterator[Conversation]:
    """The conversation of a row, and what is made of it, which is tallied."""
    yield conversation
    for made in copies_of(row.values, conversation, reading, augmentation) if augmentation else ():
        tally.add("rows")
        tally.add("augmented")
        yield made
