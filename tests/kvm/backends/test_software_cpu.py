"""The software CPU: modes, port I/O and MMIO, exceptions and interrupts through IVT and IDT, privilege levels."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable

import pytest

from kvm.backends.interface import ExitKind
from kvm.x86.structs import MP_STATE_HALTED, Xsave
from tests.kvm.backends.software import (
    CODE32,
    CODE64,
    DATA,
    DATA32,
    GDT,
    IDT,
    IST1,
    ORIGIN,
    RSP0,
    STACK,
    TABLES,
    TSS,
    USER64,
    USER_DATA,
    USER_STACK,
    Guest,
)

UD, DF, NP, GP, PF = 6, 8, 11, 13, 14
Make = Callable[..., Guest]

STOP = "out %al, $0xf4\n"
GO_USER = f"""
    push ${USER_DATA}
    push ${USER_STACK}
    push $0x202
    push ${USER64}
    push $user
    iretq
user:
"""


def test_real_mode_port_io_of_every_width(make: Make) -> None:
    guest = make(
        """.code16
        mov $0x510, %dx
        in %dx, %al; out %al, $0x80
        in %dx, %ax; out %ax, $0x80
        in %dx, %eax; out %eax, $0x80
        out %al, $0xf4"""
    )
    guest.bus.reads[0x510] = 0x11223344
    (ended,) = guest.run()
    assert ended.kind is ExitKind.KICKED
    assert [entry for entry in guest.bus.seen if entry[0] == "out"] == [
        ("out", 0x80, 1, 0x44),
        ("out", 0x80, 2, 0x3344),
        ("out", 0x80, 4, 0x11223344),
    ]


def test_string_io_with_rep_counts_and_moves(make: Make) -> None:
    guest = make(
        """.code16
        mov $5, %cx; mov $0x6000, %di; mov $0x510, %dx
        rep insb
        mov $5, %cx; mov $0x6000, %si; mov $0x80, %dx
        rep outsb
        mov $2, %cx; mov $0x6000, %si
        rep outsw
        out %al, $0xf4"""
    )
    guest.bus.reads[0x510] = 0x5A
    guest.run()
    assert guest.read(0x6000, 6) == b"ZZZZZ\0"
    assert guest.bus.values(0x80) == [0x5A] * 5 + [0x5A5A] * 2
    assert sum(kind == "in" for kind, *_ in guest.bus.seen) == 5


IN_USER_MODE = GO_USER.replace("$0x202", "$0x203")
"""With IOPL 0 and the carry flag set."""
PORT_FAULT = """
    .org HANDLER
    mov %rsi, 0x6000; mov %rdi, 0x6008; mov %rcx, 0x6010; mov %rax, 0x6018
    jmp stop
