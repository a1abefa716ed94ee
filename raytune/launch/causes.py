"""What ended an attempt, told from what its workers left and what Ray says."""

from collections.abc import Mapping

import ray
from ray.exceptions import RayError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckTimeoutError

from raytune.launch.attempts import NO_ROOM, NODE_LOST, WORKER_DIED, WORKER_HUNG, Failure, cause_line, plain
from raytune.launch.places import Place, ranks_in_words, read_places
from raytune.launch.waiting import free_in_words
from raytune.run_folder import RunFolder
from raytune.storage import list_folder, read_json
from raytune.training.whereabouts import Whereabouts


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
    places, found = read_places(folder, attempt), _whereabouts(folder, attempt)
    lost = {rank: cause for rank, cause in getattr(error, "worker_failures", {}).items() if rank not in ranks}
    if lost:
        kind, rank, message = _loss(lost, places, found)
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


def _loss(lost: Mapping[int, Exception], places: Mapping[int, Place], found: Mapping[int, Whereabouts]) -> tuple[str, int, str]:
    """Kind, rank and message where ranks ended without a record of their own."""
    rank = min(lost)
    hung = sorted(rank for rank, cause in lost.items() if isinstance(cause, WorkerHealthCheckTimeoutError))
    gone = _dead_nodes()
    for node in sorted({places[rank].node_id for rank in lost if rank in places} & gone):
        on_it = [rank for rank, place in places.items() if place.node_id == node]
        return NODE_LOST, min(on_it), f"node {places[on_it[0]].node} was lost, with {ranks_in_words(on_it)}"
    if hung:
        message = f"{ranks_in_words(hung)} hung: the process was stopped, or waits for something that does not come"
        return WORKER_HUNG, hung[0], f"{message}. {_others(found, places, hung)}"
    return WORKER_DIED, rank, _in_one_line(str(lost[rank]))


def _others(found: Mapping[int, Whereabouts], places: Mapping[int, Place], late: list[int], waiting: tuple[int, ...] = ()) -> str:
    """What the ranks that are not late were doing meanwhile."""
    told = [f"rank {rank} {where}" for rank, where in sorted(found.items()) if rank not in late]
    told += [f"{ranks_in_words(list(waiting))} waited for it in vain"] if waiting else []
    silent = sorted(set(places) - set(found) - set(late) - set(waiting))
    return "Meanwhile " + "; ".join([*told, *([f"{ranks_in_words(silent)} did not say"] if silent else [])] or ["nobody waited"])


def _dead_nodes() -> set[str]:
    try:
        return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
    except RayError:  # then more is lost than a node, and its own watch says so
        return set()


def _whereabouts(folder: RunFolder, attempt: int) -> dict[int, Whereabouts]:
    try:
        return {int(rank): Whereabouts(**where) for rank, where in read_json(folder.whereabouts(attempt)).items()}
    except FileNotFoundError:
        return {}


def _is_collective_timeout(kind: str, message: str) -> bool:
    """Whether a rank gave up waiting for the others: what gloo and NCCL raise through torch."""
    return kind in ("RuntimeError", "DistBackendError") and any(words in message.lower() for words in ("timed out", "timeout"))


def _in_one_line(message: str) -> str:
    """Ray's report of a dead process without its addresses and advice."""
    for line in plain(message).splitlines():
        if "Worker exit detail:" in line:
            return "the process died: " + line.split("Worker exit detail:")[1].split("Some common causes")[0].strip()
    return cause_line(message) if message.strip() else "the process died without a message"
