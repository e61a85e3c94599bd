"""The kernel backend runs guests: I/O, kicks, samples, exits. On the real /dev/kvm."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvm.backends.interface import PAGE_SIZE, Exit, ExitKind, Sample
from kvm.backends.kernel.pages import copy_pages
from kvm.backends.kernel.system import KernelSystem
from kvm.x86.structs import GUESTDBG_ENABLE, GUESTDBG_SINGLESTEP, GuestDebug, Regs, Sregs, VcpuEvents
from tests.kvm.backends.real import DS_MMIO, LIMIT, ORIGIN, STOP, Guest, Running, until

pytestmark = pytest.mark.kvm

COUNT = bytes.fromhex("40 eb fd")
"""inc ax; jmp back."""
HEAD = len(bytes(Sregs())) - 32
"""Bytes of kvm_sregs that are kvm_sregs2's too: all but the interrupt bitmap."""
HALT = bytes.fromhex("fa f4 eb fd")
"""cli; hlt; jmp back to hlt."""

Build = Callable[..., Guest]


@pytest.fixture
def build() -> Iterator[Build]:
    guests: list[Guest] = []
    system = KernelSystem()

    def make(code: str | bytes, **more: object) -> Guest:
        guests.append(Guest(system, bytes.fromhex(code) if isinstance(code, str) else code, **more))  # type: ignore[arg-type]
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()
    system.close()


# Port I/O and MMIO


def test_ports_in_three_sizes(build: Build) -> None:
    # mov al,0x41; out 0xe9,al; mov dx,0x123; mov eax,0x89abcdef; out dx,ax; out dx,eax; in eax,dx
    guest = build(bytes.fromhex("b0 41 e6 e9 ba 23 01 66 b8 ef cd ab 89 ef 66 ef 66 ed") + STOP)
    guest.bus.reads[0x123] = 0x12345678
    assert guest.run().kind is ExitKind.KICKED
    assert guest.bus.seen == [
        ("out", 0xE9, 1, 0x41),
        ("out", 0x123, 2, 0xCDEF),
        ("out", 0x123, 4, 0x89ABCDEF),
        ("in", 0x123, 4, 0x12345678),
    ]
    assert guest.regs().rax & 0xFFFFFFFF == 0x12345678


def test_a_port_that_reads_as_ones(build: Build) -> None:
    guest = build(bytes.fromhex("e4 99") + STOP)  # in al,0x99: the recorder answers -1
    guest.run()
    assert guest.regs().rax & 0xFF == 0xFF


def test_string_output_and_input(build: Build) -> None:
    # cld; mov dx,0x55; mov si,0x2000; mov cx,5; rep outsb; mov di,0x3000; mov cx,3; rep insw
    guest = build(bytes.fromhex("fc ba 55 00 be 00 20 b9 05 00 f3 6e bf 00 30 b9 03 00 f3 6d") + STOP)
    guest.memory[0x2000:0x2005] = b"hello"
    guest.bus.reads[0x55] = 0xBEEF
    guest.run()
    assert bytes(value for kind, _, _, value in guest.bus.seen if kind == "out") == b"hello"
    assert guest.memory[0x3000:0x3008] == b"\xef\xbe" * 3 + b"\0\0"


def test_mmio_in_four_sizes(build: Build) -> None:
    # mov eax,[0x40]; mov [0x10],eax; mov [0x14],ax; mov al,[0x20]; mov [0x21],al; movq mm0,[0x30]; movq [0x38],mm0
    code = "66 a1 40 00 66 a3 10 00 a3 14 00 a0 20 00 a2 21 00 0f 6f 06 30 00 0f 7f 06 38 00"
    guest = build(DS_MMIO + bytes.fromhex(code) + STOP)
    guest.bus.reads = {0xA0040: 0x11223344, 0xA0020: 0x99, 0xA0030: 0x0123456789ABCDEF}
    guest.run()
    assert guest.bus.seen == [
        ("read", 0xA0040, 4, 0x11223344),
        ("write", 0xA0010, 4, 0x11223344),
        ("write", 0xA0014, 2, 0x3344),
        ("read", 0xA0020, 1, 0x99),
        ("write", 0xA0021, 1, 0x99),
        ("read", 0xA0030, 8, 0x0123456789ABCDEF),
        ("write", 0xA0038, 8, 0x0123456789ABCDEF),
    ]


def test_mmio_across_a_page_comes_in_sizes_that_the_bus_knows(build: Build) -> None:
    # mov eax,0x44332211; mov [0x0fff],eax
    guest = build(DS_MMIO + bytes.fromhex("66 b8 11 22 33 44 66 a3 ff 0f") + STOP)
    guest.run()
    written = {}
    for kind, address, size, value in guest.bus.seen:
        assert kind == "write"
        assert size in (1, 2, 4, 8)
        written.update({address + i: value >> 8 * i & 0xFF for i in range(size)})
    assert written == {0xA0FFF: 0x11, 0xA1000: 0x22, 0xA1001: 0x33, 0xA1002: 0x44}


