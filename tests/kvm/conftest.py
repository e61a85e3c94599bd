from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvm.backends.interface import System


@pytest.fixture(params=["software", pytest.param("kvm", marks=pytest.mark.kvm)])
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    """Each backend in turn."""
    opened: System
    if request.param == "kvm":
        from kvm.backends.kernel.system import KernelSystem

        opened = KernelSystem()
    else:
        from kvm.backends.software.system import SoftwareSystem

        opened = SoftwareSystem()
    yield opened
    opened.close()
