"""What a person asks of a run that goes on, wherever it does: to save, or to end. A file in its folder says so."""

import json
import os
import time
import uuid
from typing import Literal

from raytune.launch.attempts.lease import RENEW_EVERY_S
from raytune.storage import write_bytes
from raytune.training.steps.requests import LOOK_EVERY_S, REMOTE_LOOK_EVERY_S
from raytune.units import format_seconds
from raytune.watch.rows import AT_WORK, Row, folder_of

Wish = Literal["save", "stop"]
WISHES: tuple[Wish, ...] = ("save", "stop")


def refusal(row: Row, wish: Wish) -> str | None:
    """Why a wish makes no sense for a row; None: it does."""
    if row.state not in AT_WORK:
        return f"{row.name} is {row.state}: there is nothing to {wish}."
    if wish == "save" and row.kind == "sweep":
        return f"Trials save, a sweep does not: choose one of {row.name}."
    if wish == "save" and row.state == "starting":
        return f"{row.name} has not trained yet: there is nothing to save."
    if wish == "stop" and row.kind == "trial":
        return f"A trial is stopped by its sweep: stop {row.path.partition('/')[0]} to end them all."
    return None


def warning(row: Row) -> str:
    """What is lost by a stop, before it is asked for."""
    if row.kind == "sweep":
        return f"Stop the sweep {row.name}? Its trials end; the same command goes on with it."
    return f"Stop {row.name}? It ends as by a Ctrl-C, and the same command goes on from the newest checkpoint."


def ask(storage: str, row: Row, wish: Wish) -> str:
    """Ask it of a row that does not refuse it; what will become of that, as a sentence.

    Raises:
        RaytuneError: if the storage cannot be written.
    """
    folder = folder_of(storage, row)
    by = {"time": time.time(), "host": os.uname().nodename, "pid": os.getpid(), "id": uuid.uuid4().hex}
    write_bytes(folder.save_request if wish == "save" else folder.stop_request, (json.dumps(by) + "\n").encode())
    if wish == "save":
        soon = REMOTE_LOOK_EVERY_S if "://" in storage else LOOK_EVERY_S
        return f"{row.name} saves after a logged step, when it has seen this: within {format_seconds(soon)}."
    return f"{row.name} ends when it has seen this: within {format_seconds(RENEW_EVERY_S)}."
