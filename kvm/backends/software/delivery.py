"""Exceptions, software and hardware interrupts: from the vector to the handler's first instruction.

Unicorn only says that something happened; the IVT, the IDT, stack switches, error codes, double and triple faults are
here (SDM vol. 3, chapter 6).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvm.backends.software import context, paging
from kvm.backends.software.context import (
    CR0_PE,
    CS,
    DESC_B,
    DESC_G,
    DESC_L,
    DESC_P,
    DESC_S,
    DS,
    EFER_SCE,
    ES,
    FS,
    GS,
    RCX,
    RFLAGS_AC,
    RFLAGS_IF,
    RFLAGS_NT,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_VM,
    RSP,
    SS,
    Context,
    load_segment,
    recompute_hflags,
)
from kvm.backends.software.memory import Slots
from kvm.backends.software.paging import Fault

DB, NMI, BP, UD, DF, TS, NP, SS_FAULT, GP, PF = 1, 2, 3, 6, 8, 10, 11, 12, 13, 14

_WITH_ERROR_CODE = frozenset((8, 10, 11, 12, 13, 14, 17))
_CONTRIBUTORY = frozenset((0, 10, 11, 12, 13))
_NOT_FAULTS = frozenset((DB, NMI, BP, 4, DF, 18))
"""Traps, aborts and interrupts: all others push RF set."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something to deliver. ``software``: an INT instruction, whose gate must allow it; ``external``: an interrupt.

    ``resume`` is the RIP that goes on the stack, ``fault_rip`` where a fault during the delivery points.
    """

    vector: int
    resume: int
    fault_rip: int
    error_code: int | None = None
    software: bool = False
    external: bool = False

    @property
    def exception(self) -> bool:
        return not (self.software or self.external)


def exception(cpu: Context, vector: int, error_code: int = 0) -> Event:
    """A CPU exception at the current RIP; the error code counts only for the vectors that have one."""
    return Event(vector, cpu.rip, cpu.rip, error_code if vector in _WITH_ERROR_CODE else None)


def interrupt(cpu: Context, vector: int) -> Event:
    """A hardware interrupt, or an NMI."""
    return Event(vector, cpu.rip, cpu.rip, external=True)


def software_interrupt(cpu: Context, slots: Slots, vector: int) -> Event:
    """INT n, INT3 or INTO; the emulator has already stepped over it."""
    base = 0 if context.code64(cpu) else cpu.segs[CS].base
    try:
        before = paging.read(cpu, slots, base + cpu.rip - 2, 2)
    except Fault:
        before = b""
    length = 2 if before == bytes((0xCD, vector)) else 1
    return Event(vector, cpu.rip, cpu.rip - length, software=True)


def deliver(cpu: Context, slots: Slots, event: Event) -> bool:
    """Enter the handler, or that of the fault met on the way there. False: a triple fault."""
    while True:
        try:
            if cpu.cr[0] & CR0_PE:
                _enter_protected(cpu, slots, event)
            else:
                _enter_real(cpu, slots, event)
        except Fault as fault:
            if fault.cr2 is not None:
                cpu.cr[2] = fault.cr2
            if event.exception and event.vector == DF:
                return False
            cpu.rip = event.fault_rip
            event = _combine(cpu, event, fault)
        else:
            break
    cpu.old_exception = -1
    cpu.hflags &= ~context.HF_INHIBIT_IRQ
    recompute_hflags(cpu)
    return True


def _combine(cpu: Context, first: Event, second: Fault) -> Event:
    """What a fault during a delivery becomes (SDM vol. 3, table 6-5)."""
    serious = first.exception and (
        (first.vector in _CONTRIBUTORY and second.vector in _CONTRIBUTORY)
        or (first.vector == PF and (second.vector == PF or second.vector in _CONTRIBUTORY))
    )
    return exception(cpu, DF) if serious else exception(cpu, second.vector, second.error_code or 0)


def _enter_real(cpu: Context, slots: Slots, event: Event) -> None:
    at = event.vector * 4
    if at + 3 > cpu.idt.limit:
        raise Fault(GP, 0)
    vector = paging.read(cpu, slots, cpu.idt.base + at, 4)
    stack = cpu.segs[SS]
    mask = 0xFFFF_FFFF if stack.flags & DESC_B else 0xFFFF
    frame = b"".join(
        value.to_bytes(2, "little") for value in (event.resume & 0xFFFF, cpu.segs[CS].selector, cpu.rflags & 0xFFFF)
    )
    top = (cpu.regs[RSP] - 6) & mask
    paging.write(cpu, slots, (stack.base + top) & 0xFFFF_FFFF, frame)
    cpu.regs[RSP] = cpu.regs[RSP] & ~mask | top
    cpu.rflags &= ~(RFLAGS_IF | RFLAGS_TF | RFLAGS_AC | RFLAGS_RF)
    cpu.rip = int.from_bytes(vector[:2], "little")
    cpu.segs[CS].selector = int.from_bytes(vector[2:], "little")
    cpu.segs[CS].base = cpu.segs[CS].selector << 4


@dataclass(slots=True)
class _Descriptor:
    selector: int
    low: int
    flags: int

    @property
    def base(self) -> int:
        return self.low >> 16 | (self.flags & 0xFF) << 16 | self.flags & 0xFF00_0000

    @property
    def limit(self) -> int:
        limit = self.low & 0xFFFF | self.flags & 0xF_0000
        return limit << 12 | 0xFFF if self.flags & DESC_G else limit

    @property
    def dpl(self) -> int:
        return self.flags >> 13 & 3

    def load(self, cpu: Context, index: int, selector: int) -> None:
        load_segment(cpu, index, selector, self.base, self.limit, self.flags)


def _descriptor(cpu: Context, slots: Slots, selector: int, vector: int) -> _Descriptor:
    """A descriptor from the GDT or LDT; outside of it, Fault ``vector`` with the selector."""
    table = cpu.ldt if selector & 4 else cpu.gdt
    offset = selector & ~7
    if offset + 7 > table.limit:
        raise Fault(vector, selector & 0xFFFC)
    raw = paging.read(cpu, slots, table.base + offset, 8)
    return _Descriptor(selector, int.from_bytes(raw[:4], "little"), int.from_bytes(raw[4:], "little"))


@dataclass(slots=True)
class _Gate:
    kind: int
    selector: int
    offset: int
    stack: int


_TASK, _INTERRUPT16, _TRAP16, _INTERRUPT32, _TRAP32 = 5, 6, 7, 14, 15


def _gate(cpu: Context, slots: Slots, event: Event) -> _Gate:
    wide = context.long_mode(cpu)
    size = 16 if wide else 8
    code = event.vector * 8 + 2
    if event.vector * size + size - 1 > cpu.idt.limit:
        raise Fault(GP, code + (not event.software))
    raw = paging.read(cpu, slots, cpu.idt.base + event.vector * size, size)
    low, high = int.from_bytes(raw[:4], "little"), int.from_bytes(raw[4:8], "little")
    kind = high >> 8 & 0x1F
    known = (_INTERRUPT32, _TRAP32) if wide else (_TASK, _INTERRUPT16, _TRAP16, _INTERRUPT32, _TRAP32)
    if kind not in known or (event.software and high >> 13 & 3 < context.cpl(cpu)):
        raise Fault(GP, code + (not event.software))
    if not high & DESC_P:
        raise Fault(NP, code + (not event.software))
    offset = high & 0xFFFF_0000 | low & 0xFFFF
    if wide:
        offset |= int.from_bytes(raw[8:12], "little") << 32
    return _Gate(kind, low >> 16, offset, high & 7 if wide else 0)


def _code_segment(cpu: Context, slots: Slots, gate: _Gate, external: bool) -> _Descriptor:
    ext = int(external)
    if not gate.selector & 0xFFFC:
        raise Fault(GP, ext)
    code = _descriptor(cpu, slots, gate.selector, GP)
    wrong = gate.selector & 0xFFFC | ext
    if not code.flags & DESC_S or not code.flags & 0x800 or code.dpl > context.cpl(cpu):
        raise Fault(GP, wrong)
    if not code.flags & DESC_P:
        raise Fault(NP, wrong)
    if context.long_mode(cpu) and (not code.flags & DESC_L or code.flags & DESC_B):
        raise Fault(GP, wrong)
    return code


def _tss(cpu: Context, slots: Slots, offset: int, size: int) -> int:
    if offset + size - 1 > cpu.tr.limit:
        raise Fault(TS, cpu.tr.selector & 0xFFFC)
    return int.from_bytes(paging.read(cpu, slots, cpu.tr.base + offset, size), "little")


def _inner_stack(cpu: Context, slots: Slots, level: int) -> tuple[_Descriptor, int]:
    """The legacy TSS's stack for this privilege level."""
    if cpu.tr.flags >> 8 & 8:
        pointer, selector = _tss(cpu, slots, 4 + level * 8, 4), _tss(cpu, slots, 8 + level * 8, 2)
    else:
        pointer, selector = _tss(cpu, slots, 2 + level * 4, 2), _tss(cpu, slots, 4 + level * 4, 2)
    if not selector & 0xFFFC or selector & 3 != level:
        raise Fault(TS, selector & 0xFFFC)
    stack = _descriptor(cpu, slots, selector, TS)
    writable_data = stack.flags & DESC_S and not stack.flags & 0x800 and stack.flags & 0x200
    if not writable_data or stack.dpl != level:
        raise Fault(TS, selector & 0xFFFC)
    if not stack.flags & DESC_P:
        raise Fault(SS_FAULT, selector & 0xFFFC)
    return stack, pointer


