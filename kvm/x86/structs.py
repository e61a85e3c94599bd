"""KVM's x86 structs (Linux ``arch/x86/include/uapi/asm/kvm.h``), byte for byte.

State travels between backends, copies and snapshots as the bytes of these structs, so a state saved by
one backend opens in the other. Decode with ``Regs.from_buffer_copy(raw)``, encode with ``bytes(regs)``.
All integers are little-endian, as on the only architecture that has them.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Mapping

_U8, _U16, _U32, _U64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64

GENERAL_REGISTERS = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
SEGMENT_REGISTERS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")


class Regs(ctypes.LittleEndianStructure):
    """``struct kvm_regs``, 144 bytes."""

    _fields_ = [(name, _U64) for name in (*GENERAL_REGISTERS, "rip", "rflags")]
    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    rsp: int
    rbp: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rip: int
    rflags: int


class Segment(ctypes.LittleEndianStructure):
    """``struct kvm_segment``, 24 bytes: a segment register with its hidden part."""

    _fields_ = [
        ("base", _U64), ("limit", _U32), ("selector", _U16), ("type", _U8), ("present", _U8),
        ("dpl", _U8), ("db", _U8), ("s", _U8), ("l", _U8), ("g", _U8), ("avl", _U8),
        ("unusable", _U8), ("padding", _U8),
    ]  # fmt: skip
    base: int
    limit: int
    selector: int
    type: int
    present: int
    dpl: int
    db: int
    s: int
    l: int  # noqa: E741 - the kernel's name
    g: int
    avl: int
    unusable: int
    padding: int


class Dtable(ctypes.LittleEndianStructure):
    """``struct kvm_dtable``, 16 bytes: GDTR or IDTR."""

    _fields_ = [("base", _U64), ("limit", _U16), ("padding", _U16 * 3)]
    base: int
    limit: int


_SREGS_HEAD = [
    *((name, Segment) for name in SEGMENT_REGISTERS),
    ("gdt", Dtable), ("idt", Dtable),
    *((name, _U64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
]  # fmt: skip


class _SregsHead(ctypes.LittleEndianStructure):
    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: Dtable
    idt: Dtable
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int


class Sregs(_SregsHead):
    """``struct kvm_sregs``, 312 bytes."""

    _fields_ = [*_SREGS_HEAD, ("interrupt_bitmap", _U64 * 4)]
    interrupt_bitmap: ctypes.Array[ctypes.c_uint64]


class Sregs2(_SregsHead):
    """``struct kvm_sregs2``, 320 bytes: with the PAE PDPTRs, valid if ``flags & 1``."""

    _fields_ = [*_SREGS_HEAD, ("flags", _U64), ("pdptrs", _U64 * 4)]
    flags: int
    pdptrs: ctypes.Array[ctypes.c_uint64]


class Fpu(ctypes.LittleEndianStructure):
    """``struct kvm_fpu``, 416 bytes."""

    _fields_ = [
        ("fpr", (_U8 * 16) * 8), ("fcw", _U16), ("fsw", _U16), ("ftwx", _U8), ("pad1", _U8),
        ("last_opcode", _U16), ("last_ip", _U64), ("last_dp", _U64), ("xmm", (_U8 * 16) * 16),
        ("mxcsr", _U32), ("pad2", _U32),
    ]  # fmt: skip
    fcw: int
    fsw: int
    ftwx: int
    mxcsr: int


class Xsave(ctypes.LittleEndianStructure):
    """The first 576 bytes of ``struct kvm_xsave``: the FXSAVE image and the XSAVE header (SDM vol. 1, 13.4)."""

    _fields_ = [
        ("fcw", _U16), ("fsw", _U16), ("ftw", _U8), ("reserved0", _U8), ("fop", _U16),
        ("fip", _U64), ("fdp", _U64), ("mxcsr", _U32), ("mxcsr_mask", _U32),
        ("st", (_U8 * 16) * 8), ("xmm", (_U8 * 16) * 16), ("reserved1", _U8 * 96),
        ("xstate_bv", _U64), ("xcomp_bv", _U64), ("reserved2", _U8 * 48),
    ]  # fmt: skip
    fcw: int
    fsw: int
    ftw: int
    mxcsr: int
    mxcsr_mask: int
    st: ctypes.Array[ctypes.Array[ctypes.c_uint8]]
    xmm: ctypes.Array[ctypes.Array[ctypes.c_uint8]]
    xstate_bv: int
    xcomp_bv: int


class Xcr(ctypes.LittleEndianStructure):
    """``struct kvm_xcr``, 16 bytes."""

    _fields_ = [("xcr", _U32), ("reserved", _U32), ("value", _U64)]
    xcr: int
    value: int


class Xcrs(ctypes.LittleEndianStructure):
    """``struct kvm_xcrs``, 392 bytes."""

    _fields_ = [("nr_xcrs", _U32), ("flags", _U32), ("xcrs", Xcr * 16), ("padding", _U64 * 16)]
    nr_xcrs: int
    flags: int
    xcrs: ctypes.Array[Xcr]


class Lapic(ctypes.LittleEndianStructure):
    """``struct kvm_lapic_state``, 1024 bytes: the APIC's register page, one register every 16 bytes."""

    _fields_ = [("regs", _U8 * 1024)]
    regs: ctypes.Array[ctypes.c_uint8]


