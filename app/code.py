"""The guest's code as the VCPUs see it, read from its memory while it runs."""

from __future__ import annotations

from app.space import Space
from kvm.machine import Machine
from kvm.x86 import decode
from kvm.x86.disasm import MAX_INSTRUCTION, Instruction, disassemble
from kvm.x86.structs import Regs, Sregs


def read_code(machine: Machine, regs: Regs, sregs: Sregs, size: int = MAX_INSTRUCTION) -> bytes:
    """Up to ``size`` bytes from RIP on: as far as they are mapped and backed by memory."""
    return Space(machine, sregs).read(decode.linear_rip(sregs, regs.rip, regs.rflags), size)


def instruction_at(machine: Machine, raw_regs: bytes, raw_sregs: bytes) -> Instruction | None:
    """The instruction at RIP; None if its memory can't be read."""
    regs, sregs = Regs.from_buffer_copy(raw_regs), Sregs.from_buffer_copy(raw_sregs)
    code = read_code(machine, regs, sregs)
    return disassemble(code, regs.rip, decode.mode(sregs, regs.rflags).bits)[0] if code else None
