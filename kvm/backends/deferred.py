"""A batch that is made by calling a function."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

from kvm.backends.interface import Awaited, Bell
from kvm.errors import SubstateError

T = TypeVar("T")


class Deferred(Generic[T]):
    """See ``interface.Batch``."""

    def __init__(self, move: Callable[[], T]) -> None:
        self._move = move
        self._outcome: T | SubstateError
        self.began_ns = 0
        self.microseconds = 0.0

    def make(self) -> None:
        self.began_ns = time.monotonic_ns()
        try:
            self._outcome = self._move()
        except SubstateError as error:
            self._outcome = error
        self.microseconds = (time.monotonic_ns() - self.began_ns) / 1000

    def hand(self, bell: Bell) -> Awaited | None:
        """Python can only be run by a thread that has its turn."""

    def outcome(self) -> T:
        if isinstance(self._outcome, SubstateError):
            raise self._outcome
        return self._outcome
