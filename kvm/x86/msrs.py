"""Which MSRs belong to which writeback level, and why.

The kernel's list (KVM_GET_MSR_INDEX_LIST) decides which exist, as far as a VCPU lets them be moved (System.msr_list);
the groups here decide when each is written.
An MSR that no group names is written at RUNTIME: only what the guest itself changes by WRMSR, on its own VCPU,
is left then.
"""

from __future__ import annotations

from collections.abc import Iterable

NAMES = {
    0x10: "TSC", 0x3A: "FEATURE_CONTROL", 0x3B: "TSC_ADJUST", 0x34: "SMI_COUNT", 0x48: "SPEC_CTRL",
    0x8B: "UCODE_REV", 0xCE: "PLATFORM_INFO", 0x10A: "ARCH_CAPABILITIES", 0x140: "MISC_FEATURES_ENABLES",
    0x174: "SYSENTER_CS", 0x175: "SYSENTER_ESP", 0x176: "SYSENTER_EIP", 0x17A: "MCG_STATUS", 0x17B: "MCG_CTL",
    0x1A0: "MISC_ENABLE", 0x1D9: "DEBUGCTL", 0x1FC: "POWER_CTL", 0x277: "PAT", 0x2FF: "MTRR_DEF_TYPE",
    0x345: "PERF_CAPABILITIES", 0x6E0: "TSC_DEADLINE", 0xDA0: "XSS",
    0xC0000080: "EFER", 0xC0000081: "STAR", 0xC0000082: "LSTAR", 0xC0000083: "CSTAR", 0xC0000084: "FMASK",
    0xC0000100: "FS_BASE", 0xC0000101: "GS_BASE", 0xC0000102: "KERNEL_GS_BASE", 0xC0000103: "TSC_AUX",
    0xC0010015: "HWCR", 0xC0010117: "VM_HSAVE_PA", 0xC001011F: "VIRT_SPEC_CTRL",
    0x11: "KVM_WALL_CLOCK", 0x12: "KVM_SYSTEM_TIME", 0x4B564D00: "KVM_WALL_CLOCK_NEW",
    0x4B564D01: "KVM_SYSTEM_TIME_NEW", 0x4B564D02: "KVM_ASYNC_PF_EN", 0x4B564D03: "KVM_STEAL_TIME",
    0x4B564D04: "KVM_PV_EOI_EN", 0x4B564D05: "KVM_POLL_CONTROL", 0x4B564D06: "KVM_ASYNC_PF_INT",
    0x4B564D07: "KVM_ASYNC_PF_ACK", 0x4B564D08: "KVM_MIGRATION_CONTROL",
}  # fmt: skip

EFER = 0xC0000080
APIC_BASE = 0x1B
TSC = 0x10
TSC_DEADLINE = 0x6E0

_MTRRS = (0x2FF, *range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270))
"""Readable on every KVM, never in its list: default type, 8 variable pairs, 11 fixed ranges."""

_ELSEWHERE = {EFER, APIC_BASE, TSC_DEADLINE}
"""Carried by another substate: SREGS has the first two, the TSC deadline is put after LAPIC and TSC."""

_READ_ONLY = {0x10A, 0x345, 0xCE, 0x8B, *range(0x480, 0x492), 0x4B564D07}
"""Features, the same for every VCPU of a host (those of VMX can't even be written once it's on), and the write-only
async-PF acknowledgement: nothing to carry."""

_RESET = {
    *(0x10, 0x3B),  # a TSC written while others run drifts apart from theirs
    *range(0x4B564D00, 0x4B564D09), 0x11, 0x12,  # a write makes the kernel write to guest memory, or wakes it
    *(0x34, 0x3A),  # counted, or locked, by the processor
    *_MTRRS,  # a write drops the VM's whole shadow MMU
    *range(0xC1, 0xC9), *range(0x186, 0x18E), *range(0x309, 0x30D), *range(0x38D, 0x391),  # PMU counters run on
    *range(0x40000000, 0x40000200),  # Hyper-V: as kvmclock
}  # fmt: skip


def groups(listed: Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The (RUNTIME, RESET) groups of the MSRs that a kernel lists, each in ascending order.

    The MTRRs join the RESET group whether listed or not: KVM always has them.
    """
    carried = (set(listed) | set(_MTRRS)) - _ELSEWHERE - _READ_ONLY
    return tuple(sorted(carried - _RESET)), tuple(sorted(carried & _RESET))
