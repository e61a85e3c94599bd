"""What is left of an operation that gave up waiting for a VCPU, or was interrupted there (ctrl-c)."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvm.backends.interface import Batch, ExitKind, System
from kvm.levels import WritebackLevel
from kvm.machine import Checkpoint, Machine, Phase
from kvm.vcpu import Reply, Vcpu
from kvm.x86.structs import Regs
from tests.kvm.contract.lab import Tracing, makes_progress
from tests.kvm.machines import COUNT, HLT, build, until

VICTIM = 1
"""Not VCPU 0: that one is asked for its TSC first, when a load begins."""


@pytest.fixture
def machine(system: System, tmp_path: Path) -> Iterator[Machine]:
    with build(system, tmp_path, COUNT, vcpus=3) as built:
        yield built


@contextmanager
def held_up(vcpu: Vcpu) -> Iterator[threading.Event]:
    """Its thread is busy with something else until the event is set, or the block left."""
    begun, release = threading.Event(), threading.Event()

    def busy() -> None:
        begun.set()
        release.wait(20)

    vcpu.post(busy)
    assert begun.wait(20)
    yield release
    release.set()


@contextmanager
def waiting(monkeypatch: pytest.MonkeyPatch, first: Callable[[], None]) -> Iterator[None]:
    """Whoever waits for the victim does this first."""
    real = Reply.outcome

    def outcome(reply: Reply[Any], *timeout: float) -> Callable[[], Any]:
        if reply._vcpu == VICTIM:
            first()
        return real(reply, *timeout)

    with monkeypatch.context() as patch:
        patch.setattr(Reply, "outcome", outcome)
        yield


def ctrl_c() -> None:
    raise KeyboardInterrupt


def marked(machine: Machine, value: int) -> Checkpoint:
    machine.edit(VICTIM, "r14", value)
    return machine.checkpoint(str(value))


def test_what_an_interrupted_restore_began_does_not_come_after_the_next_one(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = marked(machine, 1), marked(machine, 2)
    victim = machine.vcpus[VICTIM]
    begun: list[Batch[Any]] = []
    putting = victim.fd.putting

    def noted(*arguments: Any) -> Batch[Any]:
        begun.append(putting(*arguments))
        return begun[-1]

    monkeypatch.setattr(victim.fd, "putting", noted)
    with held_up(victim) as release:
        with waiting(monkeypatch, ctrl_c), pytest.raises(KeyboardInterrupt):
            machine.restore(second)
        assert machine.status.phase is Phase.STOPPED  # half of the one, half of the other
        with waiting(monkeypatch, release.set):
            machine.restore(first)
    assert len(begun) == 2
    until(lambda: all(batch.began_ns for batch in begun))
    row = machine.table.by_name["regs"]
    assert Regs.from_buffer_copy(victim.run_on(lambda: victim.fd.get([row]))[0]).r14 == 1
    machine.run()
    makes_progress(machine)


def test_what_an_interrupted_load_may_have_written_is_not_taken_for_known(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one substate that a load doesn't write where the kernel has it already."""
    first = machine.checkpoint()
    stepping = machine.vcpus[VICTIM]._step_control.to_bytes(4, "little")
    vcpus = [dict(copy) for copy in first.state.vcpus]
    vcpus[VICTIM]["guest_debug"] = stepping + vcpus[VICTIM]["guest_debug"][4:]
    with waiting(monkeypatch, ctrl_c), pytest.raises(KeyboardInterrupt):
        machine.load(dataclasses.replace(first.state, vcpus=tuple(vcpus)))
    with Tracing(machine) as trace:
        machine.restore(first)
    assert ("KVM_SET_GUEST_DEBUG", "guest_debug") in trace.moved(VICTIM)
    assert machine.vcpus[VICTIM].last_put is WritebackLevel.FULL


def test_an_interrupted_step_does_not_hold_its_vcpu(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build(system, tmp_path, HLT, vcpus=2) as machine:
        # VCPU 1 waits for a SIPI: its step wouldn't end by itself.
        assert machine.step(VICTIM)[0].kind is ExitKind.KICKED
        with waiting(monkeypatch, ctrl_c), pytest.raises(KeyboardInterrupt):
            machine.step(VICTIM)
        machine.checkpoint()
        assert machine.step(VICTIM)[0].kind is ExitKind.KICKED


def test_run_does_not_wait_until_a_vcpu_has_its_turn(machine: Machine) -> None:
    victim = machine.vcpus[VICTIM]
    with held_up(victim):
        machine.run()
        assert machine.status.phase is Phase.RUNNING
        assert all(vcpu.running for vcpu in machine.vcpus)
        makes_progress(machine)
    machine.pause()
    assert not any(vcpu.running for vcpu in machine.vcpus)


def test_a_stop_that_a_run_has_followed_stops_nothing(machine: Machine) -> None:
    victim = machine.vcpus[0]
    with held_up(victim):
        stopped = victim.stop()
        machine.run()
    stopped.outcome()()
    assert victim.running
    makes_progress(machine)
