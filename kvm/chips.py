"""The machine's own substates: the interrupt controllers, the PIT and the clock, which belong to no VCPU.

The all-CPU hooks move them (kvm/sync.py), before the VCPUs: what a device still owes a VCPU is then in the VCPU's
state, and the clock is set before any VCPU runs (Cloud Hypervisor #7932).
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from kvm.backends.interface import Vm
from kvm.errors import SubstateError
from kvm.ledger import Part
from kvm.levels import WritebackLevel
from kvm.x86.substates import machine_table


class Chips:
    """Raw KVM structs by substate name; the VCPUs stand while they move."""

    def __init__(self, vm: Vm, caps: Mapping[str, int]) -> None:
        self._vm = vm
        self.rows = machine_table(caps)
        self.copy: dict[str, bytes] = {}
        """As they were read last; or what is to be put."""

    def get(self) -> tuple[Part, SubstateError | None]:
        """Read all of them into the copy, which is left alone if that fails."""
        began = time.monotonic_ns()
        names = tuple(row.name for row in self.rows)
        try:
            values = self._vm.get(self.rows)
        except SubstateError as error:
            moved = error.moved
            return _part(began, read=names[:moved], ioctls=moved + 1, error=str(error)), error
        self.copy = dict(zip(names, values, strict=True))
        return _part(began, read=names, ioctls=len(names)), None

    def put(self, level: WritebackLevel) -> tuple[Part, SubstateError | None]:
        """Write those of the copy that the level allows."""
        began = time.monotonic_ns()
        rows = [(row, row.at(self.copy[row.name], level)) for row in self.rows if row.level <= level]
        names = tuple(row.name for row, _ in rows)
        try:
            self._vm.put(rows)
        except SubstateError as failure:
            error, moved = failure.at(level), failure.moved
            return _part(began, written=names[:moved], ioctls=moved + 1, error=str(error)), error
        return _part(began, written=names, ioctls=len(names)), None


def _part(
    began: int, *, read: tuple[str, ...] = (), written: tuple[str, ...] = (), ioctls: int, error: str = ""
) -> Part:
    return Part(None, read, written, (), ioctls, began, (time.monotonic_ns() - began) / 1000, error)
