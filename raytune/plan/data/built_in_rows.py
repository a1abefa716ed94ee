"""How much there is of the rows that raytune makes itself (`demo:train`), which a plan knows without making them. Pure."""

from dataclasses import dataclass

from raytune.config.sections.data import DataSource

PREFIX = "demo:"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltInRows:
    num_rows: int
    num_bytes: int
    """As a file of JSON lines."""
    num_tokens: int
    """Of the demo base's tokenizer, with what its template adds."""


SPLITS = {
    "train": BuiltInRows(num_rows=4000, num_bytes=857_091, num_tokens=541_091),
    "validation": BuiltInRows(num_rows=400, num_bytes=85_658, num_tokens=54_058),
    "test": BuiltInRows(num_rows=400, num_bytes=85_989, num_tokens=54_389),
}
"""A test holds them against the rows."""


def built_in(source: DataSource) -> BuiltInRows | None:
    """Of the built-in rows that a source takes; None: it names others. Of part of a split, its share: rows are alike."""
    split = SPLITS.get(source.path.removeprefix(PREFIX)) if source.path.startswith(PREFIX) else None
    if split is None or source.max_rows is None:
        return split
    share = source.max_rows / split.num_rows
    return BuiltInRows(
        num_rows=source.max_rows, num_bytes=round(share * split.num_bytes), num_tokens=round(share * split.num_tokens)
    )
