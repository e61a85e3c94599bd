"""The place of the VCPUs: the list of all where it's needed, and panes for as many as fit."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import Container, Vertical

from widgets.frame import VcpuFrame
from widgets.vcpu_list import VcpuList
from widgets.vcpu_pane import VcpuPane


class VcpuArea(Vertical, can_focus=True):
    """Draws ``frames``; which ones have panes follows from the selection."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.panes: list[VcpuPane] = []

    def compose(self) -> ComposeResult:
        yield VcpuList(id="list")
        yield Container(id="grid")

    def lay_out(self, *, list_rows: int, across: int, pane_rows: int, panes: int) -> None:
        """``panes`` panes of ``pane_rows`` rows, ``across`` of them side by side, below a list of ``list_rows``."""
        vcpu_list = self.query_one(VcpuList)
        vcpu_list.display = list_rows > 0
        vcpu_list.styles.height = list_rows
        grid = self.query_one("#grid")
        grid.styles.grid_size_columns = across
        grid.styles.grid_rows = str(pane_rows)
        grid.styles.height = -(-panes // across) * pane_rows
        self.styles.height = list_rows - (-panes // across) * pane_rows
        while len(self.panes) > panes:
            self.panes.pop().remove()
        new = [VcpuPane() for _ in range(panes - len(self.panes))]
        self.panes += new
        grid.mount_all(new)

    def in_view(self, count: int, selected: int) -> range:
        """The VCPUs, of ``count``, that have a pane while ``selected`` is: pages that keep every pane filled."""
        panes = min(len(self.panes), count)
        if not panes:
            return range(0)
        first = min(selected // panes * panes, count - panes)
        return range(first, first + panes)

    def show(self, frames: Sequence[VcpuFrame], selected: int) -> None:
        """Draw these VCPUs."""
        vcpu_list = self.query_one(VcpuList)
        if vcpu_list.display:
            vcpu_list.show(frames, selected)
        for pane, index in zip(self.panes, self.in_view(len(frames), selected), strict=False):
            pane.show(frames[index], selected=index == selected)
