"""How benchmarks measure: CPU seconds of the process tree on one thread, rivals interleaved, and a JSON line for every figure."""

import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

BASELINES = Path(__file__).with_name("baselines")
LIBRARIES = ("raytune", "torch", "transformers", "ray", "deepspeed", "peft", "bitsandbytes", "accelerate", "trl")

Rival = Callable[[], Callable[[], object]]
"""Makes ready, unmeasured, and returns the work that is measured."""


def tree_cpu_s(pid: int | None = None) -> float:
    """CPU seconds of a process (default: this one) and all below it, children that have ended and were waited for included."""
    root = psutil.Process(pid)
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def interleaved(rivals: Mapping[str, Rival], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each rival in each round; a round runs all of them in turn, so that drifts of the machine hit all."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, make_ready in rivals.items():
            work = make_ready()
            started = tree_cpu_s()
            work()
            seconds[name].append(tree_cpu_s() - started)
    return seconds


@dataclass(frozen=True, slots=True)
class Exceeded:
    """A work that was ended because it took longer than its limit."""

    limit_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    cpu_s: float
    peak_mib: float
    """Resident memory of the process at its highest, less what it had before the work."""
    value: Any
    """What the work returned."""


def in_own_process(rival: Rival, limit_s: float) -> Measured | Exceeded:
    """Prepare and work in a process forked from this one, which has imported the libraries: what one leaves in memory, no other
    finds.

    Args:
        limit_s: CPU seconds of the work; a process that waits instead is ended after ten times as many by the clock.

    Raises:
        RuntimeError: with the traceback, if preparing or working failed.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(rival, limit_s, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(10 * limit_s + 60):
            return Exceeded(limit_s)
        outcome = receiver.recv()
    except EOFError:  # killed by its limit
        return Exceeded(limit_s)
    finally:
        process.kill()
        process.join()
    if isinstance(outcome, str):
        raise RuntimeError(outcome)
    return outcome


def _work(rival: Rival, limit_s: float, sender: Any) -> None:
    try:
        work = rival()
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.process_time()
        resource.setrlimit(resource.RLIMIT_CPU, (int(started + limit_s) + 1, resource.RLIM_INFINITY))
        value = work()
        cpu_s = time.process_time() - started
        resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
        if isinstance(value, Elsewhere):
            cpu_s, value, peak_kib = value.cpu_s, value.value, 0
        sender.send(Measured(cpu_s, peak_kib / 1024, value() if callable(value) else value))
    except BaseException:
        sender.send(traceback.format_exc())


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What a work returns that a program of its own did, which has measured itself."""

    cpu_s: float
    value: Any


@dataclass(slots=True)
class Series:
    """What the rounds of a rival came to."""

    cpu_s: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    value: Any = None
    ended: str | None = None
    """Why it was not measured in every round."""


def rounds_apart(
    rivals: Mapping[str, Rival], rounds: int, *, limit_s: float, hopeless: float, always: Collection[str] = ()
) -> dict[str, Series]:
    """As `interleaved`, each in a process of its own.

    Args:
        limit_s: as for `in_own_process`; who exceeds it once is not asked again.
        hopeless: times the least CPU seconds of a round, beyond which a rival cannot be the best and is not asked again.
        always: those who are asked in every round, and whom nobody is held to.
    """
    found = {name: Series() for name in rivals}
    for number in range(rounds):
        for name, rival in rivals.items():
            series = found[name]
            if series.ended:
                continue
            outcome = in_own_process(rival, limit_s)
            print(f"round {number + 1}, {name}: {outcome}"[:200], file=sys.stderr, flush=True)
            if isinstance(outcome, Exceeded):
                series.ended = f"exceeded {limit_s:g} CPU seconds in round {number + 1}"
                continue
            series.cpu_s.append(outcome.cpu_s)
            series.peak_mib = max(series.peak_mib, outcome.peak_mib)
            series.value = outcome.value
        others = [series for name, series in found.items() if name not in always and not series.ended]
        least = min((series.cpu_s[-1] for series in others), default=0.0)
        for series in others:
            if series.cpu_s[-1] > hopeless * least and number + 1 < rounds:
                series.ended = f"{series.cpu_s[-1] / least:.1f} times the fastest rival of round {number + 1}: not repeated"
    return found


def ratios(more: Sequence[float], less: Sequence[float]) -> dict[str, float]:
    """How many times `less` goes into `more`."""
    return {
        "of_minima": round(min(more) / min(less), 3),
        "of_medians": round(statistics.median(more) / statistics.median(less), 3),
    }


def report(bench: str, figures: Mapping[str, Any], output: bool) -> None:
    """Print figures as a JSON line with what they were measured on, and append it to the baselines of `bench`."""
    line = json.dumps({"bench": bench, **figures, **_circumstances()})
    print(line, flush=True)
    if output:
        BASELINES.mkdir(exist_ok=True)
        with (BASELINES / f"{bench}.jsonl").open("a") as file:
            file.write(line + "\n")


def _circumstances() -> dict[str, Any]:
    return {
        "versions": {"python": platform.python_version(), **{name: found for name in LIBRARIES if (found := _version(name))}},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
