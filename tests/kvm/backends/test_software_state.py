"""The software backend's substates and their rules, its memory slots, traces and injected faults."""

from __future__ import annotations

import ctypes
import errno
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvm.backends.interface import PAGE_SIZE, ExitKind
from kvm.backends.software import calibration, context
from kvm.backends.software.limits import LIMITS
from kvm.backends.software.system import SoftwareSystem
from kvm.errors import BackendUnavailable, KvmError, SubstateError
from kvm.host_memory import anonymous
from kvm.x86.structs import (
    EVENT_VALID_NMI_PENDING,
    EVENT_VALID_SHADOW,
    EVENT_VALID_SIPI_VECTOR,
    EVENT_VALID_SMM,
    MP_STATE_INIT_RECEIVED,
    MP_STATE_RUNNABLE,
    MP_STATE_SIPI_RECEIVED,
    MP_STATE_UNINITIALIZED,
    ClockData,
    DebugRegs,
    MpState,
    Regs,
    VcpuEvents,
    Xsave,
    pack_cpuid,
    pack_msrs,
    unpack_msrs,
)
from tests.kvm.backends.software import MEMORY, ORIGIN, Guest

Make = Callable[..., Guest]

BUSY = """
    fninit; fldpi; fld1
    mov $0x3ff8000000000000, %rax; movq %rax, %xmm7
    mov $0xfee00000, %ebp; std; stc
    out %al, $0xf4"""


def refused(guest: Guest, name: str, value: object, vcpu: int = 0) -> SubstateError:
    with pytest.raises(SubstateError) as caught:
        guest.put(vcpu, **{name: value})
    assert caught.value.substate == name
    assert caught.value.errno == errno.EINVAL
    return caught.value


# Round trips


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_every_substate_comes_back_as_it_was_put(make: Make, mode: str) -> None:
    guest = make(BUSY if mode == "long" else "nop; out %al, $0xf4", mode, vcpus=2)
    guest.run([0])
    for index in range(2):
        rows = guest.table.get_order
        first = guest.vcpus[index].get(rows)
        guest.vcpus[index].put(rows, first)
        assert guest.vcpus[index].get(rows) == first
    machine = guest.vm.get(guest.machine_rows)
    raws = [row.at(raw, row.level) for row, raw in zip(guest.machine_rows, machine, strict=True)]
    guest.vm.put(guest.machine_rows, raws)
    assert guest.vm.get(guest.machine_rows) == machine


def test_what_is_put_is_got_field_by_field(make: Make) -> None:
    guest = make(mode="long")
    regs = Regs(*range(0x1000, 0x1010), 0x7000, 0x246)
    guest.put(0, regs=regs)
    assert guest.get(0, "regs") == bytes(regs)
    sregs = guest.sregs()
    sregs.fs.base, sregs.ldt.base, sregs.ldt.limit, sregs.cr2, sregs.cr8 = 0x1_2345_6789, 0x7777, 0x37, 0xABC, 7
    sregs.gs.unusable, sregs.gs.present = 1, 0
    guest.put(0, sregs=sregs)
    assert guest.get(0, "sregs") == bytes(sregs)
    debugregs = DebugRegs((ctypes.c_uint64 * 4)(1, 2, 3, 4), 0xFFFF0FF1, 0x455)
    guest.put(0, debugregs=debugregs)
    assert guest.get(0, "debugregs") == bytes(debugregs)


def test_the_guest_sees_what_was_put_into_fpu_and_sse(make: Make) -> None:
    guest = make(
        "fistpl 0x6000; fistpl 0x6004; movq %xmm1, 0x6008; stmxcsr 0x6010; fnstcw 0x6014; out %al, $0xf4", "long"
    )
    area = Xsave(fcw=0x37F, mxcsr=0x3F80, fsw=6 << 11, ftw=0xC0, xstate_bv=3)
    for number, exponent in ((0, 0x4002), (1, 0x4003)):  # 8.0, 16.0
        area.st[number][:10] = list((1 << 63).to_bytes(8, "little") + exponent.to_bytes(2, "little"))
    area.xmm[1][:8] = list(b"sse data")
    guest.put(0, xsave=bytes(area).ljust(4096, b"\0"))
    guest.run()
    assert (guest.u32(0x6000), guest.u32(0x6004)) == (8, 16)
    assert guest.read(0x6008, 8) == b"sse data"
    assert (guest.u32(0x6010), guest.u32(0x6014) & 0xFFFF) == (0x3F80, 0x37F)