def _enter_protected(cpu: Context, slots: Slots, event: Event) -> None:
    if event.software and cpu.rflags & RFLAGS_VM and cpu.rflags >> 12 & 3 < 3:
        raise Fault(GP, 0)
    gate = _gate(cpu, slots, event)
    if gate.kind == _TASK:
        raise NotImplementedError("a task gate in the IDT")
    code = _code_segment(cpu, slots, gate, not event.software)
    level = context.cpl(cpu) if code.flags & 0x400 else code.dpl
    flags = cpu.rflags
    pushed = flags | RFLAGS_RF if event.exception and event.vector not in _NOT_FAULTS else flags
    values = [pushed, cpu.segs[CS].selector, event.resume]
    if event.error_code is not None:
        values.append(event.error_code)
    if context.long_mode(cpu):
        _push_long(cpu, slots, gate, level, values)
    else:
        _push_legacy(cpu, slots, gate, level, values)
    code.load(cpu, CS, gate.selector & ~3 | level)
    cpu.rip = gate.offset
    cleared = RFLAGS_TF | RFLAGS_VM | RFLAGS_RF | RFLAGS_NT
    if gate.kind in (_INTERRUPT16, _INTERRUPT32):
        cleared |= RFLAGS_IF
    cpu.rflags = flags & ~cleared


