"""What a person meets at the command line: examples that are commands, and no words of libraries."""

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from raytune.cli import cli, files_and_overrides
from raytune.config.load import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def verbs(group: click.Group = cli, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from verbs(command, (*before, name))
        else:
            yield (*before, name), command


def written_for(path: tuple[str, ...]) -> Path:
    """A file that an example's overrides can be laid over."""
    return CONFIGS / ("sweeps" if path == ("sweep",) else "recipes") / "quickstart.yaml"


@pytest.mark.parametrize(("path", "command"), verbs(), ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_the_help_of_a_verb_shows_commands_that_it_takes(path: tuple[str, ...], command: click.Command) -> None:
    shown = command.get_help(click.Context(command))
    lines = [line.strip() for line in shown.partition("Examples:")[2].splitlines() if line.strip()]
    assert lines
    for line in lines:
        words = shlex.split(line.partition(">")[0])
        assert words[: 1 + len(path)] == ["raytune", *path]
        parsed = command.make_context("verb", words[1 + len(path) :]).params
        _, overrides = files_and_overrides(parsed.get("arguments", ()))
        load_config([written_for(path)], overrides)


def test_what_libraries_say_to_their_callers_is_not_said_to_who_types_a_command() -> None:
    code = (
        "from raytune.cli import quiet_libraries; quiet_libraries()\n"
        "import raytune.model.parts.quantize, warnings\n"
        "warnings.warn_explicit('old', FutureWarning, 'x.py', 1, module='transformers.modeling_utils')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "default::FutureWarning", "-c", code], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
