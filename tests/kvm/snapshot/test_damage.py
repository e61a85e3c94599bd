"""Whatever happens to a file: SnapshotError, and the machine as it was."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm.backends.interface import System
from kvm.backends.software.system import SoftwareSystem
from kvm.boot import loader
from kvm.errors import KvmError, MachineError, SnapshotError, VmdeckError
from kvm.machine import Machine, MachineConfig, Phase
from kvm.snapshot import chain, notes
from kvm.snapshot.file import read
from kvm.x86 import layout
from kvm.x86.structs import Regs, pack_msrs
from tests.kvm.fw_cfg import note, offer
from tests.kvm.machines import COUNT, build, until
from tests.kvm.snapshot import heads
from tests.kvm.snapshot.crafted import (
    memory_in,
    memory_of,
    rewritten,
    seal,
    seal_at,
    settled,
    with_device,
    with_substate,
)

MIB = 1 << 20


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small snapshot, with some memory in it and every kind of note."""
    folder = tmp_path_factory.mktemp("small")
    system = SoftwareSystem()
    with build(system, folder, COUNT, memory=MIB) as machine:
        machine.write_memory(0x3000, os.urandom(5000))
        offer(machine, note(b"OSRELEASE=6.18.0\n"))
        machine.save_file(folder / "small.vmdeck", name="small")
    system.close()
    return folder / "small.vmdeck"


@pytest.fixture(scope="module")
def taker(small: Path) -> Iterator[Machine]:
    """A machine that could take it."""
    system = SoftwareSystem()
    with build(system, small.parent, COUNT, memory=MIB) as machine:
        yield machine
    system.close()


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    path = tmp_path / "copy.vmdeck"
    path.write_bytes(small.read_bytes())
    return path


def notes_end(path: Path) -> int:
    with open(path, "rb") as file:
        start = file.read(64 + 56)
    _, _, offset, _, _, size, _, _ = struct.unpack("<IIQQQQQQ", start[64:])
    return int(offset + size)


class Corrupted:
    """One byte of a file wrong, and right again."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR)

    def at(self, offset: int, flip: int) -> Iterator[None]:
        raw = os.pread(self.fd, 1, offset)
        os.pwrite(self.fd, bytes([raw[0] ^ flip]), offset)
        yield
        os.pwrite(self.fd, raw, offset)


def test_every_byte_of_the_headers_and_notes(copy: Path) -> None:
    """And every 61st of the zeros up to the head's end."""
    corrupted, rng = Corrupted(copy), random.Random(1)
    with read(copy) as file:
        size = file.head.size
    end = notes_end(copy)
    assert 8000 < end < size
    for offset in (*range(end), *range(end, size, 61)):
        for _ in corrupted.at(offset, rng.randrange(1, 256)):
            with pytest.raises(SnapshotError):
                read(copy)
    read(copy).close()


@pytest.mark.slow
def test_every_bit_of_the_head(copy: Path) -> None:
    corrupted = Corrupted(copy)
    with read(copy) as file:
        size = file.head.size
    for offset in range(size):
        for bit in range(8):
            for _ in corrupted.at(offset, 1 << bit):
                with pytest.raises(SnapshotError):
                    read(copy)


def test_bytes_of_memory_at_random(copy: Path) -> None:
    """The reader doesn't look at memory, ``verify`` does, to the last byte."""
    corrupted, rng = Corrupted(copy), random.Random(2)
    with read(copy) as file:
        first, last = file.head.size, file.head.file_size - 1
        for offset in (first, last, *(rng.randrange(first, last) for _ in range(200))):
            for _ in corrupted.at(offset, rng.randrange(1, 256)):
                read(copy).close()
                with pytest.raises(SnapshotError, match="doesn't match its checksum"):
                    file.verify()
        file.verify()


def lengths(path: Path) -> list[int]:
    whole, end = path.stat().st_size, notes_end(path)
    return [*range(end + 20), *range(end + 20, whole, 997), *range(whole - 100, whole)]


def check_length(path: Path, length: int) -> None:
    os.truncate(path, length)
    with pytest.raises(SnapshotError):
        read(path)


