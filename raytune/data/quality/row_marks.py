"""What stands for a row where rows are compared: digests, a signature, passages. Made a shard at a time, in any process."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raytune.data.conversations.conversation import NOT_FOR_TEMPLATES, Conversation, Message
from raytune.data.conversations.fields import REASONING
from raytune.data.quality.passages import hashes_of, only_words, runs_of, script_of, shingles_of, words_and_signs
from raytune.data.quality.signatures import NUM_OF_ANSWER, NUM_OF_ROW, SHINGLE_WORDS, bands_for, bands_of, signatures_of
from raytune.data.rows.shards import ShardPart, Tally
from raytune.data.rows.source_rows import read_parts
from raytune.data.rows.split import EVERY_ROW_TRAINS, Side, Split

_ROWS_AT_ONCE = 256
_PASSAGES, _ROWS_OF_PASSAGES = "passages.npy", "rows_of_passages.npy"
# U+0085 is a line break of its own.
_DAMAGED = re.compile("[\0\x80-\x84\x86-\x9f\ufffd]")
_NONE = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkTask:
    """Rows to mark: those that `read_parts` gives."""

    parts: tuple[ShardPart, ...]
    max_rows: int | None
    side: Side | Literal["all"] = "all"
    split: Split = EVERY_ROW_TRAINS
    near_similarity: float | None = None
    """None: no signatures."""
    ngram_words: int = 0
    """Of a passage."""
    passages: str | None = None
    """Folder with what `save_passages` left; None: they are not looked for."""
    keeps_passages: bool = False
    """Whether the rows are a benchmark's, whose passages are to be looked for, and whose answers may be missing."""
    output: str
    """Folder that is made, with a file for each array."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """What was found out about the rows of a task, besides the arrays in its folder."""

    folder: str
    num_rows: int
    scripts: Counter[str] = field(default_factory=Counter)
    """Rows by the script of most of their letters."""
    labels: Counter[str] = field(default_factory=Counter)
    """Rows by their class, where they have one."""


class Marks:
    """The marks of many rows. Those with a few bytes a row are read, the rest is mapped from the folders of their tasks."""

    def __init__(self, marked: Sequence[Marked]) -> None:
        self._folders = [Path(one.folder) for one in marked if one.num_rows]
        self._starts = np.cumsum([0, *(one.num_rows for one in marked if one.num_rows)])
        self._maps: dict[str, list[np.ndarray]] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def contents(self) -> np.ndarray:
        """Digests of all that a template sees of a row, and of the weights of its turns: two uint64."""
        return self._joined("contents", np.empty((0, 2), np.uint64))

    @cached_property
    def prompts(self) -> np.ndarray:
        """Digests of what stands before the last answer: uint64; 0: there is none."""
        return self._joined("prompts", np.empty(0, np.uint64))

    @cached_property
    def answers(self) -> np.ndarray:
        """Digests of the last answer, white space around it aside: uint64."""
        return self._joined("answers", np.empty(0, np.uint64))

    @cached_property
    def files(self) -> np.ndarray:
        return self._joined("files", np.empty(0, np.int32))

    @cached_property
    def lines(self) -> np.ndarray:
        return self._joined("lines", np.empty(0, np.int64))

    @cached_property
    def damage(self) -> np.ndarray:
        """The first character of a row that stands for lost text, or -1."""
        return self._joined("damage", np.empty(0, np.int32))

    @cached_property
    def num_words(self) -> np.ndarray:
        """Of the last answer, or the text."""
        return self._joined("num_words", np.empty(0, np.int32))

    @cached_property
    def have_words(self) -> np.ndarray:
        """Whether a row has words to be compared by."""
        return self._joined("have_words", np.empty(0, bool))

    @cached_property
    def copied_from(self) -> np.ndarray:
        """The first row of a benchmark that has a passage of the row, or -1."""
        return self._joined("copied_from", np.empty(0, np.int64))

    @cached_property
    def num_copied(self) -> np.ndarray:
        """Passages of a row that benchmarks have."""
        return self._joined("num_copied", np.empty(0, np.int32))

    @cached_property
    def num_passages(self) -> np.ndarray:
        """Different passages of a row."""
        return self._joined("num_passages", np.empty(0, np.int32))

    @property
    def num_bands(self) -> int:
        return len(self._mapped("bands")[0]) if self._folders else 0

    def band(self, number: int) -> np.ndarray:
        """uint64 of each row: equal where a band of signatures is."""
        return np.concatenate([np.empty(0, np.uint64), *(one[number] for one in self._mapped("bands"))])

    def signatures(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Signatures of some rows, or of their answers."""
        maps = self._mapped(name)
        found = np.empty((len(rows), maps[0].shape[1] if maps else 1), np.uint32)
        shards = np.searchsorted(self._starts, rows, "right") - 1
        for shard in np.unique(shards):
            here = shards == shard
            found[here] = maps[shard][rows[here] - self._starts[shard]]
        return found

    def _joined(self, name: str, none: np.ndarray) -> np.ndarray:
        return np.concatenate([none, *self._mapped(name)])

    def _mapped(self, name: str) -> list[np.ndarray]:
        if name not in self._maps:
            self._maps[name] = [np.load(folder / f"{name}.npy", mmap_mode="r") for folder in self._folders]
        return self._maps[name]


