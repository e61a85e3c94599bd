"""Files and running machines: saved beside the guest, loaded, chained, never written onto what is in use."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from app import guests
from kvm.backends.interface import System
from kvm.backends.software.system import SoftwareSystem
from kvm.boot import loader
from kvm.errors import SnapshotError, SnapshotMismatch
from kvm.host_memory import touched
from kvm.machine import Machine, MachineConfig, Phase
from kvm.snapshot import chain
from kvm.snapshot.file import read
from kvm.vcpu import Reply
from kvm.x86 import layout
from kvm.x86.structs import MpState, Regs, pack_cpuid, unpack_cpuid
from tests.guests.brisk import brisk_demo
from tests.kvm.contract.lab import tsc_distances
from tests.kvm.machines import COUNT, HLT, OUT_80, build, until
from tests.kvm.snapshot.crafted import memory_in, memory_of, settled, with_substate, without_substate
from tests.kvm.test_demo_machine import Serial, assert_healthy, demo

MIB = 1 << 20


def rax(machine: Machine, vcpu: int = 0) -> int:
    machine.request_samples()
    return Regs.from_buffer_copy(machine.view(vcpu).regs).rax


@pytest.mark.parametrize("vcpus", [2])
def test_prints_after_a_load_what_it_printed_after_the_save(system: System, tmp_path: Path, vcpus: int) -> None:
    """Into the same machine, which has run on, and into a new one."""
    path = tmp_path / "a.vmdeck"
    with demo(system, brisk_demo(tmp_path), vcpus) as machine:
        boot = Serial(machine)
        machine.run()
        boot.wait_lines(6)
        machine.pause()
        machine.save_file(path)
        first = Serial(machine)
        machine.run()
        printed = first.wait_lines(3)
        assert any(b"round" in line for line in printed)
        machine.pause()
        assert machine.load_file(path) == ()
        again = Serial(machine)
        machine.run()
        assert again.wait_lines(3) == printed
        assert_healthy(boot.text())
    fresh, _ = Machine.from_file(system, path)
    with fresh:
        anew = Serial(fresh)
        fresh.run()
        assert anew.wait_lines(3) == printed


def test_the_guest_runs_on_while_its_file_is_written(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, memory=8 * MIB) as machine:
        machine.write_memory(MIB, os.urandom(6 * MIB))
        machine.run()
        seen: list[int] = []

        def progress(done: int, total: int) -> None:
            if not seen:
                assert machine.status.phase is Phase.RUNNING
                first = rax(machine)
                until(lambda: rax(machine) != first)
                seen.append(first)

        machine.save_file(tmp_path / "a.vmdeck", progress=progress)
        assert seen
        assert machine.status.phase is Phase.RUNNING


def test_what_the_guest_writes_meanwhile_is_not_in_the_file(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, memory=4 * MIB) as machine:
        machine.write_memory(3 * MIB, b"then")
        memory = memory_of(machine)
        checkpoint = machine.checkpoint()
        once = threading.Event()

        def progress(done: int, total: int) -> None:
            if not once.is_set():
                once.set()
                machine.write_memory(3 * MIB, b"now!")
                machine.forget(checkpoint)
                machine.checkpoint()
                machine.write_memory(3 * MIB + 4096, os.urandom(4096))
                machine.checkpoint()

        machine.save_file(tmp_path / "a.vmdeck", progress=progress)
        assert memory_in(tmp_path / "a.vmdeck") == memory


def generations(machine: Machine, folder: Path, count: int) -> list[tuple[Path, bytes]]:
    """A chain of files, each with what memory was."""
    made = []
    for number in range(count):
        machine.write_memory(MIB + number * 4096, f"generation {number}".encode())
        machine.write_memory(2 * MIB, os.urandom(100))
        path = folder / f"{number}.vmdeck"
        machine.save_file(path, incremental=number > 0)
        made.append((path, memory_of(machine)))
    return made


def test_a_chain_holds_what_changed_and_loads(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, memory=4 * MIB) as machine:
        made = generations(machine, tmp_path, 4)
        for path, memory in made:
            assert memory_in(path) == memory
        with read(made[3][0]) as last:
            assert sum(extent.size for extent in last.head.extents) == 2 * 4096
        for path, memory in reversed(made):
            machine.load_file(path)
            assert memory_of(machine) == memory
        machine.load_file(made[2][0])
        machine.write_memory(3 * MIB, b"a branch")
        machine.save_file(tmp_path / "branch.vmdeck", incremental=True)
        assert memory_in(tmp_path / "branch.vmdeck") == memory_of(machine)
        fresh, _ = Machine.from_file(system, tmp_path / "branch.vmdeck", verify=True)
        with fresh:
            assert memory_of(fresh) == memory_of(machine)


def test_a_chain_moves_and_is_renamed_but_needs_its_parents(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, memory=4 * MIB) as machine:
        made = generations(machine, tmp_path, 3)
    there = tmp_path / "there"
    there.mkdir()
    for (path, _), name in zip(made, ("x", "y", "z"), strict=True):
        path.rename(there / name)
    assert memory_in(there / "z") == made[2][1]
    (there / "x").rename(tmp_path / "x")
    with pytest.raises(SnapshotError, match="holds only what changed since"):
        chain.open_chain(there / "z")


LINE_STATUS = 0x3FD
TIMER_VECTOR, TIMER_INITIAL = 0x320, 0x380


def stop_inside_an_in(machine: Machine) -> None:
    """Run the demo until VCPU 0 asks the serial line for its status, and ask it to stop before it has the answer."""
    vcpu, ports = machine.vcpus[0], machine.board.bus._ports
    width, offset, port_in, port_out = claim = ports[LINE_STATUS]
    stopping: list[Reply[int]] = []

    def asked(offset: int, size: int) -> int:
        if not stopping:
            stopping.append(vcpu.stop())
        return port_in(offset, size)

    ports[LINE_STATUS] = width, offset, asked, port_out
    machine.run()
    until(lambda: bool(stopping))
    stopping[0].outcome()()
    ports[LINE_STATUS] = claim


def test_three_generations_saved_inside_an_in_with_timers_armed(system: System, tmp_path: Path) -> None:
    """The demo's VCPUs live on their LAPIC timers and check themselves; each file is opened in a machine of its own."""
    with demo(system, brisk_demo(tmp_path), 2) as machine:
        boot = Serial(machine)
        machine.run()
        boot.wait_lines(5)
        for number in range(3):
            stop_inside_an_in(machine)
            machine.save_file(tmp_path / str(number), incremental=number > 0)
        machine.pause()
        assert_healthy(boot.text())
    for number in range(3):
        opened, losses = Machine.from_file(system, tmp_path / str(number))
        with opened:
            assert losses == ()
            state = opened.save()
            regs = Regs.from_buffer_copy(state.vcpus[0]["regs"])
            assert opened.read_memory(regs.rip - 1, 1) == b"\xec", "in al, dx: done, or it would be lost"
            assert regs.rax & 0xFF == opened.board.bus.port_in(LINE_STATUS, 1)
            for copy in state.vcpus:
                vector, initial = (
                    int.from_bytes(copy["lapic"][at : at + 4], "little") for at in (TIMER_VECTOR, TIMER_INITIAL)
                )
                assert initial
                assert not vector & 1 << 16, "masked"
            serial = Serial(opened)
            opened.run()
            assert any(b"ok" in line for line in serial.wait_lines(2))
            assert_healthy(serial.text())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_freed_checkpoints_room_is_not_taken_for_what_the_parent_has(
    system: System, tmp_path: Path, count: int
) -> None:
    """What is in the file is told apart by its place in the store: the places of the last file's pages must stay."""
    with build(system, tmp_path, COUNT, memory=4 * MIB) as machine:
        machine.write_memory(MIB, b"in the file")
        machine.save_file(tmp_path / "a")
        for number in range(count):
            machine.write_memory(MIB, bytes([number]))
            checkpoint = machine.checkpoint()
            machine.forget(checkpoint)
        machine.save_file(tmp_path / "b", incremental=True)
        assert memory_in(tmp_path / "b") == memory_of(machine)


