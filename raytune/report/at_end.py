"""The page of a run that ends: left by whoever trains it, and no reason to fail."""

import logging
from collections.abc import Callable

from raytune.launch.result import RunResult
from raytune.launch.run import RunFailedError
from raytune.printable import in_a_line
from raytune.report.run_page import write_run_page
from raytune.run_folder import RunFolder

logger = logging.getLogger(__name__)


def with_page(train: Callable[[], RunResult], folder: RunFolder) -> RunResult:
    """Train, and leave the page of the run, finished or failed. A run that was only read is left as it is."""
    try:
        result = train()
    except RunFailedError:
        leave_run_page(folder.path)
        raise
    if not result.finished_before:
        leave_run_page(folder.path)
    return result


def leave_run_page(path: str) -> None:
    """Write the page of a run that has ended. What is wrong with the page is no fault of the run: it is said, and that is all."""
    try:
        write_run_page(path)
    except Exception as error:
        logger.warning("The page of %s was not written (raytune report %s tries again): %s", path, path, in_a_line(error))
