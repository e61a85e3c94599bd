"""Random interleavings against a plain model that says where each substate's truth is: in the kernel or in the copy.

On the software backend, whose ioctls can be watched and made to fail, and whose kernel side can be looked at without
an ioctl. What is checked, and where:

- at every KVM_RUN after a stop: the kernel holds what the copy had, in the rows that RUNTIME writes, and in all others
  what it had itself, with everything that arrived meanwhile (interrupts, NMIs, INIT, SIPI);
- at every ioctl: its own thread; no VCPU inside the guest while RESET's and FULL's rows are put;
- after every operation: dirty as the model says, false after every put; each get and put stands in the ledger.
"""

from __future__ import annotations

import errno
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import Phase as Phase_
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import (
    RULE_MARKER,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvm import sync
from kvm.backends.interface import Exit, ExitKind
from kvm.backends.software.system import SoftwareSystem
from kvm.backends.software.vcpu import _GET, SoftwareVcpu
from kvm.errors import KvmError, MachineError
from kvm.machine import Machine, Phase
from kvm.snapshot.state import Checkpoint, MachineState
from kvm.x86 import msrs, registers, reset
from kvm.x86.structs import MpState, Regs, VcpuEvents, pack_msrs, unpack_msrs
from tests.kvm.contract.lab import (
    AP_ADDRESS,
    AP_CODE,
    COUNT_INTERRUPTS,
    RESET,
    RUNTIME,
    put_bytes,
    synchronize,
    take_interrupts,
    tsc_distances,
    whole,
    with_get_order,
    with_rows,
    write_all,
)
from tests.kvm.machines import build, until

VCPUS = 3
State = dict[str, bytes]

AT_RUNTIME = ("regs", "sregs", "xsave", "xcrs", "msrs", "events", "debugregs")
"""What a VCPU that runs on may get from its copy. The model's own list, so that a table with a mistake is found out."""
FIXED, NMI, INIT, SIPI = 0, 4, 5, 6
MESSAGES = {"interrupt": (FIXED, 0x51), "NMI": (NMI, 0), "INIT": (INIT, 0), "SIPI": (SIPI, AP_ADDRESS >> 12)}

vcpu_numbers = st.integers(0, VCPUS - 1)
registers_edited = st.sampled_from(["rsi", "rdi", "rbp", "r8", "r15", "cr2", "fs.base"])


def peek(machine: Machine, index: int) -> State:
    """What the kernel side holds now, by no ioctl and without accepting an INIT as KVM_GET_MP_STATE does."""
    fd: Any = machine.vcpus[index].fd
    assert isinstance(fd, SoftwareVcpu)
    found = {
        row.name: _GET[str(row.get)](fd, row.template) for row in machine.table.get_order if row.name != "mp_state"
    }
    found["mp_state"] = bytes(MpState(fd.mp_state))
    found["latched"] = bytes((fd.lapic.init_pending, fd.lapic.sipi_pending, fd.lapic.sipi_vector))
    return found


def plain(name: str, raw: bytes) -> bytes:
    """A substate without what isn't state: the TSC, which runs on, and MXCSR's mask, which nobody can set."""
    if name == "msrs_reset":
        return pack_msrs({**unpack_msrs(raw), msrs.TSC: 0})
    return put_bytes(raw, 28, bytes(4)) if name == "xsave" else raw


def same(found: Mapping[str, bytes], expected: Mapping[str, bytes], names: Iterable[str]) -> list[str]:
    """The names of those that differ, which should be none."""
    return [name for name in names if plain(name, found[name]) != plain(name, expected[name])]


class ContractModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.kernel: list[State] = []
        """What the kernel holds of each VCPU, as far as the model goes while all stand."""
        self.copy: list[State | None] = [None] * VCPUS
        """The copy's state where it owns it."""
        self.expected: dict[int, State] = {}
        """What KVM_RUN must find, for VCPUs about to be entered."""
        self.moved: dict[int | None, list[str]] = {vcpu: [] for vcpu in (None, *range(VCPUS))}
        self.fail_at: tuple[str, int, int] | None = None
        self.half_done = False
        self.let_run = False
        self.states: list[MachineState] = []
        self.checkpoints: list[Checkpoint] = []

    @initialize()
    def build(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.system = SoftwareSystem(slice_instructions=50)
        self.machine = build(self.system, Path(self.folder.name), COUNT_INTERRUPTS, vcpus=VCPUS, memory=1 << 20)
        self.machine.memory.write(AP_ADDRESS, AP_CODE)
        take_interrupts(self.machine)
        self.ledger_from = self.machine.ledger.total
        self.kernel = [peek(self.machine, index) for index in range(VCPUS)]
        self.system.fault = self.ioctl

    def teardown(self) -> None:
        if hasattr(self, "machine"):
            self.system.fault = None
            self.machine.close()
            self.folder.cleanup()

    # At every ioctl

    def ioctl(self, ioctl: str, substate: str, vcpu: int | None) -> int:
        if not (substate or ioctl == "KVM_RUN"):
            return 0
        if self.fail_at is not None and self.fail_at[0] in ioctl:
            kind, left, number = self.fail_at
            self.fail_at = (kind, left - 1, number) if left else None
            if not left:
                return number
        if vcpu is not None and (name := threading.current_thread().name) != f"vcpu{vcpu}":
            self.wrong(f"{ioctl} of VCPU {vcpu} on thread {name}")
        if substate:
            self.moved[vcpu].append(substate)
        elif vcpu is not None:
            self.entered(vcpu)
        if "_SET_" in ioctl and (vcpu is None or self.machine.table.by_name[substate].level > RUNTIME):
            inside = [each.index for each in self.machine.vcpus if each.fd.inside]  # type: ignore[attr-defined]
            if inside:
                self.wrong(f"{ioctl} of VCPU {vcpu} while {inside} run")
        return 0

    def wrong(self, what: str) -> None:
        self.problems.append(what)
        print(what)  # Hypothesis may have no place for it, where threads make a replay end otherwise

    def entered(self, vcpu: int) -> None:
        if self.machine.vcpus[vcpu].dirty:
            self.wrong(f"VCPU {vcpu} runs while its copy owns its state")
        expected = self.expected.get(vcpu)
        if expected is not None and (wrong := same(peek(self.machine, vcpu), expected, expected)):
            self.wrong(f"VCPU {vcpu} runs with wrong {wrong}")
        self.expected.pop(vcpu, None)  # last: who waits for it looks at the problems then

    # The model

    def at_entry(self, vcpu: int) -> State:
        """RUNTIME's rows from whoever owns them; all else, and in the events what arrives by itself, the kernel's."""
        kernel, copy = self.kernel[vcpu], self.copy[vcpu]
        if copy is None:
            return dict(kernel)
        runtime = {name: copy[name] for name in AT_RUNTIME}
        events, own = VcpuEvents.from_buffer_copy(copy["events"]), VcpuEvents.from_buffer_copy(kernel["events"])
        for name in ("nmi_pending", "smi_latched_init"):
            setattr(events, name, getattr(own, name))
        return {**kernel, **runtime, "events": bytes(events)}

    def look(self, *vcpus: int) -> None:
        """They have run, or stood where something arrived: what the kernel holds is what is true."""
        for vcpu in vcpus or range(VCPUS):
            self.kernel[vcpu] = peek(self.machine, vcpu)

    def owned(self, vcpu: int) -> None:
        """A sync has been: the copy holds one moment's whole state, latched INIT and SIPI taken."""
        was_kernels = self.copy[vcpu] is None
        if was_kernels:
            self.look(vcpu)
            copy = self.machine.vcpus[vcpu].copy
            names = [row.name for row in self.machine.table.get_order]
            assert same(self.kernel[vcpu], copy, names) == []
            self.copy[vcpu] = {name: copy[name] for name in names}

    def running(self) -> bool:
        """Does it run? One that has stopped by itself since, as its guest went astray, is looked at first."""
        runs = self.machine.status.phase is Phase.RUNNING
        if self.let_run and not runs:
            self.stopped()
        return runs

    def attempt(self, operation: Callable[[], object], *, all_dirty: bool = True) -> bool:
        """Do it; False if an injected error ended it. What was about to run doesn't, then.

        ``all_dirty``: a put in it is of a copy that owns its state (else it may be of guest debug alone).
        """
        armed = self.fail_at
        try:
            operation()
        except KvmError as error:
            failure = error
        else:
            return True
        assert armed is not None
        assert self.fail_at is None
        assert failure.errno == armed[2]
        if all_dirty and armed[0] == "_SET_" and failure.vcpu is not None:
            assert self.machine.vcpus[failure.vcpu].dirty
        assert not self.running()
        self.expected.clear()
        return False

    def stopped(self) -> None:
        """All stand, wherever they were: those that ran have no copy."""
        self.let_run = False
        self.machine.pause()
        for vcpu in self.machine.vcpus:
            vcpu.run_on(lambda: None)
            if not vcpu.dirty:
                self.copy[vcpu.index] = None
        self.expected.clear()
        self.look()

    def stop_first(self) -> None:
        if self.running():
            self.stopped()

    def written(self, level: int) -> None:
        """A put of all at this level has been: the kernel holds what the copies hold, and owns it."""
        for index, vcpu in enumerate(self.machine.vcpus):
            self.copy[index] = None
            self.look(index)
            names = [row.name for row in self.machine.table.get_order if row.level <= level and row.name != "events"]
            assert same(self.kernel[index], vcpu.copy, names) == []

    # Rules. None has a precondition: which are allowed must not depend on threads, or no failure could be replayed.

    @rule()
    def run(self) -> None:
        if self.running():
            return
        if self.half_done:
            try:
                self.machine.run()
            except MachineError:
                return
            raise AssertionError("a half-done machine runs")
        self.expected = {vcpu: self.at_entry(vcpu) for vcpu in range(VCPUS)}
        all_dirty = None not in self.copy
        self.machine.run()
        until(lambda: not self.expected or self.machine.status.phase is Phase.STOPPED)
        status = self.machine.status
        if status.phase is Phase.STOPPED:  # by the error, or the guest went astray and shut down
            if "_SET_" in status.reason and all_dirty:
                assert status.vcpu is not None
                assert self.machine.vcpus[status.vcpu].dirty
            self.stopped()
        else:
            self.copy = [None] * VCPUS
            self.let_run = True
        self.fail_at = None

    @rule()
    def pause(self) -> None:
        if not self.running():
            return
        self.stopped()

    @rule()
    def sample(self) -> None:
        total = self.machine.ledger.total
        self.machine.request_samples()
        for vcpu in range(VCPUS):
            self.machine.view(vcpu)
        assert self.machine.ledger.total == total or self.running()

    @rule(vcpu=vcpu_numbers)
    def kick(self, vcpu: int) -> None:
        self.machine.vcpus[vcpu].fd.kick()

    @rule(vcpu=vcpu_numbers)
    def sync(self, vcpu: int) -> None:
        if self.running():
            return
        if self.attempt(lambda: synchronize(self.machine, vcpu)):
            self.owned(vcpu)
        else:
            self.look(vcpu)

    @rule(vcpu=vcpu_numbers, register=registers_edited, value=st.integers(0, (1 << 47) - 1))
    def edit(self, vcpu: int, register: str, value: int) -> None:
        self.stop_first()
        copy = self.copy[vcpu]
        if self.attempt(lambda: self.machine.edit(vcpu, register, value)):
            if copy is None:
                self.look(vcpu)
                copy = {row.name: self.kernel[vcpu][row.name] for row in self.machine.table.get_order}
            registers.write(copy, register, value)
            self.copy[vcpu] = copy
        else:
            self.look(vcpu)

    @rule(vcpu=vcpu_numbers, what=st.sampled_from(sorted(MESSAGES)))
    def arrives(self, vcpu: int, what: str) -> None:
        """As from another VCPU or a device, at any moment."""
        with self.machine._vm.scheduler.attention():  # type: ignore[attr-defined]
            self.machine.vcpus[vcpu].fd.lapic.accept(*MESSAGES[what])  # type: ignore[attr-defined]
        if not self.running():
            self.look(vcpu)

    @rule(vcpu=st.none() | vcpu_numbers)
    def step(self, vcpu: int | None) -> None:
        self.stop_first()
        if self.half_done:
            return
        stepped = range(VCPUS) if vcpu is None else (vcpu,)
        self.expected = {each: self.at_entry(each) for each in stepped}
        exits: list[Exit] = []
        worked = self.attempt(lambda: exits.extend(self.machine.step(vcpu)), all_dirty=None not in self.copy)
        # One that was slow to begin was told to let it be before it had entered the guest.
        entered = {each for each, ended in zip(stepped, exits, strict=worked) if ended.kind is not ExitKind.KICKED}
        assert not self.expected.keys() & entered
        self.expected.clear()
        for each in stepped:
            if not self.machine.vcpus[each].dirty:
                self.copy[each] = None
        if worked:
            assert not any(self.machine.vcpus[each].dirty for each in stepped)
        self.look()

    @rule()
    def reset(self) -> None:
        was_running = self.running()
        self.stop_first()
        fresh = self.machine._fresh.vcpus
        if self.attempt(self.machine.reset):
            self.half_done = False
            self.written(RESET)
            for index in range(VCPUS):
                expected = reset.reset_state(fresh[index], index)
                assert (
                    same(self.kernel[index], expected, ("lapic", "mp_state", "msrs_reset", "xsave", "debugregs")) == []
                )
                assert self.kernel[index]["tsc_offset"] == self.kernel[0]["tsc_offset"]
                # A SIPI may stay latched, but no VCPU waits for one now, and it's dropped when looked at.
                assert not self.kernel[index]["latched"][0]
            if was_running:
                self.run()
        else:
            self.failed_in_all()

    @rule()
    def save(self) -> None:
        if len(self.states) == 4:
            return
        self.stop_first()
        if self.half_done:
            return
        saved: list[MachineState] = []
        if self.attempt(lambda: saved.append(self.machine.save())):
            for vcpu in range(VCPUS):
                self.owned(vcpu)
            self.states += saved
            for vcpu, state in enumerate(saved[0].vcpus):
                copy = self.copy[vcpu]
                assert copy is not None
                assert {name: state[name] for name in copy} == copy
        else:
            self.failed_in_all()

    @rule(which=st.integers(0, 3))
    def load(self, which: int) -> None:
        if not self.states:
            return
        self.stop_first()
        state = self.states[which % len(self.states)]
        self.loaded(lambda: self.machine.load(state), state)

    @rule()
    def checkpoint(self) -> None:
        if len(self.checkpoints) == 3:
            return
        self.stop_first()
        if self.half_done:
            return
        taken: list[Checkpoint] = []
        if self.attempt(lambda: taken.append(self.machine.checkpoint())):
            for vcpu in range(VCPUS):
                self.owned(vcpu)
            self.checkpoints += taken
        else:
            self.failed_in_all()

    @rule(which=st.integers(0, 2))
    def restore(self, which: int) -> None:
        if not self.checkpoints:
            return
        self.stop_first()
        checkpoint = self.checkpoints[which % len(self.checkpoints)]
        self.loaded(lambda: self.machine.restore(checkpoint), checkpoint.state)

    def loaded(self, operation: Callable[[], object], state: MachineState) -> None:
        if self.attempt(operation):
            self.half_done = False
            self.written(3)
            for index, given in enumerate(state.vcpus):
                names = [row.name for row in self.machine.table.get_order if row.name not in ("events", "tsc_offset")]
                assert same(self.kernel[index], given, names) == []
            assert tsc_distances(self.kernel) == tsc_distances(state.vcpus)
        else:
            self.failed_in_all()

    def failed_in_all(self) -> None:
        """An error ended what moves all VCPUs: each is its copy's or the kernel's, whole in either case."""
        self.half_done = bool(self.machine._half_done)
        for index, vcpu in enumerate(self.machine.vcpus):
            self.look(index)
            names = [row.name for row in self.machine.table.get_order]
            self.copy[index] = {name: vcpu.copy[name] for name in names} if vcpu.dirty else None

    @rule(
        kind=st.sampled_from(["_GET_", "_SET_", "KVM_RUN"]),
        left=st.integers(0, 3) | st.integers(0, 40),
        number=st.sampled_from([errno.EINTR, errno.EAGAIN, errno.ENOMEM, errno.EIO, errno.EINVAL]),
    )
    def something_will_fail(self, kind: str, left: int, number: int) -> None:
        if not self.running():
            self.fail_at = (kind, left, number)

    # After every rule

    @invariant()
    def nothing_was_wrong(self) -> None:
        assert not self.problems

    @invariant()
    def ownership_is_known(self) -> None:
        if hasattr(self, "machine") and not self.running():
            for vcpu in self.machine.vcpus:
                assert vcpu.dirty is (self.copy[vcpu.index] is not None), vcpu.index
                if vcpu.dirty and (copy := self.copy[vcpu.index]) is not None:
                    assert {name: vcpu.copy[name] for name in copy} == copy
                    assert Regs.from_buffer_copy(self.machine.view(vcpu.index).regs).rip == rip(copy)

    @invariant()
    def every_move_stands_in_the_ledger(self) -> None:
        if hasattr(self, "machine") and not self.running():
            records = [record for record in self.machine.ledger.records if record.number > self.ledger_from]
            for vcpu, moved in self.moved.items():
                parts = [part for record in records for part in record.parts if part.vcpu == vcpu]
                assert [name for part in parts for name in (*part.read, *part.written)] == moved


def rip(state: State) -> int:
    return Regs.from_buffer_copy(state["regs"]).rip


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """An AP that waits for its SIPI is found to do so sooner than a person would mind."""
    monkeypatch.setattr("kvm.machine.STEP_LIMIT", 0.01)


EVERY_RULE = frozenset(name for name, member in vars(ContractModel).items() if hasattr(member, RULE_MARKER))


def interleave(
    examples: int, steps: int = 30, *, phases: Sequence[Phase_] = tuple(Phase_), rules: Iterable[str] = EVERY_RULE
) -> None:
    without = dict.fromkeys(EVERY_RULE - {*rules})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        type("Model", (ContractModel,), without),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=phases,
            report_multiple_bugs=False,
            database=None,
        ),
    )


