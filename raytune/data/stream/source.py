"""One source of a stream: its rows from a place on, and the documents of as many of them as are asked for."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import pyarrow as pa

from raytune.data.conversations.conversation import Conversation, Origin
from raytune.data.files.readers import ROWS_OF_LINES, BadRow, FileRow, Lines, read_segment
from raytune.data.files.source_files import SourceFile
from raytune.data.files.sources import Segment, unread_parts
from raytune.data.formats.recognising import Reading, reading_of
from raytune.data.rows.shards import Tally, bad_rows_error, resolved_too_long, too_long_error
from raytune.data.rows.source_rows import conversation_of, with_copies
from raytune.data.store.tokenising import documents_of
from raytune.data.stream.recipe import Recipe
from raytune.errors import DataError
from raytune.plan.data.data_report import COUNTS

COUNTED = (*COUNTS, "passes")
"""Of what was read, that a position carries on."""


@dataclass(frozen=True, slots=True)
class Place:
    """Between two rows of the files of a source."""

    file: int = 0
    offset: int = 0
    """In a file with a row per line: bytes before it, as they were before they were compressed."""
    line: int = 1
    rows: int = 0
    """Of the file, before it."""
    taken: int = 0
    """Of the pass over all files, before it."""


class SourceStream:
    """The documents of one source from a place on, pass after pass, window by window.

    Args:
        number: of the source.
        counts: of what was read before, by the names of COUNTED.
        check: called with each row; what it raises ends the reading.
    """

    def __init__(self, recipe: Recipe, number: int, place: Place, counts: Mapping[str, int], check: Callable[[], None]) -> None:
        self._recipe, self.number, self._check = recipe, number, check
        self._before = Counter(counts)
        self.reading = reading_of_source(recipe, number)
        self._reader = _Reader(recipe, number, place)
        self._is_whole_pass, self._has_documents = place == Place(), False
        """Of the pass that is read: whether it is read from its beginning, and whether it has had a document."""
        self.tally = Tally()
        """Of the window."""
        self.documents: list[pa.RecordBatch] = []
        """Of the window, in the order of their rows."""

    @property
    def place(self) -> Place:
        """Behind what was read."""
        return self._reader.place

    @property
    def counts(self) -> dict[str, int]:
        """Of all that was read, by the names of COUNTED that there is something of."""
        return {name: count for name in COUNTED if (count := self._before[name] + self.tally.counts[name])}

    def begin_window(self) -> None:
        self._before = Counter(self.counts)
        self.tally, self.documents = Tally(), []

    @property
    def num_targets(self) -> int:
        """Of all that was read."""
        return self._before["targets"] + self.tally.counts["targets"]

    def take(self, most: int) -> int:
        """Read on, into the documents of the window.

        Args:
            most: rows at most; fewer where the pass ends, behind which the next one begins.

        Returns:
            How many rows were read.

        Raises:
            DataError: if the files cannot be read on, are others than they were, hold rows that stop the run, or nothing that can
                be trained on.
        """
        request, first = self._recipe.request, self._reader.place.file
        rows = []
        for row in islice(self._reader, most):
            self._check()
            rows.append(row)
        for file in self._recipe.files[self.number][first : self._reader.place.file + 1]:
            file.refuse_another()
        too_long = resolved_too_long(request.too_long, self.reading.format)
        found = list(documents_of(self._conversations(rows), self._recipe.options, too_long, self.tally))
        if self.tally.counts["bad"] and request.on_bad_row == "error":
            raise bad_rows_error(self.tally)
        if self.tally.counts["dropped"] and request.too_long == "error":
            raise too_long_error(self.tally, request.max_length)
        if self.tally.counts["made"] and self._before["rows"] and not self._before["made"]:
            raise self._made_later()
        self.documents += found
        self._has_documents |= bool(found)
        if len(rows) < most:
            self._end_pass()
        return len(rows)

    def _made_later(self) -> DataError:
        """Rows that were made of others are held against what is measured before the run: of all sources that begin with some."""
        path = self._recipe.sources[self.number].path
        return DataError(
            f"{path} has rows that a model made of others (raytune data reword), and none in its first window: whether they were "
            f"made of rows that are measured was not looked at. List the file that has them as a source of its own.",
            keys=("data.train",),
        )

    def _end_pass(self) -> None:
        if self._is_whole_pass and not self._has_documents:
            path = self._recipe.sources[self.number].path
            raise DataError(f"No row of {path} can be trained on: {_reasons(self.tally)}.", keys=("data.train",))
        self.tally.counts["passes"] += 1
        self._reader = _Reader(self._recipe, self.number, Place())
        self._is_whole_pass, self._has_documents = True, False

    def _conversations(self, rows: Sequence[tuple[int, FileRow | BadRow]]) -> Iterator[tuple[Conversation, int]]:
        names = self._recipe.files[self.number]
        for number, row in rows:
            self._check()
            if conversation := conversation_of(row, self.reading, names[number].name, self.tally):
                assert isinstance(row, FileRow)
                for one in with_copies(row, conversation, self.reading, self._recipe.request.augmentation, self.tally):
                    yield one, self._recipe.first_file(self.number) + number


def reading_of_source(recipe: Recipe, number: int) -> Reading:
    """How the rows of a source are read, by the first good one.

    Raises:
        DataError: if there is none among those of a window, or its format cannot be told.
    """
    source, tally = recipe.sources[number], Tally()
    for file, row in islice(_Reader(recipe, number, Place()), recipe.window):
        if not isinstance(row, BadRow):
            return reading_of(source, row.values)
        tally.add("bad", Origin(recipe.files[number][file].name, row.line), row.reason)
    if tally.counts:
        raise bad_rows_error(tally)
    raise DataError(f"{source.path} has no rows.", keys=("data.train",))


def _reasons(tally: Tally) -> str:
    words = {
        "bad": "are bad",
        "no_target": "have no target",
        "cut_off": "have none in reach",
        "dropped": "too long",
    }
    return f"of {tally.counts['rows']} rows " + ", ".join(f"{tally.counts[name]} {why}" for name, why in words.items())


class _Reader:
    """One pass over the rows of a source, bad ones included, each with the number of its file, from a place on."""

    def __init__(self, recipe: Recipe, number: int, place: Place) -> None:
        self._files, self._most = recipe.files[number], recipe.sources[number].max_rows
        self.place = place
        """Behind the last row that was asked for."""
        self._rows = self._read()

    def __iter__(self) -> Iterator[tuple[int, FileRow | BadRow]]:
        return self._rows

    def _read(self) -> Iterator[tuple[int, FileRow | BadRow]]:
        while self.place.file < len(self._files) and self.place.taken != self._most:
            number, file = self.place.file, self._files[self.place.file]
            parts = unread_parts(file)
            rows = self._by_line(file, parts[0]) if file.kind in ROWS_OF_LINES and parts[0].stop else self._by_number(parts)
            for row in rows:
                yield number, row
                if self.place.taken == self._most:
                    return
            self.place = Place(file=number + 1, taken=self.place.taken)

    def _by_line(self, file: SourceFile, part: Segment) -> Iterator[FileRow | BadRow]:
        lines = Lines(replace(part, start=self.place.offset, first_line=self.place.line))
        for row in ROWS_OF_LINES[file.kind](lines):
            self.place = replace(self._next(), offset=lines.at, line=lines.line)
            yield row

    def _by_number(self, parts: Sequence[Segment]) -> Iterator[FileRow | BadRow]:
        if not parts:
            return
        before = self.place.rows
        first = next(part for part in reversed(parts) if part.first_line - 1 <= before)
        skipped = before - (first.first_line - 1)
        for row in islice(read_segment(replace(first, stop=parts[-1].stop)), skipped, None):
            self.place = self._next()
            yield row

    def _next(self) -> Place:
        return replace(self.place, rows=self.place.rows + 1, taken=self.place.taken + 1)
