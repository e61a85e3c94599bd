"""The thread that acts on what VCPUs and devices have to say: they say it on VCPU threads, which must not wait."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

Act = Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Message:
    epoch: int
    act: Act


class Supervisor:
    """Hands messages, in their order and under the machine's lock, to ``handle``.

    ``epoch`` counts the states that were replaced, by a reset or a load: a message of an older one concerns what is no
    more, and is dropped. It changes under the lock.
    """

    def __init__(self, lock: threading.RLock, handle: Callable[[Act], None]) -> None:
        self.epoch = 0
        self._lock = lock
        self._handle = handle
        self._inbox: queue.SimpleQueue[_Message | threading.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="machine", daemon=True)
        self._thread.start()

    def tell(self, act: Act) -> None:
        """Any thread; doesn't wait."""
        self._inbox.put(_Message(self.epoch, act))

    def caught_up(self) -> threading.Event:
        """It's set once all that was told so far is done. Any thread."""
        done = threading.Event()
        self._inbox.put(done)
        return done

    def close(self) -> None:
        """End the thread, unless it is the caller's. The lock must be free for it."""
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        while (message := self._inbox.get()) is not None:
            if isinstance(message, threading.Event):
                message.set()
                continue
            with self._lock:
                if message.epoch == self.epoch:
                    self._handle(message.act)
