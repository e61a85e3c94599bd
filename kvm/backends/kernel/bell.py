"""How threads hand work over: a futex, rung and waited for without the GIL.

A lock or queue of Python's is released with the GIL held: who it wakes finds the GIL taken and sleeps again.
"""

from __future__ import annotations

import time

from kvm.backends.kernel.library import ffi, lib


class FutexBell:
    """See ``interface.Bell``."""

    def __init__(self) -> None:
        self._state = ffi.new("uint32_t *")

    def ring(self) -> None:
        lib.vd_bell_ring(self._state)

    def wait(self, timeout: float | None = None) -> bool:
        end = None if timeout is None else time.monotonic() + timeout
        nanoseconds = -1
        while True:
            if end is not None:
                nanoseconds = max(int((end - time.monotonic()) * 1e9), 0)
            # A signal ends the wait too: Python's handlers run here.
            if lib.vd_bell_wait(self._state, nanoseconds):
                return True
            if nanoseconds == 0:
                return False
