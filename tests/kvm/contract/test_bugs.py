"""The bugs that others had (FACTS 5, 1 to 14), a test each, on both backends.

Each check is made twice: as vmdeck is, where it must hold, and with the guard taken out, where it must not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvm import sync
from kvm.backends.interface import Exit, System
from kvm.backends.kernel.library import lib
from kvm.backends.kernel.vcpu import KernelVcpuFd
from kvm.backends.software.system import SoftwareSystem
from kvm.backends.software.vcpu import SoftwareVcpu
from kvm.errors import MachineError
from kvm.ledger import Ledger
from kvm.machine import Machine, Phase
from kvm.snapshot.state import MachineState
from kvm.vcpu import Reply, Vcpu
from kvm.x86 import msrs, tsc
from kvm.x86.structs import (
    EVENT_VALID_NMI_PENDING,
    EVENT_VALID_SIPI_VECTOR,
    EVENT_VALID_SMM,
    MP_STATE_RUNNABLE,
    MP_STATE_UNINITIALIZED,
    MpState,
    Regs,
    VcpuEvents,
    pack_msrs,
    unpack_msrs,
)
from kvm.x86.substates import vcpu_table
from tests.kvm.contract.lab import (
    AP_ADDRESS,
    AP_CODE,
    AP_COUNT,
    COUNT_INTERRUPTS,
    FULL,
    NMI_COUNT,
    RESET,
    RUNTIME,
    START_AP,
    VECTOR_COUNT,
    Tracing,
    assembled,
    changed_regs,
    interrupt,
    makes_progress,
    nmi,
    regs_of,
    synchronize,
    take_interrupts,
    tsc_distances,
    whole,
    with_get_order,
    with_put_order,
    with_rows,
    word,
    write_all,
)
from tests.kvm.machines import COUNT, HLT, ORIGIN, OUT_80, build, until

STAR, LSTAR, KERNEL_GS_BASE = 0xC0000081, 0xC0000082, 0xC0000102
NOT_CANONICAL = 0x8000_0000_0000_0005
SHORT = 0.1
"""Seconds that a VCPU which hangs is waited for, where the test wants to see it hang."""

guarded = pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])


# 1: a look at the registers during AP start wipes a latched INIT


@guarded
def test_bug_01_a_look_during_ap_start_keeps_the_latched_init(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    if not guarded:
        with_rows(monkeypatch, events={"at": whole})
    with build(system, tmp_path, START_AP, vcpus=2, format="flat64") as machine:
        machine.write_memory(AP_ADDRESS, AP_CODE)
        machine.step(0)
        ap = synchronize(machine, 1)
        machine.step(0)  # INIT, while the AP's copy owns its registers
        write_all(ap)
        machine.run()
        until(lambda: at_jump_to_itself(machine))
        if guarded:
            until(lambda: word(machine, AP_COUNT) > 0)
        machine.pause()
        arrived = MpState.from_buffer_copy(synchronize(machine, 1).copy["mp_state"]).mp_state == MP_STATE_RUNNABLE
        assert arrived is guarded


@guarded
def test_bug_01_a_state_taken_with_an_init_and_sipi_latched_has_them_once(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """QEMU's own order of reading, events before MP state: the AP's state says started, and INIT latched still."""
    if not guarded:
        with_get_order(monkeypatch, "events", before="mp_state")
    with build(system, tmp_path, START_AP, vcpus=2, format="flat64") as machine:
        for _ in range(3):  # up to the SIPI, while the AP stands
            machine.step(0)
        state = machine.save()
    with build(system, tmp_path, START_AP, vcpus=2, format="flat64") as fresh:
        fresh.write_memory(AP_ADDRESS, AP_CODE)
        fresh.load(state)
        fresh.vcpus[1].run_on(lambda: fresh.vcpus[1].fd.get([fresh.table.by_name["mp_state"]]))
        ap = synchronize(fresh, 1)
        started = MpState.from_buffer_copy(ap.copy["mp_state"]).mp_state == MP_STATE_RUNNABLE
        assert (started and sregs_base(ap) == AP_ADDRESS) is guarded
        if guarded:
            fresh.run()
            until(lambda: word(fresh, AP_COUNT) > 0)


def at_jump_to_itself(machine: Machine) -> bool:
    machine.request_samples()
    return regs_of(machine).rip == 0x100000 + len(START_AP) - 2


# 2: an NMI or a SIPI's vector, arrived meanwhile, overwritten by a runtime write


@guarded
def test_bug_02_an_nmi_that_came_after_the_look_is_delivered(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    if not guarded:
        with_rows(monkeypatch, events={"at": whole})
    with build(system, tmp_path, COUNT_INTERRUPTS) as machine:
        take_interrupts(machine)
        vcpu = synchronize(machine)
        nmi(machine, vcpu)
        write_all(vcpu)
        machine.run()
        makes_progress(machine)
        assert (word(machine, NMI_COUNT) == 1) is guarded


@guarded
def test_bug_02_a_sipi_that_came_after_the_look_keeps_its_vector(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    if not guarded:
        with_rows(monkeypatch, events={"at": whole})
    with build(system, tmp_path, START_AP, vcpus=2, format="flat64") as machine:
        machine.write_memory(AP_ADDRESS, AP_CODE)
        machine.step(0)
        machine.step(0)  # INIT
        ap = synchronize(machine, 1)  # which takes the INIT: the AP waits for its SIPI
        events = VcpuEvents.from_buffer_copy(ap.copy["events"])
        events.flags |= EVENT_VALID_SIPI_VECTOR
        ap.copy["events"] = bytes(events)
        machine.step(0)  # SIPI
        write_all(ap)
        machine.run()
        if guarded:
            until(lambda: word(machine, AP_COUNT) > 0)
        machine.pause()
        synchronize(machine, 1)
        assert (sregs_base(ap) == AP_ADDRESS) is guarded


def sregs_base(vcpu: Vcpu) -> int:
    return int.from_bytes(vcpu.copy["sregs"][:8], "little")  # cs.base comes first


def test_bug_02_the_flags_of_what_arrives_by_itself_are_clear_at_runtime_only(system: System) -> None:
    row = vcpu_table(system.caps, system.msr_list()).by_name["events"]
    flags = EVENT_VALID_NMI_PENDING | EVENT_VALID_SIPI_VECTOR | EVENT_VALID_SMM
    raw = bytes(VcpuEvents(flags=flags, nmi_pending=1, sipi_vector=8))
    assert VcpuEvents.from_buffer_copy(row.at(raw, RUNTIME)).flags == 0
    assert row.at(raw, RESET) == row.at(raw, FULL) == raw


# 3: an interrupt between the get and the put


@guarded
def test_bug_03_an_interrupt_between_get_and_put_is_delivered(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    if not guarded:
        with_rows(monkeypatch, lapic={"level": RUNTIME})
    with build(system, tmp_path, COUNT_INTERRUPTS) as machine:
        take_interrupts(machine)
        vcpu = synchronize(machine)
        interrupt(machine)
        write_all(vcpu)
        machine.run()
        makes_progress(machine)
        assert (word(machine, VECTOR_COUNT) == 1) is guarded


# 4: reset without a sync writes stale state


@guarded
def test_bug_04_a_reset_keeps_what_only_the_kernel_knows(system: System, tmp_path: Path, guarded: bool) -> None:
    """A reset that leaves STAR alone, after the guest has changed it: the copy of before must not come back."""
    with build(system, tmp_path, COUNT) as machine:
        vcpu = machine.vcpus[0]
        row = machine.table.by_name["msrs"]
        by_guest = pack_msrs({**unpack_msrs(vcpu.run_on(lambda: vcpu.fd.get([row]))[0]), STAR: 0x1234_5678_0000_0000})
        vcpu.run_on(lambda: vcpu.fd.put([row], [by_guest]))  # stands for the guest's WRMSR
        if guarded:
            sync.cpu_synchronize_all_states(machine.vcpus, ledger=machine.ledger, caller="test")
        else:
            vcpu.dirty = True
        vcpu.copy["regs"] = bytes(Regs(rip=0xFFF0, rflags=2))
        sync.cpu_synchronize_all_post_reset(machine.vcpus, ledger=machine.ledger, caller="test")
        kept = unpack_msrs(vcpu.run_on(lambda: vcpu.fd.get([row]))[0])[STAR] == 0x1234_5678_0000_0000
        assert kept is guarded


def test_bug_04_machine_reset_synchronises_before_it_writes(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, vcpus=2) as machine:
        machine.run()
        with Tracing(machine) as trace:
            machine.reset()
        for vcpu in machine.vcpus:
            ioctls = [ioctl.startswith("KVM_GET") for ioctl, _ in trace.moved(vcpu.index)]
            assert ioctls == sorted(ioctls, reverse=True)
            assert any(ioctls)
            assert not all(ioctls)


# 5: a sync during a load clobbers what was loaded


@guarded
def test_bug_05_a_device_that_synchronises_as_it_loads_clobbers_nothing(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    with build(system, tmp_path, COUNT, vcpus=2) as machine:
        machine.edit(1, "rbx", 0x1111)
        state = machine.save()
        machine.run()
        makes_progress(machine)
        machine.pause()
        if not guarded:
            monkeypatch.setattr(sync, "cpu_synchronize_all_pre_loadvm", lambda *_, **__: None)
        for device in machine.board.devices.values():
            monkeypatch.setattr(device, "load", synchronising(machine, device.load))
        monkeypatch.setattr(machine, "pause", None)
        with Tracing(machine) as trace:
            machine.load(state)
        read = [substate for vcpu in (0, 1) for ioctl, substate in trace.moved(vcpu) if ioctl.startswith("KVM_GET")]
        assert ([*read] == [*tsc.FOUND_IN]) is guarded  # those once, on VCPU 0, and not into its copy
        assert regs_of(machine, 1).rbx == 0x1111


def synchronising(machine: Machine, load: Callable[[bytes], None]) -> Callable[[bytes], None]:
    def wrapped(raw: bytes) -> None:
        load(raw)
        for index in range(len(machine.vcpus)):
            synchronize(machine, index)

    return wrapped


@guarded
def test_bug_05_what_was_loaded_first_survives_a_later_sync(system: System, tmp_path: Path, guarded: bool) -> None:
    with build(system, tmp_path, COUNT) as machine:
        vcpu = machine.vcpus[0]
        if guarded:
            sync.cpu_synchronize_all_pre_loadvm(machine.vcpus, ledger=machine.ledger, caller="test")
        vcpu.copy["regs"] = changed_regs(vcpu.copy["regs"], rdi=0x77)
        synchronize(machine)
        sync.cpu_synchronize_all_post_init(machine.vcpus, ledger=machine.ledger, caller="test")
        assert (regs_of(machine).rdi == 0x77) is guarded


# 6: a sync of a fresh VCPU deadlocks or reads garbage


@guarded
def test_bug_06_a_vcpu_that_never_ran_can_be_synchronised(
    system: System, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """QEMU asked a thread that wasn't there yet; here a VCPU has its thread from the first moment on."""
    if not guarded:
        monkeypatch.setattr(Vcpu, "_work", lambda self: None)
        monkeypatch.setattr(Reply.outcome, "__defaults__", (SHORT,))
    table = vcpu_table(system.caps, system.msr_list())
    vm = system.create_vm()
    vm.create_irqchip()
    ledger = Ledger()
    vcpus = [Vcpu(vm.create_vcpu(index), table, None, ledger, lambda *_: None, 0) for index in range(2)]  # type: ignore[arg-type]
    try:
        if not guarded:
            with pytest.raises(MachineError, match="VCPU 1 did not answer"):
                sync.cpu_synchronize_state(vcpus[1], ledger=ledger, caller="test")
            return
        for vcpu in vcpus:
            sync.cpu_synchronize_state(vcpu, ledger=ledger, caller="test")
        states = [MpState.from_buffer_copy(vcpu.copy["mp_state"]).mp_state for vcpu in vcpus]
        assert states == [MP_STATE_RUNNABLE, MP_STATE_UNINITIALIZED]
        for vcpu in vcpus:
            assert Regs.from_buffer_copy(vcpu.copy["regs"]).rip == 0xFFF0
            again = vcpu.run_on(lambda vcpu=vcpu: vcpu.fd.get([table.by_name["sregs"]]))  # type: ignore[misc]
            assert again == [vcpu.copy["sregs"]]
    finally:
        for vcpu in vcpus:
            vcpu.close()
        vm.close()


