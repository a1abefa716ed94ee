"""What ended an attempt, told from what its workers left and what Ray says."""

from collections.abc import Collection, Mapping
from contextlib import suppress

import ray
from ray.exceptions import RayError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune.launch.attempts.attempts import NO_ROOM, NODE_LOST, WORKER_DIED, WORKER_HUNG, Failure, cause_line, plain
from raytune.launch.attempts.places import Place, ranks_in_words, read_places
from raytune.launch.cluster.waiting import free_in_words
from raytune.run_folder import RunFolder
from raytune.storage import list_folder, read_json
from raytune.training.whereabouts import Whereabouts

NOTICE_S = 40.0
"""Ray lists a node as dead after five looks in vain, of 3 seconds and at most 10 more for the last one."""


def first_failure(folder: RunFolder, attempt: int, error: Exception) -> Failure:
    """The earliest of the workers' own records; a rank that Ray lost without one comes before the survivors it took along, and a
    rank for which others waited in vain before those."""
    records = sorted(
        (
            read_json(f"{folder.failures}/{name}")
            for name in list_folder(folder.failures)
            if name.startswith(f"attempt-{attempt}.rank-")
        ),
        key=lambda record: record["time"],
    )
    ranks = tuple(record["rank"] for record in records)
    places, answers = read_places(folder, attempt), _whereabouts(folder, attempt)
    found = {rank: where for rank, where in answers.items() if where is not None}
    lost = {rank: cause for rank, cause in getattr(error, "worker_failures", {}).items() if rank not in ranks}
    if lost:
        gone = _dead_nodes() & {places[rank].node_id for rank in lost if rank in places}
        kind, rank, message = _loss(lost, places, found, gone)
        return _failure(attempt, kind, rank, places, message, str(error), ranks)
    if not records:
        cause = getattr(error, "controller_failure", error)
        if isinstance(cause, WorkerGroupStartupTimeoutError):
            message = f"the workers found no place within cluster.start_timeout; {free_in_words()}"
            return _failure(attempt, NO_ROOM, None, places, message, str(error), ())
        # What a worker raised before its own work began, in the set-up of the process group for one.
        raised = getattr(cause, "cause", None) if isinstance(cause, RayTaskError) else None
        kind, message = (type(raised).__name__, str(raised)) if raised else (WORKER_DIED, _in_one_line(str(cause)))
        return _failure(attempt, kind, None, places, message, str(error), ())
    first = records[0]
    if _is_broken_connection(first["kind"], first["message"]):  # a survivor, or a process that ends, was quicker to tell than Ray
        silent = {rank: RuntimeError(f"rank {rank} ended without a word") for rank in sorted({*places} - {*ranks} - {*answers})}
        gone = _silent_nodes({places[rank].node_id for rank in (*ranks, *silent) if rank in places})
        if silent or gone:
            kind, rank, message = _loss(silent, places, found, gone)
            others = tuple(other for other in ranks if other != rank)
            return _failure(attempt, kind, rank, places, message, first["traceback"], others)
    late = sorted(rank for rank, where in found.items() if rank not in ranks and not where.waits)
    if late and _is_collective_timeout(first["kind"], first["message"]):
        message = f"rank {late[0]} was late: it {found[late[0]]}. {_others(found, places, late[:1], waiting=ranks)}"
        return _failure(attempt, WORKER_HUNG, late[0], places, message, first["traceback"], ranks)
    return Failure(
        attempt=attempt,
        rank=first["rank"],
        node=first["node"],
        kind=first["kind"],
        message=plain(first["message"]),
        traceback=plain(first["traceback"]),
        collateral=ranks[1:],
    )


def _failure(
    attempt: int,
    kind: str,
    rank: int | None,
    places: Mapping[int, Place],
    message: str,
    traceback: str,
    collateral: tuple[int, ...],
) -> Failure:
    node = places[rank].host if rank is not None and rank in places else None
    return Failure(
        attempt=attempt, rank=rank, node=node, kind=kind, message=message, traceback=plain(traceback), collateral=collateral
    )


