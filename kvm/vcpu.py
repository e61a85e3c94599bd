"""One VCPU: the worker thread that owns its fd, and the user copy of its state.

The thread sleeps on its mailbox while the VCPU is stopped and looks at it before every entry into the guest while
it runs. Work for it (``post``, ``run_on``) is a function put into that mailbox, with a kick if the guest is running.
"""

from __future__ import annotations

import ctypes
import functools
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, NoReturn, TypeVar

from kvm import sync
from kvm.backends.interface import Awaited, Batch, Bus, Exit, ExitKind, Sample, VcpuFd
from kvm.errors import MachineError, VmdeckError
from kvm.ledger import Ledger
from kvm.levels import WritebackLevel
from kvm.x86.structs import GUESTDBG_BLOCKIRQ, GUESTDBG_ENABLE, GUESTDBG_SINGLESTEP, SREGS_HEAD, GuestDebug, Regs, Sregs
from kvm.x86.substates import Table

T = TypeVar("T")

WAIT_LIMIT = 20.0
"""Seconds that a VCPU may take to answer. Kicks arrive within milliseconds: past this it hangs."""


class Activity(Enum):
    """What a VCPU is doing."""

    RUNNING = "running"
    HALTED = "halted"
    WAIT_SIPI = "wait-for-SIPI"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class VcpuView:
    """What is known of a VCPU at this moment, without synchronising anything.

    ``regs``, ``sregs`` and ``events`` are struct kvm_regs, kvm_sregs and kvm_vcpu_events; empty if nothing is known
    yet. ``time_ns`` is CLOCK_MONOTONIC. ``from_copy``: the values are the user copy's, so exact.
    """

    index: int
    regs: bytes
    sregs: bytes
    events: bytes
    sequence: int
    time_ns: int
    activity: Activity
    reason: str
    dirty: bool
    last_put: WritebackLevel | None
    from_copy: bool


class Reply(Generic[T]):
    """The answer to posted work."""

    def __init__(self, vcpu: int, awaited: Awaited | None, outcome: Callable[[], T] | None = None) -> None:
        """``awaited``: until then it can't be known; None if it's there. ``outcome``: what holds then, if that's known
        already."""
        self._vcpu = vcpu
        self._awaited = awaited
        self.holds = outcome

    def outcome(self, timeout: float = WAIT_LIMIT) -> Callable[[], T]:
        """Wait for it; what comes back returns the result or raises. MachineError after ``timeout`` seconds."""
        if self._awaited is not None and self._awaited.wait(timeout):
            self._awaited = None
        if self._awaited is not None or self.holds is None:
            raise MachineError(
                f"VCPU {self._vcpu} did not answer within {timeout:g} s. Its thread hangs in the kernel or the host is "
                f"overloaded; the other VCPUs are as they were. Try again, or end vmdeck."
            )
        return self.holds


def _sample(time_ns: int, regs: bytes, sregs: bytes, events: bytes) -> Sample:
    """``sregs``: a struct kvm_sregs or kvm_sregs2, whose segments and control registers lie in the same place."""
    return Sample(0, time_ns, regs, sregs[:SREGS_HEAD].ljust(ctypes.sizeof(Sregs), b"\0"), events)


def _result(value: T) -> Callable[[], T]:
    return lambda: value


def _raiser(error: BaseException) -> Callable[[], NoReturn]:
    def raise_it() -> NoReturn:
        raise error

    return raise_it


