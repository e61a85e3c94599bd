"""The demo guest at work, on each backend: its rounds, its monitor, its self-checks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from app import guests
from kvm.backends.choice import open_system
from kvm.boot import loader
from kvm.machine import Machine, MachineConfig, Phase
from tests.guests.brisk import brisk_demo

MEMORY = 4 << 20
LIMIT = 60.0
"""Seconds that only a hang takes."""

Start = Callable[..., Machine]


@pytest.fixture(params=["software", pytest.param("kvm", marks=pytest.mark.kvm)])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as opened:

        def start(vcpus: int, image: Path | None = None) -> Machine:
            system = open_system(request.param)
            opened.callback(system.close)
            loaded = loader.load(image or brisk_demo(tmp_path), memory=MEMORY)
            machine = opened.enter_context(Machine(system, loaded, MachineConfig(vcpus=vcpus, memory=MEMORY)))
            machine.run()
            return machine

        yield start


def text(machine: Machine, since: int = 0) -> str:
    return machine.board.serial_console.since(since)[0].decode("ascii").replace("\r\n", "\n")


def await_text(machine: Machine, wanted: str, since: int = 0) -> str:
    """Everything printed since then, once it matches the regular expression."""
    console = machine.board.serial_console
    while True:
        position = console.total
        if re.search(wanted, printed := text(machine, since)):
            return printed
        assert console.wait(position, LIMIT), f"{wanted!r} doesn't come after {printed!r} ({machine.status})"


def command(machine: Machine, line: str, answer: str) -> str:
    since = machine.board.serial_console.total
    machine.board.serial.feed(line.encode() + b"\r")
    return await_text(machine, answer, since)


def expected_round(number: int, vcpus: int) -> str:
    """Its line by another way than the guest's: trial division, summing up, adding up."""
    limit = 1000 + 64 * (number % 16)
    primes = sum(all(n % d for d in range(2, int(n**0.5) + 1)) for n in range(2, limit))
    total = sum(0xDA7ADA7ADA7A0000 + 0x100000001 * i for i in range(2 * (number % 16), 512)) % 2**32
    fib, after = 0, 1
    for _ in range(10 + number % 4):
        fib, after = after, fib + after
    counts = [len(range(kind, vcpus, 4)) for kind in range(4)]
    results = (f"primes {primes}", f"sum {total:08x}", f"fib {fib}")
    parts = [f"{result} x{count} ok" for result, count in zip(results, counts[:3], strict=True) if count]
    return "  ".join([f"round {number}", *parts, f"lock {vcpus + 32 * counts[3]} ok"])


@pytest.mark.parametrize("vcpus", [1, 4])
def test_rounds_print_what_they_must(start: Start, vcpus: int) -> None:
    machine = start(vcpus, guests.demo())
    printed = await_text(machine, r"round 3 .*\n")
    assert f"vmdeck demo: {vcpus} cpus" in printed
    assert re.findall(r"round .*", printed)[:3] == [expected_round(number, vcpus) for number in range(1, 4)]
    assert "SELF-CHECK" not in printed


def test_the_monitor(start: Start) -> None:
    machine = start(2)
    await_text(machine, "round 1 ")
    assert machine.board.debug_console.since(0)[0] == b"vmdeck demo guest: serial monitor on COM1\n"
    assert machine.board.post.code == 0x10
    assert "crash" in command(machine, "help", r"reboot .*\n")
    command(machine, "stop", r"stop\n(.*\n)*> ")
    assert re.search(r"cpu 1  sum    at CPL 3  rounds \d+  (idle|working)\n", command(machine, "cpus", r"cpu 1.*\n"))
    command(machine, "check", r"checked 2 cpus, \d+ values each\n")
    command(machine, "peek 0x1000000x\b\b", r"0000000000100000: [0-9a-f]{16} ")  # two backspaces
    command(machine, "peek 0", "not mapped")
    command(machine, "nonsense", "no such command")
    command(machine, "go", r"round \d+")
    command(machine, "crash ud 1", r"EXCEPTION 6 cpu 1 error 00000000 rip [0-9a-f]{16}")
    command(machine, "go", r"round \d+  primes \d+ x1 ok  lock 1 ok")
    machine.board.serial.feed(b"exit 5\r")
    status = machine.wait(Phase.EXITED, Phase.STOPPED, timeout=LIMIT)
    assert (status.phase, status.code) == (Phase.EXITED, 5)


def test_it_notices_a_register_that_changes(start: Start) -> None:
    machine = start(2)
    await_text(machine, r"round 2 .*\n")
    since = machine.board.serial_console.total
    machine.pause()
    machine.edit(1, "r13", 0xBAD)
    machine.run()
    complaint = "SELF-CHECK FAILED: R13 cpu 1 expected 1313131313131301 got 0000000000000bad\n"
    printed = await_text(machine, complaint + r"(.*\n)*.*round .*\n.*round .*\n", since)
    assert printed.count("SELF-CHECK") == 1


def test_it_prints_the_same_after_a_restore(start: Start) -> None:
    machine = start(4)
    await_text(machine, r"round 1 .*\n")
    machine.pause()
    checkpoint = machine.checkpoint()
    printed_rounds = re.findall(r"round (\d+)", text(machine))
    last = f"round {int(printed_rounds[-1]) + 2} "
    runs = []
    for _ in range(2):
        since = machine.board.serial_console.total
        machine.restore(checkpoint)
        machine.run()
        printed = await_text(machine, last, since)
        runs.append(printed[: printed.index(last)])
        machine.pause()
    assert runs[0] == runs[1]
