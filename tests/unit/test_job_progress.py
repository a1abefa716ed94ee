"""`status` tells of each job what it did itself: several jobs may work on one run after each other, and a sweep has trials."""

from dataclasses import replace
from pathlib import Path

from raytune.clusters.job import Job
from raytune.clusters.job_progress import Progress, SweepProgress, progress_of
from raytune.launch.state.record import RunRecord, write_plan
from raytune.metrics.events import EventLog
from raytune.metrics.writer import MetricsWriter
from raytune.run_folder import RunFolder, SweepFolder
from raytune.storage import write_bytes
from raytune.sweeps.ledger import Ended, Ledger
from raytune.sweeps.trial import Trial
from tests.tiny import tiny_plan

FIRST = Job(
    id="demo-1",
    run="demo",
    storage="/nowhere",
    status="STOPPED",
    message=None,
    error_type=None,
    entrypoint="python launch.py train a.yaml",
    started=1000.0,
    ended=1060.0,
    driver_exit_code=None,
    verb="train",
)
SECOND = replace(FIRST, id="demo-2", status="RUNNING", ended=None)


def attempt(folder: RunFolder, number: int, job: str | None, steps: range, end: str | None) -> None:
    """What an attempt leaves: how it began and ended, and its steps."""
    with_job = {"job": job} if job else {}
    events = EventLog(folder.events, attempt=number)
    events.write("attempt_started", workers=1, **with_job)
    metrics = MetricsWriter(folder.metrics, attempt=number, resumed_step=steps.start - 1)
    for step in steps:
        metrics.write(step, {"train/loss": 1.0})
    metrics.close()
    if end:
        events.write(end)
    events.close()


def run_folder(storage: Path, state: str) -> RunFolder:
    folder = RunFolder(str(storage), "demo")
    record = RunRecord(name="demo", state="running", attempts=2, created=0.0, config={}, versions={})
    replace(record, state=state).write(folder)
    plan = tiny_plan(name="demo", storage=str(storage))
    write_plan(folder, plan.model_copy(update={"optimization": plan.optimization.model_copy(update={"num_steps": 40})}))
    return folder


def test_each_job_has_the_steps_and_the_state_of_its_own_attempts(tmp_path: Path):
    folder = run_folder(tmp_path, "running")
    attempt(folder, 1, "demo-1", range(1, 11), "run_interrupted")
    attempt(folder, 2, "demo-2", range(11, 15), None)
    first, second = (replace(job, storage=str(tmp_path)) for job in (FIRST, SECOND))
    assert progress_of(first) == Progress(state="interrupted", step=10, num_steps=40)
    assert progress_of(second) == Progress(state="running", step=14, num_steps=40)
    assert progress_of(replace(first, id="refused", status="FAILED")) is None, "it has trained nothing of it"


def test_a_job_that_found_its_run_finished_shows_the_run(tmp_path: Path):
    folder = run_folder(tmp_path, "finished")
    attempt(folder, 1, "demo-1", range(1, 41), "run_finished")
    found = replace(SECOND, storage=str(tmp_path), status="SUCCEEDED", ended=1100.0)
    assert progress_of(found) == Progress(state="finished", step=40, num_steps=40)


def test_an_attempt_that_left_no_word_was_lost(tmp_path: Path):
    folder = run_folder(tmp_path, "finished")
    attempt(folder, 1, "demo-1", range(1, 8), None)
    attempt(folder, 2, "demo-2", range(6, 41), "run_finished")
    assert progress_of(replace(FIRST, storage=str(tmp_path), status="FAILED")) == Progress(state="lost", step=5, num_steps=40)


def test_a_run_of_a_raytune_that_noted_no_jobs_shows_as_a_whole(tmp_path: Path):
    attempt(run_folder(tmp_path, "failed"), 1, None, range(1, 4), "attempt_failed")
    assert progress_of(replace(FIRST, storage=str(tmp_path))) == Progress(state="failed", step=3, num_steps=40)


def test_a_sweep_shows_its_trials(tmp_path: Path):
    folder = SweepFolder(str(tmp_path), "demo")
    job = replace(SECOND, storage=str(tmp_path), verb="sweep")
    assert progress_of(job) is None
    write_bytes(folder.sweep, b"{}")
    ledger = Ledger(folder.ledger, {})
    for number in range(3):
        ledger.assign(Trial(number=number, values={}))
    ledger.end("trial-000", Ended(state="finished"))
    ledger.end("trial-001", Ended(state="failed", cause="x", is_final=False))
    ledger.close()
    seen = progress_of(job)
    assert seen == SweepProgress(state="running", ended=1, trials=3, best=None)
    assert str(seen) == "1/3 trials (running)"
    assert str(progress_of(replace(job, status="STOPPED"))) == "1/3 trials (unfinished)"
