"""Ctrl-C, and the SIGTERM of `ray job stop` and Kubernetes: a run and a sweep say what they do next time, and leave no process
behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from raytune.metrics.history import History
from raytune.run_folder import RunFolder, SweepFolder
from raytune.storage import exists
from raytune.sweeps.ledger import read_ledger
from raytune.training.checkpoints.commit import committed
from raytune.watch.asking import ask
from raytune.watch.logs import logs_of, printed
from raytune.watch.look import Watcher
from raytune.watch.rows import Row, rows_of
from tests.ray.forking import forking_environment

pytestmark = [pytest.mark.ray, pytest.mark.timeout(500)]

ROOT = Path(__file__).parents[2]
FEW_ROWS = ["data.train.0.max_rows=100", "data.validation.0.max_rows=8", "evaluation.generation=null"]


def processes_of(ray_tmp: str) -> list[str]:
    """Command lines that name a folder: the daemons of the Ray cluster that lies in it."""
    lines = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode() if entry.name.isdigit() else ""
        except OSError:
            continue
        if ray_tmp in line:
            lines.append(line)
    return lines


@pytest.fixture
def ray_tmp() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="ri", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def interrupted(arguments: list[str], number: signal.Signals, is_under_way: Callable[[], bool], ray_tmp: str) -> tuple[int, str]:
    """Exit code and messages of a command that gets a signal once it is under way; nothing of its cluster is left after it."""
    return ended(arguments, lambda process: process.send_signal(number), is_under_way, ray_tmp)


def ended(
    arguments: list[str], end: Callable[[subprocess.Popen], None], is_under_way: Callable[[], bool], ray_tmp: str
) -> tuple[int, str]:
    """As `interrupted`, by whatever ends it."""
    environment = forking_environment(os.environ | {"RAY_TMPDIR": ray_tmp, "RAY_AUTH_MODE": "disabled"})
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "launch.py", *arguments]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # shells have what they run in the background ignore it
    )
    try:
        deadline = time.monotonic() + 300  # with --slow workers import for themselves, and a machine may be busy
        while not is_under_way():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no step was made"
            time.sleep(0.2)
        assert processes_of(ray_tmp), "this is how they are found"
        end(process)
        _, messages = process.communicate(timeout=90)
        deadline = time.monotonic() + 20
        while processes_of(ray_tmp) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert processes_of(ray_tmp) == []
        return process.returncode, messages
    finally:
        process.kill()


def signals(often: signal.Signals) -> pytest.MarkDecorator:
    """Both signals; the one that is not looked at often takes half a minute more."""
    codes = {signal.SIGINT: 130, signal.SIGTERM: 143}
    cases = [pytest.param(one, codes[one], marks=() if one is often else pytest.mark.slow) for one in codes]
    return pytest.mark.parametrize(("number", "exit_code"), cases)


@signals(often=signal.SIGINT)
def test_an_interrupted_run_ends_in_order(number: signal.Signals, exit_code: int, tmp_path: Path, ray_tmp: str) -> None:
    arguments = ["train", "configs/recipes/quickstart.yaml", f"storage={tmp_path}", "training.logging_steps=1", *FEW_ROWS]
    metrics = tmp_path / "quickstart/metrics.jsonl"
    code, messages = interrupted(arguments, number, lambda: History.read(metrics).last_step >= 2, ray_tmp)
    assert code == exit_code
    assert json.loads((tmp_path / "quickstart/run.json").read_text())["state"] == "interrupted"
    assert number != signal.SIGINT or "same command" in messages


@pytest.mark.slow
def test_a_run_that_is_asked_saves_and_then_ends_in_order_with_what_its_workers_printed(tmp_path: Path, ray_tmp: str) -> None:
    arguments = ["train", "configs/recipes/quickstart.yaml", f"storage={tmp_path}", "training.logging_steps=1", *FEW_ROWS]
    arguments += ["training.max_steps=2000", "evaluation.every_steps=2000", "checkpoint.every_steps=2000"]
    folder = RunFolder(str(tmp_path), "quickstart")

    def has_saved() -> bool:
        row = next(iter(rows_of(Watcher(folder.storage).look())), None)
        if row is not None and row.state == "running" and not committed(folder) and not exists(folder.save_request):
            ask(folder.storage, row, "save")
        return bool(committed(folder))

    def stop(process: subprocess.Popen) -> None:
        (row,) = rows_of(Watcher(folder.storage).look())
        ask(folder.storage, row, "stop")

    code, messages = ended(arguments, stop, has_saved, ray_tmp)
    assert code == 130
    (step,) = {commit.step for commit in committed(folder)}
    assert f"stopped as asked. The same command continues from step {step}" in messages
    (row,) = rows_of(Watcher(folder.storage).look())
    assert row.state == "interrupted"
    assert not exists(folder.requests)
    assert set(printed(logs_of(folder, None, None))) == {0, 1}


@pytest.mark.slow
def test_a_sweep_that_is_asked_ends_in_order(tmp_path: Path, ray_tmp: str) -> None:
    arguments = ["sweep", "configs/sweeps/quickstart.yaml", f"storage={tmp_path}", "training.logging_steps=1"]
    arguments += ["sweep.stopping.method=none", "training.max_steps=20000", "evaluation.every_steps=20000", *FEW_ROWS]

    def rows() -> list[Row]:
        return rows_of(Watcher(str(tmp_path)).look())

    def is_under_way() -> bool:
        return any(row.kind == "trial" and row.state == "running" and row.step >= 2 for row in rows())

    def stop(process: subprocess.Popen) -> None:
        ask(str(tmp_path), rows()[0], "stop")

    code, messages = ended(arguments, stop, is_under_way, ray_tmp)
    assert code == 130
    assert "stopped as asked. The same command continues the sweep" in messages
    assert {row.state for row in rows()} <= {"interrupted", "waiting"}


@pytest.mark.slow
@signals(often=signal.SIGINT)
def test_an_interrupted_range_test_leaves_nothing(number: signal.Signals, exit_code: int, tmp_path: Path, ray_tmp: str) -> None:
    small = ["data.max_length=192", "data.too_long=truncate", "training.global_batch_size=2", "training.zero.stage=0"]
    arguments = ["find-rate", "configs/recipes/quickstart.yaml", f"storage={tmp_path}", *FEW_ROWS, *small]

    def is_under_way() -> bool:
        return any(History.read(metrics).last_step >= 2 for metrics in tmp_path.glob("rates/*/metrics.jsonl"))

    code, messages = interrupted(arguments, number, is_under_way, ray_tmp)
    assert code == exit_code
    assert "Traceback" not in messages
    assert [path.name for path in tmp_path.iterdir()] == ["stores"]


@signals(often=signal.SIGTERM)
def test_a_signal_while_ray_starts_ends_in_order_too(
    number: signal.Signals, exit_code: int, tmp_path: Path, ray_tmp: str
) -> None:
    arguments = ["train", "configs/recipes/quickstart.yaml", f"storage={tmp_path}"]
    code, messages = interrupted(arguments, number, lambda: bool(processes_of(ray_tmp)), ray_tmp)
    assert code == exit_code
    assert "Traceback" not in messages
    assert not (tmp_path / "quickstart").exists(), "nobody holds the run any more"


@pytest.mark.slow
@signals(often=signal.SIGTERM)
def test_an_interrupted_sweep_ends_in_order_and_none_of_its_trials_counts_as_ended(
    number: signal.Signals, exit_code: int, tmp_path: Path, ray_tmp: str
) -> None:
    arguments = ["sweep", "configs/sweeps/quickstart.yaml", f"storage={tmp_path}", "training.logging_steps=1"]
    # Nothing is measured for an hour: the trials have to hear of it in the middle.
    arguments += ["sweep.stopping.method=none", "training.max_steps=20000", "evaluation.every_steps=20000", *FEW_ROWS]
    folder = SweepFolder(str(tmp_path), "quickstart-sweep")

    def is_under_way() -> bool:
        return any(History.read(folder.trial(name).metrics).last_step >= 2 for name in read_ledger(folder.ledger).trials)

    code, messages = interrupted(arguments, number, is_under_way, ray_tmp)
    assert code == exit_code, messages
    known = read_ledger(folder.ledger)
    assert known.trials
    assert known.ends == {}
    states = {json.loads(path.read_text())["state"] for path in tmp_path.glob("quickstart-sweep/trials/*/run.json")}
    assert states == {"interrupted"}
    assert number != signal.SIGINT or "The same command continues the sweep" in messages
