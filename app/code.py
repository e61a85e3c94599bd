"""The guest's code as the VCPUs see it, read from its memory while it runs."""

from __future__ import annotations

from kvm.errors import MemoryAccessError
from kvm.machine import Machine
from kvm.x86 import decode, paging
from kvm.x86.disasm import MAX_INSTRUCTION, Instruction, disassemble
from kvm.x86.structs import Regs, Sregs

_PAGE = 4096


def read_code(machine: Machine, regs: Regs, sregs: Sregs, size: int = MAX_INSTRUCTION) -> bytes:
    """Up to ``size`` bytes from RIP on: as far as they are mapped and backed by memory."""

    def read(address: int, count: int) -> bytes:
        try:
            return machine.read_memory(address, count)
        except MemoryAccessError:
            return b""

    code = b""
    linear = decode.linear_rip(sregs, regs.rip, regs.rflags)
    while len(code) < size:
        physical = paging.translate(sregs, linear + len(code), read)
        if physical is None:
            break
        piece = read(physical, min(size - len(code), _PAGE - physical % _PAGE))
        if not piece:
            break
        code += piece
    return code


def instruction_at(machine: Machine, raw_regs: bytes, raw_sregs: bytes) -> Instruction | None:
    """The instruction at RIP; None if its memory can't be read."""
    regs, sregs = Regs.from_buffer_copy(raw_regs), Sregs.from_buffer_copy(raw_sregs)
    code = read_code(machine, regs, sregs)
    return disassemble(code, regs.rip, decode.mode(sregs, regs.rflags).bits)[0] if code else None
