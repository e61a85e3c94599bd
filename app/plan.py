"""Who gets how much of the terminal: pure arithmetic from its size and the number of VCPUs."""

from __future__ import annotations

from dataclasses import dataclass

from widgets import vcpu_list, vcpu_pane

MIN_COLUMNS, MIN_ROWS = 60, 16
"""Below this nothing useful fits."""
CONSOLE = 81
"""Columns of a console that shows 80 of the guest's."""
_BESIDE = CONSOLE + 1 + 38
"""From this width on the ledger and the checkpoints stand beside the console, below it all three share one place."""


@dataclass(frozen=True, slots=True)
class Plan:
    """``list_rows`` is 0 where every VCPU has a pane; ``across`` × ``down`` panes of ``pane_rows`` each."""

    list_rows: int
    across: int
    down: int
    pane_rows: int
    side: int
    """Columns of the ledger and the checkpoints beside the console; 0 where all three share one place."""

    @property
    def panes(self) -> int:
        return self.across * self.down

    @property
    def rows(self) -> int:
        """Rows of the whole VCPU area."""
        return self.list_rows + self.down * self.pane_rows


def plan(columns: int, rows: int, vcpus: int, *, whole: bool = False) -> Plan:
    """Share out ``columns`` × ``rows`` cells between the VCPUs and, at least 30 % of the rows, what is below them.

    ``whole``: nothing is below them.
    """
    side = min(columns * 42 // 100, columns - CONSOLE - 1) if columns >= _BESIDE else 0
    room = rows if whole else rows - max(4, rows * 3 // 10)
    widths = {
        across: (columns + 1) // across - 1 for across in range(1, max(columns // (vcpu_pane.MIN_WIDTH + 1), 1) + 1)
    }

    def down(across: int) -> int:
        return -(-vcpus // across)

    # Everything about every VCPU, in panes wide enough for four registers side by side if that can be.
    full = [
        (width < vcpu_pane.WIDE, down(across) * vcpu_pane.heights(width)[1], across)
        for across, width in widths.items()
        if across <= vcpus and down(across) * vcpu_pane.heights(width)[1] <= room
    ]
    if full:
        across = min(full)[2]
        return Plan(0, across, down(across), vcpu_pane.heights(widths[across])[1], side)

    # The registers of every VCPU.
    compact = [
        (down(across) * vcpu_pane.heights(width)[0], across)
        for across, width in widths.items()
        if across <= vcpus and down(across) * vcpu_pane.heights(width)[0] <= room
    ]
    if compact:
        across = min(compact)[1]
        return Plan(0, across, down(across), room // down(across), side)

    # All VCPUs in a list, and panes for as many as fit.
    list_rows = min(vcpu_list.rows(vcpus, columns), max(room // 3, 2)) if vcpus > 1 else 0
    room -= list_rows
    best = max(
        ((across * (room // vcpu_pane.heights(width)[1]), width, across) for across, width in widths.items()),
        key=lambda choice: choice[:2],
    )
    if best[0]:
        _, width, across = best
        return Plan(list_rows, across, room // vcpu_pane.heights(width)[1], vcpu_pane.heights(width)[1], side)
    if whole:
        return Plan(0, 1, 1, rows, side)  # on a small terminal all of one VCPU, without the list of the others
    return Plan(list_rows, 1, 1, room, side)
