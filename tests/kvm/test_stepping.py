"""A single step leaves nothing behind in the guest that a processor's own step wouldn't.

KVM steps by the guest's own trap flag, and its emulator is done with a HLT before the VCPU halts (Linux x86.c): what
that breaks is mended in kvm/backends/kernel/stepping.py. The software backend must be as it should be anyway.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from app import guests
from kvm.backends.interface import ExitKind, System
from kvm.boot import loader
from kvm.machine import Machine, MachineConfig, Phase
from kvm.x86.structs import MP_STATE_HALTED, MP_STATE_RUNNABLE, MpState, Regs, Sregs
from tests.kvm.contract.lab import assembled, regs_of
from tests.kvm.machines import ORIGIN, ORIGIN_32, build, until
from tests.kvm.test_demo_machine import MEMORY, Serial

OK = 0x2A
RF = 1 << 16


def machine(system: System, folder: Path, format: str, source: str) -> Machine:
    path = folder / "guest.S"
    path.write_text(f".intel_syntax noprefix\n.globl _start\n_start:\n{source}\n")
    return build(system, folder, assembled(path, folder, ORIGIN if format == "flat16" else ORIGIN_32), format=format)


def sampled(m: Machine, vcpu: int = 0) -> Regs:
    """While it runs."""
    m.request_samples()
    return regs_of(m, vcpu)


def cpl(m: Machine, vcpu: int) -> int:
    return Sregs.from_buffer_copy(m.view(vcpu).sregs).ss.dpl


def kernel_stack(m: Machine, vcpu: int) -> bytes:
    """Where an exception at CPL 3 pushes what."""
    tss = Sregs.from_buffer_copy(m.view(vcpu).sregs).tr.base
    top = int.from_bytes(m.read_memory(tss + 4, 8), "little")
    return m.read_memory((top & ~15) - 64, 64)


def mp_state(m: Machine) -> int:
    return int.from_bytes(m.save().vcpus[0]["mp_state"], "little")


@pytest.mark.parametrize(("format", "bits"), [("flat16", 16), ("flat32", 32), ("flat64", 64)])
def test_a_step_over_hlt_halts_the_vcpu_there_and_nowhere_else(
    system: System, tmp_path: Path, format: str, bits: int
) -> None:
    with machine(system, tmp_path, format, f".code{bits}\n cli; hlt; inc ebx; inc ebx; inc ebx; 1: jmp 1b") as m:
        m.step(0)
        before = regs_of(m)
        (ended,) = m.step(0)
        assert ended.kind is ExitKind.DEBUG
        assert (regs_of(m).rip, mp_state(m)) == (before.rip + 1, MP_STATE_HALTED)
        m.run()
        until(lambda: bool(m.vcpus[0].fd.waiting()))
        m.pause()
        assert (regs_of(m).rip, regs_of(m).rbx) == (before.rip + 1, before.rbx)
        state = m.save()
        m.load(replace(state, vcpus=({**state.vcpus[0], "mp_state": bytes(MpState(MP_STATE_RUNNABLE))},)))
        m.run()
        until(lambda: sampled(m).rbx == before.rbx + 3)  # nothing is left of it


@pytest.mark.kvm
@pytest.mark.parametrize(("instruction", "size"), [("hlt", 1), ("iretq", 2)])
def test_the_next_step_starts_where_one_that_kvm_did_not_make_has_ended(
    tmp_path: Path, instruction: str, size: int
) -> None:
    """KVM sets the trap flag where it's told to step, and not where registers are written later on."""
    from kvm.backends.kernel.system import KernelSystem

    system = KernelSystem()
    source = f""".code64
        mov rax, rsp; push 0x10; push rax; push 2; push 0x18; lea rax, [rip + 1f]; push rax
        {instruction}; 1: nop"""
    with machine(system, tmp_path, "flat64", source) as m:
        for _ in range(7):
            m.step(0)
        before = regs_of(m).rip
        system.trace = []
        (ended,) = m.step(0)
        made = [call.ioctl for call in system.trace if call.ioctl.startswith("KVM_SET")]
        assert ended.detail == f"stepped over {instruction.upper()}"
        assert regs_of(m).rip == before + size
        assert made[-1] == "KVM_SET_GUEST_DEBUG"
    system.close()


FAULT = """.code64
        lea rax, [rip + handler]; mov edi, 0x180000 + 16 * 14
        mov [rdi], ax; mov dword ptr [rdi + 2], 0x8e000018 & 0xffff; mov byte ptr [rdi + 5], 0x8e
        shr rax, 16; mov [rdi + 6], ax; mov dword ptr [rdi + 8], 0
        lidt [rip + idtr]; mov rbx, 0xc0ffee0000
        mov eax, [rbx]
        mov al, 0x2a; out 0xf4, al
    handler: add rsp, 8; add qword ptr [rsp], 2; iretq
        .balign 8
    idtr: .word 0xfff; .quad 0x180000"""
"""A page fault, whose handler goes on behind the load. There is none for #DB, which a trap flag would raise."""
LOAD = b"\x8b\x03"


def test_a_step_over_an_exception_leaves_no_trap_flag_to_return_to(system: System, tmp_path: Path) -> None:
    with machine(system, tmp_path, "flat64", FAULT) as m:
        while m.read_memory(regs_of(m).rip, 2) != LOAD:
            m.step(0)
        m.edit(0, "rcx", 1)  # KVM sets the flag where it's given registers
        before = regs_of(m)
        m.step(0)
        assert not before.rip <= regs_of(m).rip <= before.rip + 2, "it's in its handler"
        pushed = int.from_bytes(m.read_memory((before.rsp & ~15) - 24, 8), "little")
        assert pushed & ~RF == before.rflags
        m.run()
        assert m.wait(Phase.EXITED, Phase.STOPPED, timeout=20).code == OK


def test_steps_go_through_cpl_3_and_back_and_the_guest_never_knows(system: System) -> None:
    """VCPU 1 of the demo sums at CPL 3, comes up by a page fault, and goes down again by IRETQ."""
    image = loader.load(guests.demo(), memory=MEMORY)
    with Machine(system, image, MachineConfig(vcpus=2, memory=MEMORY)) as m:
        boot = Serial(m)
        m.run()
        boot.wait_lines(6)
        while m.status.phase is Phase.RUNNING or cpl(m, 1) != 3:
            m.run()
            until(lambda: bool(sampled(m, 1)) and cpl(m, 1) == 3)  # it may have gone up again before it stands
            m.pause()
        flag = regs_of(m, 1).r8
        levels = []
        for told in (1, 0):  # to stop summing, which takes it up; and to go on, which takes it down again
            level = cpl(m, 1)
            m.write_memory(flag, bytes([told]))
            for _ in range(4000):
                assert m.step(1)[0].kind is ExitKind.DEBUG
                if cpl(m, 1) != level:
                    break
            levels.append(cpl(m, 1))
        assert levels == [0, 3]
        before, stack = regs_of(m, 1), kernel_stack(m, 1)
        for _ in range(300):
            m.step(1)
            assert cpl(m, 1) == 3
            assert not regs_of(m, 1).rflags & 0x100
        assert regs_of(m, 1).rip != before.rip
        assert kernel_stack(m, 1) == stack
        after = Serial(m)
        m.run()
        assert not any(b"EXCEPTION" in line or b"FAILED" in line for line in after.wait_lines(4))