def _push_long(cpu: Context, slots: Slots, gate: _Gate, level: int, values: list[int]) -> None:
    inner = level < context.cpl(cpu)
    if gate.stack:
        pointer = _tss(cpu, slots, 28 + gate.stack * 8, 8)
    elif inner:
        pointer = _tss(cpu, slots, 4 + level * 8, 8)
    else:
        pointer = cpu.regs[RSP]
    pointer &= ~0xF
    frame = [cpu.segs[SS].selector, cpu.regs[RSP], *values]
    raw = b"".join(value.to_bytes(8, "little") for value in reversed(frame))
    top = (pointer - len(raw)) & 0xFFFF_FFFF_FFFF_FFFF
    paging.write(cpu, slots, top, raw, user=level == 3)
    cpu.regs[RSP] = top
    if inner:
        load_segment(cpu, SS, level, 0, 0, level << 13)


def _push_legacy(cpu: Context, slots: Slots, gate: _Gate, level: int, values: list[int]) -> None:
    size = 4 if gate.kind in (_INTERRUPT32, _TRAP32) else 2
    frame = values
    virtual = cpu.rflags & RFLAGS_VM
    stack = None
    if level < context.cpl(cpu):
        stack, pointer = _inner_stack(cpu, slots, level)
        base, wide = stack.base, stack.flags & DESC_B
        frame = [cpu.segs[SS].selector, cpu.regs[RSP], *values]
        if virtual:
            frame = [*(cpu.segs[index].selector for index in (GS, FS, DS, ES)), *frame]
    else:
        if virtual:
            raise Fault(GP, gate.selector & 0xFFFC)
        pointer, base, wide = cpu.regs[RSP], cpu.segs[SS].base, cpu.segs[SS].flags & DESC_B
    mask = 0xFFFF_FFFF if wide else 0xFFFF
    raw = b"".join((value & (1 << 8 * size) - 1).to_bytes(size, "little") for value in reversed(frame))
    top = (pointer - len(raw)) & mask
    paging.write(cpu, slots, (base + top) & 0xFFFF_FFFF, raw, user=level == 3)
    cpu.regs[RSP] = cpu.regs[RSP] & ~mask | top
    if stack is not None:
        if virtual:
            for index in (GS, FS, DS, ES):
                load_segment(cpu, index, 0, 0, 0, 0)
        stack.load(cpu, SS, stack.selector & ~3 | level)


