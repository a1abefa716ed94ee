"""One point of a search space."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One point of the space: a value. What runs it is somebody else's matter.

    Attributes:
        values: by dotted config key, drawn ones and derived ones; JSON values. A key whose `when` is false is absent.
    """

    number: int
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """`trial-007`."""
        return f"trial-{self.number:03d}"
