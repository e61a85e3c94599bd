"""The small test guests do what their headers say, on each backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest

from kvm.backends.interface import ExitKind, System
from kvm.boot import loader
from kvm.devices.console import Console
from kvm.machine import Machine, MachineConfig, Phase
from tests.guests.assemble import BinutilsMissing, assemble
from tests.kvm.machines import until

HERE = Path(__file__).parent
MIB = 1 << 20
MEMORY = 4 * MIB
BASES = {"flat64": MIB, "flat16": 0x7C00, "bootsector": 0x7C00}
LIMIT = 20.0
"""Seconds that only a hang takes."""

Build = Callable[..., Machine]


@pytest.fixture(params=["software", pytest.param("kvm", marks=pytest.mark.kvm)])
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    from kvm.backends.choice import open_system

    opened = open_system(request.param)
    yield opened
    opened.close()


@pytest.fixture
def build(system: System, tmp_path: Path) -> Iterator[Build]:
    with ExitStack() as machines:

        def build(name: str, format: str = "flat64", vcpus: int = 1) -> Machine:
            image = tmp_path / name
            try:
                image.write_bytes(assemble(HERE / f"{name}.S", base=BASES[format], format="bin"))
            except BinutilsMissing as missing:
                pytest.skip(str(missing))
            loaded = loader.load(image, memory=MEMORY, format=format)
            return machines.enter_context(Machine(system, loaded, MachineConfig(vcpus=vcpus, memory=MEMORY)))

        yield build


def debug_output(machine: Machine) -> bytes:
    return machine.board.debug_console.since(0)[0]


def await_output(console: Console, wanted: bytes) -> None:
    while wanted not in console.since(0)[0]:
        assert console.wait(console.total, LIMIT), f"{wanted!r} doesn't come after {console.since(0)[0]!r}"


def test_hello16_prints_and_exits(build: Build) -> None:
    machine = build("hello16", "bootsector")
    machine.run()
    status = machine.wait(Phase.EXITED, Phase.STOPPED, timeout=LIMIT)
    assert (status.phase, status.code) == (Phase.EXITED, 0)
    assert debug_output(machine) == b"hello from 0x7c00\n"


def test_vmcoreinfo64_finds_fw_cfg_and_writes_to_it(build: Build) -> None:
    machine = build("vmcoreinfo64")
    machine.run()
    status = machine.wait(Phase.EXITED, Phase.STOPPED, timeout=LIMIT)
    assert (status.phase, status.code) == (Phase.EXITED, 0)


@pytest.mark.parametrize("vcpus", [1, 2, 4])
def test_smp64_counts_the_vcpus(build: Build, vcpus: int) -> None:
    machine = build("smp64", vcpus=vcpus)
    machine.run()
    status = machine.wait(Phase.EXITED, Phase.STOPPED, timeout=LIMIT)
    assert (status.phase, status.code) == (Phase.EXITED, 0)
    assert debug_output(machine) == b"%d\n" % vcpus


def test_timer64_ticks(build: Build) -> None:
    machine = build("timer64")
    machine.run()
    await_output(machine.board.debug_console, b"tick 00000003\n")
    assert machine.status.phase is Phase.RUNNING


def test_echo64_sends_back_capitals(build: Build) -> None:
    machine = build("echo64")
    machine.run()
    await_output(machine.board.serial_console, b"ready\n")
    machine.board.serial.feed(b"Echo, 64!")
    await_output(machine.board.serial_console, b"ECHO, 64!")
    machine.board.serial.feed(b"\x04")
    status = machine.wait(Phase.EXITED, Phase.STOPPED, timeout=LIMIT)
    assert (status.phase, status.code) == (Phase.EXITED, 0)


def test_counter64_counts_in_memory_and_in_rax(build: Build) -> None:
    machine = build("counter64")
    machine.run()
    seen = []
    for _ in range(2):
        machine.pause()
        regs = machine.view(0).regs
        seen.append(int.from_bytes(machine.read_memory(0x180000, 8), "little"))
        assert int.from_bytes(regs[:8], "little") - seen[-1] in (0, 1)
        machine.step(0)
        machine.run()
    assert machine.status.phase is Phase.RUNNING
    assert seen[0] <= seen[1]


def test_dirty64_touches_the_pages_it_is_told(build: Build) -> None:
    machine = build("dirty64")
    machine.write_memory(0x8000, (3).to_bytes(8, "little") + (8192).to_bytes(8, "little"))
    before = machine.read_memory(2 * MIB, 2 * MIB)
    machine.run()
    until(lambda: machine.read_memory(2 * MIB + 2 * 8192, 1) != b"\0")
    machine.pause()
    after = machine.read_memory(2 * MIB, 2 * MIB)
    touched = [at for at in range(0, 2 * MIB, 8) if before[at : at + 8] != after[at : at + 8]]
    assert touched == [0, 8192, 16384]


def test_pio_writes_the_post_port_in_order(build: Build) -> None:
    machine = build("pio", "flat16")
    machine.run()
    until(lambda: len(machine.board.post.codes) == 16)
    codes = machine.board.post.codes
    assert all((after - before) % 256 == 1 for before, after in pairwise(codes))


def test_triple_stops_the_machine(build: Build) -> None:
    machine = build("triple")
    machine.run()
    status = machine.wait(Phase.EXITED, Phase.STOPPED, timeout=LIMIT)
    assert status.phase is Phase.STOPPED
    assert status.exit is not None
    assert status.exit.kind is ExitKind.SHUTDOWN
    assert debug_output(machine) == b"triple\n"


def test_unemulated_exits_or_is_shown_with_its_bytes(build: Build) -> None:
    machine = build("unemulated")
    machine.run()
    status = machine.wait(Phase.EXITED, Phase.STOPPED, timeout=LIMIT)
    assert debug_output(machine) == b"popcnt\n"
    if status.phase is Phase.EXITED:
        assert status.code == 0
    else:
        assert status.exit is not None
        assert status.exit.kind is ExitKind.INTERNAL_ERROR
        assert status.exit.insn.startswith(bytes.fromhex("f3480fb8c3"))
