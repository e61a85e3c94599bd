"""A VM's file descriptor: memory slots, interrupt controllers, VCPUs, the coalesced ring."""

from __future__ import annotations

import mmap
import struct
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvm.backends.interface import PAGE_SIZE, Bus, VcpuFd
from kvm.backends.kernel.batch import Batches
from kvm.backends.kernel.fd import Fd
from kvm.backends.kernel.library import ffi, lib
from kvm.backends.kernel.pages import copy_pages
from kvm.backends.kernel.vcpu import KernelVcpuFd
from kvm.x86 import layout
from kvm.x86.substates import Substate

if TYPE_CHECKING:
    from kvm.backends.kernel.system import KernelSystem

_REGION = struct.Struct("<IIQQQ")  # struct kvm_userspace_memory_region
_ZONE = struct.Struct("<QII")  # struct kvm_coalesced_mmio_zone
_RING_ENTRY = struct.Struct("<QIIQ")  # struct kvm_coalesced_mmio
_MASK = {size: (1 << 8 * size) - 1 for size in range(1, 9)}


@dataclass(slots=True)
class _Slot:
    address: int
    memory: mmap.mmap
    flags: int
    view: Any
    """cffi's hold on the memory; it can't be closed under the guest."""
    bitmap: Any
    numbers: NDArray[np.int64]
    """Room for all page numbers; untouched, it takes no host memory."""


