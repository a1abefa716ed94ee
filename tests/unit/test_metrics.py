"""metrics.jsonl as writers leave it and as readers see it."""

import cProfile
import errno
import json
import logging
import math
import os
import re
import subprocess
import time
import uuid
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune import storage
from raytune.errors import StorageFullError, UserError
from raytune.metrics.events import EventLog, read_events
from raytune.metrics.follower import Follower
from raytune.metrics.history import History
from raytune.metrics.json_numbers import decode_number, encode_number
from raytune.metrics.points import Point
from raytune.metrics.writer import MetricsWriter


@pytest.fixture(params=["local", "remote"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run" / "metrics.jsonl") if request.param == "local" else f"memory://{uuid.uuid4().hex}/metrics.jsonl"


def write(path: str, attempt: int, resumed_step: int, steps: list[int], **values: float) -> None:
    writer = MetricsWriter(path, attempt=attempt, resumed_step=resumed_step)
    for step in steps:
        writer.write(step, {"train/loss": step + attempt / 10, **values})
    writer.close()


def test_what_was_written_is_read(path: str) -> None:
    ticks = count(100.0, 2.0)
    writer = MetricsWriter(path, attempt=1, resumed_step=0, clock=lambda: next(ticks))
    writer.write(0, {"validation/loss": 3.0})
    writer.write(10, {"train/loss": 2.5, "train/learning_rate": 1e-4})
    writer.write(10, {"validation/loss": 2.0})
    writer.write(20, {"train/loss": 1.5, "train/learning_rate": 2e-4})
    writer.close()
    history = History.read(path)
    assert history.last_step == 20
    assert history.series("train/loss") == [(10, 2.5), (20, 1.5)]
    assert history.series("unknown") == []
    assert history.as_of(10) == {"train/loss": 2.5, "train/learning_rate": 1e-4, "validation/loss": 2.0}
    assert history.as_of(20) == {"train/loss": 1.5, "train/learning_rate": 2e-4, "validation/loss": 2.0}
    assert [(point.step, point.evaluation) for point in history.points] == [
        (0, {"validation/loss": 3.0}),
        (10, {"validation/loss": 2.0}),
        (20, {}),
    ]
    assert history.best_of("validation/loss", "min") == (10, 2.0)
    follower = Follower(path)
    follower.look()
    assert follower.seconds_per_step() == pytest.approx(0.3)  # 2 s for steps 0-10, 4 s for steps 10-20


def test_no_file_is_an_empty_history(path: str) -> None:
    history = History.read(path)
    assert (history.last_step, history.points, Follower(path).seconds_per_step()) == (0, (), 0.0)
    assert read_events(path) == []


def test_every_line_is_strict_json(path: str) -> None:
    write(path, 1, 0, [1], bad=math.nan, worse=math.inf, worst=-math.inf)
    for line in storage.read_bytes(path).splitlines():
        json.loads(line, parse_constant=pytest.fail)
    history = History.read(path)
    values = history.as_of(1)
    assert math.isnan(values["bad"])
    assert (values["worse"], values["worst"]) == (math.inf, -math.inf)


@given(st.floats())
def test_numbers_survive(value: float) -> None:
    again = decode_number(json.loads(json.dumps(encode_number(value), allow_nan=False)))
    assert again == value or (math.isnan(again) and math.isnan(value))


@pytest.mark.parametrize("value", ["nan", "1.5", None, True, [1.0]])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="expected a number"):
        decode_number(value)


def test_steps_of_a_dead_attempt_beyond_its_checkpoint_are_gone(path: str) -> None:
    write(path, 1, 0, [1, 2, 3, 4, 5])
    write(path, 2, 3, [4])
    write(path, 3, 4, [5, 6])
    assert History.read(path).series("train/loss") == [(1, 1.1), (2, 2.1), (3, 3.1), (4, 4.2), (5, 5.3), (6, 6.3)]
    write(path, 4, 0, [1])
    assert History.read(path).series("train/loss") == [(1, 1.4)]


def test_what_an_orphan_of_a_dead_attempt_still_writes_is_not_seen(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    orphan = MetricsWriter(path, attempt=1, resumed_step=0)
    orphan.write(1, {"train/loss": 1.1})
    survivor = MetricsWriter(path, attempt=2, resumed_step=0)
    for step in (2, 3):
        orphan.write(step, {"train/loss": -1.0})
        survivor.write(step - 1, {"train/loss": step - 1 + 0.2})
    assert History.read(path).series("train/loss") == [(1, 1.2), (2, 2.2)]


@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 6)), min_size=1, max_size=6),
    st.data(),
)
def test_the_history_is_that_of_a_run_without_faults(attempts: list[tuple[int, int]], data: st.DataObject) -> None:
    lines, reached = [], 0
    for number, (wish, length) in enumerate(attempts, start=1):
        resumed = wish % (reached + 1) if number > 1 else 0
        lines.append({"attempt": number, "time": 0.0, "resumed_step": resumed})
        lines += [
            {"attempt": number, "time": 0.0, "step": resumed + i + 1, "loss": float(resumed + i + 1)} for i in range(length)
        ]
        reached = resumed + length
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    assert History.parse(content, "x").series("loss") == [(step, float(step)) for step in range(1, reached + 1)]
    # However much of the end a crash cut off, what is left can be read.
    History.parse(content[: data.draw(st.integers(0, len(content)))], "x")


