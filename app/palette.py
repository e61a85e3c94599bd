"""Textual's command palette, with two faults of 8.2 kept away: paging through a list not laid out yet is a KeyError,
and two Enters close two screens, or the app where there is only one, and do what was chosen twice.
"""

from __future__ import annotations

from textual import on
from textual.await_complete import AwaitComplete
from textual.command import CommandList, CommandPalette
from textual.widgets import Input, OptionList


class Palette(CommandPalette):
    """The palette; moves through its list once there is one to see, does one thing, and closes once."""

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "command_list":
            return bool(self.query_one(CommandList).scrollable_content_region.width)
        return super().check_action(action, parameters)

    def dismiss(self, result: None = None) -> AwaitComplete:
        return super().dismiss(result) if self.is_current else AwaitComplete()

    @on(Input.Submitted)
    @on(OptionList.OptionSelected)
    def _choose_once(self, event: Input.Submitted | OptionList.OptionSelected) -> None:
        """What was chosen has closed it already: a second Enter may come before the first one's choice is heard of."""
        if not self.is_current:
            event.stop()
            event.prevent_default()