def _loss(
    lost: Mapping[int, Exception], places: Mapping[int, Place], found: Mapping[int, Whereabouts], gone: Collection[str]
) -> tuple[str, int, str]:
    """Kind, rank and message where ranks ended without a record of their own, or nodes are gone."""
    hung = sorted(rank for rank, cause in lost.items() if isinstance(cause, WorkerHealthCheckTimeoutError))
    for node in sorted(gone):
        on_it = [rank for rank, place in places.items() if place.node_id == node]
        return NODE_LOST, min(on_it), f"node {places[on_it[0]].node} was lost, with {ranks_in_words(on_it)}"
    if hung:
        message = f"{ranks_in_words(hung)} hung: the process was stopped, or waits for something that does not come"
        return WORKER_HUNG, hung[0], f"{message}. {_others(found, places, hung)}"
    rank = min(lost)
    return WORKER_DIED, rank, _in_one_line(str(lost[rank]))


def _others(found: Mapping[int, Whereabouts], places: Mapping[int, Place], late: list[int], waiting: tuple[int, ...] = ()) -> str:
    """What the ranks that are not late were doing meanwhile."""
    told = [f"rank {rank} {where}" for rank, where in sorted(found.items()) if rank not in late]
    told += [f"{ranks_in_words(list(waiting))} waited for it in vain"] if waiting else []
    silent = sorted(set(places) - set(found) - set(late) - set(waiting))
    return "Meanwhile " + "; ".join([*told, *([f"{ranks_in_words(silent)} did not say"] if silent else [])] or ["nobody waited"])


def _silent_nodes(nodes: Collection[str]) -> set[str]:
    """Those of some nodes that do nothing when asked to: Ray lists a node as alive until it has missed it for a while."""
    task = ray.remote(num_cpus=0, max_retries=0)(_no_work)
    asked = {task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): node for node in nodes}
    ended, _ = ray.wait(list(asked), num_returns=len(asked), timeout=NOTICE_S)
    answered = set()
    for answer in ended:
        with suppress(RayError):
            ray.get(answer)
            answered.add(asked[answer])
    return set(nodes) - answered


def _no_work() -> None:
    """What a node is asked to do."""


def _dead_nodes() -> set[str]:
    try:
        return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
    except RayError:  # then more is lost than a node, and its own watch says so
        return set()


def _whereabouts(folder: RunFolder, attempt: int) -> dict[int, Whereabouts | None]:
    """Of the ranks that answered; None: it trained no more."""
    try:
        told = read_json(folder.whereabouts(attempt))
    except FileNotFoundError:
        return {}
    return {int(rank): None if where is None else Whereabouts(**where) for rank, where in told.items()}


def _is_collective_timeout(kind: str, message: str) -> bool:
    """Whether a rank gave up waiting for the others: what gloo and NCCL raise through torch."""
    return kind in ("RuntimeError", "DistBackendError") and any(words in message.lower() for words in ("timed out", "timeout"))


def _is_broken_connection(kind: str, message: str) -> bool:
    """Whether a rank lost its connection to another: what gloo and NCCL raise through torch, or torch itself where Ray, ending
    the workers, took its process group away between two steps."""
    if kind == "ValueError":
        return "process group has not been initialized" in message
    words = ("connection", "read error", "write error", "remote process exited", "socket")
    return kind in ("RuntimeError", "DistBackendError", "DistNetworkError") and any(word in message.lower() for word in words)


def _in_one_line(message: str) -> str:
    """Ray's report of a dead process without its addresses and advice."""
    for line in plain(message).splitlines():
        if "Worker exit detail:" in line:
            return "the process died: " + line.split("Worker exit detail:")[1].split("Some common causes")[0].strip()
    return cause_line(message) if message.strip() else "the process died without a message"
