"""The one place where a command writes to the terminal."""

import click

from raytune.printable import printable, printable_log


def say(text: str, *, err: bool = False, nl: bool = True, is_log: bool = False) -> None:
    """Print a text, without what a terminal would obey: it may hold names, rows and templates of strangers.

    Args:
        err: to standard error.
        nl: end the line.
        is_log: what a program has written, with colours and bars.
    """
    click.echo(printable_log(text) if is_log else printable(text), err=err, nl=nl)
