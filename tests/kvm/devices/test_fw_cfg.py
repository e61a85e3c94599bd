"""fw_cfg: what a guest finds, by port and by DMA, and that no access and no descriptor leads anywhere else."""

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvm.backends.interface import System
from kvm.backends.software.system import SoftwareSystem
from kvm.boot import loader
from kvm.devices import fw_cfg
from kvm.errors import VmdeckError
from kvm.machine import Machine, MachineConfig
from kvm.x86 import layout
from tests.kvm.fw_cfg import (
    BUFFER,
    DESCRIPTOR,
    NOTE,
    PORT,
    directory,
    dma,
    offer,
    read_dma,
    read_port,
    select,
    start_dma,
    write_vmcoreinfo,
)
from tests.kvm.machines import COUNT, build
from tests.kvm.snapshot.crafted import memory_of

MIB, GIB = 1 << 20, 1 << 30
MEMORY, VCPUS, ROM = 2 * MIB, 3, 64 << 10
ROM_AT = layout.ROM_END - ROM
SIZES = {fw_cfg.SIGNATURE: 4, fw_cfg.ID: 4, fw_cfg.RAM_SIZE: 8, fw_cfg.CPUS: 2, fw_cfg.MAX_CPUS: 2}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """One with a ROM, whose memory and device the tests change as they like."""
    rom = tmp_path_factory.mktemp("fw_cfg") / "rom"
    rom.write_bytes(bytes(range(256)) * (ROM // 256))
    image = loader.load(rom, memory=MEMORY, format="firmware")
    with closing(SoftwareSystem()) as system, Machine(system, image, MachineConfig(VCPUS, MEMORY)) as made:
        yield made


@pytest.fixture(autouse=True)
def fresh(machine: Machine) -> None:
    machine.reset()


def device(machine: Machine) -> fw_cfg.FwCfg:
    found = machine.board.devices[fw_cfg.NAME]
    assert isinstance(found, fw_cfg.FwCfg)
    return found


@pytest.mark.parametrize("read", [read_port, read_dma])
def test_a_guest_finds_the_device_and_the_machine_s_size(machine: Machine, read) -> None:
    assert read(machine, fw_cfg.SIGNATURE, 4) == b"QEMU"
    assert read(machine, fw_cfg.ID, 4) == struct.pack("<I", 3)
    assert read(machine, fw_cfg.RAM_SIZE, 8) == struct.pack("<Q", MEMORY)
    assert read(machine, fw_cfg.CPUS, 2) == read(machine, fw_cfg.MAX_CPUS, 2) == struct.pack("<H", VCPUS)
    assert read(machine, fw_cfg.BOOT_MENU, 2) == b"\1\0"
    assert read(machine, fw_cfg.SIGNATURE | 0x4000, 6) == b"QEMU\0\0", "zeros behind its end; the write channel's bit"
    for missing in (2, 0x8000, 0xBFFF, 0x3FFF):
        assert read(machine, missing, 5) == bytes(5)


@pytest.mark.parametrize("read", [read_port, read_dma])
def test_files_are_found_by_name(machine: Machine, read) -> None:
    files = directory(machine)
    assert list(files) == sorted(files) == ["etc/e820", "etc/vmcoreinfo"]
    key, size = files["etc/vmcoreinfo"]
    assert read(machine, key, size) == struct.pack("<HHIQ", 1, 0, 0, 0)
    key, size = files["etc/e820"]
    assert list(fw_cfg.E820.iter_unpack(read(machine, key, size))) == [(0, MEMORY, 1), (0xFEFFC000, 0x4000, 2)]


def test_the_memory_map_has_both_ranges_of_ram() -> None:
    entries = list(fw_cfg.E820.iter_unpack(fw_cfg.files(4 * GIB)["etc/e820"]))
    assert [entry for entry in entries if entry[2] == 1] == [(0, 3 * GIB, 1), (4 * GIB, GIB, 1)]


def test_the_dma_register_reads_as_a_signature(machine: Machine) -> None:
    bus = machine.board.bus
    read = [bus.port_in(PORT + 4 + at, 4).to_bytes(4, "little") for at in (0, 4)]
    assert b"".join(read) == b"QEMU CFG"
    assert bytes(bus.port_in(PORT + 4 + at, 1) for at in range(8)) == b"QEMU CFG"


def test_only_accesses_of_a_register_s_own_size_do_something(machine: Machine) -> None:
    bus = machine.board.bus
    before = device(machine).save()
    machine.write_memory(0, fw_cfg.DESCRIPTOR.pack(fw_cfg.READ, 4, BUFFER))
    for port, size in ((0, 1), (0, 4), (1, 1), (1, 2), (2, 2), (4, 1), (4, 2), (5, 4), (6, 4), (8, 1), (8, 2), (9, 4)):
        bus.port_out(PORT + port, size, 0x19)
    for port, size in ((0, 1), (0, 2), (0, 4), (1, 2), (1, 4), (2, 1), (3, 1)):
        assert bus.port_in(PORT + port, size) == (1 << 8 * size) - 1
    assert device(machine).save() == before
    assert machine.read_memory(BUFFER, 4) == bytes(4)


def test_a_dma_goes_on_where_the_one_before_ended(machine: Machine) -> None:
    assert dma(machine, select(fw_cfg.SIGNATURE)) == 0
    assert dma(machine, fw_cfg.READ, 1) == 0
    assert dma(machine, fw_cfg.SKIP, 1) == 0
    assert dma(machine, fw_cfg.READ | fw_cfg.WRITE | fw_cfg.SKIP, 4) == 0  # the first of these three counts
    assert machine.read_memory(BUFFER, 4) == b"MU\0\0"
    assert dma(machine, select(fw_cfg.SIGNATURE) | fw_cfg.SKIP, 0xFFFF_FFFF) == 0
    assert machine.board.bus.port_in(PORT + 1, 1) == 0


def test_the_high_half_of_a_descriptor_s_address_counts_once(machine: Machine) -> None:
    start_dma(machine, 1 << 32)
    assert dma(machine, select(fw_cfg.SIGNATURE) | fw_cfg.READ, 4) == 0
    machine.write_memory(DESCRIPTOR, fw_cfg.DESCRIPTOR.pack(select(fw_cfg.ID) | fw_cfg.READ, 4, BUFFER))
    machine.board.bus.port_out(PORT + 8, 4, int.from_bytes(DESCRIPTOR.to_bytes(4, "big"), "little"))
    assert machine.read_memory(BUFFER, 4) == b"\3\0\0\0"


def test_only_vmcoreinfo_can_be_written_and_only_within_it(machine: Machine) -> None:
    key, size = directory(machine)["etc/vmcoreinfo"]
    machine.write_memory(BUFFER, bytes(range(32)))
    assert dma(machine, select(key) | fw_cfg.WRITE, size + 1) == fw_cfg.ERROR
    assert dma(machine, fw_cfg.SKIP, 8) == 0
    assert dma(machine, fw_cfg.WRITE, 9) == fw_cfg.ERROR
    assert read_dma(machine, key, size) == struct.pack("<HHIQ", 1, 0, 0, 0)
    machine.write_memory(BUFFER, bytes(range(32)))
    assert dma(machine, select(key) | fw_cfg.WRITE, 4) == dma(machine, fw_cfg.WRITE, 4) == 0
    assert read_port(machine, key, size) == bytes((0, 1, 2, 3, 0, 1, 2, 3)) + bytes(8)
    for other in (*SIZES, fw_cfg.DIRECTORY, fw_cfg.FIRST_FILE, 0x77):
        before = read_port(machine, other, 4)
        assert dma(machine, select(other) | fw_cfg.WRITE, 1) == fw_cfg.ERROR
        assert read_port(machine, other, 4) == before


@pytest.mark.parametrize(
    ("control", "length", "address"),
    [
        (fw_cfg.READ, 4, MEMORY - 3), (fw_cfg.READ, 4, MEMORY), (fw_cfg.READ, 4, ROM_AT), (fw_cfg.READ, 4, 1 << 63),
        (fw_cfg.READ, fw_cfg.MOST + 1, 0), (fw_cfg.READ, 0xFFFF_FFFF, 0), (fw_cfg.WRITE, 16, ROM_AT),
        (fw_cfg.WRITE, 16, MEMORY - 15), (fw_cfg.WRITE, 16, (1 << 64) - 8),
    ],
)  # fmt: skip
def test_what_a_dma_can_t_do_is_an_error_and_changes_nothing(
    machine: Machine, control: int, length: int, address: int
) -> None:
    key, _ = directory(machine)["etc/vmcoreinfo"]
    before = memory_of(machine)
    assert dma(machine, select(key) | control, length, address) == fw_cfg.ERROR
    assert memory_of(machine)[:DESCRIPTOR] == before[:DESCRIPTOR]
    assert memory_of(machine)[DESCRIPTOR + 16 :] == before[DESCRIPTOR + 16 :]
    assert read_port(machine, key, 16) == struct.pack("<HHIQ", 1, 0, 0, 0)


def test_a_descriptor_that_reaches_out_of_memory_is_an_error(machine: Machine) -> None:
    start_dma(machine, MEMORY - 4)
    assert machine.read_memory(MEMORY - 4, 4) == fw_cfg.ERROR.to_bytes(4, "big")
    for nowhere in (MEMORY - 3, MEMORY, ROM_AT, (1 << 64) - 8):
        before = memory_of(machine)
        start_dma(machine, nowhere)
        assert memory_of(machine) == before


ADDRESSES = st.one_of(
    st.sampled_from((0, DESCRIPTOR, BUFFER, MEMORY, ROM_AT, layout.ROM_END, 1 << 63, (1 << 64) - 1)).flatmap(
        lambda at: st.integers(max(at - 40, 0), min(at + 40, (1 << 64) - 1))
    ),
    st.integers(0, MEMORY - 1), st.integers(0, (1 << 64) - 1),
)  # fmt: skip
LENGTHS = st.one_of(st.integers(0, 40), st.integers(0, MEMORY + 40), st.integers(0, (1 << 32) - 1))
KEYS = st.one_of(st.integers(0, 0x23), st.integers(0, 0xFFFF))
CONTROLS = st.builds(lambda key, low: key << 16 | low, KEYS, st.one_of(st.integers(0, 0x1F), st.integers(0, 0xFFFF)))
SWEEP = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SWEEP
@given(where=ADDRESSES, control=CONTROLS, length=LENGTHS, address=ADDRESSES)
@example(where=MEMORY - 16, control=fw_cfg.READ, length=fw_cfg.MOST, address=0)
def test_any_descriptor_touches_what_it_names_in_ram_and_nothing_else(
    machine: Machine, where: int, control: int, length: int, address: int
) -> None:
    raw = fw_cfg.DESCRIPTOR.pack(control, length, address)
    room = max(0, min(len(raw), MEMORY - where))
    machine.memory.write(where if room else 0, raw[:room])
    before = bytearray(memory_of(machine))
    rom = machine.read_memory(ROM_AT, ROM)
    start_dma(machine, where)
    after = bytearray(memory_of(machine))
    if where + 4 <= MEMORY:
        assert after[where : where + 4] in (bytes(4), fw_cfg.ERROR.to_bytes(4, "big"))
        before[where : where + 4] = after[where : where + 4] = bytes(4)
    if control & fw_cfg.READ and where + 16 <= MEMORY and address + length <= MEMORY:
        before[address : address + length] = after[address : address + length] = bytes(length)
    assert before == after
    assert machine.read_memory(ROM_AT, ROM) == rom
    state = device(machine).save()
    device(machine).check(state)
    device(machine).load(state)
    assert device(machine).save() == state


ACCESS = st.tuples(
    st.booleans(), st.integers(PORT - 2, PORT + 13), st.sampled_from((1, 2, 4)), st.integers(0, (1 << 32) - 1)
)


@SWEEP
@given(accesses=st.lists(ACCESS, max_size=30))
def test_any_port_accesses(machine: Machine, accesses: list[tuple[bool, int, int, int]]) -> None:
    bus = machine.board.bus
    for out, port, size, value in accesses:
        if out:
            bus.port_out(port, size, value & (1 << 8 * size) - 1)
        else:
            assert 0 <= bus.port_in(port, size) < 1 << 8 * size
    device(machine).check(device(machine).save())


STATES = st.builds(
    struct.pack, st.just("<HIIB16s"), KEYS, st.integers(0, 20), st.integers(0, (1 << 32) - 1), st.integers(0, 2),
    st.binary(min_size=16, max_size=16),
)  # fmt: skip


@SWEEP
@given(raw=st.one_of(STATES, st.binary(max_size=40)))
def test_a_state_that_is_taken_comes_out_as_it_was(machine: Machine, raw: bytes) -> None:
    try:
        device(machine).check(raw)
    except VmdeckError:
        return
    device(machine).load(raw)
    assert device(machine).save() == raw
    machine.board.bus.port_in(PORT + 1, 1)
    start_dma(machine, DESCRIPTOR)


def test_a_reset_takes_the_offer_back(machine: Machine) -> None:
    fresh = device(machine).save()
    assert fw_cfg.offered(fresh) is None
    offer(machine, b"any note will do")
    assert fw_cfg.offered(device(machine).save()) == (NOTE, 16)
    machine.reset()
    assert device(machine).save() == fresh


def test_only_a_whole_write_is_an_offer(machine: Machine) -> None:
    raw = struct.pack("<HHIQ", 0, 1, 100, 0x8000)
    assert write_vmcoreinfo(machine, raw) == 0
    assert fw_cfg.offered(device(machine).save()) == (0x8000, 100)
    assert write_vmcoreinfo(machine, raw[:8]) == 0
    assert fw_cfg.offered(device(machine).save()) is None


def test_what_a_device_writes_is_in_the_dirty_log(system: System, tmp_path: Path) -> None:
    """KVM's own log doesn't know of it."""
    with build(system, tmp_path, COUNT, memory=MEMORY) as machine:
        machine.write_memory(DESCRIPTOR, fw_cfg.DESCRIPTOR.pack(select(fw_cfg.SIGNATURE) | fw_cfg.READ, 4, 0x5FFE))
        before = machine.checkpoint()
        memory = memory_of(machine)
        start_dma(machine, DESCRIPTOR)
        assert machine.read_memory(0x5FFE, 4) == b"QEMU"
        after = machine.checkpoint()
        machine.restore(before)
        assert memory_of(machine) == memory
        machine.restore(after)
        assert machine.read_memory(0x5FFE, 4) == b"QEMU"


def test_pages_that_devices_write_while_dirty_pages_are_collected_are_all_found(machine: Machine) -> None:
    """As a first checkpoint collects them while the guest runs on."""
    region = machine.memory.ram[0]
    pages = range(machine.memory.page_count)

    def write() -> None:
        for page in pages:
            machine.dma_write(page * 4096, b"x")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            region.take_marks()
            found: set[int] = set()
            writer = threading.Thread(target=write)
            writer.start()
            while writer.is_alive():
                found |= region.take_marks()
            found |= region.take_marks()
            assert found == set(pages)
    finally:
        sys.setswitchinterval(interval)