def test_the_rounding_mode_of_a_put_control_word_counts(make: Make) -> None:
    source = "fldl 0x6000; fistpl 0x6008; cvtsd2si 0x6000, %eax; mov %eax, 0x600c; out %al, $0xf4"
    found = []
    for fcw, mxcsr in ((0x37F, 0x1F80), (0xB7F, 0x5F80)):  # to the nearest; up
        guest = make(source, "long")
        guest.write(0x6000, np.float64(2.25).tobytes())
        guest.put(0, xsave=bytes(Xsave(fcw=fcw, mxcsr=mxcsr, xstate_bv=3)).ljust(4096, b"\0"))
        guest.run()
        found.append((guest.u32(0x6008), guest.u32(0x600C)))
    assert found == [(2, 2), (3, 3)]


def test_a_part_that_xstate_bv_leaves_out_gets_its_initial_state(make: Make) -> None:
    guest = make(BUSY, "long")
    guest.run()
    area = Xsave.from_buffer_copy(guest.get(0, "xsave"))
    assert area.ftw
    assert any(bytes(area.xmm[7]))
    area.xstate_bv = 0
    guest.put(0, xsave=bytes(area).ljust(4096, b"\0"))
    area = Xsave.from_buffer_copy(guest.get(0, "xsave"))
    assert (area.fcw, area.ftw, any(bytes(area.xmm[7]))) == (0x37F, 0, False)


# The kernel's rules


def test_set_regs_clears_a_pending_exception(make: Make) -> None:
    guest = make("out %al, $0xf4", "long")
    injected = VcpuEvents(exception_injected=1, exception_nr=6)
    guest.put(0, events=injected)
    assert guest.events().exception_injected
    guest.put(0, regs=guest.regs())
    assert not guest.events().exception_injected
    guest.run()
    assert guest.regs().rip == ORIGIN + 2


@pytest.mark.parametrize(
    ("events", "vector"),
    [
        (VcpuEvents(exception_injected=1, exception_nr=13, exception_has_error_code=1, exception_error_code=0x18), 13),
        (VcpuEvents(interrupt_injected=1, interrupt_nr=0x77), 0x77),
        (VcpuEvents(nmi_pending=1, flags=EVENT_VALID_NMI_PENDING), 2),
    ],
)
def test_what_is_injected_by_events_arrives(make: Make, events: VcpuEvents, vector: int) -> None:
    guest = make("nop", "long")
    guest.put(0, events=events)
    guest.run()
    got = guest.frame(3)
    assert got == [vector, events.exception_error_code, ORIGIN]


def test_events_parts_without_their_flag_stay_the_kernels(make: Make) -> None:
    guest = make("nop", "long", vcpus=2)
    guest.put(
        0, events=VcpuEvents(nmi_pending=1, interrupt_shadow=1, flags=EVENT_VALID_NMI_PENDING | EVENT_VALID_SHADOW)
    )
    guest.put(0, events=VcpuEvents())
    events = guest.events()
    assert (events.nmi_pending, events.interrupt_shadow) == (1, 1)
    assert events.flags == EVENT_VALID_NMI_PENDING | EVENT_VALID_SHADOW | EVENT_VALID_SMM
    guest.put(0, events=VcpuEvents(flags=EVENT_VALID_NMI_PENDING | EVENT_VALID_SHADOW))
    events = guest.events()
    assert (events.nmi_pending, events.interrupt_shadow) == (0, 0)


INIT_ONLY = (
    ".code32\n mov $0xfee00000, %ebp; movl $0xc4500, 0x300(%ebp); out %al, $0xf4; movl $0xc4602, 0x300(%ebp)\n1: jmp 1b"
)


