"""What a person sees of a run: how far it is, where it goes on, how old its checkpoint is, and that it had finished before."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from raytune.config.load import config_from
from raytune.launch.run import train_plan
from raytune.launch.state.progress import RunView, show_result
from raytune.launch.state.record import RunRecord, write_plan
from raytune.launch.state.result import RunResult
from raytune.metrics.events import EventLog
from raytune.metrics.writer import MetricsWriter
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.storage import write_json
from tests.tiny import tiny_plan

STEPS = 8


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def run_of(tmp_path: Path) -> RunPlan:
    return tiny_plan(name="r", storage=str(tmp_path), optimization={"num_steps": STEPS})


def shown(view: RunView) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    console.print(view.table())
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def write_steps(plan: RunPlan, clock: Clock, *, attempt: int, resumed: int, until: int) -> None:
    folder = RunFolder(plan.storage, plan.name)
    writer = MetricsWriter(folder.metrics, attempt=attempt, resumed_step=resumed, clock=clock)
    events = EventLog(folder.events, attempt=attempt, clock=clock)
    events.write("training_started", step=resumed)
    for step in range(resumed + 1, until + 1):
        clock.now += 2.0
        writer.write(step, {"train/loss": 1.0 / step, "train/tokens_per_s": 1000.0})
        if step % 2 == 0:
            writer.write(step, {"validation/loss": 2.0 / step})
            events.write("checkpoint_saved", step=step, num_bytes=1, path="x")
    writer.close()
    events.close()


def test_a_value_that_is_older_than_the_step_says_how_old(tmp_path: Path) -> None:
    plan, clock = run_of(tmp_path), Clock()
    view = RunView(plan, clock)
    write_steps(plan, clock, attempt=1, resumed=0, until=5)
    (line,) = view.new_lines()
    assert line.startswith("step 5/8  loss 0.2000  validation loss 0.5000 (step 4)  ")
    assert line.endswith("left 6.0s")
    assert not list(view.new_lines()), "nothing new, nothing said"


def test_a_teachers_part_stands_beside_the_loss_that_it_is_of(tmp_path: Path) -> None:
    plan = run_of(tmp_path)
    with MetricsWriter(RunFolder(plan.storage, plan.name).metrics, attempt=1, resumed_step=0) as writer:
        writer.write(1, {"train/loss": 0.5, "train/distillation": 0.125})
    (line,) = RunView(plan, Clock()).new_lines()
    assert line.startswith("step 1/8  loss 0.5000  of which the teacher's 0.1250  ")


def test_a_terminal_shows_a_bar_the_time_left_and_the_age_of_the_checkpoint(tmp_path: Path) -> None:
    plan, clock = run_of(tmp_path), Clock()
    view = RunView(plan, clock)
    assert "starting workers, 0.0s" in shown(view)
    write_steps(plan, clock, attempt=1, resumed=0, until=5)
    clock.now += 70
    text = shown(view)
    bar = next(line for line in text.splitlines() if "5/8" in line)
    assert bar.count("━") >= 25
    assert "left" in text
    assert "step 4, 1m12s ago" in text


def test_an_attempt_says_where_it_goes_on_once(tmp_path: Path) -> None:
    plan, clock = run_of(tmp_path), Clock()
    write_steps(plan, clock, attempt=1, resumed=0, until=5)
    clock.now += 1000
    view = RunView(plan, clock)
    clock.now += 1
    write_steps(plan, clock, attempt=2, resumed=4, until=6)
    clock.now += 60
    first = list(view.new_lines())
    assert first[0] == "attempt 2 goes on from the checkpoint after step 4"
    assert first[1].startswith("step 6/8")
    clock.now += 60
    write_steps(plan, clock, attempt=3, resumed=0, until=1)
    clock.now += 60
    assert next(iter(view.new_lines())) == "attempt 3 starts from the beginning: there is no checkpoint to go on from"
    assert "attempt 3 starts" in shown(view)
    assert not [line for line in view.new_lines() if line.startswith("attempt")]


def test_the_last_step_is_not_the_end(tmp_path: Path) -> None:
    plan, clock = run_of(tmp_path), Clock()
    write_steps(plan, clock, attempt=1, resumed=0, until=STEPS)
    (line,) = RunView(plan, clock).new_lines()
    assert line.endswith("state all steps done, writing the model")


def test_a_download_is_shown_until_the_first_step(tmp_path: Path) -> None:
    plan, clock = run_of(tmp_path), Clock()
    folder = RunFolder(plan.storage, plan.name)
    noted = {"base": "o/n", "node": "a", "done_bytes": 1 << 30, "total_bytes": 4 << 30, "num_done": 1, "num_files": 5}
    noted |= {"bytes_per_s": float(1 << 28), "is_waiting": False}
    write_json(f"{folder.downloads}/a.json", noted | {"time": clock.now})
    write_json(f"{folder.downloads}/killed.json", noted | {"base": "o/killed", "time": clock.now - 1000})
    (line,) = RunView(plan, clock).new_lines()
    assert line == "step 0/8  downloading o/n: 1 GiB of 4 GiB, file 2 of 5, 256 MiB/s, 12s left"


def test_a_finished_run_says_that_it_had_finished_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, clock = run_of(tmp_path), Clock()
    folder = RunFolder(plan.storage, plan.name)
    write_steps(plan, clock, attempt=1, resumed=0, until=STEPS)
    write_plan(folder, plan)
    config = config_from({"name": "r", "storage": str(tmp_path)})
    record = RunRecord(name="r", state="finished", attempts=1, created=0.0, config=config.model_dump(mode="json"), versions={})
    record.write(folder)
    result = {"metrics": {"validation/loss": 1.0}, "best_step": 8, "held_bytes": [], "median_step_s": 1.0, "comparisons": {}}
    write_json(folder.result, result)
    again = train_plan(plan, [], config)
    assert again.finished_before
    assert json.loads(json.dumps(again.to_json()))["finished_before"] is True
    show_result(again)
    assert "Run r had finished before: nothing was trained." in capsys.readouterr().out


def test_a_run_that_a_rule_ended_says_so_while_it_writes_its_model_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    plan = tiny_plan(
        name="r",
        storage=str(tmp_path),
        optimization={"num_steps": STEPS},
        stopping={"early_stopping": {"patience": 2}, "overfitting": {"policy": "warn"}},
    )
    folder, view = RunFolder(plan.storage, plan.name), RunView(plan, clock)
    write_steps(plan, clock, attempt=1, resumed=0, until=4)
    (line,) = view.new_lines()
    assert line.endswith("left at most 8.0s")
    with EventLog(folder.events, attempt=1, clock=clock) as events:
        events.write("overfitting", step=4, reason="it rose")
        events.write("stopped_early", step=4, rule="early_stopping", reason="no better")
    clock.now += 60
    warning, line = view.new_lines()
    assert warning == "Overfitting by step 4: it rose."
    assert line.endswith("state ended early, writing the model")
    write_plan(folder, plan)
    findings = {
        "stopped": {"step": 4, "rule": "early_stopping", "reason": "no better"},
        "overfitting": [{"step": 4, "reason": "it rose"}],
    }
    result = {"metrics": {}, "best_step": 2, "held_bytes": [], "median_step_s": 1.0, "comparisons": {}}
    write_json(folder.result, result | findings)
    read = RunResult.read(folder)
    assert {key: read.to_json()[key] for key in findings} == findings
    show_result(read)
    shown_text = capsys.readouterr().out
    assert "Ended early after step 4 of 8 (training.early_stopping): no better. The model is that of step 2." in shown_text
    assert "Overfitting by step 4: it rose." in shown_text
