"""Variants of one claim, of which every run of the tests takes some and `--slow` takes all."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest


def variants(often: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`: `often`, and `others` with `--slow` alone. A tuple is a case of several arguments."""
    return [*often, *(pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=pytest.mark.slow) for one in others)]


def chequered(*axes: Sequence[Any]) -> list[Any]:
    """All combinations of the values of some arguments as cases: those on white squares often, so that every value is seen with
    half of those of any other argument, and all with `--slow`."""
    squares: tuple[list[Any], list[Any]] = ([], [])
    for square in product(*map(enumerate, axes)):
        squares[sum(place for place, _ in square) % 2].append(tuple(value for _, value in square))
    return variants(*squares)