_FLAT_CODE = DESC_G | DESC_P | DESC_S | 0xB00
_FLAT_DATA = DESC_G | DESC_B | DESC_P | DESC_S | 0x300


def _flat_kernel(cpu: Context, selector: int, code: int) -> None:
    load_segment(cpu, CS, selector & 0xFFFC, 0, 0xFFFF_FFFF, _FLAT_CODE | code)
    load_segment(cpu, SS, (selector & 0xFFFC) + 8, 0, 0xFFFF_FFFF, _FLAT_DATA)


def syscall(cpu: Context, slots: Slots) -> bool:
    """SYSCALL; the emulator has stepped over it. False: it led to a triple fault."""
    if not cpu.efer & EFER_SCE or not cpu.cr[0] & CR0_PE:
        cpu.rip -= 2
        return deliver(cpu, slots, exception(cpu, UD))
    selector = cpu.star >> 32
    if context.long_mode(cpu):
        cpu.regs[RCX] = cpu.rip
        cpu.regs[11] = cpu.rflags & ~RFLAGS_RF
        cpu.rip = cpu.lstar if context.code64(cpu) else cpu.cstar
        _flat_kernel(cpu, selector, DESC_L)
        cpu.rflags = cpu.rflags & ~cpu.fmask & ~RFLAGS_RF | 2
    else:
        cpu.regs[RCX] = cpu.rip & 0xFFFF_FFFF
        cpu.rip = cpu.star & 0xFFFF_FFFF
        _flat_kernel(cpu, selector, DESC_B)
        cpu.rflags &= ~(RFLAGS_IF | RFLAGS_RF | RFLAGS_VM)
    recompute_hflags(cpu)
    return True


def sysenter(cpu: Context) -> None:
    """SYSENTER; the emulator has checked SYSENTER_CS."""
    wide = context.long_mode(cpu)
    _flat_kernel(cpu, cpu.sysenter_cs, DESC_L if wide else DESC_B)
    cpu.regs[RSP] = cpu.sysenter_esp
    cpu.rip = cpu.sysenter_eip
    cpu.rflags &= ~(RFLAGS_IF | RFLAGS_RF | RFLAGS_VM)
    recompute_hflags(cpu)


def reset(cpu: Context, signature: int) -> None:
    """INIT: the architectural register state; MSRs, FPU and the APIC base stay (SDM vol. 3, table 10-1)."""
    for index in range(16):
        cpu.regs[index] = 0
    cpu.regs[context.RDX] = signature
    cpu.rip, cpu.rflags = 0xFFF0, 2
    for index in (ES, SS, DS, FS, GS):
        load_segment(cpu, index, 0, 0, 0xFFFF, 0x9300)
    load_segment(cpu, CS, 0xF000, 0xFFFF0000, 0xFFFF, 0x9B00)
    for segment, flags in ((cpu.ldt, 0x8200), (cpu.tr, 0x8B00), (cpu.gdt, 0), (cpu.idt, 0)):
        segment.selector, segment.base, segment.limit, segment.flags = 0, 0, 0xFFFF, flags
    cpu.cr[0] = cpu.cr[0] & 0x6000_0000 | 0x10
    cpu.cr[2] = cpu.cr[3] = cpu.cr[4] = cpu.efer = 0
    for index in range(4):
        cpu.dr[index] = 0
    cpu.dr[6], cpu.dr[7] = 0xFFFF0FF0, 0x400
    cpu.old_exception = -1
    cpu.hflags = 0
    recompute_hflags(cpu)


def start_up(cpu: Context, vector: int) -> None:
    """SIPI: begin at ``vector`` << 12."""
    cpu.segs[CS].selector, cpu.segs[CS].base = vector << 8, vector << 12
    cpu.rip = 0
