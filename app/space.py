"""An address space to look at: a VCPU's linear one, through its page tables, or the physical one."""

from __future__ import annotations

from dataclasses import dataclass

from kvm.machine import Machine
from kvm.x86 import paging
from kvm.x86.structs import Sregs

PAGE = paging.PAGE


@dataclass(frozen=True, slots=True)
class Page:
    """The page at ``address``. ``physical``: None where it isn't mapped. ``data``: empty where unreadable, ``why``."""

    address: int
    physical: int | None
    data: bytes
    why: str


@dataclass(frozen=True, slots=True)
class Space:
    """``sregs`` are the VCPU's; None: the physical space. A look races with a guest that runs."""

    machine: Machine
    sregs: Sregs | None

    @property
    def bits(self) -> int:
        """How many bits its addresses have; those that the VCPU's mode doesn't know can be looked at, and are none."""
        return paging.PHYSICAL_BITS if self.sregs is None else 64

    def physical(self, address: int) -> int | None:
        """Where an address is in physical memory; None if it isn't mapped."""
        return address if self.sregs is None else paging.translate(self.sregs, address, self.machine.memory.peek)

    def page(self, address: int) -> Page:
        """The page in which ``address`` lies, as it is now."""
        start = address - address % PAGE
        physical = self.physical(start)
        if physical is None:
            return Page(start, None, b"", self._why_not(start))
        data = self.machine.memory.peek(physical, PAGE)
        return Page(start, physical, data, "" if data else "no memory")

    def _why_not(self, address: int) -> str:
        if self.sregs is None or paging.is_linear(self.sregs, address):
            return "not mapped"
        bits = paging.linear_bits(self.sregs)
        return "not canonical" if bits == 64 else f"not an address: VCPU in a {bits}-bit mode"

    def read(self, address: int, size: int) -> bytes:
        """Up to ``size`` bytes: as far as they are mapped and there is memory."""
        data = b""
        while len(data) < size and not (address + len(data)) >> self.bits:
            at = address + len(data)
            page = self.page(at)
            if not page.data:
                break
            data += page.data[at % PAGE :][: size - len(data)]
        return data
