"""Why the guest can't go on, in words, with the instruction it stands on."""

from __future__ import annotations

from kvm.machine import Machine, Status
from kvm.x86 import decode
from kvm.x86.disasm import disassemble
from kvm.x86.structs import Regs, Sregs


def explain(machine: Machine, status: Status) -> str:
    """A few lines for a person: the reason, the VCPU's mode and RIP, the bytes and their disassembly if known."""
    lines = [f"The guest can't go on. {status.reason}"]
    if status.vcpu is not None and (view := machine.view(status.vcpu)).regs:
        regs, sregs = Regs.from_buffer_copy(view.regs), Sregs.from_buffer_copy(view.sregs)
        mode = decode.mode(sregs, regs.rflags)
        lines.append(f"VCPU {status.vcpu} in {mode.value}, CPL {decode.cpl(sregs, regs.rflags)}, RIP {regs.rip:#x}")
        if status.exit is not None and status.exit.insn:
            address = decode.linear_rip(sregs, regs.rip, regs.rflags)
            (instruction,) = disassemble(status.exit.insn, address, mode.bits)
            lines.append(f"{instruction.address:#x}: {instruction.raw.hex(' ')}  {instruction.text}")
    return "\n  ".join(lines)
