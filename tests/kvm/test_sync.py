"""The contract: which hook moves which substates, at which level, in which order, on which thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm import sync
from kvm.backends.interface import System
from kvm.levels import WritebackLevel
from kvm.machine import Machine
from kvm.snapshot.contents import Index
from kvm.x86 import tsc
from kvm.x86.structs import Regs
from tests.kvm.contract.lab import Tracing, inject, makes_progress
from tests.kvm.machines import COUNT, build, until

VCPUS = 3


@pytest.fixture
def machine(system: System, tmp_path: Path) -> Iterator[Machine]:
    with build(system, tmp_path, COUNT, vcpus=VCPUS) as built:
        yield built


def gets(machine: Machine) -> list[tuple[str | None, str]]:
    return [(row.get, row.name) for row in machine.table.get_order]


def puts(machine: Machine, level: WritebackLevel, vcpu: int) -> list[tuple[str | None, str]]:
    """All that the level writes; rows of ours only when they changed, which here they did not.

    Where TSC offsets can be set, VCPU 0 looks at its TSC before.
    """
    found = [machine.table.by_name[name] for name in tsc.FOUND_IN if name in machine.table.by_name]
    looked = [(row.get, row.name) for row in found] if vcpu == 0 and len(found) == 2 else []
    return looked + [(row.put, row.name) for row in machine.table.put_order if row.level <= level and row.get]


def test_synchronize_all_states_reads_every_row_in_get_order_on_its_own_thread(machine: Machine) -> None:
    with Tracing(machine) as trace:
        sync.cpu_synchronize_all_states(machine.vcpus, ledger=machine.ledger, caller="test")
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for vcpu in machine.vcpus:
        assert trace.moved(vcpu.index) == gets(machine)
        assert [names[ident] for ident in trace.threads(vcpu.index)] == [f"vcpu{vcpu.index}"]
        assert vcpu.dirty


def test_get_order_reads_mp_state_before_what_accepting_an_init_or_sipi_changes(machine: Machine) -> None:
    assert machine.table.get_order[0].name == "mp_state"


def test_put_order_keeps_the_rules_that_kvm_has(machine: Machine) -> None:
    names = [row.name for row in machine.table.put_order]

    def before(*order: str) -> bool:
        places = [names.index(name) for name in order]
        return places == sorted(places)

    assert names[0] == "cpuid"
    assert names[-1] == "guest_debug"
    assert before("sregs", "lapic", "msrs", "tsc_deadline")
    assert before("regs", "events")
    assert before("lapic", "msrs_reset", *(["tsc_offset"] if "tsc_offset" in names else []), "tsc_deadline")


@pytest.mark.parametrize(
    ("hook", "level"),
    [
        (sync.cpu_synchronize_all_post_reset, WritebackLevel.RESET),
        (sync.cpu_synchronize_all_post_init, WritebackLevel.FULL),
    ],
)
def test_reset_and_full_write_every_row_of_their_level(machine: Machine, hook, level: WritebackLevel) -> None:  # type: ignore[no-untyped-def]
    sync.cpu_synchronize_all_states(machine.vcpus, ledger=machine.ledger, caller="test")
    with Tracing(machine) as trace:
        hook(machine.vcpus, ledger=machine.ledger, caller="test")
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for vcpu in machine.vcpus:
        assert trace.moved(vcpu.index) == puts(machine, level, vcpu.index)
        assert [names[ident] for ident in trace.threads(vcpu.index)] == [f"vcpu{vcpu.index}"]
        assert not vcpu.dirty
        assert vcpu.last_put is level


def test_a_look_at_the_registers_costs_no_write(machine: Machine) -> None:
    sync.cpu_synchronize_state(machine.vcpus[1], ledger=machine.ledger, caller="test")
    with Tracing(machine) as trace:
        machine.run()
        until(lambda: not machine.vcpus[1].dirty)
        machine.pause()
    assert trace.moved(1) == []
    assert not machine.vcpus[1].dirty
    record = next(record for record in machine.ledger.records if record.hook == "before_run")
    assert record.parts[0].written == ()
    runtime = [row.name for row in machine.table.put_order if row.level is WritebackLevel.RUNTIME]
    assert list(record.parts[0].skipped) == runtime


def test_runtime_writes_a_changed_row_and_what_must_follow_it(machine: Machine) -> None:
    vcpu = machine.vcpus[1]
    machine.edit(1, "rbx", 0x1234)
    with Tracing(machine) as trace:
        machine.run()
        until(lambda: not vcpu.dirty)
        machine.pause()
    assert trace.moved(1) == [("KVM_SET_REGS", "regs"), ("KVM_SET_VCPU_EVENTS", "events")]
    sync.cpu_synchronize_state(vcpu, ledger=machine.ledger, caller="test")
    assert Regs.from_buffer_copy(vcpu.copy["regs"]).rbx == 0x1234


def test_synchronize_state_reads_once(machine: Machine) -> None:
    vcpu = machine.vcpus[0]
    sync.cpu_synchronize_state(vcpu, ledger=machine.ledger, caller="test")
    vcpu.copy["regs"] = bytes(Regs(rax=99))
    with Tracing(machine) as trace:
        sync.cpu_synchronize_state(vcpu, ledger=machine.ledger, caller="test")
        sync.cpu_synchronize_all_states(machine.vcpus, ledger=machine.ledger, caller="test")
    assert trace.moved(0) == []
    assert trace.moved(1) == gets(machine)
    assert Regs.from_buffer_copy(vcpu.copy["regs"]).rax == 99


def test_pre_loadvm_takes_ownership_without_reading(machine: Machine) -> None:
    copies = [dict(vcpu.copy) for vcpu in machine.vcpus]
    with Tracing(machine) as trace:
        reading = sync.cpu_synchronize_all_pre_loadvm(machine.vcpus, ledger=machine.ledger, caller="test")
        for vcpu in machine.vcpus:  # what a device's load might do
            sync.cpu_synchronize_state(vcpu, ledger=machine.ledger, caller="test")
        if reading:
            reading.done()
    # Nothing but what all TSC offsets are found by, and that into no copy.
    assert [name for _, name in trace.moved(0)] == (list(tsc.FOUND_IN) if reading else [])
    assert len(trace.calls) == len(trace.moved(0))
    assert (reading is not None) is ("tsc_offset" in machine.table.by_name)
    assert all(vcpu.dirty for vcpu in machine.vcpus)
    assert [vcpu.copy for vcpu in machine.vcpus] == copies


def test_memory_is_back_before_a_vcpu_is_put(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the PDPTEs aren't in the state (before SREGS2), KVM_SET_SREGS reads them from the guest's memory."""
    checkpoint = machine.checkpoint()
    put_back = machine._pages.put_back
    with Tracing(machine) as trace:
        before: list[list[str]] = []

        def look(index: Index) -> int:
            copied = put_back(index)
            before.append([call.ioctl for call in trace.calls if "_SET_" in call.ioctl])
            return copied

        monkeypatch.setattr(machine._pages, "put_back", look)
        machine.restore(checkpoint)
    assert before == [[]]
    assert "KVM_SET_REGS" in [call.ioctl for call in trace.calls]


