"""Memory of freed tensors, given back to the system at once, so that what is planned for one shard holds for all of them."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's <malloc.h>."""
_APART_FROM = 1 << 20
_USUAL_AT_MOST = 32 << 20
"""What glibc raises the threshold to by itself, once blocks of that size were freed (on 64 bits)."""


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Context, or decorator, in which a tensor of a MiB or more has memory of its own from the system and leaves none behind.

    By default glibc takes blocks of up to 32 MiB from its heap after the first of them was freed. The heap is given back from
    its end only, so that one small block there keeps all below it: merging a model of 483 MB in shards of 40 MB took 182 MB or
    470, by chance. Behind the context the threshold is where glibc would have raised it to. Without glibc it does nothing.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _APART_FROM)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _USUAL_AT_MOST)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _USUAL_AT_MOST)


def _glibc() -> Any:
    """The C library of this process if it is glibc; else None."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
