"""Memory by linear address, and the search through it: the machine's API."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from kvm.backends.interface import System
from kvm.errors import CalledOff, MemoryAccessError
from kvm.machine import Machine, Phase
from kvm.memory import SEARCHED
from tests.kvm.machines import COUNT, ORIGIN, build, until

TABLES = 0x20_0000
"""Page tables of our own, behind the guest's code."""


def put(machine: Machine, address: int, *entries: int) -> None:
    machine.write_memory(address, b"".join(entry.to_bytes(8, "little") for entry in entries))


def remap(machine: Machine) -> None:
    """Long mode: linear 0 to 0x5000 is 0x300000, 0x302000, nothing, beyond the RAM, 0x301000."""
    for level in range(3):
        put(machine, TABLES + level * 0x1000, TABLES + (level + 1) * 0x1000 | 3)
    put(machine, TABLES + 0x3000, 0x30_0003, 0x30_2003, 0, 0x1000_0003, 0x30_1003)
    machine.edit(0, "cr3", TABLES)


def test_a_linear_write_goes_page_by_page_to_where_they_are_mapped(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, b"\xeb\xfe", format="flat64") as machine:
        remap(machine)
        went = machine.write_linear(0, 0xFFE, b"abcde")
        assert [tuple(piece) for piece in went] == [(0xFFE, 2, 0x30_0FFE), (0x1000, 3, 0x30_2000)]
        assert machine.read_memory(0x30_0FFE, 2) == b"ab"
        assert machine.read_memory(0x30_2000, 4) == b"cde\0"
        assert machine.read_memory(0x30_1000, 3) == bytes(3)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        (0x1FFE, "linear 0x2000: VCPU 0 has no page mapped there"),
        (0x2FFF, "linear 0x2fff: VCPU 0 has no page mapped"),
        (0x3000, "linear 0x3000: it is mapped to guest-physical 0x10000000, where there is no memory"),
        (0x8000_0000_0000, "no page mapped"),
    ],
)
def test_a_linear_write_that_cannot_go_all_the_way_writes_nothing(
    system: System, tmp_path: Path, address: int, why: str
) -> None:
    with build(system, tmp_path, b"\xeb\xfe", format="flat64") as machine:
        remap(machine)
        with pytest.raises(MemoryAccessError, match=why):
            machine.write_linear(0, address, b"abcd")
        assert machine.read_memory(0x30_0000, 0x3000) == bytes(0x3000)


def test_a_linear_write_pauses_the_guest_which_then_runs_what_was_written(system: System, tmp_path: Path) -> None:
    # A guest of one instruction: paused behind the first of two, it would run on in the middle of what was written.
    with build(system, tmp_path, b"\xeb\xfe", vcpus=2) as machine:
        machine.run()
        machine.write_linear(0, ORIGIN, bytes.fromhex("b0 07 e6 f4"))  # mov al, 7; out 0xf4, al
        assert machine.status.phase is Phase.PAUSED
        machine.run()
        until(lambda: machine.status.phase is Phase.EXITED)
        assert machine.status.code == 7


def test_bytes_are_found_from_an_address_on(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT) as machine:
        border = 2 * SEARCHED
        for address in (0x3000, border - 2, (4 << 20) - 4):
            machine.write_memory(address, b"vmdk")
        assert machine.find_memory(b"vmdk") == 0x3000
        assert machine.find_memory(b"vmdk", 0x3000) == 0x3000
        assert machine.find_memory(b"vmdk", 0x3001) == border - 2, "also where one piece of the search ends"
        assert machine.find_memory(b"vmdk", border - 1) == (4 << 20) - 4
        assert machine.find_memory(b"vmdk", (4 << 20) - 3) is None
        assert machine.find_memory(b"vmdk", 1 << 40) is None


def test_a_search_goes_through_ram_on_both_sides_of_the_hole_and_rom() -> None:
    """Of no machine: 3 GiB that nobody touches would be too much to look through here."""
    from kvm.backends.software.system import SoftwareSystem
    from kvm.memory import Memory

    system = SoftwareSystem()
    vm = system.create_vm()
    memory = Memory(vm, 4 << 20, b"ROM!" * 1024)
    memory.regions[0].address = 4 << 30  # as what doesn't fit below the hole
    memory.write(4 << 30, b"ROM!")
    assert memory.find(b"ROM!") == (4 << 30) - 4096
    assert memory.find(b"ROM!", (4 << 30) - 3) == 4 << 30, "nothing lies across"
    vm.close()
    system.close()


def test_a_search_says_how_far_it_is_and_can_be_called_off(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT) as machine:
        told: list[tuple[int, int]] = []
        rest = 3 * SEARCHED
        start = (4 << 20) - rest
        assert machine.find_memory(b"nowhere", start, lambda done, total: told.append((done, total))) is None
        assert told == [(0, rest), (SEARCHED, rest), (2 * SEARCHED, rest)]
        cancel = threading.Event()

        def progress(done: int, total: int) -> None:
            if done:
                cancel.set()

        with pytest.raises(CalledOff, match=f"at guest-physical {SEARCHED:#x}"):
            machine.find_memory(b"nowhere", 0, progress, cancel)
