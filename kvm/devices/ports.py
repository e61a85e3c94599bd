"""The small debugging devices: a console of one port, POST codes, and the way out."""

from __future__ import annotations

import struct
from collections import deque

from kvm.devices.console import Console
from kvm.devices.device import damaged, unpack
from kvm.devices.platform import Platform

_NOTHING = struct.Struct("")
_DEBUGCON_READBACK = 0xE9
"""How guests find the port: Bochs invented it, SeaBIOS asks for it on 0x402 too."""


class DebugConsole:
    """A port whose every byte is output (QEMU's isa-debugcon)."""

    def __init__(self, name: str, console: Console) -> None:
        self.name = name
        self._console = console

    def port_in(self, offset: int, size: int) -> int:
        return _DEBUGCON_READBACK

    def port_out(self, offset: int, size: int, value: int) -> None:
        self._console.put(value & 0xFF)

    def reset(self) -> None:
        """It has no state."""

    def save(self) -> bytes:
        return b""

    def check(self, raw: bytes) -> None:
        unpack(self.name, _NOTHING, raw)

    def load(self, raw: bytes) -> None:
        """It has no state."""


class Post:
    """Port 0x80: the codes that boot code shows as it goes. Reads as ones, as in QEMU."""

    name = "post"
    _KEPT = 16

    def __init__(self) -> None:
        self._codes: deque[int] = deque(maxlen=self._KEPT)

    @property
    def code(self) -> int | None:
        """The last code, None before the first."""
        codes = self.codes
        return codes[-1] if codes else None

    @property
    def codes(self) -> tuple[int, ...]:
        """The last 16 codes, the newest last. Any thread."""
        return tuple(self._codes.copy())

    def port_in(self, offset: int, size: int) -> int:
        return 0xFF

    def port_out(self, offset: int, size: int, value: int) -> None:
        self._codes.append(value & 0xFF)

    def reset(self) -> None:
        self._codes.clear()

    def save(self) -> bytes:
        return bytes(self._codes)

    def check(self, raw: bytes) -> None:
        if len(raw) > self._KEPT:
            raise damaged(self.name, f"{len(raw)} codes, it keeps {self._KEPT}")

    def load(self, raw: bytes) -> None:
        self._codes = deque(raw, self._KEPT)


class DebugExit:
    """QEMU's isa-debug-exit: a write of 1, 2 or 4 bytes ends the machine with that value."""

    name = "debug_exit"

    def __init__(self, platform: Platform) -> None:
        self._platform = platform

    def port_in(self, offset: int, size: int) -> int:
        return 0

    def port_out(self, offset: int, size: int, value: int) -> None:
        self._platform.request_exit(value)

    def reset(self) -> None:
        """It has no state."""

    def save(self) -> bytes:
        return b""

    def check(self, raw: bytes) -> None:
        unpack(self.name, _NOTHING, raw)

    def load(self, raw: bytes) -> None:
        """It has no state."""
