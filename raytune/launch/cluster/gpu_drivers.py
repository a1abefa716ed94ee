"""Whether this machine has a driver of GPUs. Standard library only: it is asked before any library is loaded."""

import os
import sys

DRIVERS = ("nvidiactl", "nvmap", "dxg", "kfd")
"""Devices by which Linux reaches GPUs: NVIDIA's cards and modules, those of a Windows around it, and AMD's."""


def may_have_gpus() -> bool:
    """Whether this machine has a driver of GPUs. It takes no time, where torch takes seconds until it can be asked."""
    return sys.platform != "linux" or any(os.path.exists(f"/dev/{name}") for name in DRIVERS)
