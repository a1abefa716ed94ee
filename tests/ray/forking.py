"""How tests of Ray start workers in a moment: a raylet calls a program in place of Python, and that has each worker forked from a
process which has imported the libraries (`forked/server.py`). Commands that a test runs to their end start so too."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

FORKED = Path(__file__).parent / "forked"
starts_as_ray_does = False
"""Whether all workers start as they do at a user's: with --slow. Without it, so do those of test_embedded and test_hub_base."""


@cache
def forking_python() -> str:
    """The program. The process behind it lives as long as this one."""
    if starts_as_ray_does:
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix="rf", dir="/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    python, socket = sys.executable, folder / "socket"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_DISABLE_TELEMETRY": "1"}
    server = subprocess.Popen(
        [python, str(FORKED / "server.py"), str(socket)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nexec "{python}" -IS "{FORKED / "starter.py"}" "{python}" "{socket}" "$@"\n')
    program.chmod(0o755)
    return str(program)


def forking_environment(environment: dict[str, str]) -> dict[str, str]:
    """An environment in which `launch.py` gives its own cluster that program (`forked/site/sitecustomize.py`)."""
    path = os.pathsep.join(filter(None, (str(FORKED / "site"), environment.get("PYTHONPATH"))))
    return environment | {"PYTHONPATH": path, "PYTHON_OF_RAYLETS": forking_python()}
