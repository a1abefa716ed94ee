"""`Trial`: one point of a search space."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One point of the space: a value. What runs it is somebody else's matter."""

    number: int
    values: Mapping[str, Any]
    """Dotted config key -> value, drawn ones and derived ones; JSON values. A key whose `when` is false is absent."""

    @property
    def name(self) -> str:
        """Name of the trial and of its run folder."""
        return f"trial-{self.number:03}"
