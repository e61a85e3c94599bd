"""Textual's command palette, with a fault of 8.2 kept away: paging through a list not laid out yet is a KeyError."""

from __future__ import annotations

from textual.command import CommandList, CommandPalette


class Palette(CommandPalette):
    """The palette; moves through its list count only once there is one to see."""

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "command_list":
            return bool(self.query_one(CommandList).scrollable_content_region.width)
        return super().check_action(action, parameters)
