"""The base of panes that show what lies at addresses: a cursor that keys move, and a title."""

from __future__ import annotations

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.message import Message

from widgets.scrolled_pane import ScrolledPane


class AddressPane(ScrolledPane, can_focus=True):
    """Doesn't know what lies elsewhere: it says where a person wants to go, and is shown that."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move('row', -1)", "Up", show=False, id="address.up"),
        Binding("down,j", "move('row', 1)", "Down", show=False, id="address.down"),
        Binding("left,h", "move('byte', -1)", "Left", show=False, id="address.left"),
        Binding("right,l", "move('byte', 1)", "Right", show=False, id="address.right"),
        Binding("pageup", "move('page', -1)", "A page up", show=False, id="address.page_up"),
        Binding("pagedown", "move('page', 1)", "A page down", show=False, id="address.page_down"),
    ]

    class Moved(Message):
        """The cursor is to move by so many bytes, rows or pages of rows: ``unit`` is byte, row or page."""

        def __init__(self, pane: AddressPane, unit: str, by: int) -> None:
            super().__init__()
            self.pane, self.unit, self.by = pane, unit, by

        @property
        def control(self) -> AddressPane:
            return self.pane

    class Pointed(Message):
        """This address was clicked."""

        def __init__(self, pane: AddressPane, address: int) -> None:
            super().__init__()
            self.pane, self.address = pane, address

        @property
        def control(self) -> AddressPane:
            return self.pane

    @property
    def base(self) -> str:
        """The title bar's style: the pane with the keyboard stands out."""
        return "bar selected" if self.has_focus else "bar"

    def action_move(self, unit: str, by: int) -> None:
        self.post_message(self.Moved(self, unit, by))

    def action_scroll_by(self, rows: int) -> None:
        self.action_move("row", rows)