def test_random_interleavings() -> None:
    interleave(30)


@pytest.mark.slow
def test_many_random_interleavings() -> None:
    interleave(1000, 50)


def clear_dirty_before_the_put(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sync._put

    def early(vcpu: Any, *how: Any) -> Any:
        finish = real(vcpu, *how)
        vcpu.dirty = False
        return finish

    monkeypatch.setattr(sync, "_put", early)


def write_all_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """As QEMU does: what didn't change, too."""
    real = sync._put

    def put(vcpu: Any, *how: Any) -> Any:
        write_all(vcpu)
        return real(vcpu, *how)

    monkeypatch.setattr(sync, "_put", put)


GUARDS: dict[str, tuple[Callable[[pytest.MonkeyPatch], object], str]] = {
    "the flags of what arrives by itself": (
        lambda patch: with_rows(patch, events={"at": whole}),
        "run edit arrives",
    ),
    "the LAPIC left alone at runtime": (
        lambda patch: (with_rows(patch, lapic={"level": RUNTIME}), write_all_always(patch)),
        "run edit arrives",
    ),
    "MP state read first": (
        lambda patch: with_get_order(patch, "events", before="mp_state"),
        "run pause sync arrives save load",
    ),
    "dirty until all is written": (
        clear_dirty_before_the_put,
        "run pause edit reset something_will_fail",
    ),
    "all stand for a reset": (
        lambda patch: patch.setattr(Machine, "_stop_all", lambda machine: 0.0),
        "run pause reset",
    ),
    "pre_loadvm takes ownership": (
        lambda patch: patch.setattr(sync, "cpu_synchronize_all_pre_loadvm", lambda *_, **__: None),
        "run pause edit save load",
    ),
}
"""What is taken out, and the rules that it takes to find that."""


@pytest.mark.parametrize("guard", GUARDS)
def test_the_model_misses_each_guard(monkeypatch: pytest.MonkeyPatch, guard: str) -> None:
    """Negative controls: with one guard taken out, some interleaving is found wrong."""
    take_out, rules = GUARDS[guard]
    take_out(monkeypatch)
    with pytest.raises((AssertionError, Flaky)):  # the latter: found, and with these threads not found again
        interleave(3000, phases=[Phase_.generate], rules=rules.split())
