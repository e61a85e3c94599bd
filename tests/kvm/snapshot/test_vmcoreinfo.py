"""The VMCOREINFO note: what a guest offers through fw_cfg is found by other people's tools, nonsense is left out."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm.backends.interface import System
from kvm.boot import loader
from kvm.devices import fw_cfg
from kvm.errors import SnapshotError, VmdeckError
from kvm.machine import Machine, MachineConfig, Phase
from kvm.snapshot import chain, core, vmcoreinfo
from kvm.snapshot.contents import Contents
from kvm.snapshot.state import MachineState
from kvm.x86 import layout
from tests.kvm.contract.lab import assembled
from tests.kvm.fw_cfg import NOTE, note, offer, write_vmcoreinfo
from tests.kvm.machines import COUNT, build
from tests.kvm.snapshot.crafted import memory_in, memory_of, with_device, without_device
from tests.kvm.snapshot.test_file import tool

GUEST = Path(__file__).parents[2] / "guests" / "vmcoreinfo64.S"
MIB = 1 << 20
TEXT = b"OSRELEASE=6.18.0\nPAGESIZE=4096\n" + b"X" * 5000 + b"=1\n"
"""More than a page."""


def in_file(path: Path) -> list[bytes]:
    """What the VMCOREINFO notes of a core hold, found as any reader of ELF files would."""
    raw = path.read_bytes()[: 1 << 20]
    count = core.EHDR.unpack_from(raw)[10]
    assert count
    _, _, offset, _, _, size, *_ = core.PHDR.unpack_from(raw, core.EHDR.size)
    return [text for owner, kind, text in core.notes(raw[offset : offset + size]) if owner == b"VMCOREINFO"]


def state_of(machine: Machine) -> bytes:
    return machine.save().devices[fw_cfg.NAME]


@pytest.fixture
def machine(system: System, tmp_path: Path) -> Iterator[Machine]:
    with build(system, tmp_path, COUNT, memory=MIB) as made:
        yield made


def test_readelf_and_drgn_find_what_a_guest_offers_as_linux_does(system: System, tmp_path: Path) -> None:
    flat, path = tmp_path / "guest", tmp_path / "a.vmdeck"
    flat.write_bytes(assembled(GUEST, tmp_path))
    image = loader.load(flat, memory=4 * MIB, format="flat64")
    with Machine(system, image, MachineConfig(1, 4 * MIB)) as machine:
        machine.save_file(path)
        assert in_file(path) == []
        machine.run()
        assert machine.wait(Phase.EXITED, Phase.STOPPED, timeout=20).code == 0
        machine.save_file(path)
        code = machine.read_memory(0x100000, 4)
    (text,) = in_file(path)
    assert text.startswith(b"OSRELEASE=6.18.0-vmdeck\n")
    assert text.endswith(b"KERNELOFFSET=0\n")
    shown = tool("readelf", "-nW", str(path))
    (size, data) = re.findall(r"^ +VMCOREINFO +(0x[0-9a-f]+).*description data: ([0-9a-f ]+)", shown, re.MULTILINE)[0]
    assert (int(size, 16), bytes.fromhex(data)) == (len(text), text)
    drgn = pytest.importorskip("drgn")
    program = drgn.Program()
    program.set_core_dump(str(path))
    assert program.flags & drgn.ProgramFlags.IS_LINUX_KERNEL
    assert program["VMCOREINFO"].string_() == text
    assert program.read(0x100000, 4, physical=True) == code


def test_it_is_in_every_file_that_comes_of_the_machine(machine: Machine, tmp_path: Path) -> None:
    """Of the memory as it was saved: a chain's, a flattened one's, a renamed one's, and of a machine from a file."""
    machine.save_file(tmp_path / "0")
    offer(machine, note(TEXT))
    machine.save_file(tmp_path / "1", incremental=True)
    machine.write_memory(MIB - 4096, b"far from the note")
    machine.save_file(tmp_path / "2", incremental=True)
    machine.write_memory(NOTE + 24, b"osrelease")
    machine.save_file(tmp_path / "3", incremental=True)
    chain.flatten(tmp_path / "2", tmp_path / "flat")
    chain.relabel(tmp_path / "2", "another", "name")
    chain.relabel(tmp_path / "flat", "another", "name")
    assert in_file(tmp_path / "0") == []
    assert in_file(tmp_path / "1") == in_file(tmp_path / "2") == in_file(tmp_path / "flat") == [TEXT]
    assert in_file(tmp_path / "3") == [b"osrelease" + TEXT[9:]]
    machine.load_file(tmp_path / "flat")
    machine.save_file(tmp_path / "again")
    assert in_file(tmp_path / "again") == [TEXT]


