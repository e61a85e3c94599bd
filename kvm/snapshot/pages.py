"""The pages that checkpoints hold: each differing page once, whatever number of checkpoints it belongs to.

A checkpoint's memory is an *index*: for every RAM page the number of its content in the store. So a checkpoint
costs its changed pages and 8 bytes a page, and going back copies only pages that are dirty or whose index differs.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from kvm.backends.interface import PAGE_SIZE
from kvm.memory import Memory, Pages

Index = NDArray[np.int64]

_ZERO = 0
"""The store's content 0 is the zero page: most of a young guest's memory."""


class PageStore:
    """Page contents in one growing array, and what the RAM holds in terms of it."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._contents = np.zeros((64, PAGE_SIZE), np.uint8)
        self._used = 1
        self._free: list[int] = []
        self._base: Index | None = None
        """What RAM held when its dirty log was last emptied."""
        self._dirty: Pages = np.empty(0, np.int64)
        """Pages dirty since ``_base``, already taken out of the log: a failure in mid-way must not lose them."""

    def take(self) -> tuple[Index, int]:
        """RAM as it is now: its index, and how many pages were stored for it. Raises MemoryError, losing nothing."""
        if self._base is None:
            self._memory.start_log()
            self._memory.dirty_pages()
            base: Index = np.zeros(self._memory.page_count, np.int64)
            pages = self._non_zero()
        else:
            base, pages = self._base, self._collect()
        index = base.copy()
        slots = self._allocate(len(pages))
        self._memory.get_pages(pages, self._contents, slots)
        index[pages] = slots
        self._settle(index)
        return index, len(pages)

    def put_back(self, index: Index) -> int:
        """Make RAM hold what ``index`` says; returns how many pages were copied."""
        assert self._base is not None, "an index comes from take()"
        pages = self._collect()
        if index is not self._base:
            pages = np.union1d(pages, np.flatnonzero(index != self._base))
        if len(pages):
            self._memory.put_pages(pages, self._contents, index[pages])
        self._settle(index)
        return len(pages)

    def keep_only(self, indices: Iterable[Index]) -> None:
        """Free the contents that none of these indices, nor the RAM's own, refers to."""
        kept = np.zeros(self._used, bool)
        kept[_ZERO] = True
        for index in (*indices, *(() if self._base is None else (self._base,))):
            kept[index] = True
        self._free = np.flatnonzero(~kept).tolist()

    def _settle(self, index: Index) -> None:
        self._base = index
        self._dirty = np.empty(0, np.int64)

    def _collect(self) -> Pages:
        new = self._memory.dirty_pages()
        self._dirty = np.union1d(self._dirty, new) if len(self._dirty) else new
        return self._dirty

    def _non_zero(self) -> Pages:
        found = [
            np.flatnonzero(region.pages.view(np.uint64).any(axis=1)) + region.first_page for region in self._memory.ram
        ]
        return np.concatenate(found)

    def _allocate(self, count: int) -> Pages:
        """Places for ``count`` contents: freed ones first."""
        reused = min(count, len(self._free))
        fresh = count - reused
        if self._used + fresh > len(self._contents):
            grown = np.empty((max(2 * len(self._contents), self._used + fresh), PAGE_SIZE), np.uint8)
            grown[: self._used] = self._contents[: self._used]
            self._contents = grown
        places = [self._free.pop() for _ in range(reused)]
        places += range(self._used, self._used + fresh)
        self._used += fresh
        return np.array(places, np.int64)
