"""What Ray costs: a step under Ray Train against the same loop under torchrun, and the time from start to first step, by phase.

    python -m tests.bench.launch --output

All ways train the same plan on two workers with gloo: raytune on a cluster that it starts itself (cold), raytune on a running
cluster that has had a run before (warm), without and with `cluster.keep_warm`, and torchrun over `raytune.training.run.train`. A
step is compared in CPU seconds of all processes that take part, Ray's daemons included, and for understanding in those of the
training processes alone and in wall time; a start in wall time and in CPU seconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from tests.bench.measure import ratios, report, tree_cpu_s

COLD, WARM, TORCHRUN = "raytune, cold cluster", "raytune, warm cluster", "torchrun"
KEPT = "raytune, warm cluster, cluster.keep_warm"
WORKERS = 2
SETTLED_STEP = 5
"""Steps before it fill caches and are not measured."""
MAX_STEP_RATIO = 1.02
MAX_WARM_START_RATIO = 1.3
TIMEOUT_S = 600
POLL_S = 0.02
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "DS_ACCELERATOR": "cpu",
    "RAY_worker_niceness": "0",  # as clusters that raytune starts have it; with Ray's 15 neighbours decide the wall times
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One measured start and its steps."""

    phases: dict[str, float]
    """Wall seconds of each phase up to the end of the first step, in order."""
    start_cpu_s: float
    """Of all processes, up to the first step."""
    step_cpu_s: float
    """Of the training processes, per step."""
    step_cpu_s_of_all: float
    """Of all processes, per step: with what the launcher's daemons do meanwhile."""
    step_s: float
    """Median wall seconds of a step."""

    @property
    def start_s(self) -> float:
        return sum(self.phases.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--output", action="store_true", help="append the figures to tests/bench/baselines/launch.jsonl")
    parser.add_argument("--drive", nargs=2, metavar=("CONFIG", "MARKS"), help=argparse.SUPPRESS)
    parser.add_argument("--bare", nargs=2, metavar=("PLAN", "MARKS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        drive(*map(Path, options.drive))
    elif options.bare:
        train_bare(*map(Path, options.bare))
    else:
        os.environ.update(ENVIRONMENT)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each worker would compile what Ray has unpacked for it
        with TemporaryDirectory(prefix="rt", dir="/tmp") as folder:  # a short name: Ray's sockets lie below it
            compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    launches: dict[str, list[Launch]] = {COLD: [], WARM: [], KEPT: [], TORCHRUN: []}
    for number in range(options.rounds):
        with running_cluster(folder / "ray") as (address, pids):
            measure_driver(folder, f"first-{number}", SETTLED_STEP + 2, address)
            launches[WARM].append(measure_driver(folder, f"warm-{number}", options.steps, address, pids))
            measure_driver(folder, f"first-kept-{number}", SETTLED_STEP + 2, address, keeps=True)
            launches[KEPT].append(
                measure_driver(folder, f"kept-{number}", options.steps, address, [*pids, kept_process()], keeps=True)
            )
        launches[COLD].append(measure_driver(folder, f"cold-{number}", options.steps))
        launches[TORCHRUN].append(measure_torchrun(folder, f"torchrun-{number}", folder / f"cold-{number}" / "plan.json"))
    shared = {"rounds": options.rounds, "workers": WORKERS, "steps": options.steps}
    bare = launches[TORCHRUN]
    for way, measured in launches.items():
        cpu = [launch.step_cpu_s for launch in measured]
        of_all = [launch.step_cpu_s_of_all for launch in measured]
        wall = [launch.step_s for launch in measured]
        figures: dict[str, Any] = {
            "figure": "step",
            "way": way,
            "cpu_s_of_workers": _rounded(cpu),
            "cpu_s_of_all_processes": _rounded(of_all),
            "wall_s": _rounded(wall),
        }
        if way != TORCHRUN:
            against = ratios(of_all, [launch.step_cpu_s_of_all for launch in bare])
            figures |= {
                "cpu_of_all_against_torchrun": against,
                "cpu_of_workers_against_torchrun": ratios(cpu, [launch.step_cpu_s for launch in bare]),
                "wall_against_torchrun": ratios(wall, [launch.step_s for launch in bare]),
                "expected_at_most": MAX_STEP_RATIO,
                "verdict": "met" if max(against.values()) <= MAX_STEP_RATIO else "missed",
            }
        report("launch", figures | shared, options.output)
    for way, measured in launches.items():
        wall = [launch.start_s for launch in measured]
        figures = {
            "figure": "start to first step",
            "way": way,
            "wall_s": _rounded(wall),
            "cpu_s": _rounded([launch.start_cpu_s for launch in measured]),
            "median_s_of_phase": {
                phase: round(statistics.median(launch.phases[phase] for launch in measured), 2) for phase in measured[0].phases
            },
        }
        if way != TORCHRUN:
            figures |= {
                "wall_against_torchrun": ratios(wall, [launch.start_s for launch in bare]),
                "cpu_against_torchrun": ratios(figures["cpu_s"], [launch.start_cpu_s for launch in bare]),
            }
        if way == KEPT:
            met = max(figures["wall_against_torchrun"].values()) <= MAX_WARM_START_RATIO
            figures |= {"expected_at_most": MAX_WARM_START_RATIO, "verdict": "met" if met else "missed"}
        report("launch", figures | shared, options.output)


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


# --- raytune


@contextmanager
def running_cluster(folder: Path, *, dashboard: bool = False) -> Iterator[tuple[str, list[int]]]:
    """A Ray cluster of this machine: its address and its processes."""
    from ray.cluster_utils import Cluster

    # Cluster writes its address there, and does not make the folder.
    Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()), "ray").mkdir(parents=True, exist_ok=True)
    before = set(psutil.Process().children())
    cluster = Cluster(
        initialize_head=True,
        connect=False,
        head_node_args={"num_cpus": WORKERS, "include_dashboard": dashboard, "temp_dir": str(folder)},
    )
    try:
        cluster.wait_for_nodes()
        yield cluster.address, [process.pid for process in psutil.Process().children() if process not in before]
    finally:
        cluster.shutdown()


def kept_process() -> int:
    """The one that workers are forked from on a cluster where they are kept warm; it is nobody's child."""
    (found,) = [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any("fork_server import stay" in word for word in process.info["cmdline"] or ())
    ]
    return found


def measure_driver(
    folder: Path,
    name: str,
    steps: int,
    address: str | None = None,
    cluster_pids: Sequence[int] = (),
    *,
    keeps: bool = False,
) -> Launch:
    config = {
        "name": name,
        "storage": str(folder),
        "model": {"base": "demo"},
        "data": {"train": {"path": "demo:train", "max_rows": 400}, "max_length": 512, "store": str(folder / "stores")},
        "adapter": {"method": "full"},
        "training": {
            "max_steps": steps,
            "global_batch_size": 8 * WORKERS,
            "per_device_train_batch_size": 4,
            "precision": "fp32",
            "zero": {"stage": 0},
        },
        "checkpoint": {"every_steps": steps},
        "cluster": {"workers": WORKERS, "address": address, "max_failures": 0, "keep_warm": 600 if keeps else None},
    }
    config_file, marks_file = folder / f"{name}.json", folder / f"{name}.marks.json"
    config_file.write_text(json.dumps(config))
    command = [sys.executable, "-m", "tests.bench.launch", "--drive", str(config_file), str(marks_file)]
    return measure(command, folder / name, marks_file, steps, cluster_pids)


def drive(config_file: Path, marks_file: Path) -> None:
    """`raytune.train` in a fresh interpreter, with a look at the clock between its parts."""
    marks = {"interpreter": time.time()}
    from raytune.config.load import config_from
    from raytune.launch.cluster.cluster import connect
    from raytune.launch.run import run

    marks["imports"] = time.time()

    @contextmanager
    def watch(plan: Any) -> Iterator[None]:
        marks["data and plan"] = time.time()
        marks_file.write_text(json.dumps(marks))
        yield

    config = config_from(json.loads(config_file.read_text()))
    with connect(config.cluster):
        marks["ray.init"] = time.time()
        run(config, watch)


# --- torchrun


def measure_torchrun(folder: Path, name: str, plan_file: Path) -> Launch:
    """Train the plan of another run under a new name."""
    plan = json.loads(plan_file.read_text()) | {"name": name}
    own_plan, marks_file = folder / f"{name}.plan.json", folder / f"{name}.marks.json"
    own_plan.write_text(json.dumps(plan))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}"]
    command = [*torchrun, "-m", "tests.bench.launch", "--bare", str(own_plan), str(marks_file)]
    return measure(command, folder / name, marks_file, plan["optimization"]["num_steps"])


