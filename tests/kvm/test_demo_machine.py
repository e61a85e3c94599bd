"""The demo guest, which checks itself, through everything that a machine can be put through."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app import guests
from kvm.backends.interface import System
from kvm.boot import loader
from kvm.machine import Machine, MachineConfig, Phase
from tests.guests.brisk import brisk_demo
from tests.kvm.machines import until

MEMORY = 32 << 20


@contextmanager
def demo(system: System, image: Path, vcpus: int) -> Iterator[Machine]:
    with Machine(system, loader.load(image, memory=MEMORY), MachineConfig(vcpus=vcpus, memory=MEMORY)) as machine:
        yield machine


class Serial:
    """What the guest prints from here on."""

    def __init__(self, machine: Machine) -> None:
        self.console = machine.board.serial_console
        self.machine = machine
        self.start = self.console.total

    def text(self) -> bytes:
        return self.console.since(self.start)[0]

    def wait_lines(self, count: int, limit: float = 60) -> list[bytes]:
        until(lambda: self.text().count(b"\n") >= count or self.machine.status.phase is Phase.STOPPED, limit)
        assert self.machine.status.phase is not Phase.STOPPED, self.machine.status
        return self.text().split(b"\n")[:count]


def assert_healthy(text: bytes) -> None:
    assert b"FAILED" not in text, text
    assert b"EXCEPTION" not in text, text


@pytest.mark.parametrize("vcpus", [1, 2, 4, 8, 16])
def test_prints_after_a_restore_what_it_printed_after_the_checkpoint(
    system: System, tmp_path: Path, vcpus: int
) -> None:
    with demo(system, brisk_demo(tmp_path), vcpus) as machine:
        boot = Serial(machine)
        machine.run()
        boot.wait_lines(6)
        machine.pause()  # a checkpoint lets it run on, and a byte may be out before anybody counts
        checkpoint = machine.checkpoint()
        first = Serial(machine)
        machine.run()
        printed = first.wait_lines(3)
        assert any(b"round" in line for line in printed)
        machine.step()
        machine.step(vcpus - 1)
        machine.restore(checkpoint)
        again = Serial(machine)
        machine.run()
        assert again.wait_lines(3) == printed
        assert_healthy(boot.text())


@pytest.mark.parametrize("vcpus", [1, 2, 4, 8, 16])
def test_a_reset_starts_it_over(system: System, tmp_path: Path, vcpus: int) -> None:
    with demo(system, brisk_demo(tmp_path), vcpus) as machine:
        boot = Serial(machine)
        machine.run()
        printed = boot.wait_lines(5)
        machine.pause()
        machine.reset()
        again = Serial(machine)
        machine.run()
        assert again.wait_lines(5) == printed


def cycles(machine: Machine, count: int, seed: int) -> None:
    rng = random.Random(seed)
    kept = [machine.checkpoint("start")]
    for _ in range(count):
        match rng.choice(["run", "run", "pause", "step", "step all", "reset", "checkpoint", "restore", "sample"]):
            case "run":
                machine.run()
            case "pause":
                machine.pause()
            case "step":
                machine.step(rng.randrange(len(machine.vcpus)))
            case "step all":
                machine.step()
            case "reset" if rng.random() < 0.2:
                machine.reset()
            case "checkpoint":
                kept.append(machine.checkpoint())
                if len(kept) > 5:
                    machine.forget(kept.pop(rng.randrange(5)))
            case "restore":
                machine.restore(rng.choice(kept))
            case _:
                machine.request_samples()
                [machine.view(index) for index in range(len(machine.vcpus))]
        assert machine.status.phase in (Phase.RUNNING, Phase.PAUSED), machine.status


@pytest.mark.kvm
@pytest.mark.parametrize(("vcpus", "count"), [(1, 250), (2, 250), (4, 250), (8, 250)])
def test_random_cycles_leave_no_stuck_vcpu(vcpus: int, count: int) -> None:
    """A thousand in all. The guest's own barrier shows a stuck VCPU: no round ends without every one of them."""
    from kvm.backends.kernel.system import KernelSystem

    system = KernelSystem()
    with demo(system, guests.demo(), vcpus) as machine:
        everything = Serial(machine)
        cycles(machine, count, seed=vcpus)
        machine.run()
        after = Serial(machine)
        after.wait_lines(8)
        assert_healthy(everything.text())
    system.close()
