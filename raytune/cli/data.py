"""Verbs that look at rows: data check, data preview. They train nothing."""

import json
from typing import TYPE_CHECKING

import click

from raytune.cli.group import as_json_option, debug_option, examples, files_and_overrides, load_run, run_arguments
from raytune.cli.say import say
from raytune.cli.supervise import begin_on
from raytune.errors import EXIT_REFUSED

if TYPE_CHECKING:
    from raytune.config.run import RunConfig


@click.group()
def data() -> None:
    """Look at the rows of a run: what becomes of all of them, and how single ones are trained."""


@data.command(
    "check",
    epilog=examples(
        "data check run.yaml",
        "data check run.yaml --rows 10000 data.max_length=4096",
        "data check model.base=./base data.train=rows.jsonl --json",
    ),
)
@run_arguments
@click.option("--rows", "max_rows", type=click.IntRange(1), metavar="N", help="Look at the first rows of each source only.")
@as_json_option
@debug_option
def data_check(arguments: tuple[str, ...], max_rows: int | None, as_json: bool) -> None:
    """Tokenise the rows of a run and report on them: counts, tokens per source, lengths, and the verdict of each limit.

    Trains nothing and plans nothing. What is tokenised stays in the folder of the stores, where `train` finds it; not with
    --rows. Exit code 2: a limit of data.limits is exceeded, so that a run would stop.
    """
    from raytune.launch.address import named_address
    from raytune.launch.data_check import check_data

    config = _named_run(arguments)
    begin_on(named_address(config.cluster))
    found = check_data(config, max_rows)
    say(json.dumps(found.to_json()) if as_json else str(found))
    if found.is_refused:
        click.get_current_context().exit(EXIT_REFUSED)


@data.command(
    "preview",
    epilog=examples(
        "data preview run.yaml",
        "data preview run.yaml --rows 10 --source chats --page rows.html",
        "data preview run.yaml --row rows.jsonl:17",
    ),
)
@run_arguments
@click.option("--rows", type=click.IntRange(1), default=3, show_default=True, metavar="N", help="The first rows of each source.")
@click.option("--source", metavar="NAME", help="Of this source only, also one that is held out. Default: all that are trained.")
@click.option("--row", metavar="FILE:LINE", help="This row only, named as messages about rows name it.")
@click.option("--page", metavar="FILE.html", help="Write a page instead: one file, without anything from elsewhere.")
@as_json_option
@debug_option
def data_preview(
    arguments: tuple[str, ...], rows: int, source: str | None, row: str | None, page: str | None, as_json: bool
) -> None:
    """Show rows as they are trained: their tokens as text, which of them are targets and what they count, and whose turn it is.

    In a terminal targets are green, in a pipe or with NO_COLOR they stand in brackets. Trains nothing, leaves nothing.
    """
    from raytune.launch.data_preview import preview_data

    config = _named_run(arguments)
    shown = preview_data(config, rows=rows, source=source, row=row)
    if page is not None:
        from raytune.report.preview_page import write_preview_page

        page = write_preview_page(page, config.name, shown)
    if as_json:
        say(json.dumps(shown.to_json() | {"page": page}))
    elif page is not None:
        say(f"page       {page}")
    else:
        from raytune.launch.data_colours import show_in_colours

        if not show_in_colours(shown):
            say(str(shown))


def _named_run(arguments: tuple[str, ...]) -> "RunConfig":
    from raytune.config.asked import require_named
    from raytune.config.load import as_one_run

    config, places = load_run(*files_and_overrides(arguments), check_files=True)
    return require_named(as_one_run(config), places=places)
