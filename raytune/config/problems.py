"""What can be wrong with a config: a `Problem` has a place, a key and an id; a `ConfigError` holds all of them."""

import json
import math
from dataclasses import dataclass

from raytune.credentials import redacted
from raytune.errors import UserError

UNKNOWN_KEY, DUPLICATE_KEY, MISSING_KEY, WRONG_VALUE, CONFLICT = "E101", "E102", "E103", "E104", "E105"
NOT_YAML, UNREADABLE, REFUSED_YAML, BAD_OVERRIDE, SECRET_VALUE, NO_SUCH_FILE = "E106", "E107", "E108", "E109", "E110", "E111"
NOT_POSSIBLE = "E112"

_LONGEST_TEXT = 60
_LONGEST_COLUMN = 72


@dataclass(frozen=True, slots=True)
class Place:
    """Where something was written: a position in a file (counted from 1), or an override on the command line."""

    file: str
    line: int | None = None
    column: int | None = None
    rank: int = 0
    """Files count first, in the order given, then overrides."""

    @property
    def order(self) -> tuple[int, int, int]:
        return self.rank, self.line or 0, self.column or 0

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Problem:
    id: str
    place: Place
    key: str
    message: str


class ConfigError(UserError):
    """Everything that is wrong with a config, in the order in which it was written."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        said = [problem.message.splitlines() or [""] for problem in self.problems]
        rows = [(str(each.place), each.key, first, f"[{each.id}]") for each, (first, *_) in zip(self.problems, said, strict=True)]
        widths = [min(max(len(row[i]) for row in rows), _LONGEST_COLUMN) for i in range(3)]
        lines = []
        for row, (_, *more) in zip(rows, said, strict=True):
            lines.append("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))
            lines += [f"    {line}" for line in more]
        plural = "s" * (len(rows) != 1)
        lines.append(f"{len(rows)} problem{plural}; nothing was started. `raytune explain {self.problems[0].id}`")
        return "\n".join(lines)


def shown(value: object) -> str:
    """A value as the user would write it: short, on one line, and without secrets."""
    if value is None:
        return "nothing"
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan")
    return shortened(json.dumps(value, ensure_ascii=False, default=str))


def shortened(text: str, most: int = _LONGEST_TEXT) -> str:
    """Text that is fit to print: one line, no secrets, nothing that a terminal or an encoder would choke on."""
    text = redacted(text)
    text = text if text.isprintable() else text.encode("unicode_escape").decode()
    return text if len(text) <= most else text[: most - 3] + "..."


def dotted(path: tuple[str | int, ...]) -> str:
    """`data.train.0.path`."""
    return ".".join(shortened(str(part)) for part in path)
