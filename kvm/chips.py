"""The machine's own substates: the interrupt controllers, the PIT and the clock, which belong to no VCPU.

The all-CPU hooks move them (kvm/sync.py), before the VCPUs: what a device still owes a VCPU is then in the VCPU's
state, and the clock is set before any VCPU runs (Cloud Hypervisor #7932).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

from kvm.backends.interface import Vm
from kvm.errors import SubstateError
from kvm.ledger import Done, Part
from kvm.levels import WritebackLevel
from kvm.x86.substates import Choice, machine_table


class Chips:
    """Raw KVM structs by substate name; the VCPUs stand while they move."""

    def __init__(self, vm: Vm, caps: Mapping[str, int]) -> None:
        self._vm = vm
        self.rows = machine_table(caps)
        self._names = tuple(row.name for row in self.rows)
        self._choices = {level: Choice(row for row in self.rows if row.level <= level) for level in WritebackLevel}
        self.copy: Mapping[str, bytes] = {}
        """As they were read last; or what is to be put. Never changed: it's another one then."""
        self._to_put: tuple[Mapping[str, bytes], WritebackLevel, list[bytes]] = ({}, WritebackLevel.RUNTIME, [])
        """What was put last, at which level, and its bytes."""

    def get(self) -> Moved:
        """Read all of them into the copy, which is left alone if that fails."""
        began = time.monotonic_ns()
        try:
            values = self._vm.get(self.rows)
        except SubstateError as error:
            return Moved(began, time.monotonic_ns(), self._names, error)
        self.copy = dict(zip(self._names, values, strict=True))
        return Moved(began, time.monotonic_ns(), self._names, None)

    def put(self, level: WritebackLevel) -> Moved:
        """Write those of the copy that the level allows."""
        began = time.monotonic_ns()
        choice = self._choices[level]
        copy, at, raws = self._to_put
        if copy is not self.copy or at is not level:
            raws = choice.raws(self.copy, level)
            self._to_put = (self.copy, level, raws)
        try:
            self._vm.put(choice.rows, raws)
        except SubstateError as error:
            return Moved(began, time.monotonic_ns(), choice.names, error.at(level), level)
        return Moved(began, time.monotonic_ns(), choice.names, None, level)


class Moved(NamedTuple):
    """Substates that were read, or written where there is a ``level``; ``began_ns`` is CLOCK_MONOTONIC."""

    began_ns: int
    ended_ns: int
    names: tuple[str, ...]
    error: SubstateError | None
    level: WritebackLevel | None = None

    def done(self) -> Done:
        """For the ledger."""
        names, error = self.names, self.error
        ioctls = len(names)
        if error is not None:
            names, ioctls = names[: error.moved], error.moved + 1
        read, written = (names, ()) if self.level is None else ((), names)
        microseconds = (self.ended_ns - self.began_ns) / 1000
        return Part(None, read, written, (), ioctls, self.began_ns, microseconds, str(error) if error else ""), error
