"""Rows of multiple choice: a question, the choices, and which of them is right."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from raytune.config.sections.data import DataSource
from raytune.data.conversations.conversation import Origin, RowError, kind_of
from raytune.data.files.readers import BadRow, read_segment
from raytune.data.files.source_files import find_files
from raytune.data.files.sources import scan
from raytune.data.rows.shards import Tally
from raytune.errors import DataError

FIELDS = ("question", "choices", "answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceRow:
    question: str
    choices: tuple[str, ...]
    """Different from each other, at least two."""
    right: int
    """Place of the right one."""
    origin: Origin


def read_choices(source: DataSource, downloads: Path, tally: Tally) -> Iterator[ChoiceRow]:
    """All rows of a source up to `max_rows`, in order.

    Args:
        tally: of rows that were read, and of those that cannot be used.

    Raises:
        DataError: if the source names a format of chats, or columns that such rows do not have.
    """
    if source.format != "auto":
        raise DataError(
            f"{source.path}: the format is {source.format}, but rows of choices have columns of their own: {', '.join(FIELDS)}. "
            f"Leave `format` out."
        )
    if other := next((key for key in ("constants", "labels") if getattr(source, key)), None):
        raise DataError(f"{source.path}: rows of choices have no {other}: each field is read from the row. Leave `{other}` out.")
    if unknown := [field for field in source.columns if field not in FIELDS]:
        raise DataError(f"{source.path}: columns maps '{unknown[0]}', but the fields of such rows are {', '.join(FIELDS)}.")
    segments = [segment for file in find_files(source, downloads) for segment in scan(file, source.max_rows).segments]
    rows = ((part, row) for part in segments for row in read_segment(part))
    for segment, row in islice(rows, source.max_rows):
        tally.add("rows")
        origin = Origin(segment.file.name, row.line)
        if isinstance(row, BadRow):
            tally.add("bad", origin, row.reason)
            continue
        try:
            yield choice_row(row.values, source.columns, origin)
        except RowError as error:
            tally.add("bad", origin, str(error))


def choice_row(values: Mapping[str, Any], columns: Mapping[str, str], origin: Origin) -> ChoiceRow:
    """A row from its columns. `choices` is a list of texts, or as ARC has them `{"text": [...], "label": [...]}`; `answer` is the
    place of the right one from 0, its text, its label, or its letter.

    Raises:
        RowError: if it is no such row.
    """
    question, choices, answer = (_column(values, columns.get(field, field)) for field in FIELDS)
    if not isinstance(question, str) or not question.strip():
        raise RowError(f"its question is {kind_of(question) if not isinstance(question, str) else 'empty'}, expected text")
    labels: Sequence[Any] = ascii_uppercase
    if isinstance(choices, dict):
        choices, labels = choices.get("text"), choices.get("label") or labels
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise RowError(f"its choices are {kind_of(choices)}, expected a list of texts")
    texts = tuple(choice.strip() for choice in choices)
    if len(texts) < 2 or "" in texts or len(set(texts)) < len(texts):
        raise RowError(f"its choices are {list(texts)}, expected two or more, different from each other and not empty")
    return ChoiceRow(question=question, choices=texts, right=_right(answer, texts, [*labels[: len(texts)]]), origin=origin)


def _right(answer: Any, choices: Sequence[str], labels: Sequence[Any]) -> int:
    if isinstance(answer, str) and answer.strip() in choices:
        return choices.index(answer.strip())
    if isinstance(answer, str) and answer.strip() in labels:
        return labels.index(answer.strip())
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise RowError(
        f"its answer is {answer!r}, which is neither one of its {len(choices)} choices, nor the place of one from 0, nor its "
        f"letter"
    )


def _column(values: Mapping[str, Any], name: str) -> Any:
    if values.get(name) is None:
        raise RowError(f"has no '{name}', only {', '.join(repr(column) for column in values)}")
    return values[name]