def test_what_the_guest_writes_while_it_is_saved_is_not_in_it(machine: Machine, tmp_path: Path) -> None:
    offer(machine, note(TEXT))
    machine.save_file(tmp_path / "a", taken=lambda: machine.write_memory(NOTE, bytes(6000)))
    assert in_file(tmp_path / "a") == [TEXT]


def test_the_offer_goes_with_checkpoints_and_files_and_ends_with_a_reset(machine: Machine, tmp_path: Path) -> None:
    fresh = state_of(machine)
    offer(machine, note(TEXT))
    machine.board.bus.port_out(0x514, 4, 0x12345678)
    machine.board.bus.port_out(0x510, 2, fw_cfg.SIGNATURE)
    machine.board.bus.port_in(0x511, 1)
    before, offered = machine.checkpoint(), state_of(machine)
    machine.save_file(tmp_path / "a")
    machine.reset()
    assert state_of(machine) == fresh
    machine.restore(before)
    assert state_of(machine) == offered
    assert machine.board.bus.port_in(0x511, 1) == ord("E")
    machine.reset()
    machine.load_file(tmp_path / "a")
    assert state_of(machine) == offered


WELL = note(TEXT)
NONSENSE = {
    "no size": {"size": 0}, "less than a note's header": {"size": 11}, "4 GiB": {"size": (1 << 32) - 1},
    "more than QEMU takes": {"size": MIB + 1}, "all of memory from 0 on": {"size": MIB, "address": 0},
    "behind memory": {"address": MIB}, "the end of memory": {"address": MIB - 20},
    "nowhere at all": {"address": (1 << 64) - 1}, "the ROM's place": {"address": layout.ROM_END - 4096},
    "shorter than its note": {"size": len(WELL) - 4}, "another format": {"format": 2}, "no format": {"format": 0},
    "zeros": {"note": bytes(100)}, "ones": {"note": b"\xff" * 100},
    "another's note": {"note": core.note(b"CORE", 0, TEXT)},
    "another type": {"note": core.note(b"VMCOREINFO", 1, TEXT)}, "no text": {"note": note(b"")},
    "a name that goes on": {"note": core.note(b"VMCOREINFOS", 0, TEXT)},
}  # fmt: skip


def test_nonsense_is_left_out_and_the_file_written(machine: Machine, tmp_path: Path) -> None:
    offer(machine, WELL)
    machine.save_file(tmp_path / "a")
    assert in_file(tmp_path / "a") == [TEXT]
    for what, lie in NONSENSE.items():
        offer(machine, **{"note": WELL, **lie})
        machine.save_file(tmp_path / "a")
        assert in_file(tmp_path / "a") == [], what
    assert write_vmcoreinfo(machine, struct.pack("<HHI", 0, 1, len(WELL))) == 0  # half of it
    machine.save_file(tmp_path / "a")
    assert in_file(tmp_path / "a") == []
    machine.load_file(tmp_path / "a", verify=True)