class KernelVm:
    """One VM; see ``interface.Vm``. ``ring_page`` is the coalesced ring's page in a VCPU's mapping, 0 if none."""

    exact_log = True

    def __init__(self, system: KernelSystem, fd: Fd) -> None:
        """Takes ``fd`` over, and closes it if this fails."""
        self.system = system
        self.ring_page = system.caps["KVM_CAP_COALESCED_MMIO"]
        self._fd = fd
        self._batches = Batches(fd)
        self._slots: dict[int, _Slot] = {}
        self._lock = threading.Lock()
        self._draining = threading.Lock()
        self.user_steps = threading.Lock()
        """Steps at CPL 3 change the guest's IDT, which its VCPUs may share: one at a time."""
        self._ring_seen_by: Any = None
        """Any VCPU's mapping shows the VM's one ring: the first one's."""
        self._ring_copy = ffi.new("char[]", lib.VD_RING_BYTES)
        self._ring_view = ffi.buffer(self._ring_copy)
        try:
            self._set_up()
        except BaseException:
            self.close()
            raise

    def _set_up(self) -> None:
        caps = self.system.caps
        quirk = lib.KVM_X86_QUIRK_FIX_HYPERCALL_INSN
        if caps["KVM_CAP_DISABLE_QUIRKS2"] & quirk:
            # Otherwise KVM rewrites the other vendor's vmcall/vmmcall in the guest's memory.
            self._enable("KVM_CAP_DISABLE_QUIRKS2", quirk)
        if caps["KVM_CAP_SET_IDENTITY_MAP_ADDR"]:
            self._fd.call("KVM_SET_IDENTITY_MAP_ADDR", struct.pack("<Q", layout.KVM_IDENTITY_MAP))
        if caps["KVM_CAP_SET_TSS_ADDR"]:
            self._fd.call_value("KVM_SET_TSS_ADDR", layout.KVM_TSS)

    def _enable(self, capability: str, argument: int) -> None:
        raw = struct.pack("<IIQ24x64x", getattr(lib, capability), 0, argument)  # struct kvm_enable_cap
        self._fd.call("KVM_ENABLE_CAP", raw, detail=capability)

    def create_irqchip(self) -> None:
        self._fd.call("KVM_CREATE_IRQCHIP")
        if self.system.caps["KVM_CAP_PIT2"]:
            self._fd.call("KVM_CREATE_PIT2", struct.pack("<I60x", lib.KVM_PIT_SPEAKER_DUMMY))

    def create_vcpu(self, index: int) -> KernelVcpuFd:
        number = self._fd.call_value("KVM_CREATE_VCPU", index, detail=f"VCPU {index}")
        vcpu = KernelVcpuFd(self, Fd(number, self.system, index), index)
        if self._ring_seen_by is None and self.ring_page:
            self._ring_seen_by = vcpu.mapping
        return vcpu

    def set_memory(
        self, slot: int, address: int, memory: mmap.mmap, *, readonly: bool = False, log_dirty: bool = False
    ) -> None:
        flags = (lib.KVM_MEM_READONLY if readonly else 0) | (lib.KVM_MEM_LOG_DIRTY_PAGES if log_dirty else 0)
        old = self._slots.get(slot)
        if old is not None and old.memory is memory and old.address == address:
            new = old
        else:
            pages = len(memory) // PAGE_SIZE
            words = -(-pages // 64)
            view = ffi.from_buffer("char[]", memory, require_writable=True)
            new = _Slot(address, memory, 0, view, ffi.new("uint64_t[]", words), np.empty(pages, np.int64))
        if old is not None and (new is not old or (old.flags ^ flags) & lib.KVM_MEM_READONLY):
            # KVM changes nothing but the log flag of a slot that exists: it has to go first.
            self._region(slot, 0, address, 0, old.view)
            del self._slots[slot]
        self._region(slot, flags, address, len(memory), new.view)
        new.flags = flags
        self._slots[slot] = new

    def read(self, address: int, size: int) -> bytes:
        """Guest-physical memory, as far as it goes on from there in one slot."""
        return next((at.memory[start : start + size] for at, start in self._at(address)), b"")

    def write(self, address: int, data: bytes) -> None:
        """The other way round, on the guest's behalf: nothing where there is no memory, or it's read-only."""
        for at, start in self._at(address):
            if not at.flags & lib.KVM_MEM_READONLY:
                at.memory[start : start + len(data)] = data

    def _at(self, address: int) -> Iterator[tuple[_Slot, int]]:
        """The slot that holds this address, and where in it."""
        for at in self._slots.values():
            if at.address <= address < at.address + len(at.memory):
                yield at, address - at.address

    def _region(self, slot: int, flags: int, address: int, size: int, view: Any) -> None:
        raw = _REGION.pack(slot, flags, address, size, int(ffi.cast("uintptr_t", view)))
        detail = f"slot {slot}, {size:#x} bytes at {address:#x}"
        self._fd.call("KVM_SET_USER_MEMORY_REGION", raw, detail=detail)

    def dirty_pages(self, slot: int) -> NDArray[np.int64]:
        at = self._slots[slot]
        with self._lock:
            out = ffi.from_buffer("int64_t[]", at.numbers)
            count = lib.vd_dirty_pages(self._fd.number, slot, at.bitmap, len(at.bitmap), out)
            self._fd.checked("KVM_GET_DIRTY_LOG", count, f"slot {slot}")
            return at.numbers[:count].copy()

    def copy_pages(
        self,
        to: NDArray[np.uint8],
        to_pages: NDArray[np.int64],
        source: NDArray[np.uint8],
        source_pages: NDArray[np.int64],
    ) -> None:
        copy_pages(to, to_pages, source, source_pages)

    def go_back(self, slot: int, marks: Collection[int], source: NDArray[np.uint8], places: NDArray[np.int64]) -> int:
        at = self._slots[slot]
        assert len(places) == len(at.numbers)
        with self._lock:
            count = lib.vd_go_back(
                self._fd.number, slot, at.bitmap, len(places), list(marks) if marks else ffi.NULL, len(marks), at.view,
                ffi.from_buffer(source), ffi.from_buffer("int64_t[]", places), len(source),
            )  # fmt: skip
            return self._fd.checked("KVM_GET_DIRTY_LOG", count, f"slot {slot}")

    def memory_changed(self) -> None:
        """Nothing to do: KVM's page tables follow the host's, and it keeps no translated code."""

    def irq_line(self, gsi: int, level: bool) -> None:
        self._fd.checked("KVM_IRQ_LINE", lib.vd_irq_line(self._fd.number, gsi, level), f"GSI {gsi}")

    def nmi(self, vcpu: VcpuFd) -> None:
        assert isinstance(vcpu, KernelVcpuFd)
        vcpu.inject_nmi()

    def coalesce(self, port: int, size: int) -> bool:
        if not (self.ring_page and self.system.caps["KVM_CAP_COALESCED_PIO"]):
            return False
        self._fd.call("KVM_REGISTER_COALESCED_MMIO", _ZONE.pack(port, size, 1), detail=f"port {port:#x}")
        return True

    def drain(self, bus: Bus) -> None:
        # An entry leaves the ring only when the bus has had it: who finds the ring empty comes after all of it.
        with self._draining:
            if self._ring_seen_by is None or not (count := lib.vd_ring_copy(self._ring_seen_by, self._ring_copy)):
                return
            for address, length, is_port, data in _RING_ENTRY.iter_unpack(self._ring_view[: count * _RING_ENTRY.size]):
                write = bus.port_out if is_port else bus.mmio_write
                write(address, length, data & _MASK[length])
            lib.vd_ring_release(self._ring_seen_by, count)

    def get(self, rows: Sequence[Substate]) -> list[bytes]:
        with self._lock:
            return self._batches.get(rows)

    def put(self, rows: Sequence[Substate], raws: Sequence[bytes]) -> None:
        with self._lock:
            self._batches.put(rows, raws)

    def close(self) -> None:
        with self._draining:
            self._ring_seen_by = None
        self._fd.close()
        for slot in self._slots.values():
            ffi.release(slot.view)
        self._slots.clear()
