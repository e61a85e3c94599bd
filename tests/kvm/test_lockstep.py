"""The same guest on KVM and on the software backend, a step at a time: nothing differs, and what differs is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from app import guests
from kvm import lockstep
from kvm.backends.interface import Exit, ExitKind, System
from kvm.backends.software.system import SoftwareSystem
from kvm.boot import loader
from kvm.boot.image import BootImage, Segment
from kvm.lockstep import Lockstep
from kvm.machine import Machine, MachineConfig
from kvm.x86.structs import DebugRegs, Xsave, pack_msrs, unpack_msrs
from tests.kvm.contract.lab import (
    AP_ADDRESS,
    AP_CODE,
    AP_COUNT,
    START_AP,
    assembled,
    put_bytes,
    regs_of,
    synchronize,
    word,
)
from tests.kvm.machines import COUNT, EXIT_7, HLT, RESET_8042

MEMORY = 4 << 20
SOURCES = Path(__file__).parents[1] / "guests"
SEABIOS = Path("/usr/share/seabios/bios.bin")
SEABIOS_MEMORY = 16 << 20
"""What its tables and its copy of itself, near the end of memory, take to be where they usually are."""
SMALL = {
    "counter64": "flat64", "dirty64": "flat64", "echo64": "flat64", "hello16": "flat16", "pio": "flat16",
    "smp64": "flat64", "timer64": "flat64", "triple": "flat64",
    "vmcoreinfo64": "flat64",
}  # fmt: skip
"""Every small guest that KVM can step on any host, and its format."""
DIRTY64_PARAMETERS = Segment(0x8000, (16).to_bytes(8, "little") + (4096).to_bytes(8, "little"), 16)
"""16 pages in a row."""
GUESTS = [("demo", 4), ("smp64", 4), *((name, 1) for name in SMALL), ("seabios", 2)]
"""Guest, and its number of VCPUs."""
ALONE = [("demo", 1), ("seabios", 1)]
"""More of these two, for as long as there's nobody to share the steps with."""


