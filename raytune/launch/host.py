"""What the machine under this process has, read without Ray and without torch, so that `doctor` answers at once."""

import os
from pathlib import Path


def memory_bytes_here() -> int:
    """Of the machine, or of the container if that has less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return machine
    return min(machine, int(limit)) if limit.isdecimal() else machine
