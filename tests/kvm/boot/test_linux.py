"""Linux bzImages: what is read from the header, where things go, and what the kernel is told in boot_params."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm.backends.interface import System
from kvm.boot import linux
from kvm.boot.entry import LongMode, ProtectedMode
from kvm.boot.image import BootImage, Source
from kvm.boot.linux import Header, load_linux
from kvm.boot.loader import detect, load
from kvm.errors import ImageError
from kvm.machine import Machine, MachineConfig, Phase
from kvm.x86 import layout
from tests.guests.assemble import BinutilsMissing, assemble
from tests.kvm.boot.bzimage import MIB, BzImage
from tests.kvm.boot.images import ElfImage

MEMORY = 64 * MIB
PARAMS = layout.LINUX_BOOT_PARAMS
GUEST = Path(__file__).parents[2] / "guests" / "linux.S"
LIMIT = 20.0


def loaded(image: BzImage | bytes, memory: int = MEMORY, **how: object) -> BootImage:
    data = image if isinstance(image, bytes) else image.build()
    return load_linux(Source("bzImage", data, memory, None, **how))  # type: ignore[arg-type]


def memory_of(image: BootImage, size: int = MEMORY) -> bytes:
    memory = bytearray(size)
    for segment in image.segments:
        memory[segment.address : segment.address + segment.size] = segment.data.ljust(segment.size, b"\0")
    return bytes(memory)


def u32(memory: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", memory, at)[0])


# Where things go


def test_a_relocatable_kernel_goes_where_it_likes_to_be_and_is_entered_in_64_bit_mode() -> None:
    code = os.urandom(4096)
    image = loaded(BzImage(code=code))
    memory = memory_of(image)
    assert memory[16 * MIB : 16 * MIB + 4096] == code
    assert image.entry == LongMode(16 * MIB + 0x200, rsi=PARAMS, code=0x10, data=0x18)
    assert u32(memory, PARAMS + 0x214) == 16 * MIB
    assert image.format == "linux"


@pytest.mark.parametrize(
    "kernel",
    [BzImage(relocatable=0), BzImage(pref_address=0), BzImage(version=0x209)],
    ids=["not relocatable", "no wish", "before pref_address"],
)
def test_others_go_to_1_mib(kernel: BzImage) -> None:
    image = loaded(kernel)
    assert memory_of(image)[MIB : MIB + 0x400] == kernel.code
    assert u32(memory_of(image), PARAMS + 0x214) == MIB


@pytest.mark.parametrize("kernel", [BzImage(xloadflags=0), BzImage(version=0x20B), BzImage(version=0x206)])
def test_a_kernel_without_a_64_bit_entry_is_entered_in_32_bit_mode(kernel: BzImage) -> None:
    image = loaded(kernel)
    start = 16 * MIB if kernel.version >= 0x20A else MIB
    assert image.entry == ProtectedMode(start, esi=PARAMS, code=0x10, data=0x18)


def test_what_follows_the_kernel_is_left_out() -> None:
    image = loaded(BzImage(after=b"signature" * 100))
    assert b"signature" not in memory_of(image)


def test_no_setup_sectors_means_four() -> None:
    assert memory_of(loaded(BzImage(setup_sects=0)))[16 * MIB : 16 * MIB + 0x400] == BzImage().code


@pytest.mark.parametrize(
    ("kernel", "memory", "end"),
    [
        (BzImage(), MEMORY, MEMORY),
        (BzImage(initrd_addr_max=0x2FF_FFFF), MEMORY, 48 * MIB),
        (BzImage(initrd_addr_max=0x37FF_FFFF), 4096 * MIB, 0x3800_0000),
        (BzImage(initrd_addr_max=0xFFFF_FFFF), 4096 * MIB, layout.MMIO_HOLE),
    ],
)
def test_the_initrd_goes_as_high_as_it_may(kernel: BzImage, memory: int, end: int) -> None:
    initrd = os.urandom(5000)
    part = loaded(kernel, memory, initrd=initrd).segments[-1]
    assert (part.address, part.data) == (end - 0x2000, initrd)


def test_the_last_address_of_an_initrd_is_one_that_it_may_use() -> None:
    assert loaded(BzImage(initrd_addr_max=0x2FF_FFFF), initrd=bytes(0x1000)).segments[-1].address == 0x2FF_F000


def test_a_kernel_moves_itself_to_where_its_alignment_allows() -> None:
    room = Header.of(BzImage(pref_address=0).build()).room
    assert (room.address, room.end) == (MIB, 2 * MIB + 4 * MIB)
    room = Header.of(BzImage(relocatable=0).build()).room
    assert (room.address, room.end) == (MIB, 20 * MIB)


def test_an_initrd_that_just_fits() -> None:
    room = MEMORY - 20 * MIB
    assert loaded(BzImage(), initrd=bytes(room)).segments[-1].address == 20 * MIB
    with pytest.raises(ImageError, match=r"initrd of 44 MiB doesn't fit.*up to 20 MiB, and 64 MiB.*--memory"):
        loaded(BzImage(), initrd=bytes(room + 1))
    with pytest.raises(ImageError, match=r"the end of what may hold one\. Make the initrd smaller"):
        loaded(BzImage(initrd_addr_max=30 * MIB - 1), initrd=bytes(11 * MIB))


# What the kernel is told


@pytest.mark.parametrize("size", [MEMORY, 6 << 30])
def test_boot_params(size: int) -> None:
    file = bytearray(BzImage().build())
    file[0x202 + 0x6A : 0x400] = b"\xaa" * (0x400 - 0x202 - 0x6A)  # code of the real-mode part
    image = loaded(bytes(file), size, initrd=b"initrd", command_line="root=/dev/ram0 quiet")
    memory = memory_of(image.__class__(image.path, image.format, image.segments[:-1], b"", image.entry))
    params = memory[PARAMS : PARAMS + 0x1000]
    untouched = [(0x1F1, 0x210), (0x211, 0x214), (0x220, 0x228), (0x22C, 0x202 + 0x6A)]
    assert all(params[start:end] == file[start:end] for start, end in untouched)
    assert params[0x210] == 0xFF
    assert params[0x1EF] == 0, "the sentinel says that the rest was zeroed"
    assert not any(params[0x202 + 0x6A : 0x2D0])
    assert (u32(params, 0x218), u32(params, 0x21C)) == (image.segments[-1].address, 6)
    at = u32(params, 0x228)
    assert memory[at : memory.index(0, at)] == b"root=/dev/ram0 quiet"
    assert struct.unpack_from("<Q", params, 0x70) == (layout.ACPI_TABLES,)
    ranges = [struct.unpack_from("<QQI", params, 0x2D0 + 20 * number) for number in range(params[0x1E8])]
    assert all(a + n <= b for (a, n, _), (b, _, _) in pairwise(ranges))
    usable = sum(n for _, n, kind in ranges if kind == 1)
    assert usable == size - layout.MIB + layout.LOW_RAM_END
    assert any(a <= layout.ACPI_TABLES < a + n and kind == 2 for a, n, kind in ranges)


def test_a_longer_header_than_there_is_room_for_is_cut_off() -> None:
    file = bytearray(BzImage(jump=0xFF).build())
    file[0x268:0x400] = b"\xaa" * (0x400 - 0x268)
    params = memory_of(loaded(bytes(file)))[PARAMS : PARAMS + 0x1000]
    assert params[0x268:0x2D0] == b"\xaa" * (0x290 - 0x268) + bytes(0x40)


def test_without_wishes_it_prints_on_the_serial_line() -> None:
    memory = memory_of(loaded(BzImage()))
    at = u32(memory, PARAMS + 0x228)
    assert memory[at : memory.index(0, at)] == linux.COMMAND_LINE.encode()
    assert (u32(memory, PARAMS + 0x218), u32(memory, PARAMS + 0x21C)) == (0, 0)


def test_an_empty_command_line_is_one() -> None:
    memory = memory_of(loaded(BzImage(), command_line=""))
    assert memory[u32(memory, PARAMS + 0x228)] == 0


# What is refused


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (ElfImage().build(), "HdrS.*--format"),
        (BzImage().build()[:0x240], "cut off after 576 bytes, within its setup header"),
        (BzImage().build()[:-1], r"cut off: its header speaks of 1024 bytes of kernel, 1023 are there"),
        (BzImage().build()[:0x300], "1024 bytes of kernel, 0 are there"),
        (BzImage(syssize=0).build(), "cut off"),
        (BzImage(version=0x205).build(), r"version 2\.05 of the boot protocol, older than 2\.06"),
        (BzImage(loadflags=0).build(), "zImage"),
        (BzImage(alignment=3).build(), "no power of two"),
        (BzImage(alignment=0).build(), "no power of two"),
        (BzImage(init_size=49 * MIB).build(), r"memory up to 65 MiB, the guest has 64 MiB.*--memory 256M"),
        (BzImage(pref_address=1 << 40).build(), "devices begin at 3072 MiB"),
    ],
)
def test_what_cannot_be_loaded(data: bytes, why: str) -> None:
    with pytest.raises(ImageError, match=why):
        loaded(data)


@pytest.mark.parametrize(("most", "room"), [(10, 10), (1 << 20, 0x4FFF)])
def test_a_command_line_that_is_too_long(most: int, room: int) -> None:
    loaded(BzImage(cmdline_size=most), command_line="x" * room)
    with pytest.raises(ImageError, match=f"would have {room + 1} bytes, it takes {room}. Shorten --append"):
        loaded(BzImage(cmdline_size=most), command_line="x" * (room + 1))


def test_a_command_line_with_a_nul() -> None:
    with pytest.raises(ImageError, match="NUL"):
        loaded(BzImage(), command_line="quiet\0")


@settings(max_examples=300)
@given(
    st.integers(0, 0xFFFF), st.integers(0, 255), st.integers(0, 255), st.integers(0, 255),
    st.lists(st.one_of(st.integers(0, 1 << 26), st.integers(0, (1 << 32) - 1)), min_size=6, max_size=6),
    st.one_of(st.integers(0, 1 << 26), st.integers(0, (1 << 64) - 1)), st.integers(0, 8 * MIB),
    st.sampled_from([MIB, MEMORY, 6 << 30]),
)  # fmt: skip
def test_any_header_loads_within_memory_or_is_refused(
    version: int, sectors: int, jump: int, flags: int, words: list[int], preferred: int, initrd: int, memory: int
) -> None:
    top, alignment, cmdline, init_size, syssize, xloadflags = words
    kernel = BzImage(
        version=version, setup_sects=sectors, jump=jump, loadflags=flags | 1, initrd_addr_max=top, alignment=alignment,
        relocatable=flags & 2, cmdline_size=cmdline, init_size=init_size, syssize=syssize if syssize & 1 else None,
        xloadflags=xloadflags & 0xFFFF, pref_address=preferred,
    )  # fmt: skip
    try:
        image = loaded(kernel, memory, initrd=bytes(initrd) or None)
    except ImageError:
        return
    places = sorted((part.address, part.address + part.size) for part in image.segments)
    assert all(end <= start for (_, end), (start, _) in pairwise(places))
    assert all(any(a <= start and end <= a + n for a, n in layout.ram(memory)) for start, end in places)
    params = next(part.data for part in image.segments if part.address == PARAMS)
    assert len(params) == 0x1000
    assert params[0x1E8] >= 4
    if initrd:
        assert image.segments[-1].address + initrd <= top + 1 or version < 0x203


# Through the front door


def test_it_is_told_apart_by_looking(tmp_path: Path) -> None:
    data = BzImage(code=bytes(0x7FF0 - 5 * 512) + b"\xea" * 16).build()
    assert len(data) % 4096 == 0
    assert detect(Source("x", data, MEMORY, None)) == "linux", "not firmware, though its end looks like that"


def test_an_initrd_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "bzImage"
    file.write_bytes(BzImage().build())
    with pytest.raises(ImageError, match="initrd: No such file"):
        load(file, memory=MEMORY, initrd=tmp_path / "initrd")


@pytest.mark.parametrize("wish", [{"initrd": "initrd"}, {"command_line": "quiet"}])
def test_other_formats_take_neither_initrd_nor_command_line(tmp_path: Path, wish: dict[str, str]) -> None:
    file = tmp_path / "kernel"
    file.write_bytes(ElfImage().build())
    with pytest.raises(ImageError, match="format elf takes no initrd and no command line"):
        load(file, memory=MEMORY, **wish)  # type: ignore[arg-type]


def test_debians_kernel() -> None:
    """The package's own, if somebody has it: apt-get download linux-image-cloud-amd64's, or VMDECK_LINUX."""
    named = os.environ.get("VMDECK_LINUX", "")
    found = [Path(named)] if named else sorted(Path("/boot").glob("vmlinuz-*-amd64"))
    if not found:
        pytest.skip("needs a Linux kernel: VMDECK_LINUX=path/to/bzImage, or Debian's package linux-image-amd64")
    path = found[-1]
    image = load(path, memory=256 * MIB, command_line="quiet")
    header = Header.of(path.read_bytes())
    assert header.entry64
    assert header.relocatable
    assert header.version >= 0x20D
    assert image.entry == LongMode(16 * MIB + 0x200, rsi=PARAMS, code=0x10, data=0x18)
    if file := shutil.which("file"):
        said = subprocess.run([file, "-b", str(path)], capture_output=True, text=True, check=True).stdout
        assert "bzImage" in said


# Entered for real


@pytest.fixture(scope="module")
def kernel() -> BzImage:
    try:
        return BzImage(code=assemble(GUEST, base=0, format="bin"))
    except BinutilsMissing as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("bits", [32, 64])
def test_a_kernel_finds_what_it_was_promised(system: System, tmp_path: Path, kernel: BzImage, bits: int) -> None:
    file, initrd = tmp_path / "bzImage", tmp_path / "initrd"
    file.write_bytes(kernel.but(xloadflags=bits // 64).build())
    initrd.write_bytes(b"what the initrd holds")
    image = load(file, memory=MEMORY, initrd=initrd, command_line="console=ttyS0 quiet")
    with Machine(system, image, MachineConfig(memory=MEMORY)) as machine:
        assert run(machine) == (64, b"console=ttyS0 quiet\nwhat the initrd holds")


def test_reset_and_a_snapshot_file_bring_the_kernel_back(system: System, tmp_path: Path, kernel: BzImage) -> None:
    file, initrd, saved = tmp_path / "bzImage", tmp_path / "initrd", tmp_path / "machine"
    file.write_bytes(kernel.build())
    initrd.write_bytes(b"what the initrd holds")
    image = load(file, memory=MEMORY, initrd=initrd, command_line="x")
    spoilt = (layout.BOOT_GDT, PARAMS, layout.LINUX_COMMAND_LINE, layout.ACPI_TABLES, 16 * MIB + 0x200, MEMORY - 0x1000)
    with Machine(system, image, MachineConfig(memory=MEMORY)) as machine:
        for address in spoilt:
            machine.write_memory(address, b"\xff" * 32)
        machine.save_file(saved)
    file.unlink()
    initrd.unlink()
    machine, losses = Machine.from_file(system, saved)
    with machine:
        assert losses == ()
        assert machine.image.entry == image.entry
        machine.reset()
        assert run(machine) == (64, b"x\nwhat the initrd holds")


def run(machine: Machine) -> tuple[int | None, bytes]:
    """To its end: the exit code and what it printed."""
    machine.run()
    status = machine.wait(Phase.EXITED, Phase.STOPPED, timeout=LIMIT)
    assert status.phase is Phase.EXITED, status
    machine.request_samples()
    return status.code, machine.board.debug_console.since(0)[0]
