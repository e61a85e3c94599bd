"""What differs between two machines, each now, at a checkpoint or in a file: registers, devices, memory."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvm.backends.interface import PAGE_SIZE
from kvm.errors import SnapshotCancelled
from kvm.snapshot.chain import page_address
from kvm.snapshot.contents import SOURCE_SHIFT, ZERO, Contents, Index, PageArray
from kvm.snapshot.file import Progress
from kvm.snapshot.state import MachineState
from kvm.x86 import lapic, msrs
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


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """A page that differs, at a guest-physical address; ``a`` and ``b`` are good until the next one is asked for."""

    address: int
    a: PageArray
    b: PageArray

    @property
    def count(self) -> int:
        """Of bytes that differ."""
        return int(np.count_nonzero(self.a != self.b))

    def runs(self) -> Iterator[Bytes]:
        """Its differing bytes."""
        for start, stop in _runs(np.flatnonzero(self.a != self.b)):
            yield Bytes(self.address + start, self.a[start:stop].tobytes(), self.b[start:stop].tobytes())


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
    for page in pages(a, b, size):
        yield from page.runs()


def pages(
    a: Contents,
    b: Contents,
    size: int,
    *,
    progress: Progress = lambda done, total: None,
    cancel: threading.Event | None = None,
) -> Iterator[Page]:
    """The pages that differ, ascending. Raises SnapshotCancelled.

    ``progress`` is told of the bytes that had to be compared: not those which both have from the same page.
    """
    rooms = np.empty((2, _BATCH, PAGE_SIZE), np.uint8)
    numbers = np.flatnonzero(~_same(a, b)).astype(np.int64)
    for first in range(0, len(numbers), _BATCH):
        if cancel is not None and cancel.is_set():
            raise SnapshotCancelled("The comparison was called off.")
        here = numbers[first : first + _BATCH]
        left, right = a.read(a.index[here], rooms[0]), b.read(b.index[here], rooms[1])
        for row in np.flatnonzero((left.view(np.uint64) != right.view(np.uint64)).any(axis=1)):
            yield Page(page_address(size, int(here[row])), left[row], right[row])
        progress((first + len(here)) * PAGE_SIZE, len(numbers) * PAGE_SIZE)


def _same(a: Contents, b: Contents) -> NDArray[np.bool_]:
    """Which pages are one and the same: zero pages, and those of the same number in a source that both have."""
    same: NDArray[np.bool_] = a.index == b.index
    shared = [number for number, pages in a.sources.items() if b.sources.get(number) is pages]
    if len(shared) < len(a.sources):
        same &= np.isin(a.index >> SOURCE_SHIFT, shared) | (a.index == ZERO)
    return same


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
        words = {at: raw[at : at + 4][::-1].hex() for at in range(0, len(raw), 16)}
        return {f" {lapic.NAMES[at]}" if at in lapic.NAMES else f"[{at:#05x}]": word for at, word in words.items()}
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
