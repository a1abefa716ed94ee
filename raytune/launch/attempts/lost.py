"""What to say, and to write into the run folder, when a driver has ended without a word: Ray's C++ ends the process where the
cluster's head or the node under it is gone. Called by the driver's parent, so Ray is not loaded here.
"""

import os
import signal
import socket
from contextlib import closing, suppress
from dataclasses import dataclass, replace

from raytune.errors import RaytuneError
from raytune.launch.attempts.attempts import NODE_LOST, WORKER_DIED
from raytune.launch.attempts.going_on import going_on
from raytune.launch.attempts.lease import drop_claim_of
from raytune.launch.attempts.places import Place, ranks_in_words, read_places
from raytune.launch.state.record import RunRecord
from raytune.metrics.events import EventLog
from raytune.run_folder import RunFolder

CONNECT_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """A driver that has ended, and what it had told of itself."""

    pid: int
    signal: int | None = None
    """That ended it."""
    verb: str
    cluster: str | None = None
    """As the user named it; None: inside this machine."""
    head: str | None = None
    """`host:port` of the head's GCS, once it was connected."""
    node: str | None = None
    """Ray's id of the node that it ran on."""
    address: str | None = None
    """Of that node."""
    lost: str | None = None
    """Which of Ray's processes it saw end: `gcs_server` or `raylet`."""
    storage: str | None = None
    name: str | None = None
    """Of the run at work."""
    resumes: bool | None = None
    """`checkpoint.resume` of its command; a run keeps the config that it began with. None: it is not known."""


_GOES_ON = {"sweep": "continues the sweep", **dict.fromkeys(("evaluate", "generate"), "goes on with the rows that are left")}
"""What is done by verbs that leave something to go on with, other than a run."""


def driver_lost(driver: Driver) -> str:
    """Write down that an attempt has failed, and return the message; its last line is the cause."""
    kind, cause = _cause(driver)
    if driver.storage is None or driver.name is None:
        again = [f"The same command {goes_on}."] if (goes_on := _GOES_ON.get(driver.verb)) else []
        return "\n".join([*again, f"raytune {driver.verb} ended: {cause}."])
    folder = RunFolder(driver.storage, driver.name)
    attempt, resumes = None, driver.resumes
    try:
        record = RunRecord.read(folder)
        if resumes is None:
            resumes = record is None or record.config.get("checkpoint", {}).get("resume", True)
        if record is not None and record.state == "running":
            attempt = record.attempts
            places = read_places(folder, attempt)
            cause += _with_ranks(driver, kind, places)
            if drop_claim_of(folder, driver.pid):
                headline = f"{kind}: {cause}"
                with closing(EventLog(folder.events, attempt=attempt)) as events:
                    events.write("attempt_failed", cause=headline, collateral=[], decision="raise")
                replace(record, state="failed", failure=headline).write(folder)
    except (RaytuneError, OSError) as error:
        cause += f" (the run folder could not be written: {error})"
    when = f" in attempt {attempt}" if attempt else ""
    return "\n".join([going_on(folder, resumes=resumes is not False), f"Training failed{when}: {kind}: {cause}"])


def _cause(driver: Driver) -> tuple[str, str]:
    """Kind of failure, and what happened, in words."""
    if driver.signal is not None:
        what = f"the driver (process {driver.pid} on {os.uname().nodename}) was ended by {signal.Signals(driver.signal).name}"
        return WORKER_DIED, what + ", as the kernel does when memory runs out" * (driver.signal == signal.SIGKILL)
    where = driver.head or driver.cluster
    head = f"the head of the Ray cluster {f'at {where}' if driver.cluster else 'inside this machine'} was lost: its GCS"
    if driver.lost == "gcs_server":
        return NODE_LOST, f"{head} has ended"
    if driver.lost == "raylet" or (driver.head is not None and _answers(driver.head)):
        node = f"{os.uname().nodename}" + (f" ({driver.address}, Ray node {driver.node[:12]})" if driver.node else "")
        return NODE_LOST, f"node {node} was lost: its raylet has ended, and with it the driver"
    if driver.cluster is None:
        return NODE_LOST, "the Ray cluster inside this machine was lost: its GCS or its raylet has ended"
    return NODE_LOST, f"{head} does not answer any more"


def _with_ranks(driver: Driver, kind: str, places: dict[int, Place]) -> str:
    """Which ranks were on the node that was lost."""
    if kind != NODE_LOST or not places:
        return ""
    if driver.lost == "raylet" and driver.node is not None:
        ranks = [rank for rank, place in places.items() if place.node_id == driver.node]
    elif driver.head is not None:
        ranks = [rank for rank, place in places.items() if place.address == driver.head.rpartition(":")[0]]
    else:
        ranks = list(places)
    if not ranks:
        return "; no rank was on it"
    return f", with {ranks_in_words(ranks)} on node {places[ranks[0]].node}"


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with suppress(OSError, ValueError):
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
        return True
    return False