def mark_rows(task: MarkTask) -> Marked:
    """Mark the good rows of a task, in their order."""
    rows = read_parts(task.parts, task.max_rows, Tally(), task.side, task.split, are_asked=task.keeps_passages)
    known = None if task.passages is None else _KnownPassages(Path(task.passages))
    scripts, labels, marks, num_rows = Counter(), Counter(), [], 0
    reading = task.parts[0].reading if task.parts else None
    while some := list(islice(rows, _ROWS_AT_ONCE)):
        batch = [_row(conversation, file) for conversation, file in some]
        scripts.update(script_of(row.text) for row in batch)
        if reading is not None and reading.format == "classification":
            labels.update(row.answer for row in batch)
        marks.append(_marks_of(batch, task, known, num_rows))
        num_rows += len(batch)
    output = Path(task.output)
    output.mkdir(parents=True)
    for name in marks[0] if marks else ():
        np.save(output / f"{name}.npy", np.concatenate([one[name] for one in marks], axis=1 if name == "bands" else 0))
    return Marked(folder=task.output, num_rows=num_rows, scripts=scripts, labels=labels)


def save_passages(benchmarks: Sequence[Marked], folder: Path, most_rows: int) -> None:
    """Write the passages of benchmarks as `mark_rows` looks for them.

    Args:
        most_rows: that a passage may be in and still tell which row was copied.
    """
    marks = [(Path(one.folder), first) for one, first in _with_first_rows(benchmarks) if one.num_rows]
    passages = [np.load(one / _PASSAGES) for one, _ in marks]
    rows = [np.load(one / _ROWS_OF_PASSAGES) + first for one, first in marks]
    found, starts, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *passages]), return_index=True, return_counts=True)
    folder.mkdir()
    np.save(folder / _PASSAGES, found[counts <= most_rows])
    np.save(folder / _ROWS_OF_PASSAGES, np.concatenate([np.empty(0, np.int64), *rows])[starts[counts <= most_rows]])


# --- Details -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """The texts of a row that are compared."""

    content: bytes
    """Digest of all that a template sees of it, and of the weights of its turns."""
    prompt: int
    """Digest of what stands before the last answer; 0: there is none."""
    last: int
    """Digest of the last answer, white space around it aside."""
    text: str
    """Of all turns but system prompts."""
    pieces: tuple[str, ...]
    """Texts of all turns."""
    answer: str
    file: int
    line: int


def _row(conversation: Conversation, file: int) -> _Row:
    messages, origin = conversation.messages, conversation.origin
    turns = [_text_of(message) for message in messages]
    pieces = tuple(turns) if conversation.text is None else (conversation.text,)
    last = next((turn for turn in reversed(range(len(messages))) if messages[turn]["role"] == "assistant"), None)
    before = [_for_templates(message) for message in messages[:last]] if last else []
    prompt = _digest([before, conversation.tools], 8) if any(message["role"] == "user" for message in before) else b""
    return _Row(
        content=_digest([messages, conversation.tools, conversation.text], 16),
        prompt=int.from_bytes(prompt, "little"),
        last=0 if last is None else int.from_bytes(_digest(turns[last].strip(), 8), "little"),
        text="\n".join(text for text, message in zip(pieces, messages or ({"role": ""},)) if message["role"] != "system"),
        pieces=pieces,
        answer="" if last is None else turns[last],
        file=file,
        line=origin.line,
    )


