"""A VCPU's registers as KVM's structs, and back: what the emulator's context holds."""

from __future__ import annotations

import ctypes
import errno
from functools import lru_cache

from kvm.backends.software import context
from kvm.backends.software.context import (
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    DESC_P,
    EFER_LMA,
    EFER_LME,
    Context,
    recompute_hflags,
)
from kvm.x86.structs import DebugRegs, Fpu, Regs, Segment, Sregs, Sregs2, Xsave

_GENERAL = (0, 3, 1, 2, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15)
"""struct kvm_regs' order (rax rbx rcx rdx rsi rdi rsp rbp…) in the machine's (rax rcx rdx rbx rsp rbp rsi rdi…)."""
_SEGMENTS = (
    ("cs", context.CS), ("ds", context.DS), ("es", context.ES), ("fs", context.FS), ("gs", context.GS),
    ("ss", context.SS),
)  # fmt: skip
_ATTRIBUTES = (
    ("type", 8, 0xF), ("s", 12, 1), ("dpl", 13, 3), ("present", 15, 1), ("avl", 20, 1), ("l", 21, 1), ("db", 22, 1),
    ("g", 23, 1),
)  # fmt: skip
_AVAILABLE_TSS, _BUSY = (0x1, 0x9), 0x2
_ACCESSED = 0x1
_CR0_NW, _CR0_CD = 1 << 29, 1 << 30
_MXCSR_MASK = 0xFFFF
_X87_SSE = 3


class Invalid(Exception):
    """The kernel would refuse this state: EINVAL. The message names the field and its value."""

    errno = errno.EINVAL


def get_regs(cpu: Context) -> bytes:
    """struct kvm_regs."""
    return bytes(Regs(*(cpu.regs[number] for number in _GENERAL), cpu.rip, cpu.rflags))


def put_regs(cpu: Context, raw: bytes) -> None:
    """Set them from struct kvm_regs."""
    regs = Regs.from_buffer_copy(raw)
    for number, (name, _) in zip(_GENERAL, Regs._fields_[:16], strict=True):  # type: ignore[misc]
        cpu.regs[number] = getattr(regs, name)
    cpu.rip = regs.rip
    cpu.rflags = regs.rflags & 0x3F7FD5 | 2
    recompute_hflags(cpu)


def _get_segment(segment: context.Segment) -> Segment:
    return _segment(segment.base, segment.limit, segment.selector & 0xFFFF, segment.flags)


@lru_cache(256)
def _segment(base: int, limit: int, selector: int, flags: int) -> Segment:
    """Remembered: there are few, and each sample has eight. The caller copies it."""
    out = Segment(base, limit, selector)
    for name, shift, mask in _ATTRIBUTES:
        setattr(out, name, flags >> shift & mask)
    if out.s and out.present:
        # The emulator's far jumps and returns leave CS as the descriptor was; VM entry insists on this bit too.
        out.type |= _ACCESSED
    out.unusable = not out.present
    return out


def _put_segment(segment: context.Segment, new: Segment) -> None:
    flags = sum((getattr(new, name) & mask) << shift for name, shift, mask in _ATTRIBUTES)
    if new.unusable:
        flags &= ~DESC_P
    segment.selector, segment.base, segment.limit, segment.flags = new.selector, new.base, new.limit, flags


def get_sregs(cpu: Context, sregs: Sregs | Sregs2, apic_base: int, cr8: int) -> None:
    """Fill in struct kvm_sregs or kvm_sregs2, all but the PDPTRs."""
    for name, index in _SEGMENTS:
        setattr(sregs, name, _get_segment(cpu.segs[index]))
    sregs.tr, sregs.ldt = _get_segment(cpu.tr), _get_segment(cpu.ldt)
    if sregs.tr.type in _AVAILABLE_TSS:
        # The emulator's LTR marks the task busy in the GDT only; VM entry insists on busy here (SDM 3C, 27.3.1.2).
        sregs.tr.type |= _BUSY
    for table, here in ((sregs.gdt, cpu.gdt), (sregs.idt, cpu.idt)):
        table.base, table.limit = here.base, here.limit
    sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4 = (cpu.cr[number] for number in (0, 2, 3, 4))
    sregs.cr8, sregs.efer, sregs.apic_base = cr8, cpu.efer, apic_base


def check_sregs(sregs: Sregs | Sregs2) -> None:
    """What KVM_SET_SREGS refuses. Raises Invalid."""
    cr0, efer = sregs.cr0, sregs.efer
    if cr0 >> 32 or (cr0 & _CR0_NW and not cr0 & _CR0_CD) or (cr0 & CR0_PG and not cr0 & CR0_PE):
        raise Invalid(f"cr0={cr0:#x}")
    if sregs.cr4 >> 23:
        raise Invalid(f"cr4={sregs.cr4:#x}")
    if efer & ~0xD01:
        raise Invalid(f"efer={efer:#x}")
    if efer & EFER_LME and cr0 & CR0_PG:
        if not sregs.cr4 & CR4_PAE or not efer & EFER_LMA:
            raise Invalid(f"long mode with cr4={sregs.cr4:#x}, efer={efer:#x}: needs PAE and LMA")
    elif efer & EFER_LMA or sregs.cs.l:
        raise Invalid(f"efer={efer:#x}, cs.l={sregs.cs.l}: LMA or a 64-bit code segment outside long mode")
    if sregs.cr3 >> context.PHYSICAL_BITS:
        raise Invalid(f"cr3={sregs.cr3:#x}: past the physical address space")


