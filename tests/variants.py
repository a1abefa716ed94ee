"""Variants of one claim, of which every run of the tests takes some and `--slow` takes all."""

from collections.abc import Sequence
from typing import Any

import pytest


def variants(often: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`: `often`, and `others` with `--slow` alone. A tuple is a case of several arguments."""
    return [*often, *(pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=pytest.mark.slow) for one in others)]
