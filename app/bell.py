"""How a thread that sleeps in poll is woken: by other threads and by the signals that ask the process to end."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Self

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name))


class Bell:
    """A pipe to sleep on. ``ring`` may be called from any thread, any number of times, even after ``close``."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._theirs.setblocking(False)
        self._rung = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._ours.close()
        self._theirs.close()

    def fileno(self) -> int:
        return self._ours.fileno()

    def ring(self, *news: object) -> None:
        """Wake the sleeper. Takes and ignores what a listener is told, so that it can be one."""
        if not self._rung:  # a VCPU's thread pays for a system call only if the sleeper doesn't know yet
            self._rung = True
            with suppress(OSError):
                self._theirs.send(b"\0")

    def answer(self) -> None:
        """Forget all rings so far; the sleeper calls it *before* it looks at what there is to do."""
        with suppress(BlockingIOError):
            while self._ours.recv(4096):
                pass
        self._rung = False

    @contextmanager
    def ending_signals(self) -> Iterator[list[int]]:
        """Until left, signals that ask the process to end ring and are put into the list; ignored ones (nohup) stay
        ignored. In the main thread only.
        """
        caught: list[int] = []

        def catch(number: int, frame: FrameType | None) -> None:
            caught.append(number)

        wanted = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, catch) for number in wanted}
        # The signal may arrive on a VCPU's thread: only the descriptor wakes the main thread then.
        descriptor = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
        try:
            yield caught
        finally:
            signal.set_wakeup_fd(descriptor)
            for number, handler in before.items():
                signal.signal(number, handler)
