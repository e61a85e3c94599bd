"""The file itself: what is in it, what other people's tools make of it, and what refuses it."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import threading
from pathlib import Path

import pytest

from app import guests
from kvm.backends.interface import System
from kvm.boot import loader
from kvm.errors import SnapshotCancelled, SnapshotError
from kvm.machine import Machine, MachineConfig, Phase
from kvm.snapshot import chain
from kvm.snapshot.file import read
from kvm.snapshot.state import MachineState
from kvm.x86.structs import Regs, Sregs
from tests.kvm.machines import COUNT, build
from tests.kvm.snapshot.crafted import memory_in, memory_of, rewritten, seal_at
from tests.kvm.test_demo_machine import demo

MIB = 1 << 20
SHOWN = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip",
    "eflags", "cs", "ss", "ds", "es", "fs", "gs", "fs_base", "gs_base",
)  # fmt: skip


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} here")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def machine(system: System, tmp_path: Path) -> Machine:
    return build(system, tmp_path, COUNT, vcpus=2, memory=2 * MIB)


def test_what_was_saved_is_read(machine: Machine, tmp_path: Path) -> None:
    with machine:
        machine.write_memory(0x12345, b"in the middle")
        machine.step()
        path = tmp_path / "a.vmdeck"
        written = machine.save_file(path, name="a name", note="ü\n\x1b[31m", why="a test")
        state, memory = machine.save(), memory_of(machine)
        with read(path) as file:
            head = file.head
            assert (head.vcpus, head.memory, head.rom, head.parent) == (2, 2 * MIB, 0, None)
            assert (head.name, head.note, head.why, head.backend) == (
                "a name",
                "ü\n\x1b[31m",
                "a test",
                machine.system.name,
            )
            assert head.identity == written.identity
            assert head.state.vcpus == state.vcpus
            assert head.state.devices == state.devices
            assert head.state.machine.keys() == state.machine.keys()
            file.verify()
        assert memory_in(path) == memory
        with chain.open_chain(path) as opened:
            assert opened.image() == machine.image


def test_zero_pages_are_holes(machine: Machine, tmp_path: Path) -> None:
    with machine:
        machine.write_memory(0x100000, b"x")
        machine.write_memory(0x101000, bytes(4096))
        written = machine.save_file(tmp_path / "a.vmdeck")
        status = (tmp_path / "a.vmdeck").stat()
        assert status.st_size == written.size > 2 * MIB
        assert status.st_blocks * 512 < MIB
        assert status.st_mode & 0o777 == 0o600


def check_in_gdb(path: Path, state: MachineState, memory: dict[int, bytes]) -> None:
    """Every VCPU is a thread with its registers, and at each of the addresses lie these 4 bytes."""
    told = tool(
        "gdb", "-nx", "-batch", "-c", str(path), "-ex", f"thread apply all info registers {' '.join(SHOWN)}",
        *(part for address in memory for part in ("-ex", f"x/4xb {address:#x}")),
    )  # fmt: skip
    threads = dict(re.findall(r"Thread \d+ \(LWP (\d+)\):\n(.*?)(?=\n\n|\Z)", told, re.DOTALL))
    assert set(threads) == {str(number + 1) for number in range(len(state.vcpus))}
    for index, copy in enumerate(state.vcpus):
        regs, sregs = Regs.from_buffer_copy(copy["regs"]), Sregs.from_buffer_copy(copy["sregs"])
        shown = {
            name: int(value, 0)
            for name, value in re.findall(r"^(\w+) +(0x[0-9a-f]+|\d+)", threads[str(index + 1)], re.MULTILINE)
        }
        for name in SHOWN[:17]:
            assert shown[name] == getattr(regs, name), (index, name)
        for name in SHOWN[18:24]:
            assert shown[name] == getattr(sregs, name).selector, (index, name)
        assert shown["eflags"] == regs.rflags
        assert (shown["fs_base"], shown["gs_base"]) == (sregs.fs.base, sregs.gs.base)
    for address, expected in memory.items():
        (line,) = re.findall(rf"^{address:#x}:(.*)$", told, re.MULTILINE)
        assert bytes(int(byte, 16) for byte in line.split()) == expected


def check_in_drgn(path: Path, state: MachineState, memory: dict[int, bytes]) -> None:
    """The same."""
    drgn = pytest.importorskip("drgn")
    program = drgn.Program()
    program.set_core_dump(str(path))
    threads = {thread.tid: thread.stack_trace()[0].registers() for thread in program.threads()}
    assert set(threads) == {number + 1 for number in range(len(state.vcpus))}
    for index, copy in enumerate(state.vcpus):
        regs = Regs.from_buffer_copy(copy["regs"])
        for name in ("rax", "rdx", "rsp", "rip"):
            assert threads[index + 1][name] == getattr(regs, name)
    for address, expected in memory.items():
        assert program.read(address, 4) == expected


@pytest.mark.parametrize("vcpus", [1, 3])
def test_debuggers_show_every_vcpu_as_a_thread_and_memory_at_its_address(
    system: System, tmp_path: Path, vcpus: int
) -> None:
    with demo(system, guests.demo(), vcpus) as machine:
        for _ in range(20):
            machine.step(0)
        for index in range(vcpus):
            machine.edit(index, "r12", 0x1212_0000_0000_0000 + index)
            machine.edit(index, "gs.base", 0x4321_0000 + index)
        machine.write_memory(0x1FFFFFC, b"\xde\xad\xbe\xef")
        machine.save_file(tmp_path / "a.vmdeck")
        memory = {address: machine.read_memory(address, 4) for address in (0x100000, 0x1FFFFFC, 0x1800000)}
        check_in_gdb(tmp_path / "a.vmdeck", machine.save(), memory)
        check_in_drgn(tmp_path / "a.vmdeck", machine.save(), memory)


@pytest.mark.parametrize("format", ["flat16", "flat32", "flat64"])
def test_debuggers_open_a_flattened_chain_of_a_guest_in_any_mode(system: System, tmp_path: Path, format: str) -> None:
    """By the files' last generation, not the one that has all memory."""
    with build(system, tmp_path, COUNT, vcpus=2, memory=4 * MIB, format=format) as machine:
        for number in range(3):
            machine.step(0)
            machine.edit(1, "rdx", 0xD0 + number)
            machine.edit(1, "fs.base", 0xF000 * number)
            machine.write_memory(0x3FFFFC, bytes([number] * 4))
            machine.write_memory(0x200000 + number * 4096, b"here")
            machine.save_file(tmp_path / str(number), incremental=number > 0)
        chain.flatten(tmp_path / "2", tmp_path / "flat")
        memory = {at: machine.read_memory(at, 4) for at in (0x1000, 0x100000, 0x200000, 0x202000, 0x3FFFFC)}
        assert memory[0x3FFFFC] == b"\2\2\2\2"
        check_in_gdb(tmp_path / "flat", machine.save(), memory)
        check_in_drgn(tmp_path / "flat", machine.save(), memory)


