"""Where exceptions go: the gates of the IDT, in real mode the vectors of the IVT (SDM vol. 3A, 6.10, 6.14, 20.1.4)."""

from __future__ import annotations

from collections.abc import Iterator

from kvm.x86.decode import CR0_PE, EFER_LMA
from kvm.x86.paging import Read
from kvm.x86.structs import Sregs, Sregs2

EXCEPTIONS = 32
"""Vectors that the processor's own exceptions have; the rest are for interrupts."""


def handlers(sregs: Sregs | Sregs2, read: Read) -> Iterator[tuple[int, int]]:
    """(code segment's selector, RIP) of every exception's handler. ``read``: *linear* address and size to bytes."""
    protected, wide = sregs.cr0 & CR0_PE, sregs.efer & EFER_LMA
    size = (16 if wide else 8) if protected else 4
    for vector in range(EXCEPTIONS):
        raw = read(sregs.idt.base + vector * size, size)
        if vector * size + size - 1 > sregs.idt.limit or len(raw) < size:
            return
        yield int.from_bytes(raw[2:4], "little"), offset(raw)


def offset(gate: bytes) -> int:
    """The handler's RIP in a gate of 16 or 8 bytes, or in an entry of the IVT, which has 4."""
    return int.from_bytes(gate[:2] + gate[6:12], "little") if len(gate) > 4 else int.from_bytes(gate[:2], "little")
