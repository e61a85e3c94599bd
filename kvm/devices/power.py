"""ACPI's PM1 registers (ACPI specification 6.4, 4.8.3.1 and 4.8.3.2): how a kernel switches the machine off.

ACPI mode is always on. No power-management event ever happens here, so the status stays 0 and nothing interrupts.
"""

from __future__ import annotations

import struct

from kvm.devices.device import damaged, unpack
from kvm.devices.platform import Platform

SIZE = 6
"""Ports: status, enable and control, 2 bytes each."""
POWER_OFF = 5
"""The sleep type that switches off: what the board's \\_S5 says (kvm/boot/acpi.py). No other is offered."""


class PowerControl:
    """Registers of 16 bits, which may be accessed by byte."""

    name = "power_control"
    _STATE = struct.Struct("<2H")
    _ENABLE, _CONTROL = 2, 4
    _ENABLES = 0x0721
    """PM timer, global lock, power button, sleep button, RTC."""
    _ACPI_MODE, _SLEEP_ENABLE = 1 << 0, 1 << 13
    _SLEEP_TYPE = 10
    _KEPT = 0x1C02
    """SLP_TYP and BM_RLD."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._enable = self._control = 0

    def port_in(self, offset: int, size: int) -> int:
        registers = struct.pack("<3H", 0, self._enable, self._control | self._ACPI_MODE)
        return int.from_bytes(registers[offset : offset + size], "little")

    def port_out(self, offset: int, size: int, value: int) -> None:
        shift = 8 * (offset & 1)
        mask = (1 << 8 * size) - 1 << shift
        value = value << shift & mask
        if offset & ~1 == self._ENABLE:
            self._enable = (self._enable & ~mask | value) & self._ENABLES
        elif offset & ~1 == self._CONTROL:
            self._control = (self._control & ~mask | value) & self._KEPT
            if value & self._SLEEP_ENABLE and self._control >> self._SLEEP_TYPE == POWER_OFF:
                self._platform.request_power_off()

    def reset(self) -> None:
        self._enable = self._control = 0

    def save(self) -> bytes:
        return self._STATE.pack(self._enable, self._control)

    def check(self, raw: bytes) -> None:
        enable, control = unpack(self.name, self._STATE, raw)
        if enable & ~self._ENABLES or control & ~self._KEPT:
            raise damaged(self.name, f"its registers can't hold {enable:#x} and {control:#x}")

    def load(self, raw: bytes) -> None:
        self._enable, self._control = self._STATE.unpack(raw)