def test_flattened_it_needs_no_other(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, memory=4 * MIB) as machine:
        made = generations(machine, tmp_path, 3)
        state = machine.save()
    flat = tmp_path / "flat.vmdeck"
    chain.flatten(made[2][0], flat)
    for path, _ in made:
        path.unlink()
    with read(flat) as file:
        assert file.head.parent is None
        assert file.head.state.vcpus == state.vcpus
    assert memory_in(flat) == made[2][1]


def test_a_file_from_before_there_were_tsc_offsets(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, vcpus=3, memory=4 * MIB) as machine:
        machine.save_file(tmp_path / "new")
        state = machine.save()
        old = without_substate(tmp_path / "new", "tsc_offset")
        assert machine.load_file(old) == ()
        again = machine.save()
        assert settled(again) == settled(state)
        assert tsc_distances(again.vcpus) == [0, 0, 0]


def test_checkpoints_outlive_a_load_and_the_other_way_round(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, memory=4 * MIB) as machine:
        machine.write_memory(MIB, b"in the file")
        machine.save_file(tmp_path / "a.vmdeck")
        filed = memory_of(machine)
        machine.write_memory(MIB, b"checkpoint ")
        before = machine.checkpoint("before")
        kept = memory_of(machine)
        machine.load_file(tmp_path / "a.vmdeck")
        assert memory_of(machine) == filed
        machine.write_memory(2 * MIB, b"after the load")
        after = machine.checkpoint("after")
        loaded = memory_of(machine)
        machine.restore(before)
        assert memory_of(machine) == kept
        machine.restore(after)
        assert memory_of(machine) == loaded
        machine.forget(before)
        machine.restore(after)
        machine.save_file(tmp_path / "b.vmdeck", incremental=True)
        assert memory_in(tmp_path / "b.vmdeck") == loaded


