"""Register text as QEMU's monitor prints it for ``info registers -a``, for tools that parse that.

Character for character what QEMU (7.2 and later, with KVM) says of the same state, but for its CR LF, here LF.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvm.x86.structs import (
    EVENT_VALID_SMM,
    MP_STATE_HALTED,
    DebugRegs,
    Fpu,
    MpState,
    Regs,
    Segment,
    Sregs,
    VcpuEvents,
    Xcrs,
    Xsave,
    unpack_cpuid,
)

_LMA = 1 << 10
_SEGMENTS = (("ES", "es"), ("CS", "cs"), ("SS", "ss"), ("DS", "ds"), ("FS", "fs"), ("GS", "gs"),
             ("LDT", "ldt"), ("TR", "tr"))  # fmt: skip
_ROWS_64 = (("rax", "rbx", "rcx", "rdx"), ("rsi", "rdi", "rbp", "rsp"), ("r8", "r9", "r10", "r11"),
            ("r12", "r13", "r14", "r15"))  # fmt: skip
_ROWS_32 = _ROWS_64[:2]
_FLAGS = (("D", 10), ("O", 11), ("S", 7), ("Z", 6), ("A", 4), ("P", 2), ("C", 0))

_SYSTEM_TYPES_32 = (
    "Reserved", "TSS16-avl", "LDT", "TSS16-busy", "CallGate16", "TaskGate", "IntGate16", "TrapGate16",
    "Reserved", "TSS32-avl", "Reserved", "TSS32-busy", "CallGate32", "Reserved", "IntGate32", "TrapGate32",
)  # fmt: skip
_SYSTEM_TYPES_64 = (
    "<hiword>", "Reserved", "LDT", "Reserved", "Reserved", "Reserved", "Reserved", "Reserved",
    "Reserved", "TSS64-avl", "Reserved", "TSS64-busy", "CallGate64", "Reserved", "IntGate64", "TrapGate64",
)  # fmt: skip

_SSE, _YMM, _OPMASK, _ZMM_HI256, _HI16_ZMM = 1, 2, 5, 6, 7
"""XSAVE's state components (SDM vol. 1, 13.1), bits of XCR0."""
_AVX_BITS = 1 << _SSE | 1 << _YMM
_AVX512_BITS = _AVX_BITS | 1 << _OPMASK | 1 << _ZMM_HI256 | 1 << _HI16_ZMM
_XSAVE_LEAF = 0xD
_OFFSETS = {_YMM: 576, _OPMASK: 1088, _ZMM_HI256: 1152, _HI16_ZMM: 1664}
"""Where Intel's processors have them; AMD's differ, and CPUID says so."""


def dump(copies: Sequence[Mapping[str, bytes]]) -> str:
    """The text for all VCPUs. ``copies``: each one's substates as raw structs, by their names in the substate table.

    What a kernel without the capability doesn't give (``xcrs``, ``debugregs``, ``events``) is at its reset value.
    A20 is always 1: KVM has no gate there.
    """
    return "".join(f"\nCPU#{index}\n{_vcpu(copy)}" for index, copy in enumerate(copies))


def _vcpu(copy: Mapping[str, bytes]) -> str:
    regs = Regs.from_buffer_copy(copy["regs"])
    sregs = Sregs.from_buffer_copy(copy["sregs"])  # kvm_sregs2 begins alike
    lma = bool(sregs.efer & _LMA)
    code64 = lma and bool(sregs.cs.l)
    protected = bool(sregs.cr0 & 1)
    lines = [
        *_general(regs, code64),
        _state_line(regs, sregs, copy, code64),
        *(_segment(label, getattr(sregs, name), code64, lma, protected) for label, name in _SEGMENTS),
        *_system(sregs, copy, lma),
        *_fpu(copy, code64),
    ]
    return "".join(line + "\n" for line in lines)


