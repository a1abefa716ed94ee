"""Text that is given away: without credentials, and with files by their names, whichever folders or buckets they lie in."""

import re
from collections.abc import Iterable

from raytune.credentials import redacted

_PATH = re.compile(r"(?<![\w/.~:])(?:~|\.{1,2}|[A-Za-z][A-Za-z0-9+.-]*:/)?/[^\s'\"`,;:()\[\]<>|]+")


def public_text(text: str, known: Iterable[tuple[str, str]] = ()) -> str:
    """A text as a stranger may read it.

    Args:
        known: paths that may stand in it, and what stands for each; others are found by their form.
    """
    for path, name in sorted(known, key=lambda pair: -len(pair[0])):
        text = text.replace(path, name)
    return redacted(_PATH.sub(lambda match: without_folders(match[0]), text))


def without_folders(path: str) -> str:
    """The name of a file, or of a folder: the last part of its path or URL."""
    return path.partition("?")[0].rstrip("/").rpartition("/")[2]
