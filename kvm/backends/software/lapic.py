"""The local APIC: one VCPU's registers page (struct kvm_lapic_state), its interrupts, IPIs and timer.

Time is the VM's virtual time in nanoseconds; like KVM's, the timer's bus clock is 1 GHz. The TSC counts, at 1 GHz, what
of it has passed, which setting the clock doesn't change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

BASE = 0xFEE00000
BASE_ENABLED, BASE_BSP = 1 << 11, 1 << 8

ID, VERSION, TPR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, CMCI, ICR, ICR2 = 0x100, 0x180, 0x200, 0x280, 0x2F0, 0x300, 0x310
LVT_TIMER, LVT_THERMAL, LVT_PMC, LVT0, LVT1, LVT_ERROR = 0x320, 0x330, 0x340, 0x350, 0x360, 0x370
TIMER_INITIAL, TIMER_CURRENT, TIMER_DIVIDE = 0x380, 0x390, 0x3E0

_LVTS = {LVT_TIMER: 0x700FF, LVT_THERMAL: 0x107FF, LVT_PMC: 0x107FF, LVT0: 0x1F7FF, LVT1: 0x1F7FF, LVT_ERROR: 0x100FF}
"""Each local vector's register and its writable bits."""
_MASKED = 1 << 16
_SOFTWARE_ENABLED = 1 << 8
_ONE_SHOT, _PERIODIC, _TSC_DEADLINE = range(3)
_FIXED, _LOWEST, _NMI, _INIT, _SIPI, _EXTINT = 0, 1, 4, 5, 6, 7
_WRITABLE = {LDR: 0xFF00_0000, DFR: 0xF000_0000, ICR2: 0xFF00_0000, TIMER_DIVIDE: 0xB}
"""Plain registers and their writable bits."""
_PAGE = 1024
_U64 = (1 << 64) - 1


class Surroundings(Protocol):
    """What a local APIC needs of the VM."""

    def now(self) -> int: ...
    def passed(self) -> int: ...
    def timers_changed(self) -> None: ...
    def apics(self) -> Sequence[Lapic]: ...
    def end_of_interrupt(self, vector: int) -> None: ...
    def interrupt_pending(self, index: int) -> None: ...
    def raise_nmi(self, index: int) -> None: ...


