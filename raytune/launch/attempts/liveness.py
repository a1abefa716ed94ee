"""Whether a process that does not answer is at work or hangs, from what its system counts for it. Standard library only.

A process whose Python does not answer may load or write many gigabytes in one call that lets no other thread of it run: it is to
be left alone. One that was stopped, or waits for ever with Python's lock in its hand, uses neither a processor nor a disk.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

WATCHED_FOR_S = 5.0
LEAST_CPU_SHARE = 0.05
"""Of one processor. Threads of Ray that only say that they are there take less."""
LEAST_BYTES = 1 << 20
LEAST_FAULTS = 16
"""Pages that had to be fetched from a disk: how a file that is mapped into memory is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a process has used since it started."""

    cpu_s: float
    bytes: int
    """Read and written, whether a disk had to move for them or not."""
    faults: int

    @classmethod
    def of(cls, pid: int) -> "Usage | None":
        """None: there is no such process, or it was stopped, or has ended and nobody has buried it."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        except OSError:
            return None
        if fields[0] in "TtZX":
            return None
        ticks = int(fields[11]) + int(fields[12])
        return cls(
            cpu_s=ticks / os.sysconf("SC_CLK_TCK"),
            bytes=sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar", "read_bytes", "write_bytes"))),
            faults=int(fields[9]),
        )


def is_at_work(pid: int, watched_for_s: float = WATCHED_FOR_S) -> bool:
    """Look twice at a process of this machine, and say whether it used a processor or a disk in between."""
    before = Usage.of(pid)
    if before is None:
        return False
    time.sleep(watched_for_s)
    after = Usage.of(pid)
    return after is not None and (
        after.cpu_s - before.cpu_s >= LEAST_CPU_SHARE * watched_for_s
        or after.bytes - before.bytes >= LEAST_BYTES
        or after.faults - before.faults >= LEAST_FAULTS
    )
