"""The dump's text against what QEMU 7.2 with KVM printed of the same guest, character for character; needs neither."""

from __future__ import annotations

import pytest

from tests.parity.record import file
from tests.parity.test_registers import STAYS, Stay, vmdeck


@pytest.mark.parametrize("stay", STAYS, ids=str)
def test_software_backend(stay: Stay) -> None:
    assert vmdeck("software", stay)[1] == file(stay).read_text()


@pytest.mark.kvm
@pytest.mark.parametrize("stay", STAYS, ids=str)
def test_kernel_backend(stay: Stay) -> None:
    assert vmdeck("kvm", stay)[1] == file(stay).read_text()
