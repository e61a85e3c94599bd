"""Multiboot 1 (Multiboot Specification 0.6.96): kernels that GRUB and ``qemu -kernel`` start too.

No modules, no video modes. ELF64 kernels are accepted as GRUB 2 does; like all, they're entered in 32-bit mode.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from kvm.boot import elf
from kvm.boot.entry import ProtectedMode, gdt
from kvm.boot.flat import placed_tables
from kvm.boot.image import BootImage, Placed, Segment, Source, check_places
from kvm.x86 import layout

HEADER_MAGIC = 0x1BADB002
LOADER_MAGIC = 0x2BADB002
_SEARCH = 8192
_HEADER = struct.Struct("<3I")
_ADDRESSES = struct.Struct("<5I")

_PAGE_ALIGNED, _WANTS_MEMORY, _HAS_ADDRESSES = 1 << 0, 1 << 1, 1 << 16
_REQUIRED = 0xFFFF
"""The flags that a loader must refuse if it doesn't know them."""

_INFO_MEMORY, _INFO_CMDLINE, _INFO_MAP, _INFO_LOADER = 1 << 0, 1 << 2, 1 << 6, 1 << 9
_INFO_SIZE = 88
_MAP_ENTRY = struct.Struct("<IQQI")
_USABLE, _RESERVED = 1, 2
_LOADER_NAME = b"vmdeck\0"


@dataclass(frozen=True, slots=True)
class Header:
    """A multiboot header: its offset in the file and its flags."""

    offset: int
    flags: int


def find_header(data: bytes) -> Header | None:
    """The header: in the first 8 KiB, 4-byte aligned, its three words adding up to 0."""
    magic = HEADER_MAGIC.to_bytes(4, "little")
    offset = data.find(magic, 0, _SEARCH)
    while 0 <= offset <= min(_SEARCH, len(data)) - _HEADER.size:
        _, flags, checksum = _HEADER.unpack_from(data, offset)
        if offset % 4 == 0 and (HEADER_MAGIC + flags + checksum) & 0xFFFFFFFF == 0:
            return Header(offset, flags)
        offset = data.find(magic, offset + 1, _SEARCH)
    return None


def why_not(data: bytes) -> str:
    """Why this isn't a multiboot kernel; empty if it is."""
    return "" if find_header(data) else "its first 8 KiB hold no multiboot header (4-byte aligned, checksum right)"


def load_multiboot(source: Source) -> BootImage:
    """Raises ImageError for what a loader must refuse."""
    header = find_header(source.data)
    if header is None:
        raise source.error(f"{why_not(source.data)}. Choose another --format.")
    if unknown := header.flags & _REQUIRED & ~(_PAGE_ALIGNED | _WANTS_MEMORY):
        raise source.error(
            f"its multiboot header requires features {unknown:#x} (bit 2: a video mode) that vmdeck doesn't have. "
            "Build it without them."
        )
    info = _information(source)
    tables = (gdt(), Segment(layout.MULTIBOOT_INFO, info, len(info)))
    reserved = placed_tables(tables)
    if header.flags & _HAS_ADDRESSES:
        segment, entry = _by_addresses(source, header, reserved)
        segments: tuple[Segment, ...] = (segment,)
    else:
        file = elf.read_elf(source, reserved)
        segments, entry = file.segments, file.entry
    state = ProtectedMode(entry, eax=LOADER_MAGIC, ebx=layout.MULTIBOOT_INFO)
    return BootImage(source.path, "multiboot", (*tables, *segments), b"", state)


def _by_addresses(source: Source, header: Header, reserved: tuple[Placed, ...]) -> tuple[Segment, int]:
    """The "a.out kludge": the header itself says what goes where."""
    at = header.offset + _HEADER.size
    if at + _ADDRESSES.size > len(source.data):
        raise source.error("it's cut off within its multiboot header. Copy it again.")
    header_address, load, load_end, bss_end, entry = _ADDRESSES.unpack_from(source.data, at)
    start = header.offset - (header_address - load)
    stop = start + load_end - load if load_end else len(source.data)
    size = max(stop - start, bss_end - load) if bss_end else stop - start
    if load > header_address or start < 0 or stop <= start or (bss_end and bss_end < load + stop - start):
        raise source.error("the addresses in its multiboot header contradict each other. Check how they're computed.")
    if stop > len(source.data):
        raise source.error("it's shorter than its multiboot header says. Copy it again.")
    if not 0 <= entry - load < stop - start:
        raise source.error(f"its entry point {entry:#x} lies outside of what is loaded. Check its multiboot header.")
    check_places(source, (Placed("the image", load, size), *reserved))
    return Segment(load, source.data[start:stop], size), entry


def _information(source: Source) -> bytes:
    """The information structure, then what it points to."""
    entries = b"".join(
        _MAP_ENTRY.pack(_MAP_ENTRY.size - 4, address, size, _USABLE if usable else _RESERVED)
        for address, size, usable in layout.memory_map(source.memory)
    )
    cmdline = os.fsencode(os.path.basename(source.path)) + b"\0"
    map_at = layout.MULTIBOOT_INFO + _INFO_SIZE
    cmdline_at = map_at + len(entries)
    name_at = cmdline_at + len(cmdline)
    upper = min(source.memory, layout.MMIO_HOLE) - layout.MIB
    info = bytearray(_INFO_SIZE)
    flags = _INFO_MEMORY | _INFO_CMDLINE | _INFO_MAP | _INFO_LOADER
    struct.pack_into("<3I", info, 0, flags, layout.LOW_RAM_END >> 10, upper >> 10)
    struct.pack_into("<I", info, 16, cmdline_at)
    struct.pack_into("<2I", info, 44, len(entries), map_at)
    struct.pack_into("<I", info, 64, name_at)
    return bytes(info) + entries + cmdline + _LOADER_NAME
