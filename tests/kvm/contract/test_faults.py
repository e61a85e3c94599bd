"""What happens when an ioctl fails: each one, in each hook, at each level, with each errno, on both backends.

The outcomes stand in the table OPERATIONS. In all of them: no hang, the error says what and where, nothing is taken
for written that wasn't, no state is lost, and the same operation works once the cause is gone.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from kvm import sync
from kvm.backends.interface import ExitKind, System
from kvm.errors import KvmError, MachineError, SubstateError
from kvm.ledger import Part
from kvm.levels import WritebackLevel
from kvm.machine import Machine, Phase
from kvm.snapshot.state import Checkpoint, MachineState
from kvm.vcpu import Reply, Vcpu
from kvm.x86 import registers, tsc
from kvm.x86.structs import MP_STATE_RUNNABLE, MpState, Xcrs, pack_msrs, unpack_msrs
from tests.kvm.contract.lab import (
    FULL,
    RESET,
    RUNTIME,
    inject,
    inject_from_the_start,
    makes_progress,
    regs_of,
    synchronize,
    with_rows,
    write_all,
)
from tests.kvm.machines import COUNT, ORIGIN, build, until

ERRNOS = (errno.EINTR, errno.EAGAIN, errno.ENOMEM, errno.EIO, errno.EINVAL)
VCPUS, VICTIM = 2, 1
MARK, OTHER_MARK = 0x5151_0000_1234, 0x7272_0000_5678
"""What RSI holds, which no guest here touches: before, and in the state that is loaded."""
LSTAR, NOT_CANONICAL = 0xC0000082, 0x8000_0000_0000_0005

Call = tuple[str, str, int | None]
"""An ioctl: its name, the substate, the VCPU."""


class Failing:
    """Fails one ioctl, once, and ``then`` perhaps another; ``done`` are those that were let through."""

    def __init__(self) -> None:
        self.target: Call | None = None
        self.errno = 0
        self.then: tuple[Call, int] | None = None
        self.done: list[Call] = []

    def arm(self, target: Call, number: int) -> None:
        self.target, self.errno = target, number
        self.done = []

    def __call__(self, *call: str | int | None) -> int:
        if call == self.target:
            number = self.errno
            (self.target, self.errno), self.then = self.then or (None, 0), None
            return number
        self.done.append(call)  # type: ignore[arg-type]
        return 0


@dataclass
class Scene:
    """A machine, paused, with MARK in every VCPU's RSI, and a state of it with OTHER_MARK."""

    machine: Machine
    failing: Failing
    state: MachineState
    checkpoint: Checkpoint

    def marks(self) -> set[int]:
        return {regs_of(self.machine, index).rsi for index in range(VCPUS)}

    def prepare(self) -> None:
        for index in range(VCPUS):
            self.machine.edit(index, "rsi", MARK)


@pytest.fixture
def scene(system: System, tmp_path: Path) -> Iterator[Scene]:
    with build(system, tmp_path, COUNT, vcpus=VCPUS, memory=1 << 20) as machine:
        saved = machine.save()
        state = MachineState(tuple(map(at_the_entry, saved.vcpus)), saved.machine, saved.devices)
        machine.load(state)
        checkpoint = machine.checkpoint()
        failing = Failing()
        inject(machine, failing)
        yield Scene(machine, failing, state, checkpoint)


def at_the_entry(vcpu: Mapping[str, bytes]) -> dict[str, bytes]:
    """Ready to run, the AP too: one that waits for its SIPI makes each step wait for it."""
    copy = {**vcpu, "mp_state": bytes(MpState(MP_STATE_RUNNABLE))}
    for register, value in (("rip", ORIGIN), ("cs.base", 0), ("cs.selector", 0), ("rsi", OTHER_MARK)):
        registers.write(copy, register, value)
    return copy


def everything_changed(scene: Scene) -> None:
    """All copies own their state, and every row is to be written: what a put can have to do at most."""
    scene.prepare()
    for vcpu in scene.machine.vcpus:
        write_all(vcpu)


def nothing_owned(scene: Scene) -> None:
    """The kernel owns all state, as after a run."""
    scene.prepare()
    run_and_pause(scene)


