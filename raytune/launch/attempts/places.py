"""Which rank of an attempt is on which node, and what that is called in messages. Written by the controller, read by whoever
has to say what was lost, without Ray."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from raytune.run_folder import RunFolder
from raytune.storage import read_json, write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a worker's process is."""

    host: str
    address: str
    node_id: str
    """As Ray lists it."""
    pid: int

    @property
    def node(self) -> str:
        """The node in words; two of them may share a host."""
        return f"{self.host} ({self.address}, Ray node {self.node_id[:12]})"


def write_places(folder: RunFolder, attempt: int, places: Mapping[int, Place]) -> None:
    write_json(folder.places(attempt), {str(rank): asdict(place) for rank, place in places.items()})


def read_places(folder: RunFolder, attempt: int) -> dict[int, Place]:
    """Place of each rank; none if the workers of that attempt were not placed."""
    try:
        return {int(rank): Place(**place) for rank, place in read_json(folder.places(attempt)).items()}
    except FileNotFoundError:
        return {}


def ranks_in_words(ranks: list[int]) -> str:
    """`rank 1`, or `ranks 0, 1`."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))}"
