"""A trial: one point of the search space. A value; what runs it is somebody else's matter."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    number: int
    values: Mapping[str, Any]
    """By dotted config key, drawn and derived ones alike: JSON values. A key whose condition does not hold is absent."""

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return f"trial-{self.number:03d}"
