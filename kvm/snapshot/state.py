"""The state of a machine without its memory: what ``Machine.save`` gives and ``Machine.load`` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvm.errors import MachineError
from kvm.snapshot.contents import Index
from kvm.x86.structs import Regs
from kvm.x86.substates import Substate, Table


@dataclass(frozen=True, slots=True)
class MachineState:
    """Raw KVM structs by substate name for every VCPU and for the machine, and every device's own bytes."""

    vcpus: tuple[Mapping[str, bytes], ...]
    machine: Mapping[str, bytes]
    devices: Mapping[str, bytes]

    @property
    def position(self) -> tuple[int, ...]:
        """Each VCPU's RIP."""
        return tuple(Regs.from_buffer_copy(copy["regs"]).rip for copy in self.vcpus)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A machine at one moment, kept in memory.

    ``taken`` is time.time(); ``position`` each VCPU's RIP; ``pages`` how many pages are stored for it alone when it was
    taken; ``parent`` the number of the checkpoint that the machine came from; ``note`` is a person's.
    """

    number: int
    name: str
    taken: float
    position: tuple[int, ...]
    pages: int
    parent: int | None
    state: MachineState
    index: Index
    note: str = ""


def check(state: MachineState, table: Table, machine_rows: Sequence[Substate], vcpus: int) -> None:
    """Raise MachineError if this machine can't take the state; called before anything is touched."""
    if len(state.vcpus) != vcpus:
        raise MachineError(f"The state is of {len(state.vcpus)} VCPUs, this machine has {vcpus}.")
    for index, copy in enumerate(state.vcpus):
        _check_rows(f"VCPU {index}'s", copy, table.put_order)
    _check_rows("the machine's", state.machine, machine_rows)


def _check_rows(whose: str, state: Mapping[str, bytes], rows: Sequence[Substate]) -> None:
    expected = {row.name: len(row.template) for row in rows}
    if state.keys() != expected.keys():
        differing = ", ".join(sorted(state.keys() ^ expected.keys()))
        raise MachineError(f"The state doesn't fit this backend: {whose} substates differ in {differing}.")
    for name, size in expected.items():
        if size and len(state[name]) != size:
            raise MachineError(f"The state doesn't fit: {whose} {name} has {len(state[name])} bytes, not {size}.")
