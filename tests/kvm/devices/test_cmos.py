"""CMOS: the time in each of its notations, the machine's size, and battery-backed memory."""

from __future__ import annotations

import calendar
import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.devices.board import Board
from kvm.devices.cmos import Cmos

MIB, GIB = 1 << 20, 1 << 30


def read(cmos: Cmos, register: int) -> int:
    cmos.port_out(0, 1, register)
    return cmos.port_in(1, 1)


def write(cmos: Cmos, register: int, value: int) -> None:
    cmos.port_out(0, 1, register)
    cmos.port_out(1, 1, value)


def at(cmos: Cmos, *registers: int) -> int:
    return sum(read(cmos, register) << 8 * place for place, register in enumerate(registers))


@given(
    st.datetimes(datetime.datetime(1970, 1, 1), datetime.datetime(2199, 12, 31)),
    st.booleans(),
    st.booleans(),
)
def test_the_time_is_the_hosts_in_the_notation_that_the_guest_chose(
    now: datetime.datetime, binary: bool, whole_day: bool
) -> None:
    cmos = Cmos(64 * MIB, 1, clock=lambda: float(calendar.timegm(now.timetuple())))
    write(cmos, 0x0B, binary << 2 | whole_day << 1)

    def number(raw: int) -> int:
        return raw if binary else int(f"{raw:x}")

    hour = read(cmos, 0x04)
    if not whole_day:
        hour = number(hour & 0x7F) % 12 + (12 if hour & 0x80 else 0)
    else:
        hour = number(hour)
    year, month, day = (number(read(cmos, register)) for register in (0x09, 0x08, 0x07))
    minute, second, century = (number(read(cmos, register)) for register in (0x02, 0x00, 0x32))
    assert (century * 100 + year, month, day, hour, minute, second) == now.timetuple()[:6]
    assert number(read(cmos, 0x06)) == now.isoweekday() % 7 + 1


def test_an_update_is_never_in_progress(board: Board) -> None:
    values = []
    for register in (0x0A, 0x0B, 0x0C, 0x0D):
        board.bus.port_out(0x70, 1, 0x80 | register)  # with NMI masked, as firmware does
        board.bus.port_out(0x71, 1, 0xFF)
        values.append(board.bus.port_in(0x71, 1))
    assert values == [0x26, 0xFF, 0x00, 0x80]


@pytest.mark.parametrize(
    ("memory", "above_1m_kib", "above_16m", "above_4g"),
    [
        (1 * MIB, 0, 0, 0),
        (8 * MIB, 7 * 1024, 0, 0),
        (128 * MIB, 0xFFFF, 112 * 16, 0),
        (3 * GIB, 0xFFFF, (3 * 1024 - 16) * 16, 0),
        (8 * GIB, 0xFFFF, (3 * 1024 - 16) * 16, 5 * 1024 * 16),
    ],
)
def test_firmware_finds_the_memory(memory: int, above_1m_kib: int, above_16m: int, above_4g: int) -> None:
    cmos = Cmos(memory, 1)
    assert at(cmos, 0x15, 0x16) == 640
    assert at(cmos, 0x17, 0x18) == at(cmos, 0x30, 0x31) == above_1m_kib
    assert at(cmos, 0x34, 0x35) == above_16m
    assert at(cmos, 0x5B, 0x5C, 0x5D) == above_4g


@pytest.mark.parametrize(("vcpus", "register"), [(1, 0), (4, 3), (256, 255), (1000, 255)])
def test_firmware_finds_the_number_of_processors(vcpus: int, register: int) -> None:
    assert read(Cmos(64 * MIB, vcpus), 0x5F) == register


def test_the_battery_keeps_memory_over_a_reset(board: Board) -> None:
    board.bus.port_out(0x70, 1, 0x0F)
    board.bus.port_out(0x71, 1, 0x0A)
    board.reset()
    board.bus.port_out(0x70, 1, 0x0F)
    assert board.bus.port_in(0x71, 1) == 0x0A


def test_index_and_data_may_be_written_as_one_word(board: Board) -> None:
    board.bus.port_out(0x70, 2, 0x5A3F)
    board.bus.port_out(0x70, 1, 0x3F)
    assert board.bus.port_in(0x70, 2) == 0x5AFF
