"""What a device may ask of the machine it sits in."""

from __future__ import annotations

from typing import Protocol


class Platform(Protocol):
    """Called on VCPU threads with the bus lock held: nothing here blocks or raises."""

    def irq_line(self, gsi: int, level: bool) -> None:
        """Set an interrupt line of the machine."""

    def request_reset(self, why: str) -> None:
        """Ask for a system reset, soon; ``why`` is for a person."""

    def request_exit(self, code: int) -> None:
        """Ask the machine to stop for good with this code."""

    def request_power_off(self) -> None:
        """Ask the machine to stop for good, without a code: the guest has switched it off."""

    def dma_read(self, address: int, size: int) -> bytes | None:
        """So many bytes of RAM at a guest-physical address; None if not all of them are RAM."""

    def dma_write(self, address: int, data: bytes) -> bool:
        """Write RAM at a guest-physical address. False, nothing written, if not all of it is RAM."""
