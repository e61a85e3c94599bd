"""Opening and closing /dev/kvm: what is said when it can't be, and that nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvm.backends.kernel.capabilities import CAPABILITIES, REQUIRED
from kvm.backends.kernel.library import missing
from kvm.backends.kernel.system import KernelSystem
from kvm.errors import BackendUnavailable, KvmError
from kvm.x86.structs import unpack_msrs
from tests.kvm.backends.real import STOP, Guest
from tests.kvm.machines import COUNT, build

needs_extension = pytest.mark.skipif(missing != "", reason=f"the extension is not built: {missing}")


@needs_extension
def test_no_device(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"is not there: .*modprobe"):
        KernelSystem(str(tmp_path / "kvm"))


@needs_extension
def test_another_file_than_the_device(tmp_path: Path) -> None:
    other = tmp_path / "kvm"
    other.write_bytes(b"")
    for path in (str(other), "/dev/null"):
        with pytest.raises(BackendUnavailable, match="not KVM's device"):
            KernelSystem(path)


@needs_extension
def test_no_permission(tmp_path: Path) -> None:
    closed = tmp_path / "kvm"
    closed.touch(mode=0)
    script = (
        "import grp, os, sys\n"
        "from kvm.errors import BackendUnavailable\n"
        "from kvm.backends.kernel.system import KernelSystem\n"
        "os.geteuid() or os.seteuid(65534)\n"  # root may open anything
        "try: KernelSystem(sys.argv[1])\n"
        "except BackendUnavailable as error: print(error)\n"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o111)
    said = subprocess.run([sys.executable, "-c", script, str(closed)], capture_output=True, text=True, check=True)
    assert "may not be opened by this user" in said.stdout
    assert "usermod -aG" in said.stdout


def test_no_extension() -> None:
    script = (
        "import sys\n"
        "sys.modules['kvm.backends.kernel._kvm'] = None\n"  # importing it fails, as where it wasn't built
        "from kvm.errors import BackendUnavailable\n"
        "from kvm.backends.kernel.system import KernelSystem\n"
        "try: KernelSystem()\n"
        "except BackendUnavailable as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "extension is not built" in said.stdout
    assert "apt install" in said.stdout


@pytest.mark.kvm
def test_capabilities_are_known_by_name() -> None:
    system = KernelSystem()
    assert set(system.caps) == set(CAPABILITIES)
    assert all(system.caps[name] > 0 for name in REQUIRED)
    assert system.caps["KVM_CAP_MAX_VCPUS"] >= system.caps["KVM_CAP_NR_VCPUS"] >= 1
    system.close()


@pytest.mark.kvm
def test_what_guests_are_offered() -> None:
    system = KernelSystem()
    leaves = {(entry.function, entry.index): entry for entry in system.cpuid()}
    assert leaves[0, 0].eax >= 1
    assert leaves[1, 0].edx & 1 << 25  # SSE
    if Path("/sys/module/kvm_pvm").exists():
        assert not leaves[1, 0].ecx & 1 << 13
        assert not leaves[0x40000001, 0].eax & (1 << 7 | 1 << 11 | 1 << 13)
    assert 0xC0000082 in system.msr_list()  # LSTAR
    system.close()


@pytest.mark.kvm
def test_listed_msrs_that_a_vcpu_refuses_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KVM before Linux 6.13 lists such. One here can't be read, one can be read and not be written."""
    unknown, mcg_cap, tsc, lstar, star = 0x12345678, 0x179, 0x10, 0xC0000082, 0xC0000081
    listed = KernelSystem._listed_msrs
    monkeypatch.setattr(KernelSystem, "_listed_msrs", lambda self: (unknown, mcg_cap, *listed(self), unknown + 1))
    before = _open_files()
    system = KernelSystem()
    assert {tsc, lstar, star} <= {*system.msr_list()}
    assert {*system.refused_msrs()} >= {unknown, unknown + 1, mcg_cap}
    assert not {*system.refused_msrs()} & {*system.msr_list()}
    with build(system, tmp_path, COUNT) as machine:
        machine.load(machine.save())
        carried = {index for row in ("msrs", "msrs_reset") for index in unpack_msrs(machine.vcpus[0].copy[row])}
        assert not carried & {*system.refused_msrs()}
    system.close()
    assert _open_files() == before


@pytest.mark.kvm
def test_all_that_this_kernel_lists_can_be_carried() -> None:
    """On PVM; on other kernels some are refused, for a feature that is off."""
    system = KernelSystem()
    if Path("/sys/module/kvm_pvm").exists():
        assert system.refused_msrs() == ()
        assert system.msr_list() == system._listed_msrs()
    system.close()


def _open_files() -> list[str]:
    """What this process has open and mapped of KVM, anonymous inodes by their name."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue  # the listing's own
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "kvm-vcpu" in line]
    return sorted(link for link in links if "kvm" in link) + mapped


@pytest.mark.kvm
def test_nothing_stays_open() -> None:
    before = _open_files()
    system = KernelSystem()
    guest = Guest(system, STOP, vcpus=3)
    guest.run()
    assert len(_open_files()) > len(before) + 6
    guest.close()
    guest.close()  # again: nothing is closed twice
    system.close()
    assert _open_files() == before


@pytest.mark.kvm
def test_nothing_stays_open_when_building_fails() -> None:
    before = _open_files()
    system = KernelSystem()
    vm = system.create_vm()
    vm.create_irqchip()
    vcpu = vm.create_vcpu(0)
    standing = _open_files()
    with pytest.raises(KvmError, match="KVM_CREATE_VCPU"):
        vm.create_vcpu(0)
    system.mmap_size = 1 << 60  # more than there is address space
    with pytest.raises(KvmError, match="kvm_run"):
        vm.create_vcpu(1)
    assert _open_files() == standing
    system.caps["KVM_CAP_DISABLE_QUIRKS2"] = -1
    system.caps["KVM_CAP_SET_IDENTITY_MAP_ADDR"] = 0
    vcpu.close()
    vm.close()
    with pytest.raises(KvmError, match="KVM_CREATE_IRQCHIP"):
        vm.create_irqchip()  # a closed VM
    vcpu.kick()  # nothing happens: the last to hear of a VCPU's end may be a UI that polls
    vcpu.request_sample()
    assert vcpu.sample() is None
    assert vcpu.waiting() is None
    system.close()
    assert _open_files() == before