def test_reset_and_full_refuse_while_a_vcpu_runs(machine: Machine) -> None:
    machine.run()
    with pytest.raises(AssertionError, match="all must be stopped"):
        sync.cpu_synchronize_all_post_reset(machine.vcpus, ledger=machine.ledger, caller="test")
    machine.pause()


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
@pytest.mark.parametrize("how", ["reset", "load", "restore"])
def test_nothing_runs_while_reset_or_full_is_put(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, guarded: bool, how: str
) -> None:
    checkpoint = machine.checkpoint()
    machine.run()
    makes_progress(machine)
    if not guarded:
        monkeypatch.setattr(Machine, "_stop_all", lambda machine: 0.0)
        monkeypatch.setattr(sync, "_assert_stopped", lambda vcpus: None)
    ran: list[set[int]] = []

    def look(ioctl: str, substate: str, vcpu: int | None) -> int:
        if "_SET_" in ioctl and (vcpu is None or machine.table.by_name[substate].level > WritebackLevel.RUNTIME):
            ran.append({each.index for each in machine.vcpus if each.running})
        return 0

    inject(machine, look)
    if how == "reset":
        machine.reset()
    elif how == "load":
        machine.load(checkpoint.state)
    else:
        machine.restore(checkpoint)
    assert len(ran) > VCPUS
    assert any(ran) is not guarded


