"""Guest-virtual memory as interrupt delivery sees it: page walks, accessed and dirty bits, faults and their codes."""

from __future__ import annotations

from kvm.backends.interface import PAGE_SIZE
from kvm.backends.software.context import CR0_PG, CR4_PAE, CR4_PSE, EFER_LMA, EFER_NXE, Context
from kvm.backends.software.memory import Slots

_P, _W, _U, _A, _D, _PS, _NX = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 7, 1 << 63
_CR0_WP = 1 << 16
_ADDRESS = 0x000F_FFFF_FFFF_F000


class Fault(Exception):
    """A CPU exception met while working on the guest's behalf."""

    def __init__(self, vector: int, error_code: int | None, cr2: int | None = None) -> None:
        self.vector = vector
        self.error_code = error_code
        self.cr2 = cr2


def _levels(cpu: Context, linear: int) -> tuple[int, int, tuple[int, ...]]:
    """The root table's address, an entry's size in bytes, and the lowest address bit that each level decides."""
    if cpu.efer & EFER_LMA:
        return cpu.cr[3] & _ADDRESS, 8, (39, 30, 21, 12)
    if cpu.cr[4] & CR4_PAE:
        root = int(cpu.cr[3]) & 0xFFFF_FFE0
        return root, 8, (30, 21, 12)
    return cpu.cr[3] & 0xFFFF_F000, 4, (22, 12)


def translate(cpu: Context, slots: Slots, linear: int, *, write: bool = False, user: bool = False) -> int:
    """The guest-physical address of a linear one. Raises Fault (#PF with its code, #GP if not canonical)."""
    if not cpu.cr[0] & CR0_PG:
        return linear & 0xFFFF_FFFF
    code = (2 if write else 0) | (4 if user else 0)
    if cpu.efer & EFER_LMA:
        if linear >> 47 not in (0, 0x1FFFF):
            raise Fault(13, 0)
    else:
        linear &= 0xFFFF_FFFF
    table, size, shifts = _levels(cpu, linear)
    bits = 9 if size == 8 else 10
    rights = _W | _U
    path: list[tuple[int, int]] = []
    for level, shift in enumerate(shifts):
        at = table + (linear >> shift & (1 << bits) - 1) * size
        entry = int.from_bytes(slots.read(at, size), "little")
        if not entry & _P:
            raise Fault(14, code, linear)
        if entry & _NX and size == 8 and not cpu.efer & EFER_NXE:
            raise Fault(14, code | 9, linear)
        pdpte = len(shifts) == 3 and level == 0
        if not pdpte:  # PAE's top level has neither rights nor an accessed bit
            rights &= entry
            path.append((at, entry))
        large = shift != 12 and not pdpte and entry & _PS and (size == 8 or cpu.cr[4] & CR4_PSE)
        if large or shift == 12:
            break
        table = entry & (_ADDRESS if size == 8 else 0xFFFF_F000)
    if user and not rights & _U:
        raise Fault(14, code | 1, linear)
    if write and not rights & _W and (user or cpu.cr[0] & _CR0_WP):
        raise Fault(14, code | 1, linear)
    for at, entry in path:
        marked = entry | _A | (_D if write and at == path[-1][0] else 0)
        if marked != entry:
            slots.write(at, marked.to_bytes(size, "little"))
    page = (entry & (_ADDRESS if size == 8 else 0xFFFF_F000)) & -(1 << shift)
    if size == 4 and shift == 22:
        page |= (entry & 0x1FE000) << 19  # PSE-36
    return page | linear & (1 << shift) - 1


def _pieces(linear: int, size: int) -> list[tuple[int, int]]:
    first = min(size, PAGE_SIZE - linear % PAGE_SIZE)
    return [(linear, first)] if first == size else [(linear, first), (linear + first, size - first)]


def read(cpu: Context, slots: Slots, linear: int, size: int, *, user: bool = False) -> bytes:
    """Up to a page of guest-virtual memory. Raises Fault."""
    pieces = _pieces(linear, size)
    if len(pieces) == 1:
        return slots.read(translate(cpu, slots, linear, user=user), size)
    return b"".join(slots.read(translate(cpu, slots, at, user=user), length) for at, length in pieces)


def write(cpu: Context, slots: Slots, linear: int, data: bytes, *, user: bool = False) -> None:
    """Write up to a page of guest-virtual memory, all or nothing. Raises Fault."""
    pieces = [
        (translate(cpu, slots, at, write=True, user=user), at - linear, length)
        for at, length in _pieces(linear, len(data))
    ]
    for physical, offset, length in pieces:
        slots.write(physical, data[offset : offset + length])
