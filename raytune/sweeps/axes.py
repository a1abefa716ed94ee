"""The dimensions of a search space, and who chooses their values. Pure."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol

from raytune.config.reading.expressions import Expression
from raytune.config.sections.run import RunConfig

_SIGNIFICANT_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Options:
    """A choice among values; one of a grid is crossed with everything else."""

    values: Sequence[Any]
    in_grid: bool = False

    @property
    def extremes(self) -> Sequence[Any]:
        return self.values


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from low to high, both included; with a step, low + k * step only, of which `high` is the last."""

    low: float
    high: float
    step: float | None = None
    is_log: bool = False
    is_integer: bool = False

    @property
    def extremes(self) -> Sequence[Any]:
        return (self.low, self.high)

    @property
    def num_steps(self) -> int | None:
        """How many steps lie between low and high; None where there are numbers between any two."""
        return round((self.high - self.low) / self.step) if self.step else None

    def at(self, k: int) -> float:
        """low + k * step, as short as it was written: 0.15, not 0.15000000000000002."""
        assert self.step is not None
        value = Decimal(str(self.low)) + k * Decimal(str(self.step))
        return int(value) if self.is_integer else float(value)


@dataclass(frozen=True, slots=True)
class Derived:
    """A value that follows from others."""

    expression: Expression


@dataclass(frozen=True, slots=True)
class Axis:
    """A key of the space, and when it is drawn."""

    key: str
    values: Options | Range | Derived
    when: Expression | None


@dataclass(frozen=True, slots=True)
class Space:
    """The dimensions in an order in which each comes after those that it refers to, and the run that they vary."""

    axes: tuple[Axis, ...]
    keys: tuple[str, ...]
    """The keys in the order in which they were written."""
    run: RunConfig


class Chooser(Protocol):
    """Who decides what a drawn key is."""

    def choice(self, key: str, options: Sequence[Any]) -> Any: ...

    def number(self, key: str, low: float, high: float, step: float | None, is_log: bool, is_integer: bool) -> float:
        """A number from low to high, both included; with a step, on the grid that starts at low."""
        ...


@dataclass(frozen=True, slots=True)
class RandomChooser:
    """Independent draws, each value of a choice and each part of a range (of its logarithm) as likely as the others."""

    generator: random.Random

    def choice(self, key: str, options: Sequence[Any]) -> Any:
        return options[self.generator.randrange(len(options))]

    def number(self, key: str, low: float, high: float, step: float | None, is_log: bool, is_integer: bool) -> float:
        values = Range(low, high, step, is_log, is_integer)
        if values.num_steps is not None:
            return values.at(self.generator.randrange(values.num_steps + 1))
        if is_integer:
            # Half a unit on both sides, so that the ends are as likely as what lies between.
            low, high = low - 0.5, high + 0.5
        drawn = math.exp(self.generator.uniform(math.log(low), math.log(high))) if is_log else self.generator.uniform(low, high)
        rounded = round(drawn) if is_integer else float(f"{drawn:.{_SIGNIFICANT_DIGITS}g}")
        return min(max(rounded, values.low), values.high)


@dataclass(frozen=True, slots=True)
class GivenChooser:
    """Given values; another chooser where none is given."""

    given: Mapping[str, Any]
    otherwise: Chooser

    def choice(self, key: str, options: Sequence[Any]) -> Any:
        return self.given[key] if key in self.given else self.otherwise.choice(key, options)

    def number(self, key: str, low: float, high: float, step: float | None, is_log: bool, is_integer: bool) -> float:
        return self.given[key] if key in self.given else self.otherwise.number(key, low, high, step, is_log, is_integer)
