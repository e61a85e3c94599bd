"""The base of panes that show what lies at addresses: a cursor that keys move, and a title."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from textual.binding import Binding, BindingType
from textual.message import Message

from widgets.line_pane import Line, Span, bar
from widgets.scrolled_pane import ScrolledPane


@dataclass(frozen=True, slots=True)
class AddressFrame:
    """What the title says: ``where`` whose addresses these are, ``facts`` what else there is to know."""

    where: str = ""
    facts: tuple[str, ...] = ()
    note: str = ""
    """A warning: how old the registers are."""


Frame = TypeVar("Frame", bound=AddressFrame)


class AddressPane(ScrolledPane, Generic[Frame], can_focus=True):
    """Draws a frame. Doesn't know what lies elsewhere: it says where a person wants to go, and is shown that."""

    NAME: ClassVar[str]

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move('row', -1)", "Up", show=False, id="address.up"),
        Binding("down,j", "move('row', 1)", "Down", show=False, id="address.down"),
        Binding("left,h", "move('byte', -1)", "Left", show=False, id="address.left"),
        Binding("right,l", "move('byte', 1)", "Right", show=False, id="address.right"),
        Binding("pageup", "move('page', -1)", "A page up", show=False, id="address.page_up"),
        Binding("pagedown", "move('page', 1)", "A page down", show=False, id="address.page_down"),
    ]

    def __init__(self, empty: Frame, *, id: str | None = None) -> None:
        """``empty``: what is drawn at first."""
        super().__init__(id=id)
        self.frame = empty

    class Moved(Message):
        """The cursor is to move by so many bytes, rows or pages of rows: ``unit`` is byte, row or page."""

        def __init__(self, pane: AddressPane[Any], unit: str, by: int) -> None:
            super().__init__()
            self.pane, self.unit, self.by = pane, unit, by

        @property
        def control(self) -> AddressPane[Any]:
            return self.pane

    class Pointed(Message):
        """This address was clicked."""

        def __init__(self, pane: AddressPane[Any], address: int) -> None:
            super().__init__()
            self.pane, self.address = pane, address

        @property
        def control(self) -> AddressPane[Any]:
            return self.pane

    def show(self, frame: Frame) -> None:
        """Draw this from now on."""
        if frame != self.frame:
            self.frame = frame
            self.redraw()

    def title(self, width: int) -> Line:
        """The first line: the pane with the keyboard stands out."""
        frame = self.frame
        left: list[Span] = [(f" {self.NAME} ", "strong"), (f" {frame.where}", "rip")]
        if frame.note:
            left.append((f"  {frame.note}", "warn"))
        base = "bar selected" if self.has_focus else "bar"
        return bar(left, [[(fact, "label")] for fact in frame.facts], width, base)

    def action_move(self, unit: str, by: int) -> None:
        self.post_message(self.Moved(self, unit, by))

    def action_scroll_by(self, rows: int) -> None:
        self.action_move("row", rows)
