"""What a sweep costs: ASHA on warm workers against the same trials one after another, and against plain Ray Tune over Ray Train.

    python -m tests.bench.sweep --output

All three train the same trials (rank x alpha x learning rate on the demo task) on one running cluster of this machine:

- raytune sweep: one-worker trials, ASHA;
- one after another: `raytune.train` for each trial, to its end;
- plain Tune: `tune.Tuner` with Ray's own ASHAScheduler over a function that runs a TorchTrainer of one worker, as Ray documents
  it; the loop inside is ours, so that only what is around it differs.

The cluster has a dashboard, as `ray start --head` gives it: where a trial is stopped, its Train controller dies with the trial's
process, and what then frees the CPUs of its workers asks the dashboard whether the controller lives. Without one, plain Tune's
third trial waits for ever for the CPUs of the first. Raytune's sweeps do not depend on it.

Compared are makespan (wall), CPU seconds of the driver's tree and of Ray's daemons and workers, and the wall time of a trial
before its first step: from when the search hands it out, or the trainable's function begins, to the line of its first step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from raytune.metrics.events import read_events
from raytune.metrics.history import History
from tests.bench.launch import ENVIRONMENT, WORKERS, running_cluster
from tests.bench.measure import report, tree_cpu_s

SWEEP, ALONE, PLAIN = "raytune sweep", "one after another", "plain Tune over Train"
GRACE, FACTOR = 3, 3
MOST_START_SHARE = 0.5
"""Of plain Tune's time before the first step of a trial."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--steps", type=int, default=54)
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds after which a way is taken to hang")
    parser.add_argument("--output", action="store_true", help="append the figures to tests/bench/baselines/sweep.jsonl")
    parser.add_argument("--drive", nargs=2, metavar=("WAY", "CONFIG"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        DRIVERS[options.drive[0]](json.loads(Path(options.drive[1]).read_text()))
        return
    os.environ.update(ENVIRONMENT)
    with TemporaryDirectory(prefix="rt", dir="/tmp") as folder:  # a short name: Ray's sockets lie below it
        compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    measured: dict[str, list[dict[str, Any]]] = {way: [] for way in DRIVERS}
    for number in range(options.rounds):
        for way in DRIVERS:
            with running_cluster(folder / "ray", dashboard=True) as (address, pids):
                name = f"{way.replace(' ', '-').lower()}-{number}"
                measured[way].append(measure(way, folder, name, address, pids, options))
    for way, rounds in measured.items():
        figures: dict[str, Any] = {"figure": "sweep", "way": way, "trials": options.trials, "steps": options.steps}
        figures |= {key: [values[key] for values in rounds] for key in rounds[0]}
        for key in ("makespan_s", "cpu_s", "start_s_of_trial"):
            ours, theirs = (min(values[key] for values in measured[one]) for one in (SWEEP, way))
            figures |= {f"{key}_of_sweep_against_this": round(ours / theirs, 3)} if way != SWEEP else {}
        if way == PLAIN:
            share = figures["start_s_of_trial_of_sweep_against_this"]
            figures |= {"expected_start_at_most": MOST_START_SHARE, "verdict": "met" if share <= MOST_START_SHARE else "missed"}
        report("sweep", figures | {"rounds": options.rounds, "workers_of_cluster": WORKERS}, options.output)


def measure(
    way: str, folder: Path, name: str, address: str, cluster_pids: Sequence[int], options: argparse.Namespace
) -> dict[str, Any]:
    values = config(folder, name, address, options)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(values))
    cpu_before = sum(map(tree_cpu_s, cluster_pids))
    started, log = time.time(), folder / f"{name}.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "tests.bench.sweep", "--drive", way, str(file)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        cpu_of_driver = 0.0
        while process.poll() is None:
            time.sleep(0.2)
            cpu_of_driver = max(cpu_of_driver, tree_cpu_s(process.pid) if process.poll() is None else 0.0)
            if time.time() - started > options.limit:
                process.kill()
                process.wait()
                raise SystemExit(f"{way} had not ended after {options.limit} s:\n{log.read_text()[-4000:]}")
    if process.returncode:
        raise SystemExit(f"{way} failed:\n{log.read_text()[-4000:]}")
    runs = sorted((folder / name).glob("**/metrics.jsonl"))
    starts = [first_step - handed for run in runs if (first_step := first_step_at(run)) and (handed := handed_out_at(way, run))]
    losses = [value for run in runs for _, value in History.read(run).series("validation/loss")]
    return {
        "makespan_s": round(time.time() - started, 2),
        "cpu_s": round(cpu_of_driver + sum(map(tree_cpu_s, cluster_pids)) - cpu_before, 1),
        "start_s_of_trial": round(statistics.median(starts), 2),
        "trial_steps": sum(History.read(run).last_step for run in runs),
        "best_loss": round(min(losses), 5),
    }


def config(folder: Path, name: str, address: str, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "name": name,
        "storage": str(folder),
        "data": {
            "train": {"path": "demo:train", "max_rows": 400},
            "validation": {"path": "demo:validation", "max_rows": 40},
            "max_length": 512,
            "store": str(folder / "stores"),
        },
        "training": {"max_steps": options.steps, "global_batch_size": 4},
        "evaluation": {"every_steps": options.steps},
        "cluster": {"workers": 1, "address": address, "threads_per_worker": 1},
        "sweep": {
            "trials": options.trials,
            "space": {
                "adapter.rank": {"choice": [4, 8, 16, 32]},
                "adapter.alpha": "2 * adapter.rank",
                "training.learning_rate": {"log_uniform": [3e-4, 1e-2]},
            },
            "stopping": {"method": "asha", "grace": GRACE, "reduction_factor": FACTOR},
        },
    }


def first_step_at(metrics: Path) -> float | None:
    return next((point.time for point in History.read(metrics).points if "train/loss" in point.values), None)


def handed_out_at(way: str, metrics: Path) -> float | None:
    """When a trial was given out: by the ledger of a sweep, or where its driver began (`started` beside its metrics)."""
    if way == SWEEP:
        lines = read_events(metrics.parents[2] / "ledger.jsonl")
        name = metrics.parent.name
        return next((line["time"] for line in lines if line["event"] == "trial_assigned" and line["trial"] == name), None)
    marker = metrics.with_name("started")
    return float(marker.read_text()) if marker.exists() else None


# --- the three ways


def drive_sweep(values: dict[str, Any]) -> None:
    import raytune

    raytune.sweep(values, progress=False)


def trials_of(values: dict[str, Any]) -> list[Any]:
    """The same trials as configs of their own."""
    from raytune.config.load import config_from
    from raytune.sweeps import space

    run = config_from(values)
    return [
        space.trial_config(run, trial).model_copy(update={"storage": f"{run.storage}/{run.name}"})
        for trial in space.trials_of(run)
    ]


def drive_one_after_another(values: dict[str, Any]) -> None:
    import raytune

    for trial in trials_of(values):
        folder = Path(trial.storage) / trial.name
        folder.mkdir(parents=True)
        (folder / "started").write_text(str(time.time()))
        raytune.train(trial, progress=False)


def drive_plain_tune(values: dict[str, Any]) -> None:
    from functools import partial

    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback
    from ray.tune.schedulers import ASHAScheduler

    from raytune.config.load import config_from
    from raytune.launch.cluster.cluster import connect, map_on_cluster
    from raytune.launch.data.prepare import Preparation
    from raytune.launch.state.record import write_plan
    from raytune.run_folder import RunFolder

    run = config_from(values)
    rungs = tuple(rung for rung in (GRACE * FACTOR**power for power in range(10)) if rung < run.training.max_steps)
    with connect(run.cluster) as machine:
        preparation = Preparation(machine, partial(map_on_cluster, start_timeout=60.0))
        plans = []
        for trial in trials_of(values):
            plan = preparation.prepare(trial).plan.model_copy(update={"rungs": rungs})
            write_plan(RunFolder(plan.storage, plan.name), plan)
            plans.append(plan.model_dump_json())

        def driver(config: dict[str, Any]) -> None:
            from ray.train import RunConfig, ScalingConfig
            from ray.train.torch import TorchConfig, TorchTrainer

            from raytune.training.worker import work

            plan = json.loads(config["plan"])
            (Path(plan["storage"]) / plan["name"] / "started").write_text(str(time.time()))
            TorchTrainer(
                work,
                train_loop_config={"plan": config["plan"], "attempt": 1, "task": "train", "request": {}},
                torch_config=TorchConfig(backend="gloo"),
                scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
                run_config=RunConfig(
                    name="train", storage_path=f"{plan['storage']}/{plan['name']}/ray", callbacks=[TuneReportCallback()]
                ),
            ).fit()

        tune.Tuner(
            tune.with_resources(driver, {"node:__internal_head__": 0.001}),
            param_space={"plan": tune.grid_search(plans)},
            tune_config=tune.TuneConfig(
                metric="validation/loss",
                mode="min",
                scheduler=ASHAScheduler(
                    time_attr="step", max_t=run.training.max_steps, grace_period=GRACE, reduction_factor=FACTOR
                ),
                max_concurrent_trials=WORKERS,
                trial_dirname_creator=lambda trial: f"trial-{trial.trial_id}",
            ),
            run_config=tune.RunConfig(name="tune", storage_path=f"{run.storage}/{run.name}-tune", verbose=0),
        ).fit()


DRIVERS = {SWEEP: drive_sweep, ALONE: drive_one_after_another, PLAIN: drive_plain_tune}


if __name__ == "__main__":
    main()
