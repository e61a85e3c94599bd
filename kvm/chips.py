"""The machine's own substates: the interrupt controllers, the PIT and the clock, which belong to no VCPU."""

from __future__ import annotations

from collections.abc import Mapping

from kvm.backends.interface import Vm
from kvm.errors import SubstateError
from kvm.levels import WritebackLevel
from kvm.x86.substates import machine_table


class Chips:
    """Raw KVM structs by substate name; the VCPUs stand while they move."""

    def __init__(self, vm: Vm, caps: Mapping[str, int]) -> None:
        self._vm = vm
        self.rows = machine_table(caps)
        self.fresh = self.get()
        """What they held when they were new: a reset's values. The irqchip must be there."""

    def get(self) -> dict[str, bytes]:
        """Raises SubstateError."""
        return dict(zip((row.name for row in self.rows), self._vm.get(self.rows), strict=True))

    def put(self, values: Mapping[str, bytes], level: WritebackLevel) -> None:
        """Write those that the level allows. Raises SubstateError."""
        rows = [(row, row.at(values[row.name], level)) for row in self.rows if row.level <= level]
        try:
            self._vm.put(rows)
        except SubstateError as error:
            raise error.at(level) from None
