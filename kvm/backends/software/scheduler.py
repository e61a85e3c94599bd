"""Who runs when: one VCPU at a time, and virtual time.

All VCPU threads that are inside ``run`` wait here but one, the leader, which executes slices for all of them: that
spares a switch of threads a slice. Virtual time is what instructions took (10 ns each, and a charge for what leaves
the emulator), so it depends on the guest alone. Time is divided into slots of one slice each, and the number of the
slot says whose turn it is among the VCPUs that can run. So the order is a function of virtual time and the VCPUs'
states: it survives pausing, and a copy of the machine goes on just as the original. Whose turn it is but who isn't
inside ``run`` is waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from kvm.backends.interface import Exit, ExitKind

if TYPE_CHECKING:
    from kvm.backends.software.vcpu import SoftwareVcpu

INSTRUCTION_NS = 10
"""Virtual time of one instruction."""
OUTSIDE_NS = 1000
"""Charged for port I/O, MMIO and instructions that leave the emulator, about what they cost on KVM: so that loops which
poll the time through them end. Never past the end of a slot, for fairness."""
LONGEST = 100_000
"""Instructions at a time where no other VCPU and no interrupt waits: what a lost race against a kick may cost."""
_NEVER = 1 << 63


class Timer(Protocol):
    """``due`` is virtual time; at or after it ``tick`` is called once, which moves it on."""

    due: int | None

    def tick(self, now: int) -> None: ...


class Scheduler:
    """``changed`` is the VM's one lock: held by whoever touches VCPUs, APICs or timers, never while the guest runs."""

    def __init__(self, slice_instructions: int) -> None:
        self.changed = threading.Condition(threading.Lock())
        self.vcpus: list[SoftwareVcpu] = []
        self._slot = slice_instructions * INSTRUCTION_NS
        self._time = 0
        self._limit = 0
        self._charge = 0
        self._running: SoftwareVcpu | None = None
        self._leader: SoftwareVcpu | None = None
        self._alone = False
        self._wanted: set[object] = set()
        self._timers: list[Timer] = []
        self._idled = 0.0
        self._due: int | None = None
        self._due_known = False

    # Time

    def now(self) -> int:
        """Virtual time, ns."""
        vcpu = self._running
        if vcpu is None:
            return self._time
        return min(self._time + vcpu.engine.count * INSTRUCTION_NS + self._charge, self._limit)

    def set_time(self, now: int) -> None:
        """KVM_SET_CLOCK."""
        self._time = now
        self._due_known = False

    def charge(self) -> None:
        """The running VCPU has left the emulator."""
        self._charge += OUTSIDE_NS
        if self._running is not None:
            # Off the budget too, so that a slice ends at the same instruction whether or not a kick divides it.
            self._running.engine.spend(OUTSIDE_NS // INSTRUCTION_NS)

    def give_way(self) -> None:
        """The VCPU in hand spins: let the next one run, or some time pass."""
        self._charge += OUTSIDE_NS if self._alone else self._slot

    def timers_changed(self) -> None:
        """Some timer's ``due`` has moved."""
        self._due_known = False
        self.cut()

    def cut(self) -> None:
        """End the current slice soon: something has changed that may matter to it."""
        if self._running is not None:
            self._running.engine.cut()

    # Access from outside

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Hold the lock, for those who are not the leader; it lets them in before its next slice."""
        token = object()
        self._wanted.add(token)
        with self.changed:
            self._wanted.discard(token)
            try:
                yield
            finally:
                self.changed.notify_all()

    def kick(self, vcpu: SoftwareVcpu) -> None:
        """After ``vcpu.kicked`` was set: see to it that it's noticed."""
        if self._running is vcpu:
            vcpu.engine.cut()
        with self.attention():
            pass

    # The loop

    def run(self, vcpu: SoftwareVcpu) -> Exit:
        """Be inside ``run`` until there is an exit for this VCPU, or it's kicked."""
        with self.changed:
            vcpu.inside = True
            self.changed.notify_all()
            try:
                while True:
                    mine = self._running is not vcpu  # else the leader has it in hand just now
                    if mine and vcpu.exit is not None:
                        return vcpu.exit
                    if mine and vcpu.kicked:
                        return Exit(ExitKind.KICKED)
                    if self._leader is None:
                        self._lead(vcpu)
                    else:
                        self.changed.wait()
            finally:
                vcpu.exit = None
                vcpu.inside = False
                vcpu.publish()
                self.changed.notify_all()

    def _lead(self, me: SoftwareVcpu) -> None:
        self._leader = me
        try:
            while me.exit is None and not me.kicked:
                while self._wanted or any(vcpu.leaving for vcpu in self.vcpus if vcpu is not me):
                    self.changed.notify_all()
                    self.changed.wait()
                if not me.kicked:
                    self._turn()
        finally:
            self._leader = None
            self.changed.notify_all()

    def _turn(self) -> None:
        """One slice of whoever's turn it is, or a wait."""
        for vcpu in self.vcpus:
            if vcpu.sample_wanted and vcpu.inside:
                vcpu.publish()
        active: Sequence[SoftwareVcpu] = [vcpu for vcpu in self.vcpus if vcpu.inside and vcpu.stepping and vcpu.ready()]
        if not active:
            active = [vcpu for vcpu in self.vcpus if vcpu.ready()]
        if not active:
            self._idle()
            return
        slot = self._time // self._slot
        vcpu = active[slot % len(active)]
        if not vcpu.inside or vcpu.leaving:
            self.changed.wait()
            return
        self._idled = 0.0
        if vcpu.prepare(slot):
            self._slice(vcpu, alone=len(active) == 1)

    def _slice(self, vcpu: SoftwareVcpu, *, alone: bool) -> None:
        ends = [(self._time // self._slot + 1) * self._slot] if vcpu.window or not alone else []
        due = self._next_due()
        if due is not None:
            ends.append(due)
        end = min(ends, default=self._time + LONGEST * INSTRUCTION_NS)
        budget = min(max(1, -(-(end - self._time) // INSTRUCTION_NS)), LONGEST, vcpu.most)
        # Charges are cut off where somebody else's time begins, and nowhere else.
        self._limit = max(end, self._time + budget * INSTRUCTION_NS) if ends else _NEVER
        self._alone = alone
        self._charge = 0
        self._running = vcpu
        if vcpu.kicked:  # set before this slice could be cut
            self._running = None
            return
        self.changed.release()
        try:
            event, begun = vcpu.engine.run(budget)
        finally:
            self.changed.acquire()
            self._running = None
        self._account(begun * INSTRUCTION_NS)
        vcpu.finish(event, begun)
        self._account(0)
        self._fire_timers()  # now, so that nobody sees a state in which one is overdue

    def _account(self, spent: int) -> None:
        self._time = min(self._time + spent + self._charge, self._limit)
        self._charge = 0

    def _idle(self) -> None:
        """Everybody waits: sleep until the next timer, in real time, and let virtual time jump there."""
        due = self._next_due()
        if due is None:
            self.changed.wait()
            return
        start = time.monotonic()
        left = (due - self._time) / 1e9 - self._idled
        if left > 0:
            self.changed.wait(left)
            self._idled += time.monotonic() - start
        else:
            self._time = due
            self._idled = 0.0
            self._fire_timers()

    # Timers

    def add_timers(self, *timers: Timer) -> None:
        """More things that come due."""
        self._timers.extend(timers)
        self._due_known = False

    def _next_due(self) -> int | None:
        if not self._due_known:
            self._due = min((timer.due for timer in self._timers if timer.due is not None), default=None)
            self._due_known = True
        return self._due

    def _fire_timers(self) -> None:
        while (due := self._next_due()) is not None and due <= self._time:
            for timer in self._timers:
                if timer.due is not None and timer.due <= self._time:
                    timer.tick(self._time)
            self._due_known = False
