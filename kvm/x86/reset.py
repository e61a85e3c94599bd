"""What a VCPU's substates hold after power-on and after a system reset (SDM vol. 3, 10.1.1, table 10-1).

What the tables there leave to the implementation (MSRs that enumerate or lock something, the APIC's version, the TSC's
frequency) keeps the value that the kernel gave a fresh VCPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvm.x86 import cpuid, msrs
from kvm.x86.structs import (
    EVENT_VALID_NMI_PENDING,
    EVENT_VALID_SIPI_VECTOR,
    MP_STATE_RUNNABLE,
    MP_STATE_UNINITIALIZED,
    DebugRegs,
    Fpu,
    Lapic,
    MpState,
    Regs,
    Segment,
    Sregs,
    Sregs2,
    VcpuEvents,
    Xcrs,
    Xsave,
    pack_msrs,
    unpack_msrs,
)

_APIC_BASE = 0xFEE00000
_APIC_ENABLED = 1 << 11
_APIC_BSP = 1 << 8

_LVT_MASKED = 1 << 16
_EXTINT = 7 << 8

LAPIC_ID, LAPIC_VERSION, LAPIC_DFR, LAPIC_SVR, LAPIC_LVT0 = 0x20, 0x30, 0xE0, 0xF0, 0x350
_LAPIC_LVTS = (0x2F0, 0x320, 0x330, 0x340, LAPIC_LVT0, 0x360, 0x370)


def reset_state(power_on: Mapping[str, bytes], index: int) -> dict[str, bytes]:
    """Every substate of VCPU ``index`` after reset; VCPU 0 is the bootstrap processor, the others wait for a SIPI.

    ``power_on`` holds a fresh VCPU's substates as its kernel reported them, and its CPUID.
    """
    state = dict(power_on)
    makers: dict[str, Callable[[bytes], bytes]] = {
        "regs": lambda raw: bytes(Regs(rip=0xFFF0, rflags=0x2, rdx=cpuid.version(power_on["cpuid"]))),
        "sregs": lambda raw: _sregs(raw, index),
        "fpu": lambda raw: bytes(Fpu(fcw=0x37F, mxcsr=0x1F80)),
        "xsave": lambda raw: bytes(Xsave(fcw=0x37F, mxcsr=0x1F80, xstate_bv=0x3)).ljust(len(raw), b"\0"),
        "xcrs": _xcrs,
        "lapic": lambda raw: _lapic(raw, index),
        "msrs_reset": lambda raw: pack_msrs({**unpack_msrs(raw), msrs.TSC: 0}),
        "tsc_offset": lambda raw: bytes(8),  # the same for all
        "events": _events,
        "mp_state": lambda raw: bytes(MpState(MP_STATE_UNINITIALIZED if index else MP_STATE_RUNNABLE)),
        "tsc_deadline": lambda raw: pack_msrs({msrs.TSC_DEADLINE: 0}),
        "debugregs": lambda raw: bytes(DebugRegs(dr6=0xFFFF0FF0, dr7=0x400)),
    }
    for name, make in makers.items():
        if name in state:
            state[name] = make(state[name])
    return state


def _sregs(raw: bytes, index: int) -> bytes:
    kind = Sregs2 if len(raw) == len(bytes(Sregs2())) else Sregs
    sregs: Sregs | Sregs2 = kind()
    data = {"limit": 0xFFFF, "type": 3, "present": 1, "s": 1}
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, Segment(**data))
    sregs.cs = Segment(base=0xFFFF0000, selector=0xF000, limit=0xFFFF, type=0xB, present=1, s=1)
    sregs.tr = Segment(limit=0xFFFF, type=0xB, present=1)
    sregs.ldt = Segment(limit=0xFFFF, type=0x2, present=1)
    sregs.gdt.limit = sregs.idt.limit = 0xFFFF
    sregs.cr0 = 0x60000010
    sregs.apic_base = _APIC_BASE | _APIC_ENABLED | (0 if index else _APIC_BSP)
    return bytes(sregs)


def _xcrs(raw: bytes) -> bytes:
    xcrs = Xcrs(nr_xcrs=1)
    xcrs.xcrs[0].value = 1
    return bytes(xcrs)


def _lapic(raw: bytes, index: int) -> bytes:
    """SDM vol. 3, 12.4.7.1. The BSP's LINT0 stands at ExtINT: the 8259's way in, as firmware expects it."""
    registers = dict.fromkeys(_LAPIC_LVTS, _LVT_MASKED)
    registers |= {
        LAPIC_ID: index << 24,
        LAPIC_VERSION: int.from_bytes(raw[LAPIC_VERSION : LAPIC_VERSION + 4], "little"),
        LAPIC_DFR: 0xFFFFFFFF,
        LAPIC_SVR: 0xFF,
    }
    if index == 0:
        registers[LAPIC_LVT0] = _EXTINT
    page = bytearray(len(bytes(Lapic())))
    for offset, value in registers.items():
        page[offset : offset + 4] = value.to_bytes(4, "little")
    return bytes(page)


def _events(raw: bytes) -> bytes:
    """Nothing pending; the flags say so for the parts that this kernel has."""
    flags = VcpuEvents.from_buffer_copy(raw).flags
    return bytes(VcpuEvents(flags=flags | EVENT_VALID_NMI_PENDING | EVENT_VALID_SIPI_VECTOR))
