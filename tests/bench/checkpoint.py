"""What training waits for when it saves, against a save that it waits for from beginning to end.

    python -m tests.bench.checkpoint --output

Whole weights in fp32 and AdamW, 100 to 800 MB in all, on local storage. Each arm is a process of its own that takes a few steps
and saves after some of them, so that a first save is the first that the process ever makes; arms are interleaved. Wall time,
since this is about waiting, and CPU seconds beside it, since a busy machine lets short and long waits wait alike for a core:

    copied       training waits for a copy in memory, and a thread writes, hashes and commits it
    waiting      training waits until the files are written (checkpoint.in_background: false), a thread hashes and commits them
    synchronous  waiting, and until the commit: what both are compared with

Steps that are taken while files are on their way are timed beside those that are not.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

from tests.bench.measure import report

SIZES_MB = (100, 400, 800)
NUM_LAYERS = 24
NUM_SAVES = 4
QUIET_STEPS = 3
BYTES_PER_WEIGHT = 12
"""Of a weight and its two moments."""
ARMS = ("copied", "waiting")
NAMES = ("first", "second", *("later",) * (NUM_SAVES - 2))
GOAL = 0.1
"""Largest share of a synchronous save (`raytune explain performance`), at 400 MB and more."""


def arm(name: str, megabytes: int, storage: str) -> dict[str, list[float]]:
    """Seconds of one process, save by save."""
    import torch
    from torch import nn

    from raytune.plan.run_plan import CheckpointPlan, SnapshotPlan
    from raytune.run_folder import RunFolder
    from raytune.training.checkpoints.checkpoint import Checkpoints
    from raytune.training.engines.plain_engine import PlainEngine

    torch.set_num_threads(1)
    width = round((1e6 * megabytes / BYTES_PER_WEIGHT / NUM_LAYERS) ** 0.5)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(NUM_LAYERS)))
    engine = PlainEngine(
        model, torch.optim.AdamW(model.parameters()), precision="fp32", max_grad_norm=1.0, device=torch.device("cpu")
    )
    room = SnapshotPlan(first_rank=round(1.02 * 1e6 * megabytes), other_ranks=0) if name == "copied" else None
    policy = CheckpointPlan(every_steps=1, every_s=None, keep_last=1, keep_best=0, metric="-", mode="min", snapshot=room)
    checkpoints = Checkpoints(
        RunFolder(storage, "run"), engine, attempt=1, policy=policy, fingerprint={}, report=lambda event, **facts: None
    )
    data = torch.randn(4, width)

    def step() -> float:
        started = time.perf_counter()
        engine.backward(engine.module(data).square().mean())
        engine.step(1e-4)
        return time.perf_counter() - started

    names = ("stall_s", "stall_cpu_s", "synchronous_s", "synchronous_cpu_s", "quiet_step_s", "step_while_saving_s")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(NUM_SAVES):
        seconds["quiet_step_s"] += [step() for _ in range(QUIET_STEPS)][1:]
        started, cpu, own_cpu = time.perf_counter(), time.process_time(), time.thread_time()
        checkpoints.save(number + 1, metrics={})
        seconds["stall_s"].append(time.perf_counter() - started)
        seconds["stall_cpu_s"].append(time.thread_time() - own_cpu)
        if name == "copied":
            while any(thread.name == f"checkpoint {number + 1}" for thread in threading.enumerate()):
                seconds["step_while_saving_s"].append(step())
        checkpoints.wait()
        seconds["synchronous_s"].append(time.perf_counter() - started)
        seconds["synchronous_cpu_s"].append(time.process_time() - cpu)
    return seconds


def run_arm(name: str, megabytes: int, limit_s: float) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as storage:
        command = [sys.executable, "-m", "tests.bench.checkpoint", "--arm", name, str(megabytes), storage]
        ended = subprocess.run(
            command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=limit_s, check=True
        )
    return json.loads(ended.stdout.splitlines()[-1])


def by_name(rounds: list[dict[str, list[float]]], figure: str) -> dict[str, list[float]]:
    """Seconds of all rounds, by which save it was."""
    found: dict[str, list[float]] = {}
    for seconds in rounds:
        for name, one in zip(NAMES, seconds[figure], strict=True):
            found.setdefault(name, []).append(round(one, 4))
    return found


def against(stalls: dict[str, list[float]], synchronous: list[float]) -> dict[str, dict[str, float]]:
    """Shares of a synchronous save, by which save it was."""
    return {
        name: {
            "of_minima": round(min(times) / min(synchronous), 3),
            "of_medians": round(statistics.median(times) / statistics.median(synchronous), 3),
        }
        for name, times in stalls.items()
    }


def figures(megabytes: int, rounds: dict[str, list[dict[str, list[float]]]]) -> dict[str, Any]:
    found: dict[str, Any] = {"megabytes": megabytes, "rounds": len(rounds["copied"])}
    for unit in ("s", "cpu_s"):
        synchronous = [one for seconds in rounds["waiting"] for one in seconds[f"synchronous_{unit}"]]
        stalls = {name: by_name(seconds, f"stall_{unit}") for name, seconds in rounds.items()}
        shares = {name: against(times, synchronous) for name, times in stalls.items()}
        found |= {
            f"synchronous_{unit}": [round(one, 3) for one in synchronous],
            f"stall_{unit}": stalls,
            f"stall_{unit}_against_synchronous": shares,
            f"goal_met_{unit}": {name: share["of_medians"] <= GOAL for name, share in shares["copied"].items()},
        }
    quiet, saving = (
        [one for seconds in rounds["copied"] for one in seconds[name]] for name in ("quiet_step_s", "step_while_saving_s")
    )
    slowed = statistics.median(saving) / statistics.median(quiet) if saving else None
    return found | {"goal": GOAL, "step_while_saving_against_quiet": slowed and round(slowed, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, nargs="+", default=list(SIZES_MB))
    parser.add_argument("--limit-s", type=float, default=180, help="seconds that one arm may take")
    parser.add_argument("--output", action="store_true", help="append the figures to tests/bench/baselines")
    parser.add_argument("--arm", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        name, megabytes, storage = arguments.arm
        print(json.dumps(arm(name, int(megabytes), storage)))
        return
    for megabytes in arguments.megabytes:
        rounds: dict[str, list[dict[str, list[float]]]] = {name: [] for name in ARMS}
        try:
            for _ in range(arguments.rounds):
                for name in ARMS:
                    rounds[name].append(run_arm(name, megabytes, arguments.limit_s))
        except subprocess.TimeoutExpired:
            report("checkpoint", {"megabytes": megabytes, "ended": f"an arm took {arguments.limit_s:g} s, the limit"}, False)
            continue
        report("checkpoint", figures(megabytes, rounds), arguments.output)


if __name__ == "__main__":
    main()