def test_a_latched_init_survives_a_look_but_not_a_put_with_the_smm_flag(make: Make) -> None:
    for flags, lost in ((0, False), (EVENT_VALID_SMM, True)):
        guest = make(INIT_ONLY, "protected", vcpus=2)
        guest.run([0])
        events = guest.events(1)
        assert events.smi_latched_init, "sent, but VCPU 1 isn't running to take it"
        events.flags, events.smi_latched_init = flags, 0
        guest.put(1, events=events)
        assert guest.mp_state(1) == (MP_STATE_UNINITIALIZED if lost else MP_STATE_INIT_RECEIVED)


def test_reading_mp_state_takes_a_pending_init(make: Make) -> None:
    guest = make(INIT_ONLY, "protected", vcpus=2)
    guest.put(1, regs=Regs(rip=0x1234, rflags=2, rax=5))
    guest.run([0])
    assert guest.regs(1).rip == 0x1234
    assert guest.mp_state(1) == MP_STATE_INIT_RECEIVED
    assert (guest.regs(1).rip, guest.regs(1).rax) == (0xFFF0, 0)
    assert guest.regs(1).rdx == 0x306C4
    assert not guest.events(1).smi_latched_init


def test_a_sipi_put_by_the_machine_starts_the_ap(make: Make) -> None:
    guest = make(".code16\n 1: jmp 1b", vcpus=2)
    guest.put(1, events=VcpuEvents(sipi_vector=2, flags=EVENT_VALID_SIPI_VECTOR))
    guest.put(1, mp_state=MpState(MP_STATE_SIPI_RECEIVED))
    assert guest.mp_state(1) == MP_STATE_RUNNABLE, "as on KVM"
    assert (guest.regs(1).rip, guest.sregs(1).cs.base, guest.sregs(1).cs.selector) == (0, 0x2000, 0x200)
    guest.run()
    assert guest.regs(1).rip == 2


def test_the_sipi_vector_without_its_flag_is_ignored(make: Make) -> None:
    guest = make(vcpus=2)
    guest.put(1, events=VcpuEvents(sipi_vector=2, flags=EVENT_VALID_SIPI_VECTOR))
    guest.put(1, events=VcpuEvents(sipi_vector=9))
    guest.put(1, mp_state=MpState(MP_STATE_SIPI_RECEIVED))
    guest.mp_state(1)
    assert guest.sregs(1).cs.base == 0x2000


def test_cpuid_is_fixed_by_the_first_run(make: Make) -> None:
    guest = make("nop; out %al, $0xf4", "long")
    entries = guest.system.cpuid()
    guest.run()
    guest.put(0, cpuid=pack_cpuid(entries))
    entries[1].ecx ^= 1
    error = refused(guest, "cpuid", pack_cpuid(entries))
    assert "first run" in str(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("efer", 0x500),
        ("cr0", 0x80000010),
        ("cr0", 1 << 32 | 0x11),
        ("cr0", 0x20000011),
        ("cr4", 1 << 30),
        ("efer", 0x1001),
    ],
)
def test_sregs_that_no_processor_takes_are_refused(make: Make, field: str, value: int) -> None:
    guest = make(mode="protected")
    before = guest.get(0, "sregs")
    sregs = guest.sregs()
    setattr(sregs, field, value)
    error = refused(guest, "sregs", sregs)
    assert field in str(error)
    assert guest.get(0, "sregs") == before


def test_other_states_that_are_refused(make: Make) -> None:
    guest = make(mode="long")
    refused(guest, "mp_state", MpState(9))
    refused(guest, "events", VcpuEvents(flags=0x80))
    refused(guest, "events", VcpuEvents(exception_injected=1, exception_nr=40))
    refused(guest, "events", VcpuEvents(smi_smm=1, flags=EVENT_VALID_SMM))
    refused(guest, "debugregs", DebugRegs(dr7=1 << 40))
    refused(guest, "xsave", bytes(Xsave(mxcsr=1 << 20, xstate_bv=3)).ljust(4096, b"\0"))
    refused(guest, "xsave", bytes(Xsave(xstate_bv=7)).ljust(4096, b"\0"))


