"""Textual's driver for a terminal, made to outlive it: one that hangs up, and one that no longer reads.

Textual's writer thread ends with the first error, or stands in a write for ever; either way its queue of 30 frames
fills up, and the main thread would stand with it, deaf to signals.
"""

from __future__ import annotations

import os
import termios
from queue import Full
from typing import Any

from textual.drivers.linux_driver import LinuxDriver

LAST_WORDS = 1.0
"""Seconds that the terminal has to take what gives it back to the shell."""


class _Terminal:
    """A file that loses what is written to a terminal that is gone.

    It has no buffer: a thread that stands in a write would hold its lock, and Python couldn't end.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._gone = False

    def write(self, text: str) -> None:
        data = text.encode()
        while data and not self._gone:
            try:
                data = data[os.write(self._number, data) :]
            except OSError:
                self._gone = True

    def flush(self) -> None:
        pass

    def fileno(self) -> int:
        return self._number


class Driver(LinuxDriver):
    """Never waits for the terminal: what that doesn't take is left out, and drawn anew when it reads again."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._file: Any = _Terminal(self._file.fileno())
        self._left_out = False

    def write(self, data: str) -> None:
        assert self._writer_thread is not None
        queue = self._writer_thread._queue
        if queue.full():
            self._left_out = True
            return
        queue.put(data)  # only this thread does: there is room
        if self._left_out and queue.qsize() == 1:
            self._left_out = False
            self._app.call_later(self._app.refresh, layout=True)

    def close(self) -> None:
        if self._writer_thread is not None:
            try:
                self._writer_thread._queue.put(None, timeout=LAST_WORDS)
            except Full:
                return
            self._writer_thread.join(LAST_WORDS)

    def _sigcont_application(self, *signal: Any) -> None:
        """A terminal that hangs up sends SIGCONT right after SIGHUP: that doesn't bring it back."""
        try:
            termios.tcgetattr(self.fileno)
        except termios.error:
            return
        super()._sigcont_application(*signal)
