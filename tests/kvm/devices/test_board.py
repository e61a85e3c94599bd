"""The board as a whole: its state in and out, and its reset."""

from __future__ import annotations

import threading

import pytest

from kvm.devices.board import Board
from kvm.errors import VmdeckError


def scribble(board: Board) -> None:
    """Leave a mark in every device."""
    for port, value in (
        (0x64, 0xD0), (0x70, 0x40), (0x71, 0x77), (0x80, 0x42), (0x92, 0x00), (0xCF9, 0x02), (0x3FF, 0x99),
        (0x3FC, 0x08), (0x3F9, 0x02), (0x602, 0x20),
    ):  # fmt: skip
        board.bus.port_out(port, 1, value)
    board.bus.port_out(0x510, 2, 0x19)
    board.serial.feed(b"waiting")


def test_a_saved_board_comes_back(board: Board, platform) -> None:
    fresh = board.save()
    scribble(board)
    saved = board.save()
    assert {name for name in saved if saved[name] != fresh[name]} == {
        "i8042", "cmos", "post", "port92", "uart", "fw_cfg", "reset_control", "power_control",
    }  # fmt: skip
    board.load(fresh)
    assert board.save() == fresh
    assert platform.lines[4] is False
    board.load(saved)
    assert board.save() == saved
    assert platform.lines[4] is True


def test_reset_leaves_what_power_on_leaves_but_for_the_battery_and_the_line(board: Board, platform) -> None:
    fresh = board.save()
    scribble(board)
    board.reset()
    after = board.save()
    assert {name for name in after if after[name] != fresh[name]} == {"cmos", "uart"}
    assert after["uart"] == fresh["uart"] + b"waiting"
    assert platform.lines[4] is False


@pytest.mark.parametrize("name", [
    "i8042", "cmos", "post", "port92", "debugcon_e9", "debug_exit", "uart", "debugcon_402", "fw_cfg",
    "reset_control", "power_control",
])  # fmt: skip
def test_a_damaged_device_state_changes_no_device(board: Board, name: str) -> None:
    fresh = board.save()
    scribble(board)
    before = board.save()
    damaged = fresh | {name: bytes(range(17))}
    with pytest.raises(VmdeckError, match=f"device {name} is damaged"):
        board.check(damaged)
    assert board.save() == before


def test_a_state_of_other_devices_is_refused(board: Board) -> None:
    state = board.save()
    state["floppy"] = state.pop("uart")
    with pytest.raises(VmdeckError, match="floppy"):
        board.check(state)


def test_coalesced_ports_are_those_that_are_only_written_to(board: Board) -> None:
    assert board.coalesced_ports == ((0x80, 1), (0xE9, 1), (0x402, 1))


def test_the_bus_may_be_used_from_many_threads(board: Board) -> None:
    def print_many() -> None:
        for _ in range(2000):
            board.bus.port_out(0x3F8, 1, 0x2E)

    threads = [threading.Thread(target=print_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    board.serial.feed(b"x" * 1000)
    for thread in threads:
        thread.join(30)
    assert board.serial_console.total == 8000
    got = 0
    while board.bus.port_in(0x3FD, 1) & 1:
        got += board.bus.port_in(0x3F8, 1) == ord("x")
    assert got == 1000
