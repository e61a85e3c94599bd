"""A real Linux kernel to userspace and back, in software: VMDECK_LINUX=path/to/bzImage pytest -m slow -k linux_boots.

About a minute a boot. A stock kernel needs more of KVM than PVM has, so it's not tried on /dev/kvm here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm.backends.interface import System
from kvm.backends.software.system import SoftwareSystem
from kvm.boot.loader import load
from kvm.machine import Machine, MachineConfig, Phase
from tests.guests.initrd import CompilerMissing, initrd

pytestmark = pytest.mark.slow

MEMORY = 256 << 20
LIMIT = 900.0
"""Seconds that only a hang takes."""


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    opened = SoftwareSystem()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def kernel() -> Path:
    path = os.environ.get("VMDECK_LINUX")
    if not path:
        pytest.skip("needs a Linux kernel: VMDECK_LINUX=path/to/bzImage")
    return Path(path)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("initrd")
    try:
        data = initrd(folder)
    except CompilerMissing as missing:
        pytest.skip(str(missing))
    path = folder / "initrd"
    path.write_bytes(data)
    return path


def machine_of(system: System, kernel: Path, disk: Path, line: str, vcpus: int) -> Machine:
    image = load(kernel, memory=MEMORY, vcpus=vcpus, initrd=disk, command_line=line)
    return Machine(system, image, MachineConfig(vcpus, MEMORY))


def output(machine: Machine) -> str:
    return machine.board.serial_console.since(0)[0].decode(errors="replace")


def await_output(machine: Machine, wanted: str, times: int = 1) -> None:
    end = time.monotonic() + LIMIT
    console = machine.board.serial_console
    while output(machine).count(wanted) < times:
        assert machine.status.phase is Phase.RUNNING, (machine.status, output(machine)[-2000:])
        assert time.monotonic() < end, output(machine)[-2000:]
        console.wait(console.total, 10)


@pytest.mark.parametrize("vcpus", [1, 2])
def test_it_boots_to_userspace_and_switches_off(system: System, kernel: Path, disk: Path, vcpus: int) -> None:
    with machine_of(system, kernel, disk, "console=ttyS0", vcpus) as machine:
        machine.run()
        status = machine.wait(Phase.EXITED, Phase.STOPPED, timeout=LIMIT)
        said = output(machine)
    assert (status.phase, status.code) == (Phase.EXITED, None), said[-2000:]
    assert f"hello from userspace on {vcpus} CPUs: console=ttyS0\r\n" in said
    for trouble in ("unchecked MSR", "BUG:", "Oops", "Call Trace", "ACPI Error", "ACPI BIOS Error", "[Firmware Bug]"):
        assert trouble not in said


def test_a_snapshot_in_mid_boot_goes_on_as_the_original_does(
    system: System, kernel: Path, disk: Path, tmp_path: Path
) -> None:
    """Virtual time and all: every later line is the same, down to its time stamp. Only the CMOS has the host's time."""
    with machine_of(system, kernel, disk, "console=ttyS0 end=port", 2) as machine:
        machine.run()
        await_output(machine, "smp: Brought up 1 node, 2 CPUs")
        machine.pause()
        before = machine.board.serial_console.total
        machine.save_file(tmp_path / "early")
        after = []
        copy, losses = Machine.from_file(system, tmp_path / "early")
        with copy:
            assert losses == ()
            for each in (machine, copy):
                each.board.cmos._clock = lambda: 1e9
                start = before if each is machine else 0
                each.run()
                status = each.wait(Phase.EXITED, Phase.STOPPED, timeout=LIMIT)
                assert (status.phase, status.code) == (Phase.EXITED, 42), output(each)[-2000:]
                after.append(each.board.serial_console.since(start)[0].decode().splitlines())
    assert after[0] == after[1]
    assert after[0][-1].startswith("hello from userspace on 2 CPUs")


def test_it_reboots_through_the_reset_register(system: System, kernel: Path, disk: Path) -> None:
    with machine_of(system, kernel, disk, "console=ttyS0 end=reboot", 1) as machine:
        machine.run()
        await_output(machine, "Linux version", 2)
        assert "hello from userspace" in output(machine)
        assert "reboot: Restarting system" in output(machine)
