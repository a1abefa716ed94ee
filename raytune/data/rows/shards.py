"""What passes between the builder of a store and the processes that tokenise its shards: tasks, results, and tallies of rows."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

from raytune.config.sections.data import DataFormat
from raytune.config.sections.model import NewToken
from raytune.data.conversations.conversation import Origin
from raytune.data.conversations.masking import Targets
from raytune.data.conversations.shaping import Shape
from raytune.data.conversations.token_classes import TokenClass
from raytune.data.files.sources import Segment
from raytune.data.formats.augmenting import Augmentation
from raytune.data.formats.recognising import Reading
from raytune.data.rows.split import Side, Split
from raytune.errors import DataError
from raytune.plan.data.data_report import COUNTS

TooLong = Literal["truncate", "truncate_left", "drop", "split", "split_turns", "error"]
"""What is done with a long document: `data.too_long` without `auto`."""

ParallelMap = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""Calls a function on every task and gives each result when it is there, in whichever order."""

NUM_EXAMPLES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenisingOptions:
    """What is done with every row of every source."""

    tokenizer_path: str
    tokenizer_revision: str | None
    trust_remote_code: bool
    new_tokens: tuple[NewToken, ...]
    tokenizer_fingerprint: str
    template: str
    shape: Shape
    targets: Targets
    train_empty_thought: bool
    token_classes: tuple[TokenClass, ...]
    max_length: int
    side: Side | Literal["all"]
    split: Split


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPart:
    """A segment of a file and how its rows are read."""

    segment: Segment
    file_index: int
    reading: Reading
    fingerprint: str
    """Of the whole file."""
    only_line: int | None = None
    """Where the only rows of it stand that are wanted; 0: nowhere, it is read for its number of rows. None: all are wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    number: int
    """Which shard of the request it is."""
    source: int
    """Which source of the request it is a part of."""
    parts: tuple[ShardPart, ...]
    max_rows: int | None
    """Rows that are read at most."""
    too_long: TooLong
    options: TokenisingOptions
    augmentation: Augmentation | None = None
    """What is made of its rows beside themselves."""
    output: str
    """Folder that is written (`finished_shards`)."""
    left_out: bytes | None = None
    """A bool for each row that `read_parts` gives: whether it is left out (`quality`). None: none is."""


@dataclass(slots=True)
class Tally:
    """What happened to rows, by the names of `SourceReport`: counts, and the first few of each with their place."""

    most_examples: int = NUM_EXAMPLES

    counts: Counter[str] = field(default_factory=Counter)
    unread_columns: Counter[str] = field(default_factory=Counter)
    unread_keys: Counter[str] = field(default_factory=Counter)
    targets_of_class: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    """Rows by bucket of `plan.data.row_lengths`."""
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, origin: Origin | None = None, reason: str = "") -> None:
        self.counts[what] += 1
        if origin is not None and len(examples := self.examples.setdefault(what, [])) < self.most_examples:
            examples.append(f"{origin}: {reason}" if reason else str(origin))

    def as_json(self) -> dict[str, Any]:
        """What `of` makes an equal tally of."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The tally that `as_json` was asked of."""
        empty = cls()
        tally = cls(**{name: type(getattr(empty, name))(value) for name, value in values.items()})
        tally.lengths = Counter({int(bucket): rows for bucket, rows in tally.lengths.items()})  # keys of JSON are text
        return tally

    def merge(self, other: "Tally") -> None:
        self.counts.update(other.counts)
        self.unread_columns.update(other.unread_columns)
        self.unread_keys.update(other.unread_keys)
        self.targets_of_class.update(other.targets_of_class)
        self.lengths.update(other.lengths)
        for what, examples in other.examples.items():
            mine = self.examples.setdefault(what, [])
            mine.extend(examples[: self.most_examples - len(mine)])


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResult:
    number: int
    source: int
    path: str
    """Arrow file."""
    tally: Tally
    was_found: bool
    """Whether it was done before."""


def resolved_too_long(policy: TooLong | Literal["auto"], name: DataFormat) -> TooLong:
    """What `data.too_long` means for the rows of a format: a cut document of plain text would lose most of a book, and a cut chat
    only its last answers. Plain text has no turns to be split at."""
    if policy == "auto":
        return "split" if name == "text" else "truncate"
    return "split" if policy == "split_turns" and name == "text" else policy


def in_report(tally: Tally, classes: Sequence[TokenClass]) -> dict[str, Any]:
    """The fields of a `SourceReport` that a tally has."""
    return {
        "unread_columns": dict(tally.unread_columns),
        "unread_keys": dict(tally.unread_keys),
        "lengths": [tally.lengths[bucket] for bucket in range(max(tally.lengths, default=-1) + 1)],
        "targets_of_class": {str(one): tally.targets_of_class[str(one)] for one in classes},
        "examples": tally.examples,
        **{count: tally.counts[count] for count in COUNTS},
    }


def bad_rows_error(tally: Tally) -> DataError:
    return _rows_error(tally, "bad", "cannot be used", "Repair them, or leave them out with data.on_bad_row: skip.")


def bad_questions_error(tally: Tally, key: str) -> DataError:
    """Args:
    key: of the config, that names the rows.
    """
    error = _rows_error(tally, "bad", f"of {key} cannot be asked", "Repair them, or name a file without them: each one is asked.")
    error.keys = (key,)
    return error


def too_long_error(tally: Tally, max_length: int) -> DataError:
    return _rows_error(
        tally,
        "dropped",
        f"are longer than data.max_length, {max_length} tokens",
        "Raise data.max_length, or set data.too_long to truncate, truncate_left, drop, split or split_turns.",
    )


def found_rows_error(finding: str, count: int, examples: Sequence[str]) -> DataError:
    """Args:
    finding: a policy of `data.quality`, which is `error`.
    """
    rows = "1 row is" if count == 1 else f"{count} rows are"
    key = f"data.quality.{finding}"
    words = finding.replace("_", " ")
    fix = f"Repair the files, or set {key} to drop or keep."
    error = _counted_error(f"{rows} among the {words} ({key}: error):", count, examples, fix)
    error.keys = (key,)
    return error


def _rows_error(tally: Tally, what: str, are: str, fix: str) -> DataError:
    count = tally.counts[what]
    rows = "1 row" if count == 1 else f"{count} rows"
    return _counted_error(f"{rows} {are}:", count, tally.examples[what], fix)


def _counted_error(what: str, count: int, examples: Sequence[str], fix: str) -> DataError:
    more = [f"  and {count - len(examples)} more"] if count > len(examples) else []
    return DataError("\n".join([what, *(f"  {example}" for example in examples), *more, fix]))