def test_readelf_finds_the_notes_of_every_vcpu_and_memory_where_it_is(machine: Machine, tmp_path: Path) -> None:
    with machine:
        path = tmp_path / "a.vmdeck"
        machine.save_file(path)
        notes = tool("readelf", "-nW", str(path))
        assert notes.count("NT_PRSTATUS") == notes.count("NT_FPREGSET") == 2
        assert len(re.findall(r"^ +QEMU +0x000001b8", notes, re.MULTILINE)) == 2
        segments = tool("readelf", "-lW", str(path))
        assert re.search(r"LOAD +0x010000 0x0+ 0x0+ 0x200000 0x200000 RWE", segments), segments


def test_the_offsets_in_the_document_hold(machine: Machine, tmp_path: Path) -> None:
    with machine:
        path = tmp_path / "a.vmdeck"
        written = machine.save_file(path)
        raw = path.read_bytes()
        at = seal_at(raw)
        version, flags, head, size, chunk, identity = struct.unpack_from("<IIQQQ16s", raw, at + 20)
        assert (version, flags, size, chunk, identity) == (1, 0, len(raw), MIB, written.identity)
        assert head % 65536 == 0
        regs = Regs.from_buffer_copy(machine.save().vcpus[1]["regs"])
        second = raw.index(b"CORE\0\0\0\0", raw.index(b"CORE\0\0\0\0", raw.index(b"CORE\0\0\0\0") + 1) + 1) + 8
        (pid,) = struct.unpack_from("<i", raw, second + 32)
        (rip,) = struct.unpack_from("<Q", raw, second + 112 + 16 * 8)
        assert (pid, rip) == (2, regs.rip)


