"""The bus: who answers, what nobody answers, and how wide accesses are split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.devices.bus import IoBus


class Bytes:
    """Byte-wide registers that hold what was written; notes the accesses as they come."""

    name = "bytes"

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []
        self.held: dict[int, int] = {}

    def port_in(self, offset: int, size: int) -> int:
        return self.held.get(offset, 0x10 + offset)

    def port_out(self, offset: int, size: int, value: int) -> None:
        self.seen.append((offset, size, value))
        self.held[offset] = value

    mmio_read = port_in
    mmio_write = port_out

    def reset(self) -> None: ...

    def save(self) -> bytes:
        return b""

    def check(self, raw: bytes) -> None: ...

    def load(self, raw: bytes) -> None: ...


@given(st.integers(0, 0xFFFF), st.sampled_from((1, 2, 4)))
def test_a_port_that_nobody_claims_reads_as_ones(port: int, size: int) -> None:
    bus = IoBus()
    bus.port_out(port, size, 0)
    assert bus.port_in(port, size) == (1 << 8 * size) - 1


@given(st.integers(0, 1 << 52), st.sampled_from((1, 2, 4, 8)))
def test_an_address_that_nobody_claims_reads_as_ones(address: int, size: int) -> None:
    bus = IoBus()
    bus.mmio_write(address, size, 0)
    assert bus.mmio_read(address, size) == (1 << 8 * size) - 1


def test_wide_accesses_to_a_byte_wide_device_are_consecutive_bytes() -> None:
    bus, device = IoBus(), Bytes()
    bus.claim_ports(range(0x100, 0x104), device)
    bus.port_out(0x100, 4, 0x44332211)
    assert device.seen == [(0, 1, 0x11), (1, 1, 0x22), (2, 1, 0x33), (3, 1, 0x44)]
    assert bus.port_in(0x101, 2) == 0x3322


def test_a_wide_access_that_leaves_a_device_reads_ones_beyond_it() -> None:
    bus = IoBus()
    bus.claim_ports(range(0x100, 0x102), Bytes())
    assert bus.port_in(0x0FF, 4) == 0xFF1110FF
    assert bus.port_in(0x101, 4) == 0xFFFFFF11


def test_a_wide_device_takes_whole_what_fits_into_it() -> None:
    bus, device = IoBus(), Bytes()
    bus.claim_ports(range(0xF4, 0xF8), device, width=4)
    bus.port_out(0xF4, 4, 0x12345678)
    bus.port_out(0xF6, 4, 0x12345678)
    assert device.seen == [(0, 4, 0x12345678), (2, 1, 0x78), (3, 1, 0x56)]


def test_the_last_port_has_no_neighbour() -> None:
    bus = IoBus()
    bus.claim_ports(range(0xFFFF, 0x10000), Bytes())
    assert bus.port_in(0xFFFF, 4) == 0xFFFFFF10


def test_a_device_may_claim_ports_with_gaps() -> None:
    bus = IoBus()
    bus.claim_ports(range(0x60, 0x65, 4), Bytes())
    assert [bus.port_in(port, 1) for port in range(0x60, 0x65)] == [0x10, 0xFF, 0xFF, 0xFF, 0x14]


@pytest.mark.parametrize("ports", [range(0x100, 0x101), range(0xFE, 0x102), range(0xFFFF, 0x10001), range(-1, 1)])
def test_a_port_can_be_claimed_once_and_must_exist(ports: range) -> None:
    bus = IoBus()
    bus.claim_ports(range(0x100, 0x101), Bytes())
    with pytest.raises(ValueError, match="can't have port"):
        bus.claim_ports(ports, Bytes())


def test_mmio_reaches_the_device_that_holds_the_whole_access() -> None:
    bus, low, high = IoBus(), Bytes(), Bytes()
    bus.claim_mmio(0xD0001000, 0x1000, high)
    bus.claim_mmio(0xD0000000, 0x1000, low)
    bus.mmio_write(0xD0000FFC, 4, 1)
    bus.mmio_write(0xD0001000, 8, 2)
    bus.mmio_write(0xD0001FFE, 4, 3)  # half of it is beyond
    assert (low.seen, high.seen) == ([(0xFFC, 4, 1)], [(0, 8, 2)])
    assert bus.mmio_read(0xD0001FFE, 4) == 0xFFFFFFFF
    with pytest.raises(ValueError, match="already claimed"):
        bus.claim_mmio(0xD0000800, 0x1000, Bytes())
