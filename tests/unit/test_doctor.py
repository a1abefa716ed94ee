"""Claims about `raytune doctor`: it answers at once, starts nothing, and finds what was really broken on this machine."""

import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from raytune.cli import cli

LAUNCH = Path(__file__).parents[2] / "launch.py"


def doctor(**environment: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code, and findings by name."""
    done = CliRunner().invoke(cli, ["doctor", "--json"], env=environment)
    assert done.stderr == ""
    return done.exit_code, {finding["name"]: finding for finding in json.loads(done.stdout)["checks"]}


def run(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(LAUNCH), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | dict(environment or {}),
    )


def test_the_doctor_prints_one_line_per_check_and_a_count():
    done = run("doctor", "--storage", "/tmp")
    assert done.returncode in (0, 1), done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("      ")]
    assert lines[-1].startswith(f"{len(lines) - 1} checks: ")
    assert any(line.startswith("ok    disk of storage") or "disk of storage" in line for line in lines)


def test_the_doctor_starts_no_ray_and_imports_no_heavy_library():
    script = "import sys; sys.argv[1:] = ['doctor']\ntry: from raytune.cli import main; main()\nfinally: print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False, cwd=LAUNCH.parent
    )
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert not {"ray", "torch", "transformers", "deepspeed", "numpy"} & loaded


def test_the_doctor_answers_at_once(capsys: pytest.CaptureFixture[str]):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run("doctor")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    with capsys.disabled():
        sys.stdout.write(f"\ndoctor: {spent:.2f} s of CPU\n")
    assert spent < 3  # measured: 0.2 s without a GPU; with one, torch is asked in a process of its own


def test_a_stale_build_lock_fails_with_the_command_that_removes_it(tmp_path: Path):
    lock = tmp_path / "py311_cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    _, findings = doctor(TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert findings["kernel build locks"]["seen"] == "a build is running"
    os.utime(lock, (time.time() - 7200,) * 2)
    code, findings = doctor(TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert (code, findings["kernel build locks"]["status"]) == (1, "fail")
    assert f"rm {lock}" in findings["kernel build locks"]["fix"]


def test_a_token_that_others_can_read_is_told(tmp_path: Path):
    token = tmp_path / "auth_token"
    token.write_text("0" * 64)
    token.chmod(0o644)
    _, findings = doctor(RAY_AUTH_TOKEN_PATH=str(token))
    assert (findings["token file"]["status"], findings["token file"]["fix"]) == ("warn", f"chmod 600 {token}")
    token.chmod(0o600)
    assert doctor(RAY_AUTH_TOKEN_PATH=str(token))[1]["token file"]["status"] == "ok"


def test_a_cache_that_cannot_be_written_to_fails():
    code, findings = doctor(HF_HOME="/proc/self")
    assert (code, findings["Hugging Face cache"]["status"]) == (1, "fail")
    assert "HF_HOME" in findings["Hugging Face cache"]["fix"]


@pytest.mark.parametrize(
    ("environment", "is_offline"),
    [
        ({"HF_HUB_OFFLINE": "1"}, True),
        ({"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "yes"}, True),
        ({"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"}, False),
        ({"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": ""}, False),
    ],
)
def test_the_doctor_says_that_the_hub_is_offline_as_its_library_reads_it(environment: dict[str, str], is_offline: bool):
    assert ("offline" in doctor(**environment)[1]["Hugging Face cache"]["seen"]) == is_offline
    code = "from huggingface_hub import constants; print(constants.is_offline_mode())"
    command = [sys.executable, "-c", code]
    asked = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == str(is_offline)


def test_workers_that_a_dead_cluster_left_are_named_with_their_pids():
    orphan = subprocess.Popen(["ray::RayTrainWorker", "60"], executable="/bin/sleep")
    try:
        _, findings = doctor()
        if "cluster is running" in findings["Ray processes"]["seen"]:
            pytest.skip("a Ray cluster of somebody else is running here")
        assert f"ray::RayTrainWorker ({orphan.pid})" in findings["Ray processes"]["seen"]
        assert str(orphan.pid) in findings["Ray processes"]["fix"]
    finally:
        orphan.kill()
        orphan.wait()


def test_a_port_of_ray_that_something_else_listens_on_is_told():
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", 8265))
        except OSError:
            pytest.skip("port 8265 is taken here")
        listener.listen()
        _, findings = doctor()
        if "cluster is running" in findings["Ray processes"]["seen"]:
            pytest.skip("a Ray cluster of somebody else is running here")
        assert "8265 taken" in findings["ports 6379, 8265"]["seen"]
