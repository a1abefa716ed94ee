"""What a run would be, from the driver's side: config -> machine -> data -> plan. Loads no Ray unless a cluster is named."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from raytune.config.sections.cluster import ClusterSection
from raytune.config.sections.run import RunConfig
from raytune.data.rows.shards import ParallelMap
from raytune.errors import UserError
from raytune.launch.cluster.address import named_address
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import Preparation
from raytune.launch.state.begun import begun_for, known_rows
from raytune.launch.state.record import refuse_changed_settings
from raytune.plan.facts.machine import Machine
from raytune.plan.identity.division import Begun
from raytune.plan.identity.identity import differences, identity_of
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.storage import absolute


def plan_run(config: RunConfig) -> RunPlan:
    """The plan that `run` would follow on the cluster that is named, or else on this machine. Tokenises the data.

    Raises:
        UserError: as `run` does.
    """
    begun = _begun_if_the_same(config)
    with looked_at(config.cluster) as (machine, parallel_map):
        return _planned(config, Preparation(machine, parallel_map), begun)


@contextmanager
def looked_at(section: ClusterSection) -> Iterator[tuple[Machine, ParallelMap]]:
    """The cluster that is named, or else this machine, and what tokenises data on it."""
    if named_address(section) is None:
        yield this_machine(section), map
        return
    from raytune.launch.cluster.cluster import connect, map_on_cluster  # loads Ray

    with connect(section, scales=False) as machine:
        yield machine, partial(map_on_cluster, start_timeout=section.start_timeout)


def _planned(config: RunConfig, preparation: Preparation, begun: Begun | None) -> RunPlan:
    """As the run that is there goes on, if it is this one."""
    plan = preparation.prepare(config, begun).plan
    if begun is None:
        return plan
    known = known_rows(RunFolder(plan.storage, plan.name), begun.plan, plan)
    return preparation.prepare(config).plan if differences(identity_of(begun.plan), identity_of(known)) else plan


def _begun_if_the_same(config: RunConfig) -> Begun | None:
    """The run that the config would continue. A plan may be asked for under a name that is taken: it is not refused for that."""
    folder = RunFolder(absolute(config.storage), config.name)
    try:
        refuse_changed_settings(folder, config)
        return begun_for(config, folder)
    except UserError:
        return None
