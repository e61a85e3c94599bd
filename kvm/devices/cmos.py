"""The MC146818 clock and its battery-backed memory: the time, and what firmware asks about the machine's size.

The clock shows the host's UTC; the guest can't set it. No alarms and no interrupts.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

from kvm.devices.device import unpack
from kvm.x86 import layout

INDEX, DATA = 0, 1

STATUS_A, STATUS_B, STATUS_C, STATUS_D = 0x0A, 0x0B, 0x0C, 0x0D
_CENTURY = 0x32
_B_24_HOURS, _B_BINARY = 0x02, 0x04
_PM = 0x80
_FIXED = {
    STATUS_A: 0x26,  # 32768 Hz, and never "update in progress": the time is read from the host at once
    STATUS_C: 0x00,  # no interrupt has happened
    STATUS_D: 0x80,  # the battery is good
}
_CLOCK: dict[int, Callable[[time.struct_time], int]] = {
    0x00: lambda now: min(now.tm_sec, 59),
    0x02: lambda now: now.tm_min,
    0x04: lambda now: now.tm_hour,
    0x06: lambda now: (now.tm_wday + 1) % 7 + 1,  # Sunday is 1
    0x07: lambda now: now.tm_mday,
    0x08: lambda now: now.tm_mon,
    0x09: lambda now: now.tm_year % 100,
    _CENTURY: lambda now: now.tm_year // 100,
}
_HOURS = 0x04


def memory_registers(memory: int, vcpus: int) -> dict[int, int]:
    """Register → byte: the sizes as SeaBIOS and old boot code read them (QEMU's pc_cmos_init)."""
    low, *high = layout.ram(memory)
    above_1m = min((low[1] - layout.MIB) >> 10, 0xFFFF)
    above_16m = min(max(low[1] - 16 * layout.MIB, 0) >> 16, 0xFFFF)
    above_4g = sum(size for _, size in high) >> 16
    fields = (
        (640, (0x15, 0x16)),  # KiB
        (above_1m, (0x17, 0x18)),  # KiB
        (above_1m, (0x30, 0x31)),
        (above_16m, (0x34, 0x35)),  # 64 KiB units
        (above_4g, (0x5B, 0x5C, 0x5D)),  # 64 KiB units
        (min(vcpus - 1, 0xFF), (0x5F,)),
        (0x02, (0x14,)),  # equipment: a maths coprocessor, no floppy, no display
    )
    return {
        register: value >> 8 * place & 0xFF for value, registers in fields for place, register in enumerate(registers)
    }


class Cmos:
    """Index port and data port; bit 7 of the index (NMI mask) is ignored. ``clock`` gives seconds since 1970, UTC."""

    name = "cmos"
    _STATE = struct.Struct("<B128s")

    def __init__(self, memory: int, vcpus: int, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._index = 0
        self._bytes = bytearray(128)
        self._bytes[STATUS_B] = _B_24_HOURS
        for register, value in memory_registers(memory, vcpus).items():
            self._bytes[register] = value

    @property
    def shows_time(self) -> bool:
        """The data port reads the clock now."""
        return self._index in _CLOCK

    def port_in(self, offset: int, size: int) -> int:
        if offset == INDEX:
            return 0xFF  # write-only on a PC
        if self.shows_time:
            return self._time(self._index)
        return _FIXED.get(self._index, self._bytes[self._index])

    def port_out(self, offset: int, size: int, value: int) -> None:
        if offset == INDEX:
            self._index = value & 0x7F
        else:
            self._bytes[self._index] = value & 0xFF

    def _time(self, register: int) -> int:
        value = _CLOCK[register](time.gmtime(self._clock()))
        mode = self._bytes[STATUS_B]
        afternoon = 0
        if register == _HOURS and not mode & _B_24_HOURS:
            afternoon = _PM if value >= 12 else 0
            value = (value + 11) % 12 + 1
        return afternoon | (value if mode & _B_BINARY else value // 10 << 4 | value % 10)

    def reset(self) -> None:
        """The battery keeps it all: real-mode code leaves its way back in 0x0f before it resets."""

    def save(self) -> bytes:
        return self._STATE.pack(self._index, bytes(self._bytes))

    def check(self, raw: bytes) -> None:
        unpack(self.name, self._STATE, raw)

    def load(self, raw: bytes) -> None:
        index, stored = self._STATE.unpack(raw)
        self._index, self._bytes = index & 0x7F, bytearray(stored)
