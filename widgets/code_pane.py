"""Disassembly: addresses, bytes, instructions, and which of them comes next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from textual import events

from widgets.address_pane import AddressFrame, AddressPane
from widgets.line_pane import Line, Span, cut, width_of

HERE = "▶"
"""Stands before the instruction at RIP."""
_BYTES = ((110, 33), (0, 24))
"""From how many cells on the bytes have how many: those of nearly every instruction."""


@dataclass(frozen=True, slots=True)
class CodeLine:
    """An instruction at a linear address; ``segmented`` is that as CS:offset where it differs.

    What can't be read has no ``raw``; ``text`` then says why.
    """

    address: int
    raw: bytes
    text: str
    segmented: str = ""


@dataclass(frozen=True, slots=True)
class CodeFrame(AddressFrame):
    """All that is drawn."""

    rows: tuple[CodeLine, ...] = ()
    rip: int = -1
    """The linear address of the next instruction."""
    cursor: int = 0
    digits: int = 8
    """Of addresses."""


class CodePane(AddressPane[CodeFrame]):
    """A listing; the whole line of the chosen instruction stands out."""

    NAME = "Code"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(CodeFrame(), id=id)

    def lines(self, width: int, height: int) -> Sequence[Line]:
        return [self.title(width), *(self._line(row, width) for row in self.frame.rows[: height - 1])]

    def _line(self, row: CodeLine, width: int) -> Line:
        here = row.address == self.frame.rip
        spans: list[Span] = [
            (f"{HERE if here else ' '}", "mark"),
            (f"{row.address:0{self.frame.digits}x} ", "rip" if here else "label"),
        ]
        if row.segmented:
            spans.append((f"{row.segmented} ", "label"))
        room = next(cells for least, cells in _BYTES if width >= least)
        if row.raw:
            fit = len(row.raw) <= room // 3
            shown = row.raw.hex(" ") if fit else row.raw[: room // 3 - 1].hex(" ") + " …"
            spans.append((f" {shown:<{room}}", "dim"))
        text = cut(row.text, width - width_of(spans))
        spans.append((text, "strong" if here else "text" if row.raw else "warn"))
        if row.address != self.frame.cursor:
            return tuple(spans)
        spans.append((" " * max(width - width_of(spans), 0), ""))
        return tuple((text, f"{style} cursor".strip()) for text, style in spans)

    def on_click(self, event: events.Click) -> None:
        event.stop()
        if 0 < event.y <= len(self.frame.rows):
            self.post_message(self.Pointed(self, self.frame.rows[event.y - 1].address))
