"""The run that a folder holds already: its plan and its newest checkpoint, which decide how a command goes on with it."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from raytune.config.sections.run import RunConfig
from raytune.data.store.same_rows import have_same_rows
from raytune.data.store.store import complete_meta
from raytune.errors import CheckpointError
from raytune.launch.data.stores import STORES_FOLDER
from raytune.launch.state.finished import is_finished
from raytune.launch.state.record import read_plan, refuse_another_run
from raytune.plan.identity.division import Begun, Layout, continued, only_as
from raytune.plan.identity.identity import fingerprints
from raytune.plan.run_plan import RunPlan, StorePlan
from raytune.run_folder import RunFolder
from raytune.storage import exists, is_local, local_path
from raytune.training.checkpoints.commit import Commit, committed
from raytune.training.engines.layout import read_layout


def read_begun(folder: RunFolder) -> Begun | None:
    """The run in a folder; None if it has no plan yet.

    Raises:
        UserError: if another raytune wrote it.
    """
    if not exists(folder.plan):
        return None
    layouts = (_layout_of(commit) for commit in sorted(committed(folder), key=lambda commit: -commit.step))
    return Begun(plan=read_plan(folder), layout=next((layout for layout in layouts if layout), None))


def _layout_of(commit: Commit) -> Layout | None:
    """None: it is damaged, and the workers will set it aside for the one before."""
    with suppress(CheckpointError):
        return read_layout(commit.state)
    return None


def begun_for(config: RunConfig, folder: RunFolder) -> Begun | None:
    """The run that a config is to continue.

    Raises:
        PlanError: (or UserError) if its newest checkpoint does not allow that whatever machines there are, with the way out.
    """
    begun = read_begun(folder)
    if begun and is_finished(folder, config):
        begun = replace(begun, layout=None)  # nothing is to be loaded
    if begun:
        continued(config, begun)
    return begun


def as_begun(folder: RunFolder, plan: RunPlan, config: RunConfig) -> tuple[RunPlan, Begun | None]:
    """A plan as it goes on with the run in a folder, whose rows may go by other names, and that run.

    Raises:
        UserError: if the run that is there is another.
    """
    begun = read_begun(folder)
    plan = known_rows(folder, begun.plan, plan) if begun else plan
    refuse_another_run(folder, plan, config)
    return plan, begun


def refuse_unloadable(begun: Begun, plan: RunPlan) -> None:
    """Refuse a plan whose engine could not load the newest checkpoint, before workers are started for it.

    Raises:
        PlanError: with what the checkpoint fits.
    """
    own = Layout(zero_stage=plan.engine.zero_stage, world_size=plan.batch.workers, precision=plan.precision)
    if begun.layout is not None and not own.loads(begun.layout):
        raise only_as(begun, f"the plan is for {own}", "cluster.workers and training.zero.stage back")


def known_rows(folder: RunFolder, was: RunPlan, plan: RunPlan) -> RunPlan:
    """`plan`, whose stores also go by the names of those in `was` that have the same rows, and whose validation sets keep theirs.

    A store is named by a hash of its sources and of the code that reads them: a file with another name, or another raytune, gives
    the same rows another name. Where both stores are still there, their rows decide. A validation set is called after its file.
    """
    data, named = plan.data, {store.name: store for store in was.data.validation}
    names = {store.name for store in data.validation}
    left = [store for store in was.data.validation if store.name not in names]
    train = _known(was.data.train, data.train) if _are_same(folder, was.data.train, data.train) else data.train
    validation = []
    for store in data.validation:
        candidates = [named[store.name]] if store.name in named else left
        before = next((each for each in candidates if _are_same(folder, each, store)), None)
        if before in left:
            left.remove(before)
        validation.append(_known(before, store) if before else store)
    ewc = data.ewc
    if ewc and was.data.ewc and _are_same(folder, was.data.ewc, ewc):
        ewc = _known(was.data.ewc, ewc)
    renamed = {new.name: old.name for new, old in zip(data.validation, validation, strict=True)}
    early = plan.stopping.early_stopping
    stopping = {"early_stopping": early.model_copy(update={"metric": _renamed(early.metric, renamed)})} if early else {}
    return plan.model_copy(
        update={
            "data": data.model_copy(update={"train": train, "validation": validation, "ewc": ewc}),
            "checkpoint": plan.checkpoint.model_copy(update={"metric": _renamed(plan.checkpoint.metric, renamed)}),
            "stopping": plan.stopping.model_copy(update=stopping),
        }
    )


def _renamed(metric: str, names: Mapping[str, str]) -> str:
    """A metric whose validation set, if it is of one, goes by another name."""
    kind, _, rest = metric.partition("/")
    name, _, of_set = rest.partition("/")
    return f"{kind}/{names.get(name, name)}/{of_set}" if of_set else metric


def _known(was: StorePlan, store: StorePlan) -> StorePlan:
    """`store` under the names of `was`, which has the same rows."""
    own = PurePosixPath(store.path).name
    names = tuple(name for name in dict.fromkeys([*store.known_as, *fingerprints(was)]) if name != own)
    return store.model_copy(update={"name": was.name, "known_as": names})


def _are_same(folder: RunFolder, was: StorePlan, store: StorePlan) -> bool:
    """Whether two stores have the same rows, by their names or by what is in them."""
    if not set(fingerprints(was)).isdisjoint(fingerprints(store)):
        return True
    if (was.num_rows, was.num_tokens, was.num_targets) != (store.num_rows, store.num_tokens, store.num_targets):
        return False
    there = _folder_of(folder, was, store)
    return there is not None and have_same_rows(there, local_path(store.path))


def _folder_of(folder: RunFolder, was: StorePlan, store: StorePlan) -> Path | None:
    """Where the store of an earlier attempt is: where it was, beside the run, or beside the new one."""
    name = PurePosixPath(was.path).name
    for path in (was.path, f"{folder.storage}/{STORES_FOLDER}/{name}", f"{PurePosixPath(store.path).parent}/{name}"):
        if is_local(path) and complete_meta(local_path(path)) is not None:
            return local_path(path)
    return None
