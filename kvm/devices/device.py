"""What a device on the bus is, and how its state is packed."""

from __future__ import annotations

import struct
from typing import Any, Protocol

from kvm.errors import VmdeckError


class Device(Protocol):
    """A device on the bus. The bus calls every method with its lock held; none of them raises or blocks.

    ``offset`` counts from the first port claimed, ``size`` is 1, 2 or 4 bytes, at most the width it claimed.
    """

    name: str

    def port_in(self, offset: int, size: int) -> int: ...
    def port_out(self, offset: int, size: int, value: int) -> None: ...

    def reset(self) -> None:
        """The state after power-on or a system reset."""

    def save(self) -> bytes: ...

    def check(self, raw: bytes) -> None:
        """Raise VmdeckError if this isn't what ``save`` gives, or is damaged."""

    def load(self, raw: bytes) -> None:
        """Take what ``check`` let pass."""


class MmioDevice(Protocol):
    """A device with registers in the physical address space; ``size`` is 1, 2, 4 or 8 bytes."""

    def mmio_read(self, offset: int, size: int) -> int: ...
    def mmio_write(self, offset: int, size: int, value: int) -> None: ...


def unpack(name: str, layout: struct.Struct, raw: bytes) -> tuple[Any, ...]:
    """The values of a saved state. Raises VmdeckError if it hasn't the layout's size."""
    if len(raw) != layout.size:
        raise damaged(name, f"it has {len(raw)} bytes, {layout.size} are needed")
    return layout.unpack(raw)


def damaged(name: str, why: str) -> VmdeckError:
    """The error for a saved state that a device can't take."""
    return VmdeckError(f"The saved state of device {name} is damaged: {why}. Use another checkpoint or snapshot.")
