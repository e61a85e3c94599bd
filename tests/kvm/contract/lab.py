"""What the contract's tests share: guests of a few bytes, tables with a guard taken out, traces, and a faulty fd."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvm import sync
from kvm.backends.deferred import Deferred
from kvm.backends.interface import Bus, Exit, IoctlTrace, VcpuFd, Vm
from kvm.chips import Chips
from kvm.errors import KvmError, SubstateError
from kvm.levels import WritebackLevel
from kvm.machine import Machine
from kvm.snapshot.state import MachineState
from kvm.vcpu import Vcpu
from kvm.x86.reset import LAPIC_SVR
from kvm.x86.structs import Regs
from kvm.x86.substates import Substate, Table, vcpu_table
from tests.guests.assemble import BinutilsMissing, assemble
from tests.kvm.machines import ORIGIN, until

RUNTIME, RESET, FULL = WritebackLevel

NMI_COUNT, VECTOR_COUNT = 0x2000, 0x2002
VECTOR = 0x40
GSI = 20
"""A pin of the I/O APIC that the 8259s don't have."""

COUNT_INTERRUPTS = bytes.fromhex("66 40 eb fc").ljust(0x100, b"\xf4") + bytes.fromhex("ff 06 00 20 cf").ljust(
    0x10, b"\xf4"
) + bytes.fromhex("ff 06 02 20 cf")  # fmt: skip
"""Real mode: inc eax for ever. The handlers behind it: inc word [NMI_COUNT]; iret, and the same for VECTOR_COUNT."""

START_AP = bytes.fromhex("bf 00 03 e0 fe  c7 07 00 45 0c 00  c7 07 08 46 0c 00  eb fe")
"""64-bit: mov edi, ICR; INIT to all others; SIPI to 0x8000, to all others; jmp itself."""
AP_ADDRESS, AP_COUNT = 0x8000, 0x9000
AP_CODE = bytes.fromhex("ff 06 00 90 eb fa")
"""inc word [AP_COUNT], for ever."""


def word(machine: Machine, address: int) -> int:
    return int.from_bytes(machine.read_memory(address, 2), "little")


def assembled(source: Path, folder: Path, base: int = 0x100000) -> bytes:
    try:
        return assemble(source, base=base, format="bin")
    except BinutilsMissing as missing:
        pytest.skip(str(missing))


def take_interrupts(machine: Machine) -> None:
    """Make a fresh machine with COUNT_INTERRUPTS one that takes NMIs and, on GSI, interrupts through its local APIC."""
    machine.write_memory(2 * 4, (ORIGIN + 0x100).to_bytes(4, "little"))
    machine.write_memory(VECTOR * 4, (ORIGIN + 0x110).to_bytes(4, "little"))
    state = machine.save()
    vcpu = dict(state.vcpus[0])
    vcpu["regs"] = changed_regs(vcpu["regs"], rflags=0x202, rsp=0x8000)
    vcpu["lapic"] = put_bytes(vcpu["lapic"], LAPIC_SVR, (0x1FF).to_bytes(4, "little"))
    pins = put_bytes(state.machine["ioapic"], 8 + 24 + 8 * GSI, VECTOR.to_bytes(8, "little"))
    machine.load(MachineState((vcpu, *state.vcpus[1:]), {**state.machine, "ioapic": pins}, state.devices))


def interrupt(machine: Machine) -> None:
    """An edge on GSI."""
    machine.irq_line(GSI, True)
    machine.irq_line(GSI, False)


def nmi(machine: Machine, vcpu: Vcpu) -> None:
    vcpu.run_on(lambda: machine._vm.nmi(vcpu.fd))


def put_bytes(raw: bytes, offset: int, new: bytes) -> bytes:
    return raw[:offset] + new + raw[offset + len(new) :]


def changed_regs(raw: bytes, **values: int) -> bytes:
    regs = Regs.from_buffer_copy(raw)
    for name, value in values.items():
        setattr(regs, name, value)
    return bytes(regs)


def regs_of(machine: Machine, vcpu: int = 0) -> Regs:
    return Regs.from_buffer_copy(machine.view(vcpu).regs)


def makes_progress(machine: Machine, instructions: int = 2000) -> None:
    """Wait until VCPU 0, which counts in EAX, has gone on so far: what was pending at its entry is delivered."""

    def counted() -> int:
        machine.request_samples()
        return regs_of(machine).rax & 0xFFFFFFFF

    start = counted()
    until(lambda: counted() - start & 0xFFFFFFFF > instructions)


def tsc_distances(vcpus: Sequence[Mapping[str, bytes]]) -> list[int]:
    """How far each VCPU's TSC is from VCPU 0's; none where there are no offsets."""
    offsets = [int.from_bytes(vcpu.get("tsc_offset", b""), "little") for vcpu in vcpus]
    return [offset - offsets[0] & (1 << 64) - 1 for offset in offsets]


def synchronize(machine: Machine, vcpu: int = 0) -> Vcpu:
    sync.cpu_synchronize_state(machine.vcpus[vcpu], ledger=machine.ledger, caller="test")
    return machine.vcpus[vcpu]


# Guards taken out


def write_all(vcpu: Vcpu) -> None:
    """What QEMU does at runtime, and this contract doesn't: write every row of the level, changed or not."""
    for row in vcpu.table.get_order:
        vcpu.known.pop(row.name, None)


