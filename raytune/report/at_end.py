"""The page of a run that ends: left by whoever trains it, and no reason to fail."""

import logging

from raytune.printable import in_a_line
from raytune.report.run_page import write_run_page
from raytune.run_folder import RunFolder

logger = logging.getLogger(__name__)


def leave_page(folder: RunFolder) -> None:
    """Write the page of a run that has ended. What is wrong with the page is no fault of the run: it is said, and that is all."""
    path = folder.path
    try:
        write_run_page(path)
    except Exception as error:
        logger.warning("The page of %s was not written (raytune report %s tries again): %s", path, path, in_a_line(error))
