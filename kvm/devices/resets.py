"""The three ports by which a PC resets itself: the keyboard controller, port 0x92 and port 0xcf9.

A20 is remembered and reported, never gated: no processor of today has the pin, KVM has no use for it.
"""

from __future__ import annotations

import struct

from kvm.devices.device import damaged, unpack
from kvm.devices.platform import Platform


class Port92:
    """System control port A: bit 0, as it rises, resets; bit 1 is A20."""

    name = "port92"
    _STATE = struct.Struct("<B")
    _RESET, _A20 = 1, 2

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._value = self._A20

    def port_in(self, offset: int, size: int) -> int:
        return self._value

    def port_out(self, offset: int, size: int, value: int) -> None:
        rises = value & ~self._value & self._RESET
        self._value = value & 0xFF
        if rises:
            self._platform.request_reset("port 0x92 bit 0")

    def reset(self) -> None:
        self._value = self._A20

    def save(self) -> bytes:
        return self._STATE.pack(self._value)

    def check(self, raw: bytes) -> None:
        unpack(self.name, self._STATE, raw)

    def load(self, raw: bytes) -> None:
        (self._value,) = self._STATE.unpack(raw)


class ResetControl:
    """0xcf8–0xcfb: of the chipset's ports here only the byte 0xcf9 is there, its reset control register.

    The device takes 4-byte accesses whole, and ignores them: to a PCI configuration address, which many guests try,
    none of its bytes is a reset.
    """

    name = "reset_control"
    _STATE = struct.Struct("<B")
    _OFFSET = 1
    _RESET = 0x04
    _KEPT = 0x0A
    """System or full reset: which it would be. All resets are the same here (ICH9, QEMU's ich9_rst_cnt_write)."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._value = 0

    def port_in(self, offset: int, size: int) -> int:
        return self._value if (offset, size) == (self._OFFSET, 1) else (1 << 8 * size) - 1

    def port_out(self, offset: int, size: int, value: int) -> None:
        if (offset, size) != (self._OFFSET, 1):
            return
        self._value = value & self._KEPT
        if value & self._RESET:
            self._platform.request_reset("port 0xcf9")

    def reset(self) -> None:
        self._value = 0

    def save(self) -> bytes:
        return self._STATE.pack(self._value)

    def check(self, raw: bytes) -> None:
        (value,) = unpack(self.name, self._STATE, raw)
        if value & ~self._KEPT:
            raise damaged(self.name, f"its register can't hold {value:#x}")

    def load(self, raw: bytes) -> None:
        (self._value,) = self._STATE.unpack(raw)


class KeyboardController:
    """The 8042 without a keyboard: what boot code asks of it on its way to A20, and the reset line.

    The input buffer is always empty; a command with an answer fills the output buffer at once. It never interrupts.
    """

    name = "i8042"
    DATA, COMMAND = 0, 4
    """Ports 0x60 and 0x64; what lies between isn't claimed."""
    _STATE = struct.Struct("<6B")

    _FULL, _SELF_TESTED, _WAS_COMMAND, _UNLOCKED = 0x01, 0x04, 0x08, 0x10
    _OUTPUT_RESET, _OUTPUT_A20 = 0x01, 0x02
    """Output port: reset is low-active."""
    _READ_CONFIG, _WRITE_CONFIG, _SELF_TEST, _KEYBOARD_TEST = 0x20, 0x60, 0xAA, 0xAB
    _DISABLE, _ENABLE, _READ_OUTPUT, _WRITE_OUTPUT, _A20_OFF, _A20_ON, _PULSE = 0xAD, 0xAE, 0xD0, 0xD1, 0xDD, 0xDF, 0xF0
    _CLOCK_DISABLED = 0x10

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._power_on()

    def _power_on(self) -> None:
        self._config = 0
        self._output_port = self._OUTPUT_RESET | self._OUTPUT_A20
        self._answer = 0
        self._full = 0
        self._expecting = 0
        """The command whose data byte comes next."""
        self._status = self._UNLOCKED

    def port_in(self, offset: int, size: int) -> int:
        if offset == self.COMMAND:
            return self._status | self._full
        self._full = 0
        return self._answer

    def port_out(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset == self.COMMAND:
            self._status |= self._WAS_COMMAND
            self._expecting = 0
            self._command(value)
        else:
            self._status &= ~self._WAS_COMMAND
            self._data(value)

    def _command(self, command: int) -> None:
        if command >= self._PULSE:  # the low bits name the lines to pulse, low-active; line 0 is reset
            if not command & 1:
                self._platform.request_reset("keyboard controller command 0xfe")
        elif command in (self._WRITE_CONFIG, self._WRITE_OUTPUT):
            self._expecting = command
        elif command == self._READ_CONFIG:
            self._reply(self._config)
        elif command == self._READ_OUTPUT:
            self._reply(self._output_port)
        elif command == self._SELF_TEST:
            self._status |= self._SELF_TESTED
            self._reply(0x55)
        elif command == self._KEYBOARD_TEST:
            self._reply(0x01)  # clock line stuck low: no keyboard, and SeaBIOS doesn't wait for one
        elif command == self._DISABLE:
            self._config |= self._CLOCK_DISABLED
        elif command == self._ENABLE:
            self._config &= ~self._CLOCK_DISABLED
        elif command == self._A20_OFF:
            self._output_port &= ~self._OUTPUT_A20
        elif command == self._A20_ON:
            self._output_port |= self._OUTPUT_A20

    def _data(self, value: int) -> None:
        """Bytes that no command asked for go to the keyboard, that isn't there."""
        expecting, self._expecting = self._expecting, 0
        if expecting == self._WRITE_CONFIG:
            self._config = value
        elif expecting == self._WRITE_OUTPUT:
            self._output_port = value | self._OUTPUT_RESET
            if not value & self._OUTPUT_RESET:
                self._platform.request_reset("keyboard controller output port")

    def _reply(self, value: int) -> None:
        self._answer = value
        self._full = self._FULL

    def reset(self) -> None:
        self._power_on()

    def save(self) -> bytes:
        return self._STATE.pack(
            self._config, self._output_port, self._answer, self._full, self._expecting, self._status
        )

    def check(self, raw: bytes) -> None:
        _, _, _, full, expecting, status = unpack(self.name, self._STATE, raw)
        known = self._SELF_TESTED | self._WAS_COMMAND | self._UNLOCKED
        if full & ~self._FULL or status & ~known or expecting not in (0, self._WRITE_CONFIG, self._WRITE_OUTPUT):
            raise damaged(self.name, "no keyboard controller can be in it")

    def load(self, raw: bytes) -> None:
        self._config, self._output_port, self._answer, self._full, self._expecting, self._status = self._STATE.unpack(
            raw
        )
