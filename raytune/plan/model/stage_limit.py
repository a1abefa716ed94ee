"""A limit of ZeRO's stages that one setting of a run makes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageLimit:
    """ZeRO stages that one setting leaves, and why."""

    lowest: int
    highest: int
    because: str
    instead: str = ""
    """What to set, after "Set", so that the limit is gone."""
