"""QEMU beside us: started on the same guest image, driven over QMP, ended by its own pid."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PROGRAM = "qemu-system-x86_64"
NEEDS_QEMU = "needs QEMU: "
LIMIT = 30.0
"""Seconds; reached only where something hangs."""


def why_no_qemu() -> str:
    """Why there is no QEMU to compare with; empty where there is."""
    return "" if shutil.which(PROGRAM) else f"{PROGRAM} isn't installed; on Debian: apt-get install qemu-system-x86"


def _die_with_us() -> None:
    """In the child: SIGKILL when the thread that started it dies, so that a test run that is killed leaves no QEMU."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Qemu:
    """A QEMU, stopped before its first instruction (``-S``). Leaving the context ends it.

    ``wrapper`` is a command to run it under, as strace.
    """

    def __init__(self, *arguments: str, wrapper: tuple[str, ...] = ()) -> None:
        self._ending = contextlib.ExitStack()
        with self._ending:
            folder = Path(self._ending.enter_context(tempfile.TemporaryDirectory()))
            self._events: list[str] = []
            self._start(folder, wrapper, arguments)
            self._socket = self._ending.enter_context(self._connect(folder / "qmp"))
            self._lines = self._ending.enter_context(self._socket.makefile("rb"))
            self._lines.readline()  # the greeting
            self.command("qmp_capabilities")
            self._ending = self._ending.pop_all()

    def _start(self, folder: Path, wrapper: tuple[str, ...], arguments: tuple[str, ...]) -> None:
        self._said = folder / "stderr"
        machine = ("-S", "-nodefaults", "-display", "none", "-no-user-config", "-pidfile", str(folder / "pid"))
        control = ("-qmp", f"unix:{folder / 'qmp'},server=on,wait=off")
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                [*wrapper, PROGRAM, *machine, *control, *arguments],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, preexec_fn=_die_with_us,
            )  # fmt: skip
        self._pid = folder / "pid"
        self._ending.callback(self._end)

    def _connect(self, path: Path) -> socket.socket:
        end = time.monotonic() + LIMIT
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(LIMIT)
        while connection.connect_ex(str(path)):
            if self._process.poll() is not None or time.monotonic() > end:
                connection.close()
                raise RuntimeError(f"QEMU did not start: {self._said.read_text().strip()}")
            time.sleep(0.005)
        return connection

    def _end(self) -> None:
        """By QEMU's own pid: the process that we started may be a wrapper."""
        if self._process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(self._pid.read_text()), signal.SIGKILL)
            try:
                self._process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def command(self, name: str, **arguments: object) -> Any:
        """A QMP command's answer."""
        self._socket.sendall(json.dumps({"execute": name, "arguments": arguments}).encode())
        while True:
            message = self._read()
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise RuntimeError(f"{name}: {message['error']['desc']}")

    def expect(self, event: str) -> None:
        """Wait for a QMP event that came, or comes, after the last ``expect``."""
        while event not in self._events:
            self._read()
        del self._events[: self._events.index(event) + 1]

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise RuntimeError(f"QEMU is gone: {self._said.read_text().strip()}")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self._events.append(message["event"])
        return message

    def registers(self) -> str:
        """``info registers -a``, its line ends as ours."""
        text: str = self.command("human-monitor-command", **{"command-line": "info registers -a"})
        return text.replace("\r\n", "\n")

    def cont(self) -> None:
        self.command("cont")
        self.expect("RESUME")

    def stop(self) -> None:
        self.command("stop")
        self.expect("STOP")

    def reset(self) -> None:
        """A system reset; returns when it's done."""
        self.command("system_reset")
        self.expect("RESET")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.close()