@pytest.mark.parametrize(
    ("vcpus", "memory", "says"), [(1, 4 * MIB, "VCPUs"), (2, 8 * MIB, "bytes of memory")], ids=["vcpus", "memory"]
)
def test_another_shape_is_refused(system: System, tmp_path: Path, vcpus: int, memory: int, says: str) -> None:
    with build(system, tmp_path, COUNT, vcpus=2, memory=4 * MIB) as machine:
        machine.save_file(tmp_path / "a.vmdeck")
    with build(system, tmp_path, COUNT, vcpus=vcpus, memory=memory) as machine:
        before = machine.save()
        with pytest.raises(SnapshotError, match=says):
            machine.load_file(tmp_path / "a.vmdeck")
        assert settled(machine.save()) == settled(before)


def test_damaged_memory_stops_the_machine_that_runs_on_it(system: System, tmp_path: Path) -> None:
    path = tmp_path / "a.vmdeck"
    with build(system, tmp_path, COUNT, memory=4 * MIB) as machine:
        machine.write_memory(3 * MIB, b"x")
        machine.save_file(path)
        with read(path) as file, open(path, "r+b") as raw:
            raw.seek(file.head.size + 3 * MIB)
            raw.write(b"y")
        with pytest.raises(SnapshotError, match="from 0x300000"):
            machine.load_file(path, verify=True)
        machine.load_file(path)
        assert "0x300000" in machine.wait(Phase.STOPPED, timeout=20).reason


