"""How much of a VCPU's state a put may write (QEMU's ``KVM_PUT_*_STATE``)."""

from __future__ import annotations

from enum import IntEnum


class WritebackLevel(IntEnum):
    """The three writeback levels; a substate is written at its own level and at every higher one."""

    RUNTIME = 1
    """The VCPU ran and will run on; others may be running now."""
    RESET = 2
    """A synchronous system reset: every VCPU is stopped."""
    FULL = 3
    """Machine init, or a loaded state: every VCPU is stopped."""
