"""One VCPU: the kernel's copy of its substates, with the kernel's rules, and what happens between slices."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvm.backends.deferred import Deferred
from kvm.backends.interface import Bus, Exit, ExitKind, Sample
from kvm.backends.software import delivery, engine, instructions, ioapic, lapic, state
from kvm.backends.software.bell import QueueBell
from kvm.backends.software.context import CR0_PG, CR4_PAE, EFER_LMA, HF_INHIBIT_IRQ, RFLAGS_IF, RFLAGS_RF, RFLAGS_TF
from kvm.backends.software.cpuid import CpuidTable
from kvm.backends.software.delivery import Event
from kvm.backends.software.engine import Engine
from kvm.backends.software.ioapic import Ioapic
from kvm.backends.software.lapic import BASE_ENABLED, Lapic
from kvm.backends.software.msr import STORED, Msrs, Refused
from kvm.backends.software.paging import Fault
from kvm.backends.software.port_rights import may_use
from kvm.backends.software.state import Invalid
from kvm.errors import KvmError, SubstateError
from kvm.x86.structs import (
    EVENT_VALID_NMI_PENDING,
    EVENT_VALID_SHADOW,
    EVENT_VALID_SIPI_VECTOR,
    EVENT_VALID_SMM,
    GUESTDBG_BLOCKIRQ,
    GUESTDBG_ENABLE,
    GUESTDBG_SINGLESTEP,
    GUESTDBG_USE_HW_BP,
    GUESTDBG_USE_SW_BP,
    MP_STATE_HALTED,
    MP_STATE_INIT_RECEIVED,
    MP_STATE_RUNNABLE,
    MP_STATE_SIPI_RECEIVED,
    MP_STATE_UNINITIALIZED,
    GuestDebug,
    MpState,
    Sregs,
    Sregs2,
    VcpuEvents,
    Xcrs,
    pack_msrs,
    unpack_cpuid,
    unpack_msrs,
)
from kvm.x86.substates import Substate

if TYPE_CHECKING:
    from kvm.backends.software.vm import SoftwareVm

_EVENT_FLAGS = EVENT_VALID_NMI_PENDING | EVENT_VALID_SIPI_VECTOR | EVENT_VALID_SHADOW | EVENT_VALID_SMM
_SHADOW_STI = 2
_DEBUG_FLAGS = (
    GUESTDBG_ENABLE | GUESTDBG_SINGLESTEP | GUESTDBG_USE_SW_BP | GUESTDBG_USE_HW_BP | GUESTDBG_BLOCKIRQ
)  # fmt: skip
_DR6_FIXED, _DR6_SINGLE_STEP = 0xFFFF0FF0, 1 << 14
_WAITING = (MP_STATE_HALTED, MP_STATE_UNINITIALIZED, MP_STATE_INIT_RECEIVED)
_ALL = 1 << 62
"""A budget without a limit of its own."""


class SoftwareVcpu:
    """Implements ``kvm.backends.interface.VcpuFd``. The scheduler drives it: ``ready``, ``prepare``, ``finish``."""

    def __init__(self, vm: SoftwareVm, index: int) -> None:
        self.vm = vm
        self.index = index
        self.engine = Engine(self)
        self.cpu = self.engine.cpu
        self.lapic = Lapic(index, vm)
        self.msrs = Msrs(self.cpu, self.lapic, dict(STORED))
        self.cpuid = CpuidTable(())
        self.mp_state = MP_STATE_UNINITIALIZED if index else MP_STATE_RUNNABLE
        self.bus: Bus | None = None
        self.inside = False
        self.kicked = False
        self.exit: Exit | None = None
        self.sample_wanted = False
        self.window = False
        """An interrupt waits that can't be delivered yet."""
        self.paging_changed = False
        self._cpuid_raw = b""
        self._owner: int | None = None
        self._ran = False
        self._sample: Sample | None = None
        self._sequence = 0
        self._events = VcpuEvents()
        """The parts that stand in no register: what is injected, the NMI flags."""
        self._shadow = _SHADOW_STI
        self._xcr0 = 1
        self._debug = GuestDebug()
        self._breakpoints: dict[int, int] = {}
        self._check_interrupts = True
        """Look for interrupts before the next instruction, not only at the start of the next slot."""
        self._passing = False
        """The next instruction is an IRET or POPF that was watched for: let it through, then look."""
        self._slot: int | None = None
        delivery.reset(self.cpu, self.cpuid.signature)
        self.cpu.fpuc, self.cpu.mxcsr = 0x37F, 0x1F80
        for number in range(8):
            self.cpu.fptags[number] = 1
        self.cpu.cr[0] = 0x6000_0010
        self.engine.commit_fpu()
        self.engine.map(vm.slots.layout())

    # The interface

    def bell(self) -> QueueBell:
        return QueueBell()

    def bind(self) -> None:
        self._owner = threading.get_ident()

    def _own(self) -> None:
        assert self._owner in (None, threading.get_ident()), f"VCPU {self.index} belongs to another thread"

    def get(self, rows: Sequence[Substate]) -> list[bytes]:
        self._own()
        out: list[bytes] = []
        with self.vm.scheduler.attention():
            for row in rows:
                assert row.get is not None, row.name
                out.append(self.vm.system.move(row, row.get, len(out), self.index, _GET[row.get], self, row.template))
        return out

    def put(self, rows: Sequence[Substate], raws: Sequence[bytes]) -> tuple[SubstateError, ...]:
        self._own()
        tolerated: tuple[SubstateError, ...] = ()
        with self.vm.scheduler.attention():
            try:
                for moved, (row, raw) in enumerate(zip(rows, raws, strict=True)):
                    assert row.put is not None, row.name
                    try:
                        self.vm.system.move(row, row.put, moved, self.index, _PUT[row.put], self, raw)
                    except SubstateError as error:
                        if not row.tolerated:
                            error.tolerated = tolerated
                            raise
                        tolerated += (error,)
            finally:
                self.engine.commit(flush=True)
        return tolerated

    def getting(self, rows: tuple[Substate, ...]) -> Deferred[list[bytes]]:
        return Deferred(lambda: self.get(rows))

    def putting(self, rows: tuple[Substate, ...], raws: Sequence[bytes]) -> Deferred[tuple[SubstateError, ...]]:
        return Deferred(lambda: self.put(rows, raws))

    def kvmclock_ctrl(self) -> None:
        """There is no kvmclock here."""

    def run(self, bus: Bus) -> Exit:
        self._own()
        fault = self.vm.system.note("KVM_RUN", "", self.index)
        if fault:
            raise KvmError("KVM_RUN", fault, vcpu=self.index)
        self.bus = bus
        self._ran = True
        return self.vm.scheduler.run(self)

    def kick(self) -> None:
        self.kicked = True
        self.vm.scheduler.kick(self)

    def clear_kick(self) -> None:
        self.kicked = False

    def request_sample(self) -> None:
        self.sample_wanted = True
        if self.inside:
            with self.vm.scheduler.attention():
                pass

    def sample(self) -> Sample | None:
        return self._sample

    def waiting(self) -> bool | None:
        return self.inside and self.mp_state in _WAITING

    def close(self) -> None:
        with self.vm.scheduler.attention():
            self.mp_state = MP_STATE_UNINITIALIZED  # the others must not wait for its turn
            self.engine.close()

    # What the engine reaches outside memory

    def port_in(self, port: int, size: int) -> int:
        scheduler = self.vm.scheduler
        scheduler.charge()
        if not self._may_use(port, size):
            return 0
        if port in self.vm.ports:
            with scheduler.changed:
                return self.vm.port_in(port, size)
        assert self.bus is not None
        return self.bus.port_in(port, size)

    def port_out(self, port: int, size: int, value: int) -> None:
        scheduler = self.vm.scheduler
        scheduler.charge()
        if not self._may_use(port, size):
            return
        if port in self.vm.ports:
            with scheduler.changed:
                self.vm.port_out(port, size, value)
                self._look_soon()
            return
        assert self.bus is not None
        self.bus.port_out(port, size, value)

    def _may_use(self, port: int, size: int) -> bool:
        self.engine.look()
        if may_use(self.cpu, self.vm.slots, port, size):
            return True
        self.engine.refuse()
        return False

    def mmio_read(self, address: int, size: int) -> int:
        scheduler = self.vm.scheduler
        scheduler.charge()
        device = self._device(address)
        if device is not None:
            with scheduler.changed:
                return device.read(address & 0xFFF, size)
        assert self.bus is not None
        return self.bus.mmio_read(address, size)

    def mmio_write(self, address: int, size: int, value: int) -> None:
        scheduler = self.vm.scheduler
        scheduler.charge()
        device = self._device(address)
        if device is not None:
            with scheduler.changed:
                device.write(address & 0xFFF, size, value)
                self._look_soon()
            return
        assert self.bus is not None
        self.bus.mmio_write(address, size, value)

    def readonly_write(self, address: int, size: int, value: int) -> None:
        self.mmio_write(address, size, value)

    def _device(self, address: int) -> Lapic | Ioapic | None:
        page = address & ~0xFFF
        if page == lapic.BASE and self.lapic.base & BASE_ENABLED:
            return self.lapic
        if page == ioapic.BASE and self.vm.has_irqchip:
            return self.vm.ioapic
        return None

    def _look_soon(self) -> None:
        """The guest has touched its interrupt hardware: see at the next instruction what that made of it."""
        self._check_interrupts = True
        self.engine.cut()

    # State, as the ioctls see it

    def publish(self) -> None:
        """Make a sample of the registers as they stand."""
        self.sample_wanted = False
        self._sequence += 1
        self._sample = Sample(
            self._sequence,
            time.monotonic_ns(),
            state.get_regs(self.cpu),
            self._get_sregs(bytes(ctypes.sizeof(Sregs))),
            self._get_events(b""),
        )

    def _get_regs(self, template: bytes) -> bytes:
        return state.get_regs(self.cpu)

    def _put_regs(self, raw: bytes) -> None:
        state.put_regs(self.cpu, raw)
        self._events.exception_pending = self._events.exception_injected = 0

    def _get_sregs(self, template: bytes) -> bytes:
        sregs: Sregs | Sregs2 = Sregs2() if len(template) == ctypes.sizeof(Sregs2) else Sregs()
        state.get_sregs(self.cpu, sregs, self.lapic.base, self.lapic.tpr >> 4)
        pae = self.cpu.cr[4] & CR4_PAE and self.cpu.cr[0] & CR0_PG and not self.cpu.efer & EFER_LMA
        if isinstance(sregs, Sregs2) and pae:
            raw = self.vm.slots.read(self.cpu.cr[3] & 0xFFFF_FFE0, 32)
            sregs.flags = 1
            for number in range(4):
                sregs.pdptrs[number] = int.from_bytes(raw[number * 8 : number * 8 + 8], "little")
        return bytes(sregs)

    def _put_sregs(self, raw: bytes) -> None:
        kind = Sregs2 if len(raw) == ctypes.sizeof(Sregs2) else Sregs
        sregs: Sregs | Sregs2 = kind.from_buffer_copy(raw)
        state.check_sregs(sregs)
        try:
            self.msrs.set_apic_base(sregs.apic_base)
        except Refused:
            raise Invalid(f"apic_base={sregs.apic_base:#x}") from None
        state.put_sregs(self.cpu, sregs)
        self.lapic.tpr = sregs.cr8 << 4 | (self.lapic.tpr & 0xF if self.lapic.tpr >> 4 == sregs.cr8 else 0)
        for word in sregs.interrupt_bitmap if isinstance(sregs, Sregs) else ():
            if word:
                raise Invalid("interrupt_bitmap: the irqchip is the backend's own")

    def _get_xsave(self, template: bytes) -> bytes:
        return state.get_xsave(self.cpu, len(template))

    def _put_xsave(self, raw: bytes) -> None:
        state.put_xsave(self.cpu, raw)
        self.engine.commit_fpu()

    def _get_xcrs(self, template: bytes) -> bytes:
        xcrs = Xcrs(nr_xcrs=1)
        xcrs.xcrs[0].value = self._xcr0
        return bytes(xcrs)

    def _put_xcrs(self, raw: bytes) -> None:
        xcrs = Xcrs.from_buffer_copy(raw)
        if xcrs.nr_xcrs > 16 or xcrs.flags:
            raise Invalid(f"nr_xcrs={xcrs.nr_xcrs}, flags={xcrs.flags:#x}")
        for entry in xcrs.xcrs[: xcrs.nr_xcrs]:
            if entry.xcr == 0:
                if entry.value not in (1, 3):
                    raise Invalid(f"xcr0={entry.value:#x}: only x87 and SSE exist here")
                self._xcr0 = entry.value

    def _get_lapic(self, template: bytes) -> bytes:
        return self.lapic.save()

    def _put_lapic(self, raw: bytes) -> None:
        self.lapic.load(raw)
        self._check_interrupts = True

    def _get_msrs(self, template: bytes) -> bytes:
        values = {}
        for index in unpack_msrs(template):
            try:
                values[index] = self.msrs.read(index)
            except Refused:
                raise Invalid(f"MSR {index:#x} doesn't exist") from None
        return pack_msrs(values)

    def _put_msrs(self, raw: bytes) -> None:
        for index, value in unpack_msrs(raw).items():
            try:
                self.msrs.write(index, value)
            except Refused:
                raise Invalid(f"MSR {index:#x} = {value:#x} refused, and none after it written") from None

    def _get_tsc_offset(self, template: bytes) -> bytes:
        return self.lapic.tsc_offset.to_bytes(8, "little")

    def _put_tsc_offset(self, raw: bytes) -> None:
        self.lapic.set_tsc_offset(int.from_bytes(raw, "little"))

    def _get_events(self, template: bytes) -> bytes:
        events = VcpuEvents.from_buffer_copy(self._events)
        events.interrupt_shadow = self._shadow if self.cpu.hflags & HF_INHIBIT_IRQ else 0
        events.smi_latched_init = self.lapic.init_pending
        events.flags = EVENT_VALID_NMI_PENDING | EVENT_VALID_SHADOW | EVENT_VALID_SMM
        return bytes(events)

    def _put_events(self, raw: bytes) -> None:
        new = VcpuEvents.from_buffer_copy(raw)
        if new.flags & ~_EVENT_FLAGS:
            raise Invalid(f"flags={new.flags:#x}")
        if (new.exception_injected or new.exception_pending) and (new.exception_nr > 31 or new.exception_nr == 2):
            raise Invalid(f"exception {new.exception_nr}")
        if new.flags & EVENT_VALID_SMM and (new.smi_smm or new.smi_pending):
            raise Invalid("system management mode doesn't exist here")
        nmi_pending = new.nmi_pending if new.flags & EVENT_VALID_NMI_PENDING else self._events.nmi_pending
        if new.flags & EVENT_VALID_SIPI_VECTOR:
            self.lapic.sipi_vector = new.sipi_vector
        if new.flags & EVENT_VALID_SHADOW:
            self._set_shadow(new.interrupt_shadow)
        if new.flags & EVENT_VALID_SMM:
            self.lapic.init_pending = bool(new.smi_latched_init)
        new.nmi_pending = nmi_pending
        new.sipi_vector = new.flags = new.interrupt_shadow = new.smi_latched_init = 0
        self._events = new

    def _set_shadow(self, shadow: int) -> None:
        if shadow:
            self._shadow = shadow
            self.cpu.hflags |= HF_INHIBIT_IRQ
        else:
            self.cpu.hflags &= ~HF_INHIBIT_IRQ

    def _get_mp_state(self, template: bytes) -> bytes:
        self._accept_init()  # as the kernel does, and so it can change CS and RIP
        return bytes(MpState(self.mp_state))

    def _put_mp_state(self, raw: bytes) -> None:
        new = MpState.from_buffer_copy(raw).mp_state
        if new > MP_STATE_SIPI_RECEIVED:
            raise Invalid(f"mp_state={new}")
        self.mp_state = new
        if new == MP_STATE_SIPI_RECEIVED:
            self.mp_state, self.lapic.sipi_pending = MP_STATE_INIT_RECEIVED, True

    def _get_debugregs(self, template: bytes) -> bytes:
        return state.get_debugregs(self.cpu)

    def _put_debugregs(self, raw: bytes) -> None:
        state.put_debugregs(self.cpu, raw)

    def _put_guest_debug(self, raw: bytes) -> None:
        new = GuestDebug.from_buffer_copy(raw)
        if new.control & ~_DEBUG_FLAGS:
            raise Invalid(f"control={new.control:#x}")
        if self._debug.control & ~new.control & GUESTDBG_BLOCKIRQ:
            self._check_interrupts = True
        self._debug = new
        breakpoints: dict[int, int] = {}
        if new.control & GUESTDBG_ENABLE and new.control & GUESTDBG_USE_HW_BP:
            dr7 = new.debugreg[7]
            for number in range(4):
                if dr7 >> 2 * number & 3 and not dr7 >> 16 + 4 * number & 3:
                    breakpoints[new.debugreg[number]] = number
        if breakpoints.keys() != self._breakpoints.keys():
            self.engine.break_at(breakpoints)
        self._breakpoints = breakpoints

    def _put_cpuid(self, raw: bytes) -> None:
        if self._ran and raw != self._cpuid_raw:
            raise Invalid("CPUID can't change after the first run")
        self._cpuid_raw = raw
        self.cpuid = CpuidTable(unpack_cpuid(raw))

    def _debugging(self, flag: int) -> bool:
        return bool(self._debug.control & GUESTDBG_ENABLE and self._debug.control & flag)

    # What the scheduler asks

    @property
    def stepping(self) -> bool:
        return self._debugging(GUESTDBG_SINGLESTEP)

    @property
    def most(self) -> int:
        """Instructions that the next slice may have."""
        return 1 if self.stepping or self._check_interrupts else _ALL

    @property
    def leaving(self) -> bool:
        """Its thread is about to come out of ``run``."""
        return self.inside and (self.kicked or self.exit is not None)

    def ready(self) -> bool:
        """Has it something to execute? Waking up from HLT counts."""
        if self.mp_state == MP_STATE_RUNNABLE:
            return True
        apic = self.lapic
        if apic.init_pending or (apic.sipi_pending and self.mp_state == MP_STATE_INIT_RECEIVED):
            return True
        return self.mp_state == MP_STATE_HALTED and self._wakes()

    def _wakes(self) -> bool:
        if self._events.interrupt_injected or (self._events.nmi_pending and not self._events.nmi_masked):
            return True
        if self.stepping and self._debugging(GUESTDBG_BLOCKIRQ):
            return False
        return bool(self.cpu.rflags & RFLAGS_IF) and self._interrupt_waits()

    def _interrupt_waits(self) -> bool:
        return self.lapic.pending() is not None or (self.vm.pic_output and self.lapic.takes_pic())

    def forget_slot(self) -> None:
        """Virtual time was set."""
        self._slot = None

    def interrupt_pending(self) -> None:
        """Something about its interrupts has changed: look before the next instruction."""
        self._check_interrupts = True

    def raise_nmi(self) -> None:
        self._events.nmi_pending = 1
        self._check_interrupts = True

    def code_may_have_changed(self) -> None:
        if len(self.vm.vcpus) > 1:
            self.engine.flush_code()

    def prepare(self, slot: int) -> bool:
        """Before a slice: take INIT, SIPI and events. False if there is nothing to execute now."""
        self._accept_init()
        if self.mp_state == MP_STATE_HALTED and self._wakes():
            self.mp_state = MP_STATE_RUNNABLE
            self._check_interrupts = True
        if self.mp_state != MP_STATE_RUNNABLE:
            return False
        if self._slot not in (None, slot):
            self._check_interrupts = True
        self._slot = slot
        if not self._deliver_pending():
            return False
        if self._breakpoints:
            at = self._breakpoints.get(instructions.linear_rip(self))
            if at is not None and not self.cpu.rflags & RFLAGS_RF:
                self.exit = Exit(ExitKind.DEBUG, _DR6_FIXED | 1 << at, detail=f"breakpoint {at}")
                return False
        return True

    def _accept_init(self) -> None:
        apic = self.lapic
        if apic.init_pending:
            apic.init_pending = False
            delivery.reset(self.cpu, self.cpuid.signature)
            apic.reset()
            self._events = VcpuEvents()
            self.engine.commit(flush=True)
            self.mp_state = MP_STATE_INIT_RECEIVED if self.index else MP_STATE_RUNNABLE
        if apic.sipi_pending:
            apic.sipi_pending = False
            if self.mp_state == MP_STATE_INIT_RECEIVED:
                delivery.start_up(self.cpu, apic.sipi_vector)
                self.code_may_have_changed()
                self.engine.commit(flush=True)
                self.mp_state = MP_STATE_RUNNABLE

    def _deliver_pending(self) -> bool:
        """Deliver what may be delivered before the next instruction. False: that was a triple fault."""
        events, cpu = self._events, self.cpu
        if self._passing:
            self._passing = False
            self._check_interrupts = True
            self._watch(engine.ALWAYS)
            return True
        if events.exception_injected or events.exception_pending:
            events.exception_injected = events.exception_pending = 0
            code = events.exception_error_code if events.exception_has_error_code else None
            return self._deliver(Event(events.exception_nr, cpu.rip, cpu.rip, code))
        if events.interrupt_injected:
            events.interrupt_injected = 0
            return self._deliver(delivery.interrupt(cpu, events.interrupt_nr))
        check, self._check_interrupts = self._check_interrupts, False
        blocked = self.stepping and self._debugging(GUESTDBG_BLOCKIRQ)
        waits = not blocked and self._interrupt_waits()
        nmi = not blocked and events.nmi_pending and not events.nmi_masked
        shadow = cpu.hflags & HF_INHIBIT_IRQ
        self.window = waits
        intercept = engine.ALWAYS
        if nmi and not shadow:
            self._called()
            events.nmi_pending, events.nmi_masked = 0, 1
            if not self._deliver(delivery.interrupt(cpu, delivery.NMI)):
                return False
        elif waits and check and cpu.rflags & RFLAGS_IF and not shadow:
            self._deliver_interrupt()
            self.window = self._interrupt_waits()
        elif nmi or (waits and check and cpu.rflags & RFLAGS_IF):
            self._check_interrupts = True  # only the shadow is in the way: one instruction
        if self.window:
            intercept |= engine.IF_MAY_RISE
        if events.nmi_masked:
            intercept |= engine.NMI_RETURN
        self._watch(intercept)
        return self.exit is None

    def _watch(self, intercept: int) -> None:
        if intercept != self.cpu.intercept:
            self.cpu.intercept = intercept
            self.engine.commit()

    def _called(self) -> None:
        """An interrupt is how a VCPU has the others serialise when it has changed code (SDM vol. 3A, 9.1.3; Linux's
        text_poke_sync): they see it in the handler."""
        if self.lapic.called:
            self.lapic.called = False
            self.code_may_have_changed()

    def _deliver_interrupt(self) -> None:
        self._called()
        if self.vm.pic_output and self.lapic.takes_pic():
            vector = self.vm.acknowledge_pic()
        else:
            pending = self.lapic.pending()
            assert pending is not None
            vector = pending
            self.lapic.acknowledge(vector)
        self._deliver(delivery.interrupt(self.cpu, vector))

    def _deliver(self, event: Event) -> bool:
        try:
            survived = delivery.deliver(self.cpu, self.vm.slots, event)
        except NotImplementedError as what:
            self.exit = Exit(ExitKind.INTERNAL_ERROR, 1, detail=f"{what} can't be emulated")
            return False
        self.engine.commit()
        if not survived:
            self.exit = Exit(ExitKind.SHUTDOWN, detail="a triple fault")
        return survived

    def finish(self, event: int, begun: int) -> None:
        """After a slice: deal with what ended it."""
        if event == engine.NOTHING:
            if self.stepping and begun:
                self._stepped()
            return
        if event == engine.BREAKPOINT:
            return  # prepare() meets it
        self._check_interrupts = True
        if event == engine.GAVE_UP:
            self._give_up()
            return
        if event == engine.SYSCALL:
            if not delivery.syscall(self.cpu, self.vm.slots):
                self.exit = Exit(ExitKind.SHUTDOWN, detail="a triple fault")
            self.engine.commit()
        elif event == engine.SYSENTER:
            delivery.sysenter(self.cpu)
            self.engine.commit()
        elif event >= engine.INTERCEPT:
            if not self._intercepted(event - engine.INTERCEPT):
                return
        elif not self._trapped(event):
            return
        if self.stepping and self.exit is None:
            self._stepped()

    def _stepped(self) -> None:
        self.exit = Exit(ExitKind.DEBUG, _DR6_FIXED | _DR6_SINGLE_STEP, detail="single step")

    def _give_up(self) -> None:
        code = instructions.code_at_rip(self)
        self.exit = Exit(ExitKind.INTERNAL_ERROR, 1, code, f"the emulator gave up: {self.engine.error}")

    def _trapped(self, vector: int) -> bool:
        """An exception or INT instruction. False: it isn't the guest's."""
        cpu = self.cpu
        if cpu.exception_is_int:
            cpu.exception_is_int = 0  # else the emulator takes what comes out to us next for an INT too, and moves RIP
            cpu.rip = cpu.exception_next_rip
            event = delivery.software_interrupt(cpu, self.vm.slots, vector)
            if vector == delivery.BP:
                self.code_may_have_changed()  # another VCPU may have taken the INT3 back
            if vector == delivery.BP and self._debugging(GUESTDBG_USE_SW_BP):
                cpu.rip = event.fault_rip
                self.engine.commit()
                self.exit = Exit(ExitKind.DEBUG, _DR6_FIXED, detail="software breakpoint")
                return False
        else:
            event = delivery.exception(cpu, vector, cpu.error_code)
        return self._deliver(event)

    def _intercepted(self, code: int) -> bool:
        """An instruction that came out to us. False: it's still to be executed."""
        handler = instructions.TABLE.get(code)
        if handler is None:  # IRET or POPF, watched for a moment: let it pass
            if code == engine.IRET:
                self._events.nmi_masked = 0
            self._passing = True
            return False
        self.vm.scheduler.charge()
        trap = self.cpu.rflags & RFLAGS_TF
        try:
            handler(self, instructions.at_rip(self))
        except Fault as fault:
            return self._deliver(delivery.exception(self.cpu, fault.vector, fault.error_code or 0))
        self.cpu.hflags &= ~HF_INHIBIT_IRQ
        self.engine.commit(flush=self.paging_changed)
        self.paging_changed = False
        if trap:
            self.cpu.dr[6] |= _DR6_SINGLE_STEP
            return self._deliver(delivery.exception(self.cpu, delivery.DB))
        return True