def _general(regs: Regs, code64: bool) -> Iterator[str]:
    for names in _ROWS_64 if code64 else _ROWS_32:
        if code64:
            yield " ".join(f"{name.upper():<3}={getattr(regs, name):016x}" for name in names)
        else:
            yield " ".join(f"E{name[1:].upper()}={_low(getattr(regs, name))}" for name in names)


def _state_line(regs: Regs, sregs: Sregs, copy: Mapping[str, bytes], code64: bool) -> str:
    """CPL is SS's DPL, as the processor has it; HLT is KVM's MP state, so that waiting for a SIPI isn't halted."""
    events = VcpuEvents.from_buffer_copy(copy["events"]) if "events" in copy else VcpuEvents()
    smm = events.smi_smm if events.flags & EVENT_VALID_SMM else 0
    halted = MpState.from_buffer_copy(copy["mp_state"]).mp_state == MP_STATE_HALTED
    flags = "".join(letter if regs.rflags >> bit & 1 else "-" for letter, bit in _FLAGS)
    position = f"RIP={regs.rip:016x} RFL=" if code64 else f"EIP={_low(regs.rip)} EFL="
    return (
        f"{position}{_low(regs.rflags)} [{flags}] CPL={sregs.ss.dpl} II={int(bool(events.interrupt_shadow))} "
        f"A20=1 SMM={int(bool(smm))} HLT={int(halted)}"
    )


def _segment(label: str, segment: Segment, code64: bool, lma: bool, protected: bool) -> str:
    present = segment.present and not segment.unusable
    attributes = (
        segment.type << 8 | segment.s << 12 | segment.dpl << 13 | bool(present) << 15
        | segment.avl << 20 | segment.l << 21 | segment.db << 22 | segment.g << 23
    )  # fmt: skip
    base = f"{segment.base:016x}" if code64 else _low(segment.base)
    line = f"{label:<3}={segment.selector:04x} {base} {segment.limit:08x} {attributes:08x}"
    if protected and present:
        line += f" DPL={segment.dpl} {_descriptor(segment, lma)}"
    return line


def _descriptor(segment: Segment, lma: bool) -> str:
    if not segment.s:
        return (_SYSTEM_TYPES_64 if lma else _SYSTEM_TYPES_32)[segment.type]
    if segment.type & 8:
        kind, letters = "CS64" if segment.l else "CS32" if segment.db else "CS16", "CRA"
    else:
        kind, letters = "DS  " if segment.db or lma else "DS16", "EWA"
    bits = "".join(letter if segment.type & bit else "-" for letter, bit in zip(letters, (4, 2, 1), strict=True))
    return f"{kind} [{bits}]"


def _system(sregs: Sregs, copy: Mapping[str, bytes], lma: bool) -> Iterator[str]:
    """Wide or not by EFER.LMA here, by the code segment elsewhere: QEMU's way. The debug registers' line ends in a
    space."""
    debug = (
        DebugRegs.from_buffer_copy(copy["debugregs"]) if "debugregs" in copy else DebugRegs(dr6=0xFFFF0FF0, dr7=0x400)
    )
    wide = (lambda value: f"{value:016x}") if lma else _low
    yield f"GDT=     {wide(sregs.gdt.base)} {sregs.gdt.limit:08x}"
    yield f"IDT=     {wide(sregs.idt.base)} {sregs.idt.limit:08x}"
    yield f"CR0={_low(sregs.cr0)} CR2={wide(sregs.cr2)} CR3={wide(sregs.cr3)} CR4={_low(sregs.cr4)}"
    yield "".join(f"DR{number}={value:016x} " for number, value in enumerate(debug.db))
    yield f"DR6={debug.dr6:016x} DR7={debug.dr7:016x}"
    yield f"EFER={sregs.efer:016x}"


@dataclass(frozen=True, slots=True)
class _Floats:
    """The x87 and vector registers, whichever struct they came in. ``st`` starts at the top of the x87 stack."""

    fcw: int
    fsw: int
    ftw: int
    mxcsr: int
    st: list[bytes]
    xmm: list[bytes]


