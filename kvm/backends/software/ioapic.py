"""The I/O APIC: 24 pins, one page of registers (struct kvm_ioapic_state)."""

from __future__ import annotations

import struct
from collections.abc import Callable

BASE = 0xFEC00000
PINS = 24
_VERSION = (PINS - 1) << 16 | 0x11
_SELECT, _WINDOW, _EOI = 0x00, 0x10, 0x40
_REMOTE_IRR, _LEVEL, _MASKED = 1 << 14, 1 << 15, 1 << 16
_READ_ONLY = 1 << 12 | _REMOTE_IRR
_LAYOUT = struct.Struct(f"<QIIII{PINS}Q")


class Ioapic:
    """``deliver(command, destination)`` sends a message to the local APICs."""

    def __init__(self, deliver: Callable[[int, int], None]) -> None:
        self._deliver = deliver
        self._select = 0
        self._id = 0
        self._lines = 0
        """The pins that are asserted (the kernel's ``irr``)."""
        self._entries = [_MASKED] * PINS

    def save(self) -> bytes:
        """struct kvm_ioapic_state, 216 bytes."""
        return _LAYOUT.pack(BASE, self._select, self._id, self._lines, 0, *self._entries)

    def load(self, raw: bytes) -> None:
        _, self._select, self._id, self._lines, _, *self._entries = _LAYOUT.unpack(raw)

    def set_line(self, pin: int, level: bool) -> None:
        """One of the 24 pins."""
        bit = 1 << pin
        if not level:
            self._lines &= ~bit
            return
        was = self._lines & bit
        self._lines |= bit
        if not was or self._entries[pin] & _LEVEL:
            self._service(pin)

    def _service(self, pin: int) -> None:
        entry = self._entries[pin]
        if entry & _MASKED or (entry & _LEVEL and entry & _REMOTE_IRR):
            return
        if entry & _LEVEL:
            self._entries[pin] |= _REMOTE_IRR
        self._deliver(entry & 0xFFFF, entry >> 56)

    def end_of_interrupt(self, vector: int) -> None:
        """A local APIC has finished this level-triggered vector."""
        for pin, entry in enumerate(self._entries):
            if entry & 0xFF == vector and entry & _LEVEL and entry & _REMOTE_IRR:
                self._entries[pin] &= ~_REMOTE_IRR
                if self._lines >> pin & 1:
                    self._service(pin)

    def read(self, offset: int, size: int) -> int:
        """A guest's read."""
        if offset == _SELECT:
            return self._select
        if offset != _WINDOW:
            return 0
        if self._select in (0, 2):
            return self._id
        if self._select == 1:
            return _VERSION
        pin, high = divmod(self._select - 0x10, 2)
        if not 0 <= pin < PINS:
            return 0
        return self._entries[pin] >> 32 * high & 0xFFFF_FFFF

    def write(self, offset: int, size: int, value: int) -> None:
        """A guest's write."""
        if offset == _SELECT:
            self._select = value & 0xFF
        elif offset == _EOI:
            self.end_of_interrupt(value & 0xFF)
        elif offset == _WINDOW and self._select == 0:
            self._id = value & 0x0F00_0000
        elif offset == _WINDOW and self._select >= 0x10:
            self._write_entry(*divmod(self._select - 0x10, 2), value & 0xFFFF_FFFF)

    def _write_entry(self, pin: int, high: int, value: int) -> None:
        if pin >= PINS:
            return
        entry = self._entries[pin]
        if high:
            entry = entry & 0xFFFF_FFFF | (value & 0xFF00_0000) << 32
        else:
            entry = entry & ~0xFFFF_FFFF | value & 0x1FFFF & ~_READ_ONLY | entry & _READ_ONLY
            if not value & _LEVEL:
                entry &= ~_REMOTE_IRR
        self._entries[pin] = entry
        if entry & _LEVEL and self._lines >> pin & 1:
            self._service(pin)
