"""In what two VCPUs' registers differ, from KVM's structs: name → (the one's value, the other's)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache

from kvm.x86 import msrs
from kvm.x86.structs import GENERAL_REGISTERS, SEGMENT_REGISTERS, DebugRegs, Regs, Sregs, Xsave, unpack_msrs

Values = dict[str, tuple[int, int]]

_IGNORED_FLAGS = 1 << 8 | 1 << 16
"""TF and RF: a debugger's single step sets them."""
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")
_SEGMENT_FIELDS = ("base", "limit", "selector", "type", "present", "dpl", "db", "s", "l", "g", "unusable")
_NULL_STACK_FIELDS = ("selector", "dpl")
"""What means something in an SS that 64-bit code has loaded with a null selector; KVM's emulator makes that usable."""
_LMA = 1 << 10
_STACK_TOP = 7 << 11
"""Of x87's status word: most instructions leave its condition codes undefined."""
_STICKY = 0x3F
"""MXCSR's exception flags: emulators don't raise them all."""


def regs(one: Regs, two: Regs) -> Values:
    """General registers, RIP and flags."""
    if bytes(one) == bytes(two):
        return {}
    pairs = {name: (getattr(one, name), getattr(two, name)) for name in (*GENERAL_REGISTERS, "rip")}
    pairs["rflags"] = one.rflags & ~_IGNORED_FLAGS, two.rflags & ~_IGNORED_FLAGS
    return _differing(pairs)


def sregs(one: Sregs, two: Sregs) -> Values:
    """Control registers, descriptor tables, segments with their hidden parts. Few instructions change any of them."""
    return dict(_sregs(bytes(one), bytes(two)))


@lru_cache(64)
def _sregs(one: bytes, two: bytes) -> Values:
    mine, theirs = Sregs.from_buffer_copy(one), Sregs.from_buffer_copy(two)
    pairs = {name: (getattr(mine, name), getattr(theirs, name)) for name in _CONTROL}
    for name in ("gdt", "idt"):
        for part in ("base", "limit"):
            pairs[f"{name}.{part}"] = getattr(getattr(mine, name), part), getattr(getattr(theirs, name), part)
    for name in SEGMENT_REGISTERS:
        segments = getattr(mine, name), getattr(theirs, name)
        if all(segment.unusable for segment in segments):
            continue  # an unusable segment's attributes mean nothing
        null = name == "ss" and mine.efer & _LMA and not any(segment.selector & ~3 for segment in segments)
        for part in _NULL_STACK_FIELDS if null else _SEGMENT_FIELDS:
            pairs[f"{name}.{part}"] = getattr(segments[0], part), getattr(segments[1], part)
    return _differing(pairs)


def others(one: Mapping[str, bytes], two: Mapping[str, bytes], but: Collection[int]) -> Values:
    """Of two VCPUs' substates: x87, SSE, debug registers and MSRs that both have; of these not the ones in ``but``."""
    mine, theirs = _others(one, but), _others(two, but)
    return _differing({name: (mine[name], theirs[name]) for name in mine if name in theirs})


def _others(state: Mapping[str, bytes], but: Collection[int]) -> dict[str, int]:
    found = {
        f"MSR {msrs.NAMES.get(index, hex(index))}": value
        for index, value in unpack_msrs(state["msrs"]).items()
        if index not in but
    }
    if "xsave" in state:
        area = Xsave.from_buffer_copy(state["xsave"])
        found |= {"fcw": area.fcw, "fsw": area.fsw & _STACK_TOP, "ftw": area.ftw, "mxcsr": area.mxcsr & ~_STICKY}
        found |= {f"st{number}": int.from_bytes(bytes(area.st[number])[:10], "little") for number in range(8)}
        found |= {f"xmm{number}": int.from_bytes(bytes(area.xmm[number]), "little") for number in range(16)}
    if "debugregs" in state:
        debug = DebugRegs.from_buffer_copy(state["debugregs"])
        found |= {"dr6": debug.dr6, "dr7": debug.dr7, **{f"dr{number}": debug.db[number] for number in range(4)}}
    return found


def _differing(pairs: Values) -> Values:
    return {name: values for name, values in pairs.items() if values[0] != values[1]}
