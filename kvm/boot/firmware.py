"""A firmware image: read-only memory that ends at 4 GiB, entered at the reset vector."""

from __future__ import annotations

from kvm.boot.entry import ResetVector
from kvm.boot.image import BootImage, Placed, Segment, Source, check_places
from kvm.x86 import layout

_PAGE = 0x1000
_VECTOR = 16
"""The reset vector's distance from the end."""
_BEFORE_JUMP = (b"\x90", b"\xfa", b"\xfc", b"\x0f\x09", b"\x0f\x20\xc0", b"\xa8\x01")
"""nop, cli, cld, wbinvd; OVMF's mov eax,cr0 and test al,1: what firmware has before the jump."""
_JUMPS = (0xEA, 0xE9, 0xEB, 0x74)
"""jmp far, near and short; je."""


def why_not(data: bytes) -> str:
    """Why this can't be a firmware image; empty if it can."""
    if len(data) % _PAGE or len(data) > layout.MAX_ROM:
        return f"it has {len(data)} bytes: not a multiple of 4 KiB up to 16 MiB"
    return ""


def why_unlike(data: bytes) -> str:
    """Why this doesn't look like one: the reset vector must hold a jump."""
    if why := why_not(data):
        return why
    code = data[-_VECTOR:]
    while skip := next((len(prefix) for prefix in _BEFORE_JUMP if code.startswith(prefix)), 0):
        code = code[skip:]
    return "" if code and code[0] in _JUMPS else "there is no jump at its reset vector, 16 bytes before its end"


def load_firmware(source: Source) -> BootImage:
    """The last 128 KiB are also in RAM below 1 MiB, where real-mode code expects them, writable as shadow RAM is."""
    if why := why_not(source.data):
        raise source.error(f"{why}. Pad it, with the reset vector 16 bytes before the end, or choose another --format.")
    copy = source.data[-layout.BIOS_COPY :]
    address = layout.BIOS_END - len(copy)
    check_places(source, (Placed("the copy below 1 MiB", address, len(copy)),))
    return BootImage(source.path, "firmware", (Segment(address, copy, len(copy)),), source.data, ResetVector())
