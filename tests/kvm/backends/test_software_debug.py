"""Single steps and breakpoints of the software backend, as KVM_SET_GUEST_DEBUG has them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from kvm.backends.interface import ExitKind
from kvm.x86.structs import (
    GUESTDBG_BLOCKIRQ,
    GUESTDBG_ENABLE,
    GUESTDBG_SINGLESTEP,
    GUESTDBG_USE_HW_BP,
    GUESTDBG_USE_SW_BP,
    MP_STATE_HALTED,
)
from tests.kvm.backends.software import ORIGIN, STUBS, Guest

Make = Callable[..., Guest]

STEP = GUESTDBG_ENABLE | GUESTDBG_SINGLESTEP
BREAK = GUESTDBG_ENABLE | GUESTDBG_USE_HW_BP
SINGLE_STEP_DR6 = 0xFFFF4FF0
APIC = "mov $0xfee00000, %ebp\n movl $0x1ff, 0xf0(%ebp)\n"


def rips(guest: Guest, count: int) -> list[int]:
    """RIP after each of so many steps, relative to ORIGIN."""
    found = []
    for _ in range(count):
        ended = guest.step()
        assert (ended.kind, ended.code) == (ExitKind.DEBUG, SINGLE_STEP_DR6)
        found.append(guest.regs().rip - ORIGIN)
    return found


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_a_step_is_one_instruction(make: Make, mode: str) -> None:
    bits = {"real": 16, "protected": 32, "long": 64}[mode]
    guest = make(f".code{bits}\n nop; mov $7, %al; 1: jmp 1b", mode)
    guest.debug(STEP)
    assert rips(guest, 4) == [1, 3, 3, 3]
    assert guest.regs().rax & 0xFF == 7


def test_a_step_over_a_fault_ends_at_the_handlers_first_instruction(make: Make) -> None:
    guest = make("ud2", "long")
    guest.debug(STEP)
    assert rips(guest, 1) == [STUBS + 6 * 16 - ORIGIN]
    assert guest.regs().rsp == 0x8000 - 40


def test_a_step_over_an_int_instruction(make: Make) -> None:
    guest = make("int $0x40", "long")
    guest.debug(STEP)
    assert rips(guest, 1) == [STUBS + 0x40 * 16 - ORIGIN]


def test_each_round_of_a_string_instruction_is_a_step(make: Make) -> None:
    guest = make("mov $3, %ecx; mov $0x6000, %esi; mov $0x6100, %edi; rep movsb; nop", "long")
    guest.write(0x6000, b"abc")
    guest.debug(STEP)
    assert rips(guest, 3) == [5, 10, 15]
    assert rips(guest, 2) == [15, 15]
    assert (guest.regs().rcx, guest.read(0x6100, 4)) == (1, b"ab\0\0")
    while guest.regs().rcx:
        rips(guest, 1)
    assert guest.read(0x6100, 4) == b"abc\0"


def test_string_io_steps_once_an_element(make: Make) -> None:
    guest = make(".code16\n mov $2, %cx; mov $0x6000, %di; mov $0x510, %dx; rep insb; nop")
    guest.bus.reads[0x510] = 0x41
    guest.debug(STEP)
    rips(guest, 4)
    assert (guest.regs().rcx, guest.read(0x6000, 3)) == (1, b"A\0\0")
    rips(guest, 1)
    assert (guest.regs().rcx, guest.read(0x6000, 3)) == (0, b"AA\0")


@pytest.mark.parametrize(("source", "length"), [("sti", 1), ("mov %eax, %ss", 2), ("pop %ss", 1)])
def test_steps_see_the_shadow_of_sti_and_of_loading_ss(make: Make, source: str, length: int) -> None:
    guest = make(f".code32\n push %ss; mov %ss, %eax; {source}; nop; nop", "protected")
    guest.debug(STEP)
    assert rips(guest, 3) == [1, 3, 3 + length]
    assert guest.events().interrupt_shadow
    assert rips(guest, 1) == [4 + length]
    assert not guest.events().interrupt_shadow


def test_of_two_instructions_with_a_shadow_only_the_first_casts_it(make: Make) -> None:
    guest = make(".code32\n push %ss; sti; pop %ss; nop", "protected")
    guest.debug(STEP)
    rips(guest, 2)
    assert guest.events().interrupt_shadow
    rips(guest, 1)
    assert not guest.events().interrupt_shadow


def test_an_interrupt_waits_for_the_shadow_to_pass(make: Make) -> None:
    guest = make(f".code32\n {APIC} nop; nop; nop", "protected")
    guest.put(0, regs=_with(guest, rflags=0x202))
    guest.debug(STEP)
    rips(guest, 2)
    events = guest.events()
    events.interrupt_shadow = 1
    guest.put(0, lapic=_requested(guest, 0x50), events=events)
    assert rips(guest, 1) == [16]
    assert rips(guest, 1)[0] == STUBS + 0x50 * 16 + 2 - ORIGIN, "delivered, and one instruction of the handler"


def _requested(guest: Guest, vector: int) -> bytes:
    page = bytearray(guest.get(0, "lapic"))
    page[0x200 + vector // 32 * 16 + vector % 32 // 8] |= 1 << vector % 8
    return bytes(page)


def test_blockirq_keeps_interrupts_away(make: Make) -> None:
    guest = make(f".code32\n {APIC} nop; nop; nop; nop", "protected")
    guest.put(0, regs=_with(guest, rflags=0x202))
    guest.debug(STEP | GUESTDBG_BLOCKIRQ)
    rips(guest, 2)
    guest.put(0, lapic=_requested(guest, 0x50))
    assert rips(guest, 2) == [16, 17]
    guest.debug(STEP)
    assert rips(guest, 1)[0] == STUBS + 0x50 * 16 + 2 - ORIGIN


@pytest.mark.parametrize(
    ("source", "length"),
    [("cpuid", 2), ("rdtsc", 2), ("pause", 2), ("mov %cr8, %r11", 4), ("mov $0x10, %cl; rdmsr", 2), ("out %al, $9", 2)],
)
def test_instructions_that_leave_the_emulator_are_one_step(make: Make, source: str, length: int) -> None:
    guest = make(f"{source}; nop", "long")
    guest.put(0, regs=_with(guest, rcx=0))
    guest.debug(STEP)
    if ";" in source:
        assert rips(guest, 1) == [2]
        assert rips(guest, 1) == [2 + length]
    else:
        assert rips(guest, 1) == [length]


def _with(guest: Guest, **values: int) -> object:
    regs = guest.regs()
    for name, value in values.items():
        setattr(regs, name, value)
    return regs


def test_a_step_over_mmio(make: Make) -> None:
    guest = make("mov $0x10000000, %ebx; movb $3, (%rbx); nop", "long")
    guest.debug(STEP)
    assert rips(guest, 2) == [5, 8]
    assert guest.bus.seen == [("write", 0x10000000, 1, 3)]


def test_a_step_over_hlt_then_waits_and_can_be_kicked(make: Make) -> None:
    guest = make(".code16\n cli; hlt")
    guest.debug(STEP)
    assert rips(guest, 2) == [1, 2]
    assert guest.mp_state() == MP_STATE_HALTED
    kicker = threading.Timer(0.05, guest.vcpus[0].kick)
    kicker.start()
    assert guest.step().kind is ExitKind.KICKED
    kicker.join()


def test_stepping_computes_what_running_computes(make: Make) -> None:
    source = """
        mov $40, %ecx; xor %eax, %eax
    1:  imul $0x41c64e6d, %eax, %eax; add %ecx, %eax; mov %eax, 0x6000(, %rcx, 4); rdtsc; out %al, $0x80
        loop 1b
        out %al, $0xf4"""
    stepped, run = make(source, "long"), make(source, "long")
    ended = threading.Event()
    stepped.bus.hooks[0xF4] = lambda value: ended.set()
    stepped.debug(STEP)
    while not ended.is_set():
        assert stepped.step().kind is ExitKind.DEBUG
    run.run()
    assert stepped.memory[:] == run.memory[:]
    assert stepped.bus.values(0x80) == run.bus.values(0x80), "even the TSC"


def test_only_the_vcpu_that_steps_moves(make: Make) -> None:
    guest = make(".code16\n 1: inc %eax; jmp 1b", vcpus=2)
    guest.enter(1)
    guest.debug(STEP, vcpu=1)
    for count in range(1, 4):
        assert guest.step(1).kind is ExitKind.DEBUG
        assert guest.regs(1).rip == ORIGIN + (2 if count % 2 else 0)
    assert guest.regs(0).rip == ORIGIN


def test_a_breakpoint_stops_before_its_instruction_again_and_again(make: Make) -> None:
    guest = make("mov $5, %ecx; 1: inc %eax; loop 1b; out %al, $0xf4", "long")
    guest.put(0, regs=_with(guest, rax=0))
    guest.debug(BREAK, ORIGIN + 5)
    for round in range(5):
        ended = guest.step()
        assert (ended.kind, ended.code & 0xF) == (ExitKind.DEBUG, 1)
        assert (guest.regs().rip, guest.regs().rax) == (ORIGIN + 5, round)
        assert guest.step().kind is ExitKind.DEBUG, "it is met again: step off it with the breakpoint away"
        guest.debug(STEP)
        assert rips(guest, 1) == [7]
        guest.debug(BREAK, ORIGIN + 5)
    assert guest.step().kind is ExitKind.KICKED
    assert guest.regs().rax & 0xFF == 5


def test_four_breakpoints_each_by_its_number(make: Make) -> None:
    guest = make("nop; nop; nop; nop; nop; nop; out %al, $0xf4", "long")
    addresses = [ORIGIN + at for at in (4, 1, 3, 2)]
    met = []
    for _ in range(4):
        guest.debug(BREAK, *addresses)
        ended = guest.step()
        met.append((ended.code & 0xF, guest.regs().rip - ORIGIN))
        guest.debug(STEP)
        rips(guest, 1)
    assert met == [(2, 1), (8, 2), (4, 3), (1, 4)]
    guest.debug(0)
    assert guest.step().kind is ExitKind.KICKED


def test_rf_lets_one_instruction_pass_its_breakpoint(make: Make) -> None:
    guest = make("nop; nop; out %al, $0xf4", "long")
    guest.debug(BREAK, ORIGIN)
    guest.put(0, regs=_with(guest, rflags=0x10002))
    assert guest.step().kind is ExitKind.KICKED


def test_a_breakpoint_in_real_mode_counts_the_segments_base(make: Make) -> None:
    guest = make(".code16\n ljmp $0x100, $2f - _start\n 2: nop; nop; out %al, $0xf4")
    guest.debug(BREAK, ORIGIN + 6)
    assert guest.step().kind is ExitKind.DEBUG
    assert (guest.regs().rip, guest.sregs().cs.base) == (6, ORIGIN)


def test_int3_as_a_software_breakpoint_is_for_the_debugger_only_if_asked(make: Make) -> None:
    guest = make("nop; int3; out %al, $0xf4\n .org HANDLER\n mov (%rsp), %al; out %al, $0x80; out %al, $0xf4", "long")
    guest.debug(GUESTDBG_ENABLE | GUESTDBG_USE_SW_BP)
    assert guest.step().kind is ExitKind.DEBUG
    assert guest.regs().rip == ORIGIN + 1
    guest.debug(0)
    assert guest.step().kind is ExitKind.KICKED
    assert guest.bus.values(0x80) == [3]