def _with_first_rows(marked: Sequence[Marked]) -> Iterator[tuple[Marked, int]]:
    first = 0
    for one in marked:
        yield one, first
        first += one.num_rows


def _text_of(message: Message) -> str:
    texts = [message.get("content"), *(message.get(key) for key in REASONING)]
    calls = json.dumps(message["tool_calls"], ensure_ascii=False, default=str) if message.get("tool_calls") else ""
    return "\n".join(text for text in (*texts, calls) if isinstance(text, str) and text)


def _damage(pieces: Sequence[str]) -> int:
    return next((ord(found[0]) for piece in pieces if (found := _DAMAGED.search(piece))), -1)


def _for_templates(message: Message) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in NOT_FOR_TEMPLATES}


def _digest(value: Any, size: int) -> bytes:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=size).digest()


def _marks_of(rows: Sequence[_Row], task: MarkTask, known: "_KnownPassages | None", first_row: int) -> dict[str, np.ndarray]:
    marks: dict[str, np.ndarray] = {
        "contents": np.frombuffer(b"".join(row.content for row in rows), np.uint64).reshape(-1, 2),
        "prompts": np.array([row.prompt for row in rows], np.uint64),
        "answers": np.array([row.last for row in rows], np.uint64),
        "files": np.array([row.file for row in rows], np.int32),
        "lines": np.array([row.line for row in rows], np.int64),
        "damage": np.array([_damage(row.pieces) for row in rows], np.int32),
        "num_words": np.array([len(row.answer.split()) or len(row.text.split()) for row in rows], np.int32),
    }
    if task.near_similarity is not None:
        shingles, of_answers = (
            [shingles_of(hashes_of(words_and_signs(text)), SHINGLE_WORDS) for text in texts]
            for texts in ([row.text for row in rows], [row.answer for row in rows])
        )
        signatures = signatures_of(shingles, NUM_OF_ROW)
        marks |= {
            "signatures": signatures,
            "signatures_of_answers": signatures_of(of_answers, NUM_OF_ANSWER),
            "bands": bands_of(signatures, *bands_for(task.near_similarity)),
            "have_words": np.array([len(one) > 0 for one in shingles]),
        }
    if task.keeps_passages or known is not None:
        passages = [_passages(row, task.ngram_words) for row in rows]
        marks["num_passages"] = np.array(list(map(len, passages)), np.int32)
        marks |= _kept(passages, first_row) if known is None else known.found_in(passages)
    return marks


def _passages(row: _Row, num_words: int) -> np.ndarray:
    """Those of a row, each once. None goes from one turn to the next."""
    runs = [runs_of(hashes_of(only_words(words_and_signs(piece))), num_words) for piece in row.pieces]
    return np.unique(np.concatenate(runs)) if runs else np.empty(0, np.uint64)


def _kept(passages: Sequence[np.ndarray], first_row: int) -> dict[str, np.ndarray]:
    rows = np.arange(first_row, first_row + len(passages))
    return {"passages": np.concatenate(passages), "rows_of_passages": np.repeat(rows, list(map(len, passages)))}


class _KnownPassages:
    """Passages of benchmarks, mapped, and the benchmark's row that each is in."""

    def __init__(self, folder: Path) -> None:
        self._passages, self._rows = (np.load(folder / name, mmap_mode="r") for name in (_PASSAGES, _ROWS_OF_PASSAGES))

    def found_in(self, passages: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """For each row, the first benchmark's row that one of its passages is in, or -1, and how many of them are in any."""
        each = np.concatenate(passages)
        places = np.searchsorted(self._passages, each)
        is_known = np.zeros(len(each), bool)
        inside = places < len(self._passages)
        is_known[inside] = self._passages[places[inside]] == each[inside]
        rows = np.repeat(np.arange(len(passages)), list(map(len, passages)))[is_known]
        copied_from = np.full(len(passages), _NONE)
        np.minimum.at(copied_from, rows, self._rows[places[is_known]])
        num_copied = np.bincount(rows, minlength=len(passages)).astype(np.int32)
        return {"copied_from": np.where(num_copied > 0, copied_from, -1), "num_copied": num_copied}
