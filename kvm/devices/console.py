"""What a guest has printed: a bounded log that any number of readers follow, each from its own position."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Console:
    """The last ``limit`` bytes of one output. Thread-safe; a position counts the bytes ever written."""

    def __init__(self, limit: int = 1 << 20) -> None:
        self._limit = limit
        self._log = bytearray()
        self._start = 0
        """The position of the first byte kept."""
        self._changed = threading.Condition(threading.Lock())
        self._listeners: list[Callable[[], None]] = []

    @property
    def total(self) -> int:
        """Bytes ever written."""
        with self._changed:
            return self._start + len(self._log)

    def write(self, data: bytes) -> None:
        """Append; never blocks for longer than a reader copies."""
        with self._changed:
            self._log += data
            # Trimmed seldom, a quarter too late, since each time moves the whole log.
            if len(self._log) > self._limit + self._limit // 4:
                self._trim()
            self._changed.notify_all()
        for listener in tuple(self._listeners):
            listener()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call this after every write, on the writer's thread; it must not block."""
        self._listeners.append(listener)

    def since(self, position: int) -> tuple[bytes, int]:
        """What was written after ``position`` (as far as it's kept), and the position to ask from next."""
        with self._changed:
            self._trim()
            return bytes(self._log[max(0, position - self._start) :]), self._start + len(self._log)

    def wait(self, position: int, timeout: float | None) -> bool:
        """Wait, at most ``timeout`` seconds, for output after ``position``; is there any?"""
        with self._changed:
            return self._changed.wait_for(lambda: self._start + len(self._log) > position, timeout)

    def _trim(self) -> None:
        excess = len(self._log) - self._limit
        if excess > 0:
            del self._log[:excess]
            self._start += excess
