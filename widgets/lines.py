"""Lines to read: as many as there are, scrolled, under a title."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.binding import Binding, BindingType

from widgets.line_pane import Line, Span, bar
from widgets.scrolled_pane import ScrolledPane


class LinesPane(ScrolledPane, can_focus=True):
    """Shows what it's given; ``keys`` are what the title says of keys, as (key, word)."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "scroll_by(-1)", "Up", show=False, id="lines.up"),
        Binding("down,j", "scroll_by(1)", "Down", show=False, id="lines.down"),
        Binding("pageup", "scroll_pages(-1)", "A page up", show=False, id="lines.page_up"),
        Binding("pagedown,space", "scroll_pages(1)", "A page down", show=False, id="lines.page_down"),
        Binding("home,g", "scroll_by(-1000000000)", "Top", show=False, id="lines.home"),
        Binding("end,G", "scroll_by(1000000000)", "End", show=False, id="lines.end"),
    ]

    def __init__(self, title: str, keys: Sequence[tuple[str, str]], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._heading = title
        self._keys = keys
        self._content: Sequence[Line] = ()
        self._top = 0

    def show(self, content: Sequence[Line], title: str = "") -> None:
        """Draw these lines; what is at the top stays there."""
        self._heading = title or self._heading
        self._content = content
        self.action_scroll_by(0)

    def action_scroll_by(self, rows: int) -> None:
        most = max(len(self._content) - self.size.height + 1, 0)
        self._top = min(max(self._top + rows, 0), most)
        self.redraw()

    def action_scroll_pages(self, pages: int) -> None:
        self.action_scroll_by(pages * max(self.size.height - 2, 1))

    def lines(self, width: int, height: int) -> Sequence[Line]:
        right: list[list[Span]] = [[(key, "strong"), (f" {word}", "label")] for key, word in self._keys]
        if len(self._content) > height - 1:
            last = min(self._top + height - 1, len(self._content))
            right.append([(f"{self._top + 1}–{last} of {len(self._content)}", "label")])
        title = bar([(f" {self._heading} ", "strong")], right, width)
        return [title, *self._content[self._top : self._top + height - 1]]

    def on_resize(self) -> None:
        self.action_scroll_by(0)