SREGS_HEAD = ctypes.sizeof(Sregs) - 32
"""The bytes that kvm_sregs and kvm_sregs2 begin with alike: all but the interrupt bitmap, or flags and PDPTRs."""

EVENT_VALID_NMI_PENDING = 0x1
EVENT_VALID_SIPI_VECTOR = 0x2
EVENT_VALID_SHADOW = 0x4
EVENT_VALID_SMM = 0x8
EVENT_VALID_PAYLOAD = 0x10
EVENT_VALID_TRIPLE_FAULT = 0x20


class VcpuEvents(ctypes.LittleEndianStructure):
    """``struct kvm_vcpu_events``, 64 bytes (its nested structs flattened with their name as prefix)."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [
        ("exception_injected", _U8), ("exception_nr", _U8), ("exception_has_error_code", _U8),
        ("exception_pending", _U8), ("exception_error_code", _U32),
        ("interrupt_injected", _U8), ("interrupt_nr", _U8), ("interrupt_soft", _U8), ("interrupt_shadow", _U8),
        ("nmi_injected", _U8), ("nmi_pending", _U8), ("nmi_masked", _U8), ("nmi_pad", _U8),
        ("sipi_vector", _U32), ("flags", _U32),
        ("smi_smm", _U8), ("smi_pending", _U8), ("smi_smm_inside_nmi", _U8), ("smi_latched_init", _U8),
        ("triple_fault_pending", _U8), ("reserved", _U8 * 26),
        ("exception_has_payload", _U8), ("exception_payload", _U64),
    ]  # fmt: skip
    exception_injected: int
    exception_nr: int
    exception_has_error_code: int
    exception_pending: int
    exception_error_code: int
    interrupt_injected: int
    interrupt_nr: int
    interrupt_soft: int
    interrupt_shadow: int
    nmi_injected: int
    nmi_pending: int
    nmi_masked: int
    sipi_vector: int
    flags: int
    smi_smm: int
    smi_pending: int
    smi_smm_inside_nmi: int
    smi_latched_init: int
    triple_fault_pending: int
    exception_has_payload: int
    exception_payload: int


MP_STATE_RUNNABLE = 0
MP_STATE_UNINITIALIZED = 1
MP_STATE_INIT_RECEIVED = 2
MP_STATE_HALTED = 3
MP_STATE_SIPI_RECEIVED = 4
MP_STATE_NAMES = ("runnable", "uninitialized", "init received", "halted", "sipi received")


class MpState(ctypes.LittleEndianStructure):
    """``struct kvm_mp_state``, 4 bytes."""

    _fields_ = [("mp_state", _U32)]
    mp_state: int


class DebugRegs(ctypes.LittleEndianStructure):
    """``struct kvm_debugregs``, 128 bytes."""

    _fields_ = [("db", _U64 * 4), ("dr6", _U64), ("dr7", _U64), ("flags", _U64), ("reserved", _U64 * 9)]
    db: ctypes.Array[ctypes.c_uint64]
    dr6: int
    dr7: int
    flags: int


GUESTDBG_ENABLE = 0x1
GUESTDBG_SINGLESTEP = 0x2
GUESTDBG_USE_SW_BP = 0x10000
GUESTDBG_USE_HW_BP = 0x20000
GUESTDBG_BLOCKIRQ = 0x100000


class GuestDebug(ctypes.LittleEndianStructure):
    """``struct kvm_guest_debug``, 72 bytes; ``debugreg`` holds DR0–3, then DR6 and DR7 at 6 and 7."""

    _fields_ = [("control", _U32), ("pad", _U32), ("debugreg", _U64 * 8)]
    control: int
    debugreg: ctypes.Array[ctypes.c_uint64]


MSR_ENTRY = struct.Struct("<I4xQ")
"""``struct kvm_msr_entry``, 16 bytes: index, data."""


class CpuidEntry(ctypes.LittleEndianStructure):
    """``struct kvm_cpuid_entry2``, 40 bytes."""

    _fields_ = [
        ("function", _U32), ("index", _U32), ("flags", _U32),
        ("eax", _U32), ("ebx", _U32), ("ecx", _U32), ("edx", _U32), ("padding", _U32 * 3),
    ]  # fmt: skip
    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


class Irqchip(ctypes.LittleEndianStructure):
    """``struct kvm_irqchip``, 520 bytes; ``chip_id`` 0 and 1 are the 8259s, 2 is the I/O APIC."""

    _fields_ = [("chip_id", _U32), ("pad", _U32), ("chip", _U8 * 512)]
    chip_id: int


class PitChannel(ctypes.LittleEndianStructure):
    """``struct kvm_pit_channel_state``, 24 bytes."""

    _fields_ = [
        ("count", _U32), ("latched_count", _U16), ("count_latched", _U8), ("status_latched", _U8),
        ("status", _U8), ("read_state", _U8), ("write_state", _U8), ("write_latch", _U8),
        ("rw_mode", _U8), ("mode", _U8), ("bcd", _U8), ("gate", _U8), ("count_load_time", ctypes.c_int64),
    ]  # fmt: skip


class PitState2(ctypes.LittleEndianStructure):
    """``struct kvm_pit_state2``, 112 bytes."""

    _fields_ = [("channels", PitChannel * 3), ("flags", _U32), ("reserved", _U32 * 9)]


class ClockData(ctypes.LittleEndianStructure):
    """``struct kvm_clock_data``, 48 bytes; ``clock`` in nanoseconds."""

    _fields_ = [
        ("clock", _U64), ("flags", _U32), ("pad0", _U32), ("realtime", _U64), ("host_tsc", _U64),
        ("pad", _U32 * 4),
    ]  # fmt: skip
    clock: int
    flags: int


def pack_msrs(values: Mapping[int, int] | Iterable[int]) -> bytes:
    """``struct kvm_msrs`` holding these index → value pairs (or these indices, values 0), in their order."""
    pairs = list(values.items()) if isinstance(values, Mapping) else [(index, 0) for index in values]
    return len(pairs).to_bytes(8, "little") + b"".join([MSR_ENTRY.pack(index, data) for index, data in pairs])


def unpack_msrs(raw: bytes) -> dict[int, int]:
    """Index → value of a ``struct kvm_msrs``, in its order. Raises ValueError if it's shorter than it says."""
    end = 8 + MSR_ENTRY.size * int.from_bytes(raw[:4], "little")
    if len(raw) < end:
        raise ValueError(f"{len(raw)} bytes can't be a struct kvm_msrs of {end}")
    return dict(MSR_ENTRY.iter_unpack(raw[8:end]))


def pack_cpuid(entries: Iterable[CpuidEntry]) -> bytes:
    """``struct kvm_cpuid2`` holding these entries."""
    body = [bytes(entry) for entry in entries]
    return len(body).to_bytes(8, "little") + b"".join(body)


def unpack_cpuid(raw: bytes) -> list[CpuidEntry]:
    """The entries of a ``struct kvm_cpuid2``."""
    count = int.from_bytes(raw[:4], "little")
    return list((CpuidEntry * count).from_buffer_copy(raw, 8))
