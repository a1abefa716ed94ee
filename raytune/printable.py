"""Text as a terminal and a page may show it: what strangers wrote in rows and names moves no cursor and turns no line round.

Escapes are those of JSON, so that JSON stays JSON. Used at the rims: `cli.say`, the consoles of `launch.data.live`, pages.
"""

import logging
import re

# Controls of a terminal (C0, DEL, C1), lines and paragraphs of Unicode, marks of direction and order, tags, half characters.
_UNFIT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


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


def without_sequences(text: str) -> str:
    """A text without the colours and movements of a terminal, which Ray puts into tracebacks."""
    return _SEQUENCE.sub("", text)


def plain_text(text: str | None) -> str:
    """A message as any file can hold it: without what only a terminal understands, and with "?" for what is no text at all."""
    return _CONTROL.sub("", without_sequences(text or "")).encode(errors="replace").decode().strip()


def in_a_line(what: object, most: int = 300) -> str:
    """A text or an error on one line, cut with dots; of an error that says nothing, its kind."""
    text = " ".join(str(what).split())
    if not text and isinstance(what, BaseException):
        text = type(what).__name__
    return shortened(text, most)


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters; dots stand for what was cut."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