def test_only_the_hooks_move_state(machine: Machine) -> None:
    """Every get or put in a busy minute of a machine's life stands in the ledger, VCPU by VCPU, in order.

    The machine's own too, whose VCPU is None.
    """
    before = machine.ledger.total
    with Tracing(machine) as trace:
        machine.run()
        machine.pause()
        machine.step()
        machine.step(0)
        checkpoint = machine.checkpoint()
        machine.run()
        machine.reset()
        machine.edit(0, "rax", 5)
        machine.restore(checkpoint)
        machine.pause()
    records = [record for record in machine.ledger.records if record.number > before]
    for vcpu in (None, *range(VCPUS)):
        parts = [part for record in records for part in record.parts if part.vcpu == vcpu]
        told = [name for part in parts for name in (*part.read, *part.written)]
        moved = trace.moved(vcpu)
        assert [name for _, name in moved] == told
        assert sum(part.ioctls for part in parts) == len(moved) > 0


def test_a_record_says_who_called_and_how_far_apart_the_vcpus_stopped(machine: Machine) -> None:
    checkpoint = machine.checkpoint()
    state = checkpoint.state
    calls = [
        ("save", "all_states", machine.save),
        ("reset", "all_states", machine.reset),
        ("load", "all_pre_loadvm", lambda: machine.load(state)),
        ("load", "all_pre_loadvm", lambda: machine.restore(checkpoint)),
    ]
    for caller, hook, call in calls:
        for running in (True, False):
            machine.run() if running else machine.pause()
            before = machine.ledger.total
            call()
            records = [each for each in machine.ledger.records if each.number > before and each.hook.endswith(hook)]
            (record,) = [each for each in records if each.caller == caller]
            assert (record.skew_us > 0) is running
            assert record.microseconds > 0
    machine.edit(1, "rax", 1)
    assert (machine.ledger.records[-1].caller, machine.ledger.records[-1].hook) == ("edit", "cpu_synchronize_state")


CHIPS = ("pic_slave", "pic_master", "ioapic", "pit")


@pytest.mark.parametrize(
    ("do", "hook", "read", "written"),
    [
        (lambda machine, _: machine.save(), "all_states", (*CHIPS, "clock"), ()),
        (lambda machine, _: machine.reset(), "all_post_reset", (), CHIPS),
        (lambda machine, state: machine.load(state), "all_post_init", (), (*CHIPS, "clock")),
    ],
    ids=["save", "reset", "load"],
)
def test_an_all_cpu_hook_moves_the_machines_own_first_in_the_same_record(  # type: ignore[no-untyped-def]
    machine: Machine, do, hook: str, read: tuple[str, ...], written: tuple[str, ...]
) -> None:
    state = machine.save()
    machine.run()
    before = machine.ledger.total
    with Tracing(machine) as trace:
        do(machine, state)
        machine.pause()
    records = [record for record in machine.ledger.records if record.number > before]
    (record,) = [record for record in records if any(part.vcpu is None for part in record.parts)]
    own, *vcpus = record.parts
    assert record.hook == f"cpu_synchronize_{hook}"
    assert (own.vcpu, own.read, own.written, own.skipped, own.error) == (None, read, written, (), "")
    assert own.ioctls == len(read) + len(written)
    assert own.microseconds > 0
    assert [part.vcpu for part in vcpus] == list(range(VCPUS))
    moving = [
        call.vcpu
        for call in trace.calls
        if call.substate and call.ioctl.startswith("KVM_SET" if written else "KVM_GET")
    ]
    assert moving[: own.ioctls] == [None] * own.ioctls
    assert None not in moving[own.ioctls :]


def test_at_init_the_chips_are_read_as_they_are_when_new(machine: Machine) -> None:
    _, second, third = machine.ledger.records[:3]
    assert (second.caller, second.parts[0].vcpu, second.parts[0].read) == ("init", None, (*CHIPS, "clock"))
    assert [part.vcpu for part in third.parts] == list(range(VCPUS))  # new already: nothing to put


def test_at_init_the_cpuid_comes_before_the_first_read(machine: Machine) -> None:
    """KVM before Linux 6.13 refuses reads of MSRs that it lists and the CPUID lacks: without any, most of VMX's."""
    first = machine.ledger.records[0]
    assert (first.hook, first.level) == ("cpu_synchronize_all_post_init", WritebackLevel.FULL)
    assert [(part.vcpu, part.read, part.written) for part in first.parts] == [
        (vcpu, (), ("cpuid",)) for vcpu in range(VCPUS)
    ]
