"""The workstation on a terminal of its own: what is on its screen, and how it leaves when it's made to."""

from __future__ import annotations

import re
import select
import signal
import time
from pathlib import Path

import pytest

from tests.app.process import LIMIT, Terminal

SIZES = {"80x24": (80, 24), "200x60": (200, 60)}
PLACES = {
    "vcpus": (b"", "VCPU 0"),
    "help": (b"?", "The machine"),
    "prompt": (b"erax", "rax, 64 bits"),
    "console": (b"\x1bOQ", "F2 leaves"),
}


def modes(written: bytes) -> set[int]:
    """The private modes (alternate screen, mouse, paste…) that are on after all this."""
    on: set[int] = set()
    for numbers, what in re.findall(rb"\x1b\[\?([\d;]+)([hl])", written):
        for number in map(int, numbers.split(b";")):
            (on.add if what == b"h" else on.discard)(number)
    return on


def session(leader: int) -> set[int]:
    """Processes of the session that this process began."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.add(int(stat.parent.name))
    return found


@pytest.mark.parametrize(
    ("backend", "size", "place", "end"),
    [
        ("software", "80x24", "vcpus", "ctrl-c"),
        ("software", "80x24", "help", "hang up"),
        pytest.param("kvm", "200x60", "console", "hang up", marks=pytest.mark.kvm),
        pytest.param("kvm", "200x60", "prompt", "terminate", marks=pytest.mark.kvm),
    ],
)
def test_it_leaves_nothing_behind(backend: str, size: str, place: str, end: str) -> None:
    columns, lines = SIZES[size]
    keys, shown = PLACES[place]
    with Terminal("demo", "--backend", backend, "--memory", "4M", columns=columns, lines=lines) as terminal:
        screen = terminal.shows("round 1 ")
        assert "▶ RUNNING" in screen
        assert "kernel owns" in screen
        terminal.type(keys)
        terminal.shows(shown)
        if end == "hang up":
            terminal.hang_up()
            assert terminal.process.wait(LIMIT) == 128 + signal.SIGHUP
        elif end == "terminate":
            terminal.signal(signal.SIGTERM)
            assert terminal.wait() == 128 + signal.SIGTERM
        else:
            terminal.type(b"\x03")
            assert terminal.wait() == 0
        assert session(terminal.process.pid) == set()
        if end != "hang up":
            assert terminal.is_sane()
            assert modes(terminal.seen) == {7, 25}, "lines wrap, the cursor is shown, all else is off"
            assert b"Traceback" not in terminal.seen


def stop_reading(terminal: Terminal) -> None:
    """Until the terminal takes nothing more for as long as it takes to fill Textual's queue of frames."""
    terminal.type(b"z" * 20)  # each draws everything anew; after that the guest's work does
    refused = 0
    while refused < 15:
        refused = 0 if select.select([], [terminal.slave], [], 0.1)[1] else refused + 1
        time.sleep(0.02)


def test_a_terminal_that_no_longer_reads_does_not_keep_it() -> None:
    with Terminal("demo", "--backend", "software", "--memory", "4M", columns=200, lines=60) as terminal:
        terminal.shows("round 1 ")
        stop_reading(terminal)
        terminal.signal(signal.SIGTERM)
        assert terminal.process.wait(LIMIT) == 128 + signal.SIGTERM
        assert terminal.is_sane()


@pytest.mark.slow
def test_a_terminal_that_reads_again_shows_everything() -> None:
    with Terminal("demo", "--backend", "software", "--memory", "4M", columns=200, lines=60) as terminal:
        terminal.shows("round 1 ")
        stop_reading(terminal)
        terminal.type(b" ")
        terminal.shows("PAUSED")
        terminal.type(b"?")
        terminal.shows("What the panes say")
        terminal.type(b"\x1b")
        terminal.shows("VCPU 3 ■ stopped")
        terminal.type(b"q")
        assert terminal.wait() == 0
