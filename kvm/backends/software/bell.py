"""How threads hand work over, with nothing but Python."""

from __future__ import annotations

import queue


class QueueBell:
    """See ``interface.Bell``."""

    def __init__(self) -> None:
        self._rung: queue.SimpleQueue[None] = queue.SimpleQueue()

    def ring(self) -> None:
        self._rung.put(None)

    def wait(self, timeout: float | None = None) -> bool:
        try:
            self._rung.get(timeout=timeout)
        except queue.Empty:
            return False
        return True

    def catch_up(self) -> None:
        """Nothing is ever handed over."""
