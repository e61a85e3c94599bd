"""The ledger: one record for every time a hook moved, or could have moved, state: the VCPUs' and the machine's own."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvm.errors import SubstateError
from kvm.levels import WritebackLevel


class Part(NamedTuple):
    """One VCPU's part of a hook, done on its own thread; or the machine's own (``vcpu`` is None): its chips and clock.

    ``skipped``: substates that the level allows and that were left alone because their bytes hadn't changed.
    ``ioctls`` counts those made for state; ``began_ns`` is CLOCK_MONOTONIC. ``error`` says why it ended half-way: what
    stands here was moved, the rest was not. ``tolerated``: substates that the kernel refused and the table goes on
    without, each with the errno's name.
    """

    vcpu: int | None
    read: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    ioctls: int = 0
    began_ns: int = 0
    microseconds: float = 0.0
    error: str = ""
    tolerated: tuple[tuple[str, str], ...] = ()


Done = tuple[Part, SubstateError | None]
"""A part, and what ended it half-way."""


class Record(NamedTuple):
    """One call of a hook. ``skew_us``: from the first VCPU's stop to the last one's, where the call stopped them."""

    number: int
    time_ns: int
    """CLOCK_REALTIME, when the hook returned."""
    hook: str
    level: WritebackLevel | None
    caller: str
    parts: tuple[Part, ...]
    """The machine's own first, where the hook moved it; then the VCPUs'."""
    microseconds: float
    skew_us: float

    def as_json(self) -> str:
        """One line, without its end: these fields under their names, ``level`` as "RUNTIME" and so on, or null."""
        parts = [part._asdict() for part in self.parts]
        return json.dumps({**self._asdict(), "parts": parts, "level": self.level.name if self.level else None})


class Ledger:
    """The newest ``limit`` records; older ones are forgotten, ``total`` still counts them. Any thread."""

    def __init__(self, limit: int = 1000) -> None:
        self._records: deque[Record] = deque(maxlen=limit)
        self._lock = threading.Lock()
        self._listeners: list[Callable[[Record], None]] = []
        self.total = 0

    @property
    def records(self) -> tuple[Record, ...]:
        """Oldest first."""
        with self._lock:
            return tuple(self._records)

    def listen(self, listener: Callable[[Record], None]) -> None:
        """Call this with every record that is here, now, and every later one, in their order and on the thread that
        made it: a VCPU's, mostly, so it must not block."""
        with self._lock:
            for record in self._records:
                listener(record)
            self._listeners.append(listener)

    def add(
        self, hook: str, level: WritebackLevel | None, caller: str, parts: Sequence[Part], began_ns: int, skew_us: float
    ) -> None:
        """Record a hook that began at ``began_ns`` (CLOCK_MONOTONIC) and ends now."""
        microseconds = (time.monotonic_ns() - began_ns) / 1000
        with self._lock:
            self.total += 1
            record = Record(self.total, time.time_ns(), hook, level, caller, tuple(parts), microseconds, skew_us)
            self._records.append(record)
            for listener in self._listeners:
                listener(record)
