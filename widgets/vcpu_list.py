"""All VCPUs at a glance: a cell each with its activity and RIP, for machines with more VCPUs than panes fit."""

from __future__ import annotations

from collections.abc import Sequence

from textual import events

from kvm.x86.structs import Regs
from widgets.frame import VcpuFrame
from widgets.line_pane import Line, LinePane, Span, bar
from widgets.vcpu_pane import ACTIVITY, VcpuPane

CELL = 20
"""Cells that a VCPU takes: index, glyph, RIP, gap; so that four fit in 80 columns."""


def rows(count: int, width: int) -> int:
    """Rows that a list of ``count`` VCPUs needs, its title included."""
    return 1 - -count // max(width // CELL, 1)


class VcpuList(LinePane):
    """The overview; a click selects a VCPU, by VcpuPane's message."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.frames: tuple[VcpuFrame, ...] = ()
        self.selected = 0

    def show(self, frames: Sequence[VcpuFrame], selected: int) -> None:
        """Draw these VCPUs."""
        if (tuple(frames), selected) != (self.frames, self.selected):
            self.frames, self.selected = tuple(frames), selected
            self.redraw()

    def lines(self, width: int, height: int) -> Sequence[Line]:
        counts = {name: sum(frame.activity == name for frame in self.frames) for name in ACTIVITY}
        words: list[list[Span]] = [
            [(f"{glyph} {counts[name]} {name or 'unknown'}", style)]
            for name, (glyph, style) in ACTIVITY.items()
            if counts[name]
        ]
        title = bar([(f" {len(self.frames)} VCPUs ", "strong")], words, width)
        # Column by column, as a person reads a list; where the rows don't suffice, the part around the selected one.
        needed, shown = self._rows(), min(self._rows(), max(height - 1, 1))
        first = self._first(shown)
        return [
            title,
            *(
                tuple(span for frame in self.frames[row::needed] for span in self._cell(frame))
                for row in range(first, first + shown)
            ),
        ]

    def _cell(self, frame: VcpuFrame) -> list[Span]:
        glyph, style = ACTIVITY.get(frame.activity, ACTIVITY[""])
        base = "selected" if frame.index == self.selected else ""
        rip = f"{Regs.from_buffer_copy(frame.regs).rip:x}" if frame.regs else "?"
        spans = [(f"{frame.index:>2}", "strong"), (glyph, style), (f"{rip:>16}", "text" if frame.regs else "dim")]
        return [*((text, f"{base} {name}".strip()) for text, name in spans), (" ", "")]

    def _rows(self) -> int:
        """Rows of VCPUs that all of them take in this width."""
        return -(-len(self.frames) // max(self.size.width // CELL, 1))

    def _first(self, shown: int) -> int:
        """The first of the rows that are shown."""
        rows = self._rows()
        return min(max(self.selected % max(rows, 1) - shown // 2, 0), rows - shown)

    def on_click(self, event: events.Click) -> None:
        event.stop()
        rows, shown = self._rows(), min(self._rows(), max(self.size.height - 1, 1))
        row, column = event.y - 1 + self._first(shown), event.x // CELL
        index = column * rows + row
        if event.y >= 1 and row < rows and index < len(self.frames):
            self.post_message(VcpuPane.Selected(index))
