"""The most bytes that tensors take while something runs: the CUDA allocator's figure, and the same from a trace of the CPU's."""

import gc
import json
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch._subclasses import FakeTensor
from torch.profiler import ProfilerActivity, profile

SETTLE_S = 0.2
"""In which threads of a finished gloo collective get Python's lock and let go of its tensors: on a busy machine not always."""
SETTLED_WITHIN_S = 5


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes of all tensors on the device at the fullest moment of `work`, those from before it included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    before = held_bytes(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    return before + max(0, *accumulate(_allocations(trace)))


def held_bytes(device: torch.device) -> int:
    """Bytes of all tensors on the device now. On a CPU: of those that Python knows, once they are as many as a moment before."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    until = time.monotonic() + SETTLED_WITHIN_S
    found, before = _bytes_of_python(), -1
    while found != before and time.monotonic() < until:
        time.sleep(SETTLE_S)
        gc.collect()
        found, before = _bytes_of_python(), found
    return found


def _bytes_of_python() -> int:
    storages = {}
    for value in gc.get_objects():
        # Tensors of a trace, which another test may have left, have no memory.
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) and value.device.type == "cpu":
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _allocations(trace: profile) -> list[int]:
    """Bytes that the CPU's allocator gave, or with a minus took back, in order."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    return [event["args"]["Bytes"] for event in sorted(changes, key=lambda event: event["ts"])]
