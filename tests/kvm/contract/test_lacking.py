"""A kernel that lacks a capability: what goes with it is left out, or refused by its name, and nothing else breaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvm.backends.kernel.capabilities import CAPABILITIES, REQUIRED
from kvm.errors import MachineError
from kvm.machine import Machine, Phase
from tests.kvm.contract.lab import regs_of, synchronize
from tests.kvm.machines import COUNT, build, until

pytestmark = pytest.mark.kvm

LACKING: dict[str, tuple[str, ...]] = {
    **{
        name: (f"KVM_CAP_{name}",)
        for name in (
            "SREGS2", "XSAVE2", "XCRS", "DEBUGREGS", "VCPU_EVENTS", "VCPU_ATTRIBUTES", "ADJUST_CLOCK",
            "SET_GUEST_DEBUG", "SYNC_REGS", "BINARY_STATS_FD", "COALESCED_MMIO", "MAX_VCPUS",
        )
    },
    "XSAVE": ("KVM_CAP_XSAVE", "KVM_CAP_XSAVE2"),
    "all but those without which there is no machine": tuple(name for name in CAPABILITIES if name not in REQUIRED),
}  # fmt: skip


@pytest.mark.parametrize("lacking", LACKING)
def test_a_machine_without(lacking: str, tmp_path: Path) -> None:
    from kvm.backends.kernel.system import KernelSystem

    system = KernelSystem()
    system.caps.update(dict.fromkeys(LACKING[lacking], 0))
    with build(system, tmp_path, COUNT, vcpus=2) as machine:
        gone = {row.name for row in machine.table.put_order if row.cap in LACKING[lacking]}
        assert not gone
        counts(machine)
        state = machine.save()
        counts(machine)
        machine.load(state)
        assert regs_of(machine).rax == int.from_bytes(state.vcpus[0]["regs"][:8], "little")
        machine.reset()
        machine.restore(machine.checkpoint())
        machine.edit(1, "rbx", 0x77)
        counts(machine)
        assert "RBX=0000000000000077" in machine.dump_registers() or "EBX=00000077" in machine.dump_registers()
        if "KVM_CAP_SET_GUEST_DEBUG" in LACKING[lacking]:
            with pytest.raises(MachineError, match="KVM_CAP_SET_GUEST_DEBUG"):
                machine.step(0)
        else:
            rip = regs_of(machine).rip
            machine.step(0)
            synchronize(machine)
            assert regs_of(machine).rip != rip
    system.close()


def counts(machine: Machine) -> None:
    """VCPU 0 goes on; leaves the machine paused. Without a look at samples, which may be lacking."""
    before = regs_of(machine).rax

    def went_on() -> bool:
        machine.run()
        machine.wait(Phase.STOPPED, timeout=0.001)  # a pause that comes at once may find it not under way yet
        machine.pause()
        synchronize(machine)
        return regs_of(machine).rax != before

    until(went_on)
