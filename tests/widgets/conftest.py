from __future__ import annotations

import asyncio

import pytest
from textual._context import active_app

QUIET = 5
"""Turns of the event loop without a message: one that is being handled may bring the next."""


@pytest.fixture(autouse=True)
def wait_for_messages_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until an idle process, the pilot waits 20 ms at least, twice a key; these widgets do nothing but by a message."""

    async def until_quiet(*_: float) -> None:
        app, quiet = active_app.get(), 0
        while quiet < QUIET:
            await asyncio.sleep(0)
            said = any(pump.message_queue_size for pump in (app, *app.screen.walk_children(with_self=True)))
            quiet = 0 if said else quiet + 1

    monkeypatch.setattr("textual.app.wait_for_idle", until_quiet)
    monkeypatch.setattr("textual.pilot.wait_for_idle", until_quiet)
