"""What a VCPU's pane draws: one frozen value, and which of its registers changed since when."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kvm.x86.disasm import Instruction
from kvm.x86.structs import GENERAL_REGISTERS, SEGMENT_REGISTERS

_REGS = struct.Struct("<18Q")
_SREGS = struct.Struct("<24s24s24s24s24s24s24s24s16s16s7Q")
NAMES = (
    *GENERAL_REGISTERS, "rip", "rflags",
    *SEGMENT_REGISTERS, "gdt", "idt", "cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base",
)  # fmt: skip
"""All registers that a frame shows, in the order of struct kvm_regs and kvm_sregs."""

HOLD_NS = 400_000_000
"""How long a register stays marked while the guest runs: long enough to see, short enough to follow."""


@dataclass(frozen=True, slots=True)
class VcpuFrame:
    """One VCPU as it's drawn. ``regs`` and ``sregs`` are struct kvm_regs and kvm_sregs, empty while unknown."""

    index: int
    activity: str = ""
    """running, halted, wait-for-SIPI or stopped; empty while unknown."""
    reason: str = ""
    """Why it stopped."""
    dirty: bool = False
    """True: the user copy owns the registers. False: the kernel does."""
    last_put: str = ""
    """The last writeback level, empty if there was none."""
    regs: bytes = b""
    sregs: bytes = b""
    insn: Instruction | None = None
    """The instruction at RIP, if its memory can be read."""
    changed: frozenset[str] = frozenset()
    age: int = 0
    """Whole seconds since the values were read, 0 while they're fresh."""


class Changes:
    """Which registers changed: while the guest runs, a moment ago; while it stands, since it stood before."""

    def __init__(self) -> None:
        self._regs = self._sregs = b""
        self._values: tuple[object, ...] = ()
        self._before: tuple[object, ...] = ()
        self._changed_ns: dict[str, int] = {}

    def settle(self) -> None:
        """Something is about to be done with the machine: what is shown now is what the next values compare to."""
        self._before = self._values
        self._changed_ns.clear()

    def observe(self, regs: bytes, sregs: bytes, *, running: bool, now_ns: int) -> frozenset[str]:
        """Take the newest values; the names to mark."""
        if (regs != self._regs or sregs != self._sregs) and regs and sregs:
            values = (*_REGS.unpack(regs), *_SREGS.unpack_from(sregs))
            for name, old, new in zip(NAMES, self._values, values, strict=False):
                if old != new:
                    self._changed_ns[name] = now_ns
            self._regs, self._sregs, self._values = regs, sregs, values
        if running:
            return frozenset(name for name, at in self._changed_ns.items() if now_ns - at < HOLD_NS)
        pairs = zip(NAMES, self._before, self._values, strict=False)
        return frozenset(name for name, old, new in pairs if old != new)
