"""The VMCOREINFO note: what a Linux guest has offered through fw_cfg, for crash, drgn and readelf.

As QEMU's dump has it: what lies at the guest's address is an ELF note, and goes into the core as it is.
"""

from __future__ import annotations

import numpy as np

from kvm.backends.interface import PAGE_SIZE
from kvm.devices import fw_cfg
from kvm.snapshot import core
from kvm.snapshot.contents import Contents
from kvm.snapshot.state import MachineState
from kvm.x86 import layout


def offered(state: MachineState, contents: Contents, memory: int) -> bytes:
    """The guest's text, of a machine with ``memory`` bytes of RAM; empty if it has offered none, or nonsense."""
    place = fw_cfg.offered(state.devices.get(fw_cfg.NAME, b""))
    if place is None:
        return b""
    try:
        owner, kind, text = next(core.notes(_read(contents, memory, *place)))
    except (StopIteration, ValueError):
        return b""
    return text if (owner, kind) == (core.VMCOREINFO, core.VMCOREINFO_TYPE) else b""


def _read(contents: Contents, memory: int, address: int, size: int) -> bytes:
    """RAM as it was at that moment; nothing if it doesn't lie in one range."""
    first = 0
    for start, length in layout.ram(memory):
        if start <= address and address + size <= start + length:
            at = first * PAGE_SIZE + address - start
            pages = contents.index[at // PAGE_SIZE : -(-(at + size) // PAGE_SIZE)]
            raw = contents.read(pages, np.empty((len(pages), PAGE_SIZE), np.uint8)).reshape(-1)
            return raw[at % PAGE_SIZE : at % PAGE_SIZE + size].tobytes()
        first += length // PAGE_SIZE
    return b""