def test_a_torn_last_line_is_not_there_and_does_not_hurt_the_next_writer(path: str) -> None:
    write(path, 1, 0, [1, 2])
    content = storage.read_bytes(path)
    storage.write_bytes(path, content[:-7])
    assert History.read(path).last_step == 1
    write(path, 2, 1, [2])
    assert History.read(path).series("train/loss") == [(1, 1.1), (2, 2.2)]


def test_another_broken_line_is_named(path: str) -> None:
    write(path, 1, 0, [1, 2])
    first, rest = storage.read_bytes(path).split(b"\n", 1)
    storage.write_bytes(path, first + b'\n{"step": oops}\n' + rest)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 "):
        History.read(path)


def test_local_lines_are_visible_at_once_and_remote_ones_after_a_flush(path: str) -> None:
    writer = MetricsWriter(path, attempt=1, resumed_step=0, upload_every_s=3600)
    writer.write(1, {"train/loss": 1.0})
    if storage.is_local(path):
        assert History.read(path).last_step == 1
    writer.write(2, {"train/loss": 1.0})
    writer.flush()
    assert History.read(path).last_step == 2
    writer.close()


def test_remote_lines_arrive_by_themselves() -> None:
    path = f"memory://{uuid.uuid4().hex}/metrics.jsonl"
    writer = MetricsWriter(path, attempt=1, resumed_step=0, upload_every_s=0.01)
    writer.write(1, {"train/loss": 1.0})
    for _ in range(200):
        if History.read(path).last_step == 1:
            break
        subprocess.run(["sleep", "0.02"], check=True)
    assert History.read(path).last_step == 1
    writer.close()


class FullStore(MemoryFileSystem):
    """A store of files in memory that has no room for a while."""

    protocol = "full"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    is_full = True
    num_refused = 0

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **others: Any) -> None:
        if FullStore.is_full:
            FullStore.num_refused += 1
            raise OSError(errno.ENOSPC, "no room for now")
        super().pipe_file(path, value, mode, **others)


