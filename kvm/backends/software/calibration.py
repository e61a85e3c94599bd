"""Proof that this Unicorn is the one whose insides the backend knows: its saved context and its instruction counters.

Marker values go in through Unicorn's own register API and must be found at the offsets of ``context.Context``; the rest
(the summary of modes, intercepts) is proven by ``system.self_check``, which runs a guest.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

from unicorn import unicorn_const as const
from unicorn import x86_const as x86
from unicorn.unicorn_py3.arch.types import uc_context
from unicorn.unicorn_py3.unicorn import Uc, uclib

from kvm.backends.software import context
from kvm.backends.software.context import Context
from kvm.errors import BackendUnavailable

VERSION = "2.1.4"

_ST0 = 0xAAAA_0000_1111_2222
_XMM3 = 0x9999_8888_7777_6666_5555_4444_3333_2222

_MARKERS: tuple[tuple[int, Any, Any], ...] = (
    (x86.UC_X86_REG_RAX, 0x1111_2222_3333_4440, lambda cpu: cpu.regs[0]),
    (x86.UC_X86_REG_RSP, 0x1111_2222_3333_4444, lambda cpu: cpu.regs[4]),
    (x86.UC_X86_REG_R15, 0x1111_2222_3333_444F, lambda cpu: cpu.regs[15]),
    (x86.UC_X86_REG_RIP, 0x5555_6666_7777_8888, lambda cpu: cpu.rip),
    (x86.UC_X86_REG_CR2, 0x7771_1223_3445, lambda cpu: cpu.cr[2]),
    (x86.UC_X86_REG_CR3, 0x1234_5670_0000, lambda cpu: cpu.cr[3]),
    (x86.UC_X86_REG_GDTR, (0, 0xABC1, 0x7777, 0), lambda cpu: (0, cpu.gdt.base, cpu.gdt.limit, 0)),
    (x86.UC_X86_REG_IDTR, (0, 0xABC2, 0x6666, 0), lambda cpu: (0, cpu.idt.base, cpu.idt.limit, 0)),
    (
        x86.UC_X86_REG_LDTR,
        (0x48, 0xABC3, 0x5555, 0x8200),
        lambda cpu: (cpu.ldt.selector, cpu.ldt.base, cpu.ldt.limit, cpu.ldt.flags),
    ),
    (
        x86.UC_X86_REG_TR,
        (0x58, 0xABC4, 0x4444, 0x8B00),
        lambda cpu: (cpu.tr.selector, cpu.tr.base, cpu.tr.limit, cpu.tr.flags),
    ),
    (x86.UC_X86_REG_FS_BASE, 0xF5F5_0000_0001, lambda cpu: cpu.segs[context.FS].base),
    (x86.UC_X86_REG_GS_BASE, 0xA5A5_0000_0001, lambda cpu: cpu.segs[context.GS].base),
    (x86.UC_X86_REG_ST0, _ST0, lambda cpu: int.from_bytes(cpu.fpregs[0][:8], "little")),
    (x86.UC_X86_REG_XMM3, _XMM3, lambda cpu: int.from_bytes(cpu.zmm[3][:16], "little")),
    (x86.UC_X86_REG_MXCSR, 0x1F90, lambda cpu: cpu.mxcsr),
    (x86.UC_X86_REG_FPCW, 0x27F, lambda cpu: cpu.fpuc),
    (x86.UC_X86_REG_FPSW, 0x1846, lambda cpu: cpu.fpus & ~0x3800 | cpu.fpstt << 11),
    (x86.UC_X86_REG_FPTAG, 0xC30F, lambda cpu: sum(3 << 2 * number for number in range(8) if cpu.fptags[number])),
    (x86.UC_X86_REG_DR0, 0xDDDD_0000, lambda cpu: cpu.dr[0]),
    (x86.UC_X86_REG_DR6, 0xDDDD_0006, lambda cpu: cpu.dr[6]),
)
_MSR_MARKERS: tuple[tuple[int, int, str], ...] = (
    (0x174, 0x1174, "sysenter_cs"),
    (0x175, 0x1_0000_0175, "sysenter_esp"),
    (0x176, 0x1_0000_0176, "sysenter_eip"),
    (0xC0000081, 0x1_0000_0081, "star"),
    (0xC0000082, 0x1_0000_0082, "lstar"),
    (0xC0000083, 0x1_0000_0083, "cstar"),
    (0xC0000084, 0x1_0000_0084, "fmask"),
    (0xC0000102, 0x1_0000_0102, "kernel_gs_base"),
    (0xC0000103, 0x103, "tsc_aux"),
    (0xC0000080, 0xD01, "efer"),
)
_BUDGET = 12345


def _usable_size(pointer: int) -> int:
    """Bytes of the heap block that starts here: how far a search may look."""
    name = {"linux": "malloc_usable_size", "darwin": "malloc_size", "win32": "_msize"}[sys.platform]
    library = ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None)
    function = getattr(library, name)
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_size_t
    return int(function(pointer))


def _fail(what: str) -> BackendUnavailable:
    return BackendUnavailable(
        f"the software backend knows the insides of Unicorn {VERSION} only, and in the one that is installed {what} is "
        f"not where it should be. Install the right one: pip install unicorn=={VERSION}"
    )


@functools.cache
def counter_offsets() -> tuple[int, int]:
    """Where in Unicorn's engine struct the count of instructions begun and the budget are, in bytes.

    Raises BackendUnavailable if they, or a field of the saved context, can't be found.
    """
    uc: Any = Uc(const.UC_ARCH_X86, const.UC_MODE_64)
    handle = uc._uch
    saved: Any = uc_context()
    uclib.uc_context_alloc(handle, ctypes.byref(saved))
    try:
        if uclib.uc_context_size(handle) != context.HEADER + context.SIZE:
            raise _fail("the saved context")
        cpu = Context.from_address(saved.value + context.HEADER)
        for register, marker, _ in _MARKERS:
            uc.reg_write(register, marker)
        for msr, marker, _ in _MSR_MARKERS:
            uc.msr_write(msr, marker)
        uclib.uc_context_save(handle, saved)
        for register, marker, read in _MARKERS:
            if read(cpu) != marker:
                raise _fail(f"register {register} ({read(cpu)!r} for {marker!r})")
        for msr, marker, name in _MSR_MARKERS:
            if getattr(cpu, name) != marker:
                raise _fail(f"MSR {msr:#x}")
        return _find_counters()
    finally:
        uclib.uc_context_free(saved)


def _find_counters() -> tuple[int, int]:
    uc: Any = Uc(const.UC_ARCH_X86, const.UC_MODE_64)
    uc.mem_map(0, 4096)
    uc.mem_write(0, b"\xeb\xfe")
    uc.emu_start(0, 4096, count=_BUDGET)
    pointer = uc._uch.value
    engine = ctypes.string_at(pointer, _usable_size(pointer))
    begun, budget = (engine.find(value.to_bytes(8, "little")) for value in (_BUDGET + 1, _BUDGET))
    if begun < 0 or budget < 0:
        raise _fail("the instruction counter")
    return begun, budget
