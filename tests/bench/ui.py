"""The workstation's own cost: its main thread, what it takes from a busy guest, and its start-up.

It is measured in a process of its own on a pseudo-terminal of 200×60, so that what is drawn is also written.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import select
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Sequence
from pathlib import Path

from app.guests import demo
from app.workstation import Workstation
from kvm.backends.kernel.system import KernelSystem
from kvm.boot import loader
from kvm.machine import Machine, MachineConfig
from kvm.x86.structs import Regs
from tests.kvm.machines import COUNT, build

COLUMNS, ROWS = 200, 60
VCPUS = 4
SECONDS = 3.0
ROUNDS = 5
STARTS = 9
LIMIT = 120.0

EMPTY = """
from textual.app import App
from textual.widgets import Label
class Empty(App):
    def compose(self):
        yield Label("VCPU")
Empty().run()
"""


def ui() -> None:
    """The workstation beside nothing: a core, the same guest without it, an empty Textual app."""
    from tests.bench.__main__ import line

    busy, demo_guest = measured("busy"), measured("demo")
    line("workstation's main thread, 4 panes, a busy VCPU", busy["main"] * 100, 100, "%")
    line("workstation's main thread, 4 panes, demo guest", demo_guest["main"] * 100, 100, "%")
    line("busy guest under the workstation", busy["watched"], busy["alone"], "M/s")
    line("the same, by its thread's CPU time", busy["watched_cpu"], busy["alone_cpu"], "M/s")
    command = [sys.executable, "-m", "app", "demo", "--backend", "kvm"]
    starts = [(start(command), start([sys.executable, "-c", EMPTY])) for _ in range(STARTS)]
    for what, which in (("from command to first frame, beside an empty app", 0), ("the same, CPU time", 1)):
        ours, empty = (statistics.median(each[which] for each in rows) * 1e3 for rows in zip(*starts, strict=True))
        line(what, ours, empty, "ms")


def measured(guest: str) -> dict[str, float]:
    """What ``_measure`` finds, in a process on a terminal of its own."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        read_to_end([sys.executable, "-m", "tests.bench.ui", guest, str(answer)])
        return json.loads(answer.read_text())  # type: ignore[no-any-return]


def start(command: Sequence[str]) -> tuple[float, float]:
    """Seconds, of the clock and of the CPU, from the command to the word VCPU on its terminal."""
    return read_to_end(command, until=b"VCPU")


def read_to_end(command: Sequence[str], until: bytes = b"\0never") -> tuple[float, float]:
    """Run it on a terminal until it ends or has written this, and end it then; what that took, see ``start``."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    try:
        while until not in seen and time.perf_counter() - began < LIMIT:
            if select.select([ours], [], [], 1)[0]:
                try:
                    seen = seen[-100:] + os.read(ours, 1 << 16)
                except OSError:  # the last one on the other side has closed it
                    break
        took = time.perf_counter() - began
    finally:
        # A polite end would want its last words read; Popen's own kill would collect one that has ended, and its times.
        os.kill(process.pid, signal.SIGKILL)
        _, _, used = os.wait4(process.pid, 0)
        process.returncode = 0
        os.close(ours)
    return took, used.ru_utime + used.ru_stime


def _measure(guest: str) -> dict[str, float]:
    """On this terminal: the main thread's share of a core, and the guest's speed with and without the workstation."""
    with tempfile.TemporaryDirectory() as folder:
        if guest == "busy":
            machine = build(KernelSystem(), Path(folder), COUNT, vcpus=VCPUS)
        else:
            memory = 64 << 20
            machine = Machine(KernelSystem(), loader.load(demo(), memory=memory), MachineConfig(VCPUS, memory))
        with machine:
            machine.run()
            rounds = [{**_alone(machine), **asyncio.run(_watched(machine))} for _ in range(ROUNDS)]
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def _alone(machine: Machine) -> dict[str, float]:
    before = _sample(machine)
    time.sleep(SECONDS)
    return _speeds("alone", before, _sample(machine))


async def _watched(machine: Machine) -> dict[str, float]:
    app = Workstation(machine)
    found = {}

    async def measure() -> None:
        await asyncio.sleep(1)  # it has started
        before, main = _sample(machine), time.thread_time()
        began = time.perf_counter()
        await asyncio.sleep(SECONDS)
        found["main"] = (time.thread_time() - main) / (time.perf_counter() - began)
        found.update(_speeds("watched", before, _sample(machine)))
        app.exit()

    measuring = asyncio.create_task(measure())
    await app.run_async()
    await measuring
    return found


def _sample(machine: Machine) -> tuple[float, float, float]:
    """When, the VCPU thread's CPU time by then, what the guest had counted."""
    before = machine.view(0).time_ns
    machine.request_samples()
    while machine.view(0).time_ns <= before:
        time.sleep(0.0002)
    view = machine.view(0)
    thread = machine.vcpus[0]._thread.ident
    assert thread is not None
    spent = time.clock_gettime(time.pthread_getcpuclockid(thread))
    return view.time_ns / 1e9, spent, Regs.from_buffer_copy(view.regs).rax


def _speeds(name: str, before: tuple[float, ...], after: tuple[float, ...]) -> dict[str, float]:
    seconds, spent, counted = (new - old for old, new in zip(before, after, strict=True))
    return {name: counted / seconds / 1e6, f"{name}_cpu": counted / spent / 1e6}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(_measure(sys.argv[1])))
