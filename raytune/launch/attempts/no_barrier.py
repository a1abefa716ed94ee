"""What stands in place of Ray's synchronisation actor (Ray 2.60), a process through which ranks wait for each other and agree on
the name of a checkpoint whenever they report. Those of a run report metrics alone, and meet in a process group of their own.
"""

from collections.abc import Callable
from typing import Any

import ray
from ray.train.v2._internal.execution.worker_group import state, worker_group

REPORT = "ray.train.report"


class _Method:
    """Answers at once, as one of an actor does later."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self._answer = answer

    def remote(self, *arguments: Any, **named: Any) -> ray.ObjectRef:
        return ray.put(self._answer(*arguments, **named))


def _broadcast(*, data: Any, caller_method_name: str, **who: Any) -> Any:
    """The rank's own name of a checkpoint, of which there is none.

    Raises:
        NotImplementedError: for whoever does want to wait for other ranks.
    """
    if caller_method_name != REPORT:
        raise NotImplementedError(f"{caller_method_name} does not work in a run of raytune; torch.distributed does.")
    return data


class NoBarrier:
    """Made and asked as Ray makes and asks the actor; workers get it as they would get a handle of the actor."""

    broadcast_from_rank_zero = _Method(_broadcast)
    set_required_ranks = _Method(lambda ranks: True)
    reset = _Method(lambda: None)

    @classmethod
    def options(cls, **placement: Any) -> "type[NoBarrier]":
        return cls

    @classmethod
    def remote(cls, **limits: Any) -> "NoBarrier":
        return cls()


def without_barrier() -> None:
    """Have Ray Train in this process, a controller's, start no such actor: it has no setting for that."""
    worker_group.SynchronizationActor = NoBarrier  # pyright: ignore[reportAttributeAccessIssue]
    state._shutdown_sync_actor = lambda sync_actor: None
