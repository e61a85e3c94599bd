"""Moving a list of substates in one call, or in none: by the thread that waits at a bell, which needs no GIL for it.

The substates lie packed in one buffer; the C side makes an ioctl a row on its place in it. What can be prepared
for a list of rows is prepared once: the same few lists come again and again.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from kvm.backends.interface import Awaited, Bell
from kvm.backends.kernel.bell import FutexBell, wait
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


class KernelBatch(Generic[T]):
    """See ``interface.Batch``. Made for its rows again and again, one time after the other: ``free`` in between."""

    def __init__(
        self,
        fd: Fd,
        rows: Sequence[Substate],
        raws: Sequence[bytes],
        finish: Callable[[KernelBatch[T]], T],
        *,
        put: bool,
    ) -> None:
        """``raws``: what the buffer holds at first; their sizes stay."""
        self.rows = tuple(rows)
        self.names = [_name(row, row.put if put else row.get) for row in rows]
        ends = list(itertools.accumulate(map(len, raws)))
        self.slices = list(zip([0, *ends], ends, strict=False))
        self.held = list(raws)
        """What a put's buffer holds: it's written there again where it's another object."""
        self._taken: Sequence[bytes] = ()
        self.entries = frozenset(place for place, name in enumerate(self.names) if name in _ENTRY_BYTES)
        """Structs that a put has found to be as long as the counts in their first 8 bytes say."""
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
        self.joined = b"".join(raws)
        self.buffer = ffi.new("char[]", max(8, len(self.joined)))
        self.view = ffi.buffer(self.buffer)
        where = {"fd": fd.number, "count": len(rows), "buffer": self.buffer, "calls": self.calls}
        self.job = ffi.new("struct vd_job *", where)
        self.answer = ffi.addressof(self.job.answer)
        self._finish = finish
        self.free = True
        """Can it be made ready again? Not while it may be under way still: who waited for it may have given up."""
        self.written: Callable[[], None] = _nothing
        """Called by ``outcome`` where all has gone well."""
        self.fill()

    def fill(self) -> None:
        """What the buffer held at first."""
        ffi.memmove(self.buffer, self.joined, len(self.joined))

    def take(self, raws: Sequence[bytes]) -> bool:
        """Put these into the buffer; False, and nothing is to be made of it, if one isn't as long as the one there."""
        if raws is self._taken:
            return True
        self._taken = ()
        for place, (raw, before) in enumerate(zip(raws, self.held, strict=True)):
            if raw is not before:
                if len(raw) != len(before) or (place in self.entries and raw[:8] != before[:8]):
                    return False
                start, end = self.slices[place]
                self.view[start:end] = raw
                self.held[place] = raw
        self._taken = raws
        return True

    def ready(self) -> KernelBatch[T]:
        """It's to be made once more."""
        self.free = False
        self.answer.state = 0
        return self

    def make(self) -> None:
        lib.vd_make(self.job)

    def hand(self, bell: Bell) -> Awaited | None:
        assert isinstance(bell, FutexBell)
        return self if bell.hand(self) else None

    def wait(self, timeout: float | None = None) -> bool:
        # Rung already: a turn of the interpreter less.
        return self.answer.state == lib.VD_RUNG or wait(self.answer, timeout)

    def outcome(self) -> T:
        self.free = True
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
        self._gets: dict[tuple[Substate, ...], KernelBatch[list[bytes]]] = {}
        self._puts: dict[tuple[Substate, ...], KernelBatch[tuple[SubstateError, ...]]] = {}

    def getting(self, rows: tuple[Substate, ...]) -> KernelBatch[list[bytes]]:
        """Reads the rows; its outcome is their bytes, in their order."""
        batch = self._gets.get(rows)
        if batch is None or not batch.free:
            batch = KernelBatch(self._fd, rows, [row.template for row in rows], self._got, put=False)
            self._gets[rows] = batch
        batch.fill()
        return batch.ready()

    def putting(self, rows: tuple[Substate, ...], raws: Sequence[bytes]) -> KernelBatch[tuple[SubstateError, ...]]:
        """Writes the rows in their order; its outcome is the failures that were tolerated.

        Raises SubstateError for a struct of the wrong size: none is written then.
        """
        batch = self._puts.get(rows)
        if batch is None or not batch.free or not batch.take(raws):
            fits = [self._fits(row, raw) for row, raw in zip(rows, raws, strict=True)]
            if not all(fits):
                raws = [raw.ljust(len(row.template), b"\0") for row, raw in zip(rows, raws, strict=True)]
            batch = self._puts[rows] = KernelBatch(self._fd, rows, raws, self._put, put=True)
        return batch.ready()

    def get(self, rows: Sequence[Substate]) -> list[bytes]:
        """The rows' bytes, in their order. Raises SubstateError."""
        batch = self.getting(tuple(rows))
        batch.make()
        return batch.outcome()

    def put(self, rows: Sequence[Substate], raws: Sequence[bytes]) -> tuple[SubstateError, ...]:
        """Write the rows in their order; the failures that were tolerated.

        Raises SubstateError, for a struct of the wrong size before any is written.
        """
        batch = self.putting(tuple(rows), raws)
        batch.make()
        return batch.outcome()

    def _got(self, batch: KernelBatch[list[bytes]]) -> list[bytes]:
        self._check(batch)
        view = batch.view
        return [view[start:end] for start, end in batch.slices]

    def _put(self, batch: KernelBatch[tuple[SubstateError, ...]]) -> tuple[SubstateError, ...]:
        self._check(batch)
        batch.written()
        return self._tolerated(batch) if batch.tolerated else ()

    def _check(self, batch: KernelBatch[Any]) -> None:
        """Trace it; raise what ended it half-way."""
        done = batch.job.done
        if self._fd.traced:
            for row, name in zip(batch.rows[: done + 1], batch.names, strict=False):
                self._fd.note(name, row.name, batch.job.thread)
        if done < len(batch.rows):
            error = self._failure(batch, done)
            error.tolerated = self._tolerated(batch)
            raise error

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

    def _tolerated(self, batch: KernelBatch[Any]) -> tuple[SubstateError, ...]:
        made = [place for place in batch.tolerated if place < batch.job.done]
        return tuple(self._failure(batch, place) for place in made if _failed(batch, place))

    def _failure(self, batch: KernelBatch[Any], place: int) -> SubstateError:
        row, number, detail = batch.rows[place], batch.calls[place].error, ""
        if row.counted and not number:
            number, detail = errno.EINVAL, _refused_msr(batch, place)
        return SubstateError(row.name, place, batch.names[place], number, vcpu=self._fd.vcpu, detail=detail)


def _nothing() -> None:
    pass


def _failed(batch: KernelBatch[Any], row: int) -> bool:
    call = batch.calls[row]
    return bool(call.error or (batch.rows[row].counted and call.result < _listed(batch, row)))


def _listed(batch: KernelBatch[Any], row: int) -> int:
    start = batch.slices[row][0]
    return int.from_bytes(batch.view[start : start + 4], "little")


def _refused_msr(batch: KernelBatch[Any], row: int) -> str:
    """KVM stops at the first MSR that it refuses, and tells only how many came before it."""
    start, moved = batch.slices[row][0], batch.calls[row].result
    listed = _listed(batch, row)
    index, value = MSR_ENTRY.unpack_from(batch.view, start + 8 + MSR_ENTRY.size * moved)
    wanted = f" = {value:#x}" if batch.names[row] == "KVM_SET_MSRS" else ""
    return f"MSR {index:#x}{wanted} refused, {moved} of {listed} moved"


def _name(row: Substate, ioctl: str | None) -> str:
    assert ioctl is not None, f"KVM has no such ioctl for {row.name}"
    return ioctl
