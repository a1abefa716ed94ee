"""Ranks that agree: what one of them raises, all of them raise, and what rank 0 finds, all of them know."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from raytune.errors import RaytuneError

T = TypeVar("T")


class Peers:
    """The ranks of a run, as far as they have to agree.

    Args:
        gather: every rank's value, in order of rank, on every rank.
        kind: of the error that stands for one that is not raytune's.
    """

    def __init__(self, rank: int, gather: Callable[[Any], list[Any]], kind: type[RaytuneError]) -> None:
        self._rank, self._gather, self._kind = rank, gather, kind

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do something on every rank; the results of all, in the order of ranks, once every rank is done.

        Raises:
            RaytuneError: the error of the lowest rank that failed, on every rank.
        """
        result, failure, cause = None, None, None
        try:
            result = work()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in a library's Rust is no Exception, and the others wait for this rank
            failure = cause = error
            if not isinstance(error, RaytuneError):
                failure = self._kind(f"Rank {self._rank} on {os.uname().nodename}: {type(error).__name__}: {error}")
        outcomes = self._gather((result, failure))
        first = next((error for _, error in outcomes if error is not None), None)
        if first is None:
            return [outcome for outcome, _ in outcomes]
        if cause is None or first is cause:
            raise first
        raise first from cause

    def decide(self, work: Callable[[], T]) -> T:
        """Do something on rank 0; its result on every rank."""
        return self.together(lambda: work() if self._rank == 0 else None)[0]  # pyright: ignore[reportReturnType]


def gather_in_own_group(world_size: int, timeout_s: float) -> Callable[[Any], list[Any]]:
    """A `gather` that waits up to `timeout_s`, whatever the time-out of the run's collectives, and that a thread may use beside
    them. Every rank calls this, at the same point.
    """
    if world_size == 1:
        return lambda value: [value]
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * world_size
        dist.all_gather_object(values, value, group=group)
        return values

    return gather
