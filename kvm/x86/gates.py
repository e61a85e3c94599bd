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
        words = [int.from_bytes(raw[at : at + 2], "little") for at in range(0, size, 2)]
        offset = words[0]
        if protected:
            offset |= words[3] << 16
        if protected and wide:
            offset |= words[4] << 32 | words[5] << 48
        yield words[1], offset
