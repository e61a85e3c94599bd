from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from app.workstation import Workstation
from kvm.backends.interface import System
from kvm.boot import loader
from kvm.machine import Machine, MachineConfig
from tests.app.desk import Desk


@pytest.fixture
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    from kvm.backends.choice import open_system

    opened = open_system(getattr(request, "param", "software"))
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def no_wait_for_an_idle_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pilot takes a busy process for a busy app and waits a second a key; here the guest is what's busy."""

    async def briefly(*_: float) -> None:
        await asyncio.sleep(0.002)

    monkeypatch.setattr("textual.app.wait_for_idle", briefly)
    monkeypatch.setattr("textual.pilot.wait_for_idle", briefly)


@pytest.fixture
def desk(system: System, tmp_path: Path) -> Callable[..., object]:
    @asynccontextmanager
    async def open_desk(
        code: bytes, *, vcpus: int = 2, size: tuple[int, int] = (120, 40), format: str = "flat16"
    ) -> AsyncIterator[Desk]:
        path = tmp_path / "guest.bin"
        path.write_bytes(code)
        memory = 4 << 20
        image = loader.load(path, memory=memory, format=format, address=0x7C00)
        with Machine(system, image, MachineConfig(vcpus, memory)) as machine:
            app = Workstation(machine)
            async with app.run_test(size=size) as pilot:
                opened = Desk(app, pilot)
                await opened.idle()
                yield opened

    return open_desk
