"""Disassembly: instruction bytes, their address and their size in bits to lines of Intel syntax."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

MAX_INSTRUCTION = 15
"""Bytes that the longest x86 instruction has."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of disassembly; ``raw`` are its bytes, ``text`` is ``mnemonic operands``."""

    address: int
    raw: bytes
    text: str


@cache
def _engine(bits: int) -> Any:
    import capstone  # here, because the first frame must not wait for it

    modes = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
    return capstone.Cs(capstone.CS_ARCH_X86, modes[bits])


@lru_cache(4096)
def disassemble(code: bytes, address: int, bits: int, count: int = 1) -> tuple[Instruction, ...]:
    """Up to ``count`` instructions from the start of ``code``; ``bits`` is 16, 32 or 64.

    A byte that starts no whole instruction becomes a line ``(bad)`` of its own.
    """
    lines: list[Instruction] = []
    offset = 0
    engine = _engine(bits)
    while offset < len(code) and len(lines) < count:
        piece = code[offset : offset + MAX_INSTRUCTION]
        for at, size, mnemonic, operands in engine.disasm_lite(piece, address + offset, 1):
            lines.append(Instruction(at, piece[:size], f"{mnemonic} {operands}".rstrip()))
            offset += size
            break
        else:
            lines.append(Instruction(address + offset, piece[:1], "(bad)"))
            offset += 1
    return tuple(lines)