def run_and_pause(scene: Scene) -> None:
    scene.machine.run()
    makes_progress(scene.machine, 10)
    until(lambda: not any(vcpu.dirty for vcpu in scene.machine.vcpus))  # each has begun to run
    scene.machine.pause()


def run_on(scene: Scene) -> None:
    """The guest's run fails on a VCPU's thread; the supervisor says so."""
    scene.machine.run()
    scene.machine.wait(Phase.STOPPED, timeout=20)


def step(scene: Scene) -> None:
    ended = scene.machine.step()
    assert ended[0].kind is ExitKind.DEBUG


def sync_victim(scene: Scene) -> None:
    synchronize(scene.machine, VICTIM)


def save(scene: Scene) -> None:
    state = scene.machine.save()
    assert {int.from_bytes(vcpu["regs"][32:40], "little") for vcpu in state.vcpus} == {MARK}


def checkpoint(scene: Scene) -> None:
    scene.machine.forget(scene.machine.checkpoint())


def edit(scene: Scene) -> None:
    scene.machine.edit(VICTIM, "rbp", 0x99)
    assert regs_of(scene.machine, VICTIM).rbp == 0x99


def reset(scene: Scene) -> None:
    scene.machine.reset()
    assert regs_of(scene.machine).rip == ORIGIN


def load(scene: Scene) -> None:
    scene.machine.load(scene.state)


def restore(scene: Scene) -> None:
    scene.machine.restore(scene.checkpoint)


def while_running(operation: Callable[[Scene], None]) -> Callable[[Scene], None]:
    def started(scene: Scene) -> None:
        if scene.machine.status.phase is Phase.PAUSED:
            armed, scene.failing.target = scene.failing.target, None
            scene.machine.run()
            makes_progress(scene.machine, 10)
            until(lambda: not any(vcpu.dirty for vcpu in scene.machine.vcpus))
            scene.failing.target = armed
        operation(scene)

    return started


@dataclass(frozen=True)
class Operation:
    """A row of the table: what is done, with what before it, and how it ends when one of its ioctls fails.

    ``phase``: the machine's after a failed get, and after a failed put. ``dirty``: does the victim's copy own its state
    then? ``mark``: RSI after the retry. ``raises``: the caller gets the error (else only the status has it).
    """

    do: Callable[[Scene], None]
    before: Callable[[Scene], None]
    level: WritebackLevel | None
    after_get: tuple[Phase, bool] | None
    after_put: tuple[Phase, bool] | None
    mark: int = MARK
    raises: bool = True


PAUSED, STOPPED = Phase.PAUSED, Phase.STOPPED
CLEAN, DIRTY = False, True

OPERATIONS = {
    #                          does         after               level    a get failed       a put failed
    "sync": Operation(sync_victim, nothing_owned, None, (PAUSED, CLEAN), None),
    "edit": Operation(edit, nothing_owned, None, (PAUSED, CLEAN), None),
    "save": Operation(save, nothing_owned, None, (PAUSED, CLEAN), None),
    "checkpoint": Operation(checkpoint, nothing_owned, None, (PAUSED, CLEAN), None),
    "checkpoint while running": Operation(while_running(checkpoint), nothing_owned, None, (PAUSED, CLEAN), None),
    "run": Operation(run_on, everything_changed, RUNTIME, None, (STOPPED, DIRTY), raises=False),
    "step": Operation(step, everything_changed, RUNTIME, None, (PAUSED, DIRTY)),
    "reset": Operation(reset, nothing_owned, RESET, (PAUSED, CLEAN), (STOPPED, DIRTY), mark=0),
    "reset while running": Operation(
        while_running(reset), nothing_owned, RESET, (PAUSED, CLEAN), (STOPPED, DIRTY), mark=0
    ),
    "load": Operation(load, nothing_owned, FULL, None, (STOPPED, DIRTY), mark=OTHER_MARK),
    "restore": Operation(restore, nothing_owned, FULL, None, (STOPPED, DIRTY), mark=OTHER_MARK),
}  # fmt: skip


