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
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting = 0
        self._listeners: tuple[Callable[[], None], ...] = ()

    @property
    def total(self) -> int:
        """Bytes ever written."""
        with self._lock:
            return self._start + len(self._log)

    def listen(self, listener: Callable[[], None]) -> None:
        """Call this after every write, on the writing thread; it must not block."""
        with self._lock:
            self._listeners += (listener,)

    def put(self, byte: int) -> None:
        """Append one byte: what devices do once an access, so it's kept short."""
        with self._lock:
            self._log.append(byte)
            if self._waiting or len(self._log) > self._limit:
                self._grown()
        for listener in self._listeners:
            listener()

    def write(self, data: bytes) -> None:
        """Append; never blocks for longer than a reader copies."""
        with self._lock:
            self._log += data
            self._grown()
        for listener in self._listeners:
            listener()

    def since(self, position: int) -> tuple[bytes, int]:
        """What was written after ``position`` (as far as it's kept), and the position to ask from next."""
        with self._lock:
            self._trim()
            return bytes(self._log[max(0, position - self._start) :]), self._start + len(self._log)

    def wait(self, position: int, timeout: float | None) -> bool:
        """Wait, at most ``timeout`` seconds, for output after ``position``; is there any?"""
        with self._lock:
            self._waiting += 1
            try:
                return self._changed.wait_for(lambda: self._start + len(self._log) > position, timeout)
            finally:
                self._waiting -= 1

    def _grown(self) -> None:
        # Trimmed seldom, a quarter too late, since each time moves the whole log.
        if len(self._log) > self._limit + self._limit // 4:
            self._trim()
        if self._waiting:
            self._changed.notify_all()

    def _trim(self) -> None:
        excess = len(self._log) - self._limit
        if excess > 0:
            del self._log[:excess]
            self._start += excess
