"""A base of the Hugging Face hub, whole on this machine: the files that transformers reads, never a pickle, and code only where
that was allowed for a commit."""

from collections.abc import Sequence
from pathlib import Path

from raytune.errors import ModelError
from raytune.hub.cache import cached_snapshot
from raytune.hub.client import HubFile, Patience
from raytune.hub.snapshot import Report, described, fetch, say_nothing
from raytune.model.files.weight_files import weight_files, weight_names
from raytune.plan.model.base_model import is_on_hub
from raytune.plan.run_plan import ModelPlan
from raytune.storage import is_local


def download_base(
    base: str, revision: str | None, *, with_code: bool = False, report: Report = say_nothing, patience: Patience | None = None
) -> Path:
    """Make sure that a hub model is whole on this machine. Any number of ranks and jobs may ask at once: one downloads.

    Args:
        base: id on the hub.
        revision: branch, tag or commit.
        with_code: whether Python files beside the weights may be run, and so are wanted.

    Returns:
        Its folder.

    Raises:
        ModelError: if it may not be seen from here, holds no weights as safetensors, or there is no room for it.
        ClusterError: if the hub cannot be reached, or gives up too often.
    """
    commit = described(base, revision, with_code=with_code, report=report, patience=patience)
    folder = cached_snapshot(base, commit)
    assert folder is not None, "it was just described"
    if is_whole(folder):
        return folder

    def weights(files: Sequence[HubFile]) -> list[HubFile]:
        names = weight_names(folder, {file.name for file in files}, base)
        return [file for file in files if file.name in names]

    return fetch(base, commit, weights, report, patience)


def is_whole(folder: Path) -> bool:
    """Whether every file of weights that the index names is in a folder."""
    try:
        weight_files(folder)
    except ModelError:
        return False
    return True


def bring_base(model: ModelPlan) -> None:
    """Make sure that a model is whole on this machine, if it is one of a hub."""
    if is_local(model.path) and is_on_hub(model.path):
        download_base(model.path, model.revision, with_code=model.trust_remote_code)
