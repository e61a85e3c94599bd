"""Model-specific registers: what RDMSR, WRMSR, KVM_GET_MSRS and KVM_SET_MSRS reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvm.backends.software import context
from kvm.backends.software.context import CR0_PG, EFER_LMA, EFER_LME, Context, recompute_hflags
from kvm.backends.software.lapic import BASE_BSP, BASE_ENABLED, Lapic
from kvm.x86 import msrs

LISTED = (
    0x10, 0x174, 0x175, 0x176, 0x1A0, 0x277, msrs.TSC_DEADLINE,
    0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000102, 0xC0000103,
)  # fmt: skip
"""KVM_GET_MSR_INDEX_LIST's answer."""

_MTRRS = (0x2FF, *range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270))
STORED = {0x1A0: 1, 0x277: 0x0007_0406_0007_0406, 0x17A: 0, **dict.fromkeys(_MTRRS, 0)}
"""Those that only hold what was written, with their values at power-on."""
_READ_ONLY = {0xFE: 0x508, 0x179: 0, 0x8B: 0x1_0000_0000, 0xCE: 0, 0x10A: 0x4000_0000_0D10_E179}
"""MTRRcap, MCG_CAP, the microcode revision, PLATFORM_INFO, ARCH_CAPABILITIES: nothing here runs ahead of what
the guest may do, so RDCL, SSB, MDS, PSCHANGE_MC, TAA, SBDR_SSDP, FBSDP, PSDP, BHI, PBRSB, GDS, RFDS and ITS can't be,
and there's no L1 cache to flush."""
_WRITES_IGNORED = frozenset((0x79, 0x8B))
"""The microcode's update trigger and revision: guests write them before they ask (KVM does the same)."""
_EFER_WRITABLE = 0x901


class Refused(Exception):
    """There is no such MSR, or it can't hold this: #GP to the guest."""


@dataclass
class Msrs:
    """One VCPU's."""

    cpu: Context
    lapic: Lapic
    stored: dict[int, int]

    def read(self, index: int) -> int:
        """Raises Refused."""
        if index in self.stored:
            return self.stored[index]
        if index in _READ_ONLY:
            return _READ_ONLY[index]
        if index in _PLAIN:
            return int(getattr(self.cpu, _PLAIN[index]))
        if index in _BASES:
            return self.cpu.segs[_BASES[index]].base
        special = _SPECIAL.get(index)
        if special is None:
            raise Refused
        return special[0](self)

    def write(self, index: int, value: int) -> None:
        """Raises Refused."""
        if index in self.stored:
            if index == 0x277 and any(value >> at & 0xF8 or value >> at & 7 in (2, 3) for at in range(0, 64, 8)):
                raise Refused
            self.stored[index] = value
        elif index in _PLAIN:
            if index in _ADDRESSES and value >> 47 not in (0, 0x1FFFF):
                raise Refused
            setattr(self.cpu, _PLAIN[index], value)
        elif index in _BASES:
            if value >> 47 not in (0, 0x1FFFF):
                raise Refused
            self.cpu.segs[_BASES[index]].base = value
        elif index in _SPECIAL:
            _SPECIAL[index][1](self, value)
        elif index in _WRITES_IGNORED:
            return
        else:
            raise Refused

    def set_efer(self, value: int) -> None:
        """LMA stays the processor's own; LME can't change under paging."""
        old = self.cpu.efer
        if value & ~(_EFER_WRITABLE | EFER_LMA) or ((old ^ value) & EFER_LME and self.cpu.cr[0] & CR0_PG):
            raise Refused
        self.cpu.efer = value & _EFER_WRITABLE | old & EFER_LMA
        recompute_hflags(self.cpu)

    def set_apic_base(self, value: int) -> None:
        """The registers page can't move (see LIMITS), and x2APIC mode doesn't exist."""
        if value & 0x6FF or value >> 36:
            raise Refused
        self.lapic.base = self.lapic.base & ~(BASE_ENABLED | BASE_BSP) | value & (BASE_ENABLED | BASE_BSP)


_PLAIN = {
    0x174: "sysenter_cs", 0x175: "sysenter_esp", 0x176: "sysenter_eip", 0xC0000081: "star", 0xC0000082: "lstar",
    0xC0000083: "cstar", 0xC0000084: "fmask", 0xC0000102: "kernel_gs_base", 0xC0000103: "tsc_aux",
}  # fmt: skip
"""Those that the emulator itself uses, by their field in its context."""
_ADDRESSES = frozenset((0x175, 0x176, 0xC0000082, 0xC0000083, 0xC0000102))
_BASES = {0xC0000100: context.FS, 0xC0000101: context.GS}
_SPECIAL: dict[int, tuple[Callable[[Msrs], int], Callable[[Msrs, int], None]]] = {
    msrs.TSC: (lambda vcpu: vcpu.lapic.tsc(), lambda vcpu, value: vcpu.lapic.set_tsc(value)),
    msrs.TSC_DEADLINE: (
        lambda vcpu: vcpu.lapic.tsc_deadline,
        lambda vcpu, value: vcpu.lapic.set_tsc_deadline(value),
    ),
    msrs.APIC_BASE: (lambda vcpu: vcpu.lapic.base, Msrs.set_apic_base),
    msrs.EFER: (lambda vcpu: vcpu.cpu.efer, Msrs.set_efer),
}
