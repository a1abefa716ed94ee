"""Which Ray cluster a run is for. Standard library only, so that a command can say it before Ray is loaded."""

import os

from raytune.config.sections.cluster import ClusterSection


def named_address(section: ClusterSection) -> str | None:
    """The cluster that the user named; None: this machine is to be one for the time of the run."""
    return section.address or os.environ.get("RAY_ADDRESS")