def test_a_bad_msr_in_the_middle_is_named_and_ends_the_list(make: Make) -> None:
    guest = make()
    row = guest.table.by_name["msrs"]
    with pytest.raises(SubstateError, match=r"0x12345 = 0x77") as caught:
        guest.vcpus[0].put([row], [pack_msrs({0x174: 1, 0x12345: 0x77, 0x175: 2})])
    assert caught.value.errno == errno.EINVAL
    assert (guest.msrs()[0x174], guest.msrs()[0x175]) == (1, 0), "those before it were written, those after not"


def test_a_failing_row_says_how_many_went_before(make: Make) -> None:
    guest = make()
    rows = guest.table.by_name
    good, bad = bytes(Regs(rip=0x55, rflags=2)), bytes(MpState(9))
    with pytest.raises(SubstateError) as caught:
        guest.vcpus[0].put([rows["regs"], rows["mp_state"], rows["regs"]], [good, bad, bytes(Regs(rip=1))])
    assert caught.value.moved == 1
    assert guest.regs().rip == 0x55


def test_every_msr_of_the_rows_holds_what_was_put(make: Make) -> None:
    guest = make(mode="long")
    for name in ("msrs", "msrs_reset"):
        values = {index: 0x1000 + index if index not in (0x277, 0x10) else 0x0606060606060606 for index in
                  unpack_msrs(guest.table.by_name[name].template)}  # fmt: skip
        guest.put(0, **{name: pack_msrs({index: value & 0xFFFFFFFF for index, value in values.items()})})
        assert unpack_msrs(guest.get(0, name)) == {index: value & 0xFFFFFFFF for index, value in values.items()}


def test_the_tsc_is_set_exactly_and_runs_on(make: Make) -> None:
    guest = make("rdtsc; mov %edx, 0x6000; out %al, $0xf4", "long")
    guest.put(0, msrs_reset=pack_msrs({0x10: 7 << 32}))
    assert unpack_msrs(guest.get(0, "msrs_reset"))[0x10] == 7 << 32
    guest.run()
    assert guest.u32(0x6000) == 7


def test_an_armed_deadline_stands_where_it_is_on_a_tsc_that_is_set(make: Make) -> None:
    """A TSC younger than the VM, as after a reset, has an offset below zero: its deadline isn't over for that."""
    guest = make("out %al, $0xf4", "long")
    guest.vm.scheduler.set_time(1_000_000_000)  # type: ignore[attr-defined]
    page = bytearray(guest.get(0, "lapic"))
    for register, value in ((0xF0, 0x1FF), (0x320, 2 << 17 | 0x60)):  # software enable; TSC-deadline mode
        page[register : register + 4] = value.to_bytes(4, "little")
    guest.put(0, lapic=bytes(page), msrs_reset=pack_msrs({0x10: 0}))
    guest.put(0, tsc_deadline=pack_msrs({0x6E0: 50_000}))
    guest.run()
    assert unpack_msrs(guest.get(0, "tsc_deadline")) == {0x6E0: 50_000}
    assert int.from_bytes(guest.get(0, "tsc_offset"), "little", signed=True) == -1_000_000_000
    ahead = (-1_000_000_000 + 60_000) % (1 << 64)
    guest.put(0, tsc_offset=ahead.to_bytes(8, "little"))
    assert unpack_msrs(guest.get(0, "msrs_reset"))[0x10] > 60_000
    guest.run()
    assert unpack_msrs(guest.get(0, "tsc_deadline")) == {0x6E0: 0}


def test_the_clock_is_set_and_neither_tsc_nor_apic_timer_notice(make: Make) -> None:
    guest = make()
    (clock_row,) = [row for row in guest.machine_rows if row.name == "clock"]
    guest.put(0, lapic=_with_timer(guest, 100_000))
    before = [guest.get(0, "lapic"), guest.get(0, "msrs_reset")]
    guest.vm.put([clock_row], [bytes(ClockData(clock=123_456_789))])
    assert ClockData.from_buffer_copy(guest.vm.get([clock_row])[0]).clock == 123_456_789
    assert [guest.get(0, "lapic"), guest.get(0, "msrs_reset")] == before


