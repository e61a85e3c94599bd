"""May the guest use these I/O ports? The emulator lets everybody (SDM vol. 1, 19.5)."""

from __future__ import annotations

from kvm.backends.software import context, paging
from kvm.backends.software.context import CR0_PE, RFLAGS_VM, Context
from kvm.backends.software.memory import Slots
from kvm.backends.software.paging import Fault

_IOPL = 12
_TASK32 = (0x9, 0xB)
"""A 32- or 64-bit TSS, available or busy: 16-bit ones have no bitmap."""
_MAP_BASE = 102
"""Where a TSS says where its bitmap begins."""


def may_use(cpu: Context, slots: Slots, port: int, size: int) -> bool:
    """By privilege level, else by the task's bitmap: a bit set there refuses."""
    if not cpu.cr[0] & CR0_PE:
        return True
    if not cpu.rflags & RFLAGS_VM and context.cpl(cpu) <= cpu.rflags >> _IOPL & 3:
        return True
    task = cpu.tr
    if task.flags >> 8 & 0xF not in _TASK32 or task.limit < _MAP_BASE + 1:
        return False
    try:
        at = int.from_bytes(paging.read(cpu, slots, task.base + _MAP_BASE, 2), "little") + port // 8
        if at + 1 > task.limit:
            return False
        bits = int.from_bytes(paging.read(cpu, slots, task.base + at, 2), "little") >> port % 8
    except Fault:
        return False
    return not bits & (1 << size) - 1
