"""What workers print is in the run folder, whatever becomes of them, and is found there by rank and attempt."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from raytune.cli import cli
from raytune.run_folder import RunFolder
from raytune.storage import exists, read_bytes
from raytune.training.output import MOST_BYTES
from tests.watched import url, write_run

WORKER = """
import os, sys, time
from raytune.run_folder import RunFolder
from raytune.training import output
folder = RunFolder(sys.argv[1], "r")
output.MOST_BYTES = int(sys.argv[2])
with output.output_kept(folder, 1, 0, copy_every_s=0.02):
    exec(sys.argv[3])
{after}
"""


def printed_by(tmp_path: Path, code: str, *, storage: str | None = None, most: int = MOST_BYTES, after: str = "") -> int:
    """Exit code of a worker that does this, whose output goes to files as Ray has it."""
    command = [sys.executable, "-c", WORKER.format(after=after), storage or str(tmp_path), str(most), code]
    with open(tmp_path / "out", "ab") as out, open(tmp_path / "err", "ab") as err:
        return subprocess.run(command, stdout=out, stderr=err, check=False).returncode


def log_of(tmp_path: Path, *, older: bool = False) -> bytes:
    folder = RunFolder(str(tmp_path), "r")
    return read_bytes(folder.older_log(1, 0) if older else folder.log(1, 0))


def test_both_outputs_of_a_worker_are_kept_and_nothing_of_before_and_after(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("of an earlier task of this process\n")
    code = "print('seen'); os.write(2, b'by a library\\xff in C\\n'); print('half a line', end='')"
    assert printed_by(tmp_path, code, after="print('after')") == 0
    kept = log_of(tmp_path)
    assert all(part in kept for part in (b"seen\n", b"by a library\xff in C\n", b"half a line"))
    assert b"after" not in kept
    assert b"earlier" not in kept
    assert (tmp_path / "out").read_text().endswith("after\n"), "its output goes where it went"


def test_a_worker_that_is_killed_leaves_what_it_had_printed(tmp_path: Path) -> None:
    code = "print('before', flush=True); time.sleep(1); os.kill(os.getpid(), 9)"
    assert printed_by(tmp_path, code) == -9
    assert log_of(tmp_path) == b"before\n"


def test_much_output_keeps_its_end_within_bounds(tmp_path: Path) -> None:
    code = "\nfor number in range(400):\n    print('line', number, flush=True)\n    time.sleep(0.001)"
    assert printed_by(tmp_path, code, most=1000) == 0
    newest, older = log_of(tmp_path), log_of(tmp_path, older=True)
    assert len(newest) <= 1000
    assert len(older) <= 1000
    assert (older + newest).endswith(b"line 398\nline 399\n")


def test_a_folder_that_cannot_be_written_stops_nothing_and_is_told_of_once(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("a file where the run folder belongs")
    assert printed_by(tmp_path, "print('on'); time.sleep(0.2); print('and on')") == 0
    assert (tmp_path / "out").read_text() == "on\nand on\n"
    assert (tmp_path / "err").read_text().count("is not kept in") == 1


def test_a_worker_that_prints_nothing_leaves_no_file(tmp_path: Path) -> None:
    assert printed_by(tmp_path, "pass") == 0
    assert not exists(RunFolder(str(tmp_path), "r").logs)


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_output_in_this_process_goes_to_any_storage(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import os

    from raytune.training.output import output_kept

    folder = RunFolder(url(kind, tmp_path), "r")
    kept, file = os.dup(2), os.open(tmp_path / "err", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    with caplog.at_level(logging.WARNING):
        os.dup2(file, 2)
        try:
            with output_kept(folder, 3, 1):
                os.write(2, b"a warning\n")
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(file)
    assert read_bytes(folder.log(3, 1)) == b"a warning\n"
    assert not caplog.records


# --- The verb ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = write_run(str(tmp_path), "r", state="failed")
    for attempt, ranks in ((1, (0,)), (2, (0, 1, 10))):
        for rank in ranks:
            path = Path(folder.log(attempt, rank))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"\x1b[2Jattempt {attempt}\nrank {rank}\n")
    Path(folder.older_log(2, 1)).write_text("long ago\n")
    return folder


def said(*arguments: str) -> tuple[int, list[str]]:
    result = CliRunner().invoke(cli, ["logs", *arguments])
    return result.exit_code, result.output.splitlines()


def test_the_newest_attempt_is_printed_rank_by_rank(run: RunFolder) -> None:
    code, lines = said(run.path)
    assert code == 0
    assert [line.replace("\\u001b[2J", "") for line in lines] == [
        *("[0] attempt 2", "[0] rank 0"),
        *("[1] long ago", "[1] attempt 2", "[1] rank 1"),
        *("[10] attempt 2", "[10] rank 10"),
    ]
    assert not any("\x1b" in line for line in lines)
    assert said(run.path, "--rank", "1", "--tail", "1") == (0, ["rank 1"])
    assert said(run.path, "--attempt", "1", "--tail", "1") == (0, ["rank 0"])
    assert said(run.path, "--tail", "0") == (0, [])
    facts = json.loads(said(run.path, "--json", "--rank", "10", "--tail", "1")[1][0])
    assert facts == {"run": "r", "attempt": 2, "ranks": {"10": "rank 10"}}


def test_a_run_that_nobody_works_on_is_followed_to_its_end(run: RunFolder) -> None:
    assert said(run.path, "--follow", "--rank", "1") == (0, ["long ago", "\\u001b[2Jattempt 2", "rank 1"])


def test_what_is_not_there_is_said_with_what_is(run: RunFolder, tmp_path: Path) -> None:
    code, lines = said(run.path, "--rank", "7")
    assert (code, lines[0].endswith("holds nothing of rank 7 of attempt 2; there are ranks 0, 1, 10.")) == (2, True)
    code, lines = said(run.path, "--attempt", "9")
    assert (code, lines[0].endswith("holds nothing of attempt 9; there are attempts 1, 2.")) == (2, True)
    quiet = write_run(str(tmp_path), "quiet")
    assert "no worker of quiet has printed anything yet" in said(quiet.path)[1][0]
    code, lines = said("some-job", "--rank", "1")
    assert (code, "for a run folder" in lines[-1]) == (2, True)


def test_a_folder_that_is_no_run_is_told_and_no_cluster_is_asked(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["logs", str(tmp_path / "nothing")])
    assert done.exit_code == 2
    assert "is no run folder: it has no run.json" in done.output
