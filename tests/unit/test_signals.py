"""A wish to end is heard wherever it finds the main thread."""

import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys, time
from raytune.launch.cluster.signals import unwind_at

class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(1)  # where the handler raises, and Python drops what it raised

unwind_at(signal.{name})
last = Last()
try:
    del last
    time.sleep(30)
finally:
    print("let go")
"""


@pytest.mark.parametrize(("name", "exit_code"), [("SIGTERM", 143), ("SIGINT", -2)])  # as Python ends after a Ctrl-C
def test_a_signal_whose_exception_python_drops_comes_once_more(name: str, exit_code: int):
    ended = subprocess.run([sys.executable, "-c", SCRIPT.format(name=name)], capture_output=True, text=True, timeout=25)
    assert ended.returncode == exit_code
    assert ended.stdout == "let go\n"
    assert "Exception ignored" not in ended.stderr
