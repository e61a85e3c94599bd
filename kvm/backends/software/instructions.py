"""The instructions that the emulator hands out: CPUID, RDTSC, RDMSR and WRMSR, HLT, PAUSE, CR8, MONITOR and MWAIT.

Each is a function of the VCPU and the instruction's bytes, called with RIP on it; it leaves RIP behind it, or raises
paging.Fault.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from kvm.backends.software import context, engine, paging
from kvm.backends.software.context import CS, RAX, RBX, RCX, RDX
from kvm.backends.software.msr import Refused
from kvm.backends.software.paging import Fault
from kvm.x86.structs import MP_STATE_HALTED

if TYPE_CHECKING:
    from kvm.backends.software.vcpu import SoftwareVcpu

_LEGACY_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
_LOW = 0xFFFF_FFFF
_CODE_AT_ONCE = 15
"""The longest instruction, in bytes."""


def code_at_rip(vcpu: SoftwareVcpu) -> bytes:
    """Up to 15 bytes of code; fewer where the next page isn't there."""
    cpu = vcpu.cpu
    linear = linear_rip(vcpu)
    for size in (_CODE_AT_ONCE, 4096 - linear % 4096):
        try:
            return paging.read(cpu, vcpu.vm.slots, linear, min(size, _CODE_AT_ONCE))
        except Fault:
            continue
    return b""


def linear_rip(vcpu: SoftwareVcpu) -> int:
    """Where RIP points, as a linear address."""
    cpu = vcpu.cpu
    if context.code64(cpu):
        return cpu.rip
    return (cpu.segs[CS].base + cpu.rip) & _LOW


class Instruction(NamedTuple):
    """``prefixes``: how many, REX included; ``rex``: that prefix, 0 for none; ``opcode``: the code from there on."""

    prefixes: int
    rex: int
    opcode: bytes


def at_rip(vcpu: SoftwareVcpu) -> Instruction:
    """The instruction at RIP, taken apart as far as it takes here."""
    code, at, rex = code_at_rip(vcpu), 0, 0
    while at < len(code) and code[at] in _LEGACY_PREFIXES:
        at += 1
    if context.code64(vcpu.cpu) and at < len(code) and code[at] & 0xF0 == 0x40:
        rex = code[at]
        at += 1
    return Instruction(at, rex, code[at:])


def _advance(vcpu: SoftwareVcpu, instruction: Instruction, length: int) -> None:
    cpu = vcpu.cpu
    rip = cpu.rip + instruction.prefixes + length
    cpu.rip = rip if context.code64(cpu) else rip & _LOW
    cpu.rflags &= ~context.RFLAGS_RF


def _privileged(vcpu: SoftwareVcpu) -> None:
    if context.cpl(vcpu.cpu):
        raise Fault(13, 0)


def _cpuid(vcpu: SoftwareVcpu, instruction: Instruction) -> None:
    regs = vcpu.cpu.regs
    answer = vcpu.cpuid.answer(regs[RAX] & _LOW, regs[RCX] & _LOW)
    function = regs[RAX] & _LOW
    regs[RAX], regs[RBX], regs[RCX], regs[RDX] = answer
    if function == 1 and not vcpu.lapic.base & 1 << 11:
        regs[RDX] &= ~(1 << 9)
    vcpu.code_may_have_changed()  # CPUID serialises: code that another VCPU wrote counts from here on
    _advance(vcpu, instruction, 2)


def _rdtsc(vcpu: SoftwareVcpu, instruction: Instruction) -> None:
    regs, tsc = vcpu.cpu.regs, vcpu.lapic.tsc()
    regs[RAX], regs[RDX] = tsc & _LOW, tsc >> 32
    with_aux = instruction.opcode[:2] == b"\x0f\x01"
    if with_aux:
        regs[RCX] = vcpu.cpu.tsc_aux & _LOW
    _advance(vcpu, instruction, 3 if with_aux else 2)


def _msr(vcpu: SoftwareVcpu, instruction: Instruction) -> None:
    _privileged(vcpu)
    regs = vcpu.cpu.regs
    index = regs[RCX] & _LOW
    try:
        if instruction.opcode[1] == 0x32:
            value = vcpu.msrs.read(index)
            regs[RAX], regs[RDX] = value & _LOW, value >> 32
        else:
            vcpu.msrs.write(index, regs[RAX] & _LOW | (regs[RDX] & _LOW) << 32)
            vcpu.paging_changed = True  # EFER.NXE
    except Refused:
        raise Fault(13, 0) from None
    _advance(vcpu, instruction, 2)


def _hlt(vcpu: SoftwareVcpu, instruction: Instruction) -> None:
    _advance(vcpu, instruction, 1)
    vcpu.mp_state = MP_STATE_HALTED


def _pause(vcpu: SoftwareVcpu, instruction: Instruction) -> None:
    _advance(vcpu, instruction, 1)
    vcpu.vm.scheduler.give_way()


def _cr8(vcpu: SoftwareVcpu, instruction: Instruction) -> None:
    _privileged(vcpu)
    register = instruction.opcode[2] & 7 | (instruction.rex & 1) << 3
    if instruction.opcode[1] == 0x20:
        vcpu.cpu.regs[register] = vcpu.lapic.tpr >> 4
    else:
        if vcpu.cpu.regs[register] >> 4:
            raise Fault(13, 0)
        vcpu.lapic.tpr = vcpu.cpu.regs[register] << 4
    _advance(vcpu, instruction, 3)


def _undefined(vcpu: SoftwareVcpu, instruction: Instruction) -> None:
    raise Fault(6, None)


TABLE: dict[int, Callable[[SoftwareVcpu, Instruction], None]] = {
    engine.CPUID: _cpuid,
    engine.RDTSC: _rdtsc,
    engine.RDTSCP: _rdtsc,
    engine.MSR: _msr,
    engine.HLT: _hlt,
    engine.PAUSE: _pause,
    engine.READ_CR8: _cr8,
    engine.WRITE_CR8: _cr8,
    engine.MONITOR: _undefined,
    engine.MWAIT: _undefined,
    engine.MWAIT_ARMED: _undefined,
}
"""By SVM exit code."""