def each(guests: Sequence[tuple[str, int]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("guest", "vcpus"), guests, ids=[f"{name}-{vcpus}" for name, vcpus in guests])


@pytest.fixture
def reference() -> Iterator[System]:
    from kvm.backends.kernel.system import KernelSystem

    system = KernelSystem()
    yield system
    system.close()


def flat(folder: Path, code: bytes, format: str = "flat64") -> BootImage:
    path = folder / "guest"
    path.write_bytes(code)
    return loader.load(path, memory=MEMORY, format=format, address=0x7C00 if format == "flat16" else 0x100000)


def bundled(guest: str, folder: Path) -> BootImage:
    if guest == "demo":
        return loader.load(guests.demo(), memory=MEMORY)
    if guest == "seabios":
        if not SEABIOS.exists():
            pytest.skip(f"Debian's package seabios is not installed: {SEABIOS} is missing")
        return loader.load(SEABIOS, memory=SEABIOS_MEMORY)
    base = 0x7C00 if SMALL[guest] == "flat16" else 0x100000
    image = flat(folder, assembled(SOURCES / f"{guest}.S", folder, base), SMALL[guest])
    return replace(image, segments=(*image.segments, DIRTY64_PARAMETERS)) if guest == "dirty64" else image


def pair(
    image: BootImage, *, reference: System | None = None, vcpus: int = 1, memory: int = MEMORY
) -> AbstractContextManager[Lockstep]:
    """A software machine beside ``reference``'s, or beside another of its kind."""
    config = MachineConfig(vcpus=vcpus, memory=memory)
    return lockstep.pair(reference or SoftwareSystem(), SoftwareSystem(), image, config)


def stepping(reference: System, folder: Path, guest: str, vcpus: int) -> AbstractContextManager[Lockstep]:
    memory = SEABIOS_MEMORY if guest == "seabios" else MEMORY
    return pair(bundled(guest, folder), reference=reference, vcpus=vcpus, memory=memory)


@pytest.mark.kvm
@each(GUESTS)
def test_nothing_differs(reference: System, tmp_path: Path, guest: str, vcpus: int) -> None:
    with stepping(reference, tmp_path, guest, vcpus) as both:
        outcome = both.run(2000)
    assert outcome.difference is None
    assert outcome.steps == 2000 or outcome.ended


@pytest.mark.kvm
def test_descriptors_that_have_not_been_used_and_a_null_stack_segment(reference: System, tmp_path: Path) -> None:
    """What Linux does first: a GDT whose descriptors aren't accessed yet, a far return into it, SS = 0."""
    source = """
        xor eax, eax
        mov ss, eax
        lgdt [table]
        push 0x10
        lea rax, [there]
        push rax
        retfq
    there:
        mov rbx, [gdt + 0x18]
        mov rcx, [gdt + 0x10]
        hlt
        .balign 8
    gdt: .quad 0, 0, 0x00af9a000000ffff, 0x00cf92000000ffff
    table: .word . - gdt - 1; .quad gdt
    """
    with pair(guest(tmp_path, source), reference=reference) as both:
        outcome = both.run(100)
    assert (outcome.difference, outcome.taken["the accessed bit of a code segment's descriptor"]) == (None, 1)
    assert outcome.steps == 10


@pytest.mark.kvm
@pytest.mark.slow
@each([*GUESTS, *ALONE])
def test_nothing_differs_for_long(reference: System, tmp_path: Path, guest: str, vcpus: int) -> None:
    with stepping(reference, tmp_path, guest, vcpus) as both:
        outcome = both.run(100_000)
    assert outcome.difference is None
    assert outcome.steps == 100_000 or outcome.ended


def test_a_machine_is_equal_to_itself(tmp_path: Path) -> None:
    with pair(bundled("counter64", tmp_path)) as both:
        outcome = both.run(1500)
    assert (outcome.steps, outcome.ended, outcome.difference, outcome.taken) == (1500, "", None, {})


@pytest.mark.parametrize("asked", [1, 2, 50])
def test_it_ends_when_it_is_stopped(tmp_path: Path, asked: int) -> None:
    """At the latest question within a repeated instruction, over which one machine is further than the other."""
    questions = 0

    def stopped() -> bool:
        nonlocal questions
        questions += 1
        return questions >= asked

    with pair(flat(tmp_path, bytes.fromhex("b9 e8 03 f3 aa f4"), "flat16")) as both:  # mov cx, 1000; rep stosb; hlt
        outcome = both.run(2000, stopped=stopped)
    assert (outcome.ended, outcome.difference) == ("stopped", None)
    assert outcome.steps <= 1


# VCPUs


@pytest.mark.kvm
def test_vcpus_step_in_turn_from_their_sipi_on(reference: System, tmp_path: Path) -> None:
    image = flat(tmp_path, START_AP)
    image = replace(image, segments=(*image.segments, Segment(AP_ADDRESS, AP_CODE, len(AP_CODE))))
    with pair(image, reference=reference, vcpus=4) as both:
        outcome = both.run(3 + 4 * 200)
        assert outcome.difference is None
        assert [word(machine, AP_COUNT) for machine in both._machines] == [300, 300], (
            "3 APs, an INC at every other step"
        )


@pytest.mark.kvm
@pytest.mark.parametrize("vcpus", [1, 3])
def test_the_end_is_when_all_wait(reference: System, tmp_path: Path, vcpus: int) -> None:
    with pair(flat(tmp_path, HLT, "flat16"), reference=reference, vcpus=vcpus) as both:
        outcome = both.run(2000)
    assert (outcome.steps, outcome.difference) == (2, None)
    assert "the guest waits" in outcome.ended


@pytest.mark.kvm
def test_a_reset_by_the_guest_is_one_step_on_both(reference: System, tmp_path: Path) -> None:
    with pair(flat(tmp_path, RESET_8042, "flat16"), reference=reference, vcpus=2) as both:
        outcome = both.run(60)
    assert (outcome.steps, outcome.ended, outcome.difference) == (60, "", None)


@pytest.mark.kvm
def test_the_guests_own_end_is_the_end(reference: System, tmp_path: Path) -> None:
    with pair(flat(tmp_path, EXIT_7, "flat16"), reference=reference) as both:
        outcome = both.run(300)
    assert (outcome.steps, outcome.ended, outcome.difference) == (2, "the guest ended itself", None)


# What can't be equal


def guest(folder: Path, source: str) -> BootImage:
    path = folder / "guest.S"
    path.write_text(f".intel_syntax noprefix\n.globl _start\n_start:\n{source}\n")
    return flat(folder, assembled(path, folder))


GATES = """
    .irp vector, 0, 6, 13, 14
        lea rax, [rip + on\\vector]
        mov edi, 0x180000 + 16 * \\vector
        mov [rdi], ax
        mov dword ptr [rdi + 2], 0x8e000018 & 0xffff
        mov byte ptr [rdi + 5], 0x8e
        shr rax, 16
        mov [rdi + 6], ax
        mov dword ptr [rdi + 8], 0
    .endr
    lidt [rip + idtr]
    jmp begin
    .balign 8
idtr: .word 0xfff; .quad 0x180000
begin:
"""


@pytest.mark.kvm
def test_exceptions_and_iret(reference: System, tmp_path: Path) -> None:
    """KVM's steps over them end later than the software backend's."""
    source = f"""{GATES}
        xor ecx, ecx
        mov edi, 0xfee00080
        mov [rdi], ecx                      # a write to the local APIC ends a window: the next step is the first one
        div ecx
        ud2
        mov rbx, 0x8000000000000000
        mov eax, [rbx]
        mov rbx, 0xc0ffee0000
        mov [rbx], eax
        mov al, 0
        out 0xf4, al
    on0: add qword ptr [rsp], 2
        mov rax, [rsp + 16]                 # the flags, in which KVM's step has set TF
        iretq
    on6: add qword ptr [rsp], 2
        iretq
    on13:
    on14: mov rax, cr2
        pop rdx
        add qword ptr [rsp], 2
        iretq"""
    with pair(guest(tmp_path, source), reference=reference) as both:
        outcome = both.run(2000)
    assert outcome.difference is None
    assert outcome.ended == "the guest ended itself"


@pytest.mark.kvm
def test_a_halt_behind_iret(reference: System, tmp_path: Path) -> None:
    source = """
        mov rax, rsp
        push 0x10
        push rax
        push 2
        push 0x18
        lea rax, [rip + halt]
        push rax
        iretq
        ud2
    halt: hlt
        ud2"""
    with pair(guest(tmp_path, source), reference=reference) as both:
        outcome = both.run(2000)
    assert outcome.difference is None
    assert "the guest waits" in outcome.ended


@pytest.mark.kvm
def test_to_cpl_3_and_back(reference: System, tmp_path: Path) -> None:
    source = f"""{GATES}
        lgdt [rip + gdtr]
        mov qword ptr [0x1a0004], 0x198000
        mov ax, 0x28
        ltr ax
        .irp table, 0x1000, 0x2000, 0x3000  # their first entries: open to CPL 3
            or qword ptr [\\table], 4
        .endr
        mov rax, cr3
        mov cr3, rax
        push 0x3b
        push 0x190000
        push 0x202                          # PVM shows IF as the host's at CPL 3: PUSHF
        push 0x43
        lea rax, [rip + user]
        push rax
        iretq
    user: inc rax
        pushfq
        pop rbx
        pushfw
        pop cx
        mov rbx, 0xc0ffee0000
        mov [rbx], rax
    on0: on6: on13: on14: mov al, 0
        out 0xf4, al
        .balign 8
    gdtr: .word 71; .quad gdt
    gdt: .quad 0, 0xcf9b000000ffff, 0xcf93000000ffff, 0xaf9b000000ffff, 0
        .quad 0x891a00000067, 0, 0xcff3000000ffff, 0xaffb000000ffff"""
    with pair(guest(tmp_path, source), reference=reference) as both:
        outcome = both.run(2000)
    assert outcome.difference is None
    assert outcome.ended == "the guest ended itself"


@pytest.mark.kvm
def test_an_instruction_that_this_hosts_kvm_lacks_is_no_difference(reference: System, tmp_path: Path) -> None:
    image = flat(tmp_path, assembled(SOURCES / "unemulated.S", tmp_path))
    with pair(image, reference=reference) as both:
        outcome = both.run(2000)
    assert outcome.difference is None
    assert outcome.ended.endswith(("this host's KVM can't emulate it", "the guest ended itself"))


def test_what_came_before_a_step_that_leads_apart_is_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As KVM gives up at the 50th of ``inc eax; jmp back``, after the other has gone wrong at the tenth."""
    with pair(flat(tmp_path, COUNT, "flat16")) as both:
        goes_wrong(monkeypatch, both._machines[1], 0, WRONG["xmm3"])
        step = both._machines[0].step

        def gives_up(which: int | None = None) -> tuple[Exit, ...]:
            ended = step(which)
            return (Exit(ExitKind.INTERNAL_ERROR, 1),) if regs_of(both._machines[0]).rax == 50 else ended

        monkeypatch.setattr(both._machines[0], "step", gives_up)
        outcome = both.run(2000)
    assert outcome.difference is not None
    assert (outcome.difference.step, list(outcome.difference.values)) == (2 * WRONG_AT - 1, ["xmm3"])


@pytest.mark.kvm
def test_what_is_the_hosts_is_the_references_for_both(reference: System, tmp_path: Path) -> None:
    source = """
        mov esi, 0x200000
        mov edi, 0xfee00380
        mov dword ptr [rdi - 0x290], 0x1ff      # SVR: on
        mov dword ptr [rdi], 0xffffffff         # the timer counts
    again:
        mov al, 0
        out 0x43, al                            # latches the PIT's counter 0
        in al, 0x40
        mov [rsi], al
        in al, 0x40
        mov [rsi + 1], al
        rdtsc
        mov [rsi + 4], eax
        mov ecx, 0x10
        rdmsr
        mov [rsi + 8], eax
        mov eax, [rdi + 0x10]
        mov [rsi + 12], eax
        add esi, 16
        cmp esi, 0x200000 + 16 * 20
        jb again
        mov al, 0
        out 0xf4, al"""
    with pair(guest(tmp_path, source), reference=reference) as both:
        outcome = both.run(2000)
        assert both._machines[0].read_memory(0x200000, 320) == both._machines[1].read_memory(0x200000, 320)
    assert outcome.difference is None
    assert outcome.taken.keys() == {
        "time or chance",
        "a port that is a clock",
        "an MSR that is a clock, or describes the processor",
        "a register of the local APIC that is a clock",
    }


@pytest.mark.kvm
def test_a_result_that_is_undefined_is_the_references_for_both(reference: System, tmp_path: Path) -> None:
    source = "xor eax, eax; dec rbx; bsf ebx, eax; dec rcx; bsr ecx, eax; push rbx; push rcx; hlt"
    with pair(guest(tmp_path, source), reference=reference) as both:
        outcome = both.run(2000)
    assert (outcome.steps, outcome.difference) == (8, None)


def test_of_the_cmos_only_the_clock_may_differ(tmp_path: Path) -> None:
    read = "mov al, {}; out 0x70, al; in al, 0x71; mov bl, al;"
    with pair(guest(tmp_path, read.format(0) + read.format(0x15) + "hlt")) as both:
        one, two = (machine.board.cmos for machine in both._machines)
        one._clock, two._clock = (lambda: 0), (lambda: 42)
        two._bytes[0x15] ^= 3
        outcome = both.run(2000)
    assert outcome.taken == {"a port that is a clock": 1}
    assert outcome.difference is not None
    assert (outcome.difference.step, outcome.difference.text) == (7, "in al, 0x71")
    assert list(outcome.difference.values) == ["rax"]


# What differs, is found


WRONG_AT = 10


def goes_wrong(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, vcpu: int, how: Callable[[Machine, int], None]
) -> None:
    """Each time this VCPU has counted up to WRONG_AT in RAX, something else changes, too."""
    step = machine.step

    def wrong(which: int | None = None) -> tuple[Exit, ...]:
        before = regs_of(machine, vcpu).rax
        ended = step(which)
        if which == vcpu and (before, regs_of(machine, vcpu).rax) == (WRONG_AT - 1, WRONG_AT):
            how(machine, vcpu)
        return ended

    monkeypatch.setattr(machine, "step", wrong)


def change(machine: Machine, vcpu: int, name: str, new: Callable[[bytes], bytes]) -> None:
    copy = synchronize(machine, vcpu).copy
    copy[name] = new(copy[name])


WRONG: dict[str, Callable[[Machine, int], None]] = {
    "rbx": lambda machine, vcpu: machine.edit(vcpu, "rbx", 1),
    "cr2": lambda machine, vcpu: machine.edit(vcpu, "cr2", 1),
    "xmm3": lambda machine, vcpu: change(
        machine, vcpu, "xsave", lambda raw: put_bytes(raw, Xsave.xmm.offset + 3 * 16, b"\1")
    ),
    "dr0": lambda machine, vcpu: change(machine, vcpu, "debugregs", lambda raw: bytes(DebugRegs((1,)))[:8] + raw[8:]),
    "MSR STAR": lambda machine, vcpu: change(
        machine, vcpu, "msrs", lambda raw: pack_msrs({**unpack_msrs(raw), 0xC0000081: 1})
    ),
    "memory[0x200000]": lambda machine, vcpu: machine.write_memory(0x200000, b"\1"),
}
"""A difference by its name → how a machine comes to it."""


@pytest.mark.parametrize(("name", "vcpu"), [*((name, 1) for name in WRONG), ("rbx", 0), ("memory[0x200000]", 0)])
def test_it_is_found_at_its_instruction(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, vcpu: int) -> None:
    """``inc eax; jmp back`` on both VCPUs; on one of them the tenth INC does more."""
    start = START_AP[:-2] + bytes.fromhex("31 c0 ff c0 eb fc")  # xor eax, eax; inc eax; jmp to it
    image = flat(tmp_path, start)
    image = replace(image, segments=(*image.segments, Segment(AP_ADDRESS, COUNT, len(COUNT))))
    with pair(image, vcpus=2) as both:
        goes_wrong(monkeypatch, both._machines[1], vcpu, WRONG[name])
        outcome = both.run(100)
    found = outcome.difference
    assert found is not None
    assert list(found.values) == [name]
    assert found.values[name] == (0, 1)
    assert (found.text, found.vcpu) == ("inc eax", vcpu)
    steps = 2 * WRONG_AT - 1
    assert found.step == (3 + 2 * steps - 1 if vcpu else 3 + 2 * (1 + steps)), "the AP is first, VCPU 0 has the XOR"
    assert outcome.ended == "different"


def test_who_halts_in_a_window_does_so_again_when_it_is_gone_through_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = flat(tmp_path, START_AP[:-2] + bytes.fromhex("31 c0 ff c0 eb fc"))
    image = replace(image, segments=(*image.segments, Segment(AP_ADDRESS, HLT, len(HLT))))
    with pair(image, vcpus=2) as both:
        goes_wrong(monkeypatch, both._machines[1], 0, WRONG["memory[0x200000]"])
        outcome = both.run(100)
    assert outcome.difference is not None
    assert outcome.difference.step == 3 + 2 * 2 + 2 * (WRONG_AT - 1), "the AP's CLI and HLT are among them"


@pytest.mark.parametrize(("address", "differs"), [(0x3040, False), (0x200000, True)])
def test_bits_that_may_come_early_are_none_only_in_page_tables(tmp_path: Path, address: int, differs: bool) -> None:
    """The boot tables' entry for 16 MiB, which nothing uses, and other memory with the same bits changed."""
    with pair(bundled("counter64", tmp_path)) as both:
        (before,) = both._machines[1].read_memory(address, 1)
        both._machines[1].write_memory(address, bytes((before ^ 0x60,)))
        outcome = both.run(20)
    assert (outcome.difference is not None) is differs
