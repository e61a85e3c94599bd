"""A state from another backend, kernel or processor, made one that this machine can take.

What can be carried is; what can't is a line for the person, who decides.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence

from kvm.snapshot.state import MachineState
from kvm.x86 import msrs
from kvm.x86.structs import (
    SREGS_HEAD,
    Fpu,
    Sregs2,
    Xcrs,
    Xsave,
    pack_msrs,
    unpack_cpuid,
    unpack_msrs,
)
from kvm.x86.substates import Substate, Table

Copy = Mapping[str, bytes]
Tell = Callable[[str], None]

_MSR_ROWS = ("msrs", "msrs_reset", "tsc_deadline")
_XSAVE_HEADER_END = 576
_FXSAVE_AND_HEADER = 3
"""XSTATE_BV's x87 and SSE bits: all that FXSAVE has."""
_PDPTRS_VALID = 1
_U64 = (1 << 64) - 1

_FEATURES = {
    (1, 0, "ecx"): {0: "sse3", 1: "pclmulqdq", 3: "monitor", 9: "ssse3", 12: "fma", 13: "cx16", 17: "pcid",
        19: "sse4.1", 20: "sse4.2", 21: "x2apic", 22: "movbe", 23: "popcnt", 24: "tsc-deadline", 25: "aes",
        26: "xsave", 28: "avx", 29: "f16c", 30: "rdrand"},
    (1, 0, "edx"): {1: "vme", 7: "mce", 14: "mca", 27: "ss", 28: "htt"},
    (7, 0, "ebx"): {0: "fsgsbase", 1: "tsc-adjust", 3: "bmi1", 4: "hle", 5: "avx2", 7: "smep", 8: "bmi2", 9: "erms",
        10: "invpcid", 11: "rtm", 16: "avx512f", 18: "rdseed", 19: "adx", 20: "smap", 23: "clflushopt", 24: "clwb",
        29: "sha"},
    (7, 0, "ecx"): {2: "umip", 3: "pku", 8: "gfni", 9: "vaes", 16: "la57", 22: "rdpid", 25: "cldemote",
        27: "movdiri", 28: "movdir64b"},
    (7, 0, "edx"): {4: "fsrm", 26: "spec-ctrl", 27: "stibp", 29: "arch-capabilities", 31: "ssbd"},
    (0x80000001, 0, "ecx"): {0: "lahf", 5: "abm", 8: "prefetchw"},
    (0x80000001, 0, "edx"): {11: "syscall", 20: "nx", 26: "1g-pages", 27: "rdtscp", 29: "lm"},
}  # fmt: skip
"""The CPUID words that say what a processor can do, by leaf, subleaf and register; names for what guests ask for."""


def fit(
    state: MachineState,
    table: Table,
    machine_rows: Sequence[Substate],
    fresh: MachineState,
    *,
    ran: bool,
) -> tuple[MachineState, tuple[str, ...]]:
    """The state in this machine's rows, and what it loses.

    ``fresh`` is what the machine held when it was new: the value of what the state doesn't have, be it a device that
    vmdeck hadn't yet. ``ran``: the machine has run, so that its CPUID stands. Raises ValueError for a struct that can't
    be read.
    """
    losses: dict[str, list[int]] = {}
    tsc = _msrs(state.vcpus[0]).get(msrs.TSC, 0)
    vcpus = []
    for index, (copy, new) in enumerate(zip(state.vcpus, fresh.vcpus, strict=True)):

        def tell(loss: str, index: int = index) -> None:
            losses.setdefault(loss, []).append(index)

        vcpus.append(_vcpu(copy, table, new, ran, tsc, tell))
    told = [f"{loss} ({_numbers(who)})" for loss, who in losses.items()]
    machine = {row.name: state.machine.get(row.name, fresh.machine[row.name]) for row in machine_rows}
    told += [f"{name}: this backend has none" for name in state.machine if name not in machine]
    return MachineState(tuple(vcpus), machine, {**fresh.devices, **state.devices}), tuple(told)


def _vcpu(copy: Copy, table: Table, new: Copy, ran: bool, tsc_of_first: int, tell: Tell) -> dict[str, bytes]:
    values = _msrs(copy)
    apart = values.get(msrs.TSC, 0) - tsc_of_first
    result = {}
    for row in table.put_order:
        if row.name == "cpuid":
            result["cpuid"] = _cpuid(copy.get("cpuid", b""), new["cpuid"], ran, tell)
        elif row.name in _MSR_ROWS:
            known = unpack_msrs(new[row.name])
            result[row.name] = pack_msrs({index: values.pop(index, value) for index, value in known.items()})
        elif row.name == "sregs":
            result["sregs"] = _sregs(copy["sregs"], len(row.template), tell)
        elif row.name in ("xsave", "fpu"):
            result[row.name] = _fpu(copy, row, new[row.name], tell)
        elif row.name == "tsc_offset":
            result[row.name] = copy.get(row.name) or _tsc_offset(apart)
        else:
            result[row.name] = copy.get(row.name, new[row.name])
    for index, value in values.items():
        if value:
            tell(f"MSR {msrs.NAMES.get(index, hex(index))} = {value:#x}: this backend has no such register")
    for name, raw in copy.items():
        if name not in result and (loss := _LOSSES.get(name, _any)(raw)):
            tell(f"{name}: {loss}")
    return result


def _msrs(copy: Copy) -> dict[int, int]:
    return {index: value for name in _MSR_ROWS if name in copy for index, value in unpack_msrs(copy[name]).items()}


