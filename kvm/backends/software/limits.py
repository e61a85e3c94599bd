"""What the software backend does not do as a processor would. ``vmdeck doctor`` prints this table."""

from __future__ import annotations

LIMITS: tuple[tuple[str, str], ...] = (
    ("speed", "10 to 200 million instructions a second for all VCPUs together; one VCPU runs at a time"),
    (
        "time",
        "virtual: 10 ns an instruction, 1 µs an access to a device; the guest's clocks follow it",
    ),
    (
        "XSAVE, AVX, AVX-512",
        "not in CPUID; the instructions give #UD, but some VEX forms run as their SSE or x87 originals",
    ),
    ("VMX, SVM, SMM, SGX", "not there; the instructions give #UD"),
    ("x2APIC, a moved APIC page", "WRMSR of APIC_BASE gives #GP"),
    ("8-byte MMIO", "comes as two accesses of 4 bytes, the lower first"),
    ("RDRAND, RDSEED", "not in CPUID; they work, with the host's random numbers, and so make runs differ"),
    (
        "STI with an interrupt waiting",
        "taken at HLT, PAUSE, I/O or the slice's end (1000 instructions)",
    ),
    ("code written by another VCPU or a device", "seen after CPUID, SIPI or a restore; a VCPU sees its own at once"),
    ("hardware task switches through the IDT", "a task gate stops the guest with an internal error"),
    ("the guest's own DR0-3 breakpoints", "held, but never hit"),
    ("segment limits, stack limits, alignment checks (#AC)", "not enforced"),
    ("accessed bits of descriptors", "far jumps, returns and interrupts don't set a code segment's in memory"),
    ("PAE PDPTRs", "read from memory at each page walk, not when CR3 is loaded"),
    ("x87 exceptions, precision control", "as QEMU's TCG: IEEE flags, no trap through IRQ 13"),
    ("MTRR, PAT", "held, without effect"),
    ("performance counters", "none; RDPMC gives #UD"),
    ("logging dirty pages", "by comparing with a copy of the slot: twice the memory, host writes count too"),
    ("coalesced I/O, eventfds", "not there: an access costs about a microsecond"),
)
"""(what, consequence)"""
