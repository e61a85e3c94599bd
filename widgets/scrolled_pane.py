"""The base of panes that show a part of their lines, which the mouse's wheel moves."""

from __future__ import annotations

from textual import events

from widgets.line_pane import LinePane

WHEEL = 3
"""Rows that a notch of the wheel moves."""


class ScrolledPane(LinePane):
    """Subclasses move what they show in ``action_scroll_by``."""

    def action_scroll_by(self, rows: int) -> None:
        """Show what is so many rows further down, or up if negative; no further than to the end."""
        raise NotImplementedError

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        event.stop()
        self.action_scroll_by(-WHEEL)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        event.stop()
        self.action_scroll_by(WHEEL)
