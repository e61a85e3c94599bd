"""The port and MMIO bus: who answers at which address, under one lock."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable

from kvm.devices.device import Device, MmioDevice

_PORTS = 0x10000

_In = Callable[[int, int], int]
_Out = Callable[[int, int, int], None]


class IoBus:
    """Implements ``kvm.backends.interface.Bus``.

    One lock orders every access of every VCPU and whoever feeds a device from outside. It's held for the length of
    one access, never while waiting for a VCPU.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._ports: dict[int, tuple[int, int, _In, _Out]] = {}
        """Port → widest access taken whole, offset in the device, its two methods."""
        self._mmio_starts: list[int] = []
        self._mmio: list[tuple[int, int, MmioDevice]] = []

    def claim_ports(self, ports: range, device: Device, *, width: int = 1) -> None:
        """Give ports to a device, which counts them from the first.

        Accesses wider than ``width`` bytes, or past the last port, are split into bytes.
        """
        for port in ports:
            if not 0 <= port < _PORTS or port in self._ports:
                raise ValueError(f"{device.name} can't have port {port:#x}: taken, or no port at all")
            offset = port - ports.start
            self._ports[port] = (min(width, ports.stop - port), offset, device.port_in, device.port_out)

    def claim_mmio(self, address: int, size: int, device: MmioDevice) -> None:
        """Give a range of physical addresses to a device."""
        place = bisect_right(self._mmio_starts, address)
        before, after = self._mmio[:place], self._mmio[place:]
        if (before and before[-1][1] > address) or (after and after[0][0] < address + size):
            raise ValueError(f"{address:#x}+{size:#x} is already claimed")
        self._mmio_starts.insert(place, address)
        self._mmio.insert(place, (address, address + size, device))

    def port_in(self, port: int, size: int) -> int:
        """Read 1, 2 or 4 bytes; ports that nobody claims read as ones."""
        with self.lock:
            claim = self._ports.get(port)
            if claim is not None and size <= claim[0]:
                return claim[2](claim[1], size)
            value = 0
            for at in range(size):  # as the ISA bus does: byte after byte, ascending
                claim = self._ports.get(port + at)
                value |= (0xFF if claim is None else claim[2](claim[1], 1)) << 8 * at
            return value

    def port_out(self, port: int, size: int, value: int) -> None:
        """Write 1, 2 or 4 bytes; nothing happens at ports that nobody claims."""
        with self.lock:
            claim = self._ports.get(port)
            if claim is not None and size <= claim[0]:
                claim[3](claim[1], size, value)
                return
            for at in range(size):
                claim = self._ports.get(port + at)
                if claim is not None:
                    claim[3](claim[1], 1, value >> 8 * at & 0xFF)

    def mmio_read(self, address: int, size: int) -> int:
        """Read 1 to 8 bytes; addresses that nobody claims read as ones."""
        with self.lock:
            found = self._mmio_at(address, size)
            return (1 << 8 * size) - 1 if found is None else found[1].mmio_read(address - found[0], size)

    def mmio_write(self, address: int, size: int, value: int) -> None:
        """Write 1 to 8 bytes; nothing happens at addresses that nobody claims."""
        with self.lock:
            found = self._mmio_at(address, size)
            if found is not None:
                found[1].mmio_write(address - found[0], size, value)

    def _mmio_at(self, address: int, size: int) -> tuple[int, MmioDevice] | None:
        place = bisect_right(self._mmio_starts, address) - 1
        if place < 0:
            return None
        start, end, device = self._mmio[place]
        return (start, device) if address + size <= end else None
