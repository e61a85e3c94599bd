"""Registers by the names that people type, and where they live in the substates."""

from __future__ import annotations

from collections.abc import MutableMapping

from kvm.errors import ConfigError
from kvm.x86.structs import GENERAL_REGISTERS, SEGMENT_REGISTERS, Regs, Segment, Sregs, Sregs2

_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
_SEGMENT_FIELDS = {"base": 64, "limit": 32, "selector": 16}
_TABLE_FIELDS = {"base": 64, "limit": 16}

WIDTHS: dict[str, int] = {
    **dict.fromkeys((*GENERAL_REGISTERS, "rip", "rflags", *_CONTROL), 64),
    **{f"{name}.{field}": bits for name in SEGMENT_REGISTERS for field, bits in _SEGMENT_FIELDS.items()},
    **{f"{name}.{field}": bits for name in ("gdt", "idt") for field, bits in _TABLE_FIELDS.items()},
}
"""Every register that can be edited, and its width in bits."""

_IN_REGS = {*GENERAL_REGISTERS, "rip", "rflags"}


def check(register: str, value: int) -> None:
    """Raise ConfigError unless the register exists and holds the value."""
    bits = WIDTHS.get(register)
    if bits is None:
        raise ConfigError(f"There is no register {register!r}. Known are: {', '.join(WIDTHS)}.")
    if not 0 <= value < 1 << bits:
        raise ConfigError(f"{value:#x} doesn't fit {register}, which has {bits} bits.")


def value(register: str, regs: Regs, sregs: Sregs | Sregs2) -> int:
    """What a register of ``WIDTHS`` holds."""
    name, _, field = register.partition(".")
    held = getattr(regs if name in _IN_REGS else sregs, name)
    return int(getattr(held, field) if field else held)


def write(copy: MutableMapping[str, bytes], register: str, value: int) -> None:
    """Set a register, checked before, in a VCPU's copy of its substates."""
    if register in _IN_REGS:
        regs = Regs.from_buffer_copy(copy["regs"])
        setattr(regs, register, value)
        copy["regs"] = bytes(regs)
        return
    kind = Sregs2 if len(copy["sregs"]) == len(bytes(Sregs2())) else Sregs
    sregs = kind.from_buffer_copy(copy["sregs"])
    name, _, field = register.partition(".")
    if field:
        part: Segment = getattr(sregs, name)
        setattr(part, field, value)
    else:
        setattr(sregs, name, value)
    copy["sregs"] = bytes(sregs)
