"""Which format rows are in: the one that a config names, or the only one that reads what is in them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raytune.config.sections.data import DataFormat, DataSource
from raytune.data.conversations.conversation import Conversation, Origin, RowError
from raytune.data.formats.formats import FORMATS
from raytune.data.formats.origins import OWN_COLUMNS, maker_of
from raytune.data.formats.row_fields import Mapped, RowFields, columns_for, found_in, is_missing, listed, unread_in
from raytune.errors import DataError

# What says which row it is, where it is from or how long, but never what a model is to learn. Of `parallel_tool_calls`, a setting
# of OpenAI's API that its rows carry, no text depends.
_BOOKKEEPING = re.compile(
    r"_?id|idx|index|uid|uuid|guid|key|hash|md5|sha1|sha256"
    r"|(row|prompt|example|sample|question|conversation|message|session|doc|document|user)_id"
    r"|sources?|data_?set|dataset_(name|source)|origin|split|subset|config|ur[il]|link|file|file_?name|file_?path|path|licen[cs]e"
    r"|date|timestamp|(created|updated)(_at)?|(num|n)_tokens|tokens?_count|num_turns|length|(char|word)_count"
    r"|meta|metadata|parallel_tool_calls"
    r"|__index_level_\d+__|unnamed: \d+",  # as pandas writes them
    re.IGNORECASE,
)
_HINTS = {
    "label": "The format classification trains a label as the answer to a text; raytune does not learn from preferences.",
    "rejected": "raytune does not learn from preferences: it does supervised fine-tuning only.",
    "image": "Images are not trained on.",
    "images": "Images are not trained on.",
    "audio": "Sound is not trained on.",
    "video": "Videos are not trained on.",
}
_PREFERENCES = ("chosen", "rejected")
"""Columns of data for DPO and its like."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the rows of a source are read."""

    format: DataFormat
    is_named: bool
    """Whether the config, rather than the columns of the file, says so: by a format, or by where its fields are."""
    mapped: Mapped
    labels: Mapping[str, str]

    def fields(self, row: Mapping[str, Any]) -> RowFields:
        return RowFields(row=row, spellings=FORMATS[self.format].spellings, mapped=self.mapped, labels=self.labels)


AS_MESSAGES = Reading(format="messages", is_named=True, mapped=Mapped(columns={}, constants={}), labels={})
"""Of rows that come from no file."""


def reading_of(source: DataSource, row: Mapping[str, Any]) -> Reading:
    """How a source is read: in the format that its config names, or else the only one that its first row fits.

    Raises:
        DataError: if the columns fit no format or several, a column that may matter would be left unread without the config's
            naming the format, or the config names a field or labels that the format does not have.
    """
    if source.format == "auto":
        return _recognised(source, row)
    reading, known = _as(source, source.format), FORMATS[source.format].fields
    if unknown := [field for field in (*source.columns, *source.constants) if field not in known]:
        key = "columns maps" if unknown[0] in source.columns else "constants has"
        raise DataError(
            f"{source.path}: {key} '{unknown[0]}', which is not a field of the format '{source.format}'. "
            f"Its fields are {', '.join(known)}."
        )
    if source.labels and "label" not in known:
        raise DataError(f"{source.path}: labels are of the format classification, but the format is '{source.format}'.")
    if missing := _missing(reading, row):
        raise DataError(
            f"{source.path}: the format '{source.format}' needs the column{'s' * (len(missing) > 1)} {listed(missing)}, "
            f"but the file has {listed(row)}. Map them with `columns`, for example "
            f"`columns: {{{FORMATS[source.format].fields[0]}: {next(iter(row), 'name')}}}`."
        )
    return reading


def reading_of_asked(source: DataSource, row: Mapping[str, Any]) -> Reading:
    """As `reading_of`, for rows that may lack their answers.

    Raises:
        DataError: as that.
    """
    named: list[DataFormat] = [source.format] if source.format != "auto" else list(FORMATS)
    readings = [_as(source, name) for name in named]
    if not any(_knows_all(reading) and not _missing(reading, row) for reading in readings):
        row = next((whole for reading in readings if (whole := with_answer(row, reading)) != row), row)
    return reading_of(source, row)


def with_answer(row: Mapping[str, Any], reading: Reading) -> Mapping[str, Any]:
    """A row with an empty answer, where nothing but its answer is missing."""
    answer = FORMATS[reading.format].answer
    if answer is None or not _knows_all(reading):
        return row
    place = reading.mapped.columns.get(answer, answer)
    return {**row, place: ""} if _missing(reading, row) == [place] else row


def _recognised(source: DataSource, row: Mapping[str, Any]) -> Reading:
    fitting = [reading for name in FORMATS if _fits(reading := _as(source, name), row)]
    readings = [reading for reading in fitting if not any(_reads_more(other, reading, row) for other in fitting)]
    if len(readings) == 1:
        (reading,) = readings
        unread = _telling(_unread(reading, row))
        if unread and not reading.is_named:
            raise DataError(f"{source.path}: {_unread_words(unread, reading.format)}.")
        return reading
    if readings:
        left = {reading.format: _telling(_unread(reading, row)) for reading in readings}
        best = min(left, key=lambda name: len(left[name]))
        each = "; ".join(
            name + (f", by which {listed(columns)} would be left unread" if columns else "") for name, columns in left.items()
        )
        raise DataError(
            f"{source.path}: its columns {listed(row)} fit more than one format ({each}). Say which one with `format`, for "
            f"example `format: {best}`; what that leaves unread is counted in the run's report."
        )
    if set(_PREFERENCES) <= row.keys() and not source.columns:
        raise DataError(_preference_words(source.path, row))
    if doubts := [doubt for name in FORMATS if (doubt := _doubt(_as(source, name), row))]:
        raise DataError(f"{source.path}: {doubts[0]}.")
    needs = "; ".join(f"{name}: {', '.join(format.required)}" for name, format in FORMATS.items())
    mapped = {key: dict(value) for key, value in (("columns", source.columns), ("constants", source.constants)) if value}
    said = "".join(f" with {key} {value}" for key, value in mapped.items()) + " and labels" * bool(source.labels)
    raise DataError(
        f"{source.path}: its columns {listed(row)}{said} fit no format. Formats and the columns they need: {needs}. "
        f"Name the columns, for example `columns: {{prompt: question, completion: answer}}`."
    )


