"""ACPI's PM1 registers, as a kernel uses them over the board's bus."""

from __future__ import annotations

import pytest

from kvm.devices.board import Board
from kvm.errors import VmdeckError
from kvm.x86.layout import POWER_PORTS

STATUS, ENABLE, CONTROL = POWER_PORTS, POWER_PORTS + 2, POWER_PORTS + 4


def test_acpi_mode_is_on_and_nothing_has_happened(board: Board) -> None:
    assert [board.bus.port_in(port, 2) for port in (STATUS, ENABLE, CONTROL)] == [0, 0, 1]
    board.bus.port_out(STATUS, 2, 0xFFFF)
    assert board.bus.port_in(STATUS, 2) == 0


def test_what_may_be_enabled_is_kept_by_word_and_by_byte(board: Board) -> None:
    board.bus.port_out(ENABLE, 2, 0xFFFF)
    assert board.bus.port_in(ENABLE, 2) == 0x0721
    board.bus.port_out(ENABLE + 1, 1, 0)
    assert board.bus.port_in(ENABLE, 2) == 0x0021
    board.bus.port_out(STATUS, 4, 0x0100_0000)  # split into bytes
    assert board.bus.port_in(STATUS, 4) == 0x0100_0000
    board.reset()
    assert board.bus.port_in(ENABLE, 2) == 0


@pytest.mark.parametrize("writes", [[(2, 0x3400)], [(2, 0x1400), (2, 0x3400)], [(1, 0x34)], [(2, 0x3401)]])
def test_ways_to_switch_off(board: Board, platform, writes: list[tuple[int, int]]) -> None:
    for size, value in writes:
        board.bus.port_out(CONTROL + (size == 1), size, value)
    assert platform.power_offs == 1


@pytest.mark.parametrize("value", [0x1400, 0x2000, 0x2400, 0x3000, 0x1C01])
def test_what_does_not_switch_off(board: Board, platform, value: int) -> None:
    board.bus.port_out(CONTROL, 2, value)
    assert platform.power_offs == 0
    assert board.bus.port_in(CONTROL, 2) == value & 0x1C02 | 1


def test_registers_that_cannot_be_are_refused(board: Board) -> None:
    state = board.save()
    for raw in (b"\xff\xff\0\0", b"\0\0\0\x20", b"\0\0\0"):
        with pytest.raises(VmdeckError, match="power_control is damaged"):
            board.check(state | {"power_control": raw})
