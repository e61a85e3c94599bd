"""The mainboard: every device, the ports that each answers at, and the bus between them."""

from __future__ import annotations

from collections.abc import Mapping

from kvm.devices.bus import IoBus
from kvm.devices.cmos import Cmos
from kvm.devices.console import Console
from kvm.devices.device import Device
from kvm.devices.fw_cfg import PORTS, FwCfg
from kvm.devices.platform import Platform
from kvm.devices.ports import DebugConsole, DebugExit, Post
from kvm.devices.power import SIZE as POWER_SIZE
from kvm.devices.power import PowerControl
from kvm.devices.resets import KeyboardController, Port92, ResetControl
from kvm.devices.uart import Uart
from kvm.errors import VmdeckError
from kvm.x86 import layout


class Board:
    """All devices of a machine with ``memory`` bytes and so many VCPUs, as after power-on."""

    def __init__(self, platform: Platform, *, memory: int = layout.MIN_MEMORY, vcpus: int = 1) -> None:
        self.bus = IoBus()
        self.serial_console = Console()
        self.debug_console = Console()
        self.serial = Uart(lambda level: platform.irq_line(layout.COM1_IRQ, level), self.serial_console, self.bus.lock)
        self.cmos = Cmos(memory, vcpus)
        self.post = Post()
        # Device, its ports, the widest access it takes whole, and whether it's only ever written to: then KVM may
        # gather the writes. (Not the UART: a guest may sleep until the interrupt that its write will cause.)
        table: tuple[tuple[Device, range, int, bool], ...] = (
            (KeyboardController(platform), range(0x60, 0x65, 4), 1, False),
            (self.cmos, range(0x70, 0x72), 1, False),
            (self.post, range(0x80, 0x81), 1, True),
            (Port92(platform), range(0x92, 0x93), 1, False),
            (DebugConsole("debugcon_e9", self.debug_console), range(0xE9, 0xEA), 1, True),
            (DebugExit(platform), range(0xF4, 0xF8), 4, False),
            (self.serial, range(layout.COM1, layout.COM1 + 8), 1, False),
            (DebugConsole("debugcon_402", self.debug_console), range(0x402, 0x403), 1, True),
            (FwCfg(platform, memory, vcpus), range(layout.FW_CFG_PORTS, layout.FW_CFG_PORTS + PORTS), 4, False),
            (PowerControl(platform), range(layout.POWER_PORTS, layout.POWER_PORTS + POWER_SIZE), 2, False),
            (ResetControl(platform), range(layout.RESET_PORT - 1, layout.RESET_PORT + 3), 4, False),
        )
        for device, ports, width, _ in table:
            self.bus.claim_ports(ports, device, width=width)
        self.coalesced_ports = tuple((ports.start, len(ports)) for _, ports, _, written in table if written)
        self.devices: dict[str, Device] = {device.name: device for device, *_ in table}

    def reset(self) -> None:
        """A system reset of every device."""
        with self.bus.lock:
            for device in self.devices.values():
                device.reset()

    def save(self) -> dict[str, bytes]:
        """Every device's state by its name."""
        with self.bus.lock:
            return {name: device.save() for name, device in self.devices.items()}

    def check(self, state: Mapping[str, bytes]) -> None:
        """Raise VmdeckError if this isn't what ``save`` gives, or is damaged."""
        if state.keys() != self.devices.keys():
            raise VmdeckError(
                f"The saved state has the devices {', '.join(sorted(state))}; this machine has "
                f"{', '.join(sorted(self.devices))}. Use a snapshot of this version of vmdeck."
            )
        for name, device in self.devices.items():
            device.check(state[name])

    def load(self, state: Mapping[str, bytes]) -> None:
        """Take what ``check`` let pass."""
        with self.bus.lock:
            for name, device in self.devices.items():
                device.load(state[name])