def read_row(row: Mapping[str, Any], reading: Reading, origin: Origin) -> Conversation:
    """Read a row in a format.

    Raises:
        RowError: if a field is missing, null or of the wrong type; or, in a format that was only recognised, if a column that may
            matter would be left unread.
    """
    conversation = FORMATS[reading.format].read(reading.fields(row), origin)
    if (made_by := maker_of(row)) is not None:
        conversation = replace(conversation, made_by=made_by)
    unread = _unread(reading, row)
    if not unread:
        return conversation
    if not reading.is_named and (telling := _telling(unread)):
        raise RowError(_unread_words(telling, reading.format))
    return replace(conversation, unread_columns=tuple(unread))


def _as(source: DataSource, name: DataFormat) -> Reading:
    """The rows of a source read in some format."""
    mapped = Mapped(columns=source.columns, constants=source.constants)
    is_named = source.format != "auto" or set(FORMATS[name].required) <= mapped.fields
    return Reading(format=name, is_named=is_named, mapped=mapped, labels=source.labels)


def _fits(reading: Reading, row: Mapping[str, Any]) -> bool:
    format = FORMATS[reading.format]
    if _doubt(reading, row) is not None or not _knows_all(reading):
        return False
    return not _missing(reading, row) and format.recognises(reading.fields(row))


def _knows_all(reading: Reading) -> bool:
    """Whether a format has all the fields that the config speaks of."""
    known = FORMATS[reading.format].fields
    return reading.mapped.fields <= set(known) and ("label" in known or not reading.labels)


def _doubt(reading: Reading, row: Mapping[str, Any]) -> str | None:
    """Why a format that has all its fields cannot tell which column is one of them."""
    spellings = FORMATS[reading.format].spellings
    given = {field for field in spellings if columns_for(row, spellings[field])} | reading.mapped.fields
    if not set(FORMATS[reading.format].required) <= given:
        return None
    try:
        reading.fields(row).read_places()
    except RowError as error:
        return f"as {reading.format}, a row {error}"
    return None


def _missing(reading: Reading, row: Mapping[str, Any]) -> list[str]:
    """Columns that the row lacks: those of the required fields, and every one that the config maps."""
    format, mapped = FORMATS[reading.format], reading.mapped
    unmapped = [field for field in format.required if field not in mapped.fields]
    absent = [field for field in unmapped if not columns_for(row, format.spellings[field])]
    return absent + [place for place in dict.fromkeys(mapped.columns.values()) if is_missing(found_in(row, place))]


def _reads_more(one: Reading, other: Reading, row: Mapping[str, Any]) -> bool:
    """Whether a format reads all columns of a row that another does, and more. Of a plain document none does: what stands beside
    a text may be about it."""
    ones, others = (reading.fields(row).read_places() & row.keys() for reading in (one, other))
    return other.format != "text" and ones > others


def _unread(reading: Reading, row: Mapping[str, Any]) -> list[str]:
    """Columns with something in them that the format does not read."""
    return list(unread_in(row, reading.fields(row).read_places() | OWN_COLUMNS))


def _telling(columns: Sequence[str]) -> list[str]:
    """Those of some columns that may hold what a model is to learn."""
    return [column for column in columns if not any(_BOOKKEEPING.fullmatch(part) for part in (column, *column.split(".")))]


def _unread_words(columns: Sequence[str], name: DataFormat) -> str:
    hints = "".join(f" {hint}" for column, hint in _HINTS.items() if column in columns)
    return (
        f"the column{'s' * (len(columns) > 1)} {listed(columns)} would be left unread: the format '{name}', recognised by its "
        f"columns, reads {listed(FORMATS[name].fields)}.{hints} If nothing of it is to be trained, say so with "
        f"`format: {name}`, and the run's report counts it; else map what is to be trained with `columns`"
    )


def _preference_words(path: str, row: Mapping[str, Any]) -> str:
    chosen = row["chosen"]
    is_answer = isinstance(chosen, list) and chosen and isinstance(chosen[0], dict) and chosen[0].get("role") == "assistant"
    if isinstance(chosen, list) and not is_answer:
        way = "`columns: {messages: chosen}`"
    elif isinstance(row.get("prompt"), str | list) and (isinstance(chosen, str) or isinstance(row["prompt"], list)):
        way = "`columns: {prompt: prompt, completion: chosen}`"
    elif isinstance(chosen, str) and "prompt" not in row:
        way = "`columns: {text: chosen}`, if it is a whole text"
    else:
        way = "write each prompt and its chosen answer as one chat in a column `messages`"
    return (
        f"{path}: its columns 'chosen' and 'rejected' are preferences, for DPO or a reward model, and raytune does supervised "
        f"fine-tuning only. To train on the chosen answers alone, {'map them: ' if way[0] == '`' else ''}{way}."
    )