def _fpu(copy: Mapping[str, bytes], code64: bool) -> Iterator[str]:
    """FPR is in stack order, ST(0) first: what KVM's structs hold, so what QEMU prints with KVM."""
    raw = copy.get("xsave", b"")
    if raw:
        xsave = Xsave.from_buffer_copy(raw)
        floats = _Floats(
            xsave.fcw, xsave.fsw, xsave.ftw, xsave.mxcsr, _registers(xsave, "st"), _registers(xsave, "xmm")
        )
    else:
        fpu = Fpu.from_buffer_copy(copy["fpu"])
        floats = _Floats(fpu.fcw, fpu.fsw, fpu.ftwx, fpu.mxcsr, _registers(fpu, "fpr"), _registers(fpu, "xmm"))
    yield (
        f"FCW={floats.fcw:04x} FSW={floats.fsw:04x} [ST={floats.fsw >> 11 & 7}] "
        f"FTW={floats.ftw:02x} MXCSR={floats.mxcsr:08x}"
    )
    values = [f"FPR{index}={_quads(st[:8])} {_number(st[8:10]):04x}" for index, st in enumerate(floats.st)]
    yield from _paired(values)
    xcr0 = Xcrs.from_buffer_copy(copy["xcrs"]).xcrs[0].value if "xcrs" in copy else 1
    if raw and xcr0 & _AVX_BITS == _AVX_BITS:
        yield from _extended(raw, _offsets(copy), floats.xmm, code64, avx512=xcr0 & _AVX512_BITS == _AVX512_BITS)
    else:
        count = 16 if code64 else 8
        yield from _paired([f"XMM{index:02}={_quads(xmm)}" for index, xmm in enumerate(floats.xmm[:count])])


def _extended(raw: bytes, offsets: Mapping[int, int], xmm: list[bytes], code64: bool, *, avx512: bool) -> Iterator[str]:
    """YMM, or opmask and ZMM registers: each put together from where XSAVE keeps its parts."""

    def part(component: int, index: int, size: int) -> bytes:
        start = offsets[component] + index * size
        return raw[start : start + size].ljust(size, b"\0")

    low = [half + part(_YMM, index, 16) for index, half in enumerate(xmm)]
    if not avx512:
        yield from (f"YMM{index:02}={_quads(ymm)}" for index, ymm in enumerate(low[: 16 if code64 else 8]))
        return
    masks = [f"Opmask{index:02}={_quads(part(_OPMASK, index, 8))}" for index in range(8)]
    yield from (" ".join(masks[start : start + 4]) for start in (0, 4))
    zmm = [half + part(_ZMM_HI256, index, 32) for index, half in enumerate(low)]
    zmm += [part(_HI16_ZMM, index, 64) for index in range(16)]
    yield from (f"ZMM{index:02}={_quads(value)}" for index, value in enumerate(zmm[: 32 if code64 else 8]))


def _offsets(copy: Mapping[str, bytes]) -> dict[int, int]:
    """Where the XSAVE area has each component: CPUID leaf 0xD, EBX of the component's subleaf."""
    told = {
        entry.index: entry.ebx
        for entry in (unpack_cpuid(copy["cpuid"]) if copy.get("cpuid") else ())
        if entry.function == _XSAVE_LEAF and entry.index in _OFFSETS and entry.ebx
    }
    return _OFFSETS | told


def _registers(struct: ctypes.Structure, name: str) -> list[bytes]:
    return [bytes(register) for register in getattr(struct, name)]


def _paired(values: list[str]) -> Iterator[str]:
    return (" ".join(values[start : start + 2]) for start in range(0, len(values), 2))


def _quads(raw: bytes) -> str:
    """A register as its 64-bit words, the highest first."""
    return " ".join(f"{_number(raw[start : start + 8]):016x}" for start in range(len(raw) - 8, -1, -8))


def _number(raw: bytes) -> int:
    return int.from_bytes(raw, "little")


def _low(value: int) -> str:
    return f"{value & 0xFFFFFFFF:08x}"
