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
