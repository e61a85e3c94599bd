"""Reading image files, telling formats apart, and the formats without headers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm.boot.entry import LongMode, ProtectedMode, RealMode, ResetVector
from kvm.boot.image import BootImage, Source
from kvm.boot.loader import FORMATS, detect, load
from kvm.errors import ImageError
from kvm.x86 import layout
from tests.kvm.boot.bzimage import BzImage
from tests.kvm.boot.images import ElfImage, multiboot_header

MEMORY = 4 << 20
SECTOR = b"\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa"


def rom(size: int, vector: bytes = b"\xea\x5b\xe0\x00\xf0") -> bytes:
    return os.urandom(1) + b"\0" * (size - 17) + vector.ljust(16, b"\0")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "image"


def loaded(file: Path, data: bytes, **how: object) -> BootImage:
    file.write_bytes(data)
    return load(file, **{"memory": MEMORY, **how})  # type: ignore[arg-type]


# Files


def test_what_is_no_file(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    empty = tmp_path / "empty"
    empty.touch()
    for path, why in (
        (tmp_path / "missing", "No such file"),
        (tmp_path, "it's a directory"),
        (fifo, "isn't a regular file"),
        (Path("/dev/zero"), "isn't a regular file"),
        (empty, "it's empty"),
        (empty / "below", "Not a directory"),
        ("a\0b", "isn't a file name"),
        ("x" * 5000, "name too long"),
        ("", "No such file"),
    ):
        with pytest.raises(ImageError, match=why):
            load(path, memory=MEMORY)


def test_an_unreadable_file(file: Path) -> None:
    file.write_bytes(SECTOR)
    file.chmod(0)
    was = os.geteuid()
    if was == 0:  # root may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(ImageError, match=r"Permission denied.*chmod"):
            load(file, memory=MEMORY)
    finally:
        os.seteuid(was)


def test_a_file_larger_than_memory_is_not_read(file: Path) -> None:
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(ImageError, match=r"has 1.049e\+06 MiB, the guest's memory only 4 MiB"):
        load(file, memory=MEMORY, format="flat64")


def test_a_file_that_says_it_is_empty_and_is_not_is_read() -> None:
    """/proc's files have size 0."""
    with pytest.raises(ImageError, match="format can't be told"):
        load("/proc/self/status", memory=MEMORY)


# Detection


@pytest.mark.parametrize(
    ("data", "format"),
    [
        (ElfImage(64).build(), "elf"),
        (ElfImage(32).build(), "elf"),
        (multiboot_header(0x10000, (0x100000, 0x100000, 0, 0, 0x100020)) + b"\xf4" * 16, "multiboot"),
        (SECTOR, "bootsector"),
        (BzImage(pref_address=0x100000, init_size=0).build(), "linux"),
        (rom(0x10000), "firmware"),
        (rom(0x20000, b"\x90\x90\xe9\x00\x00"), "firmware"),
        (rom(0x1000, bytes.fromhex("0f20c0a8017405e9")), "firmware"),
    ],
)
def test_told_apart(file: Path, data: bytes, format: str) -> None:
    assert loaded(file, data).format == format


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"hello", "can't be told.*not multiboot.*not elf.*not bootsector.*not firmware.*--format"),
        (SECTOR + b"\0" * 512, r"not bootsector: it has 1024 bytes.*no disk"),
        (rom(0x1000, b"\0"), "no jump at its reset vector"),
        (b"\0" * 0x202 + b"HdrS" + b"\0" * 100, r"version 0\.00 of the boot protocol"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"MZ" + b"\0" * 100, "EFI"),
        (b"QFI\xfb" + b"\0" * 100, "qcow2"),
    ],
)
def test_not_told(file: Path, data: bytes, why: str) -> None:
    with pytest.raises(ImageError, match=why):
        loaded(file, data)


@settings(max_examples=200)
@given(st.binary(min_size=1, max_size=2000))
def test_any_bytes_load_or_are_refused_in_every_format(data: bytes) -> None:
    source = Source("bytes", data, MEMORY, None)
    for format in FORMATS.values():
        try:
            image = format.load(source)
        except ImageError:
            continue
        assert all(segment.address + segment.size <= MEMORY for segment in image.segments)