# 7: a put on the wrong thread


@guarded
def test_bug_07_every_ioctl_of_a_vcpu_is_made_by_its_own_thread(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    if not guarded:
        do_where_asked(monkeypatch)
    with build(system, tmp_path, COUNT, vcpus=3) as machine:
        with Tracing(machine) as trace:
            machine.run()
            machine.pause()
            machine.step(0)
            machine.reset()
            machine.restore(machine.checkpoint())
            machine.edit(2, "rip", 0x1000)
            machine.run()
            machine.pause()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        own = [{names[ident] for ident in trace.threads(vcpu.index)} == {f"vcpu{vcpu.index}"} for vcpu in machine.vcpus]
        assert own == [guarded] * 3
        assert {"KVM_RUN"} <= {call.ioctl for call in trace.calls}


def do_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped VCPU's state moved by whoever wants it moved, and fds that don't mind."""
    for fd in (SoftwareVcpu, KernelVcpuFd):
        monkeypatch.setattr(fd, "bind", lambda fd: lib.vd_bind(fd.mapping) if isinstance(fd, KernelVcpuFd) else None)
    real = Vcpu.post

    def post(vcpu: Vcpu, work: Callable[[], Any]) -> Reply[Any]:
        if vcpu.running or work == vcpu._step:
            return real(vcpu, work)
        result = work()
        return Reply(vcpu.index, None, lambda: result)

    def make(vcpu: Vcpu, batch: Any) -> Reply[Any]:
        batch.make()
        return Reply(vcpu.index, None, batch.outcome)

    monkeypatch.setattr(Vcpu, "post", post)
    monkeypatch.setattr(Vcpu, "make", make)


def test_bug_07_an_ioctl_from_another_thread_is_refused(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT) as machine:
        vcpu = machine.vcpus[0]
        row = machine.table.by_name["regs"]
        with pytest.raises(AssertionError, match="VCPU 0 belongs to"):
            vcpu.fd.put([row], [vcpu.copy["regs"]])
        with pytest.raises(AssertionError, match="VCPU 0 belongs to"):
            vcpu.fd.get([row])


# 8: the TSC differs between VCPUs after a reset or restore


TSC_STEP = (1 << 50) + 12345
TICK = 777
"""Nanoseconds that pass between two ioctls."""


@pytest.mark.parametrize("how", ["reset", "load"])
@guarded
def test_bug_08_all_vcpus_have_one_tsc_after_reset_and_load(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool, how: str
) -> None:
    if not guarded:
        with_rows(monkeypatch, msrs_reset={"level": FULL + 1}, tsc_offset={"level": FULL + 1})
    with build(system, tmp_path, HLT, vcpus=3) as machine:
        state = machine.save()
        before = read_tsc(machine, 1)
        write_tsc(machine, 1, before + TSC_STEP)
        if read_tsc(machine, 1) - before < TSC_STEP and not guarded:
            pytest.skip("this kernel ignores writes to the TSC: the guard can't be missed here")
        with Tracing(machine) as trace:
            machine.reset() if how == "reset" else machine.load(state)
        # What lies between two reads of one counter is the same counter, if the order is right.
        first, others, last = read_tsc(machine, 0), [read_tsc(machine, 1), read_tsc(machine, 2)], read_tsc(machine, 0)
        assert all(first <= other <= last for other in others) is guarded
        if guarded and "tsc_offset" in machine.table.by_name:
            for vcpu in range(3):
                put = [name for ioctl, name in trace.moved(vcpu) if ioctl in ("KVM_SET_MSRS", "KVM_SET_DEVICE_ATTR")]
                assert put == [name for name in ("msrs", "msrs_reset", "tsc_offset", "tsc_deadline") if name in put]
                assert {"msrs_reset", "tsc_offset"} <= {*put}
            # To the cycle; where this kernel ignores it, all read as zero.
            assert len({read_row(machine, vcpu, "tsc_offset") for vcpu in range(3)}) == 1


OFFSETS_AS_OTHERS_HAD_THEM: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "exact": lambda patch: None,
    "the TSC's MSR alone": lambda patch: with_rows(patch, tsc_offset={"level": FULL + 1}),
    "the MSR after the offset": lambda patch: with_put_order(patch, "tsc_offset", before="msrs_reset"),
    "each VCPU by itself": lambda patch: patch.setattr(sync, "_put_all", each_by_itself),
}


def each_by_itself(vcpus: Any, level: Any, reading: Any) -> Any:
    """The offsets as they were saved, on a host whose TSC is another by now."""
    return [sync._put(vcpu, level) for vcpu in vcpus]


@pytest.mark.parametrize("how", ["reset", "load", "restore", "into another machine"])
@pytest.mark.parametrize("offsets", OFFSETS_AS_OTHERS_HAD_THEM)
def test_bug_08_time_between_the_writes_moves_no_tsc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offsets: str, how: str
) -> None:
    """The guest has set one VCPU's TSC apart. Time passes between all ioctls; PVM, where these tests run, would ignore
    the writes, so this is the software backend's alone."""
    OFFSETS_AS_OTHERS_HAD_THEM[offsets](monkeypatch)
    system = SoftwareSystem()
    with build(system, tmp_path, COUNT, vcpus=3) as one, build(system, tmp_path, COUNT, vcpus=3) as other:
        write_tsc(one, 1, read_tsc(one, 1) + TSC_STEP)
        one.run()
        makes_progress(one)
        time_passes(system, one)
        checkpoint = one.checkpoint()
        saved = [unpack_msrs(vcpu["msrs_reset"])[msrs.TSC] for vcpu in checkpoint.state.vcpus]
        distances = tsc_distances(checkpoint.state.vcpus)
        target = other if how == "into another machine" else one
        target.pause()
        passes(target, 1_000_000 * TICK)
        time_passes(system, target)
        if how == "reset":
            one.reset()
        elif how == "restore":
            one.restore(checkpoint)
        else:
            target.load(checkpoint.state)
        system.fault = None
        expected, start = ([0, 0, 0], 0) if how == "reset" else (distances, saved[0])
        exact = tsc_distances([{"tsc_offset": read_row(target, vcpu, "tsc_offset")} for vcpu in range(3)]) == expected
        exact &= 0 <= read_tsc(target, 0) - start < 1000 * TICK  # it goes on from where it was
        assert exact is (offsets == "exact")


def passes(machine: Machine, nanoseconds: int) -> None:
    scheduler = machine._vm.scheduler  # type: ignore[attr-defined]
    scheduler.set_time(scheduler.now() + nanoseconds)


def time_passes(system: SoftwareSystem, machine: Machine) -> None:
    """From now on, at each get of one of the machine's VCPUs; a put takes longer."""

    def tick(ioctl: str, substate: str, vcpu: int | None) -> int:
        if substate and vcpu is not None:
            passes(machine, 3 * TICK if "_SET_" in ioctl else TICK)
        return 0

    system.fault = tick


def read_row(machine: Machine, vcpu: int, name: str) -> bytes:
    row, fd = machine.table.by_name[name], machine.vcpus[vcpu].fd
    return machine.vcpus[vcpu].run_on(lambda: fd.get([row]))[0]


def read_tsc(machine: Machine, vcpu: int) -> int:
    return unpack_msrs(read_row(machine, vcpu, "msrs_reset"))[msrs.TSC]


def write_tsc(machine: Machine, vcpu: int, value: int) -> None:
    row, fd = machine.table.by_name["msrs_reset"], machine.vcpus[vcpu].fd
    machine.vcpus[vcpu].run_on(lambda: fd.put([row], [pack_msrs({msrs.TSC: value})]))


# 9: VCPUs resumed before the clock is set


@guarded
def test_bug_09_the_clock_is_set_before_any_vcpu_runs(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    with build(system, tmp_path, COUNT, vcpus=2) as machine:
        checkpoint = machine.checkpoint()
        machine.run()
        if not guarded:
            clock_last(machine, monkeypatch)
        with Tracing(machine) as trace:
            machine.restore(checkpoint)
            makes_progress(machine)
            machine.pause()
        ioctls = [call.ioctl for call in trace.calls]
        stopped_at = next(at for at, ioctl in enumerate(ioctls) if ioctl == "KVM_SET_IRQCHIP")
        after = ioctls[stopped_at:]
        assert (after.index("KVM_SET_CLOCK") < after.index("KVM_RUN")) is guarded


def clock_last(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Cloud Hypervisor had it: the clock goes back when the VCPUs run already."""
    vm, resume, held = machine._vm, machine._resume, []
    real_put = vm.put

    def put(rows: Any, raws: Any) -> None:
        clock = [row.name for row in rows].index("clock")
        held.append((rows[clock:][:1], raws[clock:][:1]))
        real_put(rows[:clock] + rows[clock + 1 :], raws[:clock] + raws[clock + 1 :])

    def resume_first() -> None:
        resume()
        makes_progress(machine)
        for vcpu in machine.vcpus:
            vcpu.stop().outcome()()
        real_put(*held.pop())
        resume()

    monkeypatch.setattr(vm, "put", put)
    monkeypatch.setattr(machine, "_resume", resume_first)


# 10: the local APIC's timer is dead after a restore

DEADLINE64 = Path(__file__).with_name("deadline64.S")
TICKS, TIMER_VECTOR = 0x190000, 0x30


@guarded
def test_bug_10_an_armed_tsc_deadline_survives_two_saves_and_a_load(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    if not system.caps["KVM_CAP_TSC_DEADLINE_TIMER"]:
        pytest.skip("this kernel has no TSC-deadline timer")
    if not guarded:
        with_put_order(monkeypatch, "tsc_deadline", before="lapic")
    code = assembled(DEADLINE64, tmp_path)
    with build(system, tmp_path, code, format="flat64") as machine:
        machine.run()
        until(lambda: word(machine, TICKS) >= 3)
        while not deadline(machine.save()):  # its interrupt may be under way
            machine.run()
        state = machine.save()
        assert timer_lives(state)
        memory = machine.read_memory(0, machine.memory.size)
    with build(system, tmp_path, code, format="flat64") as fresh:
        fresh.memory.write(0, memory)
        fresh.load(state)
        assert timer_lives(fresh.save()) is guarded
        if guarded:
            before = word(fresh, TICKS)
            fresh.run()
            until(lambda: word(fresh, TICKS) >= before + 3)


@guarded
def test_bug_10_a_timer_that_fires_while_it_is_read_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """On KVM a posted timer interrupt may come at any time; only the software backend can be made to do it here."""
    from kvm.backends.software.system import SoftwareSystem

    if not guarded:
        with_get_order(monkeypatch, "lapic", before="tsc_deadline")
    system = SoftwareSystem()
    with build(system, tmp_path, assembled(DEADLINE64, tmp_path), format="flat64") as machine:
        machine.run()
        until(lambda: word(machine, TICKS) >= 1)
        machine.pause()
        read: set[str] = set()

        def fire(ioctl: str, substate: str, vcpu: int | None) -> int:
            if ioctl.startswith("KVM_GET") and substate in ("lapic", "tsc_deadline"):
                read.add(substate)
                if len(read) == 2:
                    scheduler = machine._vm.scheduler  # type: ignore[attr-defined]
                    scheduler.set_time(machine.vcpus[0].fd.lapic.due)  # type: ignore[attr-defined]
                    scheduler._fire_timers()
            return 0

        system.fault = fire
        assert timer_lives(machine.save()) is guarded


def deadline(state: MachineState) -> int:
    return unpack_msrs(state.vcpus[0]["tsc_deadline"])[msrs.TSC_DEADLINE]


def timer_lives(state: MachineState) -> bool:
    """Is the timer armed, or its interrupt already requested or in service (whose handler will arm it again)?"""
    vcpu = state.vcpus[0]
    requested, in_service = (vcpu["lapic"][base + TIMER_VECTOR // 32 * 16 :][:4] for base in (0x200, 0x100))
    bit = 1 << TIMER_VECTOR % 32
    flags = int.from_bytes(requested, "little") | int.from_bytes(in_service, "little")
    return bool(deadline(state) or flags & bit)


# 11: SET_MSRS that stops half-way is ignored


@guarded
def test_bug_11_a_refused_msr_is_named_and_nothing_after_it_is_taken_for_written(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    if not guarded:
        ignore_the_count(system, monkeypatch)
    with build(system, tmp_path, COUNT) as machine:
        vcpu = synchronize(machine)
        good = unpack_msrs(vcpu.copy["msrs"])
        assert list(good).index(LSTAR) < list(good).index(KERNEL_GS_BASE)
        vcpu.copy["msrs"] = pack_msrs({**good, LSTAR: NOT_CANONICAL, KERNEL_GS_BASE: 0x4444_0000})
        machine.run()
        if not guarded:
            makes_progress(machine)  # as if nothing had been, and KERNEL_GS_BASE is lost
            machine.pause()
            assert unpack_msrs(synchronize(machine).copy["msrs"])[KERNEL_GS_BASE] != 0x4444_0000
            return
        status = machine.wait(Phase.STOPPED, timeout=20)
        for part in ("VCPU 0", "KVM_SET_MSRS", "msrs", hex(LSTAR), hex(NOT_CANONICAL), "RUNTIME", "EINVAL"):
            assert part in status.reason
        assert vcpu.dirty
        vcpu.copy["msrs"] = pack_msrs({**good, KERNEL_GS_BASE: 0x4444_0000})
        machine.run()
        makes_progress(machine)
        machine.pause()
        assert unpack_msrs(synchronize(machine).copy["msrs"]) == {**good, KERNEL_GS_BASE: 0x4444_0000}


def ignore_the_count(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    if system.name == "kvm":
        with_rows(monkeypatch, msrs={"counted": False})
        return
    from kvm.backends.software import vcpu as software
    from kvm.backends.software.state import Invalid

    real = software._PUT["KVM_SET_MSRS"]

    def short(self: Any, raw: bytes) -> None:
        try:
            real(self, raw)
        except Invalid:
            pass

    monkeypatch.setitem(software._PUT, "KVM_SET_MSRS", short)


# 12: the result of an IN is lost on pause

IN_AND_COUNT = bytes.fromhex("ba 00 03  31 c0  ec  90  66 41  eb fc")
"""mov dx, 0x300; xor ax, ax; in al, dx; nop; inc ecx, for ever."""


class Answers0x5A:
    """A device that is asked while somebody pauses the machine; ``meanwhile`` happens inside the guest's IN."""

    name = "answers"

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self.meanwhile = meanwhile

    def port_in(self, offset: int, size: int) -> int:
        self.meanwhile()
        return 0x5A

    def port_out(self, offset: int, size: int, value: int) -> None: ...


@guarded
def test_bug_12_a_state_taken_inside_an_in_has_its_result(system: System, tmp_path: Path, guarded: bool) -> None:
    with build(system, tmp_path, IN_AND_COUNT) as machine, build(system, tmp_path, IN_AND_COUNT) as other:
        vcpu = machine.vcpus[0]
        early: list[bytes] = []

        def meanwhile() -> None:
            if not guarded:  # the state as it is in mid-exit, on the VCPU's own thread
                early.extend(vcpu.fd.get([machine.table.by_name["regs"]]))
            stopping.append(vcpu.stop())

        stopping: list[Reply[int]] = []
        machine.board.bus.claim_ports(range(0x300, 0x301), Answers0x5A(meanwhile))  # type: ignore[arg-type]
        machine.run()
        until(lambda: bool(stopping))
        stopping[0].outcome()()
        state = machine.save()
        if not guarded:
            state = MachineState(({**state.vcpus[0], "regs": early[0]},), state.machine, state.devices)
        other.load(state)
        regs = regs_of(other)
        assert ((regs.rip, regs.rax & 0xFF) == (ORIGIN + 6, 0x5A)) is guarded


# 13: the pause comes between the look at the mailbox and KVM_RUN


def test_bug_13_pause_and_resume_a_thousand_times(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, vcpus=2) as machine:
        for turn in range(1000):
            machine.run()
            if turn % 2:  # else the pause overtakes the VCPUs' threads on their way into the guest
                machine.wait(Phase.STOPPED, timeout=0.0005)
            machine.pause()
        machine.run()
        makes_progress(machine)


@pytest.mark.parametrize("where", ["before clear_kick", "before KVM_RUN"])
@guarded
def test_bug_13_a_pause_in_the_gap_is_not_lost(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool, where: str
) -> None:
    if not guarded and where == "before clear_kick":
        monkeypatch.setattr(Vcpu, "_work", look_then_clear)
    with build(system, tmp_path, COUNT) as machine:
        vcpu = machine.vcpus[0]
        stopping: list[Reply[int]] = []
        inside = threading.Event()
        real = vcpu.fd

        class PausedInTheGap:
            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

            def clear_kick(self) -> None:
                if where == "before clear_kick":
                    self.pause()
                real.clear_kick()

            def run(self, bus: Any) -> Exit:
                if where == "before KVM_RUN":
                    self.pause()
                    if not guarded:
                        real.clear_kick()  # a signal alone, which found nobody inside KVM_RUN
                inside.set()
                return real.run(bus)

            def pause(self) -> None:
                if vcpu.running and not stopping:
                    stopping.append(vcpu.stop())

        vcpu.fd = PausedInTheGap()  # type: ignore[assignment]
        machine.run()
        if guarded:
            stopping_answers(stopping)
            return
        assert inside.wait(20)
        with pytest.raises(MachineError, match="did not answer"):
            stopping[0].outcome(SHORT)
        vcpu.fd.kick()


def stopping_answers(stopping: list[Reply[int]]) -> None:
    until(lambda: bool(stopping))
    stopping[0].outcome()()


def look_then_clear(self: Vcpu) -> None:
    """The VCPU's loop with its two first steps the wrong way round."""
    self.fd.bind()
    while True:
        if self.running and self._mailbox.empty():
            self.fd.clear_kick()
            self._run_guest()
        elif self._mailbox.empty():
            self._bell.wait()
        elif (job := self._mailbox.get()) is None:
            return
        else:
            job()


# 14: the pause holds a lock that the VCPU's device access needs


def test_bug_14_pause_while_the_guest_hammers_a_device(system: System, tmp_path: Path) -> None:
    counted = set()
    with build(system, tmp_path, OUT_80) as machine:
        for _ in range(200):
            machine.run()
            machine.wait(Phase.STOPPED, timeout=0.0005)  # it's at it
            machine.pause()
            assert regs_of(machine).rip in (ORIGIN, ORIGIN + 2, ORIGIN + 4)
            counted.add(regs_of(machine).rax)
        assert len(counted) > 10


IN_FOR_EVER = bytes.fromhex("ba 00 03 ec eb fd")
"""mov dx, 0x300; in al, dx, for ever."""


@guarded
def test_bug_14_a_device_never_needs_the_machines_lock(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    with build(system, tmp_path, IN_FOR_EVER) as machine:
        asked = threading.Event()
        pausing = threading.Event()

        def meanwhile() -> None:
            asked.set()
            pausing.wait(20)
            if not guarded:
                with machine._lock:
                    pass

        machine.board.bus.claim_ports(range(0x300, 0x301), Answers0x5A(meanwhile))  # type: ignore[arg-type]
        machine.run()
        assert asked.wait(20)
        if not guarded:
            monkeypatch.setattr(Reply.outcome, "__defaults__", (SHORT,))
        real = Vcpu.stop
        monkeypatch.setattr(Vcpu, "stop", lambda vcpu: (real(vcpu), pausing.set())[0])
        if guarded:
            machine.pause()
            assert machine.status.phase is Phase.PAUSED
        else:
            with pytest.raises(MachineError, match="VCPU 0 did not answer"):
                machine.pause()
