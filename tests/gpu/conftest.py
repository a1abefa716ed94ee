"""What the tests of the scripts share: the lines that a script prints, and the threads that an engine sets."""

import json
from collections.abc import Iterator
from typing import Any, Protocol

import pytest
import torch


class Lines(Protocol):
    """Reads what was printed since the last call."""

    def __call__(self) -> list[dict[str, Any]]: ...


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Lines:
    return lambda: [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A worker's process sets the number of threads for itself; the other tests' stays."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