def test_every_length_of_the_head_and_many_beyond(copy: Path) -> None:
    for length in reversed(lengths(copy)):
        check_length(copy, length)


@pytest.mark.slow
def test_every_length(copy: Path) -> None:
    for length in reversed(range(copy.stat().st_size)):
        check_length(copy, length)


def test_longer_than_it_was_written(copy: Path) -> None:
    with open(copy, "ab") as file:
        file.write(b"\0")
    with pytest.raises(SnapshotError, match="longer"):
        read(copy)


SWEEP = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SWEEP
@given(data=st.data())
def test_a_head_with_a_right_checksum_around_anything(small: Path, data: st.DataObject) -> None:
    """What no accident makes: the checksum was made anew. The decoder itself must stand it."""
    with open(small, "rb") as file:
        raw = bytearray(file.read(64 << 10))
    at, end = seal_at(raw), notes_end(small)
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, end - 1))
        new = data.draw(st.binary(min_size=1, max_size=8))
        raw[place : place + len(new)] = new
    if seal_at(raw) == at:
        raw = bytearray(seal(bytes(raw)))
    try:
        size = notes.head_bytes(bytes(raw), small.stat().st_size)
        head = notes.unpack(bytes(raw[:size].ljust(size, b"\0")))
    except notes.Damaged:
        return
    # What passes has the identity of all it holds: only what isn't of the state can differ.
    with read(small) as file:
        assert head.identity == file.head.identity
        assert head.state == file.head.state


