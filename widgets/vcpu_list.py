"""All VCPUs at a glance: a cell each with its activity and RIP, for machines with more VCPUs than panes fit."""

from __future__ import annotations

from collections.abc import Sequence

from textual import events

from kvm.x86.structs import Regs
from widgets.frame import VcpuFrame
from widgets.line_pane import Line, LinePane, Span, bar
from widgets.vcpu_pane import ACTIVITY, VcpuPane, number

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
        across = max(width // CELL, 1)
        counts = {name: sum(frame.activity == name for frame in self.frames) for name in ACTIVITY}
        words: list[list[Span]] = [
            [(f"{glyph} {counts[name]} {name or 'unknown'}", style)]
            for name, (glyph, style) in ACTIVITY.items()
            if counts[name]
        ]
        title = bar([(f" {len(self.frames)} VCPUs ", "strong")], words, width)
        # Column by column, as a person reads a list; where the rows don't suffice, the part around the selected one.
        needed = -(-len(self.frames) // across)
        shown = min(needed, max(height - 1, 1))
        first = min(max(self.selected % max(needed, 1) - shown // 2, 0), needed - shown)
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
        rip = Regs.from_buffer_copy(frame.regs).rip if frame.regs else None
        spans = [(f"{frame.index:>2}", "strong"), (glyph, style), *number(rip, 16)]
        return [*((text, f"{base} {name}".strip()) for text, name in spans), (" ", "")]

    def on_click(self, event: events.Click) -> None:
        event.stop()
        across = max(self.size.width // CELL, 1)
        needed = -(-len(self.frames) // across)
        index = event.y - 1 + event.x // CELL * needed
        if event.y >= 1 and index < len(self.frames):
            self.post_message(VcpuPane.Selected(index))
