"""The one table that decides: which substates a VCPU has, in which order and from which level they are written.

The put and the get are loops over these rows. The order is QEMU's ``kvm_arch_put_registers`` (10.2), checked
against Firecracker's restore and the kernel's selftests; each row's ``why`` says what breaks otherwise.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from kvm.levels import WritebackLevel
from kvm.x86 import msrs, tsc
from kvm.x86.structs import (
    EVENT_VALID_NMI_PENDING,
    EVENT_VALID_SIPI_VECTOR,
    EVENT_VALID_SMM,
    ClockData,
    DebugRegs,
    Fpu,
    GuestDebug,
    Irqchip,
    Lapic,
    MpState,
    PitState2,
    Regs,
    Sregs,
    Sregs2,
    VcpuEvents,
    Xcrs,
    pack_msrs,
)

RUNTIME, RESET, FULL = WritebackLevel


def _whole(raw: bytes, level: WritebackLevel) -> bytes:
    return raw


def _events_at(raw: bytes, level: WritebackLevel) -> bytes:
    """At RUNTIME the NMI, SIPI and SMM parts stay the kernel's (QEMU 4fadfa0030, ea64305139)."""
    if level > RUNTIME:
        return raw
    events = VcpuEvents.from_buffer_copy(raw)
    events.flags &= ~(EVENT_VALID_NMI_PENDING | EVENT_VALID_SIPI_VECTOR | EVENT_VALID_SMM)
    return bytes(events)


def _clock_at(raw: bytes, level: WritebackLevel) -> bytes:
    """Only the clock goes back: the flags that a get reports would make a put jump by the time in between."""
    return raw[:8].ljust(len(raw), b"\0")  # struct kvm_clock_data begins with it


@dataclass(frozen=True, slots=True, eq=False)
class Substate:
    """One row: a part of the state that one pair of ioctls moves.

    ``template`` is the buffer handed to the get: its length is the struct's size in bytes, its content what the
    ioctl wants filled in (MSR indices, a chip's id). ``get``/``put`` are ioctl names, None where KVM has none:
    a row without a get has its truth in our copy only. ``by_value``: the ioctl's argument is the number itself.
    ``at``: what of the bytes is written at a level. ``then``: rows that must be written again after
    this one. ``once``: refused by the kernel after the first run. ``tolerated``: a put that fails stops nothing, and
    stands in the ledger; the kernel goes on with what it has.
    """

    name: str
    get: str | None
    put: str | None
    level: WritebackLevel
    why: str
    template: bytes
    struct: type[ctypes.Structure] | None = None
    cap: str | None = None
    at: Callable[[bytes, WritebackLevel], bytes] = _whole
    then: tuple[str, ...] = ()
    once: bool = False
    by_value: bool = False
    tolerated: bool = False
    counted: bool = False
    """The ioctl returns how many entries it moved: fewer than all is an error (Firecracker 602a2108e)."""


def _row(
    name: str,
    get: str | None,
    put: str | None,
    level: WritebackLevel,
    why: str,
    struct: type[ctypes.Structure],
    **more: object,
) -> Substate:
    return Substate(name, get, put, level, why, bytes(ctypes.sizeof(struct)), struct, **more)  # type: ignore[arg-type]


def _msr_row(name: str, level: WritebackLevel, why: str, indices: Iterable[int]) -> Substate:
    return Substate(name, "KVM_GET_MSRS", "KVM_SET_MSRS", level, why, pack_msrs(indices), counted=True)


class Choice:
    """Some rows, all at once: the same few choices come again and again."""

    def __init__(self, rows: Iterable[Substate], skipped: tuple[str, ...] = ()) -> None:
        """``skipped``: the names of those that were left alone."""
        self.rows = tuple(rows)
        self.names = tuple([row.name for row in self.rows])
        self.skipped = skipped
        self._differ = tuple([place for place, row in enumerate(self.rows) if row.at is not _whole])

    def raws(self, copy: Mapping[str, bytes], level: WritebackLevel) -> list[bytes]:
        """What of the copy is written at this level, row by row."""
        raws = [copy[name] for name in self.names]
        for place in self._differ:
            raws[place] = self.rows[place].at(raws[place], level)
        return raws