@pytest.mark.parametrize("code", [bytes.fromhex("e4 60"), DS_MMIO + bytes.fromhex("a0 20 00")], ids=["port", "mmio"])
def test_a_pending_read_is_completed_before_a_kick_returns(build: Build, code: bytes) -> None:
    guest = build(code + bytes.fromhex("eb fe"))
    guest.bus.reads = {0x60: 0x5A, 0xA0020: 0x5A}
    guest.bus.on_read = guest.vcpu.kick
    assert guest.run().kind is ExitKind.KICKED
    regs = guest.regs()
    assert regs.rax & 0xFF == 0x5A
    assert regs.rip == ORIGIN + len(code)


# The coalesced ring


def test_gathered_writes_come_before_the_exit_that_follows_them(build: Build) -> None:
    # mov al,'a'; out 0xe9,al; inc ax; out 0xe9,al; out 0x80,al; inc ax; out 0xe9,al
    guest = build(bytes.fromhex("b0 61 e6 e9 40 e6 e9 e6 80 40 e6 e9") + STOP, coalesce=(0xE9,))
    guest.system.trace = []
    guest.run()
    assert [(port, chr(value)) for _, port, _, value in guest.bus.seen] == [
        (0xE9, "a"),
        (0xE9, "b"),
        (0x80, "b"),
        (0xE9, "c"),
    ]
    # An exit each for ports 0x80 and 0xf4, and the kick: none for the console.
    assert [call.ioctl for call in guest.system.trace] == ["KVM_RUN"] * 3


def test_more_than_the_ring_holds_stays_in_order(build: Build) -> None:
    # mov eax,-1; mov dx,0xec; mov cx,200; out dx,eax; loop back to out; then, into the ring's used slots:
    # cld; mov dx,0xe9; mov si,0x2000; mov cx,1000; rep outsb
    code = "66 b8 ff ff ff ff ba ec 00 b9 c8 00 66 ef e2 fc" + "fc ba e9 00 be 00 20 b9 e8 03 f3 6e"
    guest = build(bytes.fromhex(code) + STOP, coalesce=(0xE9,))
    assert guest.vm.coalesce(0xEC, 4)
    sent = bytes(i % 251 for i in range(1000))
    guest.memory[0x2000 : 0x2000 + 1000] = sent
    guest.run()
    assert guest.bus.seen == [("out", 0xEC, 4, 0xFFFFFFFF)] * 200 + [("out", 0xE9, 1, value) for value in sent]


def test_the_ring_is_drained_by_a_kick_and_by_request(build: Build) -> None:
    # in al,0x60; out 0xe9,al; jmp $ -- no exit follows the write
    guest = build("e4 60 e6 e9 eb fe", coalesce=(0xE9,))
    guest.bus.reads[0x60] = 0x77

    def drained() -> bool:
        guest.vm.drain(guest.bus)
        return ("out", 0xE9, 1, 0x77) in guest.bus.seen

    with Running(guest):
        until(drained)
    guest.put("regs", bytes(Regs(rip=ORIGIN, rflags=2)))
    guest.bus.seen.clear()
    with Running(guest) as running:
        until(lambda: guest.bus.seen != [])
        # Wherever the guest is between the two instructions: it is past the write once it stands at the jump.
        until(lambda: _stands_at(guest, ORIGIN + 4))
        guest.vcpu.kick()
        running.ended()
        assert guest.bus.seen == [("in", 0x60, 1, 0x77), ("out", 0xE9, 1, 0x77)]


def _stands_at(guest: Guest, rip: int) -> bool:
    guest.vcpu.request_sample()
    sample = guest.vcpu.sample()
    return sample is not None and Regs.from_buffer_copy(sample.regs).rip == rip


# Kicks


@pytest.mark.parametrize("code", [COUNT, HALT], ids=["busy", "halted"])
def test_a_kick_stops_it(build: Build, code: bytes) -> None:
    guest = build(code)
    with Running(guest) as running:
        until(lambda: guest.vcpu.waiting() is (code is HALT))
        guest.vcpu.kick()
        assert running.ended() == Exit(ExitKind.KICKED)


def test_a_kick_before_run_counts_until_it_is_cleared(build: Build) -> None:
    guest = build(bytes.fromhex("b0 01 e6 80") + STOP)
    guest.vcpu.kick()
    assert guest.vcpu.run(guest.bus).kind is ExitKind.KICKED
    assert guest.vcpu.run(guest.bus).kind is ExitKind.KICKED
    assert guest.bus.seen == []
    guest.run()
    assert guest.bus.seen == [("out", 0x80, 1, 1)]