def put_sregs(cpu: Context, sregs: Sregs | Sregs2) -> None:
    """Set what ``check_sregs`` has passed."""
    for name, index in _SEGMENTS:
        _put_segment(cpu.segs[index], getattr(sregs, name))
    _put_segment(cpu.tr, sregs.tr)
    _put_segment(cpu.ldt, sregs.ldt)
    for table, here in ((sregs.gdt, cpu.gdt), (sregs.idt, cpu.idt)):
        here.base, here.limit = table.base, table.limit
    for number, value in ((0, sregs.cr0), (2, sregs.cr2), (3, sregs.cr3), (4, sregs.cr4)):
        cpu.cr[number] = value
    cpu.efer = sregs.efer
    recompute_hflags(cpu)


def _status(cpu: Context) -> int:
    return cpu.fpus & ~0x3800 | (cpu.fpstt & 7) << 11


def _tags(cpu: Context) -> int:
    """The abridged tag byte: a bit set for each register in use."""
    return sum(1 << number for number in range(8) if not cpu.fptags[number])


def _put_x87(cpu: Context, area: Xsave | Fpu, tags: int, registers: list[bytes]) -> None:
    cpu.fpuc, cpu.fpstt, cpu.fpus = area.fcw, area.fsw >> 11 & 7, area.fsw & ~0x3800
    for number in range(8):
        cpu.fptags[number] = not tags >> number & 1
        cpu.fpregs[cpu.fpstt + number & 7][:10] = list(registers[number][:10])


def _x87_registers(cpu: Context) -> bytes:
    return b"".join(bytes(cpu.fpregs[cpu.fpstt + number & 7])[:10].ljust(16, b"\0") for number in range(8))


def get_xsave(cpu: Context, size: int) -> bytes:
    """struct kvm_xsave: x87 and SSE, in the standard format."""
    area = Xsave(cpu.fpuc, _status(cpu), _tags(cpu), 0, cpu.fpop, cpu.fpip, cpu.fpdp, cpu.mxcsr)
    area.mxcsr_mask, area.xstate_bv = _MXCSR_MASK, _X87_SSE
    raw = bytearray(bytes(area).ljust(size, b"\0"))
    raw[32:160] = _x87_registers(cpu)
    raw[160:416] = b"".join(bytes(cpu.zmm[number])[:16] for number in range(16))
    return bytes(raw)


_INITIAL = bytes(Xsave(fcw=0x37F, mxcsr=0x1F80, xstate_bv=_X87_SSE))


def put_xsave(cpu: Context, raw: bytes) -> None:
    """Set x87 and SSE; a part whose XSTATE_BV bit is clear gets its initial state. Raises Invalid."""
    area = Xsave.from_buffer_copy(raw)
    if area.xstate_bv & ~_X87_SSE or area.xcomp_bv:
        raise Invalid(f"xstate_bv={area.xstate_bv:#x}, xcomp_bv={area.xcomp_bv:#x}: only x87 and SSE exist here")
    if area.mxcsr & ~_MXCSR_MASK:
        raise Invalid(f"mxcsr={area.mxcsr:#x}")
    x87 = raw if area.xstate_bv & 1 else _INITIAL
    sse = raw if area.xstate_bv & 2 else _INITIAL
    legacy = Xsave.from_buffer_copy(x87)
    _put_x87(cpu, legacy, legacy.ftw, [x87[32 + at : 48 + at] for at in range(0, 128, 16)])
    cpu.fpop, cpu.fpip, cpu.fpdp = (int.from_bytes(x87[at : at + n], "little") for at, n in ((6, 2), (8, 8), (16, 8)))
    for number in range(16):
        cpu.zmm[number][:16] = list(sse[160 + number * 16 : 176 + number * 16])
    cpu.mxcsr = area.mxcsr


def get_debugregs(cpu: Context) -> bytes:
    """struct kvm_debugregs."""
    return bytes(DebugRegs((ctypes.c_uint64 * 4)(*cpu.dr[:4]), cpu.dr[6], cpu.dr[7]))


def put_debugregs(cpu: Context, raw: bytes) -> None:
    """Set DR0-7. Raises Invalid for flags or upper halves that aren't zero."""
    new = DebugRegs.from_buffer_copy(raw)
    if new.flags or new.dr6 >> 32 or new.dr7 >> 32:
        raise Invalid(f"flags={new.flags:#x}, dr6={new.dr6:#x}, dr7={new.dr7:#x}")
    for number in range(4):
        cpu.dr[number] = new.db[number]
    cpu.dr[6], cpu.dr[7] = new.dr6, new.dr7
