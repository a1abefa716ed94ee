"""Verbs that show what goes on under a storage folder: top, ui."""

import json
import sys

import click

from raytune.cli.group import as_json_option, debug_option, examples
from raytune.cli.say import say
from raytune.errors import UserError

PLAIN_WIDTH = 160


@click.command(
    epilog=examples(
        "top",
        "top /shared/runs",
        "top runs/support-bot --once",
    )
)
@click.argument("storage", required=False)
@click.option("--once", is_flag=True, help="Print one table and end, as it does without a terminal.")
@as_json_option
@debug_option
def top(storage: str | None, once: bool, as_json: bool) -> None:
    """Watch runs and sweeps: state, steps, losses, tokens per second, memory against the plan, time left, cost so far.

    STORAGE is the folder or URL that runs lie in (`storage` of their configs; default: runs), or one run or sweep. Keys: q quits,
    arrows choose, Enter opens a run, s asks it to save now, x to stop.
    """
    from raytune.watch.look import Watcher
    from raytune.watch.rows import rows_of
    from raytune.watch.terminal import plain, show

    watcher = Watcher(storage_of(storage))
    if once or as_json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        rows = rows_of(watcher.look())
        facts = {"storage": watcher.storage, "runs": [row.to_json() for row in rows]}
        say(json.dumps(facts) if as_json else plain(rows, PLAIN_WIDTH))
        return
    show(watcher)


@click.command(
    epilog=examples(
        "ui",
        "ui s3://bucket/runs --port 8500",
    )
)
@click.argument("storage", required=False)
@click.option("--port", type=click.IntRange(min=0, max=65535), default=0, help="On 127.0.0.1. Default: any that is free.")
@as_json_option
@debug_option
def ui(storage: str | None, port: int, as_json: bool) -> None:
    """Serve a page that shows what `top` shows, to browsers of this machine, until Ctrl-C.

    STORAGE is as for `top`. Who opens the page needs the token in the address that is printed; it is new at each start. From
    another machine, forward the port: ssh -L PORT:127.0.0.1:PORT HOST.
    """
    import asyncio

    from raytune.watch.look import Watcher
    from raytune.watch.server import serve

    def told(url: str) -> None:
        say(json.dumps({"url": url}) if as_json else f"{url}\nCtrl-C ends it.")
        sys.stdout.flush()

    watcher = Watcher(storage_of(storage))
    try:
        asyncio.run(serve(watcher, port, told))
    except OSError as error:
        raise UserError(
            f"Port {port} of this machine cannot be used ({error.strerror}). Leave --port out for a free one."
        ) from error


def storage_of(given: str | None) -> str:
    """The storage that a person means: that of a config without the key, where they name none."""
    from raytune.config.sections.run import RunConfig
    from raytune.storage import absolute

    return absolute(given or RunConfig.model_fields["storage"].default)
