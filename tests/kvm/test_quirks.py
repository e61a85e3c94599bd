"""What a KVM ignores in silence is found: each probe on a VCPU that drops just that substate's writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from errno import EINVAL

import pytest

from kvm.backends.kernel.system import KernelSystem
from kvm.backends.software.system import SoftwareSystem
from kvm.backends.software.vcpu import SoftwareVcpu
from kvm.quirks import PROBES, ignored
from kvm.x86.substates import Substate


@pytest.fixture
def software() -> Iterator[SoftwareSystem]:
    system = SoftwareSystem()
    yield system
    system.close()


def test_the_software_backend_ignores_nothing(software: SoftwareSystem) -> None:
    assert ignored(software) == ()


@pytest.mark.parametrize("deaf", sorted({probe.substate for probe in PROBES}))
def test_a_substate_whose_writes_are_dropped(
    software: SoftwareSystem, deaf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = SoftwareVcpu.put

    def drops(vcpu: SoftwareVcpu, rows: Sequence[Substate], raws: Sequence[bytes]) -> None:
        for row, raw in zip(rows, raws, strict=True):
            if row.name != deaf:
                put(vcpu, [row], [raw])

    monkeypatch.setattr(SoftwareVcpu, "put", drops)
    expected = [(probe.what, probe.lost) for probe in PROBES if probe.substate == deaf]
    assert [(quirk.what, quirk.lost) for quirk in ignored(software)] == expected


def test_a_refusal_is_no_quirk(software: SoftwareSystem) -> None:
    """It's an error, told where it happens."""
    software.fault = lambda ioctl, substate, vcpu: EINVAL if ioctl.startswith("KVM_SET_M") else 0
    assert ignored(software) == ()


@pytest.mark.kvm
def test_at_most_the_tsc_is_ignored_here() -> None:
    """PVM ignores it; no KVM is known to ignore anything else."""
    system = KernelSystem()
    found = ignored(system)
    assert {quirk.what for quirk in found} <= {"MSR TSC", "TSC offset"}
    assert ignored(system) == found
    system.close()