def test_an_other_version_is_refused_by_its_number(machine: Machine, tmp_path: Path) -> None:
    with machine:
        path = tmp_path / "a.vmdeck"
        machine.save_file(path)
        raw = bytearray(path.read_bytes())
        raw[seal_at(raw) + 20] = 7
        path.write_bytes(raw)
        with pytest.raises(SnapshotError, match="version 7, this vmdeck knows version 1"):
            read(path)


@pytest.mark.parametrize(
    ("what", "says"),
    [("nothing", "No such file"), ("directory", "regular file"), ("fifo", "regular file"), ("empty", "empty"),
     ("text", "ELF"), ("program", "ELF header"), ("NUL", "null byte")],
)  # fmt: skip
def test_what_is_no_snapshot_says_so(tmp_path: Path, what: str, says: str) -> None:
    path = tmp_path / ("a\0b" if what == "NUL" else what)
    match what:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "empty":
            path.touch()
        case "text":
            path.write_text("hello " * 100)
        case "program":
            path.write_bytes(guests.demo().read_bytes())
    with pytest.raises(SnapshotError, match=says):
        read(path)


def test_cancelling_leaves_the_old_file_and_nothing_else(machine: Machine, tmp_path: Path) -> None:
    with machine:
        folder = tmp_path / "saves"
        folder.mkdir()
        path = folder / "a.vmdeck"
        machine.save_file(path, name="old")
        before = path.read_bytes()
        machine.write_memory(0x100000, b"new")
        cancel = threading.Event()
        told: list[tuple[int, int]] = []

        def progress(done: int, total: int) -> None:
            told.append((done, total))
            cancel.set()

        with pytest.raises(SnapshotCancelled):
            machine.save_file(path, progress=progress, cancel=cancel)
        assert told
        assert all(done <= total for done, total in told)
        assert path.read_bytes() == before
        assert list(folder.iterdir()) == [path]


def test_it_goes_where_a_link_points(machine: Machine, tmp_path: Path) -> None:
    with machine:
        machine.save_file(tmp_path / "real")
        (tmp_path / "link").symlink_to("real")
        machine.save_file(tmp_path / "link", name="second")
        assert (tmp_path / "link").is_symlink()
        with read(tmp_path / "real") as file:
            assert file.head.name == "second"


@pytest.mark.parametrize(
    ("where", "advice"),
    [("", ""), ("nowhere/a", "no such folder: make it"), ("folder", ""), ("fifo", ""), ("fifo/a", "is a file: choose")],
)
def test_where_no_file_can_go_is_an_error(machine: Machine, tmp_path: Path, where: str, advice: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with machine, pytest.raises(SnapshotError, match=f"Can't write .*{advice}"):
        machine.save_file(tmp_path / where if where else Path("/proc/self/x"))


def test_a_broken_configuration_never_gets_past_the_reader(machine: Machine, tmp_path: Path) -> None:
    with machine:
        machine.save_file(tmp_path / "a.vmdeck")
    for key, value in (
        ("vcpus", 0), ("vcpus", 1), ("vcpus", 10**9), ("vcpus", True), ("memory", 0), ("memory", 2 * MIB + 1),
        ("memory", 4 * MIB), ("rom", 4096), ("rom", -4096), ("taken", float("nan")), ("taken", "now"), ("image", None),
        ("extents", ()), ("extents", ((0, MIB), (MIB, MIB))), ("name", 3),
    ):  # fmt: skip
        bad = rewritten(tmp_path / "a.vmdeck", lambda draft, key=key, value=value: draft.update({key: value}))  # type: ignore[misc]
        with pytest.raises(SnapshotError):
            read(bad)


def test_a_machine_from_a_file_runs_on_and_resets(system: System, tmp_path: Path) -> None:
    image = loader.load(guests.demo(), memory=4 * MIB)
    with Machine(system, image, MachineConfig(1, 4 * MIB)) as machine:
        machine.run()
        machine.save_file(tmp_path / "a.vmdeck")
    restored, losses = Machine.from_file(system, tmp_path / "a.vmdeck", verify=True)
    with restored:
        assert losses == ()
        assert restored.status.phase is Phase.PAUSED
        restored.reset()
        console = restored.board.serial_console
        restored.run()
        assert console.wait(console.total, 20)