def contents(memory: int, raw: dict[int, bytes]) -> Contents:
    """RAM of ``memory`` bytes with these at their places, counted through all of it."""
    pages = np.zeros((memory // 4096, 4096), np.uint8)
    flat = pages.reshape(-1)
    for at, data in raw.items():
        flat[at : at + len(data)] = np.frombuffer(data, np.uint8)
    return Contents(np.arange(len(pages)), {0: pages})


def offering(size: int, address: int, *, whole: bool = True) -> MachineState:
    state = struct.pack("<HIIBHHIQ", 0, 0, 0, whole, 0, 1, size, address)
    return MachineState((), {}, {fw_cfg.NAME: state})


def test_it_may_lie_above_the_mmio_hole_but_not_across_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MMIO_HOLE", MIB)
    high = layout.HIGH_RAM + 4096 - 8
    there = contents(2 * MIB, {MIB + 4096 - 8: WELL, MIB - 8: note(b"x" * 4)})
    assert vmcoreinfo.offered(offering(len(WELL), high), there, 2 * MIB) == TEXT
    assert vmcoreinfo.offered(offering(28, MIB - 8), there, 2 * MIB) == b""
    assert vmcoreinfo.offered(offering(28, layout.HIGH_RAM - 8), there, 2 * MIB) == b""
    assert vmcoreinfo.offered(offering(len(WELL), high, whole=False), there, 2 * MIB) == b""


@settings(max_examples=200, deadline=None)
@given(
    size=st.one_of(st.integers(12, 200), st.integers(0, (1 << 32) - 1)),
    address=st.one_of(st.integers(0, 4 * 4096), st.integers(0, (1 << 64) - 1)),
    header=st.one_of(
        st.builds(struct.pack, st.just("<III"), *[st.integers(0, 40)] * 3), st.binary(min_size=12, max_size=12)
    ),
    name=st.one_of(st.just(b"VMCOREINFO\0"), st.binary(max_size=20)),
)
def test_any_place_and_any_note(size: int, address: int, header: bytes, name: bytes) -> None:
    there = contents(4 * 4096, {min(address, 3 * 4096): header + name})
    found = vmcoreinfo.offered(offering(size, address), there, 4 * 4096)
    assert len(found) <= max(size - 24, 0)


# Files from before there was a fw_cfg


def test_a_file_from_before_there_was_a_fw_cfg(machine: Machine, system: System, tmp_path: Path) -> None:
    fresh = state_of(machine)
    machine.write_memory(0x9000, b"as saved")
    machine.save_file(tmp_path / "new")
    old, memory = without_device(tmp_path / "new", fw_cfg.NAME), memory_of(machine)
    offer(machine, note(TEXT))
    assert machine.load_file(old) == ()
    assert state_of(machine) == fresh
    assert memory_of(machine) == memory
    machine.save_file(tmp_path / "child", incremental=True)
    assert memory_in(tmp_path / "child") == memory
    for path in (old, tmp_path / "child"):
        opened, losses = Machine.from_file(system, path)
        with opened:
            assert losses == ()
            assert state_of(opened) == fresh
            assert opened.read_memory(0x9000, 8) == b"as saved"
    chain.flatten(old, tmp_path / "flat")
    machine.load_file(tmp_path / "flat")


def test_a_device_that_the_machine_lacks_is_still_refused(machine: Machine, tmp_path: Path) -> None:
    offer(machine, note(TEXT))
    machine.save_file(tmp_path / "a")
    before = state_of(machine)
    later = with_device(without_device(tmp_path / "a", fw_cfg.NAME), "fw_cfg_2", b"")
    with pytest.raises(VmdeckError, match="fw_cfg_2"):
        machine.load_file(later)
    for raw in (
        b"",
        before + b"\0",
        struct.pack("<HIIB16s", 0, 5, 0, 0, b""),
        struct.pack("<HIIB16s", 0, 0, 0, 2, b""),
    ):
        with pytest.raises(VmdeckError, match="device fw_cfg is damaged"):
            machine.load_file(with_device(tmp_path / "a", fw_cfg.NAME, raw))
    assert state_of(machine) == before


def test_a_damaged_vmcoreinfo_note_is_a_damaged_file(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "a"
    offer(machine, note(TEXT))
    machine.save_file(path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"VMCOREINFO") + 30] ^= 1
    path.write_bytes(raw)
    with pytest.raises(SnapshotError, match="checksum"):
        machine.load_file(path)
