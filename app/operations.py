"""What the machine is asked to do: one operation after the other, each on a worker thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from enum import Enum

from kvm.errors import VmdeckError

QUEUED = 16
"""Operations that may wait for their turn; those asked for beyond that are dropped."""
QUIET = 0.5
"""Seconds that something may take before a person wants to know how far it is."""


class Stage(Enum):
    """Where an operation is."""

    WAITS = "waits"
    WORKS = "works"
    ASIDE = "aside"
    """It has what it needs of the machine and goes on by itself: the next operation has its turn."""
    ENDED = "ended"


class Job:
    """One operation, for the worker thread that does it and for the app that draws how far it is."""

    def __init__(self, name: str, work: Callable[[Job], object], moved: Callable[[Job], None]) -> None:
        """``moved`` is told, on the worker's thread, when the stage has changed."""
        self.name = name
        self.stage = Stage.WAITS
        self.error: Exception | None = None
        self.cancel = threading.Event()
        """For what can be called off: set, the work ends with SnapshotCancelled soon."""
        self.cancellable = False
        self._work = work
        self._moved = moved
        self._began = 0.0
        self._done, self._total = 0, 0

    def progress(self, done: int, total: int) -> None:
        """How far it is, of whatever. Who tells is willing to be called off. Any thread."""
        self._done, self._total = done, total
        self.cancellable = True

    def aside(self) -> None:
        """From here on it doesn't matter what the machine does. On the worker's thread."""
        self.stage = Stage.ASIDE
        self._moved(self)

    @property
    def percent(self) -> int | None:
        """How far it is; None as long as nobody needs to know."""
        if not self._total or time.monotonic() - self._began < QUIET:
            return None
        return 100 * self._done // self._total

    def run(self) -> None:
        """Do it, on this thread; an error is kept."""
        self._began = time.monotonic()
        try:
            self._work(self)
        except Exception as error:
            self.error = error
        self.stage = Stage.ENDED
        self._moved(self)

    @property
    def failure(self) -> str:
        """What went wrong, for a person; empty if nothing did."""
        if self.error is None or isinstance(self.error, VmdeckError):
            return str(self.error or "")
        # A bug of ours must not take a person's machine away.
        return f"{self.name} failed: {self.error!r}. This is a bug in vmdeck; the guest is as it was left."


class Operations:
    """In the order in which they were asked for. The UI thread's."""

    def __init__(self, start: Callable[[Job], None]) -> None:
        """``start`` has ``Job.run`` called on a thread; then, and when it has stepped aside or ended, call ``next``."""
        self._start = start
        self._waiting: deque[Job] = deque()
        self.current: Job | None = None
        """What has the machine now."""
        self.asides: list[Job] = []

    def ask(self, job: Job) -> bool:
        """After all that was asked before; False if it's dropped, as too much waits."""
        if len(self._waiting) == QUEUED:
            return False
        self._waiting.append(job)
        self.next()
        return True

    def next(self) -> None:
        """Start the next one if its turn has come."""
        if self.current is not None and self.current.stage in (Stage.ASIDE, Stage.ENDED):
            if self.current.stage is Stage.ASIDE:
                self.asides.append(self.current)
            self.current = None
        self.asides = [job for job in self.asides if job.stage is not Stage.ENDED]
        if self.current is None and self._waiting:
            self.current = self._waiting.popleft()
            self.current.stage = Stage.WORKS
            self._start(self.current)

    def coming(self, name: str) -> bool:
        """Is one of this name under way, or waiting?"""
        return any(job.name == name for job in (*self._under_way, *self._waiting))

    @property
    def idle(self) -> bool:
        """Nothing has the machine or waits for it."""
        return self.current is None and not self._waiting

    @property
    def shown(self) -> Job | None:
        """The one that a person should know of."""
        return self.current or (self.asides[0] if self.asides else None)

    @property
    def cancellable(self) -> bool:
        """Is there anything to call off?"""
        return any(job.cancellable for job in self._under_way)

    def call_off(self) -> None:
        """Cancel what can be."""
        for job in self._under_way:
            if job.cancellable:
                job.cancel.set()

    @property
    def _under_way(self) -> list[Job]:
        return [job for job in (self.current, *self.asides) if job is not None]
