"""A PC boot sector: 512 bytes at 0x7c00 in real mode, as a BIOS starts them, but without a BIOS to call."""

from __future__ import annotations

from kvm.boot.entry import RealMode
from kvm.boot.image import BootImage, Placed, Segment, Source, check_places
from kvm.x86 import layout

SIZE = 512
SIGNATURE = b"\x55\xaa"
_FIRST_HARD_DISK = 0x80


def why_not(data: bytes) -> str:
    """Why this can't be a boot sector; empty if it can."""
    if data[SIZE - 2 : SIZE] != SIGNATURE:
        return "the signature 55 aa isn't at its offset 510"
    if len(data) != SIZE:
        return (
            f"it has {len(data)} bytes, a boot sector has {SIZE}, and there is no disk to read the rest from "
            "(--format flat16 loads a file whole at 0x7c00)"
        )
    return ""


def load_bootsector(source: Source) -> BootImage:
    """All segments 0, stack below 0x7c00, DL = 0x80."""
    if why := why_not(source.data):
        raise source.error(f"{why}. Choose another --format.")
    check_places(source, (Placed("the boot sector", layout.BOOT_SECTOR, SIZE),))
    segment = Segment(layout.BOOT_SECTOR, source.data, SIZE)
    entry = RealMode(cs=0, ip=layout.BOOT_SECTOR, data=0, dl=_FIRST_HARD_DISK)
    return BootImage(source.path, "bootsector", (segment,), b"", entry)
