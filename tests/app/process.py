"""The command as a person runs it: a process of its own, with pipes or on a terminal of its own."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import pyte
import pytest

from app.cli import main

COMMAND = (sys.executable, "-m", "app")
LIMIT = 60.0
"""Seconds; reached only where something hangs."""


def said(stderr: bytes) -> bytes:
    """What stderr says beyond what this host's KVM is like."""
    return re.sub(rb"vmdeck: this KVM ignores writes to [^\n]*\n", b"", stderr)


def vmdeck(
    *arguments: str, given: bytes = b"", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run it to its end with pipes."""
    return subprocess.run([*COMMAND, *arguments], input=given, capture_output=True, timeout=LIMIT, env=env)


def refused(*arguments: str, given: bytes = b"") -> str:
    """Run what must be refused: exit code 2, nothing on stdout, no traceback; what stderr says."""
    done = vmdeck(*arguments, given=given)
    assert b"Traceback" not in done.stderr
    return _why(done.returncode, done.stdout.decode(), done.stderr.decode())


def refused_here(*arguments: str) -> str:
    """The same in this process, for what differs in what is said only: a process of its own takes 0.3 s to start."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    return _why(code, out.getvalue(), err.getvalue())


def _why(code: int, out: str, message: str) -> str:
    assert (code, out) == (2, ""), message
    assert message.startswith("vmdeck: ")
    return message


EMPTY_DEV = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9"
"""A /dev without /dev/kvm."""


def in_namespace(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command after a shell script, in a mount namespace of its own: what it mounts nobody else sees."""
    if os.geteuid() or not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("needs root and unshare for a mount namespace")
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{script} && exec "$@"', "sh", *COMMAND, *arguments],
        capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip


class Terminal:
    """The command on a pseudo-terminal that is its controlling one. Leaving the context hangs up and ends it."""

    def __init__(
        self, *arguments: str, columns: int = 80, lines: int = 24, env: Mapping[str, str] | None = None
    ) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.before = termios.tcgetattr(self.slave)
        self.seen = b""
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._open = True
        # COLUMNS and LINES, which xdist's workers have, would say that the terminal is another one.
        ours = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        environment = {**ours, "TERM": "xterm-256color", **(env or {})}
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hang_up()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(LIMIT)
        os.close(self.slave)

    def hang_up(self) -> None:
        """Close the terminal's window."""
        if self._open:
            os.close(self.master)
            self._open = False

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def expect(self, wanted: bytes) -> bytes:
        """Wait for these bytes; everything that came since the last ``expect``, up to and with them."""
        self._read_until(lambda: wanted in self.seen, wanted)
        end = self.seen.index(wanted) + len(wanted)
        found, self.seen = self.seen[:end], self.seen[end:]
        return found

    def shows(self, wanted: str) -> str:
        """Wait until the screen has this text on it; the screen."""
        self._read_until(lambda: wanted in "\n".join(self._screen.display), wanted)
        return "\n".join(self._screen.display)

    def _read_until(self, came: Callable[[], bool], wanted: object) -> None:
        deadline = time.monotonic() + LIMIT
        while not came():
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            data = os.read(self.master, 65536) if ready else b""
            screen = "\n".join(self._screen.display)
            assert data, f"{wanted!r} did not come, only {self.seen[-200:]!r}; the screen:\n{screen}"
            self.seen += data
            self._stream.feed(data)

    def wait(self) -> int:
        """Read on until it ends; its exit code (negative: it died of that signal)."""
        deadline = time.monotonic() + LIMIT
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.05)[0]:
                self.seen += os.read(self.master, 65536)
        while select.select([self.master], [], [], 0)[0]:
            self.seen += os.read(self.master, 65536)
        return self.process.wait(0)

    def is_sane(self) -> bool:
        """Does the terminal have the modes that it had before?"""
        return termios.tcgetattr(self.slave) == self.before

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
