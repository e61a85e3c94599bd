"""The tree of checkpoints: where the machine can go back to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message

from widgets.line_pane import Line, LinePane, Span, bar, cut, width_of
from widgets.vcpu_pane import number

WIDE = 60
"""Cells from which RIP has its column."""
HEADED = 5
"""Rows from which the columns have a heading."""


@dataclass(frozen=True, slots=True)
class CheckpointEntry:
    """One checkpoint as it's drawn; ``age`` in seconds, ``pages`` it holds by itself, ``rip`` of VCPU 0."""

    number: int
    name: str
    age: int
    pages: int
    rip: int | None
    branch: str = ""
    """The line of the tree that leads to it."""
    note: str = ""
    current: bool = False
    """The machine came from here."""


def ago(seconds: int) -> str:
    """An age in four cells: ``12 s``, `` 3 m``, `` 2 h``."""
    for size, unit in ((3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size:>2} {unit}"
    return f"{seconds:>2} s"


class CheckpointsPane(LinePane, can_focus=True):
    """The checkpoints, parents before children, with a cursor."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False, id="checkpoints.up"),
        Binding("down,j", "move(1)", "Down", show=False, id="checkpoints.down"),
        Binding("enter", "chosen('restore')", "Go back to it", show=False, id="checkpoints.restore"),
        Binding("n", "chosen('name')", "Name it", show=False, id="checkpoints.name"),
        Binding("N", "chosen('note')", "A note on it", show=False, id="checkpoints.note"),
        Binding("x,delete", "chosen('forget')", "Delete it", show=False, id="checkpoints.forget"),
    ]
    """The title shows them: the footer has no room left."""

    class Chosen(Message):
        """Do this with this one: ``restore``, ``name``, ``note`` or ``forget``."""

        def __init__(self, what: str, number: int) -> None:
            super().__init__()
            self.what, self.number = what, number

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.entries: tuple[CheckpointEntry, ...] = ()
        self.others = ""
        self.cursor = 0

    def show(self, entries: Sequence[CheckpointEntry]) -> None:
        """These checkpoints, top to bottom. The cursor stays on its checkpoint; a new one draws it to itself."""
        new = tuple(entries)
        if new == self.entries:
            return
        numbers = [entry.number for entry in new]
        newest = max(numbers, default=0)
        if newest > max((entry.number for entry in self.entries), default=0):
            self.cursor = numbers.index(newest)
        elif self.entries:
            at = self.entries[self.cursor].number
            self.cursor = numbers.index(at) if at in numbers else max(min(self.cursor, len(new) - 1), 0)
        self.entries = new
        self.redraw()

    def action_move(self, rows: int) -> None:
        if self.entries:
            self.cursor = min(max(self.cursor + rows, 0), len(self.entries) - 1)
            self.redraw()

    def action_chosen(self, what: str) -> None:
        if self.entries:
            self.post_message(self.Chosen(what, self.entries[self.cursor].number))

    def lines(self, width: int, height: int) -> Sequence[Line]:
        lines = [self._title(width)]
        if not self.entries:
            return [*lines, ((" None yet: ", "dim"), ("c", "strong"), (" keeps the machine.", "dim"))]
        if self._heading(height):
            lines.append(self._row_of("   name", [("  age", ""), ("  pages", ""), ("   RIP of VCPU 0  ", "")], width))
        first = self._first(height)
        shown = self.entries[first : first + height - len(lines)]
        return [*lines, *(self._row(entry, first + row, width) for row, entry in enumerate(shown))]

    def _title(self, width: int) -> Line:
        base = "bar selected" if self.has_focus else "bar"
        right: list[list[Span]] = [[(str(len(self.entries)), "")]]
        if self.has_focus and self.entries:
            keys = (("⏎", "back"), ("n", "name"), ("N", "note"), ("x", "delete"))
            right = [[(key, "strong"), (f" {word}", "label")] for key, word in keys]
        elif self.others:
            right.append([(self.others, "label")])
        return bar([(" F4 ", "label"), ("Checkpoints ", "strong")], right, width, base)

    def _row_of(self, left: str, right: list[Span], width: int) -> Line:
        columns = right if width >= WIDE else right[:2]
        room = width - width_of(columns) - 1
        return ((cut(left, room).ljust(room), "dim"), *((text, "dim") for text, _ in columns), (" ", ""))

    def _row(self, entry: CheckpointEntry, index: int, width: int) -> Line:
        left: list[Span] = [
            ("▸" if index == self.cursor else " ", "accent"),
            ("●" if entry.current else " ", "good"),
            (f"{entry.branch} ", "label"),
            (f"{entry.number} ", "strong"),
        ]
        right: list[Span] = [(f" {ago(entry.age)}", "label"), (f" {entry.pages:>6}", "label")]
        if width >= WIDE:
            right += [("  ", ""), *number(entry.rip, 16)]
        room = max(width - width_of(left) - width_of(right) - 1, 0)
        name = cut(entry.name, room)
        note = cut(f" – {entry.note}", room - width_of([(name, "")])) if entry.note else ""
        gap = room - width_of([(name, ""), (note, "")])
        line = (*left, (name, "text"), (note, "label"), (" " * gap, ""), *right, (" ", ""))
        if index == self.cursor and self.has_focus:
            return tuple((text, f"cursor {style}".strip()) for text, style in line)
        return line

    def _heading(self, height: int) -> bool:
        return height >= HEADED

    def _first(self, height: int) -> int:
        rows = height - 1 - self._heading(height)
        return max(self.cursor - max(rows - 1, 0), 0)

    def on_click(self, event: events.Click) -> None:
        height = self.size.height
        row = event.y - 1 - self._heading(height)
        index = row + self._first(height)
        if row >= 0 and index < len(self.entries):
            self.cursor = index
            self.redraw()
            if event.chain == 2:
                self.action_chosen("restore")
