"""Textual's command palette, with two faults of 8.2 kept away: paging through a list not laid out yet is a KeyError,
and two Enters close two screens, or the app where there is only one.
"""

from __future__ import annotations

from textual.await_complete import AwaitComplete
from textual.command import CommandList, CommandPalette


class Palette(CommandPalette):
    """The palette; moves through its list once there is one to see, and closes once."""

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "command_list":
            return bool(self.query_one(CommandList).scrollable_content_region.width)
        return super().check_action(action, parameters)

    def dismiss(self, result: None = None) -> AwaitComplete:
        return super().dismiss(result) if self.is_current else AwaitComplete()