def targets(machine: Machine, operation: Operation) -> list[Call]:
    """Each ioctl that the operation makes, the victim's and the machine's; but for those whose failure is tolerated."""
    calls: list[Call] = []
    chips = machine.chips.rows
    reads_chips = operation.do in (save, checkpoint)
    if operation.after_get:
        calls += [(str(row.get), row.name, VICTIM) for row in machine.table.get_order]
        calls += [(str(row.get), row.name, None) for row in chips if reads_chips]
    if operation.after_put and operation.level:
        # Of the rows that KVM can't read back, guest debug alone ever changes: for a step.
        changed = {"guest_debug"} if operation.do is step else set()
        rows = [
            row
            for row in machine.table.put_order
            if row.level <= operation.level and (row.get or row.name in changed) and not row.tolerated
        ]
        if operation.level > RUNTIME:
            calls += [(str(row.put), row.name, None) for row in chips if row.level <= operation.level]
        calls += [(str(row.put), row.name, VICTIM) for row in rows]
    return calls


@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.slow) for turn in range(1, len(ERRNOS)))])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_ioctl_fails_once_and_the_retry_works(scene: Scene, name: str, turn: int) -> None:
    """In each turn every ioctl has one of the errnos, in all turns each of them."""
    operation, machine, failing = OPERATIONS[name], scene.machine, scene.failing
    made = targets(machine, operation)
    assert len(made) >= 7
    for place, target in enumerate(made):
        number = ERRNOS[(place + turn) % len(ERRNOS)]
        operation.before(scene)
        failing.arm(target, number)
        told = outcome(scene, operation)
        assert failing.target is None, f"{target} was never made"

        ioctl, substate, vcpu = target
        was_put = "_SET_" in ioctl
        where = "the machine's" if vcpu is None else f"VCPU {vcpu}"
        expected = operation.after_put if was_put else operation.after_get
        assert expected is not None
        for part in (ioctl, substate, errno.errorcode[number], os.strerror(number)):
            assert part in told, (target, told)
        if vcpu is not None:
            assert where in told
        if was_put and operation.level:
            assert operation.level.name in told
        victim = machine.vcpus[VICTIM]
        assert machine.status.phase is expected[0], (target, machine.status)
        if vcpu is not None:
            assert victim.dirty is expected[1], target
        assert not any(each.running for each in machine.vcpus)
        if operation.level in (RESET, FULL) and was_put:
            with pytest.raises(MachineError, match="failed half-way"):
                machine.run()
        ledger_has(machine, target, told)

        written = [call for call in failing.done if "_SET_" in call[0] and call[2] == VICTIM]
        failing.done = []
        operation.do(scene) if operation.raises else run_and_pause(scene)
        again = [call for call in failing.done if "_SET_" in call[0] and call[2] == VICTIM]
        if was_put and vcpu is not None:
            assert target in again
            if operation.level is RUNTIME:  # nothing twice, nothing left out
                rest = [call for call in made[place:] if call not in written]
                assert again[: len(rest)] == rest
        machine.pause()
        if operation.mark:
            assert scene.marks() == {operation.mark}, target
        else:
            assert scene.marks() == {0}
        run_and_pause(scene)


def outcome(scene: Scene, operation: Operation) -> str:
    """Do it; what the error, or the status, tells."""
    if not operation.raises:
        operation.do(scene)
        return scene.machine.status.reason
    with pytest.raises(KvmError) as caught:
        operation.do(scene)
    error = caught.value
    assert isinstance(error, SubstateError)
    if "_SET_" in error.ioctl:
        assert error.level is operation.level
    return str(error)


def ledger_has(machine: Machine, target: Call, told: str) -> None:
    """The failed call stands in the ledger with what it did move."""
    ioctl, substate, vcpu = target
    part = next(
        part for record in reversed(machine.ledger.records) for part in record.parts if part.vcpu == vcpu and part.error
    )
    assert part.error in told
    moved = part.written if "_SET_" in ioctl else part.read
    assert substate not in moved
    assert part.ioctls == len(moved) + 1


