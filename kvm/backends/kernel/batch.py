"""Moving a list of substates in one call, or in none: by the thread that waits at a bell, which needs no GIL for it.

The substates lie packed in one buffer; the C side makes an ioctl a row on its place in it. What can be prepared
for a list of rows is prepared once: the same few lists come again and again.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from kvm.backends.interface import Bell
from kvm.backends.kernel.bell import FutexBell
from kvm.backends.kernel.fd import Fd
from kvm.backends.kernel.library import ffi, lib
from kvm.errors import SubstateError
from kvm.x86.structs import MSR_ENTRY
from kvm.x86.substates import Substate

T = TypeVar("T")

_ENTRY_BYTES = {"KVM_GET_MSRS": 16, "KVM_SET_MSRS": 16, "KVM_SET_CPUID2": 40}
"""Structs that are a u32 count, padded to 8 bytes, and that many entries."""

_ATTRIBUTE = frozenset({"KVM_GET_DEVICE_ATTR", "KVM_SET_DEVICE_ATTR"})
_EXTENDED = frozenset({"KVM_SET_XSAVE"})
"""A shorter one (saved where the state has fewer components) is filled up with zeros: those are in their init state."""


class _Plan:
    """The calls that get, or put, these rows with buffers of these sizes."""

    def __init__(self, rows: Sequence[Substate], sizes: list[int], *, put: bool, buffer: bytes = b"") -> None:
        self.rows = tuple(rows)
        self.sizes = sizes
        self.names = [_name(row, row.put if put else row.get) for row in rows]
        ends = list(itertools.accumulate(sizes))
        self.slices = list(zip([0, *ends], ends, strict=False))
        self.heads = [
            (place, buffer[start : start + 8])
            for place, (start, _) in enumerate(self.slices)
            if self.names[place] in _ENTRY_BYTES
        ]
        """Structs that a put has found to be as long as their counts say: their places, and the counts."""
        self.calls = ffi.new("struct vd_call[]", len(rows))
        for call, row, name, (start, _) in zip(self.calls, rows, self.names, self.slices, strict=True):
            call.request = getattr(lib, name)
            call.offset = start
            call.flags = (
                (row.by_value and (lib.VD_TAKES_VALUE if put else lib.VD_GIVES_VALUE))
                | (row.counted and lib.VD_COUNTED)
                | (name in _ATTRIBUTE and lib.VD_TSC_OFFSET)
                | (put and row.tolerated and lib.VD_TOLERATED)
            )
        self.tolerated = [place for place, row in enumerate(rows) if put and row.tolerated]
        self.templates = b"" if put else b"".join(row.template for row in rows)
        self.buffer = ffi.new("char[]", max(8, ends[-1] if ends else 0))
        self.view = ffi.buffer(self.buffer)


class KernelBatch(Generic[T]):
    """See ``interface.Batch``."""

    def __init__(self, fd: Fd, plan: _Plan, buffer: Any, finish: Callable[[KernelBatch[T]], T]) -> None:
        self.plan = plan
        self.buffer = buffer
        self.job = job = ffi.new("struct vd_job *")
        job.fd = fd.number
        job.count = len(plan.rows)
        job.buffer = buffer
        job.calls = plan.calls
        self._finish = finish
        self.written: Callable[[], None] = _nothing
        """Called by ``outcome`` where all has gone well."""

    def make(self) -> None:
        lib.vd_make(self.job)

    def hand(self, bell: Bell) -> FutexBell | None:
        assert isinstance(bell, FutexBell)
        return FutexBell(ffi.addressof(self.job.answer)) if bell.hand(self) else None

    def outcome(self) -> T:
        return self._finish(self)

    @property
    def began_ns(self) -> int:
        return self.job.began_ns  # type: ignore[no-any-return]

    @property
    def microseconds(self) -> float:
        return (self.job.ended_ns - self.job.began_ns) / 1000  # type: ignore[no-any-return]


class Batches:
    """Gets and puts on one fd. For one thread at a time."""

    def __init__(self, fd: Fd) -> None:
        self._fd = fd
        self._gets: dict[tuple[int, ...], _Plan] = {}
        self._puts: dict[tuple[int, ...], _Plan] = {}

    def getting(self, rows: Sequence[Substate]) -> KernelBatch[list[bytes]]:
        """Reads the rows; its outcome is their bytes, in their order. Until it's made there must be no other get."""
        key = tuple(map(id, rows))  # a plan holds its rows, so that an id stays theirs
        plan = self._gets.get(key)
        if plan is None:
            plan = self._gets[key] = _Plan(rows, [len(row.template) for row in rows], put=False)
        ffi.memmove(plan.buffer, plan.templates, len(plan.templates))
        return KernelBatch(self._fd, plan, plan.buffer, self._got)

    def putting(self, rows: Sequence[tuple[Substate, bytes]]) -> KernelBatch[tuple[SubstateError, ...]]:
        """Writes the rows in their order; its outcome is the failures that were tolerated.

        Raises SubstateError for a struct of the wrong size: none is written then.
        """
        key = tuple([id(row) for row, _ in rows])
        plan = self._puts.get(key)
        sizes = [len(raw) for _, raw in rows]
        # The usual case at a glance: all is as it was when this plan was made.
        if plan is not None and sizes == plan.sizes and all(rows[place][1][:8] == head for place, head in plan.heads):
            buffer = b"".join([raw for _, raw in rows])
        elif all(self._fits(row, raw) for row, raw in rows):
            buffer = b"".join([raw for _, raw in rows])
            plan = self._puts[key] = _Plan([row for row, _ in rows], sizes, put=True, buffer=buffer)
        else:
            filled = [raw.ljust(len(row.template), b"\0") for row, raw in rows]
            plan = _Plan([row for row, _ in rows], [len(raw) for raw in filled], put=True)
            buffer = b"".join(filled)
        return KernelBatch(self._fd, plan, ffi.from_buffer(buffer), self._put)

    def get(self, rows: Sequence[Substate]) -> list[bytes]:
        """The rows' bytes, in their order. Raises SubstateError."""
        batch = self.getting(rows)
        batch.make()
        return batch.outcome()

    def put(self, rows: Sequence[tuple[Substate, bytes]]) -> tuple[SubstateError, ...]:
        """Write the rows in their order; the failures that were tolerated.

        Raises SubstateError, for a struct of the wrong size before any is written.
        """
        batch = self.putting(rows)
        batch.make()
        return batch.outcome()

    def _got(self, batch: KernelBatch[list[bytes]]) -> list[bytes]:
        self._check(batch)
        view = batch.plan.view
        return [view[start:end] for start, end in batch.plan.slices]

    def _put(self, batch: KernelBatch[tuple[SubstateError, ...]]) -> tuple[SubstateError, ...]:
        self._check(batch)
        batch.written()
        return self._tolerated(batch.plan, batch.job.done, ffi.buffer(batch.buffer)) if batch.plan.tolerated else ()

    def _check(self, batch: KernelBatch[Any]) -> None:
        job, plan = batch.job, batch.plan
        if self._fd.traced or job.done < job.count:
            self._after(plan, job.done, ffi.buffer(batch.buffer), job.thread)

    def _fits(self, row: Substate, raw: bytes) -> bool:
        """Is this struct as long as the row's template? Raises SubstateError if the kernel would read past its end."""
        ioctl = _name(row, row.put)
        same = len(raw) == len(row.template)
        if entry := _ENTRY_BYTES.get(ioctl):
            whole = len(raw) >= 8 and 8 + entry * int.from_bytes(raw[:4], "little") <= len(raw)
        else:
            whole = same or (ioctl in _EXTENDED and len(raw) < len(row.template))
        if not whole:
            detail = f"{len(raw)} bytes are not the struct's size"
            raise SubstateError(row.name, 0, ioctl, errno.EINVAL, vcpu=self._fd.vcpu, detail=detail)
        return same

    def _after(self, plan: _Plan, done: int, buffer: Any, thread: int) -> None:
        for row, name in zip(plan.rows[: done + 1], plan.names, strict=False):
            self._fd.note(name, row.name, thread)
        if done < len(plan.rows):
            error = self._failure(plan, done, buffer)
            error.tolerated = self._tolerated(plan, done, buffer)
            raise error

    def _tolerated(self, plan: _Plan, done: int, buffer: Any) -> tuple[SubstateError, ...]:
        made = [place for place in plan.tolerated if place < done]
        return tuple(self._failure(plan, place, buffer) for place in made if _failed(plan, place, buffer))

    def _failure(self, plan: _Plan, place: int, buffer: Any) -> SubstateError:
        row, number, detail = plan.rows[place], plan.calls[place].error, ""
        if row.counted and not number:
            number, detail = errno.EINVAL, _refused_msr(buffer, plan, place)
        return SubstateError(row.name, place, plan.names[place], number, vcpu=self._fd.vcpu, detail=detail)


def _nothing() -> None:
    pass


def _failed(plan: _Plan, row: int, buffer: Any) -> bool:
    call = plan.calls[row]
    return bool(call.error or (plan.rows[row].counted and call.result < _listed(plan, row, buffer)))


def _listed(plan: _Plan, row: int, buffer: Any) -> int:
    start = plan.slices[row][0]
    return int.from_bytes(buffer[start : start + 4], "little")


def _refused_msr(buffer: Any, plan: _Plan, row: int) -> str:
    """KVM stops at the first MSR that it refuses, and tells only how many came before it."""
    start, moved = plan.slices[row][0], plan.calls[row].result
    listed = _listed(plan, row, buffer)
    index, value = MSR_ENTRY.unpack_from(buffer, start + 8 + MSR_ENTRY.size * moved)
    wanted = f" = {value:#x}" if plan.names[row] == "KVM_SET_MSRS" else ""
    return f"MSR {index:#x}{wanted} refused, {moved} of {listed} moved"


def _name(row: Substate, ioctl: str | None) -> str:
    assert ioctl is not None, f"KVM has no such ioctl for {row.name}"
    return ioctl
