"""Real sweeps on two nodes: judged as Ray Tune's ASHA would judge them, the winner is what it claims to be, and what was
stopped holds nothing."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import tune
from ray.cluster_utils import Cluster
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.util import placement_group_table

from raytune import sweep, train
from raytune.errors import TrainingError, UserError
from raytune.launch.state.record import RunRecord, write_plan
from raytune.metrics.events import read_events
from raytune.metrics.history import History
from raytune.run_folder import RunFolder, SweepFolder
from raytune.storage import read_json
from raytune.sweeps.ledger import Ledger, read_ledger
from raytune.sweeps.results import SweepResult
from raytune.sweeps.trial import Trial
from raytune.sweeps.winner import against_trial, winner_config
from raytune.training.checkpoints.commit import committed
from tests.tiny import tiny_plan

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
STEPS, GRACE, FACTOR = 27, 3, 3


def config(started: Cluster, storage: Path, name: str, **sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": name,
        "storage": str(storage),
        "data": {
            "train": {"path": "demo:train", "max_rows": 120},
            "validation": {"path": "demo:validation", "max_rows": 10},
            "max_length": 512,
        },
        "training": {"max_steps": STEPS, "global_batch_size": 2, "warmup_steps": 1},
        "evaluation": {"every_steps": STEPS},
        "cluster": {"address": started.address, "workers": 1},
    }
    return {key: {**base.get(key, {}), **value} if isinstance(value, dict) else value for key, value in (base | sections).items()}


def space_of_10() -> dict[str, Any]:
    return {
        "trials": 10,
        "space": {
            "adapter.rank": {"choice": [2, 4, 8, 16]},
            "adapter.alpha": "2 * adapter.rank",
            "training.learning_rate": {"log_uniform": [1e-4, 2e-2]},
        },
        "stopping": {"method": "asha", "grace": GRACE, "reduction_factor": FACTOR},
    }


@contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """One job for the whole block: at a job's end Ray would free what it held anyway."""
    ray.init(address=cluster.address)
    try:
        yield
    finally:
        ray.shutdown()


