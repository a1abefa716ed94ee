"""Run a function on several gloo ranks, each a process of its own, and bring back what every rank returned or raised."""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Imported once per session, by the server that the ranks are forked from.
PRELOADED = ["tests.numerics.preloaded"]
GRACE_S = 15.0
STOP_S = 60.0
"""For the others, once a rank has stopped with an error of raytune's."""


class RankError(AssertionError):
    """A rank failed, died or did not answer in time; the message has what each rank said."""


def run_on_ranks(function: Callable[..., Any], num_ranks: int, *arguments: Any, timeout_s: float = 500.0) -> list[Any]:
    """Call `function(*arguments)` on every rank of a new gloo group.

    Args:
        function: defined at the top level of a module; it finds its rank in torch.distributed.
        num_ranks: processes to start.
        arguments: picklable.
        timeout_s: after which all ranks are ended.

    Returns:
        What each rank returned, in order of rank; or the exception that it raised, if that is one of raytune's: so a test can
        claim that every rank stops.

    Raises:
        RankError: if a rank raised anything else, died, or was still running at the time limit.
    """
    outcomes = _outcomes(function, num_ranks, arguments, timeout_s)
    failed = {rank: outcome for rank, outcome in enumerate(outcomes) if not outcome[0]}
    if failed:
        stopped = {rank: f"stopped with {value!r}" for rank, (_, value) in enumerate(outcomes) if _is_stop(value)}
        told = {rank: text for rank, (_, text) in failed.items()} | stopped
        raise RankError("\n".join(f"--- rank {rank} of {num_ranks}: {text}" for rank, text in told.items()))
    return [value for _, value in outcomes]


def _outcomes(function: Callable[..., Any], num_ranks: int, arguments: tuple, timeout_s: float) -> list[tuple[bool, Any]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    outcomes: dict[int, tuple[bool, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{folder}/rendezvous"  # a port that was free may be another's by the time a rank listens
        processes, readers = [], {}
        for rank in range(num_ranks):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(writer, rendezvous, rank, num_ranks, Path(folder), function, arguments), daemon=True
            )
            process.start()
            writer.close()
            processes.append(process)
            readers[reader] = rank
        deadline = time.monotonic() + timeout_s
        while readers and (left_s := deadline - time.monotonic()) > 0:
            for reader in wait(list(readers), timeout=left_s):
                rank = readers.pop(reader)  # pyright: ignore[reportArgumentType]
                outcomes[rank] = _received(reader, processes[rank])  # pyright: ignore[reportArgumentType]
                is_done, value = outcomes[rank]
                if not is_done or _is_stop(value):
                    # The others may now wait for it in a collective for ever.
                    deadline = min(deadline, time.monotonic() + (STOP_S if is_done else GRACE_S))
        for rank, process in enumerate(processes):
            process.join(GRACE_S if rank in outcomes else 0)
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGUSR1)
                process.join(1)  # until it has said where it is
                process.kill()
                process.join()
                outcomes.setdefault(rank, (False, f"still running when its time was over\n{_log(folder, rank)}"))
            elif rank not in outcomes:  # it ended in the moment in which its time was over
                outcomes[rank] = _received(next(reader for reader, number in readers.items() if number == rank), process)
    return [outcomes[rank] for rank in range(num_ranks)]


def _is_stop(value: Any) -> bool:
    return isinstance(value, BaseException)


def _received(reader: Connection, process: Any) -> tuple[bool, Any]:
    try:
        return pickle.loads(reader.recv_bytes())
    except EOFError:
        process.join(GRACE_S)
        return False, f"died with exit code {process.exitcode}"


def _rank_main(
    writer: Connection, rendezvous: str, rank: int, num_ranks: int, folder: Path, function: Callable[..., Any], arguments: tuple
) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from raytune.errors import RaytuneError

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    log = (folder / f"{rank}.log").open("w")
    faulthandler.register(signal.SIGUSR1, log)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=120))
        try:
            outcome = True, function(*arguments)
        except RaytuneError as error:
            outcome = True, error
        answer = pickle.dumps(outcome)
    except BaseException:
        log.flush()
        answer = pickle.dumps((False, f"{traceback.format_exc()}\n{_log(str(folder), rank)}"))
    writer.send_bytes(answer)
    # Without tear-down: a peer that failed would be waited for.
    os._exit(0)


def _log(folder: str, rank: int) -> str:
    path = Path(folder) / f"{rank}.log"
    return f"its output ends:\n{path.read_text(errors='replace')[-3000:]}" if path.exists() else "no output"