"""


@pytest.mark.parametrize("body", ["out %al, $0x80", "in $0x80, %al", "in %dx, %eax", "rep outsb", "rep insw", "outsl"])
def test_ports_are_refused_to_user_mode(make: Make, body: str) -> None:
    guest = make(
        f"""
        mov $0x7000, %esi; mov $0x7100, %edi; mov $3, %ecx; mov $0x11223344, %eax; mov $0x80, %edx
        {IN_USER_MODE.replace("user:", "")}
    user: {body}
        nop
    stop: {STOP} {PORT_FAULT}""",
        "long",
    )
    guest.run()
    vector, code, rip, _, flags = guest.frame(5)
    assert (vector, code) == (GP, 0)
    assert guest.read(rip, 12)[:2] != b"\x90\xe6", "it points at the instruction"
    assert flags & 1, "arithmetic flags and all as before it"
    assert [guest.u64(0x6000 + at) for at in (0, 8, 16, 24)] == [0x7000, 0x7100, 3, 0x11223344]
    assert guest.bus.seen == []


@pytest.mark.parametrize(
    ("body", "allowed"),
    [
        ("out %al, $0x81", True),
        ("out %al, $0x80", False),
        ("out %al, $0x82", False),
        ("mov $0x87, %edx; out %ax, %dx", True),
        ("mov $0x81, %edx; out %ax, %dx", False),
        ("mov $0x100, %edx; out %al, %dx", False),
    ],
)
def test_the_tasks_bitmap_says_which_ports_user_mode_has(make: Make, body: str, allowed: bool) -> None:
    guest = make(f"{IN_USER_MODE} {body}; ud2 \n stop: {STOP} {PORT_FAULT}", "long")
    guest.write(TSS + 0x68, b"\xff" * 16 + bytes((0b0111_1101, 0b1111_1110)) + b"\xff" * 6)
    sregs = guest.sregs()
    sregs.tr.limit = 0x68 + 0x20
    guest.put(0, sregs=sregs)
    guest.run()
    assert guest.frame(1) == [UD if allowed else GP]
    assert len(guest.bus.seen) == allowed


def test_iopl_gives_user_mode_all_ports(make: Make) -> None:
    guest = make(GO_USER.replace("$0x202", "$0x3202") + "out %al, $0x80; ud2", "long")
    guest.run()
    assert guest.frame(1) == [UD]
    assert len(guest.bus.seen) == 1


def test_mmio_of_every_width_happens_once(make: Make) -> None:
    guest = make(
        f"""
        mov $0x10000000, %rbx
        movb $0x11, (%rbx); movw $0x2222, 8(%rbx); movl $0x33333333, 16(%rbx)
        mov $0x4444444444444444, %rax; mov %rax, 24(%rbx)
        mov (%rbx), %rcx; addl $1, 32(%rbx)
        {STOP}""",
        "long",
    )
    guest.bus.reads.update({0x10000000: 0x44332211, 0x10000004: 0x88776655})
    guest.bus.reads[0x10000020] = 41
    guest.run()
    assert guest.bus.seen == [
        ("write", 0x10000000, 1, 0x11),
        ("write", 0x10000008, 2, 0x2222),
        ("write", 0x10000010, 4, 0x33333333),
        ("write", 0x10000018, 4, 0x44444444),  # LIMITS: 8 bytes come as two accesses of 4
        ("write", 0x1000001C, 4, 0x44444444),
        ("read", 0x10000000, 4, 0x44332211),
        ("read", 0x10000004, 4, 0x88776655),
        ("read", 0x10000020, 4, 41),
        ("write", 0x10000020, 4, 42),
    ]
    assert guest.regs().rcx == 0x8877665544332211


def test_mmio_writes_of_a_string_instruction_happen_once_each(make: Make) -> None:
    guest = make(f"mov $0x10000000, %rdi; mov $7, %al; mov $300, %ecx; rep stosb; {STOP}", "long", slice=7)
    guest.run()
    assert guest.bus.seen == [("write", 0x10000000 + at, 1, 7) for at in range(300)]


def test_real_mode_interrupt_through_the_ivt_and_back(make: Make) -> None:
    guest = make(
        """.code16
        movw $handler, 0x21*4; movw $0, 0x21*4+2
        stc; sti
        int $0x21
        out %al, $0xf4
    handler:
        pushf; pop %bx
        mov $0x42, %al
        iret"""
    )
    guest.run()
    regs = guest.regs()
    assert regs.rax & 0xFF == 0x42
    assert not regs.rbx & 0x200, "an interrupt clears IF"
    assert regs.rflags & 0x201 == 0x201, "IRET brings the flags back"
    assert regs.rsp == STACK


def test_the_guest_goes_from_real_to_protected_to_long_mode_and_back(make: Make) -> None:
    guest = make(
        f""".code16
        cli
        lgdt gdtr
        mov %cr0, %eax; or $1, %al; mov %eax, %cr0
        ljmpl ${CODE32}, $protected
    .code32
    protected:
        mov ${DATA32}, %eax; mov %eax, %ds; mov %eax, %ss
        movb $0x32, 0x6000
        mov %cr4, %eax; or $0x20, %eax; mov %eax, %cr4
        mov ${TABLES}, %eax; mov %eax, %cr3
        mov $0xc0000080, %ecx; rdmsr; or $0x100, %eax; wrmsr
        mov %cr0, %eax; or $0x80000000, %eax; mov %eax, %cr0
        ljmp ${CODE64}, $long
    .code64
    long:
        mov $0x6464646464646464, %rax; mov %rax, 0x6008
        mov $0xc0000080, %ecx; rdmsr; mov %rax, 0x6010
        ljmp *back
    back: .long compat; .word {CODE32}
    .code32
    compat:
        mov %cr0, %eax; and $0x7fffffff, %eax; mov %eax, %cr0
        mov $0xc0000080, %ecx; rdmsr; mov %eax, 0x6018
        out %al, $0xf4
    gdtr: .word 0x57; .long 0x5000"""
    )
    guest._long(guest.sregs())  # tables only
    guest.run()
    assert guest.read(0x6000, 1) == b"\x32"
    assert guest.u64(0x6008) == 0x6464646464646464
    assert guest.u32(0x6010) & 0x500 == 0x500, "LME and LMA"
    assert guest.u32(0x6018) & 0x500 == 0x100, "LMA goes with paging"
    assert not guest.sregs().cr0 >> 31


FAULTS = {
    "divide": ("xor %ecx, %ecx; fault: div %ecx", 0, 0),
    "undefined": ("fault: ud2", UD, 0),
    "general protection": ("mov $0x30, %eax; fault: mov %eax, %ds", GP, 0x30),
    "not present segment": ("mov $0x58, %eax; fault: mov %eax, %ds", GP, 0x58),
}


@pytest.mark.parametrize("mode", ["protected", "long"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_points_at_its_instruction(make: Make, mode: str, name: str) -> None:
    body, vector, error = FAULTS[name]
    bits = 64 if mode == "long" else 32
    guest = make(f".code{bits}\n mov $fault, %ebx; {body}; {STOP}", mode)
    guest.run()
    got = guest.frame(5, bits // 8)
    assert got[:2] == [vector, error]
    assert got[2] == guest.regs().rbx
    assert got[3] == (CODE64 if mode == "long" else CODE32)
    assert got[4] & 0x10000, "a fault pushes RF"
    if mode == "long":
        assert guest.frame(7)[5:] == [STACK, DATA]


@pytest.mark.parametrize("mode", ["protected", "long"])
@pytest.mark.parametrize("instruction", ["pause", "cpuid", "rdtsc", "rdmsr"])
def test_what_leaves_the_emulator_in_a_handler_of_int_n_goes_on_behind_itself(
    make: Make, mode: str, instruction: str
) -> None:
    """The emulator goes on behind an INT, and would do so for whatever leaves it next."""
    guest = make(
        f"""
        mov $0x10, %ecx; int $0x40; .skip 8, 0x90; out %al, $0x80; {STOP}
        .org HANDLER
        {instruction}; mov $7, %al; {STOP}""",
        mode,
    )
    guest.run()
    assert guest.bus.values(0x80) == []
    assert guest.regs().rax & 0xFF == 7


def test_int3_and_int_n_push_the_next_instruction(make: Make) -> None:
    guest = make(
        f"""
        mov $after3, %ebx; int3
    after3: mov $after, %ebx; int $0x40
    after: mov $after6, %ebx; int $6
    after6: {STOP}
        .org HANDLER
        pop %rcx; pop %rdx
        mov %cl, %al; out %al, $0x80
        mov (%rsp), %rax; sub %rbx, %rax; out %al, $0x81
        iretq""",
        "long",
    )
    guest.run()
    assert guest.bus.values(0x80) == [3, 0x40, 6]
    assert guest.bus.values(0x81) == [0, 0, 0]


def test_int_n_whose_gate_forbids_it_is_a_fault_at_the_instruction(make: Make) -> None:
    guest = make(f"{GO_USER} int $0x40", "long")
    guest.gate(0x40, kind=0x8F & 0x9F)
    guest.run()
    vector, error, rip, selector, *_ = guest.frame(7)
    assert (vector, error, selector) == (GP, 0x40 * 8 + 2, USER64)
    assert guest.read(rip, 2) == b"\xcd\x40"


@pytest.mark.parametrize(
    ("body", "code", "address"),
    [
        ("mov 0x40000008, %eax", 0, 0x40000008),
        ("mov $0x40000000, %eax; movb $1, 0x10(%eax)", 2, 0x40000010),
        ("mov $0x40000000, %eax; jmp *%rax", 0x10, 0x40000000),
        (f"{GO_USER} mov 0x40000008, %eax", 4, 0x40000008),
        (f"{GO_USER} movb $1, 0x400000", 7, 0x400000),
        ("movb $1, 0x400000", 3, 0x400000),
    ],
)
def test_page_faults_say_where_and_why(make: Make, body: str, code: int, address: int) -> None:
    guest = make(body, "long")
    guest.write(TABLES + 0x2000 + 2 * 8, struct.pack("<Q", 2 << 21 | 0x85))  # 4 MiB: read only
    guest.run()
    got = guest.frame(3)
    assert got[0] == PF
    assert got[1] == code
    assert guest.sregs().cr2 == address


def test_a_page_fault_that_is_mended_runs_the_instruction_again(make: Make) -> None:
    guest = make(
        f"""
        mov $3, %ecx
    again: mov 0x40000000, %rax; out %al, $0x80
        movq $0, {TABLES + 0x1008}
        invlpg 0x40000000
        loop again
        {STOP}
        .org HANDLER
        movq ${TABLES + 0x2007}, {TABLES + 0x1008}
        add $16, %rsp
        iretq""",
        "long",
    )
    guest.memory[0] = 0x77
    guest.run()
    assert guest.bus.values(0x80) == [0x77] * 3


def test_an_ist_entry_switches_the_stack_without_a_change_of_privilege(make: Make) -> None:
    guest = make("ud2", "long")
    guest.gate(UD, stack=1)
    guest.run()
    assert IST1 - 64 < guest.regs().rsp < IST1
    assert guest.frame(7)[5:] == [STACK, DATA]


def test_a_code_segment_counts_as_accessed_whatever_its_descriptor_says(make: Make) -> None:
    """VM entry insists on it (SDM vol. 3C, 27.3.1.2): a snapshot must do on KVM."""
    guest = make(f"push ${CODE64}; push $there; lretq\n there: {STOP}", "long")
    descriptor = GDT + CODE64 + 5
    guest.write(descriptor, bytes((guest.read(descriptor, 1)[0] & ~1,)))
    guest.run()
    assert guest.sregs().cs.type == 0xB


def test_user_mode_and_back_by_exception_on_the_kernel_stack(make: Make) -> None:
    guest = make(f"{GO_USER} hlt", "long")
    guest.run()
    vector, error, rip, selector, flags, rsp, ss = guest.frame(7)
    assert (vector, error, selector, rsp, ss) == (GP, 0, USER64, USER_STACK, USER_DATA)
    assert guest.read(rip, 1) == b"\xf4"
    assert flags & 0x200
    assert RSP0 - 64 < guest.regs().rsp < RSP0
    sregs = guest.sregs()
    assert (sregs.cs.selector, sregs.ss.selector, sregs.ss.dpl) == (CODE64, 0, 0)


def test_user_mode_in_32_bit_protected_mode_uses_the_tss(make: Make) -> None:
    guest = make(
        f""".code32
        mov ${USER_DATA}, %eax; mov %eax, %ds
        push ${USER_DATA}; push ${USER_STACK}; push $0x202; push $0x1b; push $user; iret
    user: int $0x40""",
        "protected",
    )
    guest.run()
    vector, _, _, selector, flags, esp, ss = guest.frame(7, 4)
    assert (vector, selector, esp, ss) == (0x40, 0x1B, USER_STACK, USER_DATA)
    assert flags & 0x200
    assert RSP0 - 40 < guest.regs().rsp < RSP0
    assert guest.sregs().ss.selector == DATA32


def test_syscall_and_sysret(make: Make) -> None:
    guest = make(
        f"""
        mov $0xc0000081, %ecx; xor %eax, %eax; mov ${0x10 << 16 | CODE64}, %edx; wrmsr
        inc %ecx; mov $kernel, %eax; xor %edx, %edx; wrmsr
        mov $0xc0000084, %ecx; mov $0x200, %eax; wrmsr
        {GO_USER}
        mov $back, %ebx
        syscall
    back: mov %ss, %ax; out %ax, $0x82
        mov %cs, %ax; out %ax, $0x80; out %al, $0xf4
    kernel:
        mov %cs, %ax; out %ax, $0x80
        mov %ss, %ax; out %ax, $0x80
        cmp %rcx, %rbx; sete %al; out %al, $0x81
        pushf; pop %rax; shr $9, %eax; and $1, %al; out %al, $0x81
        shr $9, %r11d; mov %r11d, %eax; and $1, %al; out %al, $0x81
        shl $9, %r11d; or $0x3000, %r11d
        sysretq""",
        "long",
    )
    guest.run()
    assert guest.bus.values(0x80) == [CODE64, DATA, 0x23]
    assert guest.bus.values(0x82) == [0x1B]
    assert guest.bus.values(0x81) == [1, 0, 1], "RCX is the return address; IF is masked; R11 has it"


def test_sysenter_and_sysexit(make: Make) -> None:
    guest = make(
        f"""
        mov $0x174, %ecx; mov ${CODE64}, %eax; xor %edx, %edx; wrmsr
        inc %ecx; mov $0x9000, %eax; wrmsr
        inc %ecx; mov $kernel, %eax; wrmsr
        {GO_USER}
        sysenter
    kernel:
        mov %cs, %ax; out %ax, $0x80
        mov %rsp, %rax; out %ax, $0x80
        out %al, $0xf4""",
        "long",
    )
    guest.run()
    assert guest.bus.values(0x80) == [CODE64, 0x9000]


def test_syscall_without_sce_is_undefined(make: Make) -> None:
    guest = make("syscall", "long")
    sregs = guest.sregs()
    sregs.efer &= ~1
    guest.put(0, sregs=sregs)
    guest.run()
    assert guest.frame(3) == [UD, 0, ORIGIN]


def test_swapgs_and_its_msrs(make: Make) -> None:
    guest = make(
        f"""
        mov $0xc0000101, %ecx; mov $0x1111, %eax; xor %edx, %edx; wrmsr
        inc %ecx; mov $0x2222, %eax; wrmsr
        swapgs
        rdmsr; out %eax, $0x80
        dec %ecx; rdmsr; out %eax, $0x80
        {STOP}""",
        "long",
    )
    guest.run()
    assert guest.bus.values(0x80) == [0x1111, 0x2222]
    assert guest.sregs().gs.base == 0x2222


@pytest.mark.parametrize(
    ("body", "vector"),
    [
        ("mov $0x12345, %ecx; rdmsr", GP),
        ("mov $0x12345, %ecx; wrmsr", GP),
        ("mov $0xc0000082, %ecx; mov $0x8000, %edx; wrmsr", GP),
        ("mov $0xc0000080, %ecx; mov $0x1501, %eax; wrmsr", GP),
        (f"{GO_USER} mov $0x10, %ecx; rdmsr", GP),
        (f"{GO_USER} mov %cr0, %rax", GP),
        (f"{GO_USER} in $0x10, %al", GP),
        (f"{GO_USER} cli", GP),
        ("mov $0x8000000000000000, %rax; mov (%rax), %al", GP),
        ("mov $0x10, %eax; mov %rax, %cr8", GP),
        ("vbroadcastss (%rax), %ymm0", UD),
        ("xgetbv", UD),
        ("monitor", UD),
        ("vmcall", UD),
        ("rsm", UD),
    ],
)
def test_what_a_processor_refuses_it_refuses(make: Make, body: str, vector: int) -> None:
    guest = make(body, "long")
    guest.run()
    assert guest.frame(1) == [vector]


def test_a_contributory_fault_on_the_way_to_another_is_a_double_fault(make: Make) -> None:
    guest = make("ud: mov $0x30, %eax; mov %eax, %ds", "long")
    guest.write(IDT + GP * 16, bytes(16))  # no gate: a second #GP
    guest.run()
    assert guest.frame(2) == [DF, 0]


def test_a_page_fault_on_the_stack_of_a_page_fault_is_a_double_fault(make: Make) -> None:
    guest = make("mov $0x41000000, %esp; mov 0x48000000, %al", "long")
    guest.gate(DF, stack=1)
    guest.run()
    assert guest.frame(2) == [DF, 0]
    assert 0x41000000 - 64 < guest.sregs().cr2 < 0x41000000, "CR2 is the second fault's"


def test_a_benign_fault_before_another_is_no_double_fault(make: Make) -> None:
    guest = make("ud2", "long")
    guest.write(IDT + UD * 16, bytes(16))
    guest.run()
    assert guest.frame(2) == [GP, UD * 8 + 3]


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_a_triple_fault_shuts_down(make: Make, mode: str) -> None:
    bits = {"real": 16, "protected": 32, "long": 64}[mode]
    guest = make(f".code{bits}\n lidt nothing\n ud2\n nothing: .fill 10", mode)
    (ended,) = guest.run()
    assert ended.kind is ExitKind.SHUTDOWN


def test_a_gate_that_is_not_present(make: Make) -> None:
    guest = make("ud2", "long")
    guest.gate(UD, kind=0x0E)
    guest.run()
    assert guest.frame(2) == [NP, UD * 8 + 3]


def test_a_task_gate_is_an_internal_error_with_a_reason(make: Make) -> None:
    guest = make(".code32\n ud2", "protected")
    guest.gate(UD, wide=False, kind=0x85)
    (ended,) = guest.run()
    assert ended.kind is ExitKind.INTERNAL_ERROR
    assert "task gate" in ended.detail


def test_code_where_no_memory_is_is_an_internal_error(make: Make) -> None:
    guest = make()
    sregs = guest.sregs()
    sregs.cs.base = 0x30000000
    guest.put(0, sregs=sregs)
    (ended,) = guest.run()
    assert ended.kind is ExitKind.INTERNAL_ERROR
    assert guest.regs().rip == ORIGIN


def test_cpuid_answers_from_the_entries(make: Make) -> None:
    guest = make(
        f"""
        xor %eax, %eax; cpuid; mov %ebx, 0x6000; mov %edx, 0x6004; mov %ecx, 0x6008
        mov $4, %eax; mov $1, %ecx; cpuid; mov %eax, 0x600c
        mov $0x7777, %eax; cpuid; mov %eax, 0x6010
        {STOP}""",
        "long",
    )
    guest.write(0x6010, b"\xff" * 4)
    guest.run()
    assert guest.read(0x6000, 12) == b"GenuineIntel"
    assert guest.u32(0x600C) & 0x1F == 2, "the instruction cache is index 1"
    assert guest.u32(0x6010) == 0


def test_the_tsc_counts_instructions(make: Make) -> None:
    guest = make(
        f"""
        rdtsc; mov %eax, %ebx
        .rept 100; nop; .endr
        rdtsc; sub %ebx, %eax; mov %eax, 0x6000
        mov $0xc0000103, %ecx; mov $9, %eax; xor %edx, %edx; wrmsr
        rdtscp; mov %ecx, 0x6004
        {STOP}""",
        "long",
    )
    guest.run()
    assert guest.u32(0x6000) == 102 * 10 + 1000, "10 ns an instruction, 1 µs for leaving the emulator; 1 GHz"
    assert guest.u32(0x6004) == 9


def test_the_apic_timer_counts_the_crystal_that_cpuid_tells_of(make: Make) -> None:
    """Linux takes that for its frequency, and does not measure it (native_calibrate_tsc)."""
    guest = make(
        f"""
        mov $0x15, %eax; cpuid; mov %eax, 0x6000; mov %ebx, 0x6004; mov %ecx, 0x6008
        mov $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx); movl $0x10000, 0x320(%rbx); movl $0xb, 0x3e0(%rbx); movl $-1, 0x380(%rbx)
        mov 0x390(%rbx), %r8d; rdtsc; mov %eax, %r9d
        mov $1000, %ecx; loop .
        mov 0x390(%rbx), %r10d; rdtsc
        sub %r9d, %eax; sub %r10d, %r8d
        mov %eax, 0x600c; mov %r8d, 0x6010
        {STOP}""",
        "long",
    )
    guest.write(TABLES + 0x1018, struct.pack("<Q", 0xC0000087))  # the fourth GiB, 1:1
    guest.run()
    denominator, numerator, crystal, tsc, timer = (guest.u32(0x6000 + at) for at in range(0, 20, 4))
    assert crystal * numerator // denominator == 1_000_000_000
    assert crystal == 1_000_000_000 * timer // tsc


def test_microcode_is_asked_for_as_intel_says_and_the_processor_runs_ahead_of_nothing(make: Make) -> None:
    guest = make(
        f"""
        mov $0x8b, %ecx; xor %eax, %eax; xor %edx, %edx; wrmsr
        mov $1, %eax; cpuid
        mov $0x8b, %ecx; rdmsr; mov %edx, 0x6000
        mov $7, %eax; xor %ecx, %ecx; cpuid; mov %edx, 0x6004
        mov $0x10a, %ecx; rdmsr; mov %eax, 0x6008
        {STOP}""",
        "long",
    )
    guest.run()
    assert guest.u32(0x6000) == 1
    assert guest.u32(0x6004) >> 29 & 1
    assert guest.u32(0x6008) & 1, "RDCL_NO: no need for page table isolation"


def test_cr8_is_the_apics_priority(make: Make) -> None:
    guest = make(
        f"""
        mov $5, %eax; mov %rax, %cr8
        mov $0xfee00080, %ebx; mov (%rbx), %eax; mov %eax, 0x6000
        movl $0x90, (%rbx); mov %cr8, %r9; mov %r9, 0x6008
        {STOP}""",
        "long",
    )
    guest.write(TABLES + 0x1018, struct.pack("<Q", 0xC0000087))  # the fourth GiB, 1:1
    guest.run()
    assert guest.u32(0x6000) == 0x50
    assert guest.u64(0x6008) == 9
    assert guest.sregs().cr8 == 9


def test_x87_and_sse_compute_and_are_in_xsave(make: Make) -> None:
    guest = make(
        f"""
        fninit; fld1; fldpi; fldl2e
        mov $0x3ff8000000000000, %rax; movq %rax, %xmm3
        addsd %xmm3, %xmm3
        {STOP}""",
        "long",
    )
    guest.run()
    area = Xsave.from_buffer_copy(guest.get(0, "xsave"))
    assert bytes(area.st[2])[:10] == struct.pack("<QH", 1 << 63, 0x3FFF)
    assert area.fsw >> 11 & 7 == 5
    assert area.ftw == 0xE0
    assert bytes(area.xmm[3])[:8] == struct.pack("<d", 3.0)


def test_lazy_fpu_traps_when_told_to(make: Make) -> None:
    guest = make(f"mov %cr0, %rax; or $8, %al; mov %rax, %cr0; fld1; {STOP}", "long")
    guest.run()
    assert guest.frame(1) == [7]


def test_a_single_step_flag_of_the_guests_own_traps_after_each_instruction(make: Make) -> None:
    guest = make(
        f"""
        pushf; orl $0x100, (%rsp); popf
        nop
        cpuid
        nop
        pushf; andl $~0x100, (%rsp); popf
        {STOP}
        .org HANDLER
        mov (%rsp), %al; out %al, $0x80
        add $16, %rsp
        iretq""",
        "long",
    )
    guest.run()
    assert guest.bus.values(0x80) == [1] * 6


def test_hlt_with_interrupts_off_waits(make: Make) -> None:
    guest = make(".code16\n cli; hlt")
    threading.Timer(0.2, guest.vcpus[0].kick).start()
    (ended,) = guest.run()
    assert ended.kind is ExitKind.KICKED
    assert guest.mp_state() == MP_STATE_HALTED
    assert guest.regs().rip == ORIGIN + 2


def test_self_modifying_code_is_seen_at_once(make: Make) -> None:
    guest = make(
        f"""
        mov $3, %ecx
    again: incb patch+1
    patch: mov $0x10, %al; out %al, $0x80
        loop again
        {STOP}""",
        "long",
    )
    guest.run()
    assert guest.bus.values(0x80) == [0x11, 0x12, 0x13]
