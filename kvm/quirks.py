"""What a host's KVM takes with success and then ignores: found by writing to a spare VCPU and reading back.

A refusal is an error and is told where it happens; this is what nobody would be told of otherwise.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvm.backends.interface import System, VcpuFd
from kvm.errors import SubstateError
from kvm.x86 import cpuid, msrs
from kvm.x86.reset import reset_state
from kvm.x86.structs import (
    MP_STATE_HALTED,
    DebugRegs,
    MpState,
    Regs,
    Sregs,
    VcpuEvents,
    Xsave,
    pack_msrs,
    unpack_msrs,
)
from kvm.x86.substates import Table, vcpu_table

_MARK = 0x1234_5678_9ABC
_FAR = 1 << 50
"""TSC ticks: further than any host's counter, and than it counts while we look."""
_TPR = 0x80


@dataclass(frozen=True, slots=True)
class Ignored:
    """Writes to ``what`` have no effect; ``lost`` is what a user sees of that."""

    what: str
    lost: str


@dataclass(frozen=True, slots=True)
class _Probe:
    """``read`` finds the value in the substate's bytes, ``write`` puts another there; ``kept`` compares that one with
    what is read back."""

    what: str
    substate: str
    lost: str
    value: int
    read: Callable[[bytes], int]
    write: Callable[[bytes, int], bytes]
    kept: Callable[[int, int], bool] = operator.eq


def _field(
    what: str, substate: str, lost: str, value: int, struct: type[ctypes.Structure], get: str, item: int | None = None
) -> _Probe:
    def read(raw: bytes) -> int:
        found = getattr(struct.from_buffer_copy(raw), get)
        return int(found if item is None else found[item])

    def write(raw: bytes, value: int) -> bytes:
        changed = struct.from_buffer_copy(raw)
        if item is None:
            setattr(changed, get, value)
        else:
            getattr(changed, get)[item] = value
        return bytes(changed) + raw[ctypes.sizeof(struct) :]

    return _Probe(what, substate, lost, value, read, write)


def _msr(index: int, substate: str, lost: str, value: int, kept: Callable[[int, int], bool] = operator.eq) -> _Probe:
    return _Probe(
        f"MSR {msrs.NAMES.get(index, hex(index))}", substate, lost, value,
        lambda raw: unpack_msrs(raw).get(index, value),
        lambda raw, new: pack_msrs({**unpack_msrs(raw), index: new}),
        kept,
    )  # fmt: skip


def _lapic(offset: int) -> tuple[Callable[[bytes], int], Callable[[bytes, int], bytes]]:
    return (
        lambda raw: int.from_bytes(raw[offset : offset + 4], "little"),
        lambda raw, value: raw[:offset] + value.to_bytes(4, "little") + raw[offset + 4 :],
    )


_EDITED = "an edited register doesn't reach the guest"
_RESTORED = "a restored checkpoint lacks it"
PROBES = (
    _field("RAX", "regs", _EDITED, _MARK, Regs, "rax"),
    _field("CR2", "sregs", _EDITED, _MARK, Sregs, "cr2"),
    _field("CR8", "sregs", _EDITED, 5, Sregs, "cr8"),
    _field("FCW", "xsave", _EDITED, 0x27F, Xsave, "fcw"),
    _field("MXCSR", "xsave", _EDITED, 0x3F80, Xsave, "mxcsr"),
    _field("DR0", "debugregs", _EDITED, _MARK, DebugRegs, "db", 0),
    _msr(0xC0000082, "msrs", _RESTORED, _MARK),
    _msr(0xC0000102, "msrs", _RESTORED, _MARK),
    _msr(0x277, "msrs", "the guest's page attributes are the host's choice", 0x0606_0606_0606_0606),
    _msr(
        msrs.TSC, "msrs_reset", "the guest's TSC goes on counting through reset and restore, apart on each VCPU", _FAR,
        lambda wanted, found: abs(found - wanted) < _FAR // 4,
    ),
    _Probe("TSC offset", "tsc_offset", "the VCPUs' TSCs stand as far apart as the host has them", _FAR,
           lambda raw: int.from_bytes(raw, "little"), lambda raw, value: value.to_bytes(8, "little")),
    _msr(0x2FF, "msrs_reset", _RESTORED, 0xC06),
    _Probe("local APIC's TPR", "lapic", _RESTORED, 0x50, *_lapic(_TPR)),
    _field("a pending NMI", "events", "one that waits while a checkpoint is taken is lost", 1, VcpuEvents,
           "nmi_pending"),
    _field("MP state", "mp_state", "a halted VCPU runs on after a restore", MP_STATE_HALTED, MpState, "mp_state"),
)  # fmt: skip


def ignored(system: System) -> tuple[Ignored, ...]:
    """What this system's VCPUs ignore. Makes a VM of one VCPU, some milliseconds. Raises KvmError if it can't."""
    table = vcpu_table(system.caps, system.msr_list())
    vm = system.create_vm()
    try:
        vm.create_irqchip()
        fd = vm.create_vcpu(0)
        try:
            rows = table.get_order
            own = cpuid.for_vcpu(system.cpuid(), 0, 1, tsc_deadline=False)
            fd.put([table.by_name["cpuid"]], [own])
            fresh = dict(zip((row.name for row in rows), fd.get(rows), strict=True))
            state = reset_state({**fresh, "cpuid": own}, 0)
            return tuple(Ignored(probe.what, probe.lost) for probe in PROBES if _is_ignored(probe, fd, table, state))
        finally:
            fd.close()
    finally:
        vm.close()


def _is_ignored(probe: _Probe, fd: VcpuFd, table: Table, state: Mapping[str, bytes]) -> bool:
    """A substate that isn't there, or a write that is refused, is not ignored."""
    row = table.by_name.get(probe.substate)
    if row is None:
        return False
    raw = state[probe.substate]
    try:
        fd.put([row], [probe.write(raw, probe.value)])
        (after,) = fd.get([row])
        fd.put([row], [raw])
    except SubstateError:
        return False
    return not probe.kept(probe.value, probe.read(after))
