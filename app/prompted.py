"""The base of screens that ask for a line of text."""

from __future__ import annotations

from typing import ClassVar

from textual.screen import Screen


class PromptedScreen(Screen[None]):
    """Has a Prompt; keys that its panes don't take act at once (Workstation.on_event)."""

    FOCUSED: ClassVar[tuple[str, ...]] = ()
    """The ids of the panes that can have the keyboard."""
