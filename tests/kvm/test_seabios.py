"""Firmware that nobody here wrote: Debian's SeaBIOS, from the reset vector."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvm.backends.interface import System
from kvm.boot import loader
from kvm.machine import Machine, MachineConfig
from kvm.x86.structs import Sregs
from tests.kvm.machines import until

FOLDER = Path("/usr/share/seabios")
MEMORY = 64 << 20


@pytest.mark.parametrize("name", ["bios.bin", "bios-microvm.bin"])
def test_seabios_comes_to_its_boot_menu(system: System, name: str) -> None:
    if not (FOLDER / name).exists():
        pytest.skip(f"Debian's package seabios is not installed: {FOLDER / name} is missing")
    image = loader.load(FOLDER / name, memory=MEMORY)
    with Machine(system, image, MachineConfig(vcpus=2, memory=MEMORY)) as machine:
        console = machine.board.debug_console
        assert image.format == "firmware"
        seen = set()

        def banner() -> bool:
            machine.request_samples()
            seen.add(Sregs.from_buffer_copy(machine.view(0).sregs).cr0 & 1)
            return b"SeaBIOS (version" in console.since(0)[0]

        seen.add(Sregs.from_buffer_copy(machine.view(0).sregs).cr0 & 1)
        machine.run()
        until(banner)
        until(lambda: banner() and seen == {0, 1})  # real mode at the reset vector, 32-bit mode for its set-up
        until(lambda: machine.request_samples() or b"Press ESC for boot menu." in console.since(0)[0])
        assert b"QEMU fw_cfg DMA interface supported" in console.since(0)[0]
