"""Rows of a run as they are trained, for a person: which rows are shown, and the same as text without colours."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune.config.sections.data import DataSource, named_sources
from raytune.config.sections.row_sources import trained_sources, weighed_sources
from raytune.config.sections.run import RunConfig
from raytune.data.files.source_files import find_files
from raytune.data.preview import RowPlace, ShownDocument
from raytune.data.rows.shards import Tally
from raytune.data.templates.pieces import Piece
from raytune.errors import UserError
from raytune.launch.data.data_check import data_builder
from raytune.launch.data.prepare import Base
from raytune.plan.data.mixing import loss_weights_of
from raytune.printable import printable
from raytune.storage import is_local

USUAL_ROWS = 3
"""Of each source."""
OPENS, CLOSES = "⟦", "⟧"
"""Around what is trained, where there are no colours."""

WEIGHT_WORDS = "x0.5 in front of it is how much each of its tokens counts; line ends are ↵."

_WHY = {
    "bad": "cannot be read or rendered",
    "no_target": "nothing in it is to be trained",
    "cut_off": "all that would be trained lies behind data.max_length",
    "dropped": "longer than data.max_length, and left out",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPreview:
    """Rows as they are trained."""

    documents: list[ShownDocument]
    lost: list[str]
    """Rows that were asked for and have no document, and why."""
    notes: list[str]
    """What there is to know of the template."""

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": True,
            "documents": [document.to_json() for document in self.documents],
            "lost": self.lost,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        """Without colours: what is trained stands in brackets."""
        lines = [f"What is trained stands in {OPENS}brackets{CLOSES}; {WEIGHT_WORDS}"]
        for document in self.documents:
            lines += ["", heading(document), *marked_lines(document)]
        return "\n".join([*lines, *([""] if self.lost else []), *self.lost, *self.notes])


def preview_data(config: RunConfig, *, rows: int = USUAL_ROWS, source: str | None = None, row: str | None = None) -> DataPreview:
    """Rows of a run as they are trained.

    Args:
        rows: of each source, the first ones.
        source: name of the only one that is meant; by default all that are trained on.
        row: `FILE:LINE` of the only row that is meant; of the file, the end of its name is enough.

    Raises:
        UserError: if there is no such source or row.
    """
    wanted: int | RowPlace = rows
    if row is not None:
        if (place := RowPlace.of(row)) is None:
            raise UserError(f"--row is {row!r}, expected FILE:LINE as messages about rows have it, such as rows.jsonl:17.")
        wanted = place
    base = Base.of(config.model)
    builder = data_builder(config.model_copy(update={"model": base.section}), base, map)
    documents, lost, was_found = [], [], False
    chosen = _chosen(config, source, everywhere=row is not None)
    for name, (one, is_trained, loss_weight) in chosen.items():
        if isinstance(wanted, RowPlace) and not _may_hold(one, wanted):
            continue
        shown = builder.previewer(is_trained=is_trained).rows(one, name, loss_weight, wanted)
        was_found = was_found or shown.was_found
        documents += shown.documents
        lost += _lost(name, shown.tally)
    if row is not None and not was_found:
        files = ", ".join(one.path for one, _, _ in chosen.values())
        raise UserError(f"There is no row {row}: none of {files} has it. A blank line is no row.")
    return DataPreview(documents=documents, lost=lost, notes=builder.template_notes)


def heading(document: ShownDocument) -> str:
    """Where a document is from, and how much of it is trained."""
    num_tokens, num_targets = len(document.input_ids), document.num_targets
    weights = sorted({kind.weight for kind in document.kinds if kind.is_target})
    weighed = "" if weights == [1.0] else f", weights {', '.join(f'{weight:.4g}' for weight in weights)}"
    made = f"; made of {document.made_by}" if document.made_by else ""
    return f"{document.origin}: {num_tokens} tokens, {num_targets} of them trained{weighed}{made}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownPiece:
    """A piece as it is written, in a terminal or on a page."""

    weight: str
    """In front of it: how much each of its tokens counts, where that is not 1 or is another than just before."""
    text: str
    """With a sign for each line end, and escapes for all that would be obeyed and not seen."""
    is_target: bool
    is_special: bool
    goes_on: bool
    """Whether it stands in the same brackets as the one before it."""


def written(pieces: Sequence[Piece]) -> list[ShownPiece]:
    """The pieces of a turn for who reads them."""
    shown, before = [], None
    for piece in pieces:
        kind = piece.kind
        was = before.weight if before is not None and before.is_target else None
        has_mark = kind.is_target and (kind.weight != 1 if was is None else kind.weight != was)
        shown.append(
            ShownPiece(
                weight=f"x{kind.weight:.4g}" if has_mark else "",
                text=printable(piece.text.replace("\x1b", "\\u001b").replace("\r", "\\u000d")).replace("\n", "↵\n"),
                is_target=kind.is_target,
                is_special=kind.is_special,
                goes_on=kind.is_target and kind.weight == was,
            )
        )
        before = kind
    return shown


def marked_lines(document: ShownDocument) -> list[str]:
    """A document without colours, each line with the role whose turn it is."""
    lines = []
    for role, pieces in document.turns:
        text, shown = "", written(pieces)
        for piece, after in zip(shown, [*shown[1:], None]):
            text += OPENS if piece.is_target and not piece.goes_on else ""
            text += f"{piece.weight} {piece.text}" if piece.weight else piece.text
            if piece.is_target and not (after and after.goes_on):  # on the last line that has something of it
                text = f"{text[:-1]}{CLOSES}\n" if text.endswith("\n") else f"{text}{CLOSES}"
        lines += [f"{role if number == 0 else '':>9} | {line}" for number, line in enumerate(text.removesuffix("\n").split("\n"))]
    return [*lines, *([f"{'':>9} | … {document.num_hidden} more tokens"] if document.num_hidden else [])]


def _chosen(config: RunConfig, name: str | None, *, everywhere: bool) -> dict[str, tuple[DataSource, bool, float]]:
    """Sources by name, whether they are trained on, and how much each of their targets counts.

    Raises:
        UserError: if there is none of that name.
    """
    trained = named_sources(trained_sources(config))
    weights = loss_weights_of(config) or (1.0,) * len(trained)
    known = {each: (source, True, weight) for (each, source), weight in zip(trained.items(), weights, strict=True)}
    others = {**named_sources(config.data.validation), **named_sources(weighed_sources(config))}
    for each, source in others.items():
        known.setdefault(each if each not in known else f"{each} (held out)", (source, False, 1.0))
    if name is not None:
        if name not in known:
            raise UserError(f"--source is {name!r}, but the sources of the run are {', '.join(known)}.")
        return {name: known[name]}
    return known if everywhere else {each: one for each, one in known.items() if one[1]}


def _may_hold(source: DataSource, place: RowPlace) -> bool:
    """Whether a source has a file of that name; of one that is elsewhere only reading it tells."""
    if source.path.startswith("demo:") or not is_local(source.path):
        return place.file in source.path or not source.path.startswith("demo:")
    return any(place.is_in(file.name) for file in find_files(source, Path()))


def _lost(name: str, tally: Tally) -> list[str]:
    """Rows without a document, and why."""
    lines = []
    for what, why in _WHY.items():
        examples: Sequence[str] = tally.examples.get(what, [])
        lines += [f"{example}: {why}" if what != "bad" else f"{example} ({why})" for example in examples]
        if (more := tally.counts[what] - len(examples)) > 0:
            lines.append(f"{name}: {more} more rows: {why}")
    if other := tally.counts["other_side"] + tally.counts["test_side"]:
        lines.append(f"{name}: {other} row{'s' * (other != 1)} on another side of the split, and so not trained")
    if made := tally.counts["origin_held_out"]:
        lines.append(f"{name}: {made} row{'s' * (made != 1)} made of others that are held out, and so not trained")
    return lines
