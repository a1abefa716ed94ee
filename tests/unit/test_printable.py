"""Claims about what strangers wrote: no name, row, template or error makes a terminal or a page obey it."""

import io
import json
import logging
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rich.table import Table

from raytune.cli import cli
from raytune.cli.group import Verbs
from raytune.errors import UserError
from raytune.launch.data.live import PlainConsole
from raytune.printable import PrintableFormatter, printable, printable_log

PACKAGE = Path(__file__).parents[2] / "raytune"
HOSTILE = {
    "colour": "\x1b[31m",
    "clears the screen": "\x1b[2J",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://evil\x1b\\",
    "8-bit control": "\x9b2J",
    "nul": "\x00",
    "overwrites the line": "\r",
    "backspace": "\b\b\b",
    "delete": "\x7f",
    "turns the line round": "\u202e",
    "isolates": "\u2066",
    "right to left": "\u200f",
    "line of Unicode": "\u2028",
    "byte order": "\ufeff",
    "tag": "\U000e0041",
    "half a character": "\ud800",
}
EVIL = "".join(HOSTILE.values())


def obeyed(text: str) -> set[str]:
    return {character for character in text if character not in "\n\t" and not character.isprintable() and character != "\u3000"}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_a_terminal_would_obey_is_shown_and_not_obeyed(kind: str):
    shown = printable(f"a{HOSTILE[kind]}b\n\tc")
    assert not obeyed(shown)
    assert shown.startswith("a")
    assert shown.endswith("b\n\tc")


def test_ordinary_text_of_any_language_stays_and_json_stays_json():
    text = 'Grüße, 你好, שלום, नमस्ते, 👩‍👩‍👧: "a\\b"\r\n\tok'
    assert printable(text) == text.replace("\r\n", "\n")
    assert json.loads(printable(json.dumps({"a": EVIL}, ensure_ascii=False).encode("utf-8", "replace").decode()))["a"]


def test_a_log_keeps_its_lines_and_loses_colours_and_bars():
    assert printable_log("\x1b[36m(worker)\x1b[0m 10%\r20%\r\n\x1b[2Jdone\n") == "(worker) 10%\n20%\n\\u001b[2Jdone\n"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_consoles_show_text_as_text(is_terminal: bool):
    stream = io.StringIO()
    console = PlainConsole(file=stream, force_terminal=is_terminal, width=200)
    table = Table("name", title=f"title {EVIL} [red]x[/red]")
    table.add_row(f"cell {EVIL} [/no-such] [bold]")
    console.print(table)
    console.print(f"line {EVIL} [link=http://evil]y[/link] :smile:")
    text = printable_log(stream.getvalue()) if is_terminal else stream.getvalue()  # colours of the table's own
    assert not obeyed(text)
    assert "[red]x[/red]" in text
    assert "[/no-such] [bold]" in text
    assert "[link=http://evil]y[/link] :smile:" in text
    assert "\\u202e" in text


@pytest.mark.parametrize("as_json", [False, True])
def test_an_error_is_printed_without_controls_and_credentials(as_json: bool):
    @click.group(cls=Verbs)
    def group() -> None: ...

    @group.command()
    def fail() -> None:
        click.get_current_context().meta["as_json"] = as_json
        raise UserError(f"row {EVIL} at s3://key:CANARY@" + "bucket")

    done = CliRunner().invoke(group, ["fail"])
    assert done.exit_code == 2
    assert not obeyed(done.output)
    assert "CANARY" not in done.output


@pytest.mark.parametrize("arguments", [["plan"], ["check"], ["plan", "--json"]])
def test_names_in_files_and_of_files_are_shown_and_not_obeyed(tmp_path: Path, arguments: list[str]):
    evil = EVIL.replace("\x00", "").replace("\ud800", "").replace("/", "")
    base = tmp_path / f"model{evil}"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": evil}))
    rows = tmp_path / f"rows{evil}.jsonl"
    rows.write_text("{}\n")
    config = tmp_path / f"run{evil}.yaml"
    written = {"model": {"base": str(base)}, "data": {"train": str(rows), "template": f"{evil}.jinja"}, f"key{evil}": evil}
    for keys in (written, {key: value for key, value in written.items() if key in ("model",)}):
        config.write_text(json.dumps(keys | {"cluster": {"instance": "p5.48xlarge"}}))
        done = CliRunner().invoke(cli, [*arguments, str(config)])
        assert done.output
        assert not obeyed(done.output)


def test_warnings_in_logs_are_shown_and_not_obeyed():
    record = logging.LogRecord("raytune", logging.WARNING, "", 0, "file %s", (EVIL,), None)
    assert not obeyed(PrintableFormatter().format(record))


def test_commands_print_in_one_place_and_draw_on_one_kind_of_console():
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert [name for name, text in sources.items() if "click.echo(" in text] == ["cli/say.py"]
    assert [name for name, text in sources.items() if re.search(r"(?<![A-Za-z])Console\(", text.replace("(Console)", ""))] == []