def _tsc_offset(apart: int) -> bytes:
    """For a state without: how far a TSC is from VCPU 0's. Below about a second that's the time between the two reads,
    as KVM itself takes it (kvm/x86/tsc.py)."""
    return (apart & _U64 if abs(apart) >> 32 else 0).to_bytes(8, "little")


def _xcrs(raw: bytes) -> str:
    """XCR0 = 1 (x87 only) is what a VCPU without XSAVE amounts to."""
    xcrs = Xcrs.from_buffer_copy(raw)
    values = [xcr.value for xcr in xcrs.xcrs[: xcrs.nr_xcrs]]
    return "" if all(value == 1 for value in values) else "this backend has no XCR0, so no AVX"


def _tsc_khz(raw: bytes) -> str:
    return f"{int.from_bytes(raw, 'little') / 1000:g} MHz: this backend's TSC runs at its own speed"


def _nothing(raw: bytes) -> str:
    return ""


def _any(raw: bytes) -> str:
    return "this backend has none" if any(raw) else ""


_LOSSES: dict[str, Callable[[bytes], str]] = {
    "xcrs": _xcrs, "tsc_khz": _tsc_khz,
    "xsave": _nothing, "fpu": _nothing,  # the one becomes the other
    "tsc_offset": _nothing,  # the TSC's MSR says it too, but for the time between two reads
    **dict.fromkeys(_MSR_ROWS, _nothing),  # told MSR by MSR
}  # fmt: skip
"""What it means that this machine has no row for a substate; others matter unless they are all zeros."""


def _sregs(raw: bytes, size: int, tell: Tell) -> bytes:
    if len(raw) == size:
        return raw
    if len(raw) == ctypes.sizeof(Sregs2):
        if Sregs2.from_buffer_copy(raw).flags & _PDPTRS_VALID:
            tell("PAE PDPTRs: this backend reads them from memory again, where the guest may have changed them")
    elif any(raw[SREGS_HEAD:]):
        tell("sregs.interrupt_bitmap: this backend has the interrupt controllers in it")
    return raw[:SREGS_HEAD] + bytes(size - SREGS_HEAD)


def _fpu(copy: Copy, row: Substate, new: bytes, tell: Tell) -> bytes:
    size = len(row.template)
    if row.name in copy and len(copy[row.name]) == size:
        return copy[row.name]
    if row.name == "xsave":
        if "xsave" not in copy:
            return _to_xsave(copy["fpu"]).ljust(size, b"\0") if "fpu" in copy else new
        raw = copy["xsave"]
        if any(raw[size:]):
            tell(f"xsave: {len(raw)} bytes of processor state, this backend has {size}")
        return raw[:size].ljust(size, b"\0")
    if "xsave" not in copy:
        return new
    if Xsave.from_buffer_copy(copy["xsave"]).xstate_bv & ~_FXSAVE_AND_HEADER:
        tell("xsave: AVX and beyond, this backend has x87 and SSE only")
    return _to_fpu(copy["xsave"])


def _to_fpu(raw: bytes) -> bytes:
    xsave, fpu = Xsave.from_buffer_copy(raw), Fpu()
    fpu.fcw, fpu.fsw, fpu.ftwx, fpu.mxcsr = xsave.fcw, xsave.fsw, xsave.ftw, xsave.mxcsr
    fpu.last_opcode, fpu.last_ip, fpu.last_dp = xsave.fop, xsave.fip, xsave.fdp
    fpu.fpr, fpu.xmm = xsave.st, xsave.xmm
    return bytes(fpu)


def _to_xsave(raw: bytes) -> bytes:
    fpu, xsave = Fpu.from_buffer_copy(raw), Xsave()
    xsave.fcw, xsave.fsw, xsave.ftw, xsave.mxcsr = fpu.fcw, fpu.fsw, fpu.ftwx, fpu.mxcsr
    xsave.fop, xsave.fip, xsave.fdp = fpu.last_opcode, fpu.last_ip, fpu.last_dp
    xsave.st, xsave.xmm, xsave.xstate_bv = fpu.fpr, fpu.xmm, _FXSAVE_AND_HEADER
    return bytes(xsave)


def _cpuid(saved: bytes, own: bytes, ran: bool, tell: Tell) -> bytes:
    """The saved one where this backend can keep its promises."""
    if saved == own or len(saved) < 8:
        return own
    lost = [
        f"CPUID {leaf:#x}{f'.{subleaf}' if leaf == 7 else ''} {register.upper()}: {_bits(gone, names)}"
        for (leaf, subleaf, register), names in _FEATURES.items()
        if (gone := _word(saved, leaf, subleaf, register) & ~_word(own, leaf, subleaf, register))
    ]
    for loss in lost:
        tell(f"{loss}: this backend has none of it")
    if lost or not ran:
        return own if lost else saved
    tell("CPUID: the guest of this machine has run, so what it was told stands. Use vmdeck run --restore")
    return own


def _word(raw: bytes, leaf: int, subleaf: int, register: str) -> int:
    for entry in unpack_cpuid(raw):
        if entry.function == leaf and (entry.index == subleaf or not entry.flags & 1):
            return int(getattr(entry, register))
    return 0


def _bits(word: int, names: Mapping[int, str]) -> str:
    return " ".join(names.get(bit, f"bit {bit}") for bit in range(32) if word >> bit & 1)


def _numbers(vcpus: Sequence[int]) -> str:
    return f"VCPU {vcpus[0]}" if len(vcpus) == 1 else f"VCPUs {', '.join(map(str, vcpus))}"