@pytest.mark.parametrize("place", [0, 1], ids=tsc.FOUND_IN)
@pytest.mark.parametrize("name", ["reset", "load"])
def test_nothing_is_put_while_it_is_not_known_what_the_tsc_is(scene: Scene, name: str, place: int) -> None:
    """VCPU 0's look at its TSC, on which all VCPUs' offsets depend."""
    operation, machine = OPERATIONS[name], scene.machine
    if "tsc_offset" not in machine.table.by_name:
        pytest.skip("this kernel has no TSC offsets")
    row = machine.table.by_name[tsc.FOUND_IN[place]]
    operation.before(scene)
    if name == "reset":
        machine.save()  # so that the look is the first read
    scene.failing.arm((str(row.get), row.name, 0), errno.EIO)
    with pytest.raises(SubstateError, match=f"VCPU 0: {row.get}"):
        operation.do(scene)
    assert machine.status.phase is STOPPED
    assert all(vcpu.dirty for vcpu in machine.vcpus)
    own, first = machine.ledger.records[-1].parts
    assert (own.vcpu, own.error) == (None, "")
    assert (first.read, first.written, first.ioctls) == (tsc.FOUND_IN[:place], (), place + 1)
    assert row.name in first.error
    operation.do(scene)
    run_and_pause(scene)
    assert scene.marks() == {operation.mark}


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
def test_every_errno_ends_alike(scene: Scene, number: int) -> None:
    for name in ("run", "reset", "load", "save"):
        operation = OPERATIONS[name]
        operation.before(scene)
        ioctl = "KVM_GET_REGS" if operation.after_get and not operation.after_put else "KVM_SET_REGS"
        scene.failing.arm((ioctl, "regs", VICTIM), number)
        assert errno.errorcode[number] in outcome(scene, operation)
        operation.do(scene) if operation.raises else run_and_pause(scene)
        assert scene.marks() == {operation.mark}


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
def test_kvm_run_fails(scene: Scene, number: int) -> None:
    """EINTR and EAGAIN too: a backend answers those itself, what comes out of its ``run`` is final."""
    scene.prepare()
    scene.failing.arm(("KVM_RUN", "", VICTIM), number)
    run_on(scene)
    status = scene.machine.status
    assert status.phase is STOPPED
    assert status.vcpu == VICTIM
    for part in (f"VCPU {VICTIM}", "KVM_RUN", errno.errorcode[number]):
        assert part in status.reason
    assert not scene.machine.vcpus[VICTIM].dirty  # what was put before the run is the kernel's
    run_and_pause(scene)
    assert scene.marks() == {MARK}


def test_a_failed_step_leaves_no_vcpu_stepping(scene: Scene) -> None:
    """VCPU 1 waits for its SIPI inside the step when VCPU 0's has failed already."""
    scene.machine.reset()
    scene.prepare()
    scene.failing.arm(("KVM_SET_REGS", "regs", 0), errno.EIO)
    with pytest.raises(SubstateError, match="VCPU 0"):
        scene.machine.step()
    scene.machine.vcpus[1].run_on(lambda: None)
    step(scene)
    run_and_pause(scene)


def test_a_failed_events_put_is_made_up_for_though_regs_are_clean_by_then(scene: Scene) -> None:
    """SET_REGS clears a pending exception: once it has gone in, events have to follow, be it at the retry."""
    scene.machine.edit(0, "rsi", MARK)
    scene.failing.arm(("KVM_SET_VCPU_EVENTS", "events", 0), errno.EIO)
    run_on(scene)
    scene.failing.done = []
    run_and_pause(scene)
    put = [call[:2] for call in scene.failing.done if call[2] == 0 and "_SET_" in call[0]]
    assert put == [("KVM_SET_VCPU_EVENTS", "events")]


INVALID_XCRS = bytes(Xcrs(flags=1))


@pytest.fixture
def xcrs_tolerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the TSC's frequency is, which this kernel may not have: a row whose refusal the table goes on after."""
    with_rows(monkeypatch, xcrs={"tolerated": True})


