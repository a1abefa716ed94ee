"""How rows are divided into those of training, validation and test: which parts of them, by what, and in words. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from raytune.config.sections.data import DataSection
from raytune.config.sections.evaluation import suites_while_training
from raytune.config.sections.run import RunConfig
from raytune.config.sections.split import SplitSection
from raytune.errors import PlanError
from raytune.units import format_count

TEST = "test"
"""What metrics of the test are called: `test/loss`."""

Parts = Mapping[str, tuple[Fraction, Fraction]]
"""Side -> from where to where it lies among all rows in the order in which they are divided, as shares. Training has the rest."""

_NAMED_VALUES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedSplit:
    """A split as a config asks for it."""

    by: SplitSection
    parts: Parts
    fold: tuple[int, int] | None = None
    """(index, of)"""

    @property
    def looks_at_rows(self) -> bool:
        """Whether each row is looked at: for its side, or only for the columns that decide it."""
        return bool(self.parts) or self.by != SplitSection()

    @property
    def looks_first(self) -> bool:
        """Whether all rows have to be looked at before it is known where they lie."""
        return bool(self.parts) and self.by.looks_first


def asked_split(data: DataSection) -> AskedSplit:
    """Validation lies at the beginning and the test at the end, so that neither depends on how large the other is. By time, the
    order is from the latest row on, and the test comes first."""
    test, fold = Fraction(data.test_fraction), data.fold
    parts: dict[str, tuple[Fraction, Fraction]] = {}
    if fold:
        part = (1 - test) / fold.of
        parts["validation"] = (fold.index * part, (fold.index + 1) * part)
    elif data.validation_fraction:
        first = test if data.split.time is not None else Fraction(0)
        parts["validation"] = (first, first + Fraction(data.validation_fraction))
    if test:
        parts[TEST] = (Fraction(0), test) if data.split.time is not None else (1 - test, Fraction(1))
    return AskedSplit(by=data.split, parts=parts, fold=(fold.index, fold.of) if fold else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class StratumCount:
    """Rows of a stratum by side."""

    name: str
    rows: int
    held_out: Mapping[str, int]


def split_in_words(asked: AskedSplit, counts: Sequence[StratumCount], times: Mapping[str, str]) -> list[str]:
    """What a split came to, a line per fact; nothing where the hash of each row decides.

    Args:
        counts: of each stratum, where they were counted.
        times: side -> its times, where times decide.
    """
    if not asked.parts:
        return []
    lines, by = [], asked.by
    if asked.fold:
        lines.append(f"fold {asked.fold[0]} of {asked.fold[1]} (from 0) is held out for validation")
    if by.group is not None:
        lines.append(f"rows that share '{by.group}' lie on one side")
    if by.strata is not None:
        lines.append(f"each of {len(counts)} values of '{by.strata}' has its share: {_strata(asked, counts)}")
        lacking = {side: [repr(count.name) for count in counts if not count.held_out.get(side)] for side in asked.parts}
        few = "there are too few"
        lines += [f"no row of {_listed(names)} is held out for {side}: {few}" for side, names in lacking.items() if names]
    if by.time is not None:
        (count,) = counts
        for side in asked.parts:
            rows = f"{format_count(count.held_out.get(side, 0))} of {format_count(count.rows)} rows"
            lines.append(f"{side} by '{by.time}': {rows}, {times[side]}")
    return lines


def _strata(asked: AskedSplit, counts: Sequence[StratumCount]) -> str:
    largest = sorted(counts, key=lambda count: (-count.rows, count.name))
    words = [
        f"{count.name} {' + '.join(str(count.held_out.get(side, 0)) for side in asked.parts)} of {count.rows}"
        for count in largest
    ]
    return _listed(words)


def _listed(words: Sequence[str]) -> str:
    more = len(words) - _NAMED_VALUES
    return ", ".join(words[:_NAMED_VALUES]) + (f", and {more} more" if more > 0 else "")


def has_test(config: RunConfig) -> bool:
    return bool(config.data.test or config.data.test_fraction)


def check_test(config: RunConfig) -> None:
    """Refuse a suite whose metrics would have the names of the test's.

    Raises:
        PlanError: naming it.
    """
    taken = next(_suites_called(config, TEST), None) if has_test(config) else None
    if taken:
        raise PlanError(
            f"{taken} is called '{TEST}' and measured while training goes on, and so are the metrics of data.test, which are "
            f"measured at the end. Give the suite another name (evaluation.suites.name).",
            keys=(taken,),
        )


def _suites_called(config: RunConfig, name: str) -> Iterator[str]:
    return (key for key, suite in suites_while_training(config.evaluation).items() if suite.title == name)
