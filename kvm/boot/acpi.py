"""The ACPI tables that describe the board to a kernel started without firmware (ACPI specification 6.4).

Not "hardware-reduced": that would tell Linux that there are no 8259s and no PIT. No PM timer, no PCI, no GPEs. ISA
interrupts have KVM's default routing: line N is pin N of the I/O APIC, the PIT's too, unlike on most PCs, where it is
pin 2. So there is no override for it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kvm.boot import aml
from kvm.devices import fw_cfg
from kvm.devices.power import POWER_OFF
from kvm.x86 import layout

_OEM = b"VMDECK"
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_CHECKSUM_AT = 9
_ALIGN = 64
"""Of every table; FACS must have it."""

_SCI = 9
_FADT_REVISION, _FADT_SIZE, _FACS_SIZE = 3, 244, 64
_PROFILE_UNKNOWN = 0
_NO_LATENCY = 0xFFFF
"""Of C2 and C3: there are none."""
_CENTURY = 0x32
_LEGACY_DEVICES, _NO_VGA, _NO_MSI, _NO_ASPM = 1 << 0, 1 << 2, 1 << 3, 1 << 4
_WBINVD, _PROC_C1, _NO_POWER_BUTTON, _NO_SLEEP_BUTTON, _NO_RTC_WAKE, _RESET_REGISTER = (
    1 << bit for bit in (0, 2, 4, 5, 6, 10)
)
_RESET_VALUE = 0x06
_IO_SPACE, _BYTE, _WORD = 1, 1, 2

_PCAT_COMPATIBLE = 1
_ACTIVE_HIGH_LEVEL = 0xD


@dataclass(frozen=True, slots=True)
class Node:
    """A device in the DSDT: its I/O ports as (first, count), its ISA interrupt lines."""

    name: str
    hardware_id: str
    ports: tuple[tuple[int, int], ...]
    interrupts: tuple[int, ...] = ()

    def aml(self) -> bytes:
        # An id of 3 letters and 4 hexadecimal digits is an EISA id, a number; all others are text.
        hid = aml.eisa_id(self.hardware_id) if len(self.hardware_id) == 7 else aml.text(self.hardware_id)
        resources = (*(aml.io(*ports) for ports in self.ports), *(aml.irq(line) for line in self.interrupts))
        return aml.device(
            self.name, aml.name("_HID", hid), aml.name("_UID", aml.integer(0)), aml.name("_STA", aml.integer(0xF)),
            aml.name("_CRS", aml.resources(*resources)),
        )  # fmt: skip


NODES = (
    Node("COM1", "PNP0501", ((layout.COM1, 8),), (layout.COM1_IRQ,)),
    Node("FWCF", "QEMU0002", ((layout.FW_CFG_PORTS, fw_cfg.PORTS),)),
)


def tables(vcpus: int) -> bytes:
    """All of them, to be put at ``layout.ACPI_TABLES``, where RSDP is."""
    room = bytearray(_ALIGN)

    def put(table: bytes) -> int:
        address = layout.ACPI_TABLES + len(room)
        room.extend(table + bytes(-len(table) % _ALIGN))
        return address

    facs = put(struct.pack("<4sI4xIIQB31x", b"FACS", _FACS_SIZE, 0, 0, 0, 1))
    dsdt = put(_table(b"DSDT", 2, _definitions()))
    fadt = put(_table(b"FACP", _FADT_REVISION, _fadt(facs, dsdt)))
    madt = put(_table(b"APIC", 3, _madt(vcpus)))
    xsdt = put(_table(b"XSDT", 1, struct.pack("<2Q", fadt, madt)))
    rsdp = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM, 2, 0, 36, xsdt, 0))
    rsdp[8] = -sum(rsdp[:20]) & 0xFF
    rsdp[32] = -sum(rsdp) & 0xFF
    room[: len(rsdp)] = rsdp
    return bytes(room)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = _HEADER.pack(
        signature, _HEADER.size + len(body), revision, 0, _OEM, signature.ljust(8), 1, _OEM[:4], 1
    )  # fmt: skip
    table = bytearray(header + body)
    table[_CHECKSUM_AT] = -sum(table) & 0xFF
    return bytes(table)


def _definitions() -> bytes:
    sleep = [aml.integer(POWER_OFF), aml.integer(0), aml.integer(0), aml.integer(0)]
    return aml.scope("\\_SB_", *(node.aml() for node in NODES)) + aml.name("_S5_", aml.package(*sleep))


def _register(port: int, size: int, access: int) -> bytes:
    """A generic address structure; ``size`` in bytes."""
    return struct.pack("<4BQ", _IO_SPACE, size * 8, 0, access, port)


def _fadt(facs: int, dsdt: int) -> bytes:
    """Fixed ACPI description table, from its offset 36 on. Registers that there aren't have address and length 0."""
    event, control = layout.POWER_PORTS, layout.POWER_PORTS + 4
    no_register = bytes(12)
    body = b"".join((
        struct.pack("<2I", facs, dsdt),
        struct.pack("<BBH", 0, _PROFILE_UNKNOWN, _SCI),
        struct.pack("<I4B", 0, 0, 0, 0, 0),  # no SMI command port: ACPI mode is always on
        struct.pack("<8I", event, 0, control, 0, 0, 0, 0, 0),  # PM1 event and control a and b, PM2, timer, GPE 0 and 1
        struct.pack("<8B", 4, 2, 0, 0, 0, 0, 0, 0),  # their lengths
        struct.pack("<4H", _NO_LATENCY, _NO_LATENCY, 0, 0),
        struct.pack("<5B", 0, 0, 0, 0, _CENTURY),
        struct.pack("<HB", _LEGACY_DEVICES | _NO_VGA | _NO_MSI | _NO_ASPM, 0),
        struct.pack("<I", _WBINVD | _PROC_C1 | _NO_POWER_BUTTON | _NO_SLEEP_BUTTON | _NO_RTC_WAKE | _RESET_REGISTER),
        _register(layout.RESET_PORT, 1, _BYTE),
        struct.pack("<BHB", _RESET_VALUE, 0, 0),
        struct.pack("<2Q", 0, dsdt),
        _register(event, 4, _WORD), no_register, _register(control, 2, _WORD), *[no_register] * 5,
    ))  # fmt: skip
    assert _HEADER.size + len(body) == _FADT_SIZE
    return body


def _madt(vcpus: int) -> bytes:
    """Multiple APIC description table, from its offset 36 on. A VCPU's APIC id is its index."""
    return b"".join((
        struct.pack("<2I", layout.LAPIC, _PCAT_COMPATIBLE),
        *(struct.pack("<4BI", 0, 8, index, index, 1) for index in range(vcpus)),
        struct.pack("<4B2I", 1, 12, 0, 0, layout.IOAPIC, 0),  # its pins are interrupts 0 and up
        struct.pack("<4BIH", 2, 10, 0, _SCI, _SCI, _ACTIVE_HIGH_LEVEL),
        struct.pack("<3BHB", 4, 6, 0xFF, 0, 1),  # every APIC's LINT1 is NMI
    ))  # fmt: skip
