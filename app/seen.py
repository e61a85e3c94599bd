"""Which bytes of memory changed since they were looked at."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

HOLD_NS = 1_000_000_000
"""How long a byte stays marked while the guest runs."""
KEPT = 64
"""Pages that are remembered: those that were looked at last."""


class _PageSeen:
    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.last = self.before = data
        self.changed_ns = np.full(len(data), -HOLD_NS, np.int64)


class Seen:
    """While the guest runs, bytes that changed a moment ago; while it stands, those that changed since it stood before.

    A page that wasn't looked at before has no changes.
    """

    def __init__(self) -> None:
        self._pages: OrderedDict[Hashable, _PageSeen] = OrderedDict()

    def settle(self) -> None:
        """Something is about to be done with the machine: what is known now is what the next looks compare to."""
        for page in self._pages.values():
            page.before = page.last
            page.changed_ns[:] = -HOLD_NS

    def observe(self, key: Hashable, data: bytes, *, running: bool, now_ns: int) -> NDArray[np.bool_]:
        """Take a page's bytes as they are now; for each of them, is it to be marked? ``now_ns`` isn't negative."""
        new = np.frombuffer(data, np.uint8)
        page = self._pages.get(key)
        if page is None:
            page = self._pages[key] = _PageSeen(new)
            if len(self._pages) > KEPT:
                self._pages.popitem(last=False)
        self._pages.move_to_end(key)
        page.changed_ns[new != page.last] = now_ns
        page.last = new
        return now_ns - page.changed_ns < HOLD_NS if running else new != page.before