@dataclass(frozen=True)
class Table:
    """The rows of one host's VCPUs, in put order; ``get_order`` names the same rows as they are read."""

    put_order: tuple[Substate, ...]
    get_order: tuple[Substate, ...]

    @cached_property
    def by_name(self) -> dict[str, Substate]:
        return {row.name: row for row in self.put_order}

    @cached_property
    def followers(self) -> frozenset[str]:
        """The rows that must be written again after another."""
        return frozenset(name for row in self.put_order for name in row.then)

    def up_to(self, level: WritebackLevel, same: tuple[str, ...] = ()) -> Choice:
        """What may be written at this level, in put order, but for the ``same``, which are left alone."""
        choice = self._choices.get((level, same))
        if choice is None:
            allowed = [row for row in self.put_order if row.level <= level]
            rows = [row for row in allowed if row.name not in same]
            choice = Choice(rows, tuple(row.name for row in allowed if row.name in same))
            self._choices[level, same] = choice
        return choice

    @cached_property
    def to_get(self) -> Choice:
        """All that can be read, in get order."""
        return Choice(self.get_order)

    @cached_property
    def tells_tsc(self) -> Choice | None:
        """Where a VCPU's TSC and its offset stand; None where KVM has no offsets."""
        return Choice(map(self.by_name.__getitem__, tsc.FOUND_IN)) if "tsc_offset" in self.by_name else None

    @cached_property
    def _choices(self) -> dict[tuple[WritebackLevel, tuple[str, ...]], Choice]:
        """The same few come again and again."""
        return {}

    @cached_property
    def ours(self) -> tuple[str, ...]:
        """The rows that KVM can't read back."""
        return tuple(row.name for row in self.put_order if row.get is None)


def _nested_template(size: int) -> bytes:
    """``struct kvm_nested_state``: its header holds the buffer's size, in bytes, at offset 4."""
    return bytes(4) + size.to_bytes(4, "little") + bytes(max(0, size - 8))


_GET_ORDER = (
    "mp_state", "events", "regs", "xsave", "xcrs", "sregs", "msrs", "msrs_reset", "tsc_offset", "tsc_deadline", "lapic",
    "debugregs", "nested", "tsc_khz",
)  # fmt: skip
"""MP state first: reading it accepts a latched INIT or SIPI, which changes CS and RIP, and clears what events hold.

QEMU reads events before it: an INIT then stands in them as latched still, and is latched again when they are put.

The TSC deadline before the LAPIC: a timer that fires between the two reads is then found twice, which comes to one
interrupt when it is put back; the other way round it would be found in neither.
"""