def train_bare(plan_file: Path, marks_file: Path) -> None:
    """One of torchrun's workers."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank == 0:
        marks_file.write_text(json.dumps({"interpreter of workers": time.time()}))
    import torch.distributed as dist

    from raytune.plan.run_plan import RunPlan
    from raytune.training.run import Worker, train

    dist.init_process_group("gloo")
    plan = RunPlan.model_validate_json(plan_file.read_text())
    train(plan, Worker(rank=rank, world_size=world_size, device_index=rank, attempt=1, report=lambda metrics: None))
    dist.destroy_process_group()


# --- measuring


def measure(
    command: Sequence[str], run_folder: Path, marks_file: Path, last_step: int, cluster_pids: Sequence[int] = ()
) -> Launch:
    """Run a command that trains into `run_folder`, and watch its metrics.

    Args:
        last_step: of the run.
        marks_file: where the command writes the times at which its phases ended.
        cluster_pids: processes whose CPU seconds count although the command did not start them.
    """
    log = run_folder.with_suffix(".log")
    with log.open("wb") as output:
        started, cpu_before = time.time(), sum(map(tree_cpu_s, cluster_pids))
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        awaited, cpu_after, processes_after = [1, SETTLED_STEP, last_step], {}, {}
        while process.poll() is None:
            newest = max(steps_in(run_folder), default=0)
            if awaited and newest >= awaited[0]:
                cpu_after[newest] = sum(map(tree_cpu_s, [process.pid, *cluster_pids])) - cpu_before
                processes_after[newest] = cpu_of_processes([process.pid, *cluster_pids])
                awaited = [step for step in awaited if step > newest]
            if time.time() - started > TIMEOUT_S:
                process.kill()
            time.sleep(POLL_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-4000:]}")
    lines = metrics_of(run_folder)
    times = {line["step"]: line["time"] for line in lines if "train/loss" in line}
    ended = json.loads(marks_file.read_text())
    ended["imports of workers, model"] = next(line["time"] for line in lines if "resumed_step" in line)
    ended["first step"] = times[1]
    first, settled, last = cpu_after
    used = {pid: cpu_s - processes_after[settled].get(pid, (0.0, 0.0))[0] for pid, (cpu_s, _) in processes_after[last].items()}
    workers = sorted(used, key=lambda pid: used[pid])[-WORKERS:]
    ended["processes of workers"] = max(processes_after[last][pid][1] for pid in workers)
    ends = sorted(ended.items(), key=lambda mark: mark[1])
    return Launch(
        phases={phase: end - begin for (phase, end), begin in zip(ends, [started, *(end for _, end in ends)])},
        start_cpu_s=cpu_after[first],
        step_cpu_s=sum(used[pid] for pid in workers) / (last - settled),
        step_cpu_s_of_all=(cpu_after[last] - cpu_after[settled]) / (last - settled),
        step_s=statistics.median(times[step] - times[step - 1] for step in range(SETTLED_STEP + 1, max(times) + 1)),
    )


def cpu_of_processes(roots: Sequence[int]) -> dict[int, tuple[float, float]]:
    """CPU seconds and time of birth of every living process in some trees."""
    found = {}
    for root in map(psutil.Process, roots):
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                found[process.pid] = times.user + times.system, process.create_time()
    return found


def steps_in(run_folder: Path) -> list[int]:
    return [line["step"] for line in metrics_of(run_folder) if "train/loss" in line]


def metrics_of(run_folder: Path) -> list[dict[str, Any]]:
    file = run_folder / "metrics.jsonl"
    whole_lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in whole_lines]


if __name__ == "__main__":
    main()
