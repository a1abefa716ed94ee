"""The page of a run that ends, and the card of its model: left by whoever trains it, and no reason to fail."""

import logging
from collections.abc import Callable
from typing import TypeVar

from raytune.printable import in_a_line
from raytune.report.model_card import write_model_card
from raytune.report.run_page import write_run_page
from raytune.report.run_seen import RunSeen
from raytune.run_folder import RunFolder

T = TypeVar("T")

logger = logging.getLogger(__name__)


def leave_page(folder: RunFolder) -> None:
    """Write the page of a run that has ended, and the card of its model, if it left one. What is wrong with them is no fault of
    the run: it is said, and that is all."""
    _leave("page", folder.path, lambda: write_run_page(folder.path))
    leave_card(folder)


def leave_card(folder: RunFolder) -> str | None:
    """Write the card alone; its path, if it is there and ours."""
    return _leave("model card", folder.path, lambda: write_model_card(RunSeen.read(folder.path)))


def _leave(what: str, path: str, write: Callable[[], T]) -> T | None:
    try:
        return write()
    except Exception as error:
        logger.warning("The %s of %s was not written (raytune report %s tries again): %s", what, path, path, in_a_line(error))
        return None
