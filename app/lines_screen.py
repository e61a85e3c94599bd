"""A screen of lines to read, over the workstation: what differs, what a load would lose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen

from widgets.line_pane import Line
from widgets.lines import LinesPane


class LinesScreen(ModalScreen[bool]):
    """Its result: True for Enter where ``agree`` says what that does, else False."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "leave(True)", "Agree", id="lines.agree"),
        Binding("escape,q,d", "leave(False)", "Close", id="lines.close"),
    ]

    def __init__(self, title: str, lines: Sequence[Line], *, agree: str = "") -> None:
        super().__init__()
        self._agree = agree
        keys = [("⏎", agree)] * bool(agree) + [("esc", "close")]
        self._pane = LinesPane(title, keys, id="lines")
        self._lines = lines

    def compose(self) -> ComposeResult:
        yield self._pane

    def on_mount(self) -> None:
        self._pane.show(self._lines)
        self._pane.focus()

    def action_leave(self, agreed: bool) -> None:
        self.dismiss(agreed and bool(self._agree))
