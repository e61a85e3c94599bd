"""A machine without the workstation: the guest's consoles on stdin and stdout, as QEMU's ``-nographic`` has them.

One thread does it all: it sleeps in poll on stdin, stdout and a bell that signals, consoles and the machine ring.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import time
from collections.abc import Callable

from app import stopped
from app.bell import Bell
from app.terminal import raw_terminal
from kvm.errors import VmdeckError
from kvm.machine import Machine, Phase, Status

STDIN, STDOUT = 0, 1
GUEST_STOPPED = 2
ESCAPE = 0x01
"""ctrl-a, as in QEMU and GNU screen."""

PIECE = 4096
"""Bytes: a pipe that polls as writable takes so many without blocking (PIPE_BUF)."""
TICK = 50
"""Milliseconds between looks at what KVM has gathered without an exit: a console hears of it only then."""
GATHER = 0.001
"""Seconds between the bell and its answer: guests print byte by byte, and each look costs the VCPU the interpreter."""
UNREAD = 4096
"""Bytes from stdin that the guest hasn't read yet, at which the rest has to wait; not for a person's ctrl-a x."""
BACKLOG = 64 << 10
"""Bytes of output not yet taken by stdout's reader at which the guest has to wait, so that nothing is lost."""


def run(machine: Machine) -> int:
    """Run the guest until it exits or stops, or until we're told to quit; the process's exit code.

    ``(value << 1) | 1`` from isa-debug-exit, 2 for a guest that can't go on, 0 for ctrl-a x and a machine that was
    switched off, 128 + the number of the signal that ended it (SIGPIPE if stdout's reader went away).
    """
    with Bell() as bell, bell.ending_signals() as signals, raw_terminal(STDIN):
        code, status = _Headless(machine, bell, signals).run()
    if status is not None:  # after raw mode
        print(f"vmdeck: {stopped.text(machine, status)}", file=sys.stderr)
    return code


class _Headless:
    def __init__(self, machine: Machine, bell: Bell, signals: list[int]) -> None:
        self._machine = machine
        self._bell = bell
        self._signals = signals
        board = machine.board
        self._consoles = [board.serial_console, board.debug_console]
        self._positions = [0 for _ in self._consoles]
        self._debug = b""
        """Debug output that waits for the serial line to end."""
        self._output = bytearray()
        self._held = False
        self._escaped = False
        self._quit = False
        self._input_open = True
        self._person = os.isatty(STDIN)
        self._gone = signal.SIGHUP if os.isatty(STDOUT) else signal.SIGPIPE
        """What has happened when nobody will ever read stdout. A terminal that is gone is none any more."""
        self._looked = 0.0
        for console in self._consoles:
            console.listen(bell.ring)
        machine.subscribe(bell.ring)

    def run(self) -> tuple[int, Status | None]:
        self._machine.run()
        while True:
            self._bell.answer()
            status = self._machine.status  # before the output: what the guest wrote before it ended is in the consoles
            self._collect()
            if self._signals:
                self._output += self._debug
                self._write_what_fits()
                return 128 + self._signals[0], None
            ended = self._quit or status.phase in _ENDED
            if ended and not self._output and not self._debug:
                return (0, None) if self._quit else _ENDED[status.phase](status)
            self._throttle(status)
            if not self._sleep(typing=not ended):
                return 128 + self._gone, None

    def _collect(self) -> None:
        """Debug output goes between lines of the serial console's: KVM gathers it, so it comes late."""
        (serial, self._positions[0]), (debug, self._positions[1]) = (
            console.since(position) for console, position in zip(self._consoles, self._positions, strict=True)
        )
        self._debug += debug
        line_end = serial.rfind(b"\n") + 1
        if line_end or not serial:
            serial = serial[:line_end] + self._debug + serial[line_end:]
            self._debug = b""
        self._output += serial

    def _throttle(self, status: Status) -> None:
        """A guest that writes faster than stdout's reader reads is paused meanwhile."""
        if len(self._output) > BACKLOG and status.phase is Phase.RUNNING:
            self._machine.pause()
            self._held = True
        elif self._held and not self._output:
            self._held = False
            if self._machine.status.phase is Phase.PAUSED:
                self._machine.run()

    def _sleep(self, typing: bool) -> bool:
        """Wait for something to do, and move bytes. False once nobody will ever read stdout."""
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        poll.register(STDOUT, select.POLLOUT if self._output else 0)
        if typing and self._input_open and (self._person or self._machine.board.serial.unread < UNREAD):
            poll.register(STDIN, select.POLLIN)
        running = self._machine.status.phase is Phase.RUNNING
        ready = dict(poll.poll(TICK if running else None))
        if running and time.monotonic() - self._looked > TICK / 1000:
            self._looked = time.monotonic()
            self._machine.request_samples()
        if self._bell.fileno() in ready:
            time.sleep(GATHER)
        if STDIN in ready:
            self._read()
        if ready.get(STDOUT, 0) & select.POLLOUT:
            return self._write()
        return STDOUT not in ready

    def _write(self) -> bool:
        try:
            count = os.write(STDOUT, self._output[:PIECE])
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # EIO: the terminal is gone
                return False
            raise VmdeckError(
                f"The guest's output can't be written to stdout: {error.strerror}. The guest was ended."
            ) from error
        del self._output[:count]
        return True

    def _write_what_fits(self) -> None:
        poll = select.poll()
        poll.register(STDOUT, select.POLLOUT)
        while self._output and poll.poll(0) == [(STDOUT, select.POLLOUT)] and self._write():
            pass

    def _read(self) -> None:
        try:
            data = os.read(STDIN, PIECE)
        except OSError:  # EIO: the terminal is gone
            data = b""
        self._input_open = bool(data)
        typed = bytearray()
        for byte in data:
            if self._escaped:
                self._escaped = False
                if byte in _COMMANDS:
                    self._machine.board.serial.feed(bytes(typed))
                    typed.clear()
                    _COMMANDS[byte][1](self)
                elif byte in (ESCAPE, ord("a")):
                    typed.append(ESCAPE)
            elif byte == ESCAPE:
                self._escaped = True
            else:
                typed.append(byte)
        self._machine.board.serial.feed(bytes(typed))

    def _end(self) -> None:
        self._machine.pause()
        self._quit = True

    def _reset(self) -> None:
        self._machine.reset()

    def _help(self) -> None:
        lines = [f"ctrl-a {chr(key):8}{what}" for key, (what, _) in _COMMANDS.items()]
        lines.append("ctrl-a ctrl-a  send ctrl-a to the guest (or ctrl-a a)")
        sys.stderr.write("\n" + "\n".join(lines) + "\n")
        sys.stderr.flush()


_COMMANDS: dict[int, tuple[str, Callable[[_Headless], None]]] = {
    ord("h"): ("this help", _Headless._help),
    ord("x"): ("quit", _Headless._end),
    ord("r"): ("reset the machine", _Headless._reset),
}

_ENDED: dict[Phase, Callable[[Status], tuple[int, Status | None]]] = {
    Phase.EXITED: lambda status: (stopped.exit_code(status.code), None),
    Phase.STOPPED: lambda status: (GUEST_STOPPED, status),
}
