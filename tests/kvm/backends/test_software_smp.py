"""The software backend's interrupt controllers, timers and scheduler: SMP start-up, IPIs, wake-ups, determinism."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable

import pytest

from kvm.backends.interface import ExitKind
from kvm.x86.structs import MP_STATE_HALTED, MP_STATE_RUNNABLE, MP_STATE_UNINITIALIZED
from tests.kvm.backends.software import ORIGIN, Guest
from tests.kvm.machines import until

Make = Callable[..., Guest]

APIC = "mov $0xfee00000, %ebp\n movl $0x1ff, 0xf0(%ebp)\n"
START_APS = APIC + "movl $0xc4500, 0x300(%ebp)\n movl $0xc4602, 0x300(%ebp)\n"
"""INIT, then SIPI with vector 2, to all but oneself."""
PICS = """
    mov $0x11, %al; out %al, $0x20; out %al, $0xa0
    mov $0x20, %al; out %al, $0x21; mov $0x28, %al; out %al, $0xa1
    mov $4, %al; out %al, $0x21; mov $2, %al; out %al, $0xa1
    mov $1, %al; out %al, $0x21; out %al, $0xa1
    mov ${mask}, %al; out %al, $0x21; mov $0xff, %al; out %al, $0xa1
"""
IOAPIC = """
    mov $0xfec00000, %edi
    movl ${low}, (%edi); movl ${value}, 0x10(%edi)
    movl ${high}, (%edi); movl $0, 0x10(%edi)
"""
PIT_1KHZ = "mov $0x34, %al; out %al, $0x43; mov $0xa9, %al; out %al, $0x40; mov $4, %al; out %al, $0x40\n"


def ioapic(pin: int, value: int) -> str:
    return IOAPIC.format(low=0x10 + 2 * pin, high=0x11 + 2 * pin, value=value)


COUNTING = f"""
    .set ROUNDS, 500
    .code32
    {START_APS}
    mov $ROUNDS, %ecx
1:  mov $1, %eax; lock xadd %eax, 0x6000
2:  mov $1, %eax; xchg %eax, 0x6004; test %eax, %eax; jnz 2b
    mov 0x6008, %eax; inc %eax; mov %eax, 0x6008
    movl $0, 0x6004
    loop 1b
3:  cmpl $3, 0x600c; jne 3b
    out %al, $0xf4
    .org HANDLER
    .code16
    mov $ROUNDS, %ecx
1:  mov $1, %eax; lock xadd %eax, 0x6000
2:  mov $1, %eax; xchg %eax, 0x6004; test %eax, %eax; jnz 2b
    mov 0x6008, %eax; inc %eax; mov %eax, 0x6008
    movl $0, 0x6004
    loopl 1b
    lock incl 0x600c
    cli; hlt"""


@pytest.mark.parametrize("slice", [1, 7, 1000])
def test_four_vcpus_count_with_lock_and_spinlock(make: Make, slice: int) -> None:
    guest = make(COUNTING, "protected", vcpus=4, slice=slice)
    assert [guest.mp_state(index) for index in range(4)] == [MP_STATE_RUNNABLE] + [MP_STATE_UNINITIALIZED] * 3
    assert {ended.kind for ended in guest.run()} == {ExitKind.KICKED}
    assert (guest.u32(0x6000), guest.u32(0x6008), guest.u32(0x600C)) == (2000, 2000, 3)
    assert [guest.mp_state(index) for index in range(1, 4)] == [MP_STATE_HALTED] * 3
    assert [guest.sregs(index).cs.base for index in range(1, 4)] == [0x2000] * 3


def test_a_sipi_without_init_is_ignored(make: Make) -> None:
    guest = make(f".code32\n{APIC} movl $0xc4602, 0x300(%ebp); mov $500, %ecx; 1: loop 1b; out %al, $0xf4", "protected",
                 vcpus=2)  # fmt: skip
    guest.run()
    assert guest.mp_state(1) == MP_STATE_UNINITIALIZED


IPI = f"""
    .code32
    {START_APS}
    mov $0x30, %edx
1:  cmpl $1, 0x6000; jne 1b
    {{send}}
