"""What a machine as a whole is doing, and why."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from kvm.backends.interface import Exit


class Phase(Enum):
    """What the machine as a whole is doing."""

    PAUSED = "paused"
    RUNNING = "running"
    STOPPED = "stopped"
    """The guest can't go on: a triple fault, an instruction that KVM can't emulate."""
    EXITED = "exited"
    """The guest ended itself through isa-debug-exit, and ``Status.code`` is what it wrote, or switched the machine off:
    then that's None."""
    CLOSED = "closed"


class Status(NamedTuple):
    """The machine's phase and why: ``reason`` is one line; ``vcpu`` and ``exit`` say who stopped it, and how."""

    phase: Phase
    reason: str = ""
    vcpu: int | None = None
    exit: Exit | None = None
    code: int | None = None