@pytest.mark.usefixtures("xcrs_tolerated")
@pytest.mark.parametrize("level", [RUNTIME, FULL], ids=lambda level: level.name)
def test_what_a_kernel_refuses_and_the_table_tolerates_is_told(
    system: System, tmp_path: Path, level: WritebackLevel
) -> None:
    """A real refusal by the kernel, mid-batch: what comes after it is written, and it isn't taken for written."""
    with build(system, tmp_path, COUNT, vcpus=VCPUS) as machine:
        state, own = machine.save(), dict(machine.vcpus[0].copy)
        new_msrs = pack_msrs({**unpack_msrs(own["msrs"]), LSTAR: MARK})
        changed = {"xcrs": INVALID_XCRS, "msrs": new_msrs}
        if level is RUNTIME:
            machine.vcpus[0].copy.update(changed)
        else:
            machine.load(MachineState(({**own, **changed}, *state.vcpus[1:]), state.machine, state.devices))
        machine.run()
        makes_progress(machine)
        machine.pause()
        puts = [record for record in machine.ledger.records if record.level is level]
        record, part = next((each, part) for each in reversed(puts) for part in each.parts if part.vcpu == 0)
        assert (part.tolerated, part.error) == ((("xcrs", "EINVAL"),), "")
        assert "xcrs" not in part.written
        assert part.written[-1] == "msrs" if level is RUNTIME else part.written[-1] == "debugregs"
        assert part.ioctls == len(part.read) + len(part.written) + 1
        assert '"tolerated": [["xcrs", "EINVAL"]]' in record.as_json()
        vcpu = synchronize(machine)
        assert (vcpu.copy["xcrs"], vcpu.copy["msrs"]) == (own["xcrs"], new_msrs)


@pytest.mark.usefixtures("xcrs_tolerated")
@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
def test_what_was_tolerated_is_not_taken_for_written(scene: Scene, number: int) -> None:
    """Neither by the next put, nor by the retry of one that a later row has ended; though its bytes are the same."""
    machine, failing, symbol = scene.machine, scene.failing, errno.errorcode[number]
    refused = ("KVM_SET_XCRS", "xcrs", VICTIM)
    scene.prepare()
    machine.save()

    failing.arm(refused, number)
    put_at_full(machine)
    part = victims_part(machine)
    assert (part.tolerated, part.error) == ((("xcrs", symbol),), "")
    assert "xcrs" not in part.written
    sync.cpu_synchronize_all_pre_loadvm(machine.vcpus, ledger=machine.ledger, caller="test")  # dirty, and not read
    run_and_pause(scene)
    assert victims_part(machine).written == ("xcrs",)

    machine.save()
    failing.arm(refused, number)
    failing.then = (("KVM_SET_VCPU_EVENTS", "events", VICTIM), errno.ENOMEM)
    with pytest.raises(SubstateError, match="events"):
        put_at_full(machine)
    part = victims_part(machine)
    assert part.tolerated == (("xcrs", symbol),)
    assert not {"xcrs", "events"} & {*part.written}
    assert part.ioctls == len(part.written) + 2
    run_and_pause(scene)
    assert victims_part(machine).written == ("xcrs", "events", "debugregs")
    assert scene.marks() == {MARK}


def put_at_full(machine: Machine) -> None:
    sync.cpu_synchronize_all_post_init(machine.vcpus, ledger=machine.ledger, caller="test")


def victims_part(machine: Machine) -> Part:
    """What the newest put of the victim's moved."""
    parts = (part for record in reversed(machine.ledger.records) if record.level for part in record.parts)
    return next(part for part in parts if part.vcpu == VICTIM)


