"""A platform that writes down what devices ask of it, and a board on it."""

from __future__ import annotations

import pytest

from kvm.devices.board import Board


class Recorder:
    """Implements kvm.devices.platform.Platform."""

    def __init__(self) -> None:
        self.lines: dict[int, bool] = {}
        self.changes: list[tuple[int, bool]] = []
        self.resets: list[str] = []
        self.exits: list[int] = []
        self.power_offs = 0

    def irq_line(self, gsi: int, level: bool) -> None:
        self.lines[gsi] = level
        self.changes.append((gsi, level))

    def request_reset(self, why: str) -> None:
        self.resets.append(why)

    def request_exit(self, code: int) -> None:
        self.exits.append(code)

    def request_power_off(self) -> None:
        self.power_offs += 1

    def dma_read(self, address: int, size: int) -> bytes | None:
        """There is no memory."""
        return None

    def dma_write(self, address: int, data: bytes) -> bool:
        return False


@pytest.fixture
def platform() -> Recorder:
    return Recorder()


@pytest.fixture
def board(platform: Recorder) -> Board:
    return Board(platform, memory=64 << 20, vcpus=4)