@pytest.mark.parametrize("path", ["bios.bin", "bios-256k.bin", "bios-microvm.bin"])
def test_seabios_is_recognised(path: str) -> None:
    seabios = Path("/usr/share/seabios") / path
    if not seabios.exists():
        pytest.skip("needs Debian's package seabios")
    image = load(seabios, memory=MEMORY)
    assert (image.format, image.rom) == ("firmware", seabios.read_bytes())


# The formats without headers


def test_a_boot_sector(file: Path) -> None:
    image = loaded(file, SECTOR)
    assert [(s.address, s.data, s.size) for s in image.segments] == [(0x7C00, SECTOR, 512)]
    assert image.entry == RealMode(cs=0, ip=0x7C00, data=0, dl=0x80)


@pytest.mark.parametrize("data", [SECTOR[:-1], SECTOR + b"\0", b"\0" * 512])
def test_no_boot_sector(file: Path, data: bytes) -> None:
    with pytest.raises(ImageError, match="--format"):
        loaded(file, data, format="bootsector")


@pytest.mark.parametrize("size", [0x1000, 0x10000, 0x20000, 0x40000, 16 << 20])
def test_firmware(file: Path, size: int) -> None:
    data = rom(size)
    image = loaded(file, data)
    assert (image.rom, image.entry) == (data, ResetVector())
    (copy,) = image.segments
    assert (copy.address, copy.data) == (0x100000 - min(size, 0x20000), data[-0x20000:])


@pytest.mark.parametrize("size", [0x1001, 100, (16 << 20) + 0x1000])
def test_no_firmware(file: Path, size: int) -> None:
    with pytest.raises(ImageError, match="multiple of 4 KiB"):
        loaded(file, b"\x90" * size, format="firmware", memory=64 << 20)


@pytest.mark.parametrize(
    ("format", "address", "entry"),
    [
        ("flat16", None, RealMode(0, 0x7C00, 0)),
        ("flat16", 0x1234, RealMode(0, 0x1234, 0)),
        ("flat16", 0x12345, RealMode(0x1234, 5, 0x1234)),
        ("flat32", None, ProtectedMode(0x100000)),
        ("flat32", 0x8000, ProtectedMode(0x8000)),
        ("flat64", None, LongMode(0x100000)),
        ("flat64", 0x200000, LongMode(0x200000)),
    ],
)
def test_flat(file: Path, format: str, address: int | None, entry: object) -> None:
    image = loaded(file, b"\xf4\x90", format=format, address=address)
    assert image.entry == entry
    where = address if address is not None else 0x7C00 if format == "flat16" else 0x100000
    assert (image.segments[-1].address, image.segments[-1].data) == (where, b"\xf4\x90")


@pytest.mark.parametrize(
    ("format", "address", "why"),
    [
        ("flat16", 0xFFFFF, "beyond 1 MiB"),
        ("flat16", -1, "Choose another --address|fit"),
        ("flat32", MEMORY - 1, "doesn't fit"),
        ("flat32", 0xFFFFFFFF, "below 4 GiB"),
        ("flat32", 0x500, "overlap"),
        ("flat64", 0x6FFF, "overlap"),
        ("flat64", 1 << 70, "below 4 GiB"),
        ("bootsector", 0x7C00, "own addresses"),
        ("nonsense", None, "no image format 'nonsense'"),
    ],
)
def test_addresses_that_cannot_be(file: Path, format: str, address: int | None, why: str) -> None:
    with pytest.raises(ImageError, match=why):
        loaded(file, SECTOR, format=format, address=address)


def test_what_is_placed_for_the_entry_stays_below_the_boot_sector() -> None:
    image = FORMATS["flat64"].load(Source("flat", b"\xf4", MEMORY, None))
    tables = image.segments[:-1]
    assert min(table.address for table in tables) == layout.BOOT_GDT
    assert max(table.address + table.size for table in tables) == layout.BOOT_TABLES_END <= layout.BOOT_SECTOR


def test_detection_never_picks_a_format_that_cannot_be_told() -> None:
    assert {detect(Source("x", data, MEMORY, None)) for data in (SECTOR, rom(0x1000))} == {"bootsector", "firmware"}
