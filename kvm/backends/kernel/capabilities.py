"""KVM's capabilities that vmdeck asks for. Imports nothing: the extension's build reads this file too."""

from __future__ import annotations

CAPABILITIES: dict[str, str] = {
    "KVM_CAP_USER_MEMORY": "guest memory; no machine without it",
    "KVM_CAP_EXT_CPUID": "CPUID tables with indexed leaves; no machine without it",
    "KVM_CAP_IRQCHIP": "the interrupt controllers in the kernel; no machine without it",
    "KVM_CAP_MP_STATE": "halted and wait-for-SIPI; no machine without it",
    "KVM_CAP_IMMEDIATE_EXIT": "stopping a VCPU without a race; no machine without it",
    "KVM_CAP_SET_TSS_ADDR": "real mode on Intel processors without unrestricted guest",
    "KVM_CAP_SET_IDENTITY_MAP_ADDR": "real mode on Intel processors without unrestricted guest, firmware over 256 KiB",
    "KVM_CAP_PIT2": "the PIT: guests have no IRQ 0 timer",
    "KVM_CAP_NR_VCPUS": "the number of VCPUs that KVM recommends; 4 is assumed",
    "KVM_CAP_MAX_VCPUS": "the number of VCPUs that KVM allows; the recommended one is taken",
    "KVM_CAP_NR_MEMSLOTS": "the number of memory slots; 32 is assumed",
    "KVM_CAP_READONLY_MEM": "ROM: a guest can't be started from firmware",
    "KVM_CAP_SYNC_REGS": "samples of a running VCPU: live panes show registers only while it is stopped",
    "KVM_CAP_BINARY_STATS_FD": "telling a halted VCPU from a busy one",
    "KVM_CAP_COALESCED_MMIO": "the ring that gathers writes: each console byte costs an exit",
    "KVM_CAP_COALESCED_PIO": "the ring that gathers port writes: each console byte costs an exit",
    "KVM_CAP_DISABLE_QUIRKS2": "#UD for the other vendor's hypercall instruction: the kernel rewrites it instead",
    "KVM_CAP_VCPU_EVENTS": "pending exceptions, interrupts and NMIs in a saved state",
    "KVM_CAP_SREGS2": "the PAE PDPTRs in a saved state",
    "KVM_CAP_XSAVE": "AVX and beyond in a saved state: x87 and SSE only",
    "KVM_CAP_XSAVE2": "XSAVE states larger than 4 KiB (AMX)",
    "KVM_CAP_XCRS": "XCR0 in a saved state",
    "KVM_CAP_DEBUGREGS": "the guest's own debug registers in a saved state",
    "KVM_CAP_NESTED_STATE": "saving a guest that runs guests",
    "KVM_CAP_TSC_CONTROL": "another TSC frequency than the host's: a saved state's can't be kept",
    "KVM_CAP_GET_TSC_KHZ": "the guest's TSC frequency",
    "KVM_CAP_VCPU_ATTRIBUTES": "exact TSC offsets: after a reset or restore VCPUs' TSCs may stand apart",
    "KVM_CAP_TSC_DEADLINE_TIMER": "the local APIC timer's TSC-deadline mode",
    "KVM_CAP_ADJUST_CLOCK": "kvmclock in a saved state: guest time jumps",
    "KVM_CAP_KVMCLOCK_CTRL": "telling a guest that it was paused: its watchdog may bark",
    "KVM_CAP_SET_GUEST_DEBUG": "single step and breakpoints",
    "KVM_CAP_SET_GUEST_DEBUG2": "stepping with interrupts held off: a step may land in a handler",
    "KVM_CAP_X86_ROBUST_SINGLESTEP": "single step that no trap flag of the guest disturbs",
    "KVM_CAP_INTERNAL_ERROR_DATA": "the bytes of an instruction that KVM can't emulate",
    "KVM_CAP_USER_NMI": "sending an NMI",
    "KVM_CAP_X86_SMM": "system management mode",
}
"""Name → what is lost without it."""

REQUIRED = ("KVM_CAP_USER_MEMORY", "KVM_CAP_EXT_CPUID", "KVM_CAP_IRQCHIP", "KVM_CAP_MP_STATE", "KVM_CAP_IMMEDIATE_EXIT")