class Lapic:
    """``init_pending`` and ``sipi_pending`` are latched until the VCPU takes them, as in the kernel."""

    def __init__(self, index: int, surroundings: Surroundings) -> None:
        self.index = index
        self._vm = surroundings
        self.base = BASE | BASE_ENABLED | (0 if index else BASE_BSP)
        self.init_pending = False
        self.sipi_pending = False
        self.sipi_vector = 0
        self.called = False
        """Another VCPU has sent it something since its VCPU last took an interrupt."""
        self.tsc_offset = 0
        """The TSC is ``passed`` plus this, modulo 2⁶⁴: as KVM's is the host's TSC plus its offset."""
        self.tsc_deadline = 0
        self.due: int | None = None
        """Virtual time at which the timer fires."""
        self._page = bytearray(_PAGE)
        self._requests = self._in_service = self._level = 0
        """IRR, ISR and TMR as 256-bit numbers."""
        self._set(ID, index << 24)
        self.reset()

    def reset(self) -> None:
        """As INIT leaves it: everything but the ID and the base."""
        identity = self._get(ID)
        self._page[:] = bytes(_PAGE)
        self._set(ID, identity)
        self._set(VERSION, 0x50014)
        self._set(DFR, 0xFFFF_FFFF)
        self._set(SVR, 0xFF)
        for register in _LVTS:
            self._set(register, _MASKED)
        if self.base & BASE_BSP:
            self._set(LVT0, _EXTINT << 8)  # KVM's quirk LINT0_REENABLED: virtual wire mode out of reset
        self._requests = self._in_service = self._level = 0
        self.tsc_deadline = 0
        self.due = None
        self._vm.timers_changed()

    def _get(self, register: int) -> int:
        return int.from_bytes(self._page[register : register + 4], "little")

    def _set(self, register: int, value: int) -> None:
        self._page[register : register + 4] = value.to_bytes(4, "little")

    # State

    def save(self) -> bytes:
        """struct kvm_lapic_state."""
        for first, bits in ((ISR, self._in_service), (TMR, self._level), (IRR, self._requests)):
            for word in range(8):
                self._set(first + word * 16, bits >> word * 32 & 0xFFFF_FFFF)
        self._set(PPR, self.ppr)
        self._set(TIMER_CURRENT, self._remaining())
        return bytes(self._page)

    def load(self, raw: bytes) -> None:
        """Take a struct kvm_lapic_state; the timer goes on from its current count."""
        self._page[:] = raw
        self._in_service, self._level, self._requests = (
            sum(self._get(first + word * 16) << word * 32 for word in range(8)) for first in (ISR, TMR, IRR)
        )
        remaining = self._get(TIMER_CURRENT)
        if self._mode != _TSC_DEADLINE:
            if not remaining and self._mode == _PERIODIC:
                remaining = self._get(TIMER_INITIAL)
            self._start(remaining)

    def shift(self, jump: int) -> None:
        """Virtual time was set forward by ``jump`` ns: the timer's count doesn't move with it."""
        before = self._vm.now() - jump
        if self.due is None:
            return
        if self._mode == _TSC_DEADLINE:
            self.due += jump
        else:
            self._start(self.due // self._divide - before // self._divide)

    # Interrupts

    @property
    def enabled(self) -> bool:
        """Both by its base register and by software."""
        return bool(self.base & BASE_ENABLED and self._get(SVR) & _SOFTWARE_ENABLED)

    @property
    def tpr(self) -> int:
        return self._page[TPR]

    @tpr.setter
    def tpr(self, value: int) -> None:
        self._page[TPR] = value & 0xFF

    @property
    def ppr(self) -> int:
        """The processor priority: the task's, or that of the interrupt in service."""
        served = self._in_service.bit_length() - 1
        if served >= 0 and served & 0xF0 >= self.tpr & 0xF0:
            return served & 0xF0
        return self.tpr

    def pending(self) -> int | None:
        """The vector that the APIC would deliver now."""
        if not self._requests or not self.enabled:
            return None
        vector = self._requests.bit_length() - 1
        return vector if vector & 0xF0 > self.ppr & 0xF0 else None

    def waiting(self) -> bool:
        """Something is requested, deliverable now or not."""
        return bool(self._requests) and self.enabled

    def acknowledge(self, vector: int) -> None:
        """The VCPU takes the interrupt."""
        self._requests &= ~(1 << vector)
        self._in_service |= 1 << vector

    def takes_pic(self) -> bool:
        """Does the 8259s' output reach the VCPU: by virtual wire, or as there is no APIC?"""
        if not self.base & BASE_ENABLED:
            return True
        wire = self._get(LVT0)
        return not wire & _MASKED and wire >> 8 & 7 == _EXTINT

    def accept(self, mode: int, vector: int, level: bool = False) -> bool:
        """A message for this APIC, from the bus or an I/O APIC."""
        if not self.base & BASE_ENABLED:
            return False
        if mode in (_FIXED, _LOWEST):
            if not self.enabled or vector < 16:
                return False
            self._requests |= 1 << vector
            self._level = self._level & ~(1 << vector) | level << vector
            self._vm.interrupt_pending(self.index)
        elif mode == _NMI:
            self._vm.raise_nmi(self.index)
        elif mode == _INIT:
            self.init_pending, self.sipi_pending = True, False
            self._vm.interrupt_pending(self.index)
        elif mode == _SIPI:
            self.sipi_vector, self.sipi_pending = vector, True
            self._vm.interrupt_pending(self.index)
        return True

    def addressed(self, destination: int, logical: bool) -> bool:
        """Is this APIC meant?"""
        if not logical:
            return destination in (0xFF, self._get(ID) >> 24)
        mine = self._get(LDR) >> 24
        if self._get(DFR) >> 28 == 0xF:
            return bool(mine & destination)
        return destination == 0xFF or (mine >> 4 == destination >> 4 and bool(mine & destination & 0xF))

    # Registers

    def read(self, offset: int, size: int) -> int:
        """A guest's read in the registers page."""
        register = offset & ~0xF
        if offset & 0xF > 3 or register >= _PAGE:
            return 0
        self.save()
        return self._get(register) >> 8 * (offset & 3) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """A guest's write in the registers page: whole registers only."""
        if offset & 0xF or size < 4:
            return
        value &= 0xFFFF_FFFF
        if offset == TPR:
            self.tpr = value
        elif offset == EOI:
            self._end_of_interrupt()
        elif offset == SVR:
            self._set(SVR, value & 0x1FF)
            if not value & _SOFTWARE_ENABLED:
                for register in _LVTS:
                    self._set(register, self._get(register) | _MASKED)
        elif offset == ICR:
            self._set(ICR, value & ~(1 << 12))
            send(self._vm.apics(), value, self._get(ICR2) >> 24, self)
        elif offset == LVT_TIMER:
            self._set_timer_vector(value)
        elif offset in _LVTS:
            self._set(offset, value & _LVTS[offset] | (0 if self._get(SVR) & _SOFTWARE_ENABLED else _MASKED))
        elif offset == TIMER_INITIAL:
            if self._mode != _TSC_DEADLINE:
                self._set(TIMER_INITIAL, value)
                self._start(value)
        elif offset == TIMER_DIVIDE:
            remaining = self._remaining()
            self._set(TIMER_DIVIDE, value & _WRITABLE[TIMER_DIVIDE])
            if self._mode != _TSC_DEADLINE:
                self._start(remaining)
        elif offset == ESR:
            self._set(ESR, 0)
        elif offset in _WRITABLE:
            fixed = 0x0FFF_FFFF if offset == DFR else 0
            self._set(offset, value & _WRITABLE[offset] | fixed)
        self._vm.interrupt_pending(self.index)

    def _end_of_interrupt(self) -> None:
        vector = self._in_service.bit_length() - 1
        if vector < 0:
            return
        self._in_service &= ~(1 << vector)
        if self._level >> vector & 1:
            self._vm.end_of_interrupt(vector)

    # Timer

    @property
    def _mode(self) -> int:
        return self._get(LVT_TIMER) >> 17 & 3

    @property
    def _divide(self) -> int:
        """Nanoseconds a count: the prescaler runs freely, so counts end at its multiples."""
        setting = self._get(TIMER_DIVIDE)
        return 1 << ((setting & 3 | setting >> 1 & 4) + 1 & 7)

    def _remaining(self) -> int:
        if self.due is None or self._mode == _TSC_DEADLINE:
            return 0
        return max(0, self.due // self._divide - self._vm.now() // self._divide)

    def _start(self, count: int) -> None:
        self.due = (self._vm.now() // self._divide + count) * self._divide if count else None
        self._vm.timers_changed()

    def _set_timer_vector(self, value: int) -> None:
        was = self._mode
        self._set(LVT_TIMER, value & _LVTS[LVT_TIMER] | (0 if self._get(SVR) & _SOFTWARE_ENABLED else _MASKED))
        if self._mode != was and _TSC_DEADLINE in (was, self._mode):
            self._set(TIMER_INITIAL, 0)
            self.tsc_deadline = 0
            self._start(0)

    def set_tsc_deadline(self, deadline: int) -> None:
        """WRMSR of TSC_DEADLINE: arms the timer if it is in that mode, else has no effect; 0 disarms."""
        if self._mode != _TSC_DEADLINE:
            return
        self.tsc_deadline = deadline
        self.due = self._vm.now() + deadline - self.tsc() if deadline else None
        self._vm.timers_changed()

    def set_tsc(self, value: int) -> None:
        """Make the TSC read ``value`` now."""
        self.set_tsc_offset(value - self._vm.passed() & _U64)

    def set_tsc_offset(self, offset: int) -> None:
        """The TSC jumps; an armed deadline stays where it is on it."""
        self.tsc_offset = offset
        if self.tsc_deadline:
            self.set_tsc_deadline(self.tsc_deadline)

    def tsc(self) -> int:
        return self._vm.passed() + self.tsc_offset & _U64

    def tick(self, now: int) -> None:
        """The timer's time has come."""
        assert self.due is not None
        due, self.due = self.due, None
        if self._mode == _PERIODIC and self._get(TIMER_INITIAL):
            period = self._get(TIMER_INITIAL) * self._divide
            self.due = due + period * max(1, (now - due) // period + 1)
        self.tsc_deadline = 0
        timer = self._get(LVT_TIMER)
        if not timer & _MASKED:
            self.accept(_FIXED, timer & 0xFF)


def send(apics: Sequence[Lapic], command: int, destination: int, sender: Lapic | None = None) -> None:
    """Deliver an interrupt command (the ICR's layout; an I/O APIC's entry has the same) to whom it is for."""
    shorthand = command >> 18 & 3 if sender is not None else 0
    mode, vector, level = command >> 8 & 7, command & 0xFF, bool(command & 1 << 15)
    if sender is not None and mode == _INIT and level and not command & 1 << 14:
        return  # INIT level de-assert, of no effect since the Pentium 4
    targets = [
        apic
        for apic in apics
        if (
            apic is sender
            if shorthand == 1
            else apic is not sender
            if shorthand == 3
            else shorthand == 2 or apic.addressed(destination, bool(command & 1 << 11))
        )
    ]
    if mode == _LOWEST:
        targets = [apic for apic in targets if apic.enabled][:1]
    for apic in targets:
        apic.called |= sender not in (None, apic)
        apic.accept(mode, vector, level and mode in (_FIXED, _LOWEST))
