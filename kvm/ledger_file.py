"""The ledger as JSON lines in a file: each record as it's made, and never at the guest's cost."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

from kvm.errors import VmdeckError
from kvm.ledger import Ledger, Record

WAITING_LIMIT = 10_000
"""Records that may wait for a slow disk; those beyond are left out, and counted."""
CLOSE_LIMIT = 10.0
"""Seconds that the last records may take on their way out."""


class LedgerFile:
    """Writes a ledger's records, a JSON object a line, to ``path``, which is replaced; from a thread of its own.

    Whatever becomes of the file (the disk is full, nobody reads the pipe), the machine goes on: ``trouble`` then says
    after ``close`` what is missing and why. Every line that is there is whole. Raises VmdeckError if the file can't be
    opened. A context manager.
    """

    def __init__(self, ledger: Ledger, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise VmdeckError(
                f"The ledger can't be written to {path}: {error.strerror}. Choose another file."
            ) from error
        self._waiting: deque[Record] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._made = 0
        self._written = 0
        self._error = ""
        self._thread = threading.Thread(target=self._write_all, name="ledger", daemon=True)
        self._thread.start()
        ledger.listen(self._take)

    @property
    def trouble(self) -> str:
        """After ``close``: why the file isn't the whole ledger, in a sentence; empty if it is."""
        missing = self._made - self._written
        if not missing:
            return ""
        why = self._error or f"it took more than {CLOSE_LIMIT:g} s to write, or {WAITING_LIMIT} records waited"
        return (
            f"The ledger in {self.path} is not whole: {missing} of {self._made} records are missing "
            f"({why}). The guest was not affected."
        )

    def close(self) -> None:
        """Write what waits, and end. Takes at most ``CLOSE_LIMIT`` seconds; can be called again."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(CLOSE_LIMIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, record: Record) -> None:
        """On a VCPU's thread."""
        with self._changed:
            if self._closing:
                return
            self._made += 1
            if not self._error and len(self._waiting) < WAITING_LIMIT:
                self._waiting.append(record)
                self._changed.notify()

    def _write_all(self) -> None:
        try:
            while (record := self._next()) is not None:
                self._write(record)
        except OSError as error:
            with self._changed:
                self._error = error.strerror or str(error)
                self._waiting.clear()
        finally:
            os.close(self._fd)

    def _next(self) -> Record | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return self._waiting.popleft() if self._waiting else None

    def _write(self, record: Record) -> None:
        line = f"{record.as_json()}\n".encode()
        done = 0
        try:
            while done < len(line):
                done += os.write(self._fd, line[done:])
        except OSError:
            with contextlib.suppress(OSError):  # a pipe, say, has no length
                os.ftruncate(self._fd, os.lseek(self._fd, 0, os.SEEK_CUR) - done)
            raise
        self._written += 1
