"""A training state in memory of the host, out of which a thread writes its files while training goes on.

What training waits for is one copy. Memory that nobody has touched yet makes a copy several times slower, since the system gives
it page by page, so that a thread of its own touches all of it before the first state is due; afterwards it is used again. On a
GPU it is pinned: the copy then takes its place between the kernels of two steps, and no thread waits for it but the one that
writes.
"""

import io
import mmap
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.storage import TypedStorage, UntypedStorage

from raytune.errors import CheckpointError
from raytune.training.engines.state_files import Fill
from raytune.units import MIB

ALIGNMENT = 64
"""Bytes that storages begin at multiples of: those of a line of a CPU's cache."""
LEAST_BLOCK_BYTES = 16 * MIB


class HostMemory:
    """Memory that states are copied into, one after the other, for as long as a run lasts.

    Args:
        num_bytes: that a state is expected to take; what a larger one lacks is allocated when it comes, and kept.
        device: that states are copied from.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.device = device
        self._blocks: list[Tensor] = []
        self._pinned: list[int] = []
        self._error: Exception | None = None
        self._used = self._block = 0
        self._unpin = weakref.finalize(self, _unpin, self._pinned)
        self._unpin.atexit = False  # CUDA may have ended by then, and with it what was pinned
        self._thread = threading.Thread(target=self._prepare, args=(num_bytes,), name="memory of checkpoints", daemon=True)
        self._thread.start()

    def _prepare(self, num_bytes: int) -> None:
        try:
            if num_bytes:
                self._add_block(num_bytes)
        except Exception as error:  # raised by the first copy
            self._error = error

    def _add_block(self, num_bytes: int) -> None:
        block = torch.empty(num_bytes, dtype=torch.uint8)
        block[:: mmap.PAGESIZE].zero_()
        if self.device.type == "cuda":
            # Not by `pin_memory`, which would round its size up to a power of two.
            with torch.cuda.device(self.device):
                _must_succeed(_cudart().cudaHostRegister(block.data_ptr(), num_bytes, 0))
            self._pinned.append(block.data_ptr())
        self._blocks.append(block)

    @property
    def num_bytes(self) -> int:
        """That are allocated."""
        self._thread.join()
        return sum(block.numel() for block in self._blocks)

    def begin(self) -> None:
        """Give all of it to the next state. Nobody may read the one before any more.

        Raises:
            CheckpointError: if it could not be allocated.
        """
        self._thread.join()
        if self._error:
            raise CheckpointError(
                f"The memory that checkpoints are copied into cannot be had: {self._error}. With checkpoint.in_background false, "
                f"training waits while they are written, and needs none."
            ) from self._error
        self._block = self._used = 0

    def copy(self, value: Any) -> Any:
        """A copy of whatever can be pickled, as pickle makes it, with the content of its tensors in this memory. On a GPU it is
        complete when the stream comes to what follows."""
        storages: dict[int, UntypedStorage] = {}
        parts: list[tuple[Any, Any]] = []
        places: dict[int, int] = {}

        def place_of(part: object) -> int | None:
            """Where pickle finds what it is to take for a part; None for what it copies itself. A text stays the object that it
            is, since a file may depend on that: one that comes twice is written once."""
            if not isinstance(part, (str, TypedStorage, UntypedStorage)) and not _is_bare(part):
                return None
            if id(part) not in places:
                places[id(part)] = len(parts)
                copy = part if isinstance(part, str) else self._copied(part, storages)
                parts.append((part, copy))  # the part too, so that no other gets its id
            return places[id(part)]

        return _through_pickle(value, place_of, lambda place: parts[place][1])

    def _copied(self, part: Any, storages: dict[int, UntypedStorage]) -> Any:
        """
        Args:
            storages: copies that there are, by their originals. Tensors may share one, or look at a part of it.
        """
        original = part.untyped_storage() if isinstance(part, Tensor) else getattr(part, "_untyped_storage", part)
        if original._cdata not in storages:
            storages[original._cdata] = self._taken(original.nbytes()).copy_(original, non_blocking=True)
        copy = storages[original._cdata]
        if isinstance(part, Tensor):
            return part.new_empty(0, device="cpu").set_(copy, part.storage_offset(), part.size(), part.stride())
        return copy if part is original else TypedStorage(wrap_storage=copy, dtype=part.dtype, _internal=True)

    def _taken(self, num_bytes: int) -> UntypedStorage:
        """The next bytes that are free."""
        if not num_bytes:
            return UntypedStorage(0)
        while self._block < len(self._blocks) and self._used + num_bytes > self._blocks[self._block].numel():
            self._block, self._used = self._block + 1, 0
        if self._block == len(self._blocks):
            self._add_block(max(num_bytes, LEAST_BLOCK_BYTES))
        begin, self._used = self._used, -(-(self._used + num_bytes) // ALIGNMENT) * ALIGNMENT
        return self._blocks[self._block].untyped_storage()[begin : begin + num_bytes]

    def release(self) -> None:
        """Let go of it. A state that is still being written keeps what it needs."""
        self._thread.join()
        self._unpin()
        self._blocks.clear()


class Snapshot:
    """Takes the files of one state (`Write`) as they are now, and writes them later, on another thread.

    Args:
        memory: of which this is the only user until it is written.
    """

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._files: list[tuple[Fill, Any, Path]] = []
        self._copied: torch.cuda.Event | None = None
        memory.begin()

    def __call__(self, path: Path, content: Any, fill: Fill) -> None:
        self._files.append((fill, self._memory.copy(content), path))
        if self._memory.device.type == "cuda":
            event = torch.cuda.Event(blocking=True)  # nobody spins who waits for it
            torch.cuda.current_stream(self._memory.device).record_event(event)
            self._copied = event

    def write(self) -> None:
        """Write the files, and forget them."""
        if self._copied is not None:
            self._copied.synchronize()
        for fill, content, path in self._files:
            fill(content, path)
        self._files.clear()


def _is_bare(part: object) -> bool:
    """Whether a tensor is nothing but a view of its storage. Pickle takes long for one of these, of which a state may have
    thousands."""
    if type(part) is not Tensor or part.requires_grad or part.__dict__:
        return False
    return part.layout is torch.strided and not (part.is_quantized or part.is_conj() or part.is_neg())


def _through_pickle(value: Any, place_of: Any, at_place: Any) -> Any:
    """What pickle makes of a value, without looking into parts that have a place (`pickle.Pickler.persistent_id`)."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return place_of(obj)

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return at_place(pid)

    pickled = io.BytesIO()
    Pickler(pickled, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    pickled.seek(0)
    return Unpickler(pickled).load()


def _unpin(pointers: list[int]) -> None:
    while pointers:
        _must_succeed(_cudart().cudaHostUnregister(pointers.pop()))


def _cudart() -> Any:
    """CUDA's runtime library."""
    return torch.cuda.cudart()


def _must_succeed(result: Any) -> None:
    if int(result):
        raise RuntimeError(f"CUDA error {int(result)}")
