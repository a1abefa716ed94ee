"""Waiting for the cluster: never for ever, and never without a word."""

import logging
from typing import Any

import ray

from raytune.errors import ClusterError
from raytune.units import format_seconds

QUIET_S = 5.0
"""Longest wait that is nobody's business."""

_log = logging.getLogger(__name__)


def wait_for(task: ray.ObjectRef, what: str, timeout_s: float) -> Any:
    """The result of a task, when the cluster had room for it.

    Args:
        what: that the task waits for, for messages.

    Raises:
        ClusterError: if it has not ended after `timeout_s`, with what is free and what there is.
    """
    ready, _ = ray.wait([task], timeout=min(QUIET_S, timeout_s))
    if not ready and timeout_s > QUIET_S:
        _log.warning("waiting for %s, at most %s; %s", what, format_seconds(timeout_s), free_in_words())
        ready, _ = ray.wait([task], timeout=timeout_s - QUIET_S)
    if not ready:
        ray.cancel(task, force=True)
        raise ClusterError(
            f"Waited {format_seconds(timeout_s)} (cluster.start_timeout) for {what}, in vain; {free_in_words()}. Try again when "
            f"other jobs have ended (`ray status` shows who holds what), or raise cluster.start_timeout."
        )
    return ray.get(task)


def free_in_words() -> str:
    """What of the cluster nobody holds, for messages."""
    total, available = ray.cluster_resources(), ray.available_resources()
    parts = [f"{available.get(kind, 0):g} of {total[kind]:g} {kind}s" for kind in ("CPU", "GPU") if kind in total]
    return "free in the cluster: " + (", ".join(parts) or "no CPU and no GPU")
