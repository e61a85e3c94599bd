"""The list of checkpoints: where the machine can go back to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message

from widgets.line_pane import Line, LinePane, Span, bar, cut
from widgets.vcpu_pane import number


@dataclass(frozen=True, slots=True)
class CheckpointEntry:
    """One checkpoint as it's drawn; ``age`` in seconds, ``pages`` it holds by itself, ``rip`` of VCPU 0."""

    number: int
    name: str
    age: int
    pages: int
    rip: int | None
    current: bool = False
    """The machine came from here."""


def ago(seconds: int) -> str:
    """An age in four cells: ``12 s``, `` 3 m``, `` 2 h``."""
    for size, unit in ((3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size:>2} {unit}"
    return f"{seconds:>2} s"


class CheckpointsPane(LinePane, can_focus=True):
    """The checkpoints, newest first, with a cursor."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False, id="checkpoints.up"),
        Binding("down,j", "move(1)", "Down", show=False, id="checkpoints.down"),
        Binding("enter", "choose", "Restore", id="checkpoints.restore"),
        Binding("delete,d", "forget", "Forget", show=False, id="checkpoints.forget"),
    ]

    class Chosen(Message):
        """Go back to this one."""

        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

    class Forgotten(Message):
        """Free this one."""

        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.entries: tuple[CheckpointEntry, ...] = ()
        self.others = ""
        self.cursor = 0

    def show(self, entries: Sequence[CheckpointEntry]) -> None:
        """These checkpoints, newest first. The cursor stays on its checkpoint; a new one draws it to itself."""
        new = tuple(entries)
        if new == self.entries:
            return
        numbers = [entry.number for entry in new]
        if self.entries and new and new[0].number <= self.entries[0].number:
            at = self.entries[self.cursor].number
            self.cursor = numbers.index(at) if at in numbers else min(self.cursor, len(new) - 1)
        else:
            self.cursor = 0
        self.entries = new
        self.redraw()

    def action_move(self, rows: int) -> None:
        if self.entries:
            self.cursor = min(max(self.cursor + rows, 0), len(self.entries) - 1)
            self.redraw()

    def action_choose(self) -> None:
        if self.entries:
            self.post_message(self.Chosen(self.entries[self.cursor].number))

    def action_forget(self) -> None:
        if self.entries:
            self.post_message(self.Forgotten(self.entries[self.cursor].number))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return None if action in ("choose", "forget") and not self.entries else True

    def lines(self, width: int, height: int) -> Sequence[Line]:
        base = "bar selected" if self.has_focus else "bar"
        right: list[list[Span]] = [[(str(len(self.entries)), "")]]
        if self.others:
            right.append([(self.others, "label")])
        title = bar([(" F4 ", "label"), ("Checkpoints ", "strong")], right, width, base)
        if not self.entries:
            return [title, ((" None yet: ", "dim"), ("c", "strong"), (" keeps the machine as it is now.", "dim"))]
        first = self._first(height)
        shown = self.entries[first : first + height - 1]
        return [title, *(self._row(entry, first + row, width) for row, entry in enumerate(shown))]

    def _first(self, height: int) -> int:
        return max(self.cursor - max(height - 2, 0), 0)

    def _row(self, entry: CheckpointEntry, index: int, width: int) -> Line:
        spans: list[Span] = [
            ("▸" if index == self.cursor else " ", "accent"),
            (f"{entry.number:>3} ", "strong"),
            ("● " if entry.current else "  ", "good"),
            (f"{ago(entry.age):>5} ", "label"),
            (f"{entry.pages:>6} pages " if width >= 50 else f"{entry.pages:>5}p ", "label"),
        ]
        rip = [*number(entry.rip, 16)] if width >= 50 else []
        room = width - sum(len(text) for text, _ in (*spans, *rip)) - 2
        line = (*spans, *rip, (" " + cut(entry.name, room), "text"))
        if index != self.cursor or not self.has_focus:
            return line
        filled = (*line, (" " * width, ""))
        return tuple((text, f"cursor {style}".strip()) for text, style in filled)

    def on_click(self, event: events.Click) -> None:
        index = event.y - 1 + self._first(self.size.height)
        if event.y >= 1 and index < len(self.entries):
            self.cursor = index
            self.redraw()
            if event.chain == 2:
                self.action_choose()
