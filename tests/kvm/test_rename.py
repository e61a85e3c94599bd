"""A checkpoint's name, note and place in the tree, and what a VCPU says of itself after going back."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvm.backends.interface import System
from kvm.errors import MachineError
from kvm.machine import Machine, Phase
from tests.kvm.machines import COUNT, TRIPLE_FAULT, build


def test_a_renamed_checkpoint_is_still_the_one_that_was_taken(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT) as machine:
        taken = machine.checkpoint()
        other = machine.checkpoint("other")
        renamed = machine.rename(taken, "boot", "before paging")
        assert [(kept.name, kept.note) for kept in machine.checkpoints] == [("boot", "before paging"), ("other", "")]
        for handle in (taken, renamed):
            machine.restore(handle)
            assert machine.came_from == 1
        machine.rename(taken, "again")
        machine.forget(renamed)
        assert machine.checkpoints == (other,)
        with pytest.raises(MachineError, match="no checkpoint 1"):
            machine.rename(taken, "gone")


def test_where_the_machine_came_from(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT) as machine:
        assert machine.came_from is None
        first = machine.checkpoint()
        machine.checkpoint()
        machine.restore(first)
        assert machine.checkpoint().parent == 1
        assert machine.came_from == 3
        machine.reset()
        assert machine.came_from is None


@pytest.mark.parametrize("mend", [Machine.reset, lambda machine: machine.restore(machine.checkpoints[0])])
def test_why_a_vcpu_stopped_is_over_with_the_state_it_stopped_in(system: System, tmp_path: Path, mend) -> None:  # type: ignore[no-untyped-def]
    with build(system, tmp_path, TRIPLE_FAULT, format="flat32") as machine:
        machine.checkpoint()
        machine.run()
        machine.wait(Phase.STOPPED, timeout=20)
        assert machine.view(0).reason == "shutdown"
        mend(machine)
        assert machine.view(0).reason == ""
