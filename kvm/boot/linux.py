"""Linux bzImages, by the x86 boot protocol (the kernel's Documentation/arch/x86/boot.rst and zero-page.rst).

The kernel is entered at its 64-bit entry point, or at the 32-bit one where it has no other: its real-mode part, which
would ask a BIOS, isn't run. What it would have found out is in ``struct boot_params``.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from kvm.boot import acpi
from kvm.boot.entry import LINUX_CODE, LINUX_DATA, LongMode, ProtectedMode, identity_pages, linux_gdt
from kvm.boot.flat import placed_tables
from kvm.boot.image import BootImage, Entry, Placed, Segment, Source, check_places, mib
from kvm.x86 import layout

COMMAND_LINE = "console=ttyS0 earlyprintk=ttyS0"
"""Where there's no other: the serial line, from the first message on."""

_HEADER, _MAGIC_AT, _MAGIC = 0x1F1, 0x202, b"HdrS"
_HEADER_END = 0x268
"""Of the fields that are read here."""
_PARAMS_SIZE = 0x1000
_HEADER_ROOM = 0x290
"""Where in boot_params something else begins."""
_OLDEST = 0x206
_SECTOR = 512
_PARAGRAPH = 16
_ENTRY64 = 0x200
"""From the start of the protected-mode part."""
_UNKNOWN_LOADER = 0xFF
_LOADED_HIGH, _KERNEL_64 = 1 << 0, 1 << 0

_RSDP_AT, _MAP_COUNT_AT, _MAP_AT = 0x070, 0x1E8, 0x2D0
_TYPE_OF_LOADER_AT, _CODE32_START_AT, _RAMDISK_AT, _COMMAND_LINE_AT = 0x210, 0x214, 0x218, 0x228
_MAP_ENTRY = struct.Struct("<QQI")
_USABLE, _RESERVED = 1, 2
_PAGE = 0x1000


