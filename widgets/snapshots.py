"""The tree of snapshots: checkpoints in memory and files, where the machine can go back to."""

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
DETAILED = 7
"""Rows from which the last one tells where all VCPUs of the chosen snapshot stood."""

Key = int | str
"""A checkpoint's number, a file's path."""


@dataclass(frozen=True, slots=True)
class SnapshotEntry:
    """One snapshot as it's drawn; ``age`` in seconds, ``size`` in bytes that it holds by itself, ``rips`` by VCPU."""

    key: Key
    sign: str
    """What stands before its name: its number, or the sign of a file."""
    name: str
    age: int
    size: int
    rips: tuple[int, ...]
    branch: str = ""
    """The line of the tree that leads to it."""
    note: str = ""
    current: bool = False
    """The machine came from here."""


def ago(seconds: int) -> str:
    """An age in four cells: ``12 s``, `` 3 m``, `` 2 h``, `` 5 d``."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size:>2} {unit}"
    return f"{seconds:>2} s"


def amount(size: int) -> str:
    """Bytes in six cells: ``  44 K``, `` 1.2 M``, ``31.0 M``."""
    if size < 1000 << 10:
        return f"{-(-size >> 10):>4} K"
    for shift, unit in ((20, "M"), (30, "G"), (40, "T")):
        if size < 1000 << shift:
            value = size / (1 << shift)
            return f"{value:>4.1f} {unit}" if value < 99.95 else f"{value:>4.0f} {unit}"
    return "  lots"


class SnapshotsPane(LinePane, can_focus=True):
    """The snapshots, parents before children, with a cursor."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False, id="snapshots.up"),
        Binding("down,j", "move(1)", "Down", show=False, id="snapshots.down"),
        Binding("enter", "chosen('restore')", "Go back to it", show=False, id="snapshots.restore"),
        Binding("n", "chosen('name')", "Name it", show=False, id="snapshots.name"),
        Binding("N", "chosen('note')", "A note on it", show=False, id="snapshots.note"),
        Binding("d", "chosen('compare')", "What differs from now", show=False, id="snapshots.compare"),
        Binding("m", "mark", "Compare with this one", show=False, id="snapshots.mark"),
        Binding("x,delete", "chosen('forget')", "Delete it", show=False, id="snapshots.forget"),
    ]
    """The title shows them: the footer has no room left."""

    class Chosen(Message):
        """Do this with this one: ``restore``, ``name``, ``note``, ``compare`` or ``forget``. ``marked``: with what it's
        to be compared, None for the machine as it is now."""

        def __init__(self, what: str, key: Key, marked: Key | None) -> None:
            super().__init__()
            self.what, self.key, self.marked = what, key, marked

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.entries: tuple[SnapshotEntry, ...] = ()
        self.others = ""
        self.cursor = 0
        self._marked: Key | None = None

    def show(self, entries: Sequence[SnapshotEntry]) -> None:
        """These snapshots, top to bottom. The cursor stays on its snapshot; a new one draws it to itself."""
        new = tuple(entries)
        if new == self.entries:
            return
        keys = [entry.key for entry in new]
        before = {entry.key for entry in self.entries}
        fresh = [row for row, key in enumerate(keys) if key not in before]
        if fresh:
            self.cursor = fresh[-1]
        elif self.entries:
            at = self.entries[self.cursor].key
            self.cursor = keys.index(at) if at in keys else max(min(self.cursor, len(new) - 1), 0)
        if self._marked not in keys:
            self._marked = None
        self.entries = new
        self.redraw()

    def action_move(self, rows: int) -> None:
        if self.entries:
            self.cursor = min(max(self.cursor + rows, 0), len(self.entries) - 1)
            self.redraw()

    def action_chosen(self, what: str) -> None:
        if self.entries:
            key = self.entries[self.cursor].key
            self.post_message(self.Chosen(what, key, self._marked if self._marked != key else None))

    def action_mark(self) -> None:
        """Compare with this one from now on; once more: with the machine as it is now."""
        if self.entries:
            key = self.entries[self.cursor].key
            self._marked = None if self._marked == key else key
            self.redraw()

    def lines(self, width: int, height: int) -> Sequence[Line]:
        lines = [self._title(width)]
        if not self.entries:
            none: Line = ((" None yet: ", "dim"), ("c", "strong"), (" keeps the machine, ", "dim"), ("w", "strong"))
            return [*lines, (*none, (" writes a file.", "dim"))]
        if self._heading(height):
            lines.append(self._row_of("   name", [("  age", ""), ("   size", ""), ("   RIP of VCPU 0  ", "")], width))
        first = self._first(height)
        shown = self.entries[first : first + self._rows(height)]
        lines += [self._row(entry, first + row, width) for row, entry in enumerate(shown)]
        if self._detailed(height):
            lines += [()] * (height - 1 - len(lines))
            lines.append(self._detail(width))
        return lines

    def _title(self, width: int) -> Line:
        base = "bar selected" if self.has_focus else "bar"
        right: list[list[Span]] = [[(str(len(self.entries)), "")]]
        if self.has_focus and self.entries:
            keys = (("⏎", "back"), ("d", "diff"), ("m", "mark"), ("n", "name"), ("N", "note"), ("x", "delete"))
            right = [[(key, "strong"), (f" {word}", "label")] for key, word in keys]
        elif self.others:
            right.append([(self.others, "label")])
        return bar([(" F4 ", "label"), ("Snapshots ", "strong")], right, width, base)

    def _detail(self, width: int) -> Line:
        """Where every VCPU stood, as far as there is room."""
        spans: list[Span] = [(" RIP", "label")]
        rips = self.entries[self.cursor].rips
        for index, rip in enumerate(rips):
            more: list[Span] = [(f"  {index} ", "label"), (f"{rip:x}", "text")]
            if width_of(spans) + width_of(more) > width - (3 if index + 1 < len(rips) else 1):
                spans.append((" …", "label"))
                break
            spans += more
        return tuple(spans)

    def _row_of(self, left: str, right: list[Span], width: int) -> Line:
        columns = right if width >= WIDE else right[:2]
        room = width - width_of(columns) - 1
        return ((cut(left, room).ljust(room), "dim"), *((text, "dim") for text, _ in columns), (" ", ""))

    def _row(self, entry: SnapshotEntry, index: int, width: int) -> Line:
        marked = entry.key == self._marked
        left: list[Span] = [
            ("▸" if index == self.cursor else " ", "accent"),
            ("◆" if marked else "●" if entry.current else " ", "warn" if marked else "good"),
            (f"{entry.branch} ", "label"),
            (f"{entry.sign} ", "strong"),
        ]
        right: list[Span] = [(f" {ago(entry.age)}", "label"), (f" {amount(entry.size)}", "label")]
        if width >= WIDE:
            right += [("  ", ""), *number(entry.rips[0] if entry.rips else None, 16)]
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

    def _detailed(self, height: int) -> bool:
        return height >= DETAILED

    def _rows(self, height: int) -> int:
        """Entries that fit."""
        return max(height - 1 - self._heading(height) - self._detailed(height), 1)

    def _first(self, height: int) -> int:
        return max(self.cursor - self._rows(height) + 1, 0)

    def on_click(self, event: events.Click) -> None:
        height = self.size.height
        row = event.y - 1 - self._heading(height)
        index = row + self._first(height)
        if 0 <= row < self._rows(height) and index < len(self.entries):
            self.cursor = index
            self.redraw()
            if event.chain == 2:
                self.action_chosen("restore")
