"""Who gets how much of the terminal, from the smallest to a wall."""

from __future__ import annotations

import pytest

from app.plan import MIN_COLUMNS, MIN_ROWS, plan
from widgets import vcpu_pane


@pytest.mark.parametrize("vcpus", [1, 2, 3, 4, 8, 16, 64])
@pytest.mark.parametrize("size", [(60, 13), (80, 21), (100, 26), (120, 37), (160, 45), (200, 58), (400, 100)])
def test_everything_has_its_place(size: tuple[int, int], vcpus: int) -> None:
    columns, rows = size
    made = plan(columns, rows, vcpus)
    assert made.rows <= rows - 4, "the console keeps some rows"
    assert made.panes >= 1
    assert made.pane_rows >= 4
    assert made.list_rows or made.panes >= vcpus, "a VCPU without a pane is in the list"
    assert (columns + 1) // made.across - 1 >= vcpu_pane.MIN_WIDTH
    assert not made.side or columns - made.side - 1 >= 80


def test_16_vcpus_on_80x24_are_a_list_and_the_selected_one() -> None:
    made = plan(80, 21, 16)
    assert (made.list_rows, made.panes) == (5, 1)
    assert made.pane_rows >= vcpu_pane.heights(80)[0]
    assert made.side == 0


def test_4_vcpus_on_200x60_have_everything() -> None:
    made = plan(200, 58, 4)
    assert (made.list_rows, made.across, made.down) == (0, 2, 2)
    assert made.pane_rows == vcpu_pane.heights(99)[1]
    assert made.side


def test_16_vcpus_on_200x60_are_a_list_and_4_whole_panes() -> None:
    made = plan(200, 58, 16)
    assert made.list_rows
    assert made.panes == 4
    assert made.pane_rows == vcpu_pane.heights(99)[1]


def test_8_vcpus_on_200x60_all_have_their_registers() -> None:
    made = plan(200, 58, 8)
    assert (made.list_rows, made.panes >= 8) == (0, True)


def test_the_smallest_terminal() -> None:
    made = plan(MIN_COLUMNS, MIN_ROWS - 3, 16)
    assert made.panes == 1
