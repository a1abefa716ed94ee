"""What is found among training rows before they are tokenised (`data.quality`), and which rows its policies leave out.

Every good row is marked by the processes that tokenise (`row_marks`), and the marks are compared here (`row_findings`). By what
200,000 rows took, a million take 500 MB of memory and, with signatures, 1 GB in the draft of the store. Rows are read again to be
tokenised.
"""

import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np

from raytune.config.sections.data import DataSource, QualitySection
from raytune.config.sections.quality import FINDINGS
from raytune.data.files.source_files import find_files
from raytune.data.files.sources import ScannedFile, scan
from raytune.data.formats.recognising import Reading
from raytune.data.quality.row_findings import Found, MarkedRows, findings_of
from raytune.data.quality.row_marks import Marked, Marks, MarkTask, mark_rows, save_passages
from raytune.data.rows.shards import NUM_EXAMPLES, ParallelMap, ShardPart, ShardTask, found_rows_error
from raytune.data.rows.source_rows import readings_of
from raytune.plan.data.data_report import Balance, SourceReport, StoreReport

MARKS = "marks-"
"""Begins the name of the folder, in the draft of a store, that takes marks."""
_ROWS_OF_WORDING = 10
"""Of benchmarks. A passage that more of them have is how they ask."""
_SEGMENTS_AT_ONCE = 2
_MOST_NAMED = 20
"""Scripts, or labels, of a source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherRows:
    """Sources that training rows are compared with, opened."""

    sources: tuple[DataSource, ...]
    scanned: list[list[ScannedFile]]
    readings: list[Reading]

    @classmethod
    def open(cls, sources: Sequence[DataSource], downloads: Path, *, are_asked: bool = False) -> "OtherRows":
        """Find the files of sources, and how they are read.

        Args:
            are_asked: whether rows need no answer.

        Raises:
            DataError: if they cannot be read.
        """
        scanned = [[scan(file, source.max_rows) for file in find_files(source, downloads)] for source in sources]
        return cls(sources=tuple(sources), scanned=scanned, readings=readings_of(sources, scanned, are_asked=are_asked))

    @property
    def fingerprints(self) -> list[list[str]]:
        return [[file.fingerprint for file in files] for files in self.scanned]

    @property
    def files(self) -> list[str]:
        return [file.file.name for files in self.scanned for file in files]

    def parts(self, first_file: int = 0) -> list[tuple[tuple[ShardPart, ...], int | None]]:
        """Divided for several processes, each with the most rows that are read of it.

        Args:
            first_file: number of the first file.
        """
        divided, numbers = [], count(first_file)
        for source, files, reading in zip(self.sources, self.scanned, self.readings, strict=True):
            parts = []
            for file, number in zip(files, numbers):
                parts += [
                    ShardPart(segment=segment, file_index=number, reading=reading, fingerprint=file.fingerprint)
                    for segment in file.segments
                ]
            step = _SEGMENTS_AT_ONCE if source.max_rows is None else max(1, len(parts))
            divided += [(tuple(parts[start : start + step]), source.max_rows) for start in range(0, len(parts), step)]
        return divided


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedWith:
    """What training rows are compared with, besides each other."""

    held_out: OtherRows
    """For validation or the test, in files of their own."""
    benchmarks: OtherRows

    @property
    def fingerprints(self) -> list[list[list[str]]]:
        return [self.held_out.fingerprints, self.benchmarks.fingerprints]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFindings:
    """What was found in one source."""

    counts: dict[str, int]
    examples: dict[str, list[str]]
    balance: Balance


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was found in the sources of a store."""

    tasks: list[ShardTask]
    """Without the rows that are left out."""
    policies: dict[str, str]
    """Of what was looked for."""
    notes: list[str]
    sources: list[SourceFindings]

    def told_in(self, report: StoreReport) -> StoreReport:
        """The report of the store with what was found."""
        sources = list(map(self._told, report.sources, self.sources))
        return report.model_copy(update={"sources": sources, "notes": self.notes})

    def _told(self, source: SourceReport, found: SourceFindings) -> SourceReport:
        examples = source.examples | found.examples
        more = {"examples": examples, "policies": self.policies, "balance": found.balance}
        return source.model_copy(update={**found.counts, **more})


def compared_with(quality: QualitySection, held_out: Sequence[DataSource], downloads: Path) -> ComparedWith:
    """Open what training rows are compared with.

    Raises:
        DataError: if it cannot be read.
    """
    looked_for = held_out if quality.leaks != "ignore" else ()
    benchmarks = quality.benchmarks if quality.benchmark_overlaps != "ignore" else ()
    return ComparedWith(
        held_out=OtherRows.open(looked_for, downloads), benchmarks=OtherRows.open(benchmarks, downloads, are_asked=True)
    )


