"""How benchmarks measure: CPU seconds of the process tree on one thread, rivals interleaved, and a JSON line for every figure."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
