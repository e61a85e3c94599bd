"""Every format really entered, on both backends: each guest leaves by isa-debug-exit with what it found."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kvm.backends.interface import System
from kvm.boot.loader import load
from kvm.machine import Machine, MachineConfig, Phase
from tests.kvm.boot.images import ElfImage, Load, multiboot_header

MEMORY = 4 << 20

REAL = bytes.fromhex(
    "8cc8"  # mov ax, cs
    "01e0"  # add ax, sp
    "e7f4"  # out 0xf4, ax
    "ebfe"
)
DL = bytes.fromhex("88d0 e6f4 ebfe")
"""mov al, dl; out 0xf4, al."""
PROTECTED = bytes.fromhex(
    "6a10 1f"  # push 0x10; pop ds: the GDT is there
    "66b8 1000 8ed0"  # mov ax, 0x10; mov ss, ax
    "ea 10001000 0800"  # jmp 0x08:0x100010
    "90 90"
    "89e0 e7f4 ebfe"  # mov eax, esp; out 0xf4, eax
)
LONG = bytes.fromhex(
    "6a18"  # push 0x18
    "488d0503000000"  # lea rax, [rip + 3]
    "50 48cb"  # push rax; retfq: CS from the GDT
    "4889e0"  # mov rax, rsp
    "e7f4 ebfe"  # out 0xf4, eax
)
MULTIBOOT = bytes.fromhex(
    "3d02b0ad2b 7504"  # cmp eax, 0x2badb002; jne fail
    "8b4308 e7f4"  # mov eax, [ebx + 8]: mem_upper; out 0xf4, eax
    "ebfe"
)


def exit_code(system: System, folder: Path, data: bytes, format: str, address: int | None = None) -> int | None:
    file = folder / "image"
    file.write_bytes(data)
    image = load(file, memory=MEMORY, format=format, address=address)
    with Machine(system, image, MachineConfig(memory=MEMORY)) as machine:
        machine.run()
        status = machine.wait(Phase.EXITED, Phase.STOPPED, timeout=20)
        assert status.phase is Phase.EXITED, status
        return status.code


def test_flat16(system: System, tmp_path: Path) -> None:
    assert exit_code(system, tmp_path, REAL, "flat16", 0x23450) == 0x2345 + 0x7C00


def test_bootsector(system: System, tmp_path: Path) -> None:
    assert exit_code(system, tmp_path, DL.ljust(510, b"\0") + b"\x55\xaa", "auto") == 0x80


def test_firmware(system: System, tmp_path: Path) -> None:
    """Far jump from the reset vector to the copy below 1 MiB, which is writable."""
    code = bytes.fromhex("2ec606fe0f5a 2ea0fe0f e6f4 ebfe")  # mov byte cs:[0xffe], 0x5a; mov al, cs:[0xffe]; out
    image = code.ljust(0x1000 - 16, b"\0") + bytes.fromhex("ea0000 00ff").ljust(16, b"\0")
    assert exit_code(system, tmp_path, image, "auto") == 0x5A


def test_flat32(system: System, tmp_path: Path) -> None:
    assert exit_code(system, tmp_path, PROTECTED, "flat32") == 0x9F000


def test_flat64(system: System, tmp_path: Path) -> None:
    assert exit_code(system, tmp_path, LONG, "flat64") == 0x9F000


@pytest.mark.parametrize(("bits", "code"), [(32, PROTECTED), (64, LONG)], ids=["32", "64"])
def test_elf(system: System, tmp_path: Path, bits: int, code: bytes) -> None:
    assert exit_code(system, tmp_path, ElfImage(bits, (Load(0x100000, code),)).build(), "auto") == 0x9F000


def test_multiboot(system: System, tmp_path: Path) -> None:
    header = multiboot_header(3).ljust(16, b"\0")
    image = ElfImage(32, (Load(0x100000, header + MULTIBOOT),), entry=0x100010).build()
    assert exit_code(system, tmp_path, image, "auto") == MEMORY // 1024 - 1024


@pytest.mark.parametrize("name", ["bios.bin", "bios-microvm.bin"])
def test_seabios_finds_its_console_and_the_memory(system: System, name: str) -> None:
    path = Path("/usr/share/seabios") / name
    if not path.exists():
        pytest.skip("needs Debian's package seabios")
    with Machine(system, load(path, memory=MEMORY), MachineConfig(memory=MEMORY)) as machine:
        machine.run()
        console, seen, position = machine.board.debug_console, b"", 0
        end = time.monotonic() + 30
        while b"qemu/e820: addr 0x0000000000000000 len 0x0000000000400000 [RAM]" not in seen:
            assert time.monotonic() < end, seen
            machine.request_samples()  # the console's ports are coalesced: this hands their writes on
            console.wait(position, 0.1)
            output, position = console.since(position)
            seen += output
            assert machine.status.phase is Phase.RUNNING, (machine.status, seen)
        assert seen.startswith(b"SeaBIOS (version ")
