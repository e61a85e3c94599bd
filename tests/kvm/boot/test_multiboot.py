"""Multiboot 1: finding the header, both ways of loading, and what the kernel is told."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest

from kvm.boot.entry import ProtectedMode
from kvm.boot.image import BootImage, Source
from kvm.boot.loader import detect
from kvm.boot.multiboot import find_header, load_multiboot
from kvm.errors import ImageError
from kvm.x86 import layout
from tests.kvm.boot.images import ElfImage, Load, multiboot_header

MEMORY = 64 << 20
CODE = b"\xf4" * 16


def source(data: bytes, memory: int = MEMORY, path: str = "/somewhere/kernel") -> Source:
    return Source(path, data, memory, None)


def elf(flags: int = 3, bits: int = 32) -> bytes:
    return ElfImage(bits, (Load(0x100000, multiboot_header(flags).ljust(16, b"\0") + CODE),), entry=0x100010).build()


def kludge(*addresses: int, flags: int = 0x10003, before: bytes = b"") -> bytes:
    return before + multiboot_header(flags, addresses) + CODE


def memory_of(image: BootImage) -> bytes:
    memory = bytearray(0x200000)
    for segment in image.segments:
        memory[segment.address : segment.address + segment.size] = segment.data.ljust(segment.size, b"\0")
    return bytes(memory)


@pytest.mark.parametrize("bits", [32, 64])
def test_an_elf_kernel_is_entered_in_32_bit_mode(bits: int) -> None:
    image = load_multiboot(source(elf(bits=bits)))
    assert image.format == "multiboot"
    assert image.entry == ProtectedMode(0x100010, eax=0x2BADB002, ebx=layout.MULTIBOOT_INFO)
    assert memory_of(image)[0x100010:0x100020] == CODE


def test_it_is_told_apart_from_a_plain_elf() -> None:
    assert detect(source(elf())) == "multiboot"
    assert detect(source(ElfImage(32).build())) == "elf"


def c_string(memory: bytes, at: int) -> bytes:
    return memory[at : memory.index(b"\0", at)]


@pytest.mark.parametrize("size", [1 << 20, 64 << 20, 6 << 30])
def test_the_information_structure(size: int) -> None:
    image = load_multiboot(source(kludge(0x80000, 0x80000, 0, 0, 0x80020), memory=size))
    memory = memory_of(image)
    info = struct.unpack_from("<22I", memory, layout.MULTIBOOT_INFO)
    assert info[0] == 1 | 1 << 2 | 1 << 6 | 1 << 9
    assert info[1:3] == (639, (min(size, 3 << 30) >> 10) - 1024)
    assert c_string(memory, info[4]) == b"kernel"
    assert c_string(memory, info[16]) == b"vmdeck"
    length, at = info[11:13]
    regions = []
    end = at + length
    while at < end:
        step, address, extent, kind = struct.unpack_from("<IQQI", memory, at)
        regions.append((address, address + extent, kind))
        at += step + 4
    assert at == end
    assert all(before[1] <= after[0] for before, after in pairwise(regions))
    usable = sum(stop - start for start, stop, kind in regions if kind == 1)
    assert size - (1 << 20) <= usable <= size
    assert all(
        stop <= min(size, 3 << 30) or start >= 4 << 30 for start, stop, kind in regions if kind == 1
    )  # fmt: skip
    assert all(segment.address + segment.size <= layout.MULTIBOOT_INFO_END for segment in image.segments[:2])


def test_a_long_file_name_still_fits_into_the_information_page() -> None:
    image = load_multiboot(source(elf(), path="/" + "k" * 255))
    assert image.segments[1].size <= layout.MULTIBOOT_INFO_END - layout.MULTIBOOT_INFO


def test_addresses_in_the_header_win() -> None:
    before = b"\x90" * 8
    data = kludge(0x100008, 0x100000, 0, 0x105000, 0x100028, before=before)
    image = load_multiboot(source(data))
    assert image.entry == ProtectedMode(0x100028, eax=0x2BADB002, ebx=layout.MULTIBOOT_INFO)
    assert memory_of(image)[0x100000 : 0x100000 + len(data)] == data
    assert image.segments[-1].size == 0x5000


def test_only_what_the_header_names_is_loaded() -> None:
    data = kludge(0x100008, 0x100004, 0x100030, 0, 0x100028, before=b"\x90" * 8) + b"symbols"
    segment = load_multiboot(source(data)).segments[-1]
    assert (segment.address, segment.data) == (0x100004, data[4:0x30])


REFUSED = {
    "load above header": (kludge(0x100000, 0x100004, 0, 0, 0x100020), "contradict"),
    "before the file": (kludge(0x100000, 0xFF000, 0, 0, 0xFF000), "contradict"),
    "end before start": (kludge(0x100000, 0x100000, 0x0FF000, 0, 0x100020), "contradict"),
    "bss before data": (kludge(0x100000, 0x100000, 0, 0x100004, 0x100020), "contradict"),
    "longer than the file": (kludge(0x100000, 0x100000, 0x109000, 0, 0x100020), "shorter than"),
    "entry outside": (kludge(0x100000, 0x100000, 0, 0, 0x200000), "entry point 0x200000"),
    "cut off": (multiboot_header(0x10000) + b"\0" * 8, "cut off within its multiboot header"),
    "beyond memory": (kludge(0x100000, 0x100000, 0, 0xF0000000, 0x100020), "doesn't fit"),
    "over the information": (kludge(0x9000, 0x9000, 0, 0, 0x9020), "overlap"),
    "video mode": (elf(flags=4), "0x4 .*video mode"),
    "unknown requirement": (elf(flags=0x8000), "features 0x8000"),
    "no ELF": (multiboot_header() + CODE, "no ELF file"),
    "no header": (b"\0" * 100, "no multiboot header"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    data, why = REFUSED[name]
    with pytest.raises(ImageError, match=why):
        load_multiboot(source(data))


def test_optional_flags_are_ignored() -> None:
    assert load_multiboot(source(elf(flags=0xFFFE0003)))


@pytest.mark.parametrize(
    ("offset", "found"), [(0, True), (4, True), (6, False), (8180, True), (8184, False), (9000, False)]
)
def test_the_header_is_aligned_and_within_8_kib(offset: int, found: bool) -> None:
    assert (find_header(b"\0" * offset + multiboot_header() + b"\0" * 100) is not None) is found


def test_a_false_magic_before_the_header_does_not_hide_it() -> None:
    false = struct.pack("<3I", 0x1BADB002, 0, 0)
    header = find_header(false + multiboot_header(3))
    assert header is not None
    assert (header.offset, header.flags) == (12, 3)