@SWEEP
@given(raw=st.binary(max_size=4096))
def test_anything_at_all(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "any"
    for start in (b"", b"\x7fELF\x02\x01\x01"):
        path.write_bytes(start + raw)
        with pytest.raises(SnapshotError):
            read(path)


@settings(SWEEP, max_examples=100)
@given(
    name=st.sampled_from(("msrs_reset", "tsc_deadline", "cpuid", "xsave", "events", "lapic", "xcrs", "nested", "new")),
    raw=st.binary(max_size=600),
)
def test_a_machine_takes_no_substate_of_another_shape(small: Path, taker: Machine, name: str, raw: bytes) -> None:
    """Through ``fit`` and ``check``: an error, or a struct of the right size."""
    before = taker.save()
    bad = with_substate(small, 0, name, raw)
    try:
        taker.load_file(bad)
    except SnapshotError:
        assert settled(taker.save()) == settled(before)
    finally:
        bad.unlink()


def lying(path: Path) -> dict[str, Path]:
    """Files whose checksums are right and that no machine can take: what each fails on."""
    with read(path) as file:
        sregs = bytearray(file.head.state.vcpus[0]["sregs"])
    sregs[248:256] = (1 << 63).to_bytes(8, "little")  # CR4: only the put itself finds out
    return {
        "the put": with_substate(path, 0, "sregs", bytes(sregs)),
        "a substate's size": with_substate(path, 0, "events", b"short"),
        "a device's state": with_device(path, "cmos", b"short"),
        "a device that isn't there": with_device(path, "nothing", b""),
    }


def test_18_a_failing_load_changes_nothing(system: System, tmp_path: Path) -> None:
    """FACTS 5, bug 18: the file is damaged, or lies."""
    path = tmp_path / "a.vmdeck"
    with build(system, tmp_path, COUNT, memory=MIB) as machine:
        machine.write_memory(0x5000, b"as saved")
        machine.save_file(path)
        machine.write_memory(0x5000, b"as it is")
        machine.step()
        checkpoint = machine.checkpoint("before")
        machine.write_memory(0x6000, b"dirty")
        state, memory, status = machine.save(), memory_of(machine), machine.status
        corrupted, offsets = Corrupted(path), [*range(0, notes_end(path), 331), path.stat().st_size - 1]

        def refused(bad: Path) -> None:
            with pytest.raises(VmdeckError):
                machine.load_file(bad, verify=True)
            assert settled(machine.save()) == settled(state)
            assert memory_of(machine) == memory
            assert machine.status == status

        for bad in lying(path).values():
            refused(bad)
        for offset in offsets:
            for _ in corrupted.at(offset, 0x55):
                refused(path)
        machine.save_file(tmp_path / "after.vmdeck", incremental=True)
        assert memory_in(tmp_path / "after.vmdeck") == memory
        # What was dirty before is dirty still, and the guest runs on from where it was.
        machine.restore(checkpoint)
        assert machine.read_memory(0x5000, 8) + machine.read_memory(0x6000, 5) == b"as it is" + bytes(5)
        machine.run()
        with pytest.raises(VmdeckError):
            machine.load_file(lying(path)["the put"])
        assert machine.status.phase is Phase.RUNNING
        first = rax(machine)
        until(lambda: rax(machine) != first)


def test_18_control_without_a_way_back_half_a_machine_is_left(system: System, tmp_path: Path) -> None:
    """The put that fails above is a real one: ``Machine.load`` alone, which promises less, stops there."""
    path = tmp_path / "a.vmdeck"
    with build(system, tmp_path, COUNT, memory=MIB) as machine:
        machine.save_file(path)
        with chain.open_chain(lying(path)["the put"]) as bad, pytest.raises(KvmError):
            machine.load(bad.state)
        assert machine.status.phase is Phase.STOPPED
        with pytest.raises(MachineError, match="half-way"):
            machine.save()


def rax(machine: Machine) -> int:
    machine.request_samples()
    return Regs.from_buffer_copy(machine.view(0).regs).rax


# Files whose checksums are right, made by somebody who means harm


def refusal(path: Path) -> str:
    with pytest.raises(SnapshotError) as caught:
        chain.open_chain(path).close()
    return str(caught.value)


@pytest.mark.parametrize("name", ["\x1b[31mred", "new\nline", "ünï"])
def test_a_name_that_a_terminal_would_obey_is_refused(small: Path, name: str) -> None:
    for bad in (with_substate(small, 0, name, b"x"), with_device(small, name, b"x")):
        assert refusal(bad).isprintable()


def parts_of(path: Path) -> heads.Parts:
    with open(path, "rb") as file:
        parts = heads.taken_apart(file.read(64 << 10))
    assert parts is not None
    return parts


def child_of(path: Path, parent: str, *extents: tuple[int, int]) -> Path:
    """An incremental file of the same machine that builds on whatever."""
    parts = parts_of(path)
    config = json.loads(parts.first(notes.CONFIG))
    config.update(parent={"identity": "00" * 16, "path": parent}, image=None)
    parts.replace(notes.CONFIG, json.dumps(config).encode())
    parts.extents = list(extents)
    child = path.with_name("child.vmdeck")
    child.unlink(missing_ok=True)
    heads.write(child, heads.put_together(parts))
    return child


@pytest.mark.parametrize("parent", ["\x1b[31mred", "x" * 300, "/" * 5000, "../" * 2000, "small.vmdeck/x"])
def test_a_parent_s_path_may_be_anything(small: Path, parent: str) -> None:
    """It went to the terminal as it was; one that's too long for the file system was no SnapshotError."""
    told = refusal(child_of(small, parent))
    assert "holds only what changed" in told
    assert told.isprintable()


def test_segments_that_are_not_a_machine_s_are_refused(tmp_path: Path) -> None:
    """Half a ROM would be put elsewhere; an image's segments on top of one another would take a reset for ever."""
    (tmp_path / "rom").write_bytes(bytes(64 << 10))
    image = loader.load(tmp_path / "rom", memory=MIB, format="firmware")
    path = tmp_path / "a.vmdeck"
    with closing(SoftwareSystem()) as system, Machine(system, image, MachineConfig(1, MIB)) as machine:
        machine.save_file(path)

    def overlapping(draft: dict[str, Any]) -> None:
        draft["image"] = replace(draft["image"], segments=((0, MIB, 0), (4096, 4096, 0)))

    assert "outside the machine's memory" in refusal(child_of(path, "x", (layout.ROM_END - 4096, 4096)))
    assert "overlap" in refusal(rewritten(path, overlapping))


def test_an_image_s_size_is_not_taken_on_trust(small: Path, taker: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It's read at once, and a file of holes may name any size."""
    monkeypatch.setattr(notes, "MAX_IMAGE", 3)
    assert "too large" in refusal(small)
    with pytest.raises(SnapshotError, match="image has 0 MiB, more than"):
        taker.save_file(small.with_name("other.vmdeck"))


@pytest.mark.parametrize(("name", "raw"), [("tsc_khz", b"x" * 300), ("xcrs", b""), ("lapic", b"short"), ("fpu", b"")])
def test_a_substate_s_size_is_checked_before_it_is_looked_into(small: Path, name: str, raw: bytes) -> None:
    assert f"its {name} of VCPU 0 has {len(raw)} bytes" in refusal(with_substate(small, 0, name, raw))


def own(kind: int, payload: bytes) -> heads.Note:
    return notes.OWNER, kind, payload


def many(kind: int, payload: Callable[[int], bytes], size: int) -> list[heads.Note]:
    """As many notes as go into so many bytes."""
    return [own(kind, payload(number)) for number in range(size // (20 + len(payload(0))))]


def msrs(count: int) -> heads.Note:
    return own(notes.SUBSTATE, bytes(4) + b"msrs".ljust(24, b"\0") + pack_msrs(range(count)))


def which(note: heads.Note) -> tuple[int, bytes]:
    """Type, and the name where there may be several of a type."""
    _, kind, payload = note
    return kind, payload[:28] if kind in (notes.SUBSTATE, notes.DEVICE) else b""


HEAVY: dict[str, Callable[[bytes, int], list[heads.Note]]] = {
    "lists": lambda config, size: [own(notes.CONFIG, config[:-1] + b',"x":[' + b"[]," * (size // 3) + b"0]}")],
    "a name": lambda config, size: [
        own(notes.LABEL, b'{"name":"","note":"","x":[' + b"{}," * (size // 3) + b"0]}")
    ],
    "MSRs": lambda config, size: [msrs(size // 16)],
    "input": lambda config, size: [own(notes.DEVICE, b"uart".ljust(32, b"\0") + bytes(size))],
    "all as large as may be": lambda config, size: [
        *HEAVY["lists"](config, 1000 << 10), *HEAVY["a name"](config, 60 << 10), msrs(4000),
        *HEAVY["input"](config, 1000 << 10), *many(notes.SUBSTATE, lambda n: bytes(4) + b"%024d" % n, 2000),
    ],
    "other tools' notes": lambda config, size: [(b"CORE", 1, bytes(80))] * (size // 100),
    "devices": lambda config, size: many(notes.DEVICE, lambda n: b"%032d" % n, size),
    "substates": lambda config, size: many(notes.SUBSTATE, lambda n: bytes(4) + b"%024d" % n, size),
}  # fmt: skip


@pytest.mark.parametrize(
    ("what", "size"),
    [(what, 2 * MIB) for what in HEAVY][:5] + [pytest.param(what, 56 * MIB, marks=pytest.mark.slow) for what in HEAVY],
)
def test_a_reader_holds_no_more_than_is_stated(
    small: Path, taker: Machine, tmp_path: Path, what: str, size: int
) -> None:
    """FORMAT.md, Reading: four times the head and 32 MiB, whatever its notes are made of."""
    parts = parts_of(small)
    made = HEAVY[what](parts.first(notes.CONFIG), size)
    replaced = {which(note) for note in made}
    parts.notes = [note for note in parts.notes if which(note) not in replaced] + made
    head = heads.put_together(parts)
    path = tmp_path / "heavy.vmdeck"
    heads.write(path, head)
    tracemalloc.start()
    try:
        with suppress(VmdeckError):
            taker.load_file(path, drop=True)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(head) + (32 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("kind", "name"), [(notes.DEVICE, b"%032d"), (notes.SUBSTATE, bytes(4) + b"%024d")])
def test_more_names_than_there_can_be_are_refused(small: Path, kind: int, name: bytes) -> None:
    parts = parts_of(small)
    parts.notes += [own(kind, name % number) for number in range(100)]
    path = small.with_name(f"many {kind}.vmdeck")
    heads.write(path, heads.put_together(parts))
    assert re.search("more than|too many", refusal(path))