def test_no_kick_is_lost_wherever_it_strikes(build: Build) -> None:
    guest = build(COUNT)
    mailbox: queue.SimpleQueue[bool] = queue.SimpleQueue()
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
    # Copying them passes some 50 us without the GIL, about what it takes to wake a thread.
    pages = np.zeros((200, PAGE_SIZE), np.uint8)

    def owner() -> None:
        guest.vcpu.bind()
        more = True
        while more:
            guest.vcpu.clear_kick()
            try:
                more = mailbox.get_nowait()
            except queue.Empty:
                guest.vcpu.run(guest.bus)
            else:
                answers.put(more)
                copy_pages(pages, None, pages, None)

    thread = threading.Thread(target=owner, daemon=True)
    thread.start()
    for left in reversed(range(1000)):
        copy_pages(pages, None, pages[: left % 200], None)  # sweeps the kick over the owner's way into the guest
        if left % 2:
            guest.vcpu.request_sample()  # it shares immediate_exit and the signal with kicks
        mailbox.put(left > 0)
        guest.vcpu.kick()
        answers.get(timeout=LIMIT)  # raises Empty if the kick was lost: the guest runs for ever
    thread.join(LIMIT)
    guest.vcpu.bind()


# Samples


def _next_sample(guest: Guest, after: int) -> Sample:
    found: list[Sample] = []

    def newer() -> bool:
        sample = guest.vcpu.sample()
        if sample is not None and sample.sequence > after:
            found.append(sample)
        return bool(found)

    until(newer)
    return found[0]


@pytest.mark.parametrize("code", [COUNT, HALT], ids=["busy", "halted"])
def test_samples_come_without_leaving_run(build: Build, code: bytes) -> None:
    guest = build(code)
    with Running(guest):
        guest.system.trace = []
        sequence, time_ns, seen = 0, 0, set()
        for _ in range(30):
            guest.vcpu.request_sample()
            sample = _next_sample(guest, sequence)
            assert sample.time_ns > time_ns
            regs, sregs = Regs.from_buffer_copy(sample.regs), Sregs.from_buffer_copy(sample.sregs)
            assert ORIGIN <= regs.rip < ORIGIN + len(code)
            assert sregs.cs.base == 0
            assert len(sample.events) == len(bytes(VcpuEvents()))
            seen.add(regs.rax)
            sequence, time_ns = sample.sequence, sample.time_ns
        assert guest.system.trace == []  # KVM_RUN never came back to Python
        guest.system.trace = None
    assert len(seen) > 1 or code is HALT  # not one stale picture thirty times


def test_a_sample_asked_for_before_run_is_not_lost(build: Build) -> None:
    guest = build(COUNT)
    guest.vcpu.request_sample()
    with Running(guest):  # clears kicks, not samples
        _next_sample(guest, 0)


def test_every_return_to_the_machine_publishes_what_the_registers_are(build: Build) -> None:
    guest = build(bytes.fromhex("b8 34 12") + STOP)  # mov ax,0x1234
    assert guest.vcpu.sample() is None
    for ax in (0x1234, 0x4321, 0x1111):
        guest.memory[ORIGIN + 1 : ORIGIN + 3] = ax.to_bytes(2, "little")
        guest.put("regs", bytes(Regs(rip=ORIGIN, rflags=2)))
        guest.run()
        sample = guest.vcpu.sample()
        assert sample is not None
        assert sample.regs == guest.get("regs")
        assert sample.sregs[:HEAD] == guest.get("sregs")[:HEAD]
        assert sample.events == guest.get("events")
        assert Regs.from_buffer_copy(sample.regs).rax & 0xFFFF == ax


def test_without_sync_regs_there_are_kicks_but_no_samples() -> None:
    system = KernelSystem()
    system.caps["KVM_CAP_SYNC_REGS"] = 0
    guest = Guest(system, COUNT)
    with Running(guest) as running:
        guest.vcpu.request_sample()
        guest.vcpu.kick()
        assert running.ended().kind is ExitKind.KICKED
        assert guest.vcpu.sample() is None
    guest.close()
    system.close()


# Waiting, interrupts, other VCPUs


def test_waiting_tells_halted_from_busy(build: Build) -> None:
    for code in (COUNT, HALT):
        guest = build(code)
        with Running(guest):
            until(lambda guest=guest, code=code: guest.vcpu.waiting() is (code is HALT))  # type: ignore[misc]


