"""A base of the hub, brought to every node before anything of a run is loaded."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

from raytune.errors import RaytuneError
from raytune.hub.snapshot import Progress, Report
from raytune.model.files.base_content import is_known_by_commit
from raytune.model.files.hub import download_base
from raytune.plan.run_plan import ModelPlan, RunPlan
from raytune.run_folder import RunFolder
from raytune.storage import exists, is_local, remove_empty_folder, remove_folder, write_json
from raytune.training.checkpoints.peers import Peers, gather_in_own_group

PATIENCE_S = 24 * 3600.0
"""How long ranks wait for a node whose download is slow. A rank that dies is noticed at once, whatever this says."""
REPORT_EVERY_S, REPORT_REMOTE_EVERY_S = 2.0, 15.0


def fetch_base(plan: RunPlan, folder: RunFolder, rank: int, world_size: int) -> None:
    """Download what this node lacks of the base, and of a teacher; one of its ranks does, and all ranks of the run wait until all
    nodes have it.

    Raises:
        ModelError, ClusterError: the same on every rank, as `download_base` does.
    """
    models = [model for model in plan.models if is_known_by_commit(model)]
    if not models:
        return
    peers = Peers(rank, gather_in_own_group(world_size, PATIENCE_S), RaytuneError)
    for model in models:
        peers.together(partial(_download, model, folder))


def _download(model: ModelPlan, folder: RunFolder) -> None:
    with noted(folder) as report:
        download_base(model.path, model.revision, with_code=model.trust_remote_code, report=report)


@contextmanager
def noted(folder: RunFolder) -> Iterator[Report]:
    """A report that leaves in the run folder how far this node is, for whoever shows the run."""
    path = f"{folder.downloads}/{os.uname().nodename}.json"
    every_s = REPORT_EVERY_S if is_local(folder.path) else REPORT_REMOTE_EVERY_S
    told: list[float] = []

    def report(progress: Progress) -> None:
        if told and time.monotonic() - told[-1] < every_s:
            return
        if progress.is_waiting and exists(path):
            return  # another rank of this run downloads, and tells more
        told.append(time.monotonic())
        write_json(path, asdict(progress) | {"time": time.time()})

    try:
        yield report
    finally:
        if told:
            remove_folder(path, folder.path)
            remove_empty_folder(folder.downloads)
