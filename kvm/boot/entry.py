"""The processor states that guests are entered in.

Every segment's hidden part is filled in as if it had been loaded from a descriptor, accessed bit and all: Intel
processors check them at VM entry (SDM vol. 3C, 27.3.1.2) and refuse what no descriptor could have given.
TR and LDTR are usable and keep their reset values, which pass.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kvm.boot.image import Segment as MemorySegment
from kvm.x86 import layout
from kvm.x86.structs import Dtable, Regs, Segment, Sregs, Sregs2

CODE32, DATA, CODE64 = 0x08, 0x10, 0x18
"""Selectors in the GDT at ``layout.BOOT_GDT``."""
LINUX_CODE, LINUX_DATA = 0x10, 0x18
"""Those that Linux insists on: __BOOT_CS and __BOOT_DS (boot.rst, 32-bit and 64-bit Boot Protocol)."""

_CODE32_FLAT, _CODE64_FLAT, _DATA_FLAT = 0x00CF_9B00_0000_FFFF, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF
_GDT = struct.Struct("<4Q")

_CR0_PE, _CR0_ET, _CR0_PG = 1 << 0, 1 << 4, 1 << 31
_CR4_PAE = 1 << 5
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
_RFLAGS = 0x2

_EXECUTE_READ, _READ_WRITE = 0xB, 0x3
_REAL_LIMIT, _FLAT_LIMIT = 0xFFFF, 0xFFFFFFFF
_DATA_SEGMENTS = ("ds", "es", "fs", "gs", "ss")

_PRESENT_WRITABLE, _ACCESSED, _DIRTY, _LARGE = 0x03, 0x20, 0x40, 0x80
_LARGE_PAGE = 2 * layout.MIB
_ENTRIES = 512
_GIBS = 4


def gdt() -> MemorySegment:
    """The table that the flat segments come from, for guests that load them again."""
    return MemorySegment(layout.BOOT_GDT, _GDT.pack(0, _CODE32_FLAT, _DATA_FLAT, _CODE64_FLAT), _GDT.size)


def linux_gdt(bits: int) -> MemorySegment:
    """The same for Linux, whose code segment is a 32- or a 64-bit one."""
    code = _CODE64_FLAT if bits == 64 else _CODE32_FLAT
    return MemorySegment(layout.BOOT_GDT, _GDT.pack(0, 0, code, _DATA_FLAT), _GDT.size)


def identity_pages() -> tuple[MemorySegment, ...]:
    """Page tables that map 0–4 GiB to itself, for supervisor mode.

    Accessed and dirty bits are set from the start, so that no table page turns dirty because the guest uses it.
    """
    table = _PRESENT_WRITABLE | _ACCESSED
    page = table | _DIRTY | _LARGE
    pml4 = struct.pack("<Q", layout.BOOT_PDPT | table)
    pdpt = struct.pack("<4Q", *(layout.BOOT_PAGE_DIRECTORIES + gib * 0x1000 | table for gib in range(_GIBS)))
    directories = struct.pack(f"<{_GIBS * _ENTRIES}Q", *(at * _LARGE_PAGE | page for at in range(_GIBS * _ENTRIES)))
    return (
        MemorySegment(layout.BOOT_PML4, pml4, 0x1000),
        MemorySegment(layout.BOOT_PDPT, pdpt, 0x1000),
        MemorySegment(layout.BOOT_PAGE_DIRECTORIES, directories, len(directories)),
    )


@dataclass(frozen=True, slots=True)
class ResetVector:
    """What the reset itself leaves: CS:IP at 16 bytes below 4 GiB."""

    def apply(self, regs: Regs, sregs: Sregs | Sregs2) -> None:
        """Nothing is left to do."""


@dataclass(frozen=True, slots=True)
class RealMode:
    """Real mode at cs:ip, as a BIOS enters it: interrupts off, stack below 0x7c00."""

    cs: int
    ip: int
    data: int
    """The selector of DS, ES, FS and GS; the stack's is 0."""
    dl: int = 0
    """The drive booted from."""

    def apply(self, regs: Regs, sregs: Sregs | Sregs2) -> None:
        """Real mode it is already: what changes are the segments, RIP, the stack and DL."""
        regs.rip, regs.rsp, regs.rflags = self.ip, layout.BOOT_SECTOR, _RFLAGS
        regs.rdx = self.dl
        sregs.cs = _real_segment(self.cs, _EXECUTE_READ)
        for name in _DATA_SEGMENTS:
            setattr(sregs, name, _real_segment(0 if name == "ss" else self.data, _READ_WRITE))


@dataclass(frozen=True, slots=True)
class ProtectedMode:
    """32-bit protected mode with flat segments, no paging, interrupts off."""

    eip: int
    eax: int = 0
    ebx: int = 0
    esi: int = 0
    code: int = CODE32
    data: int = DATA

    def apply(self, regs: Regs, sregs: Sregs | Sregs2) -> None:
        """Segments from the GDT, CR0 and the registers that the format defines."""
        _flat(regs, sregs, self.code, self.data, db=1)
        regs.rip, regs.rax, regs.rbx, regs.rsi = self.eip, self.eax, self.ebx, self.esi
        sregs.cr0 = _CR0_PE | _CR0_ET


@dataclass(frozen=True, slots=True)
class LongMode:
    """64-bit mode with 0–4 GiB identity-mapped, interrupts off, no FPU or SSE enabled."""

    rip: int
    rsi: int = 0
    code: int = CODE64
    data: int = DATA

    def apply(self, regs: Regs, sregs: Sregs | Sregs2) -> None:
        """Segments from the GDT, and everything that paging in long mode needs."""
        _flat(regs, sregs, self.code, self.data, l=1)
        regs.rip, regs.rsi = self.rip, self.rsi
        sregs.cr0 = _CR0_PE | _CR0_ET | _CR0_PG
        sregs.cr3 = layout.BOOT_PML4
        sregs.cr4 = _CR4_PAE
        sregs.efer = _EFER_LME | _EFER_LMA


def _flat(regs: Regs, sregs: Sregs | Sregs2, code: int, data: int, *, db: int = 0, l: int = 0) -> None:  # noqa: E741
    regs.rsp, regs.rflags, regs.rdx = layout.BOOT_STACK, _RFLAGS, 0
    sregs.cs = Segment(limit=_FLAT_LIMIT, selector=code, type=_EXECUTE_READ, present=1, s=1, g=1, db=db, l=l)
    for name in _DATA_SEGMENTS:
        flat = Segment(limit=_FLAT_LIMIT, selector=data, type=_READ_WRITE, present=1, s=1, g=1, db=1)
        setattr(sregs, name, flat)
    sregs.gdt = Dtable(base=layout.BOOT_GDT, limit=_GDT.size - 1)
    sregs.idt = Dtable(base=0, limit=0)  # an interrupt before the guest has its own table is a clean triple fault


def _real_segment(selector: int, kind: int) -> Segment:
    return Segment(base=selector << 4, limit=_REAL_LIMIT, selector=selector, type=kind, present=1, s=1)
