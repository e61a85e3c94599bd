"""The local APIC's registers by their offset in its page (SDM vol. 3, table 12-1)."""

from __future__ import annotations

NAMES = {
    0x20: "ID", 0x30: "version", 0x80: "TPR", 0x90: "APR", 0xA0: "PPR", 0xB0: "EOI", 0xC0: "RRD", 0xD0: "LDR",
    0xE0: "DFR", 0xF0: "SVR",
    **{base + 0x10 * word: f"{name}[{32 * word + 31}:{32 * word}]"
       for base, name in ((0x100, "ISR"), (0x180, "TMR"), (0x200, "IRR")) for word in range(8)},
    0x280: "ESR", 0x2F0: "LVT CMCI", 0x300: "ICR low", 0x310: "ICR high", 0x320: "LVT timer", 0x330: "LVT thermal",
    0x340: "LVT counters", 0x350: "LVT LINT0", 0x360: "LVT LINT1", 0x370: "LVT error", 0x380: "timer initial count",
    0x390: "timer current count", 0x3E0: "timer divide",
}  # fmt: skip
