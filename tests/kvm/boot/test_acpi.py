"""The ACPI tables: read back as a kernel does, and by Debian's own disassembler."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from kvm.boot import acpi, aml
from kvm.boot.acpi import NODES, Node, tables
from kvm.devices.board import Board
from kvm.x86 import layout

BASE = layout.ACPI_TABLES


def read(memory: bytes) -> dict[str, bytes]:
    """Signature → table, by following RSDP → XSDT → FADT → DSDT and FACS; every checksum is right."""

    def at(address: int, size: int) -> bytes:
        assert BASE <= address <= BASE + len(memory) - size
        return memory[address - BASE : address - BASE + size]

    def table(address: int) -> bytes:
        size = struct.unpack_from("<I", at(address, 8), 4)[0]
        found = at(address, size)
        assert address % 64 == 0
        assert found[:4] == b"FACS" or sum(found) & 0xFF == 0, found[:4]
        return found

    rsdp = at(BASE, 36)
    assert rsdp[:8] == b"RSD PTR "
    assert (sum(rsdp[:20]) & 0xFF, sum(rsdp) & 0xFF) == (0, 0)
    assert (rsdp[15], struct.unpack_from("<II", rsdp, 16)) == (2, (0, 36))
    xsdt = table(struct.unpack_from("<Q", rsdp, 24)[0])
    found = {"XSDT": xsdt}
    for (address,) in struct.iter_unpack("<Q", xsdt[36:]):
        each = table(address)
        found[each[:4].decode()] = each
    facs, dsdt = struct.unpack_from("<II", found["FACP"], 36)
    assert struct.unpack_from("<Q", found["FACP"], 140) == (dsdt,)
    found |= {"FACS": table(facs), "DSDT": table(dsdt)}
    assert all(found[name][:4].decode() == name for name in found)
    return found


def test_every_vcpu_and_the_io_apic_are_there() -> None:
    for vcpus in (1, 2, 255):
        madt = read(tables(vcpus))["APIC"]
        assert struct.unpack_from("<II", madt, 36) == (layout.LAPIC, 1)
        entries, at = [], 44
        while at < len(madt):
            entries.append(madt[at : at + madt[at + 1]])
            at += madt[at + 1]
        assert [(e[2], e[3], u32(e, 4)) for e in entries if e[0] == 0] == [(n, n, 1) for n in range(vcpus)]
        assert [(u32(e, 4), u32(e, 8)) for e in entries if e[0] == 1] == [(layout.IOAPIC, 0)]
        assert [(e[3], u32(e, 4)) for e in entries if e[0] == 2] == [(9, 9)], "IRQ 0 is pin 0 with KVM's routing"
        assert len(entries) == vcpus + 3


def u32(raw: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", raw, at)[0])


def test_most_vcpus_that_there_can_be_fit_below_1_mib() -> None:
    assert BASE + len(tables(255)) <= layout.BIOS_END


def test_the_fixed_hardware_is_the_boards(platform_board: Board) -> None:
    fadt = read(tables(1))["FACP"]
    assert len(fadt) == 244
    assert u32(fadt, 112) & (1 << 20) == 0, "not hardware-reduced: Linux would leave 8259s and PIT alone"
    assert u32(fadt, 76) == 0, "no PM timer"
    bus = platform_board.bus
    event, control = u32(fadt, 56), u32(fadt, 64)
    bus.port_out(event + 2, 2, 0x0020)
    assert (bus.port_in(event, 2), bus.port_in(event + 2, 2)) == (0, 0x0020)
    assert bus.port_in(control, 2) & 1, "ACPI mode is on, as there's no SMI command to turn it on"
    space, width, _, access, port = struct.unpack_from("<4BQ", fadt, 116)
    assert (space, width, access) == (1, 8, 1)
    assert u32(fadt, 112) & 1 << 10
    bus.port_out(port, 1, fadt[128])
    assert platform_board.recorder.resets == ["port 0xcf9"]  # type: ignore[attr-defined]


def test_the_s5_of_the_dsdt_switches_the_board_off(platform_board: Board) -> None:
    found = read(tables(1))
    at = found["DSDT"].index(b"\x08_S5_\x12")
    assert found["DSDT"][at + 7 : at + 9] == b"\x04\x0a"
    sleep_type = found["DSDT"][at + 9]
    platform_board.bus.port_out(u32(found["FACP"], 64), 2, sleep_type << 10 | 1 << 13)
    assert platform_board.recorder.power_offs == 1  # type: ignore[attr-defined]


@pytest.fixture
def platform_board() -> Board:
    from tests.kvm.devices.conftest import Recorder

    recorder = Recorder()
    board = Board(recorder)
    board.recorder = recorder  # type: ignore[attr-defined]
    return board


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (aml.integer(0), "00"), (aml.integer(1), "01"), (aml.integer(2), "0a 02"), (aml.integer(0x1234), "0b 34 12"),
        (aml.integer(0x12345), "0c 45 23 01 00"), (aml.eisa_id("PNP0501"), "0c 41 d0 05 01"),
        (aml.text("QEMU0002"), "0d 51 45 4d 55 30 30 30 32 00"), (aml.io(0x3F8, 8), "47 01 f8 03 f8 03 01 08"),
        (aml.irq(4), "22 10 00"), (aml.package(aml.integer(5)), "12 04 01 0a 05"),
    ],
)  # fmt: skip
def test_terms(value: bytes, code: str) -> None:
    assert value == bytes.fromhex(code)


@pytest.mark.parametrize("size", [0x3E, 0x3F, 0xFFD, 0xFFE, 0x1000, 0xFFFFC, 0xFFFFD])
def test_a_package_length_counts_itself(size: int) -> None:
    code = aml.scope("", bytes(size))[1:]
    more = code[0] >> 6
    length = code[0] & 0x3F if not more else code[0] & 0xF | int.from_bytes(code[1 : 1 + more], "little") << 4
    assert length == len(code) == size + 1 + more


def test_acpicas_disassembler_takes_them(tmp_path: Path) -> None:
    if shutil.which("iasl") is None:
        pytest.skip("needs Debian's package acpica-tools (iasl)")
    for name, table in read(tables(4)).items():
        (tmp_path / f"{name}.dat").write_bytes(table)
        done = subprocess.run(
            ["iasl", "-d", f"{name}.dat"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
        )
        output = done.stdout + done.stderr
        assert (tmp_path / f"{name}.dsl").stat().st_size > 0, output
        for bad in ("rror", "arning", "nvalid", "ncorrect"):
            assert bad not in output, output
    text = (tmp_path / "DSDT.dsl").read_text()
    for words in ('EisaId ("PNP0501")', '"QEMU0002"', "0x03F8,             // Range Minimum", "{4}", "Package (0x04)"):
        assert words in text
    assert "Unknown" not in (tmp_path / "FACP.dsl").read_text()


def test_the_table_of_devices_is_what_the_board_has(platform_board: Board) -> None:
    ports = {port for node in NODES for first, count in node.ports for port in range(first, first + count)}
    unclaimed = [port for port in sorted(ports) if port not in platform_board.bus._ports]
    assert unclaimed == []


def test_a_node_without_interrupts_has_no_interrupt() -> None:
    assert aml.irq(4) not in Node("DEV0", "PNP0B00", ((0x70, 2),)).aml()
    assert acpi.NODES[0].aml().count(aml.irq(4)) == 1
