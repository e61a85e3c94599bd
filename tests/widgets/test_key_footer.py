"""The footer: what it shows, and that nothing is done where that stays."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets._footer import FooterKey

from widgets.key_footer import KeyFooter


class Keys(App[None]):
    BINDINGS: ClassVar[list[BindingType]] = [Binding("a", "act", "Act"), Binding("b", "other", "Other")]
    usable: bool | None = True

    def compose(self) -> ComposeResult:
        yield KeyFooter()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return self.usable if action == "act" else True


async def anew(footer: KeyFooter) -> None:
    """As Textual asks for it: in the footer's own time."""
    done = asyncio.Event()

    async def recompose() -> None:
        await footer.recompose()
        done.set()

    footer.call_later(recompose)
    await done.wait()


async def test_it_is_built_anew_only_where_it_shows_something_else() -> None:
    app = Keys()
    async with app.run_test() as pilot, asyncio.timeout(20):
        while not (keys := list(app.query(FooterKey))):
            await pilot.pause(0.005)
        assert [(key.description, key._disabled, key.has_class("-compact")) for key in keys] == [
            ("Act", False, True),
            ("Other", False, True),
        ]
        footer = app.query_one(KeyFooter)
        await anew(footer)
        assert list(app.query(FooterKey)) == keys, "the same widgets"
        for usable, shown in ((None, {"Act": True, "Other": False}), (False, {"Other": False})):
            app.usable = usable
            await anew(footer)
            assert {key.description: key._disabled for key in app.query(FooterKey)} == shown


async def test_one_that_is_gone_stays_so() -> None:
    """Textual asks for it after the next refresh: its screen may be closed by then."""
    app = Keys()
    async with app.run_test():
        footer = app.query_one(KeyFooter)
        await footer.remove()
        await footer.recompose()