@pytest.mark.parametrize("level", [RUNTIME, RESET, FULL], ids=lambda level: level.name)
def test_a_partial_msr_put_names_index_and_value_at_each_level(scene: Scene, level: WritebackLevel) -> None:
    machine = scene.machine
    scene.prepare()
    good = machine.vcpus[VICTIM].copy["msrs"]
    bad = pack_msrs({**unpack_msrs(good), LSTAR: NOT_CANONICAL})
    told = ""
    if level is RUNTIME:
        machine.vcpus[VICTIM].copy["msrs"] = bad
        run_on(scene)
        told = machine.status.reason
        machine.vcpus[VICTIM].copy["msrs"] = good  # as it was before: yet it isn't what the kernel holds now
    elif level is RESET:
        fresh = machine._fresh
        vcpus = list(fresh.vcpus)
        vcpus[VICTIM] = {**vcpus[VICTIM], "msrs": bad}
        machine._fresh = replace(fresh, vcpus=tuple(vcpus))
        with pytest.raises(SubstateError) as caught:
            machine.reset()
        told = str(caught.value)
        machine._fresh = fresh
    else:
        vcpus = list(scene.state.vcpus)
        vcpus[VICTIM] = {**vcpus[VICTIM], "msrs": bad}
        with pytest.raises(SubstateError) as caught:
            machine.load(MachineState(tuple(vcpus), scene.state.machine, scene.state.devices))
        told = str(caught.value)
    for part in (f"VCPU {VICTIM}", "KVM_SET_MSRS", "msrs", hex(LSTAR), hex(NOT_CANONICAL), level.name, "EINVAL"):
        assert part in told
    assert machine.status.phase is STOPPED
    assert machine.vcpus[VICTIM].dirty
    assert not machine.vcpus[0].dirty or level is RUNTIME
    scene.failing.done = []
    {RUNTIME: run_and_pause, RESET: reset, FULL: load}[level](scene)
    assert ("KVM_SET_MSRS", "msrs", VICTIM) in scene.failing.done
    run_and_pause(scene)
    assert unpack_msrs(synchronize(machine, VICTIM).copy["msrs"])[LSTAR] == unpack_msrs(good)[LSTAR]


def test_a_device_that_refuses_its_state_leaves_everything_as_it_was(scene: Scene) -> None:
    nothing_owned(scene)
    devices = {**scene.state.devices, "uart": b"damaged"}
    name = next(iter(scene.state.devices))
    devices = {**scene.state.devices, name: b"damaged by somebody"}
    total = scene.machine.ledger.total
    with pytest.raises(Exception, match="damaged"):
        scene.machine.load(MachineState(scene.state.vcpus, scene.state.machine, devices))
    assert scene.machine.ledger.total == total
    assert not any(vcpu.dirty for vcpu in scene.machine.vcpus)
    assert scene.machine.status.phase is PAUSED
    assert scene.marks() == {MARK}


def test_a_machine_whose_init_fails_leaves_nothing_behind(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its ioctls in turn: the victim's and the machine's own."""
    failing = Failing()
    inject_from_the_start(monkeypatch, failing)
    build(system, tmp_path, COUNT, vcpus=VCPUS).close()
    made = [call for call in dict.fromkeys(failing.done) if call[2] in (VICTIM, None)]
    assert {"KVM_SET_CPUID2", "KVM_GET_REGS", "KVM_SET_REGS", "KVM_GET_CLOCK"} <= {ioctl for ioctl, _, _ in made}
    before = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    for place, target in enumerate(made):
        number = ERRNOS[place % len(ERRNOS)]
        failing.arm(target, number)
        with pytest.raises(SubstateError, match=rf"{target[0]} \({target[1]}.*{errno.errorcode[number]}"):
            build(system, tmp_path, COUNT, vcpus=VCPUS)
        assert (set(threading.enumerate()), len(os.listdir("/proc/self/fd"))) == before
    with build(system, tmp_path, COUNT, vcpus=VCPUS) as machine:
        machine.run()
        makes_progress(machine)


def test_a_vcpu_that_stops_all_does_not_stop_those_resumed_meanwhile(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VCPU 1 fails, and is slow to say so to VCPU 0; by then somebody has let the machine run on."""
    ran_on = threading.Event()
    real = Vcpu.stop

    def slow_stop(vcpu: Vcpu) -> Reply[int]:
        if vcpu.index == 0 and threading.current_thread().name == "vcpu1":
            ran_on.wait(0.1)  # the machine must not let it come so far: then this is how long it takes
        return real(vcpu)

    monkeypatch.setattr(Vcpu, "stop", slow_stop)
    scene.failing.arm(("KVM_RUN", "", VICTIM), errno.EIO)
    run_on(scene)
    scene.machine.run()
    ran_on.set()
    makes_progress(scene.machine)
    assert scene.machine.status.phase is Phase.RUNNING
