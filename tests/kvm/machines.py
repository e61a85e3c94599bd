"""Machines for tests: a few bytes of real-mode code, on either backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from kvm.backends.interface import System
from kvm.boot import loader
from kvm.machine import Machine, MachineConfig

ORIGIN = 0x1000
ORIGIN_32 = 0x100000

COUNT = bytes.fromhex("66 40 eb fc")
"""inc eax; jmp back: runs for ever, no exits."""
HLT = bytes.fromhex("fa f4 eb fd")
"""cli; hlt; jmp back."""
OUT_80 = bytes.fromhex("fe c0 e6 80 eb fa")
"""inc al; out 0x80, al; jmp back."""
EXIT_7 = bytes.fromhex("b0 07 e6 f4 40 eb fd")
"""mov al, 7; out 0xf4, al (isa-debug-exit); inc ax; jmp back."""
TRIPLE_FAULT = bytes.fromhex("31 c9 0f 01 1d 00 20 00 00 f7 f1")
"""32-bit: xor ecx, ecx; lidt [0x2000], zeros there: a limit of 0; div ecx."""
RESET_8042 = bytes.fromhex("43 b0 fe e6 64 f4")
"""inc bx; mov al, 0xfe; out 0x64, al; hlt."""


def build(
    system: System, folder: Path, code: bytes, *, vcpus: int = 1, memory: int = 4 << 20, format: str = "flat16"
) -> Machine:
    """A machine that enters ``code`` at ORIGIN in real mode, at ORIGIN_32 in other formats."""
    image = folder / "guest.bin"
    image.write_bytes(code)
    address = ORIGIN if format == "flat16" else ORIGIN_32
    loaded = loader.load(image, memory=memory, format=format, address=address)
    return Machine(system, loaded, MachineConfig(vcpus=vcpus, memory=memory))


def until(condition: Callable[[], bool], limit: float = 20.0) -> None:
    """Poll until the condition holds; fail after ``limit`` seconds, which only a hang takes."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "what the test waits for doesn't come"
        time.sleep(0.0005)