def test_firmware_is_in_the_file(system: System, tmp_path: Path) -> None:
    rom = bytearray(64 << 10)
    rom[-16:-12] = bytes.fromhex("66 40 eb fc")  # inc eax; jmp back
    (tmp_path / "rom").write_bytes(rom)
    image = loader.load(tmp_path / "rom", memory=4 * MIB, format="firmware")
    with Machine(system, image, MachineConfig(1, 4 * MIB)) as machine:
        machine.save_file(tmp_path / "a.vmdeck")
        machine.write_memory(layout.ROM_END - len(rom), b"patched")
        machine.save_file(tmp_path / "b.vmdeck", incremental=True)
        machine.load_file(tmp_path / "a.vmdeck")
        assert machine.read_memory(layout.ROM_END - len(rom), 7) == bytes(7)
    fresh, _ = Machine.from_file(system, tmp_path / "b.vmdeck")
    with fresh:
        assert fresh.read_memory(layout.ROM_END - len(rom), 7) == b"patched"
        fresh.run()
        first = rax(fresh)
        until(lambda: rax(fresh) != first)


# Bug 17


class InUse:
    """A machine that is mapped from the last of three files."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self.paths = [path for path, _ in generations(machine, folder, 3)]
        machine.load_file(self.paths[2])
        self.before = [path.read_bytes() for path in self.paths]
        self.memory = memory_of(machine)

    def refuses(self, path: Path, *, incremental: bool = False) -> None:
        with pytest.raises(SnapshotError, match="Can't save to"):
            self.machine.save_file(path, incremental=incremental)
        assert [path.read_bytes() for path in self.paths] == self.before
        assert memory_of(self.machine) == self.memory


def test_17_no_snapshot_onto_a_file_in_use(system: System, tmp_path: Path) -> None:
    """FACTS 5, bug 17 (Firecracker #4301): under any name; nothing is lost, and another name does."""
    with build(system, tmp_path, COUNT, memory=4 * MIB) as machine:
        use = InUse(machine, tmp_path)
        (tmp_path / "symlink").symlink_to(use.paths[0])
        (tmp_path / "hardlink").hardlink_to(use.paths[1])
        for path in (*use.paths, tmp_path / "symlink", tmp_path / "hardlink"):
            use.refuses(path)
            use.refuses(path, incremental=True)
        for path in use.paths:
            chain.relabel(path, "another", "name")
        assert memory_in(use.paths[2]) == use.memory
        use.before = [path.read_bytes() for path in use.paths]
        use.refuses(use.paths[0])
        machine.save_file(tmp_path / "other.vmdeck")
        assert memory_in(tmp_path / "other.vmdeck") == use.memory


def test_17_a_file_that_became_the_parent_meanwhile_is_refused_too(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, memory=4 * MIB) as machine:
        machine.write_memory(MIB, b"x")
        machine.save_file(tmp_path / "a")
        once = threading.Event()

        def progress(done: int, total: int) -> None:
            if not once.is_set():
                once.set()
                machine.load_file(tmp_path / "a")

        with pytest.raises(SnapshotError, match="mapped from it"):
            machine.save_file(tmp_path / "a", progress=progress)
        assert memory_in(tmp_path / "a") == memory_of(machine)


@pytest.mark.parametrize("how", ["renamed", "hard link", "symlink", "renamed behind a symlink"])
def test_17_a_file_in_use_that_comes_to_the_target_meanwhile_is_refused(
    system: System, tmp_path: Path, how: str
) -> None:
    """Between the check and the moment at which the new file takes its place."""
    used, target, link = tmp_path / "used", tmp_path / "target", tmp_path / "link"
    with build(system, tmp_path, COUNT, memory=4 * MIB) as machine:
        machine.write_memory(MIB, b"x")
        machine.save_file(used)
        machine.load_file(used)
        link.symlink_to(target)

        def meanwhile(done: int, total: int) -> None:
            if done != total:
                return
            match how:
                case "renamed":
                    used.rename(target)
                case "hard link":
                    target.hardlink_to(used)
                case "symlink":
                    target.symlink_to(used)
                case _:
                    used.rename(target)
                    link.unlink()
                    link.symlink_to(tmp_path / "elsewhere")

        there = used.stat().st_ino
        with pytest.raises(SnapshotError, match="mapped from it"):
            machine.save_file(link if "behind" in how else target, progress=meanwhile)
        assert target.stat().st_ino == there
        assert memory_in(target) == memory_of(machine)
        machine.save_file(tmp_path / "other")


def test_17_a_whole_save_may_replace_what_nothing_builds_on(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, memory=4 * MIB) as machine:
        for number in range(3):
            machine.write_memory(MIB, bytes([number]))
            machine.save_file(tmp_path / "a")
            assert memory_in(tmp_path / "a") == memory_of(machine)
        with pytest.raises(SnapshotError, match="builds on it"):
            machine.save_file(tmp_path / "a", incremental=True)


def test_17_control_writing_in_place_changes_the_machine(system: System, tmp_path: Path) -> None:
    """What happens to a machine whose own file is written: pages that it hasn't touched aren't its own."""
    with build(system, tmp_path, COUNT, memory=4 * MIB) as machine:
        machine.write_memory(3 * MIB, b"as it was")
        path = tmp_path / "a"
        machine.save_file(path)
    fresh, _ = Machine.from_file(system, path, verify=True)
    with fresh, read(path) as file, open(path, "r+b") as raw:
        raw.seek(file.head.size + 3 * MIB)
        raw.write(b"destroyed")
        raw.flush()
        assert fresh.read_memory(3 * MIB, 9) == b"destroyed"


# Bug 16

HIGH = 0x1_0000_5000
LOW = 0x20_5000
WRITE_HIGH_AND_LOW = bytes.fromhex("48 bf 00 50 00 00 01 00 00 00  c6 07 5a  c6 04 25 00 50 20 00 a5  fa f4 eb fd")
"""64-bit: mov rdi, HIGH; mov byte [rdi], 0x5a; mov byte [LOW], 0xa5; cli; hlt; jmp back."""


@pytest.fixture
def two_slots(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """RAM below the MMIO hole and above it. The hole begins early in software, where each page is compared."""
    if isinstance(system, SoftwareSystem):
        monkeypatch.setattr(layout, "MMIO_HOLE", 4 * MIB)
    memory = layout.MMIO_HOLE + 4 * MIB
    with build(system, tmp_path, WRITE_HIGH_AND_LOW, memory=memory, format="flat64") as machine:
        # One more page directory, for 4 GiB to 5 GiB: a large page at its beginning.
        machine.write_memory(layout.BOOT_PDPT + 4 * 8, (0x8000 | 0x23).to_bytes(8, "little"))
        machine.write_memory(0x8000, (layout.HIGH_RAM | 0xE3).to_bytes(8, "little"))
        yield machine


def write_in_both_slots(machine: Machine, folder: Path) -> set[int]:
    """A base, what the guest and the host write, and a delta; the addresses of the pages in it."""
    machine.save_file(folder / "base")
    machine.run()
    until(lambda: machine.read_memory(HIGH, 1) == b"\x5a" and machine.read_memory(LOW, 1) == b"\xa5")
    machine.pause()
    machine.write_memory(HIGH + 4096, b"by the host")
    machine.save_file(folder / "delta", incremental=True)
    with read(folder / "delta") as file:
        return {address for extent in file.head.extents for address in range(extent.address, extent.end, 4096)}


def loaded(machine: Machine, path: Path) -> bytes:
    machine.load_file(path)
    return machine.read_memory(HIGH, 1) + machine.read_memory(LOW, 1) + machine.read_memory(HIGH + 4096, 11)


def test_16_pages_of_both_slots_come_back_to_their_own_addresses(two_slots: Machine, tmp_path: Path) -> None:
    """FACTS 5, bug 16 (Firecracker #5705): RAM goes on above the MMIO hole, in a slot of its own."""
    stored = write_in_both_slots(two_slots, tmp_path)
    assert {HIGH, HIGH + 4096, LOW} <= stored
    assert len(stored) < 16, "page tables and the code at most"
    assert loaded(two_slots, tmp_path / "base") == bytes(13)
    assert loaded(two_slots, tmp_path / "delta") == b"\x5a\xa5by the host"


def test_16_control_a_slot_s_page_number_is_not_the_machine_s(
    two_slots: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if each slot's dirty log began at page 0: what is above the hole is lost."""
    two_slots.checkpoint()
    monkeypatch.setattr(two_slots.memory.ram[1], "first_page", 0)
    assert HIGH not in write_in_both_slots(two_slots, tmp_path)


# From one backend to the other


@pytest.fixture(params=["kvm to software", "software to kvm"])
def way(request: pytest.FixtureRequest) -> Iterator[tuple[System, System]]:
    from kvm.backends.kernel.system import KernelSystem

    with closing(KernelSystem()) as kernel, closing(SoftwareSystem()) as software:
        yield (kernel, software) if request.param == "kvm to software" else (software, kernel)


@pytest.mark.kvm
@pytest.mark.parametrize("code", [COUNT, HLT, OUT_80], ids=["count", "hlt", "out"])
def test_a_guest_goes_on_on_the_other_backend(way: tuple[System, System], tmp_path: Path, code: bytes) -> None:
    here, there = way
    path = tmp_path / "a.vmdeck"
    with build(here, tmp_path, code, vcpus=2, memory=2 * MIB) as machine:
        machine.edit(0, "rbx", 0x1234_5678_9ABC_DEF0)
        machine.edit(1, "r15", 15)
        for _ in range(3):
            machine.step(0)
        machine.save_file(path)
        memory = memory_of(machine)
        saved = machine.save()
    with pytest.raises(SnapshotMismatch) as caught:
        Machine.from_file(there, path)
    assert caught.value.losses
    assert all(loss in str(caught.value) for loss in caught.value.losses)
    opened, losses = Machine.from_file(there, path, drop=True)
    with opened:
        assert losses == caught.value.losses
        assert memory_of(opened) == memory
        state = opened.save()
        for name in ("regs", "sregs", "mp_state", "xcrs", "debugregs"):
            assert [copy[name] for copy in state.vcpus] == [copy[name] for copy in saved.vcpus], name
        assert state.devices == saved.devices
        for _ in range(2):
            opened.step(0)
        opened.save_file(tmp_path / "back.vmdeck")
    back, _ = Machine.from_file(here, tmp_path / "back.vmdeck", drop=True)
    with back:
        assert Regs.from_buffer_copy(back.save().vcpus[0]["regs"]).rbx == 0x1234_5678_9ABC_DEF0
        assert MpState.from_buffer_copy(back.save().vcpus[1]["mp_state"]).mp_state == 1
        back.run()
        if code != HLT:
            first = rax(back)
            until(lambda: rax(back) != first)


@pytest.mark.kvm
def test_the_demo_saved_on_kvm_goes_on_in_software_and_back(tmp_path: Path) -> None:
    """A chain whose generations are the two backends' in turn."""
    from kvm.backends.kernel.system import KernelSystem

    def goes_on(machine: Machine, expected: list[bytes], path: Path) -> list[bytes]:
        """The line that it prints after it's saved to ``path``."""
        again = Serial(machine)
        machine.run()
        assert again.wait_lines(1)[: len(expected)] == expected
        machine.pause()
        machine.save_file(path, incremental=machine.files.saved is not None)
        after = Serial(machine)
        machine.run()
        return after.wait_lines(1)

    with closing(KernelSystem()) as kernel, closing(SoftwareSystem()) as software:
        with demo(kernel, brisk_demo(tmp_path), 2) as machine:
            boot = Serial(machine)
            machine.run()
            boot.wait_lines(6)
            printed = goes_on(machine, [], tmp_path / "0")
        for number, system in enumerate((software, kernel), start=1):
            opened, losses = Machine.from_file(system, tmp_path / str(number - 1), drop=True)
            with opened:
                assert any("CPUID" in loss for loss in losses)
                printed = goes_on(opened, printed, tmp_path / str(number))
    with chain.open_chain(tmp_path / "2") as opened_chain:
        assert len(opened_chain.files) == 3
        opened_chain.verify()


def test_loading_over_and_over_keeps_one_file_mapped(system: System, tmp_path: Path) -> None:
    """Each mapping is as large as the guest, and a process may have 65,530 of them (vm.max_map_count)."""
    with build(system, tmp_path, COUNT, memory=2 * MIB) as machine:
        machine.save_file(tmp_path / "a")
        for _ in range(5):
            machine.load_file(tmp_path / "a")
        assert len(machine._pages.files) == 1


def test_a_machine_from_another_processor_s_file_takes_its_own_files_again(system: System, tmp_path: Path) -> None:
    """Its guest was told of less than this processor can do; it has run, so that stands."""
    with build(system, tmp_path, COUNT, memory=2 * MIB) as machine:
        entries = unpack_cpuid(machine.save().vcpus[0]["cpuid"])
        machine.save_file(tmp_path / "a.vmdeck")
    for entry in entries:
        if entry.function == 1:
            entry.ecx &= entry.ecx - 1  # the lowest that it has
    opened, losses = Machine.from_file(system, with_substate(tmp_path / "a.vmdeck", 0, "cpuid", pack_cpuid(entries)))
    with opened:
        assert losses == ()
        opened.step(0)
        opened.reset()
        opened.save_file(tmp_path / "own.vmdeck")
        assert opened.load_file(tmp_path / "own.vmdeck") == ()


def test_an_index_says_which_pages_are_zero_without_reading_them(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, memory=8 * MIB) as machine:
        machine.write_memory(5 * MIB, b"x")
        machine.save_file(tmp_path / "a.vmdeck")
        used = np.flatnonzero([any(machine.read_memory(page * 4096, 4096)) for page in range(2048)])
    with chain.open_chain(tmp_path / "a.vmdeck") as opened:
        assert set(used) <= set(np.flatnonzero(opened.index())) != set(range(2048))


def test_memory_that_was_never_touched_stays_so(system: System, tmp_path: Path) -> None:
    """A first checkpoint reads what there is, not gigabytes of zeros."""
    with build(system, tmp_path, COUNT, memory=64 * MIB) as machine:
        (region,) = machine.memory.ram
        before = set(touched(region.pages).tolist())
        machine.write_memory(50 * MIB, b"x")
        after = set(touched(region.pages).tolist())
        assert 50 * MIB // 4096 in after
        assert {page for page in range(1024) if region.pages[page].any()} <= after
        if sys.platform == "linux":
            assert 50 * MIB // 4096 not in before
            assert len(after) < 8192
        machine.save_file(tmp_path / "a.vmdeck")
    assert memory_in(tmp_path / "a.vmdeck")[50 * MIB : 50 * MIB + 1] == b"x"


def test_the_guest_image_is_kept_for_a_reset(system: System, tmp_path: Path) -> None:
    image = loader.load(guests.demo(), memory=4 * MIB)
    with Machine(system, image, MachineConfig(1, 4 * MIB)) as machine:
        machine.save_file(tmp_path / "a.vmdeck")
    with build(system, tmp_path, COUNT, memory=4 * MIB) as machine:
        machine.load_file(tmp_path / "a.vmdeck")
        assert machine.image == image
        machine.reset()
        entry = image.segments[-1]
        assert machine.read_memory(entry.address, len(entry.data)) == entry.data
