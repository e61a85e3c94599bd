"""The small ports, as guests use them over the board's bus."""

from __future__ import annotations

import pytest

from kvm.devices.board import Board


@pytest.mark.parametrize("port", [0xE9, 0x402])
def test_the_debug_console_prints_and_says_that_it_is_there(board: Board, port: int) -> None:
    assert board.bus.port_in(port, 1) == 0xE9
    for byte in b"hello":
        board.bus.port_out(port, 1, byte)
    assert board.debug_console.since(0) == (b"hello", 5)


def test_post_codes(board: Board) -> None:
    assert (board.post.code, board.post.codes) == (None, ())
    for code in range(20):
        board.bus.port_out(0x80, 1, code)
    assert (board.post.code, board.post.codes) == (19, tuple(range(4, 20)))
    board.bus.port_out(0x80, 2, 0x1234)
    assert board.post.code == 0x34
    board.reset()
    assert board.post.code is None


@pytest.mark.parametrize(("size", "value"), [(1, 0x07), (2, 0x1234), (4, 0x12345678)])
def test_debug_exit_takes_the_whole_value(board: Board, platform, size: int, value: int) -> None:
    board.bus.port_out(0xF4, size, value)
    assert platform.exits == [value]


@pytest.mark.parametrize(
    "writes",
    [
        [(0x64, 0xFE)],
        [(0x64, 0xD1), (0x60, 0xDE)],
        [(0x92, 0x01)],
        [(0xCF9, 0x06)],
        [(0xCF9, 0x02), (0xCF9, 0x06)],
        [(0xCF9, 0x0E)],
    ],
)
def test_ways_to_reset(board: Board, platform, writes: list[tuple[int, int]]) -> None:
    for port, value in writes:
        board.bus.port_out(port, 1, value)
    assert len(platform.resets) == 1


@pytest.mark.parametrize(
    "writes",
    [
        [(0x64, 1, 0xFF)],  # pulses nothing
        [(0x64, 1, 0xD1), (0x60, 1, 0xDF)],  # A20 on, as boot loaders do
        [(0x64, 1, 0x60), (0x60, 1, 0xFE)],  # a configuration byte
        [(0x64, 1, 0xD1), (0x64, 1, 0xAE), (0x60, 1, 0x00)],  # another command came between
        [(0x92, 1, 0x02)],
        [(0xCF9, 1, 0x02)],
        [(0xCF8, 4, 0x80003C00)],  # a PCI configuration address, function 4
        [(0xCF8, 2, 0x0600)],
    ],
)
def test_what_is_no_reset(board: Board, platform, writes: list[tuple[int, int, int]]) -> None:
    for port, size, value in writes:
        board.bus.port_out(port, size, value)
    assert platform.resets == []


def test_port_92_resets_as_the_bit_rises_and_reports_a20(board: Board, platform) -> None:
    assert board.bus.port_in(0x92, 1) == 0x02
    board.bus.port_out(0x92, 1, 0x03)
    board.bus.port_out(0x92, 1, 0x03)
    assert len(platform.resets) == 1
    assert board.bus.port_in(0x92, 1) == 0x03
    board.reset()
    assert board.bus.port_in(0x92, 1) == 0x02


def test_there_is_no_pci(board: Board) -> None:
    board.bus.port_out(0xCF8, 4, 0x80000000)
    assert board.bus.port_in(0xCF8, 4) == 0xFFFFFFFF
    assert board.bus.port_in(0xCFC, 4) == 0xFFFFFFFF


def test_the_a20_dance_of_old_boot_loaders(board: Board, platform) -> None:
    """Each step waits for an empty input buffer, or a full output buffer, and must not wait for ever."""

    def wait(bit: int, level: int) -> None:
        assert board.bus.port_in(0x64, 1) & bit == level

    def command(value: int) -> None:
        wait(2, 0)
        board.bus.port_out(0x64, 1, value)

    command(0xAD)
    command(0xD0)
    wait(1, 1)
    output = board.bus.port_in(0x60, 1)
    wait(1, 0)
    command(0xD1)
    wait(2, 0)
    board.bus.port_out(0x60, 1, output & ~2)
    command(0xD0)
    assert board.bus.port_in(0x60, 1) & 2 == 0
    command(0xDF)
    command(0xD0)
    assert board.bus.port_in(0x60, 1) & 2 == 2
    command(0xAE)
    assert platform.resets == []


def test_the_keyboard_controller_answers_and_has_no_keyboard(board: Board) -> None:
    def ask(command: int) -> int:
        board.bus.port_out(0x64, 1, command)
        assert board.bus.port_in(0x64, 1) & 1
        return board.bus.port_in(0x60, 1)

    assert (ask(0xAA), ask(0xAB)) == (0x55, 0x01)
    board.bus.port_out(0x64, 1, 0x60)
    board.bus.port_out(0x60, 1, 0x45)
    assert ask(0x20) == 0x45
    assert board.bus.port_in(0x64, 1) & 4  # self-tested
    board.bus.port_out(0x60, 1, 0xED)  # to the keyboard: silence
    assert not board.bus.port_in(0x64, 1) & 1