_GET: dict[str, Callable[[SoftwareVcpu, bytes], bytes]] = {
    "KVM_GET_REGS": SoftwareVcpu._get_regs,
    "KVM_GET_SREGS": SoftwareVcpu._get_sregs,
    "KVM_GET_SREGS2": SoftwareVcpu._get_sregs,
    "KVM_GET_XSAVE": SoftwareVcpu._get_xsave,
    "KVM_GET_XCRS": SoftwareVcpu._get_xcrs,
    "KVM_GET_LAPIC": SoftwareVcpu._get_lapic,
    "KVM_GET_MSRS": SoftwareVcpu._get_msrs,
    "KVM_GET_DEVICE_ATTR": SoftwareVcpu._get_tsc_offset,
    "KVM_GET_VCPU_EVENTS": SoftwareVcpu._get_events,
    "KVM_GET_MP_STATE": SoftwareVcpu._get_mp_state,
    "KVM_GET_DEBUGREGS": SoftwareVcpu._get_debugregs,
}
_PUT: dict[str, Callable[[SoftwareVcpu, bytes], None]] = {
    "KVM_SET_CPUID2": SoftwareVcpu._put_cpuid,
    "KVM_SET_REGS": SoftwareVcpu._put_regs,
    "KVM_SET_SREGS": SoftwareVcpu._put_sregs,
    "KVM_SET_SREGS2": SoftwareVcpu._put_sregs,
    "KVM_SET_XSAVE": SoftwareVcpu._put_xsave,
    "KVM_SET_XCRS": SoftwareVcpu._put_xcrs,
    "KVM_SET_LAPIC": SoftwareVcpu._put_lapic,
    "KVM_SET_MSRS": SoftwareVcpu._put_msrs,
    "KVM_SET_DEVICE_ATTR": SoftwareVcpu._put_tsc_offset,
    "KVM_SET_VCPU_EVENTS": SoftwareVcpu._put_events,
    "KVM_SET_MP_STATE": SoftwareVcpu._put_mp_state,
    "KVM_SET_DEBUGREGS": SoftwareVcpu._put_debugregs,
    "KVM_SET_GUEST_DEBUG": SoftwareVcpu._put_guest_debug,
}
