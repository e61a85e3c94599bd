"""Linear to guest-physical addresses: a walk of the page tables (SDM vol. 3A, 4.3 to 4.5), without side effects.

Only for looking: neither permissions nor accessed and dirty bits matter here, and reserved bits are not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from kvm.x86.decode import CR0_PE, EFER_LMA
from kvm.x86.structs import Sregs, Sregs2

CR0_PG = 1 << 31
CR4_PSE, CR4_PAE, CR4_LA57 = 1 << 4, 1 << 5, 1 << 12
PRESENT, LARGE = 1 << 0, 1 << 7
PAGE = 4096
"""Bytes of the smallest page: what lies in one of them lies together in physical memory."""
PHYSICAL_BITS = 52
"""The most that a physical address can have."""
FRAME = 0x000F_FFFF_FFFF_F000
"""The bits of a 64-bit entry that hold an address."""

Read = Callable[[int, int], bytes]
"""Guest-physical memory: (address, size) to bytes; shorter or empty where there is none."""


def translate(sregs: Sregs | Sregs2, linear: int, read: Read) -> int | None:
    """The guest-physical address of ``linear``, None if it isn't mapped or isn't a linear address in this mode."""
    if not is_linear(sregs, linear):
        return None
    if not (sregs.cr0 & CR0_PG and sregs.cr0 & CR0_PE):
        return linear
    if sregs.efer & EFER_LMA:
        top = 48 if sregs.cr4 & CR4_LA57 else 39
        return _walk64(sregs.cr3 & FRAME, linear, range(top, 11, -9), read)
    if sregs.cr4 & CR4_PAE:
        # The PDPT has four entries, is 32-byte aligned, and its bit 7 is no page size.
        entry = _entry((sregs.cr3 & 0xFFFF_FFE0) + (linear >> 30 & 3) * 8, 8, read)
        return _walk64(entry & FRAME, linear, range(21, 11, -9), read) if entry & PRESENT else None
    return _walk32(sregs, linear, read)


class Piece(NamedTuple):
    """A part of a linear range that lies in one page: ``size`` bytes, at ``physical`` unless that isn't mapped."""

    linear: int
    size: int
    physical: int | None


def pieces(sregs: Sregs | Sregs2, linear: int, size: int, read: Read) -> Iterator[Piece]:
    """``size`` bytes from ``linear`` on, page by page; behind the last linear address comes the first one."""
    width = linear_bits(sregs)
    while size > 0:
        linear &= (1 << width) - 1
        count = min(size, PAGE - linear % PAGE)
        yield Piece(linear, count, translate(sregs, linear, read))
        linear, size = linear + count, size - count


def linear_bits(sregs: Sregs | Sregs2) -> int:
    """How many bits a linear address is written with: 64 in long mode (compatibility mode, too), else 32."""
    return 64 if sregs.efer & EFER_LMA else 32


def is_linear(sregs: Sregs | Sregs2, address: int) -> bool:
    """Is it one that the processor would look up: canonical in long mode (SDM vol. 1, 3.3.7.1), else of 32 bits?"""
    if not sregs.efer & EFER_LMA:
        return not address >> 32
    sign = 56 if sregs.cr4 & CR4_LA57 else 47
    return address >> sign in (0, (1 << 64) - 1 >> sign)


def tables(sregs: Sregs | Sregs2, read: Read) -> frozenset[int]:
    """The physical pages in which page tables are looked up that have accessed and dirty bits."""
    if not (sregs.cr0 & CR0_PG and sregs.cr0 & CR0_PE):
        return frozenset()
    size, level, levels_below = 8, {sregs.cr3 & FRAME}, 3
    if sregs.efer & EFER_LMA:
        levels_below = 4 if sregs.cr4 & CR4_LA57 else 3
    elif sregs.cr4 & CR4_PAE:
        top = [_entry((sregs.cr3 & 0xFFFF_FFE0) + at * 8, 8, read) for at in range(4)]
        level, levels_below = {entry & FRAME for entry in top if entry & PRESENT}, 1
    else:
        size, level, levels_below = 4, {sregs.cr3 & 0xFFFF_F000}, 1
    found = set(level)
    for below in range(levels_below, 0, -1):
        entries = (entry for page in level for entry in _entries(page, size, read))
        level = {entry & FRAME for entry in entries if entry & PRESENT and not (entry & LARGE and below < 3)}
        found |= level
    return frozenset(found)


def _entries(table: int, size: int, read: Read) -> Iterator[int]:
    raw = read(table, 4096)
    return (int.from_bytes(raw[at : at + size], "little") for at in range(0, len(raw), size))


def _entry(address: int, size: int, read: Read) -> int:
    """A table's entry; 0, so not present, where there is no memory."""
    return int.from_bytes(read(address, size), "little")


def _walk64(table: int, linear: int, shifts: range, read: Read) -> int | None:
    for shift in shifts:
        entry = _entry(table + (linear >> shift & 0x1FF) * 8, 8, read)
        if not entry & PRESENT:
            return None
        if shift == 12 or (entry & LARGE and shift in (21, 30)):
            offset = (1 << shift) - 1
            return entry & FRAME & ~offset | linear & offset
        table = entry & FRAME
    return None


def _walk32(sregs: Sregs | Sregs2, linear: int, read: Read) -> int | None:
    entry = _entry((sregs.cr3 & 0xFFFF_F000) + (linear >> 22 & 0x3FF) * 4, 4, read)
    if not entry & PRESENT:
        return None
    if entry & LARGE and sregs.cr4 & CR4_PSE:
        # PSE-36: address bits 32 to 39 stand in the entry's bits 13 to 20.
        return (entry >> 13 & 0xFF) << 32 | entry & 0xFFC0_0000 | linear & 0x3F_FFFF
    entry = _entry((entry & 0xFFFF_F000) + (linear >> 12 & 0x3FF) * 4, 4, read)
    return entry & 0xFFFF_F000 | linear & 0xFFF if entry & PRESENT else None
