"""The kernel backend moves state: batches, their errors, memory slots and dirty pages. On the real /dev/kvm."""

from __future__ import annotations

import errno
import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvm.backends.interface import PAGE_SIZE, ExitKind, IoctlTrace
from kvm.backends.kernel import bell as bell_module
from kvm.backends.kernel.library import lib
from kvm.backends.kernel.pages import copy_pages
from kvm.backends.kernel.system import KernelSystem
from kvm.errors import KvmError, SubstateError
from kvm.host_memory import anonymous
from kvm.x86 import msrs
from kvm.x86.structs import ClockData, PitState2, Regs, VcpuEvents, pack_msrs, unpack_msrs
from kvm.x86.substates import Substate, machine_table
from tests.kvm.backends.real import STOP, Guest, Running, until

pytestmark = pytest.mark.kvm

LSTAR, CSTAR, SYSENTER_CS = 0xC0000082, 0xC0000083, 0x174
NO_MSR = 0x12345678


@pytest.fixture
def guest() -> Iterator[Guest]:
    system = KernelSystem()
    built = Guest(system, STOP)
    yield built
    built.close()
    system.close()


def _settled(row: Substate, raw: bytes) -> object:
    """What of a substate stands still while nothing runs: not the TSC."""
    if row.put == "KVM_SET_MSRS":
        return {index: value for index, value in unpack_msrs(raw).items() if index != msrs.TSC}
    return raw


def test_every_row_comes_back_as_it_was_put(guest: Guest) -> None:
    rows = guest.table.get_order
    first = dict(zip(rows, guest.vcpu.get(rows), strict=True))
    for row, raw in first.items():
        assert len(raw) == len(row.template), row.name
    order = [row for row in guest.table.put_order if row in first]
    guest.vcpu.put(order, [first[row] for row in order])
    for row, raw in zip(rows, guest.vcpu.get(rows), strict=True):
        assert _settled(row, raw) == _settled(row, first[row]), row.name


