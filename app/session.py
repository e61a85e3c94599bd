"""The workstation on a machine, from its first frame until it's left or the process is told to end."""

from __future__ import annotations

import asyncio
import sys
from functools import partial

from app.bell import ENDING
from app.workstation import Workstation
from kvm.machine import Machine


def run(machine: Machine) -> int:
    """The process's exit code: the workstation's own, or 128 + the number of the signal that ended it."""
    return asyncio.run(_run(machine))


async def _run(machine: Machine) -> int:
    app = Workstation(machine, run=True)
    if sys.platform != "win32":
        from app.driver import Driver

        app.driver_class = Driver
    loop = asyncio.get_running_loop()
    for number in ENDING:
        loop.add_signal_handler(number, partial(app.exit, 128 + number, return_code=128 + number))
    await app.run_async()
    return app.return_code or 0
