"""What differs between two machines, each now, at a checkpoint or in a file: registers, devices, memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from kvm.backends.interface import PAGE_SIZE
from kvm.snapshot.chain import page_address
from kvm.snapshot.contents import Contents, Index
from kvm.snapshot.state import MachineState
from kvm.x86 import msrs
from kvm.x86.structs import (
    ClockData,
    DebugRegs,
    Fpu,
    GuestDebug,
    Irqchip,
    MpState,
    PitState2,
    Regs,
    Sregs,
    Sregs2,
    VcpuEvents,
    Xcrs,
    Xsave,
    unpack_cpuid,
    unpack_msrs,
)

_STRUCTS: dict[str, type[ctypes.Structure]] = {
    "regs": Regs, "xsave": Xsave, "fpu": Fpu, "xcrs": Xcrs, "events": VcpuEvents, "mp_state": MpState,
    "debugregs": DebugRegs, "guest_debug": GuestDebug, "pic_master": Irqchip, "pic_slave": Irqchip, "ioapic": Irqchip,
    "pit": PitState2, "clock": ClockData,
}  # fmt: skip
_MSRS = ("msrs", "msrs_reset", "tsc_deadline")
_BATCH = 256
"""Pages compared at a time."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One value: where it is ("VCPU 0 regs.rax"), and what it is here and there; None where there is none."""

    where: str
    a: str | None
    b: str | None


@dataclass(frozen=True, slots=True)
class Bytes:
    """Differing bytes that lie together: a guest-physical address and what is there, here and there."""

    address: int
    a: bytes
    b: bytes


def states(a: MachineState, b: MachineState) -> Iterator[Difference]:
    """Registers by VCPU and field, the machine's chips and clock, and devices by byte."""
    for index in range(max(len(a.vcpus), len(b.vcpus))):
        for name in _names(_at(a, index), _at(b, index)):
            yield from _substate(f"VCPU {index} ", name, _at(a, index).get(name), _at(b, index).get(name))
    for name in _names(a.machine, b.machine):
        yield from _substate("", name, a.machine.get(name), b.machine.get(name))
    for name in _names(a.devices, b.devices):
        yield from _compare(f"device {name}", _by_byte(a.devices.get(name)), _by_byte(b.devices.get(name)))


def memory(a: Contents, b: Contents, size: int) -> Iterator[Bytes]:
    """Runs of differing bytes, ascending, of two machines with ``size`` bytes of RAM each."""
    rooms = np.empty((2, _BATCH, PAGE_SIZE), np.uint8)
    pages = np.flatnonzero((a.index != 0) | (b.index != 0)).astype(np.int64)
    for first in range(0, len(pages), _BATCH):
        here = pages[first : first + _BATCH]
        left, right = a.read(a.index[here], rooms[0]), b.read(b.index[here], rooms[1])
        for row in np.flatnonzero((left.view(np.uint64) != right.view(np.uint64)).any(axis=1)):
            address = page_address(size, int(here[row]))
            for start, stop in _runs(np.flatnonzero(left[row] != right[row])):
                yield Bytes(address + start, left[row, start:stop].tobytes(), right[row, start:stop].tobytes())


def _at(state: MachineState, index: int) -> Mapping[str, bytes]:
    return state.vcpus[index] if index < len(state.vcpus) else {}


def _names(a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    return [*a, *(name for name in b if name not in a)]


def _runs(places: Index) -> list[tuple[int, int]]:
    breaks = np.flatnonzero(np.diff(places) > 1)
    starts = places[np.concatenate(([0], breaks + 1))]
    stops = places[np.concatenate((breaks, [len(places) - 1]))] + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _substate(where: str, name: str, a: bytes | None, b: bytes | None) -> Iterator[Difference]:
    if a != b:
        yield from _compare(f"{where}{name}", _decoded(name, a), _decoded(name, b))


def _compare(where: str, a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Difference]:
    for field in _names(a, b):
        if a.get(field) != b.get(field):
            yield Difference(where + field, a.get(field), b.get(field))


def _decoded(name: str, raw: bytes | None) -> dict[str, str]:
    if raw is None:
        return {}
    if name in _MSRS:
        return {f" {msrs.NAMES.get(index, hex(index))}": hex(value) for index, value in unpack_msrs(raw).items()}
    if name == "cpuid":
        return {
            f" {entry.function:#x}.{entry.index}": " ".join(f"{word:08x}" for word in
                                                            (entry.eax, entry.ebx, entry.ecx, entry.edx))
            for entry in unpack_cpuid(raw)
        }  # fmt: skip
    if name in ("tsc_khz", "tsc_offset"):
        return {"": hex(int.from_bytes(raw, "little"))}
    if name == "lapic":
        return {f"[{at:#05x}]": raw[at : at + 4][::-1].hex() for at in range(0, len(raw), 16)}
    kind = (Sregs2 if len(raw) == ctypes.sizeof(Sregs2) else Sregs) if name == "sregs" else _STRUCTS.get(name)
    if kind is None or len(raw) < ctypes.sizeof(kind):
        return _by_byte(raw)
    rest = {f"[{at:#x}]": raw[at : at + 16].hex() for at in range(ctypes.sizeof(kind), len(raw), 16)}
    return dict(_fields("", kind.from_buffer_copy(raw))) | rest


def _by_byte(raw: bytes | None) -> dict[str, str]:
    return {f"[{at:#x}]": f"{byte:02x}" for at, byte in enumerate(raw or b"")}


def _fields(where: str, value: object) -> Iterator[tuple[str, str]]:
    """Every number in a struct by its path; runs of bytes as they lie in memory."""
    if isinstance(value, ctypes.Structure):
        for name, *_ in value._fields_:
            yield from _fields(f"{where}.{name}", getattr(value, name))
    elif isinstance(value, ctypes.Array):
        if value._type_ is ctypes.c_uint8:
            yield where, bytes(value).hex()
        else:
            for index, item in enumerate(value):
                yield from _fields(f"{where}[{index}]", item)
    else:
        assert isinstance(value, int)
        yield where, hex(value)
