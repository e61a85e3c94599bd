"""How threads hand work over: a futex, rung and waited for without the GIL.

A lock or queue of Python's is released with the GIL held: who it wakes finds the GIL taken and sleeps again.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from kvm.backends.kernel.library import ffi, lib

if TYPE_CHECKING:
    from kvm.backends.kernel.batch import KernelBatch


def wait(state: Any, timeout: float | None = None) -> bool:
    """``interface.Bell.wait`` for a struct vd_bell."""
    if timeout is None:
        while not lib.vd_bell_wait(state, -1):
            """A signal: Python's handlers run here."""
        return True
    end = time.monotonic_ns() + int(timeout * 1e9)
    while not lib.vd_bell_wait(state, max(end - time.monotonic_ns(), 0)):
        if time.monotonic_ns() >= end:
            return False
    return True


class FutexBell:
    """See ``interface.Bell``."""

    def __init__(self) -> None:
        self._state = ffi.new("struct vd_bell *")
        self._handed: deque[KernelBatch[Any]] = deque(maxlen=3)
        """What the shim may still look at, whoever gives up waiting for it: the last two that were handed over, as it
        rings a job's bell when the next one can be handed over already, and the one that is about to be."""

    def ring(self) -> None:
        lib.vd_bell_ring(self._state)

    def wait(self, timeout: float | None = None) -> bool:
        return wait(self._state, timeout)

    def hand(self, batch: KernelBatch[Any]) -> bool:
        """Have whoever waits here make it, without the GIL. False while another one is under way."""
        self._handed.append(batch)  # before: a KeyboardInterrupt may come as soon as it's handed over
        if lib.vd_bell_hand(self._state, batch.job):
            return True
        self._handed.remove(batch)
        return False

    def catch_up(self) -> None:
        if self._state.job:  # a look costs no turn of the interpreter
            lib.vd_bell_make(self._state)
