"""The page of rows as they are trained: one HTML file that needs neither network nor server."""

from typing import Any

from raytune.data.preview import ShownDocument
from raytune.launch.data.data_preview import DataPreview, heading, written
from raytune.report.page import page
from raytune.storage import write_bytes


def write_preview_page(path: str, name: str, shown: DataPreview) -> str:
    """Write the page to a file, local or on an object store; its path.

    Args:
        name: of the run.
    """
    write_bytes(path, preview_page(name, shown).encode())
    return path


def preview_page(name: str, shown: DataPreview) -> str:
    """The page as HTML."""
    return page("preview_page.html", name=name, shown=shown, documents=[_document(document) for document in shown.documents])


def _document(document: ShownDocument) -> dict[str, Any]:
    return {
        "heading": heading(document),
        "source": document.source,
        "turns": [(role, written(pieces)) for role, pieces in document.turns],
        "num_hidden": document.num_hidden,
    }
