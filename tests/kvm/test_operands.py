"""What an instruction touches in memory, and where exceptions go: as lockstep asks it of bytes and registers."""

from __future__ import annotations

import struct

import pytest

from kvm.x86 import gates
from kvm.x86.operands import operands
from kvm.x86.structs import Dtable, Regs, Segment, Sregs

REGS = Regs(
    rax=0x1_0000_1000, rbx=0x2000, rcx=3, rdx=0xFEE00000, rsi=0x7_0100, rdi=0x200, rsp=0x8000, rbp=0xFFFF, r9=0x30
)  # fmt: skip
GS = 0xFFFF_8000_0000_0000
SEGMENTS = {name: Segment(base=base) for name, base in {"ds": 0x10000, "es": 0x20000, "ss": 0x30000}.items()}
LONG = Sregs(cs=Segment(l=1), gs=Segment(base=GS), **SEGMENTS)
REST = Sregs(fs=Segment(base=0xFFFFF000), **SEGMENTS)
"""Real and protected mode."""


@pytest.mark.parametrize(
    ("text", "code", "bits", "expected"),
    [
        ("mov [rdx + 0x310], eax", "89 82 10 03 00 00", 64, [(0xFEE00310, True)]),
        ("mov eax, [rbx + rcx * 4 - 16]", "8b 44 8b f0", 64, [(0x1FFC, False)]),
        ("mov eax, [eax]", "67 8b 00", 64, [(0x1000, False)]),
        ("mov eax, [rip + 16]", "8b 05 10 00 00 00", 64, [(0x1016, False)]),
        ("mov rax, gs:[16]", "65 48 8b 04 25 10 00 00 00", 64, [(GS + 16, False)]),
        ("mov [r9 + r9], eax", "43 89 04 09", 64, [(0x60, True)]),
        ("lock xadd [edx], ecx", "f0 0f c1 0a", 32, [(0xFEE10000, True)]),
        ("rep movsb", "f3 a4", 16, [(0x20200, True), (0x10100, False)]),
        ("mov ax, [bp + 2]", "8b 46 02", 16, [(0x30001, False)]),
        ("mov al, fs:[eax]", "64 67 8a 00", 16, [(0, False)]),
        ("lea rax, [rax + 8]", "48 8d 40 08", 64, []),
        ("ret", "c3", 64, []),
        ("no instruction", "06", 64, []),
    ],
)
def test_operands(text: str, code: str, bits: int, expected: list[tuple[int, bool]]) -> None:
    found = operands(bytes.fromhex(code), 0x1000, bits)
    assert [(each.address(REGS, LONG if bits == 64 else REST), each.written) for each in found] == expected


@pytest.mark.parametrize(
    ("cr0", "efer", "table"),
    [
        (0, 0, [struct.pack("<HH", 0x100 + vector, 0xF000) for vector in range(256)]),
        (1, 0, [struct.pack("<HHHH", 0x100 + vector, 8, 0x8E00, 0x10) for vector in range(256)]),
        (1, 0x400, [struct.pack("<HHHHII", 0x100 + vector, 8, 0x8E01, 0x10, 0xFFFF8000, 0) for vector in range(256)]),
    ],
)
def test_handlers_of_exceptions(cr0: int, efer: int, table: list[bytes]) -> None:
    raw = b"".join(table)

    def read(linear: int, size: int) -> bytes:
        return raw[linear - 0x5000 :][:size]

    selector, offset = (0xF000, 0) if not cr0 else (8, 0xFFFF8000_00100000 if efer else 0x100000)
    sregs = Sregs(cr0=cr0, efer=efer, idt=Dtable(0x5000, len(raw) - 1))
    assert list(gates.handlers(sregs, read)) == [(selector, offset + 0x100 + vector) for vector in range(32)]
    sregs.idt.limit = 3 * len(table[0]) - 2
    assert len(list(gates.handlers(sregs, read))) == 2, "no further than its limit"
