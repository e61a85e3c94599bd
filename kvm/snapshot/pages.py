"""The pages that checkpoints hold: each differing page once, whatever number of checkpoints it belongs to.

A checkpoint's memory is an *index*: for every RAM page the number of its content in the store. So a checkpoint
costs its changed pages and 8 bytes a page, and going back copies only pages that are dirty or whose index differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from kvm.backends.interface import PAGE_SIZE
from kvm.errors import MachineError
from kvm.host_memory import touched
from kvm.memory import Memory, Pages, union
from kvm.snapshot.contents import PLACE_MASK, SOURCE_SHIFT, ZERO, Contents, Index, PageArray

_PIECE = 256
"""Pages: what of them is copied to be looked at stays in the processor's cache."""

Settled = tuple[Index | None, Pages, dict[int, PageArray]]


class PageStore:
    """Page contents in one growing array, and what the RAM holds in terms of it."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._contents = np.zeros((64, PAGE_SIZE), np.uint8)
        self._used = 1
        self._free: list[int] = []
        self._base: Index | None = None
        """What RAM held when its dirty log was last emptied."""
        self._draft: Index | None = None
        """A copy of ``_base`` for the next ``take``: at 8 bytes a page, more than a guest should stand for."""
        self._dirty: Pages = np.empty(0, np.int64)
        """Pages dirty since ``_base``, already taken out of the log: a failure in mid-way must not lose them."""
        self._files: dict[int, PageArray] = {}
        """The mapped pages of snapshot files that an index refers to, by source number."""
        self._held: list[Index] = []

    def get_ready(self, *, ahead: bool = False) -> int:
        """Do what of the next ``take`` can be done while the guest runs on; the number of pages stored.

        A first one needs all memory: with ``ahead`` that is copied here. What the guest writes meanwhile must be in the
        dirty log: the ``take`` that follows, when it stands, copies that again.
        """
        stored = self.take()[1] if ahead and self._base is None else 0
        self._draft = None if self._base is None else self._base.copy()
        return stored

    def take(self) -> tuple[Index, int]:
        """RAM as it is now: its index, and how many pages were stored for it. Raises MachineError, losing nothing."""
        try:
            return self._take()
        except MemoryError:
            raise MachineError(
                "No host memory for another checkpoint; nothing was lost. Forget an older one and try again."
            ) from None

    def _take(self) -> tuple[Index, int]:
        if self._base is None:
            self._memory.start_log()
            self._memory.dirty_pages()
            base: Index = np.zeros(self._memory.page_count, np.int64)
            pages = self._non_zero()
        else:
            base, pages = self._base, self._collect()
        index = base.copy() if self._draft is None else self._draft
        slots = self._allocate(len(pages))
        self._memory.get_pages(pages, self._contents, slots)
        index[pages] = slots
        self._settle(index)
        return index, len(pages)

    def put_back(self, index: Index) -> int:
        """Make RAM hold what ``index`` says; returns how many pages were copied."""
        assert self._base is not None, "an index comes from take()"
        if index is self._base and not len(self._dirty) and not self._files:
            self._draft = None
            return self._memory.go_back(self._contents, index)
        pages = self._collect()
        if index is not self._base:
            pages = union(pages, np.flatnonzero(index != self._base))
        if len(pages):
            self._fill(pages, index[pages])
        self._settle(index)
        return len(pages)

    def hold(self, index: Index) -> Contents:
        """Keep what this index stands for, whatever is freed, to be read at leisure until it's released."""
        self._held.append(index)
        return Contents(index, {0: self._contents, **self._files})

    def release(self, index: Index) -> None:
        """Undo one ``hold``; the next ``keep_only`` frees them after the last."""
        del self._held[next(place for place, held in enumerate(self._held) if held is index)]

    @property
    def files(self) -> frozenset[int]:
        """The source numbers of the snapshot files that are still needed."""
        return frozenset(self._files)

    def settled(self) -> Settled:
        """What RAM holds, for ``revert``. Call it before other memory, with a log of its own, is put behind RAM."""
        if self._base is not None:
            self._collect()
        return self._base, self._dirty, dict(self._files)

    def revert(self, settled: Settled) -> None:
        """The memory of that time is behind RAM again."""
        self._base, self._dirty, self._files = settled
        self._draft = None

    def adopt(self, index: Index, files: Mapping[int, PageArray], missing: Pages) -> None:
        """RAM holds what ``index`` says, but for the ``missing`` pages and what was written since its log was started.

        Those are filled in; nothing is dirty then.
        """
        self._files.update(files)
        missing = union(missing, self._memory.dirty_pages())
        if len(missing):
            self._fill(missing, index[missing])
        self._settle(index)

    def keep_only(self, indices: Iterable[Index]) -> None:
        """Free the contents that none of these indices, nor the RAM's own, refers to."""
        kept = np.zeros(self._used, bool)
        kept[ZERO] = True
        files: set[int] = set()
        for index in (*indices, *self._held, *(() if self._base is None else (self._base,))):
            which = index >> SOURCE_SHIFT
            if self._files:
                files.update(_sources(which))
            kept[index[which == 0]] = True
        self._files = {source: pages for source, pages in self._files.items() if source in files}
        self._free = np.flatnonzero(~kept).tolist()

    def _fill(self, pages: Pages, numbers: Index) -> None:
        if not self._files:
            self._memory.put_pages(pages, self._contents, numbers)
            return
        which = numbers >> SOURCE_SHIFT
        for source in _sources(which):
            here = which == source
            self._memory.put_pages(pages[here], self._files.get(source, self._contents), numbers[here] & PLACE_MASK)

    def _settle(self, index: Index) -> None:
        self._base, self._draft = index, None
        self._dirty = np.empty(0, np.int64)

    def _collect(self) -> Pages:
        new = self._memory.dirty_pages()
        self._dirty = union(self._dirty, new) if len(self._dirty) else new
        return self._dirty

    def _non_zero(self) -> Pages:
        """Read a piece at a time, and only what was ever touched: reading the rest would take it from the host."""
        found = []
        for region in self._memory.ram:
            words = region.pages.view(np.uint64)
            backed = touched(region.pages)
            for first in range(0, len(backed), _PIECE):
                piece = backed[first : first + _PIECE]
                found.append(piece[words[piece].any(axis=1)] + region.first_page)
        return np.concatenate(found) if found else np.empty(0, np.int64)

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


def _sources(which: Index) -> list[int]:
    """The numbers that occur in it, which are small."""
    found: list[int] = np.flatnonzero(np.bincount(which)).tolist()
    return found
