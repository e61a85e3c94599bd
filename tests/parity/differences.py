"""Register texts taken apart, and the one table of what may differ between two machines that ran the same guest."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Fields = Mapping[str, str]
"""(VCPU).(name) → text; a segment's attributes and their reading by themselves."""

_SEGMENT = re.compile(r"^(ES|CS|SS|DS|FS|GS|LDT|TR) *=(\w{4}) (\w+) (\w{8}) (\w{8})(.*)$")
_FIELD = re.compile(r"(?:^| )(\[?\w+) *= *((?:[0-9a-f]+|\[[-A-Z]+\]| (?=[0-9a-f-]))+)")


def fields(text: str) -> dict[str, str]:
    """Every value in the text by its name. Raises ValueError for a line that has none."""
    found: dict[str, str] = {}
    vcpu = ""
    for line in text.splitlines():
        if not line:
            continue
        if line.startswith("CPU#"):
            vcpu = line[4:]
        elif match := _SEGMENT.match(line):
            name, *values = match.groups()
            for part, value in zip(("selector", "base", "limit", "attributes", "reading"), values, strict=True):
                found[f"{vcpu}.{name}.{part}"] = value
        else:
            values = _FIELD.findall(line)
            if not values:
                raise ValueError(f"no register in {line!r}")
            found.update((f"{vcpu}.{name.lstrip('[')}", value.strip()) for name, value in values)
    return found


def differing(ours: Fields, theirs: Fields) -> list[str]:
    """The names of the fields that aren't equal, or that only one has."""
    return [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]


@dataclass(frozen=True, slots=True)
class Difference:
    """``field`` (a regular expression, without the VCPU) may differ from ``theirs`` (an accelerator of QEMU's) where
    ``allowed`` says so, because of ``reason``. ``allowed`` is given the field's name, and ours and theirs."""

    field: str
    theirs: str
    reason: str
    allowed: Callable[[str, Fields, Fields], bool]

    def explains(self, name: str, accelerator: str, ours: Fields, theirs: Fields) -> bool:
        bare = name.partition(".")[2]
        return bool(re.fullmatch(self.field, bare)) and accelerator in self.theirs and self.allowed(name, ours, theirs)


def _at_reset(name: str, ours: Fields, theirs: Fields) -> bool:
    vcpu = name.partition(".")[0]
    return all(side[f"{vcpu}.EIP"] == "0000fff0" for side in (ours, theirs))


def _but_bits(mask: int) -> Callable[[str, Fields, Fields], bool]:
    return lambda name, ours, theirs: not (int(ours[name], 16) ^ int(theirs[name], 16)) & ~mask


def _busy(name: str, ours: Fields, theirs: Fields) -> bool:
    return ours[name].replace("busy", "avl") == theirs[name]


def _rotated(name: str, ours: Fields, theirs: Fields) -> bool:
    """Theirs, physical register n, is our ST(n - TOP)."""
    vcpu, _, register = name.partition(".")
    top = int(ours[f"{vcpu}.ST"])
    return theirs[name] == ours[f"{vcpu}.FPR{(int(register[3:]) - top) % 8}"]


DIFFERENCES = (
    Difference(
        "EDX", "kvm tcg", "after a reset EDX is the processor's own CPUID version (SDM vol. 3, table 10-1)", _at_reset
    ),
    Difference(
        "HLT", "tcg", "KVM tells waiting for a SIPI from HLT, QEMU's own processor calls both halted",
        lambda name, ours, theirs: _at_reset(name, ours, theirs) and name[0] != "0" and theirs[name] == "1",
    ),
    Difference(
        "[ECSDFG]S.attributes", "tcg", "bits 16-19 are the limit's, which the hidden part has elsewhere: KVM has none",
        _but_bits(0xF0000),
    ),
    Difference(
        "TR.attributes", "tcg", "LTR marks the task as busy (SDM vol. 2A): QEMU's does so in the GDT only",
        _but_bits(0x200),
    ),
    Difference("TR.reading", "tcg", "as above", _busy),
    Difference(
        "FPR[0-7]", "tcg", "KVM's structs, so QEMU with KVM too, begin at ST(0); QEMU's own processor at R0", _rotated
    ),
)  # fmt: skip
"""Everything else is equal."""