2:  cmpl $2, 0x6000; jne 2b
    out %al, $0xf4
    .org HANDLER
    .code16
    movw $handler - _start + {ORIGIN:#x} - 0x2000, {{vector}} * 4
    movw $0x200, {{vector}} * 4 + 2
    mov $0xfee00000, %ebp; movl $0x1ff, 0xf0(%ebp); movl $0x02000000, 0xd0(%ebp)
    sti; movl $1, 0x6000
1:  hlt; jmp 1b
handler:
    movl $2, 0x6000
    iret"""


@pytest.mark.parametrize(
    ("send", "vector"),
    [
        ("movl $0x01000000, 0x310(%ebp); movl $0x4050, 0x300(%ebp)", 0x50),  # physical
        ("movl $0x02000000, 0x310(%ebp); movl $0x4850, 0x300(%ebp)", 0x50),  # logical, flat
        ("movl $0xff000000, 0x310(%ebp); movl $0x4850, 0x300(%ebp)", 0x50),
        ("movl $0xc4050, 0x300(%ebp)", 0x50),  # all but self
        ("movl $0xc4400, 0x300(%ebp)", 2),  # NMI
    ],
)
def test_an_ipi_reaches_whom_it_names(make: Make, send: str, vector: int) -> None:
    guest = make(IPI.format(send=send, vector=vector), "protected", vcpus=2)
    guest.run()
    assert guest.u32(0x6000) == 2


def test_a_self_ipi_arrives_before_the_next_instruction(make: Make) -> None:
    guest = make(
        f""".code32
        {APIC} sti; nop
        movl $0x44050, 0x300(%ebp)
        incl 0x6000
        out %al, $0xf4
        .org HANDLER
        mov 0x6000, %al; out %al, $0x80
        movl $0, 0xb0(%ebp)
        add $8, %esp; iret""",
        "protected",
    )
    guest.run()
    assert guest.bus.values(0x80) == [0]


def test_priorities_hold_an_interrupt_back_until_eoi_and_tpr_let_it(make: Make) -> None:
    guest = make(
        f""".code32
        {APIC} sti; nop
        movl $0x60, 0x80(%ebp)
        movl $0x44050, 0x300(%ebp); nop
        mov $1, %al; out %al, $0x80
        movl $0, 0x80(%ebp)
        mov $2, %al; out %al, $0x80
        out %al, $0xf4
        .org HANDLER
        pop %eax; out %al, $0x80
        cmp $0x50, %al; jne 1f
        sti; movl $0x44055, 0x300(%ebp); nop
        movl $0x44070, 0x300(%ebp); nop
    1:  movl $0, 0xb0(%ebp)
        add $4, %esp; iret""",
        "protected",
    )
    guest.run()
    assert guest.bus.values(0x80) == [1, 0x50, 0x70, 0x55, 2]


def test_the_apic_timer_ticks_periodically(make: Make) -> None:
    guest = make(
        f""".code32
        {APIC}
        movl $0xb, 0x3e0(%ebp); movl $0x20060, 0x320(%ebp); movl $50000, 0x380(%ebp)
        rdtsc; mov %eax, %ebx
        sti
    1:  hlt; cmpl $10, 0x6000; jne 1b
        rdtsc; sub %ebx, %eax; mov %eax, 0x6004
        out %al, $0xf4
        .org HANDLER
        incl 0x6000; movl $0, 0xb0(%ebp)
        add $8, %esp; iret""",
        "protected",
    )
    guest.run()
    assert guest.u32(0x6000) == 10
    assert 500_000 <= guest.u32(0x6004) < 505_000, "10 × 50,000 ns of virtual time"


def test_one_shot_and_tsc_deadline_fire_once(make: Make) -> None:
    guest = make(
        f""".code32
        {APIC}
        movl $0xb, 0x3e0(%ebp); movl $0x60, 0x320(%ebp); movl $5000, 0x380(%ebp)
        sti; hlt
        mov 0x390(%ebp), %eax; mov %eax, 0x6004
        movl $0x40061, 0x320(%ebp)
        rdtsc; add $20000, %eax; adc $0, %edx; mov $0x6e0, %ecx; wrmsr
        hlt
        rdmsr; mov %eax, 0x6008
        mov $20000, %ecx; 1: loop 1b
        out %al, $0xf4
        .org HANDLER
        pop %eax; out %al, $0x80
        movl $0, 0xb0(%ebp)
        add $4, %esp; iret""",
        "protected",
    )
    guest.write(0x6004, b"\xff" * 8)
    guest.run()
    assert guest.bus.values(0x80) == [0x60, 0x61]
    assert (guest.u32(0x6004), guest.u32(0x6008)) == (0, 0)


TICKS = """
    {set_up}
    sti
1:  hlt; cmpl $5, 0x6000; jne 1b
    out %al, $0xf4
    .org HANDLER
    pop %eax; out %al, $0x80; incl 0x6000
    {eoi}
    add $4, %esp; iret"""


@pytest.mark.parametrize("way", ["virtual wire", "I/O APIC"])
def test_the_pit_ticks(make: Make, way: str) -> None:
    if way == "virtual wire":
        set_up, eoi, vector = PICS.format(mask="0xfe"), "mov $0x20, %al; out %al, $0x20", 0x20
    else:
        set_up, eoi, vector = APIC + PICS.format(mask="0xff") + ioapic(0, 0x31), "movl $0, 0xb0(%ebp)", 0x31
    guest = make(".code32\n" + TICKS.format(set_up=PIT_1KHZ + set_up, eoi=eoi), "protected")
    guest.run()
    assert guest.bus.values(0x80) == [vector] * 5
    assert guest.vm.now() // 1_000_000 == 5, "5 ticks at 1 kHz"  # type: ignore[attr-defined]


@pytest.mark.parametrize("control", [0x30, 0x34])
def test_a_control_word_stops_the_pit_in_a_saved_state_too(make: Make, control: int) -> None:
    """Linux' way to switch it off (clockevent_i8253_disable): a copy of the machine must not see it tick again."""
    guest = make(
        f""".code32
        {PIT_1KHZ}
        mov ${control}, %al; out %al, $0x43
        out %al, $0xf4""",
        "protected",
    )
    guest.run()
    rows = [row for row in guest.machine_rows if row.name == "pit"]
    saved = guest.vm.get(rows)
    copy = make(".code32\n mov $0x10, %al; out %al, $0x40; out %al, $0x40; out %al, $0xf4", "protected")
    copy.vm.put(rows, saved)
    assert (guest.vm._pit.due, copy.vm._pit.due) == (None, None)  # type: ignore[attr-defined]
    copy.run()
    assert copy.vm._pit.due is not None, "a count starts it"  # type: ignore[attr-defined]


def test_pit_channel_2_and_port_61_measure_time_as_seabios_does(make: Make) -> None:
    guest = make(
        """.code32
        in $0x61, %al; and $0xfc, %al; or $1, %al; out %al, $0x61
        mov $0xb0, %al; out %al, $0x43
        mov $0xff, %al; out %al, $0x42; mov $0x07, %al; out %al, $0x42
        rdtsc; mov %eax, %ebx
    1:  in $0x61, %al; test $0x20, %al; jz 1b
        rdtsc; sub %ebx, %eax; mov %eax, 0x6000
        mov $0x80, %al; out %al, $0x43; in $0x42, %al; mov %al, 0x6004; in $0x42, %al; mov %al, 0x6005
        out %al, $0xf4""",
        "protected",
    )
    guest.run()
    expected = 0x7FF * 1_000_000_000 // 1193182
    assert expected - 2000 < guest.u32(0x6000) < expected + 20_000
    assert guest.u32(0x6004) & 0xFFFF > 0xFF00, "it counts on, past zero"


def test_a_line_pulsed_by_a_device_arrives_by_the_8259s(make: Make) -> None:
    guest = make(
        ".code32\n"
        + PICS.format(mask="0xef")
        + """
        sti; mov $7, %al
        out %al, $0x90
        incl 0x6000
        hlt
        out %al, $0xf4
        .org HANDLER
        pop %eax; out %al, $0x80; mov 0x6000, %al; out %al, $0x81
        mov $0x20, %al; out %al, $0x20
        add $4, %esp; iret""",
        "protected",
    )

    def pulse(value: int) -> None:
        guest.vm.irq_line(4, True)
        guest.vm.irq_line(4, False)
        threading.Timer(0.05, pulse_late).start()

    def pulse_late() -> None:
        guest.vm.irq_line(4, True)
        guest.vm.irq_line(4, False)

    guest.bus.hooks[0x90] = pulse
    guest.run()
    assert guest.bus.values(0x80) == [0x24, 0x24]
    assert guest.bus.values(0x81) == [0, 1], "the first before the next instruction, the second wakes it from HLT"


def test_a_level_triggered_line_comes_again_until_it_is_lowered(make: Make) -> None:
    guest = make(
        f""".code32
        {PICS.format(mask="0xff")}{APIC}{ioapic(4, 0x8034)}
        sti; out %al, $0x90; nop; nop
        out %al, $0xf4
        .org HANDLER
        pop %eax; out %al, $0x80; incl 0x6000
        cmpl $3, 0x6000; jne 1f; out %al, $0x91
    1:  movl $0, 0xb0(%ebp)
        add $4, %esp; iret""",
        "protected",
    )
    guest.bus.hooks[0x90] = lambda value: guest.vm.irq_line(4, True)
    guest.bus.hooks[0x91] = lambda value: guest.vm.irq_line(4, False)
    guest.run()
    assert guest.bus.values(0x80) == [0x34] * 3


def test_a_masked_line_is_kept_by_the_8259(make: Make) -> None:
    guest = make(
        ".code32\n"
        + PICS.format(mask="0xff")
        + """
        sti
        out %al, $0x90
        mov $1, %al; out %al, $0x80
        mov $0x0a, %al; out %al, $0x20; in $0x20, %al; out %al, $0x80
        mov $0xef, %al; out %al, $0x21
        mov $2, %al; out %al, $0x80
        out %al, $0xf4
        .org HANDLER
        pop %eax; out %al, $0x80; mov $0x20, %al; out %al, $0x20
        add $4, %esp; iret""",
        "protected",
    )

    def pulse(value: int) -> None:
        guest.vm.irq_line(4, True)
        guest.vm.irq_line(4, False)

    guest.bus.hooks[0x90] = pulse
    guest.run()
    assert guest.bus.values(0x80) == [1, 0x10, 0x24, 2]


def test_popf_and_iret_open_the_window_at_once(make: Make) -> None:
    guest = make(
        f""".code32
        {APIC}
        movl $0x44050, 0x300(%ebp)
        pushf; orl $0x200, (%esp)
        mov $1, %al; out %al, $0x80
        popf
        cli
        movl $0x44051, 0x300(%ebp)
        pushf; orl $0x200, (%esp); push $0x40; push $next
        iret
    next: cli
        out %al, $0xf4
        .org HANDLER
        pop %eax; out %al, $0x80; movl $0, 0xb0(%ebp)
        add $4, %esp; iret""",
        "protected",
    )
    guest.run()
    assert guest.bus.values(0x80) == [1, 0x50, 0x51]


def test_sti_lets_one_more_instruction_pass(make: Make) -> None:
    guest = make(
        f""".code32
        {APIC}
        movl $0x44050, 0x300(%ebp)
        sti; hlt
        out %al, $0xf4
        .org HANDLER
        pop %eax; out %al, $0x80; mov 4(%esp), %eax; mov -1(%eax), %al; out %al, $0x81
        movl $0, 0xb0(%ebp)
        add $4, %esp; iret""",
        "protected",
    )
    guest.run()
    assert guest.bus.values(0x80) == [0x50]
    assert guest.bus.values(0x81) == [0xF4], "it comes after the HLT, not before"


def test_an_nmi_is_not_nested_until_iret(make: Make) -> None:
    guest = make(
        f""".code32
        {APIC}
        out %al, $0x90
        mov $9, %al; out %al, $0x80
        out %al, $0xf4
        .org HANDLER
        pop %eax; out %al, $0x80
        incl 0x6000; cmpl $1, 0x6000; jne 1f
        out %al, $0x90; nop
        mov $5, %al; out %al, $0x80
    1:  add $4, %esp; iret""",
        "protected",
    )
    guest.bus.hooks[0x90] = lambda value: guest.vm.raise_nmi(0)  # type: ignore[attr-defined]
    guest.run()
    assert guest.bus.values(0x80) == [2, 5, 2, 9]
    assert not guest.events().nmi_masked


def test_the_nmi_ioctl_wakes_a_halted_vcpu(make: Make) -> None:
    guest = make(".code32\n cli; hlt\n .org HANDLER\n pop %eax; out %al, $0x80; out %al, $0xf4", "protected")
    guest.vcpus[0].kick()
    guest.vcpus[0].run(guest.bus)
    guest.vm.nmi(guest.vcpus[0])
    assert guest.events().nmi_pending
    guest.run()
    assert guest.bus.values(0x80) == [2]


def test_waiting_is_known_from_outside(make: Make) -> None:
    guest = make(".code32\n sti; hlt; out %al, $0xf4\n .org HANDLER\n add $8, %esp; iret", "protected", vcpus=2)
    runner = threading.Thread(target=guest.run)
    assert [vcpu.waiting() for vcpu in guest.vcpus] == [False, False]
    runner.start()
    until(lambda: all(vcpu.waiting() for vcpu in guest.vcpus))
    guest.vcpus[0].request_sample()
    until(lambda: guest.vcpus[0].sample() is not None)
    guest.vm.nmi(guest.vcpus[0])
    runner.join()


def test_a_kick_ends_a_busy_vcpu_and_one_before_run_is_kept(make: Make) -> None:
    guest = make(".code16\n 1: inc %eax; jmp 1b")
    vcpu = guest.vcpus[0]
    vcpu.kick()
    assert vcpu.run(guest.bus).kind is ExitKind.KICKED
    assert guest.regs().rax == 0, "kicked before: not one instruction"
    vcpu.clear_kick()
    ends = []
    runner = threading.Thread(target=lambda: ends.append(vcpu.run(guest.bus)))
    runner.start()
    vcpu.request_sample()
    until(lambda: vcpu.sample() is not None and vcpu.sample().regs[0] != 0)  # type: ignore[union-attr]
    vcpu.kick()
    runner.join(20)
    assert ends[0].kind is ExitKind.KICKED


def test_a_vcpu_that_waits_for_its_turn_can_be_kicked(make: Make) -> None:
    guest = make(".code16\n 1: jmp 1b", vcpus=2)
    guest.enter(1)
    ends: list[ExitKind] = []
    only = threading.Thread(target=lambda: ends.append(guest.vcpus[1].run(guest.bus).kind))
    only.start()  # VCPU 0, whose turn it is, never comes
    until(lambda: guest.vcpus[1].inside)
    guest.vcpus[1].kick()
    only.join(20)
    assert ends == [ExitKind.KICKED]


CHANGED_CODE = {
    # The AP runs what is changed all the time, and serialises where it returns from the interrupt that tells it so.
    "told by an interrupt": """
        movw $handler - _start + 0x1000 - 0x2000, 0x40 * 4; movw $0x200, 0x40 * 4 + 2
        mov $0xfee00000, %ebp; movl $0x1ff, 0xf0(%ebp); movl $0x02000000, 0xd0(%ebp)
        sti
    1:  movl $1, 0x6000
        .set changed, . - 4
        jmp 1b
    handler: movl $0, 0xb0(%ebp); iret""",
    # It traps at what is changed, and returns there until that's no INT3 any more, as Linux's text_poke has it.
    "found out by INT3": """
        movw $handler - _start + 0x1000 - 0x2000, 3 * 4; movw $0x200, 3 * 4 + 2
    changed: int3
        movl $2, 0x6000
    1:  hlt; jmp 1b
    handler: movl $1, 0x6000; push %bp; mov %sp, %bp; decw 2(%bp); pop %bp; iret""",
}


@pytest.mark.parametrize(("how", "byte"), [("told by an interrupt", 2), ("found out by INT3", 0x90)])
def test_code_that_another_vcpu_has_changed_counts_from_where_it_must(make: Make, how: str, byte: int) -> None:
    guest = make(
        f"""
        .code32
        {START_APS}
    1:  cmpl $1, 0x6000; jne 1b
        movb ${byte}, changed - _start + 0x1000
        movl $0x01000000, 0x310(%ebp); movl $0x4040, 0x300(%ebp)
        mov $300000, %ecx
    2:  cmpl $2, 0x6000; je 3f
        loop 2b
    3:  mov 0x6000, %al; out %al, $0x80
        out %al, $0xf4
        .org HANDLER
        .code16
        {CHANGED_CODE[how]}""",
        "protected",
        vcpus=2,
    )
    guest.run()
    assert guest.bus.values(0x80) == [2]


WORK = f"""
    .set ROUNDS, 40
    .code32
    {START_APS}
    movl $0xb, 0x3e0(%ebp); movl $0x20060, 0x320(%ebp); movl $7777, 0x380(%ebp)
    sti
    mov $12000, %ecx
1:  mov $1, %eax; lock xadd %eax, 0x6000
    imul $0x41c64e6d, %ebx, %ebx; add %eax, %ebx; mov %ebx, 0x6100
    test $0xff, %cl; jnz 2f
    rdtsc; add %eax, 0x6104; pause
2:  loop 1b
1:  testb $1, 0x6400; jz 1b
    cli
    out %al, $0xf4
    .org HANDLER
    .code16
    jmp ap
    .org HANDLER + 0x10
ap: mov $0xfee00000, %ebp; mov 0x20(%ebp), %esi; shr $24, %esi
    movl $0x1ff, 0xf0(%ebp)
1:  mov $1, %eax; lock xadd %eax, 0x6000
    imul $0x41c64e6d, 0x6200(, %esi, 4), %ebx; add %eax, %ebx; mov %ebx, 0x6200(, %esi, 4)
    test $7, %bl; jnz 1b
    in $0x61, %al; add %eax, 0x6300
    jmp 1b"""


def _worker(make: Make, *, set_up: bool = True) -> Guest:
    """Four VCPUs that see each other's every step in what they compute, one of them under a timer."""
    guest = make(WORK if set_up else "nop", "protected", vcpus=4)
    # The timer's handler stands elsewhere: HANDLER is where the APs start.
    handler = bytes.fromhex("ff05 10600000 c705 b000e0fe 00000000 cf".replace(" ", ""))
    if set_up:
        guest.write(0x7000, handler)
    guest.write(0x4000 + 0x60 * 8, (0x7000 | 0x40 << 16).to_bytes(4, "little") + (0x8E00).to_bytes(4, "little"))
    return guest


OFFSET = "tsc_offset"
"""Counts from each VM's own birth: the TSC's MSR says it to another one."""


def _outcome(guest: Guest) -> tuple[object, ...]:
    return (
        hashlib.sha256(guest.memory[:]).hexdigest(),
        guest.vm.now(),  # type: ignore[attr-defined]
        [[guest.get(index, row.name) for row in guest.table.get_order if row.name != OFFSET] for index in range(4)],
    )


def _run_to_the_end(guest: Guest, kicks: random.Random | None = None) -> None:
    """Run until the guest stops itself, which only now it may (a stop in its midst may come late); with ``kicks``, all
    are stopped and started again at random moments."""
    guest.write(0x6400, b"\1")
    ended = threading.Event()
    guest.bus.hooks[0xF4] = lambda value: (ended.set(), guest.stop())  # type: ignore[func-returns-value]
    while not ended.is_set():
        pest = None
        if kicks is not None:
            pest = threading.Timer(kicks.random() * 0.004, guest.stop)
            pest.start()
        guest.run()
        if pest is not None:
            pest.join()
    assert guest.u32(0x6010) > 20, "the timer's ticks are part of it"


def test_two_runs_are_the_same_whatever_the_host_does(make: Make) -> None:
    one, other = _worker(make), _worker(make)
    _run_to_the_end(one)
    _run_to_the_end(other, random.Random(1))
    assert _outcome(one) == _outcome(other)


@pytest.mark.parametrize("after", [1, 4000, 16000])
def test_a_copy_of_the_machine_goes_on_like_the_original(make: Make, after: int) -> None:
    one, copy = _worker(make), _worker(make, set_up=False)

    def stop() -> None:
        until(lambda: one.u32(0x6000) >= after)
        one.stop()

    moment = threading.Thread(target=stop)
    moment.start()
    one.run()
    moment.join()
    assert one.u32(0x6000) >= after
    copy.memory[:] = one.memory[:]
    copy.vm.memory_changed()
    for index in range(4):
        values = dict(
            zip((row.name for row in one.table.get_order), one.vcpus[index].get(one.table.get_order), strict=True)
        )
        rows = [row for row in copy.table.put_order if row.name in values and row.name != OFFSET]
        copy.vcpus[index].put(rows, [values[row.name] for row in rows])
    machine = one.vm.get(one.machine_rows)
    raws = [row.at(raw, row.level) for row, raw in zip(copy.machine_rows, machine, strict=True)]
    copy.vm.put(copy.machine_rows, raws)
    assert _outcome(copy) == _outcome(one), "nothing is lost on the way"
    _run_to_the_end(one)
    _run_to_the_end(copy)
    assert _outcome(copy) == _outcome(one)
