"""Text as a terminal and a page may show it: what strangers wrote in rows and names moves no cursor and turns no line round.

Escapes are those of JSON, so that JSON stays JSON. The rims that use it: `cli.say`, the consoles of `launch.live`, the pages.
"""

import logging
import re

# Controls of a terminal (C0, DEL, C1), lines and paragraphs of Unicode, marks of direction and order, tags, half characters.
_UNFIT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")


def printable(text: str) -> str:
    """A text with escapes for what would not be shown but obeyed. Line ends and tabs stay; colours go."""
    if text.isascii() and text.isprintable():
        return text
    return _UNFIT.sub(_escape, _COLOUR.sub("", text).replace("\r\n", "\n"))


def printable_log(text: str) -> str:
    """As `printable`, for what a program has written: bars that were drawn again and again are lines."""
    return printable(_COLOUR.sub("", text).replace("\r\n", "\n").replace("\r", "\n").replace("\x1b[A", ""))


class PrintableFormatter(logging.Formatter):
    """Log lines as a terminal may show them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _escape(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{int.from_bytes(units[at : at + 2], 'big'):04x}" for at in range(0, len(units), 2))


def first_line(error: BaseException) -> str:
    """What an error says first; its kind, where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
