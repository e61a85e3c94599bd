"""A workstation under test, with its pilot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from textual.pilot import Pilot
from textual.widgets import Static
from textual.widgets._footer import FooterKey

from app.workstation import Workstation
from kvm.machine import Phase
from widgets.line_pane import LinePane
from widgets.vcpu_area import VcpuArea

LIMIT = 20.0
COUNT = bytes.fromhex("66 40 eb fc")
"""again: inc eax; jmp again"""

BOTH = pytest.mark.parametrize("system", ["software", pytest.param("kvm", marks=pytest.mark.kvm)], indirect=True)
"""What depends on the machine is tried on both backends, what is the app's own on the software one."""


class Desk:
    """What a person does, and what they see of it."""

    def __init__(self, app: Workstation, pilot: Pilot[int]) -> None:
        self.app, self.pilot, self.machine = app, pilot, app.machine

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the app go on until the condition holds; only a hang takes as long as LIMIT."""
        async with asyncio.timeout(LIMIT):
            while not condition():
                await self.pilot.pause(0.005)

    async def idle(self) -> None:
        """Until all operations are over and drawn."""
        await self.pilot.pause()
        await self.until(lambda: self.app.operations.shown is None and self.app.operations.idle)
        await self.pilot.pause()

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.idle()

    async def click(self, selector: str) -> None:
        assert await self.pilot.click(selector)
        await self.idle()

    @property
    def phase(self) -> Phase:
        return self.machine.status.phase

    @property
    def footer(self) -> dict[str, bool]:
        """What the footer offers: description and whether it can be used."""
        return {key.description: not key._disabled for key in self.app.query(FooterKey)}

    def text(self, of: type[LinePane]) -> str:
        pane = self.app.query_one(of)
        return "\n".join(pane.line_text(y) for y in range(pane.size.height))

    def pane(self, index: int = 0) -> str:
        pane = self.app.query_one(VcpuArea).panes[index]
        return "\n".join(pane.line_text(y) for y in range(pane.size.height))

    @property
    def said(self) -> str:
        """The prompt's second line."""
        return str(self.app.query_one("#prompt-help", Static).content)

    def rip(self, vcpu: int = 0) -> int:
        return int.from_bytes(self.machine.view(vcpu).regs[128:136], "little")
