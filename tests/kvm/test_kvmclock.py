"""A guest with kvmclock hears that it was paused; one without hears nothing, and nothing fails."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm.backends.kernel.system import KernelSystem
from kvm.backends.software.system import SoftwareSystem
from kvm.machine import Machine
from tests.kvm.machines import COUNT, build, until

CLOCK = 0x2000
GUEST_STOPPED = 2
"""PVCLOCK_GUEST_STOPPED."""
WITH_KVMCLOCK = bytes.fromhex("66 b9 01 4d 56 4b  66 b8 01 20 00 00  66 31 d2  0f 30  c6 06 00 30 01  eb fe")
"""mov ecx, MSR_KVM_SYSTEM_TIME_NEW; mov eax, CLOCK | 1; xor edx, edx; wrmsr; mov byte [0x3000], 1; jmp to itself."""


@pytest.fixture
def system() -> Iterator[KernelSystem]:
    kernel = KernelSystem()
    if not kernel.caps["KVM_CAP_KVMCLOCK_CTRL"]:
        pytest.skip("this KVM has no KVMCLOCK_CTRL")
    yield kernel
    kernel.close()


def stopped_flag(machine: Machine) -> bool:
    """Flags of struct pvclock_vcpu_time_info."""
    (flags,) = struct.unpack("29xB", machine.read_memory(CLOCK, 30))
    return bool(flags & GUEST_STOPPED)


@pytest.mark.kvm
def test_a_guest_with_kvmclock_hears_of_the_pause(system: KernelSystem, tmp_path: Path) -> None:
    with build(system, tmp_path, WITH_KVMCLOCK) as machine:
        machine.run()
        until(lambda: machine.read_memory(0x3000, 1) == b"\1")
        assert not stopped_flag(machine)
        machine.pause()
        machine.run()
        until(lambda: stopped_flag(machine))


@pytest.mark.kvm
def test_once_a_resume_on_each_vcpus_own_thread(system: KernelSystem, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, vcpus=2) as machine:
        system.trace = trace = []
        for resumes in (1, 2):
            machine.run()
            until(lambda resumes=resumes: [call.ioctl for call in trace].count("KVM_KVMCLOCK_CTRL") == 2 * resumes)
            machine.request_samples()
            machine.pause()
        told = [call for call in trace if call.ioctl == "KVM_KVMCLOCK_CTRL"]
        assert sorted(call.vcpu or 0 for call in told) == [0, 0, 1, 1]
        threads = {call.vcpu: call.thread for call in told}
        assert len(set(threads.values())) == 2
        assert threading.get_ident() not in threads.values()


def test_a_backend_without_kvmclock(tmp_path: Path) -> None:
    software = SoftwareSystem()
    software.trace = trace = []
    with build(software, tmp_path, COUNT) as machine:
        machine.run()
        machine.pause()
        machine.run()
        machine.pause()
    software.close()
    assert "KVM_KVMCLOCK_CTRL" not in [call.ioctl for call in trace]