def with_rows(monkeypatch: pytest.MonkeyPatch, **changes: dict[str, Any]) -> None:
    """Machines built from now on have a table in which these rows differ."""

    def altered(rows: Rows) -> Rows:
        return [dataclasses.replace(row, **changes.get(row.name, {})) for row in rows]

    _patch_table(monkeypatch, put=altered, get=altered)


def with_put_order(monkeypatch: pytest.MonkeyPatch, name: str, *, before: str) -> None:
    _patch_table(monkeypatch, put=lambda rows: _moved(rows, name, before))


def with_get_order(monkeypatch: pytest.MonkeyPatch, name: str, *, before: str) -> None:
    _patch_table(monkeypatch, get=lambda rows: _moved(rows, name, before))


Rows = Sequence[Substate]


def _moved(rows: Rows, name: str, before: str) -> Rows:
    rest = [row for row in rows if row.name != name]
    at = next(place for place, row in enumerate(rest) if row.name == before)
    return (*rest[:at], *(row for row in rows if row.name == name), *rest[at:])


def _patch_table(
    monkeypatch: pytest.MonkeyPatch, *, put: Callable[[Rows], Rows] = tuple, get: Callable[[Rows], Rows] = tuple
) -> None:
    def patched(*arguments: Any) -> Table:
        table = vcpu_table(*arguments)
        return Table(tuple(put(table.put_order)), tuple(get(table.get_order)))

    monkeypatch.setattr("kvm.machine.vcpu_table", patched)


def whole(raw: bytes, level: WritebackLevel) -> bytes:
    """A row's bytes at every level alike."""
    return raw


# Looking


class Tracing:
    """What ioctls a piece of work makes."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def __enter__(self) -> Tracing:
        self.calls: list[IoctlTrace] = []
        self.machine.system.trace = self.calls
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.system.trace = None

    def moved(self, vcpu: int | None) -> list[tuple[str, str]]:
        """(ioctl, substate) in order."""
        return [(call.ioctl, call.substate) for call in self.calls if call.vcpu == vcpu and call.substate]

    def threads(self, vcpu: int) -> set[int]:
        return {call.thread for call in self.calls if call.vcpu == vcpu}


Fault = Callable[[str, str, int | None], int]
"""Asked before each ioctl (its name, the substate's or "", the VCPU or None); an errno to fail with, or 0."""


class FaultyFd:
    """A VCPU's fd, or a VM's, whose ioctls fail when ``fault`` says so; else they are the real one's, row by row."""

    def __init__(self, fd: VcpuFd | Vm, fault: Fault) -> None:
        self._fd: Any = fd
        self._fault = fault
        self._index: int | None = getattr(fd, "index", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fd, name)

    def get(self, rows: Sequence[Substate]) -> list[bytes]:
        return [self._move(place, row, row.get, self._fd.get, [row])[0] for place, row in enumerate(rows)]

    def put(self, rows: Sequence[Substate], raws: Sequence[bytes]) -> tuple[SubstateError, ...]:
        tolerated: tuple[SubstateError, ...] = ()
        for place, (row, raw) in enumerate(zip(rows, raws, strict=True)):
            try:
                tolerated += self._move(place, row, row.put, self._fd.put, [row], [raw]) or ()
            except SubstateError as error:
                if not row.tolerated:
                    error.tolerated = tolerated
                    raise
                tolerated += (error,)
        return tolerated

    def getting(self, rows: tuple[Substate, ...]) -> Deferred[list[bytes]]:
        return Deferred(lambda: self.get(rows))

    def putting(self, rows: tuple[Substate, ...], raws: Sequence[bytes]) -> Deferred[tuple[SubstateError, ...]]:
        return Deferred(lambda: self.put(rows, raws))

    def _move(self, place: int, row: Substate, ioctl: str | None, move: Callable[..., Any], *what: Any) -> Any:
        assert ioctl is not None
        if number := self._fault(ioctl, row.name, self._index):
            raise SubstateError(row.name, place, ioctl, number, vcpu=self._index)
        try:
            return move(*what)
        except SubstateError as error:
            error.moved = place
            raise

    def run(self, bus: Bus) -> Exit:
        if number := self._fault("KVM_RUN", "", self._index):
            raise KvmError("KVM_RUN", number, vcpu=self._index)
        ended: Exit = self._fd.run(bus)
        return ended


def inject_from_the_start(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """The same for machines that are built from now on."""
    monkeypatch.setattr("kvm.machine.Vcpu", lambda fd, *rest: Vcpu(FaultyFd(fd, fault), *rest))  # type: ignore[arg-type]
    monkeypatch.setattr("kvm.machine.Chips", lambda vm, caps: Chips(FaultyFd(vm, fault), caps))  # type: ignore[arg-type]


def inject(machine: Machine, fault: Fault) -> None:
    """From now on the ioctls of the machine and its VCPUs fail as ``fault`` says, whatever the backend."""
    machine._vm = machine.chips._vm = FaultyFd(machine._vm, fault)  # type: ignore[assignment]
    for vcpu in machine.vcpus:
        vcpu.fd = FaultyFd(vcpu.fd, fault)  # type: ignore[assignment]