def test_a_batch_handed_over_is_made_by_the_thread_that_waits(guest: Guest) -> None:
    bell, woken = guest.vcpu.bell(), []

    def wait() -> None:
        while bell.wait(20) and len(woken) < 100:
            woken.append(threading.get_ident())

    thread = threading.Thread(target=wait)
    thread.start()
    rows = tuple(guest.table.by_name[name] for name in ("regs", "sregs"))
    expected = guest.vcpu.get(rows)
    for number in range(2000):
        if number % 20 == 0:  # a ring among the jobs is heard as a ring
            bell.ring()
            until(lambda number=number: len(woken) == number // 20 + 1)
        batch = guest.vcpu.getting(rows)
        answer = batch.hand(bell)
        assert answer is not None
        assert answer.wait(20)
        assert batch.outcome() == expected
        assert batch.job.thread == thread.ident
    bell.ring()
    thread.join(20)
    assert len(woken) == 100


def test_a_batch_handed_over_needs_no_turn_of_the_interpreter(guest: Guest) -> None:
    bell = guest.vcpu.bell()
    thread = threading.Thread(target=bell.wait)
    thread.start()
    patience = sys.getswitchinterval()
    first = guest.vcpu.getting((guest.table.by_name["regs"],))
    there = first.hand(bell)
    assert there is not None
    assert there.wait(20)
    batch = guest.vcpu.getting((guest.table.by_name["regs"],))
    try:
        sys.setswitchinterval(1000)  # this thread keeps the GIL from here on
        assert batch.hand(bell)
        end = time.monotonic() + 20
        while not batch.began_ns and time.monotonic() < end:
            pass
        made = bool(batch.began_ns)
    finally:
        sys.setswitchinterval(patience)
    bell.ring()
    thread.join(20)
    assert made


def test_one_batch_at_a_time_is_handed_over(guest: Guest) -> None:
    bell, rows = guest.vcpu.bell(), (guest.table.by_name["regs"],)
    first, second = guest.vcpu.getting(rows), guest.vcpu.getting(rows)
    answer = first.hand(bell)
    assert answer is not None
    assert second.hand(bell) is None  # nobody has waited yet
    bell.ring()
    assert bell.wait(20)
    assert answer.wait(20)
    assert second.hand(bell) is not None
    bell.ring()
    assert bell.wait(20)
    assert first.outcome() == second.outcome() == guest.vcpu.get(rows)


def test_a_batch_that_was_given_up_is_left_alone(guest: Guest) -> None:
    """It may be under way still: what comes after it has a buffer of its own."""
    rows = (guest.table.by_name["regs"],)
    given_up = guest.vcpu.putting(rows, [bytes(Regs(rax=1, rflags=2))])
    later = guest.vcpu.putting(rows, [bytes(Regs(rax=2, rflags=2))])
    given_up.make()
    assert guest.regs().rax == 1
    later.make()
    later.outcome()
    assert guest.regs().rax == 2
    assert guest.vcpu.putting(rows, [bytes(Regs(rax=3, rflags=2))]) is later, "it's made again"


def test_a_struct_of_a_wrong_size_spoils_no_later_put(guest: Guest) -> None:
    by_name = guest.table.by_name
    rows = [by_name["regs"], by_name["msrs"]]
    good, other = bytes(Regs(rax=1, rflags=2)), bytes(Regs(rax=2, rflags=2))
    msrs = guest.get("msrs")
    guest.vcpu.put(rows, [good, msrs])
    for bad in (msrs[:-16], (len(msrs) // 16 + 1).to_bytes(8, "little") + msrs[8:]):
        with pytest.raises(SubstateError):
            guest.vcpu.put(rows, [other, bad])
        assert guest.regs().rax == 1
        guest.vcpu.put(rows, [good, msrs])
        assert (guest.regs().rax, guest.get("msrs")) == (1, msrs)


def test_a_batch_is_kept_from_before_it_is_handed_over(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-c may come as soon as the shim has it, and then nobody else keeps it."""
    bell = guest.vcpu.bell()
    batch = guest.vcpu.getting((guest.table.by_name["regs"],))
    kept = weakref.ref(batch)

    class Interrupted:
        def __getattr__(self, name: str) -> Any:
            return getattr(lib, name)

        def vd_bell_hand(self, *arguments: Any) -> int:
            assert lib.vd_bell_hand(*arguments)
            raise KeyboardInterrupt

    monkeypatch.setattr(bell_module, "lib", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        batch.hand(bell)
    del batch
    gc.collect()
    handed = kept()
    assert handed is not None
    bell.catch_up()
    assert handed.began_ns


def test_a_vcpu_thread_is_a_batch_thread_unless_it_was_given_another_policy(guest: Guest) -> None:
    policies = []

    def bind(before: int) -> None:
        os.sched_setscheduler(0, before, os.sched_param(0))
        guest.vcpu.bind()
        policies.append(os.sched_getscheduler(0))

    for policy in (os.SCHED_OTHER, os.SCHED_IDLE):
        thread = threading.Thread(target=bind, args=(policy,))
        thread.start()
        thread.join(20)
    assert policies == [os.SCHED_BATCH, os.SCHED_IDLE]


def test_a_batch_writes_each_row_its_own_bytes(guest: Guest) -> None:
    by_name = guest.table.by_name
    regs, msrs = bytes(Regs(rbx=0x1122334455667788, rip=0x42, rflags=2)), pack_msrs({LSTAR: 0xAAAA, CSTAR: 0xBBBB})
    rows = [by_name["regs"], replace(by_name["msrs"], template=pack_msrs([LSTAR])), by_name["mp_state"]]
    guest.vcpu.put(rows, [regs, msrs, (3).to_bytes(4, "little")])
    mp_state, regs, values = guest.vcpu.get([by_name["mp_state"], by_name["regs"], by_name["msrs"]])
    assert mp_state == b"\3\0\0\0"
    assert Regs.from_buffer_copy(regs).rbx == 0x1122334455667788
    assert unpack_msrs(values)[LSTAR] == 0xAAAA
    assert unpack_msrs(values)[CSTAR] == 0xBBBB


def test_an_empty_batch(guest: Guest) -> None:
    assert guest.vcpu.get([]) == []
    guest.vcpu.put([], [])


def test_the_machines_own_substates(guest: Guest) -> None:
    rows = machine_table(guest.system.caps)
    raw = dict(zip([row.name for row in rows], guest.vm.get(rows), strict=True))
    assert [raw[name][0] for name in ("pic_master", "pic_slave", "ioapic")] == [0, 1, 2]
    pit = PitState2.from_buffer_copy(raw["pit"])
    pit.channels[2].count = 0x1234
    by_name = {row.name: row for row in rows}
    far = ClockData(clock=10**15)
    guest.vm.put([by_name["pit"], by_name["clock"]], [bytes(pit), bytes(far)])
    again, clock = guest.vm.get([by_name["pit"], by_name["clock"]])
    assert PitState2.from_buffer_copy(again).channels[2].count == 0x1234
    assert ClockData.from_buffer_copy(clock).clock >= 10**15


# What fails


@pytest.mark.parametrize("how", ["get", "put"])
def test_an_msr_that_the_kernel_refuses_is_named(guest: Guest, how: str) -> None:
    """Firecracker 602a2108e: KVM moves those before it and reports no error."""
    by_name = guest.table.by_name
    before, after = by_name["regs"], by_name["mp_state"]
    wanted = pack_msrs({LSTAR: 0x77, NO_MSR: 0x55, SYSENTER_CS: 0x66})
    row = replace(by_name["msrs"], template=wanted)
    state = guest.get("mp_state")
    rows, raws = [before, row, after], [bytes(Regs(rax=0x99, rflags=2)), wanted, (3).to_bytes(4, "little")]
    with pytest.raises(SubstateError) as failed:
        _ = guest.vcpu.get(rows) if how == "get" else guest.vcpu.put(rows, raws)  # type: ignore[func-returns-value]
    error = failed.value
    assert (error.substate, error.moved, error.vcpu) == ("msrs", 1, 0)
    assert error.ioctl == ("KVM_GET_MSRS" if how == "get" else "KVM_SET_MSRS")
    assert hex(NO_MSR) in str(error)
    assert ("0x55" in str(error)) is (how == "put")
    if how == "put":
        values = unpack_msrs(guest.get("msrs"))
        assert guest.regs().rax == 0x99
        assert values[LSTAR] == 0x77
        assert values[SYSENTER_CS] == 0
        assert guest.get("mp_state") == state


def test_a_refused_struct_says_which_and_why(guest: Guest) -> None:
    with pytest.raises(SubstateError, match=r"VCPU 0: KVM_SET_MP_STATE \(mp_state\) failed: EINVAL") as failed:
        guest.put("mp_state", (99).to_bytes(4, "little"))
    assert (failed.value.errno, failed.value.moved) == (errno.EINVAL, 0)


def test_a_struct_too_short_is_refused_before_anything_is_written(guest: Guest) -> None:
    """The kernel would read on, past its end."""
    by_name = guest.table.by_name
    regs = guest.get("regs")
    for name, raw in (
        ("sregs", guest.get("sregs")[:-1]),
        ("msrs", (1000).to_bytes(8, "little") + bytes(16)),
        ("cpuid", (2).to_bytes(8, "little") + bytes(40)),
        ("msrs", b""),
    ):
        with pytest.raises(SubstateError) as failed:
            guest.vcpu.put([by_name["regs"], by_name[name]], [bytes(Regs(rax=1, rflags=2)), raw])
        assert (failed.value.substate, failed.value.moved) == (name, 0)
    assert guest.get("regs") == regs


def test_an_xsave_area_from_a_smaller_processor_is_filled_up(guest: Guest) -> None:
    row = guest.table.by_name["xsave"]
    raw = bytearray(guest.get("xsave"))
    raw[160:168] = b"vmdeck!!"  # XMM0
    raw[512:520] = (3).to_bytes(8, "little")  # XSTATE_BV: x87 and SSE
    guest.vcpu.put([row], [bytes(raw[:1024])])
    assert guest.get("xsave")[160:168] == b"vmdeck!!"


def test_numbers_by_value_and_tolerated_failures(guest: Guest) -> None:
    row = Substate(
        "tsc_khz", "KVM_GET_TSC_KHZ", "KVM_SET_TSC_KHZ", guest.table.by_name["regs"].level, "", bytes(4),
        by_value=True, tolerated=True,
    )  # fmt: skip
    (khz,) = guest.vcpu.get([row])
    assert int.from_bytes(khz, "little") > 100_000
    assert guest.vcpu.put([row], [khz]) == ()
    impossible = (1).to_bytes(4, "little")
    regs, raw = guest.table.by_name["regs"], bytes(Regs(rax=0x5555, rflags=2))
    (error,) = guest.vcpu.put([row, regs], [impossible, raw])
    assert (error.substate, error.ioctl, error.symbol) == ("tsc_khz", "KVM_SET_TSC_KHZ", "EINVAL")
    assert guest.regs().rax == 0x5555
    with pytest.raises(SubstateError, match="tsc_khz"):
        guest.vcpu.put([replace(row, tolerated=False)], [impossible])
    events, bad = guest.table.by_name["events"], bytes(VcpuEvents(flags=0x80000000))
    with pytest.raises(SubstateError, match="events") as failed:
        guest.vcpu.put([regs, row, events, row], [raw, impossible, bad, impossible])
    assert failed.value.moved == 2
    assert [each.substate for each in failed.value.tolerated] == ["tsc_khz"]


def test_the_tsc_offset_is_a_device_attribute_behind_a_pointer(guest: Guest) -> None:
    """Linux 828ca89628bf brought the capability to x86 with this attribute: the one tells of the other."""
    row = guest.table.by_name.get("tsc_offset")
    has_device_attr = 0x4018AEE3
    attribute = bytes(24)  # struct kvm_device_attr: group KVM_VCPU_TSC_CTRL, attribute KVM_VCPU_TSC_OFFSET
    there = lib.vd_ioctl(guest.vcpu._fd.number, has_device_attr, attribute) == 0
    assert there is (row is not None)
    if row is None:
        pytest.skip("this kernel has no TSC offsets")
    regs = guest.table.by_name["regs"]
    raw = guest.vcpu.get([replace(row, template=b"unwritten"[:8]), regs])[0]
    assert raw != b"unwritten"[:8]
    guest.vcpu.put([row, regs], [raw, bytes(Regs(rax=0x77, rflags=2))])
    assert (guest.get("tsc_offset"), guest.regs().rax) == (raw, 0x77)


def test_a_tolerated_partial_msr_put_names_the_msr(guest: Guest) -> None:
    row = replace(guest.table.by_name["msrs"], tolerated=True)
    (error,) = guest.vcpu.put([row], [pack_msrs({0xC0000081: 5, 0xC0000082: 1 << 63})])
    assert error.symbol == "EINVAL"
    assert "MSR 0xc0000082 = 0x8000000000000000 refused, 1 of 2 moved" in str(error)


# Who may


def test_another_thread_may_not_touch_the_state(guest: Guest) -> None:
    row = guest.table.by_name["regs"]
    raw = guest.get("regs")
    refused: list[str] = []

    def intrude() -> None:
        attempts: tuple[Callable[[], object], ...] = (
            lambda: guest.vcpu.get([row]),
            lambda: guest.vcpu.put([row], [raw]),
            lambda: guest.vcpu.run(guest.bus),
            lambda: guest.vm.nmi(guest.vcpu),
        )
        for attempt in attempts:
            try:
                attempt()
            except AssertionError as error:
                refused.append(str(error))
        guest.vcpu.kick()
        guest.vcpu.request_sample()
        guest.vcpu.sample()
        guest.vcpu.waiting()

    guest.vcpu.bind()
    thread = threading.Thread(target=intrude, name="intruder")
    thread.start()
    thread.join()
    assert len(refused) == 4
    assert all("VCPU 0" in message and "intruder" in message for message in refused)


def test_the_trace_has_every_ioctl_its_thread_and_its_vcpu(guest: Guest) -> None:
    by_name = guest.table.by_name
    rows = [by_name["regs"], by_name["mp_state"]]
    here = threading.get_ident()
    trace: list[IoctlTrace] = []
    guest.system.trace = trace
    raw = guest.vcpu.get(rows)
    guest.vcpu.put(rows, raw)
    guest.vm.irq_line(3, False)
    guest.vm.get(machine_table(guest.system.caps)[:1])
    guest.run()
    guest.system.trace = None
    guest.vcpu.get(rows)
    assert [(call.ioctl, call.substate, call.vcpu, call.thread) for call in trace] == [
        ("KVM_GET_REGS", "regs", 0, here),
        ("KVM_GET_MP_STATE", "mp_state", 0, here),
        ("KVM_SET_REGS", "regs", 0, here),
        ("KVM_SET_MP_STATE", "mp_state", 0, here),
        ("KVM_IRQ_LINE", "", None, here),
        ("KVM_GET_IRQCHIP", "pic_slave", None, here),
        ("KVM_RUN", "", 0, here),  # port 0xf4
        ("KVM_RUN", "", 0, here),  # the kick
    ]
    trace = []
    guest.system.trace = trace
    with Running(guest) as running:
        guest.vcpu.kick()
        running.ended()
    assert [call.ioctl for call in trace] == ["KVM_RUN"]
    assert trace[0].thread != here


# Memory


def test_dirty_pages_of_two_slots(guest: Guest) -> None:
    """Firecracker #5705: each slot counts from its own start."""
    high = anonymous(0x10000)
    guest.vm.set_memory(0, 0, guest.memory, log_dirty=True)
    guest.vm.set_memory(1, 0x20000, high, log_dirty=True)
    # mov [0x5000],al; mov [0x3000],al; mov ax,0x2000; mov ds,ax; mov [0x7000],al
    guest.memory[0x1000:0x1012] = bytes.fromhex("a2 00 50 a2 00 30 b8 00 20 8e d8 a2 00 70") + STOP
    assert guest.run().kind is ExitKind.KICKED
    assert guest.vm.dirty_pages(0).tolist() == [3, 5]
    assert guest.vm.dirty_pages(1).tolist() == [7]
    assert guest.vm.dirty_pages(0).tolist() == guest.vm.dirty_pages(1).tolist() == []
    guest.put("regs", bytes(Regs(rip=0x1000, rflags=2)))
    sregs = guest.sregs()
    sregs.ds.base = sregs.ds.selector = 0
    guest.put("sregs", bytes(sregs))
    guest.run()
    assert guest.vm.dirty_pages(0).tolist() == [3, 5]  # caught again after they were taken


def test_going_back_fills_what_is_dirty_or_marked(guest: Guest) -> None:
    guest.vm.set_memory(0, 0, guest.memory, log_dirty=True)
    code = bytes.fromhex("a2 00 50 a2 00 30") + STOP  # mov [0x5000], al; mov [0x3000], al
    guest.memory[0x1000 : 0x1000 + len(code)] = code
    guest.run()
    pages = len(guest.memory) // PAGE_SIZE
    source = np.repeat(np.arange(4, dtype=np.uint8), PAGE_SIZE).reshape(4, PAGE_SIZE)
    places = np.arange(pages) % 4
    before = bytes(guest.memory)
    assert guest.vm.go_back(0, {5, 6, pages - 1}, source, places) == 4
    for page in range(pages):
        now = guest.memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        filled = page in (3, 5, 6, pages - 1)
        assert now == (bytes([page % 4]) * PAGE_SIZE if filled else before[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])
    assert guest.vm.go_back(0, (), source, places) == 0
    for marks, bad in (({pages}, places), ({-1}, places), ({2}, places + 2), ({0}, places - 1)):
        with pytest.raises(KvmError, match="ERANGE"):
            guest.vm.go_back(0, marks, source, bad)


def test_a_log_that_was_never_asked_for(guest: Guest) -> None:
    for ask in (
        lambda: guest.vm.dirty_pages(0),
        lambda: guest.vm.go_back(
            0, (), np.zeros((1, PAGE_SIZE), np.uint8), np.zeros(len(guest.memory) // PAGE_SIZE, np.int64)
        ),
    ):
        with pytest.raises(KvmError, match=r"KVM_GET_DIRTY_LOG \(slot 0\)"):
            ask()


def test_writes_to_read_only_memory_go_to_the_bus(guest: Guest) -> None:
    rom = anonymous(0x1000)
    rom[0] = 0x42
    guest.vm.set_memory(1, 0x20000, rom, readonly=True)
    # mov ax,0x2000; mov ds,ax; mov al,[0]; mov [1],al
    guest.memory[0x1000:0x100F] = bytes.fromhex("b8 00 20 8e d8 a0 00 00 a2 01 00") + STOP
    guest.run()
    assert guest.bus.seen == [("write", 0x20001, 1, 0x42)]
    assert rom[1] == 0
    guest.vm.set_memory(1, 0x20000, rom, readonly=False)
    guest.put("regs", bytes(Regs(rip=0x1000, rflags=2)))
    guest.run()
    assert rom[1] == 0x42


def test_memory_that_kvm_refuses(guest: Guest) -> None:
    with pytest.raises(KvmError, match="slot 7, 0x1000 bytes at 0x123"):
        guest.vm.set_memory(7, 0x123, anonymous(0x1000))


def test_guest_memory_cannot_be_closed_under_the_guest() -> None:
    system = KernelSystem()
    guest = Guest(system, STOP)
    with pytest.raises(BufferError):
        guest.memory.close()
    guest.close()
    system.close()


def test_copying_pages() -> None:
    source = np.arange(5 * PAGE_SIZE, dtype=np.uint8).reshape(5, PAGE_SIZE) ^ np.arange(5, dtype=np.uint8)[:, None]
    target = np.zeros((8, PAGE_SIZE), np.uint8)
    copy_pages(target, np.array([7, 2]), source, np.array([4, 0]))
    assert (target[7] == source[4]).all()
    assert (target[2] == source[0]).all()
    assert not target[[0, 1, 3, 4, 5, 6]].any()
    copy_pages(target, None, source, np.array([3, 1]))
    assert (target[:2] == source[[3, 1]]).all()
    for bad in (np.array([5]), np.array([-1])):
        with pytest.raises(IndexError):
            copy_pages(target, None, source, bad)
    with pytest.raises(IndexError):
        copy_pages(target, np.array([8]), source, np.array([0]))
    with pytest.raises(IndexError):
        copy_pages(target, np.array([1, 2]), source, np.array([0]))