def look_at(
    quality: QualitySection,
    tasks: Sequence[ShardTask],
    files: Sequence[str],
    others: ComparedWith,
    draft: Path,
    parallel_map: ParallelMap,
) -> Findings:
    """Mark the rows of all tasks and of what they are compared with, and compare them.

    Args:
        tasks: of the training rows, in order; where they are one side of a split, the other one is held out.
        files: names of the training rows' files.
        draft: folder that takes the marks, for all processes of `parallel_map`.

    Raises:
        DataError: if something is found whose policy is `error`.
    """
    marks = draft / f"{MARKS}{uuid.uuid4().hex[:12]}"
    folders = (str(marks / f"{number:05d}") for number in count())
    benchmarks, passages = None, None
    if others.benchmarks.sources:
        asked = [
            MarkTask(parts=parts, max_rows=most, ngram_words=quality.ngram_words, keeps_passages=True, output=next(folders))
            for parts, most in others.benchmarks.parts()
        ]
        marked = _marked(asked, parallel_map)
        passages = str(marks / "passages")
        save_passages(marked, Path(passages), _ROWS_OF_WORDING)
        benchmarks = MarkedRows(marks=Marks(marked), files=others.benchmarks.files)
    sides = tasks[0].options.split.held_out_sides if tasks else ()
    are_held_out = quality.leaks != "ignore" and bool(sides or others.held_out.sources)
    near_similarity = quality.near_similarity if are_held_out or quality.near_duplicates != "ignore" else None
    wanted = [
        MarkTask(
            parts=task.parts,
            max_rows=task.max_rows,
            side=task.options.side,
            split=task.options.split,
            near_similarity=near_similarity,
            ngram_words=quality.ngram_words,
            passages=passages,
            output=next(folders),
        )
        for task in tasks
    ]
    kept_apart = []
    if are_held_out:
        kept_apart = [replace(task, side=side, passages=None, output=next(folders)) for side in sides for task in wanted] + [
            MarkTask(parts=parts, max_rows=most, near_similarity=near_similarity, output=next(folders))
            for parts, most in others.held_out.parts(first_file=len(files))
        ]
    marked = _marked([*wanted, *kept_apart], parallel_map)
    of_rows, of_held_out = marked[: len(wanted)], marked[len(wanted) :]
    rows = MarkedRows(marks=Marks(of_rows), files=files)
    held_out = MarkedRows(marks=Marks(of_held_out), files=[*files, *others.held_out.files])
    found, left_out = findings_of(quality, rows, held_out if are_held_out else None, benchmarks)
    for name, one in found.items():
        if getattr(quality, name) == "error" and len(one.rows):
            raise found_rows_error(name, len(one.rows), _examples(one, one.rows, rows))
    return Findings(
        tasks=_without(tasks, of_rows, left_out),
        policies={name: getattr(quality, name) for name in FINDINGS if name in found},
        notes=[] if benchmarks is None else _about(benchmarks, quality.ngram_words),
        sources=_by_source(tasks, of_rows, rows, found),
    )


# --- Details -----------------------------------------------------------------------------------------------------------------


def _marked(tasks: Sequence[MarkTask], parallel_map: ParallelMap) -> list[Marked]:
    """The marks of all tasks, in their order."""
    place = {task.output: number for number, task in enumerate(tasks)}
    return sorted(parallel_map(mark_rows, tasks), key=lambda one: place[one.folder])


def _without(tasks: Sequence[ShardTask], marked: Sequence[Marked], left_out: np.ndarray) -> list[ShardTask]:
    """The tasks without the rows that are left out."""
    remaining, first = [], 0
    for task, one in zip(tasks, marked, strict=True):
        here = left_out[first : first + one.num_rows]
        first += one.num_rows
        if here.any():
            task = replace(task, left_out=here.astype(bool).tobytes())
        remaining.append(task)
    return remaining


def _about(benchmarks: MarkedRows, num_words: int) -> list[str]:
    """How much of the benchmarks was looked for."""
    num_rows, num_short = len(benchmarks.marks), int((benchmarks.marks.num_passages == 0).sum())
    short = (
        f"; {num_short} of them {'has' if num_short == 1 else 'have'} no turn of {num_words} words, and cannot be found"
        if num_short
        else ""
    )
    return [f"training rows were compared with {num_rows} rows of benchmarks (data.quality.benchmarks){short}"]


def _by_source(
    tasks: Sequence[ShardTask], marked: Sequence[Marked], rows: MarkedRows, found: dict[str, Found]
) -> list[SourceFindings]:
    sources = np.repeat([task.source for task in tasks], [one.num_rows for one in marked])
    by_source = []
    for source in range(max(task.source for task in tasks) + 1):
        ours = [one for task, one in zip(tasks, marked, strict=True) if task.source == source]
        here = {name: one.rows[sources[one.rows] == source] for name, one in found.items()}
        num_words = rows.marks.num_words[sources == source]
        by_source.append(
            SourceFindings(
                counts={name: len(numbers) for name, numbers in here.items()},
                examples={name: _examples(found[name], numbers, rows) for name, numbers in here.items() if len(numbers)},
                balance=Balance(
                    scripts=_most_common(one.scripts for one in ours),
                    labels=_most_common(one.labels for one in ours),
                    median_words=int(np.median(num_words)) if len(num_words) else 0,
                    most_words=int(num_words.max(initial=0)),
                ),
            )
        )
    return by_source


def _examples(one: Found, numbers: np.ndarray, rows: MarkedRows) -> list[str]:
    return [f"{rows.origin(row)}: {one.words(row)}" for row in numbers[:NUM_EXAMPLES].tolist()]


def _most_common(counters: Iterable[Counter[str]]) -> dict[str, int]:
    total = sum(counters, Counter())
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0]))[:_MOST_NAMED])
