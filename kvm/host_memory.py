"""The host's memory behind a guest's: where it comes from, and which of its pages hold anything of their own."""

from __future__ import annotations

import mmap
import sys

import numpy as np
from numpy.typing import NDArray

from kvm.backends.interface import PAGE_SIZE

_ENTRY = 8
_FILE, _SWAPPED, _PRESENT = (np.uint64(1 << bit) for bit in (61, 62, 63))

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # Python has it from 3.13 on


def anonymous(size: int) -> mmap.mmap:
    """Zeros, private; taken from the host page by page as they're touched. Raises OSError, OverflowError."""
    if hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    return mmap.mmap(-1, size)


def touched(pages: NDArray[np.generic]) -> NDArray[np.int64]:
    """Of private memory, rows of a page each: those that may differ from what was mapped, zeros or a file.

    Linux tells (Documentation/admin-guide/mm/pagemap.rst): pages that the host has backed, but not with a file's own.
    Elsewhere, all.
    """
    count = len(pages)
    if mmap.PAGESIZE == PAGE_SIZE:
        try:
            with open("/proc/self/pagemap", "rb", buffering=0) as file:
                file.seek(pages.ctypes.data // PAGE_SIZE * _ENTRY)
                entries = np.frombuffer(file.read(count * _ENTRY), np.uint64)
        except OSError:
            entries = np.empty(0, np.uint64)
        if len(entries) == count:
            return np.flatnonzero((entries & (_SWAPPED | _PRESENT) != 0) & (entries & _FILE == 0))
    return np.arange(count)
