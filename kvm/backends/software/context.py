"""The CPU state inside a Unicorn instance, as its saved context holds it (QEMU's ``CPUX86State``).

Unicorn's register API can't set hidden segment state and cuts CR3 short; the saved context can do both and is a plain
memory copy. Its layout is no public interface, so ``engine.calibrate`` proves these offsets before the first guest.
"""

from __future__ import annotations

import ctypes
from typing import Any

_U8, _U16, _U32, _U64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64

HEADER = 40
"""Bytes of Unicorn's own before the CPU state in a saved context."""
SIZE = 5568
"""Bytes of CPU state in a saved context."""


class Segment(ctypes.LittleEndianStructure):
    """A segment register with its hidden part; ``flags`` is the descriptor's upper word."""

    _fields_ = [
        ("selector", _U32), ("pad", _U32), ("base", _U64), ("limit", _U32), ("flags", _U32),
    ]  # fmt: skip
    selector: int
    base: int
    limit: int
    flags: int


_FIELDS: tuple[tuple[int, str, Any], ...] = (
    (0, "regs", _U64 * 16),
    (128, "rip", _U64),
    (136, "rflags", _U64),
    (176, "hflags", _U32),
    (180, "hflags2", _U32),
    (184, "segs", Segment * 6),
    (328, "ldt", Segment),
    (352, "tr", Segment),
    (376, "gdt", Segment),
    (400, "idt", Segment),
    (424, "cr", _U64 * 5),
    (592, "efer", _U64),
    (604, "fpstt", _U32),
    (608, "fpus", _U16),
    (610, "fpuc", _U16),
    (612, "fptags", _U8 * 8),
    (624, "fpregs", (_U8 * 16) * 8),
    (752, "fpop", _U16),
    (760, "fpip", _U64),
    (768, "fpdp", _U64),
    (816, "mxcsr", _U32),
    (824, "zmm", (_U8 * 64) * 16),
    (4800, "sysenter_cs", _U32),
    (4808, "sysenter_esp", _U64),
    (4816, "sysenter_eip", _U64),
    (4824, "star", _U64),
    (4840, "lstar", _U64),
    (4848, "cstar", _U64),
    (4856, "fmask", _U64),
    (4864, "kernel_gs_base", _U64),
    (4896, "tsc_aux", _U64),
    (5384, "error_code", _U32),
    (5388, "exception_is_int", _U32),
    (5392, "exception_next_rip", _U64),
    (5400, "dr", _U64 * 8),
    (5496, "old_exception", ctypes.c_int32),
    (5504, "vmcb", _U64),
    (5520, "intercept", _U64),
    (5528, "intercept_cr_read", _U16),
    (5530, "intercept_cr_write", _U16),
)


def _layout() -> list[tuple[str, Any]]:
    fields: list[tuple[str, Any]] = []
    at = 0
    for offset, name, kind in _FIELDS:
        if offset > at:
            fields.append((f"gap_{at}", _U8 * (offset - at)))
        fields.append((name, kind))
        at = offset + ctypes.sizeof(kind)
    fields.append((f"gap_{at}", _U8 * (SIZE - at)))
    return fields


