"""Rows as they are trained: tokens of the very code that builds stores, with what of them is a target, how much it counts, and
whose turn it is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from raytune.config.sections.data import DataSource
from raytune.data.conversations.conversation import Conversation, RowError
from raytune.data.conversations.long_chats import AT_TURNS, made_to_fit
from raytune.data.conversations.masking import target_mask
from raytune.data.conversations.shaping import shaped
from raytune.data.files.first_rows import find_first_files
from raytune.data.files.sources import ScannedFile, Segment, scan, unscanned
from raytune.data.formats.augmenting import Augmentation
from raytune.data.rows.shards import ShardPart, ShardTask, Tally, TokenisingOptions, TooLong, resolved_too_long
from raytune.data.rows.source_rows import read_parts, readings_of
from raytune.data.store.store import view
from raytune.data.store.tokenising import tokenise_shard
from raytune.data.stream.recipe import looked_into
from raytune.data.templates.pieces import Piece, TokenKind, pieces_of
from raytune.data.templates.template import ChatTemplate
from raytune.data.templates.text_encoder import TextEncoder, bytes_before

MOST_TOKENS = 4000
"""Of a document that are shown."""

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class RowPlace:
    """A row, as messages name it."""

    file: str
    line: int

    @classmethod
    def of(cls, text: str) -> "RowPlace | None":
        """Of `FILE:LINE`; None if it is written in another way."""
        file, _, line = text.rpartition(":")
        return cls(file, int(line)) if file and line.isascii() and line.isdigit() and int(line) > 0 else None

    def is_in(self, name: str) -> bool:
        """Whether it is in a file of this name, of which it may give the end only."""
        return name == self.file or name.endswith(f"/{self.file.removeprefix('./')}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownDocument:
    """A document as it is trained; a row that is split has several."""

    origin: str
    """File and line."""
    source: str
    input_ids: list[int]
    kinds: list[TokenKind]
    """Of each token."""
    roles: list[str]
    """Of the messages that `kinds` count."""
    pieces: list[Piece]
    """Of its first tokens."""
    made_by: str | None = None
    """Of a row that a model made of another: of which, and who."""

    @property
    def num_hidden(self) -> int:
        """Tokens behind those that `pieces` have."""
        return len(self.input_ids) - sum(piece.num_tokens for piece in self.pieces)

    @property
    def num_targets(self) -> int:
        return sum(kind.is_target for kind in self.kinds)

    @property
    def turns(self) -> list[tuple[str, list[Piece]]]:
        """Role and pieces of each turn. What the template writes between two goes with the second one; of plain text, and where
        it cannot be told whose turn it is, the role is empty."""
        turns: list[tuple[int | None, list[Piece]]] = []
        waiting: list[Piece] = []
        for piece in self.pieces:
            if turns and not waiting and piece.kind.turn is None and not piece.text.strip():
                turns[-1][1].append(piece)  # a line end behind a turn
                continue
            waiting.append(piece)
            if (turn := piece.kind.turn) is None:
                continue
            if turns and turns[-1][0] == turn:
                turns[-1][1].extend(waiting)
            else:
                turns.append((turn, waiting))
            waiting = []
        if waiting and turns:
            turns[-1][1].extend(waiting)
        elif waiting:
            turns.append((None, waiting))
        return [("" if turn is None else self.roles[turn], pieces) for turn, pieces in turns]

    def to_json(self) -> dict[str, Any]:
        kinds = [asdict(kind) for kind in self.kinds]
        return {
            "origin": self.origin,
            "source": self.source,
            "num_tokens": len(self.input_ids),
            "num_targets": self.num_targets,
            "made_by": self.made_by,
            "roles": self.roles,
            "input_ids": self.input_ids,
            **{name: [kind[name] for kind in kinds] for name in ("is_target", "weight", "turn", "is_special")},
            "pieces": [{"text": piece.text, "num_tokens": piece.num_tokens} | asdict(piece.kind) for piece in self.pieces],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownRows:
    """The rows of a source that were asked for."""

    documents: list[ShownDocument]
    tally: Tally
    """What became of them, those without a document too."""
    was_found: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Previewer:
    """How the rows of a run become tokens.

    Args:
        chat: None where all rows are plain text.
    """

    options: TokenisingOptions
    augmentation: Augmentation | None
    """What is made of rows beside themselves."""
    is_streamed: bool
    """Whether files are larger than anybody reads through for their first rows."""
    too_long: Any
    encoder: TextEncoder
    chat: ChatTemplate | None

    def rows(self, source: DataSource, name: str, loss_weight: float, wanted: int | RowPlace) -> ShownRows:
        """The first rows of a source, or the ones at a place.

        Args:
            name: of the source, as in metrics.
            loss_weight: that each of its targets has besides.

        Raises:
            DataError: if its format cannot be told, or it has no good row.
        """
        with TemporaryDirectory() as folder, self._files(source, Path(folder), wanted) as files:
            (reading,) = readings_of([source], [files])
            parts = [
                ShardPart(segment=segment, file_index=index, reading=reading, fingerprint=file.fingerprint, only_line=line)
                for index, file in enumerate(files)
                for segment, line in _segments(file, wanted, is_limited=source.max_rows is not None)
            ]
            most = min(wanted, source.max_rows or wanted) if isinstance(wanted, int) else source.max_rows
            task = ShardTask(
                number=0,
                source=0,
                parts=tuple(parts),
                max_rows=most,
                too_long=resolved_too_long(self.too_long, reading.format),
                options=self.options,
                augmentation=self.augmentation,
                output=f"{folder}/rows",
            )
            made = tokenise_shard(task)
            tally = made.tally
            options = self.options
            read = read_parts(parts, most, Tally(), options.side, options.split, augmentation=self.augmentation)
            rows: dict[tuple[int, int], list[Conversation]] = {}
            for row, file_index in read:
                for piece in shaped(row, options.shape, options.targets).pieces:
                    rows.setdefault((file_index, row.origin.line), []).extend(self._made_of(piece, task.too_long))
            documents = [
                self._shown(rows[document.place], name, loss_weight, document, task.too_long)
                for document in _documents(made.path)
            ]
        return ShownRows(documents=documents, tally=tally, was_found=tally.counts["rows"] > 0)

    @contextmanager
    def _files(self, source: DataSource, downloads: Path, wanted: int | RowPlace) -> Iterator[list[ScannedFile]]:
        if self.is_streamed and isinstance(wanted, int):
            with looked_into(source) as files:
                yield [unscanned(file) for file in files]
        else:
            first = min(wanted, source.max_rows or wanted) if isinstance(wanted, int) else source.max_rows
            files = find_first_files(source.model_copy(update={"max_rows": first}), downloads)
            yield [scan(file, source.max_rows) for file in files]

    def _shown(
        self,
        candidates: Sequence[Conversation],
        source: str,
        loss_weight: float,
        document: "_Document",
        too_long: TooLong,
    ) -> ShownDocument:
        """Args:
        candidates: the rows on the document's line, of which it is one.
        """
        ids = document.input_ids
        step = self.options.max_length - 1 if too_long == "split" else 0
        turns: list[int | None] = [None] * len(ids)
        row = candidates[0]
        for row in candidates:
            whole, of_turn = self._turns_of(row)
            at = next((at for at in _beginnings(len(whole), step) if np.array_equal(whole[at : at + len(ids)], ids)), None)
            if at is not None:
                turns = of_turn[at : at + len(ids)]
                break
        weights = document.target_weights * np.float32(loss_weight)
        kinds = [
            TokenKind(
                is_target=bool(target),
                weight=float(weight) if target else 1.0,
                turn=turn,
                is_special=bool(self.encoder.is_special[token]),
            )
            for token, target, weight, turn in zip(ids, document.is_target, weights, turns, strict=True)
        ]
        return ShownDocument(
            origin=str(row.origin),
            source=source,
            input_ids=ids.tolist(),
            kinds=kinds,
            roles=[str(message["role"]) for message in row.messages],
            pieces=pieces_of(ids[:MOST_TOKENS].tolist(), kinds[:MOST_TOKENS], self.encoder.text_of),
            made_by=row.made_by,
        )

    def _made_of(self, row: Conversation, too_long: TooLong) -> list[Conversation]:
        """The conversations that documents are made of: of one that is too long its pieces, where turns divide it."""
        if self.chat is None or row.text is not None or too_long not in AT_TURNS:
            return [row]
        try:
            if self._length(row) <= self.options.max_length:
                return [row]
            return made_to_fit(
                row,
                self.options.max_length,
                too_long,
                self._length,
                self.encoder.starts_of,
                is_last_trained_alone=self.options.targets == "last",
            )
        except RowError:  # it has no document
            return [row]

    def _length(self, row: Conversation) -> int:
        assert self.chat is not None
        rendered = self.chat.render([row], self.options.targets)[0]
        if isinstance(rendered, RowError):
            raise rendered
        return len(self.encoder.encode([rendered.text]).input_ids)

    def _turns_of(self, row: Conversation) -> tuple[np.ndarray, list[int | None]]:
        """The tokens of a whole chat, and the turn of each; without any of plain text, or if they cannot be told."""
        nothing: tuple[np.ndarray, list[int | None]] = np.empty(0, np.int32), []
        if self.chat is None or row.text is not None:
            return nothing
        rendered = self.chat.render([row], self.options.targets)[0]
        if isinstance(rendered, RowError):
            return nothing
        text = rendered.text
        encoded = self.encoder.encode([text])
        to_byte = bytes_before(text)
        turns: list[int | None] = [None] * len(encoded.input_ids)
        for turn, message in enumerate(row.messages):
            if message["role"] not in _ROLES:
                continue
            # As if this turn alone were trained.
            others = tuple(
                {key: value for key, value in other.items() if key != "train"} | ({} if index == turn else {"train": False})
                for index, other in enumerate(row.messages)
            )
            alone = self.chat.render([replace(row, messages=others)], _ROLES)[0]
            if isinstance(alone, RowError):
                continue
            spans = [(start, stop) for start, stop in alone.targets if alone.text[:stop] == text[:stop]]
            places = np.array([(to_byte[start], to_byte[stop]) for start, stop in spans], np.int64).reshape(-1, 2)
            for token in np.flatnonzero(target_mask(encoded.starts, encoded.ends, places[:, 0], places[:, 1])):
                turns[token] = turn
        return encoded.input_ids, turns


def _segments(file: ScannedFile, wanted: int | RowPlace, *, is_limited: bool) -> list[tuple[Segment, int | None]]:
    """The parts of a file that have to be read, and the only line of each that is wanted.

    Args:
        is_limited: whether only the first rows of the source are trained, so that those before one count.
    """
    if isinstance(wanted, int):
        return [(segment, None) for segment in file.segments]
    line = wanted.line if wanted.is_in(file.file.name) else 0
    if is_limited:
        return [(segment, line) for segment in file.segments]
    begun = [segment for segment in file.segments if line and segment.first_line <= line]
    return [(segment, line) for segment in begun[-1:]]


def _beginnings(length: int, step: int) -> Iterator[int]:
    """Where a piece of a row may begin."""
    yield from range(0, length, step) if step > 0 else (0,)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Document:
    """A document of a shard."""

    place: tuple[int, int]
    """File and line."""
    input_ids: np.ndarray
    is_target: np.ndarray
    target_weights: np.ndarray


def _documents(path: str) -> Iterator[_Document]:
    """The documents of a shard, in order."""
    with pa.memory_map(path) as mapped:
        reader = pa.ipc.open_file(mapped)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            for index in range(batch.num_rows):
                place = int(view(batch.column("file"), np.int32)[index]), int(view(batch.column("line"), np.int64)[index])
                ids = np.array(batch.column("input_ids")[index].as_py(), np.int32)
                weights = batch.column("target_weights")[index].as_py()
                yield _Document(
                    place=place,
                    input_ids=ids,
                    is_target=np.array(batch.column("is_target")[index].as_py(), bool),
                    target_weights=np.ones(len(ids), np.float32) if weights is None else np.array(weights, np.float32),
                )
