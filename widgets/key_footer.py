"""The footer: what the keys do now."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.binding import Binding
from textual.widgets import Footer


class KeyFooter(Footer):
    """Textual's, but built anew only where it would show something else: every key in it is a widget, and each change
    of focus asks for all of them."""

    def __init__(self) -> None:
        super().__init__(show_command_palette=False, compact=True)
        self._shown: list[tuple[Binding, bool, str]] = []

    def _to_show(self) -> list[tuple[Binding, bool, str]]:
        return [(key, usable, tip) for _, key, usable, tip in self.screen.active_bindings.values() if key.show]

    def compose(self) -> ComposeResult:
        shows, self._shown = self._to_show(), []
        for key in super().compose():  # none at first, whatever there will be to show
            self._shown = shows
            key.add_class("-compact", update=False)  # later, as Textual does it, each would be styled twice
            yield key

    async def recompose(self) -> None:
        if self.is_attached and self._to_show() != self._shown:
            await super().recompose()
