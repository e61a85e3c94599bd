"""QEMU's fw_cfg: named values for firmware and kernels, and the place where a Linux guest offers its VMCOREINFO.

After QEMU's docs/specs/fw_cfg.rst and docs/specs/vmcoreinfo.rst. Reads go through the data port or by DMA, writes by
DMA alone. A DMA is over before the port access that starts it is.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from kvm.devices.device import damaged, unpack
from kvm.devices.platform import Platform
from kvm.x86 import layout

NAME = "fw_cfg"

SELECTOR, DATA, DMA_HIGH, DMA_LOW, PORTS = 0, 1, 4, 8, 12
"""Offsets of the registers: 2 bytes, 1 byte, and twice 4 bytes, big-endian; and how many ports there are."""

SIGNATURE, ID, RAM_SIZE, CPUS, BOOT_MENU, MAX_CPUS = 0x00, 0x01, 0x03, 0x05, 0x0E, 0x0F
DIRECTORY, FIRST_FILE = 0x19, 0x20
"""Keys of items; those of files follow one another."""
_WRITE_CHANNEL = 0x4000
"""A bit of the selector that once meant writing; it picks no other item."""
TRADITIONAL, DMA = 0x1, 0x2
"""Bits of ID."""

ERROR, READ, SKIP, SELECT, WRITE = 0x01, 0x02, 0x04, 0x08, 0x10
"""Bits of a DMA's control word; with SELECT its high half is a key."""
DESCRIPTOR = struct.Struct(">IIQ")
"""A DMA's control word, length and guest-physical address."""
MOST = 1 << 20
"""Bytes that one DMA may move: every item is far smaller, and the bus waits meanwhile."""
_DMA_SIGNATURE = b"QEMU CFG"

FILE = struct.Struct(">IHxx56s")
"""An entry of the directory: size, key, name."""
E820 = struct.Struct("<QQI")
"""Address, size, type."""
_E820_RAM, _E820_RESERVED = 1, 2
_KVM_PAGES = 4 * 4096
"""At layout.KVM_IDENTITY_MAP, as QEMU reserves them."""

VMCOREINFO = "etc/vmcoreinfo"
_VMCOREINFO = struct.Struct("<HHIQ")
"""The host's format, the guest's, and the size and guest-physical address of an ELF note."""
_FORMAT_ELF = 1
_SMALLEST_NOTE = 12
LARGEST_NOTE = 1 << 20
"""Bytes of a guest's note, as in QEMU."""
_NOTHING_OFFERED = _VMCOREINFO.pack(_FORMAT_ELF, 0, 0, 0)

_STATE = struct.Struct("<HIIB16s")


def items(memory: int, vcpus: int) -> dict[int, bytes]:
    """What every guest of ``memory`` bytes and so many VCPUs can read, by key, but for the files."""
    return {
        SIGNATURE: b"QEMU",
        ID: struct.pack("<I", TRADITIONAL | DMA),
        RAM_SIZE: struct.pack("<Q", memory),  # coreboot, and loaders older than etc/e820
        CPUS: struct.pack("<H", vcpus),  # OVMF, U-Boot
        BOOT_MENU: struct.pack("<H", 1),  # SeaBIOS shows its boot menu without a fw_cfg, and with one that says so
        MAX_CPUS: struct.pack("<H", vcpus),  # SeaBIOS: how many its tables describe; coreboot
    }


def files(memory: int) -> dict[str, bytes]:
    """What they find by name, at first."""
    ram = [(address, size, _E820_RAM) for address, size in layout.ram(memory)]
    kvm = (layout.KVM_IDENTITY_MAP, _KVM_PAGES, _E820_RESERVED)
    return {
        "etc/e820": b"".join(E820.pack(*entry) for entry in (*ram, kvm)),  # SeaBIOS: the RAM above 4 GiB; OVMF
        VMCOREINFO: _NOTHING_OFFERED,
    }


def offered(raw: bytes) -> tuple[int, int] | None:
    """Guest-physical address and size of the note that the guest has offered, by a saved state of the device.

    None if it hasn't, or not in the one format that there is, or with a size that no note has.
    """
    if len(raw) != _STATE.size:
        return None
    *_, whole, vmcoreinfo = _STATE.unpack(raw)
    _, format, size, address = _VMCOREINFO.unpack(vmcoreinfo)
    if not whole or format != _FORMAT_ELF or not _SMALLEST_NOTE <= size <= LARGEST_NOTE:
        return None
    return address, size