class Vcpu:
    """One VCPU. ``copy`` and ``dirty`` belong to whoever holds the machine's lock while the VCPU is stopped."""

    def __init__(
        self,
        fd: VcpuFd,
        table: Table,
        bus: Bus,
        ledger: Ledger,
        on_stop: Callable[[Vcpu, Exit | VmdeckError], None],
        step_control: int,
    ) -> None:
        self.index = fd.index
        self.fd = fd
        self.table = table
        self.copy: dict[str, bytes] = {row.name: row.template for row in table.put_order}
        """Every substate's bytes; the truth while ``dirty``, and always for the rows that KVM can't read back."""
        self.known: dict[str, bytes] = {name: self.copy[name] for name in table.ours}
        """What the kernel holds, as far as it is known: as fetched, or as last written. Valid as ``copy`` is."""
        self.dirty = False
        self.last_put: WritebackLevel | None = None
        self.stop_reason = ""
        self._bus = bus
        self._ledger = ledger
        self._on_stop = on_stop
        self._step_control = step_control
        self._settled: tuple[int, bytes, bytes, bytes] | None = None
        """What was given back last: when, REGS, SREGS, VCPU events."""
        self._runs = 0
        """How often it was let run on, counted by whoever holds the machine's lock."""
        self._stood = 0
        """Which of these runs was the last to end, by its thread's word. Two counts, each with one writer: an order to
        stop that is obeyed when one to run on has followed it already ends the run before."""
        self._resumed = False
        self._asked: tuple[int, bool, bool] | None = None
        """The last request for a sample: the newest one's number before it, did the VCPU wait at that one, and now?"""
        self._mailbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._bell = fd.bell()
        """Rung when there is mail for a VCPU that doesn't run; one that does is kicked."""
        self._thread = threading.Thread(target=self._work, name=f"vcpu{fd.index}", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Is it to run its guest? Any thread."""
        return self._stood < self._runs

    # Work for the thread

    def post(self, work: Callable[[], T]) -> Reply[T]:
        """Have the VCPU's thread do this, soon; doesn't wait. From any thread."""
        bell = self.fd.bell()
        reply: Reply[T] = Reply(self.index, bell)

        def job() -> None:
            try:
                reply.holds = _result(work())
            except BaseException as error:  # it belongs to whoever asked
                reply.holds = _raiser(error)
            bell.ring()

        self._mailbox.put(job)
        # In this order: either the thread, about to run the guest, sees the job, or we see that it runs. One that is to
        # run and still waits has been rung, and looks here first; a ring too many would cost it a turn of the GIL.
        if self.running:
            self.fd.kick()
        else:
            self._bell.ring()
        return reply

    def make(self, batch: Batch[T]) -> Reply[T]:
        """Have the VCPU's thread make these ioctls; doesn't wait. From any thread, the VCPU's own too."""
        if threading.get_ident() == self._thread.ident:
            batch.make()
            return Reply(self.index, None, batch.outcome)
        awaited = None if self.running else batch.hand(self._bell)
        if awaited is not None:
            return Reply(self.index, awaited, batch.outcome)

        def work() -> T:
            batch.make()
            return batch.outcome()

        return self.post(work)

    def run_on(self, work: Callable[[], T]) -> T:
        """Have the VCPU's thread do this and wait for the result. Raises what it raises, or MachineError."""
        if threading.get_ident() == self._thread.ident:
            return work()
        return self.post(work).outcome()()

    def resume(self) -> None:
        """Let the guest run: whoever holds the machine's lock. It counts as running from here on. Doesn't wait until it
        does: where VCPUs are more than cores, its thread gets its turn behind the guests of others."""
        self.stop_reason = ""
        self._resumed = True
        self._asked = None
        self._runs += 1
        self._bell.ring()

    def stop(self) -> Reply[int]:
        """Stop the guest, unless it is let run on meanwhile; the answer is when it stood, CLOCK_MONOTONIC ns."""
        return self.post(functools.partial(self._stop, self._runs))

    def step(self) -> Reply[Exit]:
        """Execute one instruction. The answer may not come while the VCPU is halted: see ``interrupt_step``."""
        return self.post(self._step)

    def interrupt_step(self) -> None:
        """Make a step that waits (in HLT, for a SIPI) end with KICKED."""
        self._mailbox.put(lambda: None)
        self.fd.kick()

    def close(self) -> None:
        """End the thread and close the fd. Raises MachineError if the thread doesn't end."""
        self.stop()
        self._mailbox.put(None)
        self._bell.ring()
        self._thread.join(WAIT_LIMIT)
        if self._thread.is_alive():
            raise MachineError(f"VCPU {self.index}'s thread did not end within {WAIT_LIMIT:g} s")
        self.fd.close()

    def _stop(self, run: int) -> int:
        self._stood = max(self._stood, run)
        return time.monotonic_ns()

    def _work(self) -> None:
        self.fd.bind()
        while True:
            if self.running:
                self.fd.clear_kick()  # before the look at the mailbox: a kick after it makes run() return at once
            if not self._mailbox.empty():
                self._bell.catch_up()
                job = self._mailbox.get()
                if job is None:
                    return
                job()
            elif self.running:
                self._run_guest()
            else:
                self._bell.wait()

    def _run_guest(self) -> None:
        try:
            if self._resumed:
                self.fd.kvmclock_ctrl()
                self._resumed = False
            sync.before_run(self, ledger=self._ledger)
            ended: Exit | VmdeckError = self.fd.run(self._bus)
        except VmdeckError as error:
            ended = error
        except Exception as error:  # a device's own fault: the thread must live on to say so
            where = traceback.extract_tb(error.__traceback__)[-1]
            ended = MachineError(
                f"VCPU {self.index}: a fault in vmdeck itself, {type(error).__name__}: {error} "
                f"({where.filename}:{where.lineno}). The machine stands; please report it."
            )
        if isinstance(ended, Exit) and ended.kind is ExitKind.KICKED:
            return
        self._on_stop(self, ended)
        self._stood = self._runs  # only now: who waits until it stands has heard of it too

    def _step(self) -> Exit:
        before = self.copy["guest_debug"]
        debug = GuestDebug.from_buffer_copy(before)
        debug.control |= self._step_control
        self.copy["guest_debug"] = bytes(debug)
        try:
            sync.before_run(self, ledger=self._ledger)
            self.fd.clear_kick()
            if not self._mailbox.empty():
                return Exit(ExitKind.KICKED)
            return self.fd.run(self._bus)
        finally:
            self.copy["guest_debug"] = before

    # The copy

    def take(self, fetched: Mapping[str, bytes]) -> None:
        """Fill the copy with what was fetched from the kernel."""
        self.copy.update(fetched)
        self.known.update(fetched)

    def ours_changed(self) -> bool:
        """Does a row that KVM can't read back differ from what the kernel was last given?"""
        return any(self.known.get(name) != self.copy[name] for name in self.table.ours)

    def pending(self) -> tuple[str, ...]:
        """What goes back to the kernel before the VCPU runs on, in put order. Any thread; a glance, not a promise."""
        return tuple(
            row.name
            for row in self.table.put_order
            if row.level is WritebackLevel.RUNTIME
            and (self.dirty or row.get is None)
            and self.known.get(row.name) != self.copy[row.name]
        )

    def gave_back(self, held: Mapping[str, bytes], level: WritebackLevel) -> None:
        """The kernel holds these rows of the copy now; it's also what there is to see until it runs on."""
        self.known.update(held)
        if self.dirty:
            self.last_put = level
            copy = self.copy
            self._settled = (time.monotonic_ns(), copy["regs"], copy["sregs"], copy.get("events", b""))

    def request_sample(self) -> None:
        """Ask the running VCPU for a sample, and note what it interrupts. Any thread; never blocks."""
        newest = self.fd.sample()
        before = newest.sequence if newest else 0
        self._asked = (before, self._waited(before), bool(self.fd.waiting()))
        self.fd.request_sample()

    def view(self) -> VcpuView:
        """What is known now. Any thread; never blocks."""
        if self.dirty:
            copy = self.copy
            sample: Sample | None = _sample(time.monotonic_ns(), copy["regs"], copy["sregs"], copy.get("events", b""))
            from_copy = True
        else:
            sample = self._newest()
            from_copy = False
        if sample is None:
            sample = Sample(0, 0, b"", b"", b"")
        return VcpuView(
            self.index, sample.regs, sample.sregs, sample.events, sample.sequence, sample.time_ns,
            self._activity(sample), self.stop_reason, self.dirty, self.last_put, from_copy,
        )  # fmt: skip

    def _newest(self) -> Sample | None:
        published, settled = self.fd.sample(), self._settled
        if settled is None or (published is not None and published.time_ns > settled[0]):
            return published
        return _sample(*settled)

    def _activity(self, sample: Sample) -> Activity:
        if not self.running:
            return Activity.STOPPED
        if not self._waited(sample.sequence):
            return Activity.RUNNING
        if self.index and sample.regs:
            # Only INIT leaves a VCPU at the reset vector, and only a waiting one stays there.
            rip = Regs.from_buffer_copy(sample.regs).rip
            if rip == 0xFFF0 and Sregs.from_buffer_copy(sample.sregs).cs.base == 0xFFFF0000:
                return Activity.WAIT_SIPI
        return Activity.HALTED

    def _waited(self, sequence: int) -> bool:
        """Did the VCPU wait when this sample was taken? What it does now may not go with the registers shown."""
        if self._asked is None:
            return bool(self.fd.waiting())
        before, waited_before, waits = self._asked
        return waits if sequence > before else waited_before


def step_control(guest_debug2: int) -> int:
    """GUESTDBG_* bits for a single step, given KVM_CAP_SET_GUEST_DEBUG2's value (the bits that the kernel knows).

    BLOCKIRQ where it exists: a step should not land in the timer's handler.
    """
    return GUESTDBG_ENABLE | GUESTDBG_SINGLESTEP | (GUESTDBG_BLOCKIRQ & guest_debug2)
