"""What a guest's driver does with fw_cfg, done from the host: port accesses, and memory that it would have written."""

from __future__ import annotations

import struct

from kvm.devices import fw_cfg
from kvm.machine import Machine
from kvm.snapshot import core

PORT = 0x510
DESCRIPTOR, BUFFER, NOTE = 0x7000, 0x7100, 0x8100
"""Where in the guest's memory these are: the note begins in the middle of a page, and may be longer than that."""


def read_port(machine: Machine, key: int, size: int) -> bytes:
    """An item's first bytes, through the data port."""
    bus = machine.board.bus
    bus.port_out(PORT + fw_cfg.SELECTOR, 2, key)
    return bytes(bus.port_in(PORT + fw_cfg.DATA, 1) for _ in range(size))


def start_dma(machine: Machine, descriptor: int) -> None:
    """As from a guest with this descriptor in memory; anywhere, if it likes."""
    for port, half in ((fw_cfg.DMA_HIGH, descriptor >> 32), (fw_cfg.DMA_LOW, descriptor & 0xFFFF_FFFF)):
        machine.board.bus.port_out(PORT + port, 4, int.from_bytes(half.to_bytes(4, "big"), "little"))


def dma(machine: Machine, control: int, length: int = 0, address: int = BUFFER) -> int:
    """The control word afterwards: 0, or fw_cfg.ERROR."""
    machine.write_memory(DESCRIPTOR, fw_cfg.DESCRIPTOR.pack(control, length, address))
    start_dma(machine, DESCRIPTOR)
    return int.from_bytes(machine.read_memory(DESCRIPTOR, 4), "big")


def select(key: int) -> int:
    """A control word's part that picks an item."""
    return key << 16 | fw_cfg.SELECT


def read_dma(machine: Machine, key: int, size: int) -> bytes:
    """An item's first bytes, by DMA."""
    assert dma(machine, select(key) | fw_cfg.READ, size) == 0
    return machine.read_memory(BUFFER, size)


def directory(machine: Machine) -> dict[str, tuple[int, int]]:
    """Name → key and size of each file."""
    count = int.from_bytes(read_dma(machine, fw_cfg.DIRECTORY, 4), "big")
    entries = read_dma(machine, fw_cfg.DIRECTORY, 4 + count * fw_cfg.FILE.size)[4:]
    return {name.rstrip(b"\0").decode(): (key, size) for size, key, name in fw_cfg.FILE.iter_unpack(entries)}


def write_vmcoreinfo(machine: Machine, raw: bytes) -> int:
    """Write the file's first bytes; the control word afterwards."""
    key, _ = directory(machine)[fw_cfg.VMCOREINFO]
    machine.write_memory(BUFFER, raw)
    return dma(machine, select(key) | fw_cfg.WRITE, len(raw))


def offer(machine: Machine, note: bytes, address: int = NOTE, size: int | None = None, format: int = 1) -> None:
    """Put a note into memory and say where it is; ``address`` and ``size`` may be lies."""
    machine.write_memory(NOTE, note)
    raw = struct.pack("<HHIQ", 0, format, len(note) if size is None else size, address)
    assert write_vmcoreinfo(machine, raw) == 0


def note(text: bytes) -> bytes:
    """A note as Linux has it."""
    return core.note(b"VMCOREINFO", 0, text)
