"""Ctrl-C, and the SIGTERM of `ray job stop` and Kubernetes: the run says what it does next time and leaves no process behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from raytune.metrics import History

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_ends_in_order(number: signal.Signals, exit_code: int, tmp_path: Path) -> None:
    ray_tmp = tempfile.mkdtemp(prefix="ri", dir="/tmp")
    environment = os.environ | {"RAY_TMPDIR": ray_tmp, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    command = [
        sys.executable,
        "launch.py",
        "train",
        "configs/recipes/quickstart.yaml",
        f"storage={tmp_path}",
        "training.logging_steps=1",
    ]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 150
        while History.read(tmp_path / "quickstart/metrics.jsonl").last_step < 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no step was made"
            time.sleep(0.2)
        assert processes_of(ray_tmp), "this is how they are found"
        process.send_signal(number)
        _, messages = process.communicate(timeout=60)
        assert process.returncode == exit_code
        assert json.loads((tmp_path / "quickstart/run.json").read_text())["state"] == "interrupted"
        assert number != signal.SIGINT or "the same command continues" in messages
        deadline = time.monotonic() + 20
        while processes_of(ray_tmp) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert processes_of(ray_tmp) == []
    finally:
        process.kill()
        shutil.rmtree(ray_tmp, ignore_errors=True)