def test_an_interrupt_line_wakes_a_halted_vcpu(build: Build) -> None:
    # The 8259 as PCs have it, IRQ 0 at vector 0x20, all masked but IRQ 4; sti; hlt; jmp back to hlt
    icw = "b0 11 e6 20 b0 20 e6 21 b0 04 e6 21 b0 01 e6 21 b0 ef e6 21"
    guest = build(bytes.fromhex(icw + "fb f4 eb fd"))
    guest.memory[0x24 * 4 : 0x24 * 4 + 4] = (0x3000).to_bytes(4, "little")
    guest.memory[0x3000:0x3008] = bytes.fromhex("b0 99 e6 80") + STOP
    with Running(guest) as running:
        until(lambda: guest.vcpu.waiting() is True)
        guest.vm.irq_line(4, True)
        guest.vm.irq_line(4, False)
        assert running.ended().kind is ExitKind.KICKED
    assert guest.bus.seen == [("out", 0x80, 1, 0x99)]


def test_an_nmi_arrives(build: Build) -> None:
    guest = build(HALT)
    guest.memory[8:12] = (0x3000).to_bytes(4, "little")
    guest.memory[0x3000:0x3008] = bytes.fromhex("b0 88 e6 80") + STOP
    guest.vm.nmi(guest.vcpu)
    assert guest.run().kind is ExitKind.KICKED
    assert guest.bus.seen == [("out", 0x80, 1, 0x88)]


def test_an_ap_starts_by_init_and_sipi(build: Build) -> None:
    # DS at the local APIC: enable it (SVR); ICR high = APIC 1; ICR low = INIT; SIPI vector 3, twice; jmp $
    icr = "66 c7 06 f0 00 ff 01 00 00 66 c7 06 10 03 00 00 00 01 66 c7 06 00 03 00 45 00 00"
    icr += "66 c7 06 00 03 03 46 00 00" * 2
    guest = build(bytes.fromhex(icr + "eb fe"), vcpus=2)
    guest.memory[0x3000:0x3006] = bytes.fromhex("b0 aa e6 80 eb fe")
    sregs = guest.sregs()
    sregs.ds.base = 0xFEE00000
    guest.put("sregs", bytes(sregs))
    ap = guest.vcpus[1]
    with Running(guest, ap):
        until(lambda: ap.waiting() is True)
        assert guest.bus.seen == []
        with Running(guest):
            until(lambda: guest.bus.seen == [("out", 0x80, 1, 0xAA)])


# Exits


def test_single_step(build: Build) -> None:
    guest = build("40 40 90 eb fb")  # inc ax; inc ax; nop; jmp back
    debug = GuestDebug(control=GUESTDBG_ENABLE | GUESTDBG_SINGLESTEP)
    guest.put("guest_debug", bytes(debug))
    for rip in (1, 2, 3, 0, 1):
        stop = guest.run()
        assert stop.kind is ExitKind.DEBUG
        assert stop.code & 1 << 14  # DR6.BS
        assert f"{ORIGIN + rip:#x}" in stop.detail
        assert guest.regs().rip == ORIGIN + rip
        sample = guest.vcpu.sample()
        assert sample is not None
        assert sample.regs == guest.get("regs")


def test_a_triple_fault_is_a_shutdown(build: Build) -> None:
    guest = build("0f 0b")  # ud2, in protected mode: KVM's real-mode emulation doesn't look at the IDT's limit
    sregs = guest.sregs()
    sregs.cr0 |= 1
    sregs.cs.selector = 8
    sregs.idt.limit = 0
    guest.put("sregs", bytes(sregs))
    assert guest.run() == Exit(ExitKind.SHUTDOWN, detail="triple fault")


def test_an_instruction_that_kvm_cannot_emulate(build: Build) -> None:
    # popcnt ax,[0x10] on MMIO: no KVM can have the processor do that, and its emulator has no popcnt
    popcnt = bytes.fromhex("f3 0f b8 06 10 00")
    guest = build(DS_MMIO + popcnt + STOP)
    stop = guest.run()
    assert (stop.kind, stop.code) == (ExitKind.INTERNAL_ERROR, 1)
    assert stop.insn.startswith(popcnt)
    assert popcnt.hex(" ") in stop.detail
    assert guest.regs().rip == ORIGIN + len(DS_MMIO)  # it stands on it


def test_the_other_vendors_hypercall_is_an_invalid_opcode(build: Build) -> None:
    # vmcall; vmmcall; mov al,bl; out 0x80,al. The #UD handler: pop ax; add ax,3; push ax; inc bl; iret
    code = bytes.fromhex("0f 01 c1 0f 01 d9 88 d8 e6 80") + STOP
    guest = build(code)
    guest.memory[6 * 4 : 6 * 4 + 4] = (0x3000).to_bytes(4, "little")
    guest.memory[0x3000:0x3008] = bytes.fromhex("58 83 c0 03 50 fe c3 cf")
    with Running(guest) as running:  # where vmcall isn't refused it may loop for ever
        assert running.ended().kind is ExitKind.KICKED
    [(_, port, _, invalid)] = guest.bus.seen
    assert port == 0x80
    assert invalid >= 1
    assert guest.memory[ORIGIN : ORIGIN + len(code)] == code  # nor did KVM patch it