def is_all_free() -> bool:
    """Whether all CPUs are free and no placement group is left, within a moment."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        if ray.available_resources().get("CPU") == 2.0 and not groups:
            return True
        time.sleep(0.5)
    return False


@pytest.fixture(scope="module")
def ten(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """A finished sweep of 10 trials of one worker."""
    storage = tmp_path_factory.mktemp("sweeps")
    return sweep(config(cluster, storage, "ten", sweep=space_of_10()), progress=False)


def test_every_trial_ends_and_most_end_early(ten: SweepResult) -> None:
    states = [trial.state for trial in ten.trials]
    assert len(states) == 10
    assert set(states) == {"finished", "stopped"}
    assert 5 <= states.count("stopped") < 10
    assert ten.spent_worker_s < ten.full_worker_s


def test_trials_that_were_stopped_were_stopped_at_a_rung(ten: SweepResult) -> None:
    assert ten.rungs == (3, 9)
    assert {trial.step for trial in ten.trials if trial.state == "stopped"} <= {3, 9}


def test_the_decisions_are_those_of_ray_tunes_asha(ten: SweepResult) -> None:
    theirs = ASHAScheduler(time_attr="step", metric="loss", mode="min", max_t=STEPS, grace_period=GRACE, reduction_factor=FACTOR)
    known: set[str] = set()
    decisions = read_ledger(f"{ten.folder}/ledger.jsonl").decisions
    assert len(decisions) > 10
    for decided in decisions:
        trial: Any = SimpleNamespace(trial_id=decided.trial)
        if decided.trial not in known:
            known.add(decided.trial)
            theirs.on_trial_add(None, trial)  # pyright: ignore[reportArgumentType]
        action = theirs.on_trial_result(None, trial, {"step": decided.step, "loss": decided.value})  # pyright: ignore[reportArgumentType]
        assert (action == TrialScheduler.STOP) == (decided.decision.verdict.value == "stop"), decided


@pytest.mark.slow
def test_the_winner_trained_alone_has_the_value_of_its_trial(ten: SweepResult) -> None:
    best = ten.best
    assert best is not None
    assert best.state == "finished"
    # On as many threads as the trial had beside its neighbour: sums in another order differ by 1e-6.
    alone = train(winner_config(ten.folder, overrides=["cluster.threads_per_worker=1"]), progress=False)
    comparison = against_trial(ten.folder, alone)
    assert comparison is not None
    assert comparison.value == comparison.trial_value
    trial_history = History.read(f"{best.folder}/metrics.jsonl")
    assert alone.history.series("train/loss") == trial_history.series("train/loss"), "warm worker, kept base: the same curve"


def test_all_trials_see_the_same_rows_from_one_store(ten: SweepResult) -> None:
    plans = [read_json(f"{trial.folder}/plan.json") for trial in ten.trials]
    assert len({plan["data"]["train"]["path"] for plan in plans}) == 1
    assert len({plan["seed"] for plan in plans}) == 1
    assert len({plan["optimization"]["learning_rate"] for plan in plans}) == 10


def test_the_result_is_readable_by_ray_tunes_own_tools(ten: SweepResult) -> None:
    grid = tune.ResultGrid(tune.ExperimentAnalysis(f"{ten.folder}/tune/command-1"))
    assert len(grid) == 10
    frame = grid.get_dataframe()
    assert set(frame["config/adapter.rank"]) <= {2, 4, 8, 16}
    theirs = grid.get_best_result(metric="validation/loss", mode="min")
    assert ten.best is not None
    assert theirs.config is not None
    assert theirs.config["trial"] == ten.best.trial.name


def test_what_a_sweep_leaves_is_whole(ten: SweepResult) -> None:
    folder = Path(ten.folder)
    assert len((folder / "trials.csv").read_text().splitlines()) == 11
    assert len([json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]) == 10
    assert (folder / "report.html").stat().st_size > 10_000
    assert SweepResult.from_json(read_json(folder / "result.json")) == ten
    assert not any((folder / "trials" / t.trial.name / "checkpoints").exists() for t in ten.trials if t.state == "stopped")


def test_a_finished_sweep_is_only_read(cluster: Cluster, ten: SweepResult) -> None:
    before = (Path(ten.folder) / "ledger.jsonl").read_bytes()
    again = sweep(config(cluster, Path(ten.folder).parent, "ten", sweep=space_of_10()), progress=False)
    assert again == replace(ten, finished_before=True)
    assert (Path(ten.folder) / "ledger.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def of_two_workers(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """A finished sweep of 2 trials, each of which shards its weights over two workers; nothing of it is left on the cluster."""
    sharded = config(
        cluster,
        tmp_path_factory.mktemp("sharded"),
        "sharded",
        training={"zero": {"stage": 3}, "max_steps": STEPS // FACTOR},
        evaluation={"every_steps": STEPS // FACTOR},
        cluster={"workers": 2, "placement": "strict_spread"},
        sweep={
            "space": {"training.learning_rate": {"grid": [1e-2, 1e-4]}},
            "stopping": {"grace": GRACE, "reduction_factor": FACTOR},
        },
    )
    with connected(cluster):
        result = sweep(sharded, progress=False)
        assert is_all_free()
    return result


@pytest.mark.slow  # of one worker often: judged above, and freed below
def test_trials_of_two_sharded_workers_are_judged_and_free_what_they_held(of_two_workers: SweepResult) -> None:
    result = of_two_workers
    assert [trial.state for trial in result.trials] == ["finished", "stopped"]
    assert [trial.step for trial in result.trials] == [STEPS // FACTOR, GRACE]
    assert result.best is not None
    assert result.best.trial.values == {"training.learning_rate": 1e-2}
    held = read_json(f"{result.best.folder}/result.json")["held_bytes"]
    assert len(held) == 2, "it was sharded over two workers"
    folders = [Path(trial.folder) / "checkpoints" for trial in result.trials]
    assert [folder.exists() for folder in folders] == [True, False]


@pytest.mark.slow
def test_the_winner_of_sharded_trials_trained_alone_has_the_value_of_its_trial(of_two_workers: SweepResult) -> None:
    alone = train(winner_config(of_two_workers.folder), progress=False)
    comparison = against_trial(of_two_workers.folder, alone)
    assert comparison is not None
    # Two ranks add the same numbers in another order.
    assert comparison.value == pytest.approx(comparison.trial_value, rel=1e-6)


def test_a_trial_that_diverges_fails_with_its_cause_and_never_wins_and_nothing_is_held(cluster: Cluster, tmp_path: Path) -> None:
    with_a_dead_one = config(
        cluster,
        tmp_path,
        "diverging",
        adapter={"method": "full"},
        training={"max_grad_norm": 0.0, "max_steps": 9},
        sweep={"space": {"training.learning_rate": {"grid": [1e30, 1e-3]}}, "stopping": {"grace": 3}},
    )
    with connected(cluster):
        result = sweep(with_a_dead_one, progress=False)
        assert is_all_free()
    dead, alive = sorted(result.trials, key=lambda trial: trial.trial.number)
    assert (dead.state, alive.state) == ("failed", "finished")
    assert "not finite" in (dead.cause or "")
    assert RunRecord.read(RunFolder(f"{result.folder}/trials", dead.trial.name)).attempts == 1  # pyright: ignore[reportOptionalMemberAccess]
    assert result.best is not None
    assert result.best.trial == alive.trial
    assert dead.step < 9


@pytest.mark.slow
def test_a_trial_whose_process_is_killed_is_continued_and_the_others_go_on(cluster: Cluster, tmp_path: Path) -> None:
    patient = config(
        cluster,
        tmp_path,
        "killed",
        training={"max_steps": 60},
        checkpoint={"every_steps": 5},
        sweep={"space": {"training.learning_rate": {"grid": [1e-3, 2e-3]}}, "stopping": {"method": "none"}},
    )
    first = RunFolder(str(tmp_path / "killed" / "trials"), "trial-000")
    pids: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not pids:
            if History.read(first.metrics).last_step >= 12 and (lease := sorted(Path(first.leases).glob("*.json"))):
                pids.append(read_json(lease[-1])["holder"]["pid"])
                os.kill(pids[0], signal.SIGKILL)
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
    result = sweep(patient, progress=False)
    killer.join()
    assert pids, "nothing was killed"
    assert [trial.state for trial in result.trials] == ["finished", "finished"]
    assert [event["event"] for event in read_events(first.events)].count("attempt_started") == 2
    unbroken = train(
        {key: value for key, value in patient.items() if key != "sweep"} | {"name": "unbroken"},
        progress=False,
        **{"training.learning_rate": 1e-3, "cluster.threads_per_worker": 1},  # as the trial had beside its neighbour
    )
    assert History.read(first.metrics).series("train/loss") == unbroken.history.series("train/loss")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hyperband", "median"])
def test_ray_tunes_other_rules_stop_trials_too(cluster: Cluster, tmp_path: Path, method: str) -> None:
    section = {
        "space": {"training.learning_rate": {"grid": [1e-2, 5e-3, 2e-5, 1e-5, 3e-5, 2e-2]}},
        "stopping": {"method": method, "grace": 3},
    }
    with connected(cluster):
        result = sweep(config(cluster, tmp_path, method, sweep=section), progress=False)
        assert is_all_free()
    assert {trial.state for trial in result.trials} == {"finished", "stopped"}
    assert result.best is not None
    assert result.best.trial.values["training.learning_rate"] >= 5e-3
    assert result.best.state == "finished"


def test_optuna_proposes_points_inside_the_space_after_the_first_ones(cluster: Cluster, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    section = {
        "search": "optuna",
        "trials": 3,
        "first": [{"training.learning_rate": 5e-3, "adapter.rank": 4}],
        "space": {
            "adapter.rank": {"choice": [2, 4, 8]},
            "adapter.alpha": "2 * adapter.rank",
            "training.learning_rate": {"log_uniform": [1e-4, 1e-2]},
        },
        "stopping": {"grace": 3},
    }
    result = sweep(config(cluster, tmp_path, "optuna", training={"max_steps": 9}, sweep=section), progress=False)
    by_number = sorted(result.trials, key=lambda trial: trial.trial.number)
    assert len(by_number) == 3
    assert by_number[0].trial.values == {"adapter.rank": 4, "adapter.alpha": 8, "training.learning_rate": 5e-3}
    for trial in by_number:
        values = trial.trial.values
        assert values["adapter.rank"] in (2, 4, 8)
        assert values["adapter.alpha"] == 2 * values["adapter.rank"]
        assert 1e-4 <= values["training.learning_rate"] <= 1e-2
    assert len({json.dumps(trial.trial.values) for trial in by_number}) == 3


@pytest.mark.slow
def test_a_sweep_whose_driver_was_killed_goes_on_where_it_stood(cluster: Cluster, tmp_path: Path) -> None:
    values = config(cluster, tmp_path, "broken", sweep=space_of_10() | {"trials": 8}, training={"max_steps": 81})
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(values))
    command = [sys.executable, "launch.py", "sweep", str(file)]
    folder = SweepFolder(str(tmp_path), "broken")
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while len(read_ledger(folder.ledger).ends) < 3 or not any(is_past_its_checkpoint(run) for run in running_in(folder)):
            assert driver.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        driver.kill()
        driver.wait()
    before = read_ledger(folder.ledger)
    finished = set(before.ends)
    running = running_in(folder)
    attempts = {name: RunRecord.read(folder.trial(name)).attempts for name in finished}  # pyright: ignore[reportOptionalMemberAccess]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    after = read_ledger(folder.ledger)
    assert set(after.trials) == {f"trial-{number:03d}" for number in range(8)}
    assert all(end.is_final for end in after.ends.values())
    assert {name: after.ends[name] for name in finished} == {name: before.ends[name] for name in finished}
    assert {name: RunRecord.read(folder.trial(name)).attempts for name in finished} == attempts, "ended trials were left alone"  # pyright: ignore[reportOptionalMemberAccess]
    result = SweepResult.from_json(read_json(folder.result))
    assert result.best is not None
    assert math.isfinite(result.best.value or math.nan)
    resumed_steps = [step for run in running for step in resumes(run)]
    assert max(resumed_steps) > 0, "a trial that was running went on from its checkpoint"
    with connected(cluster):
        assert is_all_free()


def running_in(folder: SweepFolder) -> list[RunFolder]:
    """The trials that have begun and not ended."""
    ledger = read_ledger(folder.ledger)
    return [folder.trial(name) for name in ledger.trials if name not in ledger.ends]


def is_past_its_checkpoint(run: RunFolder) -> bool:
    """Whether it trained on after a save, so that the sweep has let it live beyond that rung."""
    saved = [commit.step for commit in committed(run)]
    return bool(saved) and History.read(run.metrics).last_step > saved[-1]


def resumes(run: RunFolder) -> list[int]:
    """Steps at which attempts at a run began."""
    return [json.loads(line).get("resumed_step", 0) for line in Path(run.metrics).read_text().splitlines()]


def test_a_sweep_without_a_usable_trial_fails_after_it_has_written_its_page(cluster: Cluster, tmp_path: Path) -> None:
    hopeless = config(
        cluster,
        tmp_path,
        "hopeless",
        adapter={"method": "full"},
        training={"max_grad_norm": 0.0, "max_steps": 6},
        sweep={"space": {"training.learning_rate": {"grid": [1e30, 2e30]}}, "stopping": {"grace": 3}},
    )
    with pytest.raises(TrainingError, match=r"there is no winner(.|\n)*not finite"):
        sweep(hopeless, progress=False)
    assert (tmp_path / "hopeless" / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter.rank": {"choice": [0, 8]}}, "adapter.rank"),
        ({"data.max_length": {"choice": [512, 4096]}}, "positions"),
        ({"cluster.workers": {"choice": [1, 2]}}, "cluster is the same for all trials"),
    ],
)
def test_a_space_with_a_point_that_cannot_be_trained_is_refused_before_anything_starts(
    cluster: Cluster, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        sweep(config(cluster, tmp_path, "refused", sweep={"space": change}), progress=False)
    assert not (tmp_path / "refused" / "ledger.jsonl").exists()


def test_another_sweep_under_the_same_name_is_refused_with_the_difference(cluster: Cluster, ten: SweepResult) -> None:
    other = space_of_10() | {"metric": "validation/perplexity"}
    with pytest.raises(UserError, match=r"sweep\.metric: validation/loss -> validation/perplexity"):
        sweep(config(cluster, Path(ten.folder).parent, "ten", sweep=other), progress=False)


def test_other_rungs_and_other_plans_are_refused_before_a_trial_is_continued(cluster: Cluster, tmp_path: Path) -> None:
    folder = SweepFolder(str(tmp_path), "moved")
    Ledger(folder.ledger, {"rungs": [5.0]}).close()
    with pytest.raises(UserError, match=r"rungs of the comparison: \[5\.0\] -> \[1\.0, 3\.0\]"):
        sweep(config(cluster, tmp_path, "moved", sweep=space_of_10()), progress=False)
    Path(folder.ledger).unlink()
    with closing(Ledger(folder.ledger, {})) as ledger:
        ledger.assign(Trial(number=0, values={"training.learning_rate": 1e-3}))
    write_plan(folder.trial("trial-000"), tiny_plan())
    with pytest.raises(UserError, match=r"Run 'trial-000' in .* was started with other settings"):
        sweep(config(cluster, tmp_path, "moved", sweep=space_of_10()), progress=False)
    assert list(read_ledger(folder.ledger).trials) == ["trial-000"], "and nothing was started"
