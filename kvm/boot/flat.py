"""Flat binaries: loaded at an address as they are and entered at their first byte, in 16-, 32- or 64-bit code."""

from __future__ import annotations

from kvm.boot.entry import LongMode, ProtectedMode, RealMode, gdt, identity_pages
from kvm.boot.image import BootImage, Entry, Placed, Segment, Source, check_places
from kvm.x86 import layout

_REAL_SEGMENT = 0x10000


def load_flat16(source: Source) -> BootImage:
    """Real mode; at 0x7c00 unless told otherwise.

    Below 64 KiB the segments are 0 and IP is the address; above, CS = DS = ES = address / 16 and IP is the rest.
    """
    address = layout.BOOT_SECTOR if source.address is None else source.address
    if address + len(source.data) > layout.BIOS_END:
        raise source.error(
            f"{len(source.data)} bytes at {address:#x} end beyond 1 MiB, out of real mode's reach. "
            "Load it lower with --address."
        )
    selector = 0 if address < _REAL_SEGMENT else address >> 4
    return _flat(source, "flat16", address, RealMode(selector, address - (selector << 4), selector), ())


def load_flat32(source: Source) -> BootImage:
    """32-bit protected mode, flat segments, no paging; at 1 MiB unless told otherwise."""
    address = layout.KERNEL if source.address is None else source.address
    return _flat(source, "flat32", address, ProtectedMode(address), (gdt(),))


def load_flat64(source: Source) -> BootImage:
    """64-bit mode, 0–4 GiB identity-mapped; at 1 MiB unless told otherwise."""
    address = layout.KERNEL if source.address is None else source.address
    return _flat(source, "flat64", address, LongMode(address), (gdt(), *identity_pages()))


def _flat(source: Source, name: str, address: int, entry: Entry, tables: tuple[Segment, ...]) -> BootImage:
    size = len(source.data)
    if address < 0 or address + size > layout.ROM_END:
        raise source.error(
            f"{size} bytes at {address:#x} don't lie below 4 GiB, where they could be run. Choose another --address."
        )
    check_places(source, (Placed("the image", address, size), *placed_tables(tables)))
    return BootImage(source.path, name, (*tables, Segment(address, source.data, size)), b"", entry)


def placed_tables(tables: tuple[Segment, ...]) -> tuple[Placed, ...]:
    """What vmdeck itself puts into RAM for an entry, for ``check_places``."""
    return tuple(Placed("what vmdeck puts there for the entry", table.address, table.size) for table in tables)
