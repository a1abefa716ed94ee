"""`raytune serve` before anything is started: what would be served, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import raytune
from raytune.cli import cli
from raytune.errors import UserError
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "small")


def test_a_dry_run_says_what_would_be_served_in_words_or_as_json(base: Path) -> None:
    command = ["serve", str(base), "--dry-run", "--max-batch", "2", "--port", "8123"]
    words = CliRunner().invoke(cli, command).stdout
    facts = json.loads(CliRunner().invoke(cli, [*command, "--json"]).stdout)
    assert facts["models"] == {"small": str(base)}
    assert (facts["replicas"], facts["max_batch"], facts["max_waiting"]) == (1, 2, 256)
    assert (facts["host"], facts["port"]) == ("127.0.0.1", 8123)
    assert f"keys and values of {facts['cached_tokens']} tokens" in words
    assert "each writes 2 answers at once, 256 wait" in words


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"replicas": 0}, "--replicas is 0"),
        ({"max_batch": 0}, "--max-batch is 0"),
        ({"max_waiting": -1}, "--max-waiting is -1"),
        ({"timeout_s": float("nan")}, "--timeout is nan"),
        ({"timeout_s": 0}, "--timeout is 0"),
        ({"timeout_s": float("inf")}, "--timeout is inf"),
        ({"port": 65536}, "--port is 65536"),
    ],
)
def test_numbers_that_nothing_is_served_with_are_refused(base: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        raytune.serve(base, **options)
