"""Memory as rows of hexadecimal bytes and ASCII, under headings that say what page they lie in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from textual import events

from widgets.address_pane import AddressFrame, AddressPane
from widgets.line_pane import Line, Span, cut
from widgets.vcpu_pane import MARK

ROW_BYTES = (16, 8)
"""Bytes in a row: as many as fit."""


@dataclass(frozen=True, slots=True)
class Heading:
    """What page the rows below lie in; ``bad``: they can't be read."""

    text: str
    bad: bool = False


@dataclass(frozen=True, slots=True)
class HexRow:
    """The bytes from ``address`` on; none if they can't be read, ``why``. ``changed`` are offsets of bytes to mark."""

    address: int
    data: bytes = b""
    changed: frozenset[int] = frozenset()
    why: str = ""


@dataclass(frozen=True, slots=True)
class MemoryFrame(AddressFrame):
    """All that is drawn."""

    rows: tuple[Heading | HexRow, ...] = ()
    cursor: int = 0
    digits: int = 8
    """Of addresses."""


def row_bytes(width: int, digits: int) -> int:
    """How many bytes a row has in a pane of ``width`` cells, with addresses of so many digits."""
    return next((count for count in ROW_BYTES if _ascii_at(digits, count) + count <= width), ROW_BYTES[-1])


def _ascii_at(digits: int, count: int) -> int:
    """The cell where a row's ASCII begins: behind a space, the address, and for each byte its mark and two digits."""
    return 1 + digits + 1 + 3 * count + 2


class MemoryPane(AddressPane[MemoryFrame]):
    """Bytes in both forms; the chosen one stands out in both."""

    NAME = "Memory"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(MemoryFrame(), id=id)

    def lines(self, width: int, height: int) -> Sequence[Line]:
        return [self.title(width), *(self._line(row, width) for row in self.frame.rows[: height - 1])]

    def _line(self, row: Heading | HexRow, width: int) -> Line:
        if isinstance(row, Heading):
            return ((f" {cut(row.text, width - 1)}", "warn" if row.bad else "label"),)
        address: Span = (f" {row.address:0{self.frame.digits}x} ", "label")
        spot = self.frame.cursor - row.address
        if not row.data:
            here = 0 <= spot < row_bytes(width, self.frame.digits)
            return (address, (" ", ""), (row.why, "dim spot" if here else "dim"))
        styles = ["text" if byte else "dim" for byte in row.data]
        for at in row.changed:
            styles[at] = "changed"
        if 0 <= spot < len(styles):
            styles[spot] = f"{'changed' if spot in row.changed else 'text'} spot"
        hexadecimal = _hexadecimal(row, styles)
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row.data)
        return (address, *hexadecimal, ("  ", ""), *_joined(zip(text, styles, strict=True)))

    def on_click(self, event: events.Click) -> None:
        event.stop()
        at = event.y - 1
        row = self.frame.rows[at] if 0 <= at < len(self.frame.rows) else None
        if isinstance(row, HexRow):
            self.post_message(self.Pointed(self, row.address + self._offset(event.x)))

    def _offset(self, x: int) -> int:
        """The byte in its row at this cell, in hexadecimal or in ASCII; the nearest if there is none."""
        digits = self.frame.digits
        count = row_bytes(self.size.width, digits)
        text = _ascii_at(digits, count)
        at = x - text if x >= text else (x - digits - 2) // 3
        return min(max(at, 0), count - 1)


def _hexadecimal(row: HexRow, styles: Sequence[str]) -> Iterator[Span]:
    cells: list[Span] = []
    for at, (byte, style) in enumerate(zip(row.data, styles, strict=True)):
        changed = at in row.changed
        cells += [(MARK if changed else " ", "mark" if changed else ""), (f"{byte:02x}", style)]
    return _joined(cells)


def _joined(cells: Iterator[Span] | Sequence[Span]) -> Iterator[Span]:
    """Neighbours of one style as one span."""
    for style, group in groupby(cells, key=lambda cell: cell[1]):
        yield "".join(text for text, _ in group), style
