"""Guests of a few bytes, entered in real mode at 0x7c00 unless they say otherwise; the comments are their source."""

from __future__ import annotations


def print_and_exit(text: bytes, value: int) -> bytes:
    """Each byte: mov al, …; out 0xe9, al. Then mov al, value; out 0xf4, al; hlt."""
    return b"".join(b"\xb0%c\xe6\xe9" % byte for byte in text) + b"\xb0%c\xe6\xf4\xf4" % value


HALT = bytes.fromhex("f4 eb fd")
"""again: hlt; jmp again"""

POWER_OFF = bytes.fromhex("ba 04 06 b8 00 34 ef f4")
"""mov dx, 0x604; mov ax, 0x3400; out dx, ax: SLP_EN and sleep type 5 into ACPI's PM1 control register; hlt"""

SPIN = bytes.fromhex("eb fe")
"""again: jmp again"""

PRINT_AND_SPIN = bytes.fromhex("b0 21 e6 e9 eb fe")
"""mov al, '!'; out 0xe9, al; again: jmp again"""

ECHO = bytes.fromhex("b0 3e ba f8 03 ee  ba fd 03 ec a8 01 74 f8  ba f8 03 ec ee eb f1")
"""mov al, '>'; mov dx, 0x3f8; out dx, al;
again: mov dx, 0x3fd; in al, dx; test al, 1; jz again;  mov dx, 0x3f8; in al, dx; out dx, al; jmp again"""

FLOOD_BYTES = 0x28000
FLOOD = bytes.fromhex("66 b9 00 80 02 00  b0 78 ba f8 03 ee  66 49 75 fb  b0 2a e6 f4 f4")
"""mov ecx, 0x28000; mov al, 'x'; mov dx, 0x3f8; again: out dx, al; dec ecx; jnz again; mov al, 42; out 0xf4, al; hlt"""

TRIPLE_FAULT_64 = bytes.fromhex("0f 01 1c 25 0a 7c 00 00 0f 0b 00 00 00 00 00 00 00 00 00 00")
"""64-bit: lidt [0x7c0a]; ud2; 0x7c0a: a table of no bytes"""

NO_EMULATION_64 = bytes.fromhex("bb 00 00 d0 fe  0f 58 03  f4")
"""64-bit: mov ebx, 0xfed00000; addps xmm0, [rbx]; hlt. The address is no memory, and KVM emulates no SSE arithmetic."""