@dataclass(frozen=True, slots=True)
class Header:
    """What counts of a setup header. Fields that its protocol version doesn't have yet are as they meant it then."""

    version: int
    code_offset: int
    """Of the protected-mode part in the file; ``code_size`` bytes."""
    code_size: int
    high: bool
    """A bzImage; else a zImage."""
    initrd_end: int
    """The first address that an initrd mustn't reach."""
    alignment: int
    relocatable: bool
    entry64: bool
    command_line_size: int
    """Without the NUL."""
    preferred: int
    """Address; 0 for none."""
    init_size: int
    """Bytes that the kernel needs where it runs, before it knows what memory there is; 0 if it doesn't say."""

    @classmethod
    def of(cls, data: bytes) -> Header:
        """The header of a file that ``why_not`` lets pass and that has ``_HEADER_END`` bytes."""

        def field(form: str, at: int, since: int, before: int) -> int:
            return int(struct.unpack_from(form, data, at)[0]) if version >= since else before

        (version,) = struct.unpack_from("<H", data, 0x206)
        return cls(
            version,
            code_offset=((data[_HEADER] or 4) + 1) * _SECTOR,
            code_size=field("<I", 0x1F4, 0x204, 0) * _PARAGRAPH,
            high=bool(data[0x211] & _LOADED_HIGH),
            initrd_end=field("<I", 0x22C, 0x203, 0x37FF_FFFF) + 1,
            alignment=field("<I", 0x230, 0x205, 1),
            relocatable=bool(field("<B", 0x234, 0x205, 0)),
            entry64=bool(field("<H", 0x236, 0x20C, 0) & _KERNEL_64),
            command_line_size=field("<I", 0x238, 0x206, 255),
            preferred=field("<Q", 0x258, 0x20A, 0),
            init_size=field("<I", 0x260, 0x20A, 0),
        )

    @property
    def load_address(self) -> int:
        """Where the protected-mode part goes: only a relocatable kernel takes another place than 1 MiB."""
        return self.preferred if self.relocatable and self.preferred else layout.KERNEL

    @property
    def run_address(self) -> int:
        """Where the kernel moves itself to unpack (boot.rst, init_size)."""
        if self.relocatable:
            return -(-self.load_address // self.alignment) * self.alignment
        return self.preferred or self.load_address

    @property
    def room(self) -> Placed:
        """All the memory that it uses before it looks at the memory map."""
        start = min(self.load_address, self.run_address)
        end = max(self.load_address + self.code_size, self.run_address + max(self.init_size, self.code_size))
        return Placed("the kernel, with the room that it unpacks itself into,", start, end - start)


def why_not(data: bytes) -> str:
    """Why this isn't a Linux kernel; empty if it is."""
    return "" if data.startswith(_MAGIC, _MAGIC_AT) else "its offset 0x202 doesn't hold HdrS"


def load_linux(source: Source) -> BootImage:
    """Raises ImageError for a kernel that is too old or damaged, and for what doesn't fit into memory."""
    header = _header(source)
    room, bits = header.room, 64 if header.entry64 else 32
    command_line = _command_line(source, header)
    initrd = _initrd(source, header)
    tables = (
        linux_gdt(bits),
        *(identity_pages() if bits == 64 else ()),
        _whole(layout.LINUX_BOOT_PARAMS, _boot_params(source, header, initrd)),
        _whole(layout.LINUX_COMMAND_LINE, command_line),
        _whole(layout.ACPI_TABLES, acpi.tables(source.vcpus)),
    )
    check_places(source, (room, *placed_tables((*tables, *initrd))))
    code = source.data[header.code_offset : header.code_offset + header.code_size]
    entry: Entry
    if bits == 64:
        at = header.load_address + _ENTRY64
        entry = LongMode(at, rsi=layout.LINUX_BOOT_PARAMS, code=LINUX_CODE, data=LINUX_DATA)
    else:
        at = header.load_address
        entry = ProtectedMode(at, esi=layout.LINUX_BOOT_PARAMS, code=LINUX_CODE, data=LINUX_DATA)
    return BootImage(source.path, "linux", (*tables, _whole(header.load_address, code), *initrd), b"", entry)


def _whole(address: int, data: bytes) -> Segment:
    return Segment(address, data, len(data))


def _header(source: Source) -> Header:
    if why := why_not(source.data):
        raise source.error(f"{why}, so it's no Linux bzImage. Choose another --format.")
    if len(source.data) < _HEADER_END:
        raise source.error(f"it's cut off after {len(source.data)} bytes, within its setup header. Copy it again.")
    header = Header.of(source.data)
    if header.version < _OLDEST:
        raise source.error(
            f"it speaks version {header.version >> 8}.{header.version & 0xFF:02} of the boot protocol, older than "
            f"{_OLDEST >> 8}.{_OLDEST & 0xFF:02}. Use Linux 2.6.22 or newer."
        )
    if not header.high:
        raise source.error("it's a zImage, made for the first 640 KiB. Build a bzImage (make bzImage).")
    if header.alignment & header.alignment - 1 or not header.alignment:
        raise source.error(f"its alignment, {header.alignment:#x}, is no power of two. Build or copy it again.")
    held = len(source.data) - header.code_offset
    if not header.code_size or held < header.code_size:
        raise source.error(
            f"it's cut off: its header speaks of {header.code_size} bytes of kernel, {max(held, 0)} are there. "
            "Copy it again."
        )
    low = layout.ram(source.memory)[0][1]
    if header.room.end > low:
        raise source.error(
            f"it unpacks itself into memory up to {mib(header.room.end)}, "
            + (
                f"and devices begin at {mib(layout.MMIO_HOLE)}. Build it for a lower address."
                if header.room.end > layout.MMIO_HOLE
                else f"the guest has {mib(low)}. Give it more: --memory 256M does for most."
            )
        )
    return header


def _command_line(source: Source, header: Header) -> bytes:
    line = os.fsencode(COMMAND_LINE if source.command_line is None else source.command_line)
    most = min(header.command_line_size, layout.LINUX_COMMAND_LINE_END - layout.LINUX_COMMAND_LINE - 1)
    if len(line) > most:
        raise source.error(f"its command line would have {len(line)} bytes, it takes {most}. Shorten --append.")
    if b"\0" in line:
        raise source.error("its command line has a NUL in it, where it would end for the kernel. Correct --append.")
    return line + b"\0"


def _initrd(source: Source, header: Header) -> tuple[Segment, ...]:
    """As high as the kernel takes it, out of the way of what it unpacks; on a page of its own, as it's freed later."""
    if source.initrd is None:
        return ()
    size, low = len(source.initrd), layout.ram(source.memory)[0][1]
    end = min(low, header.initrd_end)
    address = (end - size) & -_PAGE
    if address < header.room.end:
        raise source.error(
            f"an initrd of {mib(size)} doesn't fit between the kernel, which needs memory up to "
            f"{mib(header.room.end)}, and {mib(end)}"
            + (
                ". Give the guest more with --memory, or make the initrd smaller."
                if end == low < layout.MMIO_HOLE
                else ", the end of what may hold one. Make the initrd smaller."
            )
        )
    return (_whole(address, source.initrd),)


def _boot_params(source: Source, header: Header, initrd: tuple[Segment, ...]) -> bytes:
    """The zero page: all zeros but the kernel's own setup header and what a boot loader has to say."""
    params = bytearray(_PARAMS_SIZE)
    end = min(_MAGIC_AT + source.data[_MAGIC_AT - 1], _HEADER_ROOM)
    params[_HEADER:end] = source.data[_HEADER:end]
    params[_TYPE_OF_LOADER_AT] = _UNKNOWN_LOADER
    struct.pack_into("<I", params, _CODE32_START_AT, header.load_address)
    for part in initrd:
        struct.pack_into("<2I", params, _RAMDISK_AT, part.address, part.size)
    struct.pack_into("<I", params, _COMMAND_LINE_AT, layout.LINUX_COMMAND_LINE)
    struct.pack_into("<Q", params, _RSDP_AT, layout.ACPI_TABLES)
    ranges = layout.memory_map(source.memory)
    params[_MAP_COUNT_AT] = len(ranges)
    for number, (address, size, usable) in enumerate(ranges):
        at = _MAP_AT + number * _MAP_ENTRY.size
        _MAP_ENTRY.pack_into(params, at, address, size, _USABLE if usable else _RESERVED)
    return bytes(params)