class FwCfg:
    """The device at the ports 0x510–0x51b, for a machine of ``memory`` bytes and so many VCPUs."""

    name = NAME

    def __init__(self, platform: Platform, memory: int, vcpus: int) -> None:
        self._platform = platform
        named = files(memory)
        keys = {name: FIRST_FILE + number for number, name in enumerate(named)}
        self._items: Mapping[int, bytes] = {
            **items(memory, vcpus),
            DIRECTORY: struct.pack(">I", len(named))
            + b"".join(FILE.pack(len(data), keys[name], name.encode()) for name, data in named.items()),
            **{keys[name]: data for name, data in named.items()},
        }
        self._writable = keys[VMCOREINFO]
        self.reset()

    def reset(self) -> None:
        self._key = self._offset = 0
        self._dma_high = 0
        self._vmcoreinfo = _NOTHING_OFFERED
        self._whole = False
        """Was that written at once, all of it? Nothing else counts as an offer."""

    def port_in(self, offset: int, size: int) -> int:
        if offset == DATA and size == 1:
            return self._next_byte()
        if offset >= DMA_HIGH:
            at = offset - DMA_HIGH
            return int.from_bytes(_DMA_SIGNATURE[at : at + size], "little")
        return (1 << 8 * size) - 1  # the selector can't be read

    def port_out(self, offset: int, size: int, value: int) -> None:
        if (offset, size) == (SELECTOR, 2):
            self._select(value)
        elif (offset, size) == (DMA_HIGH, 4):
            self._dma_high = _swapped(value)
        elif (offset, size) == (DMA_LOW, 4):
            address = self._dma_high << 32 | _swapped(value)
            self._dma_high = 0
            self._transfer(address)

    def _select(self, key: int) -> None:
        self._key = key & ~_WRITE_CHANNEL
        self._offset = 0

    def _item(self) -> bytes:
        """What is selected; a key that there isn't has no bytes."""
        return self._vmcoreinfo if self._key == self._writable else self._items.get(self._key, b"")

    def _next_byte(self) -> int:
        item = self._item()
        if self._offset == len(item):
            return 0
        self._offset += 1
        return item[self._offset - 1]

    def _transfer(self, descriptor: int) -> None:
        """The DMA that a descriptor in guest memory describes; its control word then says how it went."""
        raw = self._platform.dma_read(descriptor, DESCRIPTOR.size)
        done = raw is not None and self._carry_out(*DESCRIPTOR.unpack(raw))
        self._platform.dma_write(descriptor, (0 if done else ERROR).to_bytes(4, "big"))

    def _carry_out(self, control: int, length: int, address: int) -> bool:
        if control & SELECT:
            self._select(control >> 16)
        operation = next((each for bit, each in self._OPERATIONS if control & bit), None)
        return operation is None or operation(self, length, address)

    def _read(self, length: int, address: int) -> bool:
        """Behind an item's end are zeros."""
        if length > MOST:
            return False
        data = self._item()[self._offset : self._offset + length]
        if not self._platform.dma_write(address, data.ljust(length, b"\0")):
            return False
        self._offset += len(data)
        return True

    def _write(self, length: int, address: int) -> bool:
        """All of it within an item that can be written, or nothing."""
        end = self._offset + length
        if self._key != self._writable or end > len(self._vmcoreinfo):
            return False
        data = self._platform.dma_read(address, length)
        if data is None:
            return False
        self._vmcoreinfo = self._vmcoreinfo[: self._offset] + data + self._vmcoreinfo[end:]
        self._whole = length == len(self._vmcoreinfo)
        self._offset = end
        return True

    def _skip(self, length: int, address: int) -> bool:
        self._offset = min(self._offset + length, len(self._item()))
        return True

    _OPERATIONS: tuple[tuple[int, Callable[[FwCfg, int, int], bool]], ...] = (
        (READ, _read), (WRITE, _write), (SKIP, _skip),
    )  # fmt: skip
    """The first one that is asked for is done."""

    def save(self) -> bytes:
        return _STATE.pack(self._key, self._offset, self._dma_high, self._whole, self._vmcoreinfo)

    def check(self, raw: bytes) -> None:
        key, offset, _, whole, _ = unpack(self.name, _STATE, raw)
        if key & _WRITE_CHANNEL or offset > len(self._items.get(key, b"")) or whole > 1:
            raise damaged(self.name, f"it can't be at byte {offset} of item {key:#x}")

    def load(self, raw: bytes) -> None:
        self._key, self._offset, self._dma_high, whole, self._vmcoreinfo = _STATE.unpack(raw)
        self._whole = bool(whole)


def _swapped(value: int) -> int:
    return int.from_bytes(value.to_bytes(4, "little"), "big")