@pytest.fixture
def full_store(monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a folder in a store that is full."""
    fsspec.register_implementation("full", FullStore, clobber=True)
    monkeypatch.setattr(FullStore, "is_full", True)
    monkeypatch.setattr(FullStore, "num_refused", 0)
    return f"full://{uuid.uuid4().hex}"


def test_lines_that_wait_for_a_storage_that_is_away_are_told_of_once(
    full_store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = f"{full_store}/metrics.jsonl"
    with caplog.at_level(logging.WARNING, "raytune.metrics.lines"):
        writer = MetricsWriter(path, attempt=1, resumed_step=0, upload_every_s=0.01)
        while FullStore.num_refused < 4:
            time.sleep(0.01)
        monkeypatch.setattr(FullStore, "is_full", False)
        while len(caplog.messages) < 2:
            time.sleep(0.01)
        writer.close()
    waiting, arrived = caplog.messages
    assert waiting.startswith(f"Lines of {path} wait until the storage answers again: ")
    assert "the disk is full (no room for now)" in waiting
    assert arrived == f"The lines of {path} that waited have arrived."
    assert len(storage.read_bytes(path).splitlines()) == 1


def test_the_best_value_is_finite_and_the_earliest() -> None:
    values = [math.nan, 2.0, -math.inf, 1.0, 1.0, math.inf]
    lines = [
        json.dumps({"attempt": 1, "time": 0.0, "step": i, "m": encode_number(v)}).encode() + b"\n" for i, v in enumerate(values)
    ]
    history = History.parse(b"".join(lines), "x")
    assert history.best_of("m", "min") == (3, 1.0)
    assert history.best_of("m", "max") == (1, 2.0)
    assert history.best_of("unknown", "max") is None


def test_events_are_read_in_order(path: str) -> None:
    for attempt in (1, 2):
        log = EventLog(path, attempt=attempt, clock=lambda: 7.0)
        log.write("started", rank=0)
        log.write("checkpoint_saved", step=attempt * 10)
        log.close()
    assert read_events(path) == [
        {"event": "started", "attempt": 1, "time": 7.0, "rank": 0},
        {"event": "checkpoint_saved", "attempt": 1, "time": 7.0, "step": 10},
        {"event": "started", "attempt": 2, "time": 7.0, "rank": 0},
        {"event": "checkpoint_saved", "attempt": 2, "time": 7.0, "step": 20},
    ]


def test_two_writers_keep_each_others_lines(path: str) -> None:
    driver, worker = EventLog(path, attempt=1, upload_every_s=3600), EventLog(path, attempt=1, upload_every_s=3600)
    driver.write("attempt_started")
    driver.flush()
    worker.write("checkpoint_saved")
    worker.flush()
    driver.write("attempt_failed")
    driver.close()
    worker.close()
    assert [event["event"] for event in read_events(path)] == ["attempt_started", "checkpoint_saved", "attempt_failed"]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    writer = MetricsWriter(tmp_path / "metrics.jsonl", attempt=1, resumed_step=0)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._lines._descriptor)  # type: ignore[union-attr]
    with pytest.raises(StorageFullError, match="disk is full"):
        writer.write(1, {"train/loss": 1.0})


# --- Followers ---------------------------------------------------------------------------------------------------------------


def test_a_follower_tells_what_is_new(path: str) -> None:
    follower = Follower(path)
    assert follower.look() == ()
    writer = MetricsWriter(path, attempt=1, resumed_step=0)
    writer.write(1, {"train/loss": 1.0})
    writer.write(2, {"train/loss": 2.0})
    writer.flush()
    assert [point.step for point in follower.look()] == [1, 2]
    assert follower.look() == ()
    writer.write(2, {"validation/loss": 3.0})
    writer.flush()
    (point,) = follower.look()
    assert (point.step, dict(point.values)) == (2, {"train/loss": 2.0, "validation/loss": 3.0}), "whole, though half was known"
    write(path, 2, 1, [2])
    (point,) = follower.look()
    assert (point.step, point.attempt, dict(point.values)) == (2, 2, {"train/loss": 2.2})
    assert History.read(path).points[1:] == (point,)
    writer.close()


def num_read() -> int:
    """Bytes that this process has read from files so far."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])  # pyright: ignore[reportOptionalSubscript]


def test_a_look_reads_what_was_added_and_not_the_file_again(tmp_path: Path) -> None:
    path = str(tmp_path / "metrics.jsonl")
    write(path, 1, 0, list(range(1, 1001)))
    follower, num_in_looks = Follower(path), 0
    follower.look()
    writer = MetricsWriter(path, attempt=2, resumed_step=1000)
    for step in range(1001, 1101):
        writer.write(step, {"train/loss": 0.0})
        before = num_read()
        points = follower.look()
        num_in_looks += num_read() - before
        assert [point.step for point in points] == [step]
    assert num_in_looks < 100 * 600, "two or three lines a look and the counter itself, where the file has a thousand lines"
    writer.close()


def test_a_look_costs_what_was_added_and_not_what_is_known(tmp_path: Path) -> None:
    """Python functions that are called for one new line, however many came before it."""
    calls = {}
    for num_lines in (10, 3000):
        path = str(tmp_path / f"{num_lines}.jsonl")
        writer = MetricsWriter(path, attempt=1, resumed_step=0)
        for step in range(num_lines):
            writer.write(step, {"train/loss": 1.0})
        follower = Follower(path)
        follower.look()
        writer.write(num_lines, {"train/loss": 2.0})
        with cProfile.Profile() as profile:
            follower.look()
            assert follower.newest("train/loss") == (num_lines, 2.0)
            assert follower.newest("validation/loss") is None
            assert follower.last_step == num_lines
            follower.seconds_per_step()
        calls[num_lines] = sum(entry.callcount for entry in profile.getstats())
        writer.close()
    assert calls[3000] < calls[10] + 100, "a search of the place takes its logarithm"


@settings(deadline=None)
@given(st.data())
def test_a_follower_knows_what_a_reader_knows_wherever_the_file_is_cut(data: st.DataObject) -> None:
    """Lines of attempts that resume, orphans among them, seen in pieces that end anywhere."""
    lines, reached = [], 0
    for attempt in range(1, data.draw(st.integers(1, 4)) + 1):
        resumed = data.draw(st.integers(0, reached))
        lines.append({"attempt": attempt, "time": 1.0, "resumed_step": resumed})
        reached = data.draw(st.integers(resumed, resumed + 5))
        steps = range(resumed + 1, reached + 1)
        lines += [{"attempt": attempt, "time": 2.0, "step": step, "loss": float(step)} for step in steps]
        if attempt > 1 and data.draw(st.booleans()):
            lines.append({"attempt": attempt - 1, "time": 2.0, "step": reached + 1, "loss": 0.0})
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    url, end = f"memory://{uuid.uuid4().hex}/metrics.jsonl", 0
    follower = Follower(url)
    seen: dict[int, Point] = {}
    while end < len(content):
        end = min(end + data.draw(st.integers(20, 200)), len(content))
        storage.write_bytes(url, content[:end])
        seen |= {point.step: point for point in follower.look()}
        expected, fresh = History.parse(content[:end], url), Follower(url)
        fresh.look()
        assert [seen[step] for step in sorted(seen) if step <= follower.last_step] == list(expected.points)
        assert follower.last_step == expected.last_step
        assert follower.newest("loss") == next(iter(expected.series("loss")[::-1]), None)
        assert follower.seconds_per_step() == fresh.seconds_per_step()


@pytest.mark.parametrize("new_steps", [[1], [1, 2, 3, 4, 5, 6, 7, 8]])
def test_a_file_that_was_replaced_is_read_from_its_beginning(path: str, new_steps: list[int]) -> None:
    write(path, 1, 0, [1, 2, 3, 4])
    follower = Follower(path)
    follower.look()
    storage.write_bytes(path, b"")
    write(path, 3, 0, new_steps)
    points = follower.look()
    assert [point.step for point in points] == new_steps
    assert points == History.read(path).points


def test_a_torn_line_waits_and_what_a_resume_cuts_off_was_never_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(str(path), 1, 0, [1, 2])
    follower = Follower(path)
    with path.open("ab") as file:
        file.write(b'{"attempt": 1, "time": 3.0, "st')
    assert follower.look()[-1].step == 2
    assert follower.look() == ()
    write(str(path), 2, 1, [2, 3])  # truncates the torn line first
    assert [point.step for point in follower.look()] == [2, 3]
    path.unlink()
    assert follower.look() == ()
    assert (follower.last_step, follower.newest("train/loss")) == (0, None)


def test_a_line_that_is_none_is_named(path: str) -> None:
    write(path, 1, 0, [1])
    follower = Follower(path)
    follower.look()
    good = storage.read_bytes(path)
    storage.write_bytes(path, good + b"no json\n")
    for _ in range(2):
        with pytest.raises(UserError, match=r"metrics.jsonl:3 is not a line of metrics"):
            follower.look()
    storage.write_bytes(path, good)
    assert [point.step for point in follower.look()] == [1]


# --- Ends --------------------------------------------------------------------------------------------------------------------


def start_and_fail(path: str) -> None:
    with EventLog(path, attempt=1, upload_every_s=3600) as events:
        events.write("started")
        raise ZeroDivisionError


def test_whatever_ends_a_block_the_events_are_written(path: str) -> None:
    with pytest.raises(ZeroDivisionError):
        start_and_fail(path)
    assert [event["event"] for event in read_events(path)] == ["started"]


def test_what_ends_a_block_is_told_though_the_storage_is_away_too(full_store: str, caplog: pytest.LogCaptureFixture) -> None:
    url = f"{full_store}/events.jsonl"
    with pytest.raises(ZeroDivisionError):
        start_and_fail(url)
    assert "the disk is full (no room for now)" in caplog.text
    with pytest.raises(StorageFullError), EventLog(url, attempt=1, upload_every_s=3600) as events:
        events.write("started")


def test_a_thread_that_is_late_writes_to_the_log_and_to_no_other_file(path: str, tmp_path: Path) -> None:
    """A checkpoint that commits after its run was stopped; the number of the file may be that of another one by then."""
    log = EventLog(path, attempt=1, upload_every_s=3600)
    log.write("attempt_started")
    log.close()
    with (tmp_path / "other").open("wb"):
        log.write("checkpoint_saved")
        assert (tmp_path / "other").read_bytes() == b""
    assert [event["event"] for event in read_events(path)] == ["attempt_started", "checkpoint_saved"]
    log.close()
