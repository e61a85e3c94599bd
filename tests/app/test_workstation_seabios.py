"""The workstation on firmware that nobody here wrote: its VCPU is seen in real and in 32-bit mode as it goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.workstation import Workstation
from kvm.backends.choice import open_system
from kvm.boot import loader
from kvm.machine import Machine, MachineConfig
from tests.app.desk import Desk

IMAGE = Path("/usr/share/seabios/bios.bin")
MEMORY = 64 << 20


@pytest.mark.skipif(not IMAGE.exists(), reason=f"Debian's package seabios is not installed: {IMAGE} is missing")
@pytest.mark.parametrize("backend", ["software", pytest.param("kvm", marks=pytest.mark.kvm)])
async def test_seabios_is_seen_in_real_and_in_32_bit_mode(backend: str) -> None:
    system = open_system(backend)
    with Machine(system, loader.load(IMAGE, memory=MEMORY), MachineConfig(1, MEMORY)) as machine:
        app = Workstation(machine)
        async with app.run_test(size=(120, 40)) as pilot:
            desk = Desk(app, pilot)
            await desk.idle()
            assert "real mode" in desk.pane()
            assert "f000:fff0" in desk.pane()
            await desk.press("space")
            await desk.until(lambda: "protected 32" in desk.pane())
            await desk.until(lambda: b"SeaBIOS (version" in machine.board.debug_console.since(0)[0])
    system.close()
