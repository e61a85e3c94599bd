"""A VCPU's file descriptor and the run loop's Python half, which serves its port I/O and MMIO."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import struct
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvm.backends.interface import Bus, Exit, ExitKind, Sample
from kvm.backends.kernel import stats
from kvm.backends.kernel.batch import Batches, KernelBatch
from kvm.backends.kernel.bell import FutexBell
from kvm.backends.kernel.exits import UNION, decode
from kvm.backends.kernel.fd import Fd
from kvm.backends.kernel.library import ffi, lib
from kvm.backends.kernel.stepping import Step
from kvm.errors import KvmError, SubstateError
from kvm.x86.structs import GUESTDBG_SINGLESTEP, GuestDebug
from kvm.x86.substates import Substate

if TYPE_CHECKING:
    from kvm.backends.kernel.vm import KernelVm

_IO = struct.Struct("<BBHIQ")  # kvm_run.io: direction, size, port, count, data_offset
_MMIO = struct.Struct("<QQIB")  # kvm_run.mmio: phys_addr, data, len, is_write
_UNPACK = {size: struct.Struct(code).unpack_from for size, code in ((1, "<B"), (2, "<H"), (4, "<I"))}
_MASK = {size: (1 << 8 * size) - 1 for size in (1, 2, 4, 8)}
_MMIO_DATA = UNION + 8

_EXIT_IO, _EXIT_MMIO = 2, 6  # KVM_EXIT_*: ABI; constants, as the loop below looks at them for every exit

_REGS = slice(16, 160)  # struct vd_sample: sequence, time, regs, sregs, events
_SREGS = slice(160, 472)
_EVENTS = slice(472, 536)


class KernelVcpuFd:
    """One VCPU of a :class:`~kvm.backends.kernel.vm.KernelVm`; see ``interface.VcpuFd``."""

    def __init__(self, vm: KernelVm, fd: Fd, index: int) -> None:
        """Takes ``fd`` over, and closes it if this fails."""
        self.index = index
        self._vm = vm
        self._fd = fd
        self._batches = Batches(fd)
        self._owner: int | None = None
        self._debug = GuestDebug()
        """What KVM was told last."""
        self._stats: Fd | None = None
        self._blocking: int | None = None
        self._closing = threading.Lock()
        """Keeps ``waiting`` on another thread from reading an fd that was closed, and perhaps given away, meanwhile."""
        self.mapping: Any = None
        """The shim's struct vd_vcpu, with kvm_run's pages. Unmapped with its last reference: a kick on another thread
        may still hold one while we close."""
        try:
            self.mapping = self._map()
            self._open_stats()
        except BaseException:
            self.close()
            raise

    def _map(self) -> Any:
        caps = self._vm.system.caps
        every = lib.KVM_SYNC_X86_VALID_FIELDS
        vcpu = lib.vd_vcpu_open(
            self._fd.number, self._vm.system.mmap_size, caps["KVM_CAP_SYNC_REGS"] & every == every, self._vm.ring_page
        )
        if vcpu == ffi.NULL:
            raise KvmError("KVM_CREATE_VCPU", ffi.errno, vcpu=self.index, detail="mapping kvm_run")
        return ffi.gc(vcpu, lib.vd_vcpu_close)

    def _open_stats(self) -> None:
        if self._vm.system.caps["KVM_CAP_BINARY_STATS_FD"]:
            self._stats = Fd(self._fd.call("KVM_GET_STATS_FD"), self._vm.system, self.index)
            self._blocking = stats.find(self._stats.number, "blocking")

    # The owner's

    def bind(self) -> None:
        self._owner = threading.get_ident()
        lib.vd_bind(self.mapping)

    def get(self, rows: Sequence[Substate]) -> list[bytes]:
        self._check_owner()
        return self._batches.get(rows)

    def put(self, rows: Sequence[Substate], raws: Sequence[bytes]) -> tuple[SubstateError, ...]:
        self._check_owner()
        batch = self.putting(tuple(rows), raws)
        batch.make()
        return batch.outcome()

    def inject_nmi(self) -> None:
        """Queue an NMI (KVM_NMI). Raises KvmError."""
        self._check_owner()
        self._fd.call("KVM_NMI")

    def kvmclock_ctrl(self) -> None:
        self._check_owner()
        if self._vm.system.caps["KVM_CAP_KVMCLOCK_CTRL"]:
            try:
                self._fd.call("KVM_KVMCLOCK_CTRL")
            except KvmError as error:
                if error.errno != errno.EINVAL:  # EINVAL: the guest hasn't enabled kvmclock
                    raise

    def run(self, bus: Bus) -> Exit:
        self._check_owner()
        if self._owner is None:
            self.bind()
        return self._step(bus) if self._debug.control & GUESTDBG_SINGLESTEP else self._run(bus)

    def _step(self, bus: Bus) -> Exit:
        step = Step(self._fd, self._vm, self._debug)
        if name := step.made():
            lib.vd_publish_anew(self.mapping)
            return Exit(ExitKind.DEBUG, detail=f"stepped over {name}")
        with self._vm.user_steps if step.cpl == 3 else contextlib.nullcontext():
            step.begin()
            try:
                ended = self._run(bus, stepping=True)
            finally:
                taken_back = step.end()
        if taken_back:
            lib.vd_publish_anew(self.mapping)
            return Exit(ExitKind.DEBUG, detail="stepped at CPL 3")
        return ended

    def _run(self, bus: Bus, *, stepping: bool = False) -> Exit:
        vcpu, system = self.mapping, self._vm.system
        page = ffi.buffer(lib.vd_vcpu_page(vcpu), system.mmap_size)
        vd_run, unpack_io, port_out = lib.vd_run, _IO.unpack_from, bus.port_out
        stepped = False
        while True:
            reason = vd_run(vcpu)
            if system.trace is not None:
                self._fd.note("KVM_RUN")
            if reason > 0 and reason & lib.VD_RING_WAITS:
                # What this VCPU wrote before this exit comes before it.
                self._vm.drain(bus)
                reason &= ~lib.VD_RING_WAITS
            if stepping and reason in (_EXIT_IO, _EXIT_MMIO):
                # KVM forgets the step over an instruction that exits (x86.c: "FIXME: return into emulator if
                # single-stepping"): our own kick completes the instruction and ends the run behind it.
                stepped = True
                lib.vd_kick(vcpu)
            if reason == _EXIT_IO:
                direction, size, port, count, offset = unpack_io(page, UNION)
                if direction and count == 1:  # by far the most frequent
                    port_out(port, size, _UNPACK[size](page, offset)[0])
                else:
                    _serve_io(page, bus)
            elif reason == _EXIT_MMIO:
                _serve_mmio(page, bus)
            elif reason == lib.VD_KICKED:
                return Exit(ExitKind.DEBUG, detail="stepped over I/O") if stepped else Exit(ExitKind.KICKED)
            elif reason < 0:
                raise KvmError("KVM_RUN", -reason, vcpu=self.index)
            else:
                # Decoded first: the KVM_RUN that may be needed to fetch the registers writes into the page.
                ended = decode(reason, page)
                lib.vd_publish(vcpu)
                return ended

    def clear_kick(self) -> None:
        lib.vd_clear_kick(self.mapping)

    # Anybody's

    def getting(self, rows: tuple[Substate, ...]) -> KernelBatch[list[bytes]]:
        return self._batches.getting(rows)

    def putting(self, rows: tuple[Substate, ...], raws: Sequence[bytes]) -> KernelBatch[tuple[SubstateError, ...]]:
        batch = self._batches.putting(rows, raws)
        if rows and rows[-1].put == "KVM_SET_GUEST_DEBUG":  # always the last one
            batch.written = functools.partial(self._debug_written, GuestDebug.from_buffer_copy(raws[-1]))
        return batch

    def _debug_written(self, debug: GuestDebug) -> None:
        self._debug = debug

    def bell(self) -> FutexBell:
        return FutexBell()

    def kick(self) -> None:
        if (vcpu := self.mapping) is not None:
            lib.vd_kick(vcpu)

    def request_sample(self) -> None:
        if (vcpu := self.mapping) is not None:
            lib.vd_request_sample(vcpu)

    def sample(self) -> Sample | None:
        copy = ffi.new("struct vd_sample *")
        if (vcpu := self.mapping) is None or not lib.vd_sample(vcpu, copy):
            return None
        raw = ffi.buffer(copy)
        return Sample(copy.sequence, copy.time_ns, raw[_REGS], raw[_SREGS], raw[_EVENTS])

    def waiting(self) -> bool | None:
        with self._closing:
            if self._stats is None or self._blocking is None:
                return None
            return any(os.pread(self._stats.number, 8, self._blocking))

    def close(self) -> None:
        with self._closing:
            opened, self._stats = self._stats, None
            if opened:
                opened.close()
            self.mapping = None
            self._fd.close()

    def _check_owner(self) -> None:
        if self._owner is not None and self._owner != threading.get_ident():
            raise AssertionError(
                f"VCPU {self.index} belongs to thread {self._owner}, not to {threading.get_ident()} "
                f"({threading.current_thread().name})"
            )


def _serve_io(page: Any, bus: Bus) -> None:
    """A string instruction comes as ``count`` pieces of ``size`` bytes."""
    direction, size, port, count, offset = _IO.unpack_from(page, UNION)
    for place in range(offset, offset + size * count, size):
        if direction:
            bus.port_out(port, size, _UNPACK[size](page, place)[0])
        else:
            page[place : place + size] = (bus.port_in(port, size) & _MASK[size]).to_bytes(size, "little")


def _serve_mmio(page: Any, bus: Bus) -> None:
    """Pieces of an access that crosses a page have odd sizes: those go byte by byte."""
    address, data, length, is_write = _MMIO.unpack_from(page, UNION)
    step = length if length in _MASK else 1
    mask = _MASK[step]
    value = 0
    for done in range(0, length, step):
        if is_write:
            bus.mmio_write(address + done, step, data >> 8 * done & mask)
        else:
            value |= (bus.mmio_read(address + done, step) & mask) << 8 * done
    if not is_write:
        page[_MMIO_DATA : _MMIO_DATA + length] = value.to_bytes(length, "little")