def vcpu_table(caps: Mapping[str, int], listed_msrs: Iterable[int]) -> Table:
    """The table for a host with these capabilities (KVM_CHECK_EXTENSION's answers) and MSR list."""
    listed = tuple(listed_msrs)
    sregs: type[ctypes.Structure]
    runtime, reset = msrs.groups(listed)
    if caps.get("KVM_CAP_SREGS2", 0) > 0:
        suffix, sregs = "SREGS2", Sregs2
    else:
        suffix, sregs = "SREGS", Sregs
    why = "x87, SSE, AVX: before XCRS, as the kernel checks them apart"
    if caps.get("KVM_CAP_XSAVE2", 0) > 0:
        size = max(4096, caps["KVM_CAP_XSAVE2"])
        fpu = Substate("xsave", "KVM_GET_XSAVE2", "KVM_SET_XSAVE", RUNTIME, why, bytes(size))
    elif caps.get("KVM_CAP_XSAVE", 0) > 0:
        fpu = Substate("xsave", "KVM_GET_XSAVE", "KVM_SET_XSAVE", RUNTIME, why, bytes(4096))
    else:
        fpu = _row("fpu", "KVM_GET_FPU", "KVM_SET_FPU", RUNTIME, why, Fpu)
    rows = (
        Substate(
            "cpuid", None, "KVM_SET_CPUID2", FULL, "decides what the rest may hold; refused after the first run",
            b"", once=True,
        ),
        _row(
            "sregs", f"KVM_GET_{suffix}", f"KVM_SET_{suffix}", RUNTIME,
            "carries EFER and the APIC base: before LAPIC, nested state and MSRs",
            sregs, then=("guest_debug",),
        ),
        Substate(
            "nested", "KVM_GET_NESTED_STATE", "KVM_SET_NESTED_STATE", RESET,
            "a write while running can invalidate what the kernel keeps for L2",
            _nested_template(caps.get("KVM_CAP_NESTED_STATE", 0)), cap="KVM_CAP_NESTED_STATE",
        ),
        Substate(
            "tsc_khz", "KVM_GET_TSC_KHZ", "KVM_SET_TSC_KHZ", FULL,
            "scales the TSC that is set later; a refusal is tolerated, and told",
            bytes(4), cap="KVM_CAP_TSC_CONTROL", by_value=True, tolerated=True,
        ),
        _row(
            "regs", "KVM_GET_REGS", "KVM_SET_REGS", RUNTIME, "before events: SET_REGS clears a pending exception",
            Regs, then=("events", "guest_debug"),
        ),
        fpu,
        _row("xcrs", "KVM_GET_XCRS", "KVM_SET_XCRS", RUNTIME, "the XSAVE parts that are on", Xcrs, cap="KVM_CAP_XCRS"),
        _row(
            "lapic", "KVM_GET_LAPIC", "KVM_SET_LAPIC", RESET,
            "after SREGS (APIC base), before the TSC deadline; an interrupt may be arriving at runtime", Lapic,
        ),
        _msr_row("msrs", RUNTIME, "written by this VCPU's own WRMSR only", runtime),
        _msr_row("msrs_reset", RESET, "TSC, kvmclock, MTRRs, PMU: a write has effects beyond this VCPU", reset),
        Substate(
            "tsc_offset", "KVM_GET_DEVICE_ATTR", "KVM_SET_DEVICE_ATTR", RESET,
            "after the TSC's MSR, with which KVM guesses: the last write holds, and this one is exact on every VCPU",
            bytes(8), cap="KVM_CAP_VCPU_ATTRIBUTES",
        ),
        _row(
            "events", "KVM_GET_VCPU_EVENTS", "KVM_SET_VCPU_EVENTS", RUNTIME,
            "NMI, SIPI and SMM parts only from RESET on: one that arrived meanwhile must not be wiped",
            VcpuEvents, cap="KVM_CAP_VCPU_EVENTS", at=_events_at,
        ),
        _row("mp_state", "KVM_GET_MP_STATE", "KVM_SET_MP_STATE", RESET, "INIT and SIPI change it at any time", MpState),
        _msr_row(
            "tsc_deadline", RESET, "after LAPIC and TSC, or the timer is lost; at runtime it would fire twice",
            (msrs.TSC_DEADLINE,) if msrs.TSC_DEADLINE in listed else (),
        ),
        _row("debugregs", "KVM_GET_DEBUGREGS", "KVM_SET_DEBUGREGS", RUNTIME, "DR0-7 as the guest sees them",
             DebugRegs, cap="KVM_CAP_DEBUGREGS"),
        _row("guest_debug", None, "KVM_SET_GUEST_DEBUG", RUNTIME, "last: single step remembers the RIP it starts from",
             GuestDebug, cap="KVM_CAP_SET_GUEST_DEBUG"),
    )  # fmt: skip
    here = tuple(
        row
        for row in rows
        if (row.cap is None or caps.get(row.cap, 0) > 0) and not (row.counted and len(row.template) == 8)
    )
    by_name = {row.name: row for row in here}
    order = tuple(fpu.name if name == "xsave" else name for name in _GET_ORDER)
    return Table(here, tuple(by_name[name] for name in order if name in by_name))


def machine_table(caps: Mapping[str, int]) -> tuple[Substate, ...]:
    """The machine's own substates, in put and get order: the chips, then the clock, before any VCPU runs."""
    stand = "while all VCPUs stand"
    chips = tuple(
        Substate(
            name, "KVM_GET_IRQCHIP", "KVM_SET_IRQCHIP", RESET, because, bytes(Irqchip(chip_id=chip)), Irqchip,
            cap="KVM_CAP_IRQCHIP",
        )
        for name, chip, because in (
            ("pic_slave", 1, f"{stand}; before the master, which would take the old one's request (IRQ 2)"),
            ("pic_master", 0, stand), ("ioapic", 2, stand),
        )
    )  # fmt: skip
    rows = (
        *chips,
        _row("pit", "KVM_GET_PIT2", "KVM_SET_PIT2", RESET, "counts on while VCPUs stand", PitState2,
             cap="KVM_CAP_PIT2"),
        _row(
            "clock", "KVM_GET_CLOCK", "KVM_SET_CLOCK", FULL,
            "before any VCPU runs, or the guest sees time jump (Cloud Hypervisor #7932)", ClockData,
            cap="KVM_CAP_ADJUST_CLOCK", at=_clock_at,
        ),
    )  # fmt: skip
    return tuple(row for row in rows if row.cap is None or caps.get(row.cap, 0) > 0)
