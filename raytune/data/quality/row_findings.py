"""Which training rows are duplicates, leaks, copies or contradictions: marks compared, one finding after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from raytune.config.sections.data import QualitySection
from raytune.data.conversations.conversation import Origin
from raytune.data.quality.alike import Similarity, contradicted, equal_to_earlier, found_in, near_in, near_to_earlier
from raytune.data.quality.row_marks import Marks


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedRows:
    """Rows with where they come from."""

    marks: Marks
    files: Sequence[str]
    """As the user named them."""

    def origin(self, row: int) -> Origin:
        return Origin(self.files[int(self.marks.files[row])], int(self.marks.lines[row]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The rows that a finding is about."""

    rows: np.ndarray
    """Their numbers."""
    words: Callable[[int], str]
    """Why a row is among them, and what the other row is."""


def findings_of(
    quality: QualitySection, rows: MarkedRows, held_out: MarkedRows | None, benchmarks: MarkedRows | None
) -> tuple[dict[str, Found], np.ndarray]:
    """What was looked for, by the name of its policy; and a bool for each row, whether it is left out.

    Args:
        held_out: for validation; None: there are none.
        benchmarks: None: there are none.
    """
    found: dict[str, Found] = {}
    left_out = np.zeros(len(rows.marks), bool)

    def note(name: str, one: Found) -> None:
        found[name] = one
        left_out[one.rows] |= getattr(quality, name) == "drop"

    if quality.damaged_text != "ignore":
        damage = rows.marks.damage
        note("damaged_text", Found(rows=np.flatnonzero(damage >= 0), words=lambda row: f"has U+{damage[row]:04X}"))
    if held_out is not None and quality.leaks != "ignore":
        note("leaks", _leaks(rows, held_out, quality.near_similarity))
    if benchmarks is not None and quality.benchmark_overlaps != "ignore":
        note("benchmark_overlaps", _overlaps(rows, benchmarks, quality.ngram_words))
    if quality.contradictions != "ignore":
        note("contradictions", _contradictions(rows))
    first = equal_to_earlier(rows.marks.contents)
    if quality.exact_duplicates != "ignore":
        note("exact_duplicates", _found(first, rows, lambda row: "equal to"))
    if quality.near_duplicates != "ignore":
        note("near_duplicates", _near(rows, (first < 0) & ~left_out, first, quality.near_similarity))
    return found, left_out


def _found(other: np.ndarray, others: MarkedRows, why: Callable[[int], str]) -> Found:
    return Found(rows=np.flatnonzero(other >= 0), words=lambda row: f"{why(row)} {others.origin(other[row])}")


def _leaks(rows: MarkedRows, held_out: MarkedRows, least: float) -> Found:
    marks, others = rows.marks, held_out.marks
    equal = found_in(marks.contents, others.contents)
    asked_alike = np.where(marks.prompts != 0, found_in(marks.prompts[:, None], others.prompts[:, None]), -1)
    near = _near_in(rows, held_out, least)
    other = np.where(equal >= 0, equal, np.where(asked_alike >= 0, asked_alike, near))

    def why(row: int) -> str:
        if equal[row] >= 0:
            return "equal to"
        if asked_alike[row] >= 0:
            return "the turns before its last answer are those of"
        return _percent(_similarity(marks, others), row, int(other[row]))

    return _found(other, held_out, why)


def _near_in(rows: MarkedRows, held_out: MarkedRows, least: float) -> np.ndarray:
    marks, others = rows.marks, held_out.marks
    here, there = np.flatnonzero(marks.have_words), np.flatnonzero(others.have_words)
    near = np.full(len(marks), -1)
    similarity = _similarity(marks, others)
    found = near_in(
        lambda band: (marks.band(band)[here], others.band(band)[there]),
        marks.num_bands,
        len(here),
        lambda some, some_others: similarity(here[some], there[some_others]),
        least,
    )
    near[here[found >= 0]] = there[found[found >= 0]]
    return near


def _overlaps(rows: MarkedRows, benchmarks: MarkedRows, num_words: int) -> Found:
    marks = rows.marks

    def why(row: int) -> str:
        return f"{marks.num_copied[row]} of its {marks.num_passages[row]} passages of {num_words} words are in"

    return _found(marks.copied_from, benchmarks, why)


def _contradictions(rows: MarkedRows) -> Found:
    other = contradicted(rows.marks.prompts, rows.marks.answers)
    return _found(other, rows, lambda row: "another answer to the turns of")


def _near(rows: MarkedRows, are_compared: np.ndarray, first: np.ndarray, least: float) -> Found:
    """Args:
    are_compared: bool, a row of each set of equal ones.
    first: equal to each row.
    """
    marks = rows.marks
    here = np.flatnonzero(are_compared & marks.have_words)
    similarity = _similarity(marks, marks)
    found = near_to_earlier(
        lambda band: marks.band(band)[here],
        marks.num_bands,
        len(here),
        lambda some, others: similarity(here[some], here[others]),
        least,
    )
    near = np.full(len(marks), -1)
    near[here[found >= 0]] = here[found[found >= 0]]
    near = np.where(first >= 0, near[first], near)
    return _found(near, rows, lambda row: _percent(similarity, row, int(near[row])))


def _similarity(marks: Marks, others: Marks) -> Similarity:
    """Estimated share of the runs of words that are common to rows, or to their last answers where it is less there."""

    def estimate(rows: np.ndarray, other_rows: np.ndarray) -> np.ndarray:
        shares = [
            (marks.signatures(name, rows) == others.signatures(name, other_rows)).mean(axis=1)
            for name in ("signatures", "signatures_of_answers")
        ]
        return np.minimum(*shares)

    return estimate


def _percent(similarity: Similarity, row: int, other: int) -> str:
    return f"{similarity(np.array([row]), np.array([other]))[0]:.0%} like"