class Context(ctypes.LittleEndianStructure):
    """The part of ``CPUX86State`` that a saved context holds; between runs of the engine it is the truth."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = _layout()
    regs: ctypes.Array[ctypes.c_uint64]
    rip: int
    rflags: int
    hflags: int
    hflags2: int
    segs: ctypes.Array[Segment]
    ldt: Segment
    tr: Segment
    gdt: Segment
    idt: Segment
    cr: ctypes.Array[ctypes.c_uint64]
    efer: int
    fpstt: int
    fpus: int
    fpuc: int
    fptags: ctypes.Array[ctypes.c_uint8]
    fpregs: ctypes.Array[ctypes.Array[ctypes.c_uint8]]
    fpop: int
    fpip: int
    fpdp: int
    mxcsr: int
    zmm: ctypes.Array[ctypes.Array[ctypes.c_uint8]]
    sysenter_cs: int
    sysenter_esp: int
    sysenter_eip: int
    star: int
    lstar: int
    cstar: int
    fmask: int
    kernel_gs_base: int
    tsc_aux: int
    error_code: int
    exception_is_int: int
    exception_next_rip: int
    dr: ctypes.Array[ctypes.c_uint64]
    old_exception: int
    vmcb: int
    intercept: int
    intercept_cr_read: int
    intercept_cr_write: int


PHYSICAL_BITS = 39
"""Width of a guest-physical address: one bit less than the emulator has."""

ES, CS, SS, DS, FS, GS = range(6)
RAX, RCX, RDX, RBX, RSP, _, RSI, RDI = range(8)

CR0_PE, CR0_PG = 1 << 0, 1 << 31
CR4_TSD, CR4_PSE, CR4_PAE, CR4_OSFXSR, CR4_SMAP = 1 << 2, 1 << 4, 1 << 5, 1 << 9, 1 << 21
EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE = 1 << 0, 1 << 8, 1 << 10, 1 << 11
RFLAGS_TF, RFLAGS_IF, RFLAGS_NT, RFLAGS_RF, RFLAGS_VM, RFLAGS_AC = 1 << 8, 1 << 9, 1 << 14, 1 << 16, 1 << 17, 1 << 18
DESC_P, DESC_S, DESC_L, DESC_B, DESC_G = 1 << 15, 1 << 12, 1 << 21, 1 << 22, 1 << 23

HF_INHIBIT_IRQ = 1 << 3
_HF_CS32, _HF_SS32, _HF_ADDSEG, _HF_PE, _HF_LMA, _HF_CS64 = 1 << 4, 1 << 5, 1 << 6, 1 << 7, 1 << 14, 1 << 15
_HF_GUEST, _HF_OSFXSR, _HF_SMAP = 1 << 21, 1 << 22, 1 << 23


def long_mode(cpu: Context) -> bool:
    """IA-32e mode is active (64-bit or compatibility)."""
    return bool(cpu.efer & EFER_LMA)


def code64(cpu: Context) -> bool:
    """The code segment is a 64-bit one."""
    return long_mode(cpu) and bool(cpu.segs[CS].flags & DESC_L)


def cpl(cpu: Context) -> int:
    """The current privilege level."""
    return cpu.hflags & 3


def recompute_hflags(cpu: Context) -> None:
    """Derive the emulator's summary of mode and segments after segments, CR0, CR4 or EFER were set by hand.

    The emulator always runs in its "SVM guest" state: that makes RDTSC, RDMSR, HLT, CPUID and their like come
    out to us at no cost for the instructions between.
    """
    cr0, cr4, flags = cpu.cr[0], cpu.cr[4], cpu.segs[CS].flags
    hidden = _HF_GUEST | (cpu.hflags & HF_INHIBIT_IRQ) | (cr0 & 0xE) << 8
    if cr4 & CR4_OSFXSR:
        hidden |= _HF_OSFXSR
    if cr4 & CR4_SMAP:
        hidden |= _HF_SMAP
    if cr0 & CR0_PE:
        hidden |= _HF_PE | (3 if cpu.rflags & RFLAGS_VM else cpu.segs[SS].flags >> 13 & 3)
    if cpu.efer & EFER_LMA:
        hidden |= _HF_LMA
    if cpu.efer & EFER_LMA and flags & DESC_L:
        cpu.hflags = hidden | _HF_CS32 | _HF_SS32 | _HF_CS64
        return
    if flags & DESC_B:
        hidden |= _HF_CS32
    if cpu.segs[SS].flags & DESC_B:
        hidden |= _HF_SS32
    flat = not (cpu.segs[DS].base | cpu.segs[ES].base | cpu.segs[SS].base)
    if not cr0 & CR0_PE or cpu.rflags & RFLAGS_VM or not flags & DESC_B or not flat:
        hidden |= _HF_ADDSEG
    cpu.hflags = hidden


def load_segment(cpu: Context, index: int, selector: int, base: int, limit: int, flags: int) -> None:
    """Set one segment register, visible and hidden part."""
    segment = cpu.segs[index]
    segment.selector, segment.base, segment.limit, segment.flags = selector, base, limit, flags