def _with_timer(guest: Guest, count: int) -> bytes:
    page = bytearray(guest.get(0, "lapic"))
    for register, value in ((0xF0, 0x1FF), (0x320, 0x60), (0x380, count), (0x390, count), (0x3E0, 0xB)):
        page[register : register + 4] = value.to_bytes(4, "little")
    return bytes(page)


def test_the_owner_alone_may_touch_a_bound_vcpu(make: Make) -> None:
    guest = make()
    guest.regs()  # before it is bound, anybody may
    binder = threading.Thread(target=guest.vcpus[0].bind)
    binder.start()
    binder.join()
    with pytest.raises(AssertionError, match="another thread"):
        guest.regs()
    guest.vcpus[0].bind()
    guest.regs()


# Memory


def test_a_readonly_slot_is_read_and_run_and_its_writes_go_to_the_bus(make: Make) -> None:
    guest = make(
        """
        mov $0x30000000, %ebx; mov (%rbx), %eax
        movw $0x1234, 2(%rbx)
        mov $0x30000000, %edi; mov $3, %ecx; mov $0x55, %al; rep stosb
        mov (%rbx), %edx
        call *%rsi
        out %al, $0xf4""",
        "long",
    )
    rom = anonymous(2 * PAGE_SIZE)
    rom[:4], rom[PAGE_SIZE] = b"ROM!", 0xC3
    guest.vm.set_memory(1, 0x30000000, rom, readonly=True)
    regs = guest.regs()
    regs.rsi = 0x30001000
    guest.put(0, regs=regs)
    guest.run()
    assert guest.regs().rdx.to_bytes(4, "little") == b"ROM!"
    assert rom[:4] == b"ROM!"
    assert guest.bus.seen == [
        ("write", 0x30000002, 2, 0x1234),
        *(("write", 0x30000000 + at, 1, 0x55) for at in range(3)),
    ]
    assert rom[PAGE_SIZE - 1] == 0


def test_slots_are_checked(make: Make) -> None:
    guest = make()
    pages = anonymous(4 * PAGE_SIZE)
    for address, code in ((MEMORY - PAGE_SIZE, errno.EEXIST), (MEMORY + 1, errno.EINVAL), (1 << 39, errno.EINVAL)):
        with pytest.raises(KvmError) as caught:
            guest.vm.set_memory(1, address, pages)
        assert caught.value.errno == code
    guest.vm.set_memory(1, MEMORY, pages)
    with pytest.raises(KvmError):
        guest.vm.dirty_pages(1)
    with pytest.raises(KvmError):
        guest.vm.dirty_pages(7)


def test_dirty_pages_are_those_that_the_guest_wrote_since(make: Make) -> None:
    guest = make("movb $1, 0x7000; movb $2, 0x1ff000; out %al, $0xf4; movb $3, 0x7000; out %al, $0xf4", "long")
    guest.vm.set_memory(0, 0, guest.memory, log_dirty=True)
    assert list(guest.vm.dirty_pages(0)) == []
    guest.run()
    assert set(guest.vm.dirty_pages(0)) == {7, 0x1FF, 0x10, 0x11, 0x12} - _unchanged(guest)
    assert list(guest.vm.dirty_pages(0)) == []
    guest.run()
    assert list(guest.vm.dirty_pages(0)) == [7]


def _unchanged(guest: Guest) -> set[int]:
    """Page-table pages whose accessed bits had been set before."""
    return {page for page in (0x10, 0x11, 0x12) if not guest.read(page << 12, 1)[0] & 0x20}


def test_two_slots_each_have_their_own_dirty_pages(make: Make) -> None:
    guest = make("movb $1, 0x30003000; out %al, $0xf4", "long")
    more = anonymous(8 * PAGE_SIZE)
    guest.vm.set_memory(1, 0x30000000, more, log_dirty=True)
    guest.run()
    assert list(guest.vm.dirty_pages(1)) == [3]


def test_code_that_the_host_has_rewritten_is_seen_after_memory_changed(make: Make) -> None:
    guest = make("mov $1, %al; out %al, $0x80; out %al, $0xf4; jmp _start", "long", vcpus=2)
    guest.run([0])
    guest.memory[ORIGIN + 1] = 2
    guest.vm.memory_changed()
    guest.run([0])
    assert guest.bus.values(0x80) == [1, 2]


