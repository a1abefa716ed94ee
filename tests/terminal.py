"""Commands on a pseudo-terminal."""

import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Terminal:
    """A command on a pseudo-terminal, as somebody sits before it."""

    def __init__(self, *arguments: str, columns: int = 100, lines: int = 30, cwd: Path = ROOT) -> None:
        self._unread, self._terminal = "", pty.openpty()
        self.keyboard = self._terminal[0]
        ioctl(self._terminal[1], termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.before = termios.tcgetattr(self._terminal[1])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "raytune.cli", *arguments],
            stdin=self._terminal[1],
            stdout=self._terminal[1],
            stderr=self._terminal[1],
            env=os.environ | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)},
            cwd=cwd,
            start_new_session=True,
            preexec_fn=partial(ioctl, self._terminal[1], termios.TIOCSCTTY, 0),  # so that its Ctrl-C is a signal to it
        )

    def wait_for(self, text: str, timeout_s: float = 60.0) -> str:
        """What was written until this text came, with it; what came behind it is left for the next time."""
        deadline = time.monotonic() + timeout_s
        while text not in self._unread:
            assert time.monotonic() < deadline, f"{text!r} did not come: {self._unread!r}"
            if select.select([self.keyboard], [], [], 0.1)[0]:
                self._unread += os.read(self.keyboard, 1 << 16).decode(errors="replace")
        before, _, self._unread = self._unread.partition(text)
        return before + text

    def press(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def rest(self, seconds: float = 0.5, timeout_s: float = 60.0) -> None:
        """Until the command waits for keys: it sleeps, and has done nothing for so long."""
        deadline = time.monotonic() + timeout_s
        state, used = self._doing()
        while True:
            assert time.monotonic() < deadline, f"the command does not rest: {state} after {used} ticks"
            time.sleep(seconds)
            before, (state, used) = used, self._doing()
            if (state, used) == ("S", before):
                return

    def _doing(self) -> tuple[str, int]:
        """State, and ticks of the processor that were used: fields 3, 14 and 15, the second of which may have blanks."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[11]) + int(fields[12])

    def resize(self, columns: int, lines: int) -> None:
        ioctl(self._terminal[1], termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.process.send_signal(signal.SIGWINCH)

    def end(self) -> int:
        code = self.process.wait(30)
        assert termios.tcgetattr(self._terminal[1]) == self.before, "the terminal is as it was"
        return code
