"""What an instruction does in memory: its memory operands, and the linear addresses that they come to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from kvm.x86.structs import Regs, Sregs, Sregs2

_LEGACY = ("ax", "bx", "cx", "dx", "si", "di", "sp", "bp")
_FIELDS = {
    **{prefix + name: "r" + name for name in _LEGACY for prefix in ("", "e", "r")},
    **{f"r{number}{width}": f"r{number}" for number in range(8, 16) for width in ("", "d", "w")},
}
"""An address register by its name at any width → its field of struct kvm_regs."""
_STACK = ("rsp", "rbp")
"""Bases whose segment is SS unless another is named."""
_NO_ACCESS = ("lea", "nop")
"""Instructions that only look as if they did something in memory."""


@dataclass(frozen=True, slots=True)
class Operand:
    """``segment:[base + index * scale + displacement]``.

    ``base`` and ``index`` are fields of struct kvm_regs, or empty. ``bits`` is the address's size: 16, 32 or 64.
    ``written``: the instruction stores there.
    """

    segment: str
    base: str
    index: str
    scale: int
    displacement: int
    bits: int
    written: bool

    def address(self, regs: Regs, sregs: Sregs | Sregs2) -> int:
        """The linear address, with these registers before the instruction."""
        offset = self.displacement + (int(getattr(regs, self.base)) if self.base else 0)
        if self.index:
            offset += int(getattr(regs, self.index)) * self.scale
        offset &= (1 << self.bits) - 1
        if sregs.cs.l and self.segment not in ("fs", "gs"):
            return offset
        base = int(getattr(sregs, self.segment).base)
        return base + offset & (1 << (64 if sregs.cs.l else 32)) - 1


@cache
def _engine(bits: int) -> Any:
    import capstone  # here, as in disasm: the first look pays for it

    modes = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
    engine = capstone.Cs(capstone.CS_ARCH_X86, modes[bits])
    engine.detail = True
    return engine


@lru_cache(4096)
def operands(code: bytes, address: int, bits: int) -> tuple[Operand, ...]:
    """The memory operands of the instruction that ``code`` begins with; none if it begins with no instruction."""
    import capstone

    found = []
    for instruction in _engine(bits).disasm(code, address, 1):
        for operand in instruction.operands:
            if operand.type != capstone.x86.X86_OP_MEM or instruction.mnemonic in _NO_ACCESS:
                continue
            segment, base, index = (
                instruction.reg_name(number) or ""
                for number in (operand.mem.segment, operand.mem.base, operand.mem.index)
            )
            displacement = operand.mem.disp
            if base in ("rip", "eip"):
                base, displacement = "", displacement + address + instruction.size
            base, index = _FIELDS.get(base, ""), _FIELDS.get(index, "")
            found.append(
                Operand(
                    segment or ("ss" if base in _STACK else "ds"), base, index, operand.mem.scale, displacement,
                    8 * instruction.addr_size, bool(operand.access & capstone.CS_AC_WRITE),
                )
            )  # fmt: skip
    return tuple(found)