def test_guest_memory_is_the_callers_again_after_close() -> None:
    guest = Guest("nop; out %al, $0xf4", "long")
    guest.vm.set_memory(0, 0, guest.memory, log_dirty=True)
    guest.run()
    guest.vm.dirty_pages(0)
    guest.close()
    assert guest.memory.closed


# The system


def test_every_ioctl_is_traced_with_its_substate_vcpu_and_thread(make: Make) -> None:
    guest = make("nop; out %al, $0xf4", "long")
    guest.system.trace = []
    guest.regs()
    guest.run()
    guest.vm.irq_line(4, False)
    me = threading.get_ident()
    seen = [(entry.ioctl, entry.substate, entry.vcpu, entry.thread == me) for entry in guest.system.trace]
    assert seen == [
        ("KVM_GET_REGS", "regs", 0, True),
        ("KVM_RUN", "", 0, False),
        ("KVM_IRQ_LINE", "", None, True),
    ]


def test_a_fault_injected_for_a_test_fails_that_ioctl_alone(make: Make) -> None:
    guest = make("nop; out %al, $0xf4", "long")
    guest.system.fault = lambda ioctl, substate, vcpu: errno.EIO if (ioctl, vcpu) == ("KVM_SET_REGS", 0) else 0
    with pytest.raises(SubstateError) as caught:
        guest.put(0, events=VcpuEvents(), regs=Regs())
    assert (caught.value.errno, caught.value.moved, caught.value.vcpu) == (errno.EIO, 1, 0)
    guest.system.fault = lambda ioctl, substate, vcpu: errno.EINTR if ioctl == "KVM_RUN" else 0
    with pytest.raises(KvmError, match="KVM_RUN"):
        guest.vcpus[0].run(guest.bus)
    guest.system.fault = None
    assert guest.run()[0].kind is ExitKind.KICKED


def test_the_order_of_creation_is_checked() -> None:
    vm = SoftwareSystem().create_vm()
    vcpu = vm.create_vcpu(0)
    for bad in (vm.create_irqchip, lambda: vm.create_vcpu(0), lambda: vm.create_vcpu(7), lambda: vm.irq_line(1, True)):
        with pytest.raises(KvmError):
            bad()
    vcpu.close()
    vm.close()


def test_a_unicorn_laid_out_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration.counter_offsets.cache_clear()
    monkeypatch.setattr(context, "HEADER", context.HEADER + 8)
    with pytest.raises(BackendUnavailable, match=r"pip install unicorn==2\.1\.4"):
        calibration.counter_offsets()
    monkeypatch.undo()
    calibration.counter_offsets()


def test_the_limits_are_a_table_of_short_lines() -> None:
    assert len({what for what, _ in LIMITS}) == len(LIMITS)
    assert all(what and consequence and len(consequence) < 120 for what, consequence in LIMITS)


# Firmware

FOLDER = Path("/usr/share/seabios")


@pytest.mark.parametrize("name", ["bios.bin", "bios-microvm.bin"])
def test_seabios_prints_its_banner(make: Make, name: str) -> None:
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"Debian's package seabios is not installed: {path} is missing")
    image = path.read_bytes()
    rom = anonymous(len(image))
    rom[:] = image
    guest = make()
    guest.vm.set_memory(1, (1 << 32) - len(image), rom, readonly=True)
    guest.write(0xE0000, image[-(128 << 10) :])
    sregs = guest.sregs()
    sregs.cs.selector, sregs.cs.base = 0xF000, 0xFFFF0000
    guest.put(0, sregs=sregs, regs=Regs(rip=0xFFF0, rflags=2))
    said = bytearray()

    def listen(value: int) -> None:
        said.append(value)
        if b"SeaBIOS (version" in said:
            guest.stop()

    guest.bus.hooks[0x402] = listen
    guest.bus.reads[0x402] = 0xE9
    guest.run()
    assert b"SeaBIOS (version" in said
