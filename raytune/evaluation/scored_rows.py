"""Rows with the loss that a model has on them, and tables of such rows: JSON Lines or CSV. Pure."""

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from io import StringIO
from typing import Any, Self

from raytune.evaluation.perplexity import perplexity
from raytune.metrics.json_numbers import decode_number, encode_number

TABLES = (".jsonl", ".csv")
"""How the name of a table may end."""
COLUMNS = ("file", "row", "targets", "loss", "perplexity")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRow:
    file: str
    """As it was named."""
    row: int
    """Its number in the file, from 1: a line, or in a Parquet file or data set a row."""
    targets: int
    """Tokens that the loss is a mean of."""
    loss: float
    """Mean cross-entropy per target, in nats."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The row that `to_json` was asked of."""
        return cls(file=values["file"], row=values["row"], targets=values["targets"], loss=decode_number(values["loss"]))

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    def to_json(self) -> dict[str, Any]:
        """Its values by `COLUMNS`."""
        values = (self.file, self.row, self.targets, encode_number(self.loss), encode_number(self.perplexity))
        return dict(zip(COLUMNS, values, strict=True))


def jsonl_table(rows: Iterable[ScoredRow]) -> bytes:
    """A line per row."""
    return "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows).encode()


def csv_table(rows: Iterable[ScoredRow]) -> bytes:
    """A line with the names of the columns, and one per row."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(row.to_json().values() for row in rows)
    return text.getvalue().encode()


def read_jsonl_table(table: bytes) -> tuple[ScoredRow, ...]:
    """The rows that `jsonl_table` was given."""
    return tuple(ScoredRow.from_json(json.loads(line)) for line in table.split(b"\n")[:-1])
