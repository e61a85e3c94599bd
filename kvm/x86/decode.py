"""What the registers say, in words: mode and CPL, flags and control bits by name, segment attributes.

Sources: SDM vol. 3A, 2.3 (RFLAGS), 2.5 (control registers), 3.4.5 and 3.5 (descriptors); AMD APM vol. 2, 3.1.7 (EFER).
"""

from __future__ import annotations

from enum import Enum

from kvm.x86.structs import Segment, Sregs, Sregs2

CR0_PE = 1 << 0
EFER_LMA = 1 << 10
RFLAGS_VM = 1 << 17
RFLAGS_IOPL_SHIFT = 12

FLAGS = (
    ("cf", 0), ("pf", 2), ("af", 4), ("zf", 6), ("sf", 7), ("tf", 8), ("if", 9), ("df", 10), ("of", 11),
)  # fmt: skip
"""RFLAGS bits that are always spelled out."""
RARE_FLAGS = (("nt", 14), ("rf", 16), ("vm", 17), ("ac", 18), ("vif", 19), ("vip", 20), ("id", 21))
"""RFLAGS bits worth a word only while they are set."""

CR0_BITS = (
    ("PG", 31), ("CD", 30), ("NW", 29), ("AM", 18), ("WP", 16), ("NE", 5), ("ET", 4), ("TS", 3), ("EM", 2),
    ("MP", 1), ("PE", 0),
)  # fmt: skip
CR4_BITS = (
    ("VME", 0), ("PVI", 1), ("TSD", 2), ("DE", 3), ("PSE", 4), ("PAE", 5), ("MCE", 6), ("PGE", 7), ("PCE", 8),
    ("OSFXSR", 9), ("OSXMMEXCPT", 10), ("UMIP", 11), ("LA57", 12), ("VMXE", 13), ("SMXE", 14), ("FSGSBASE", 16),
    ("PCIDE", 17), ("OSXSAVE", 18), ("KL", 19), ("SMEP", 20), ("SMAP", 21), ("PKE", 22), ("CET", 23), ("PKS", 24),
    ("UINTR", 25), ("LAM_SUP", 28),
)  # fmt: skip
EFER_BITS = (
    ("SCE", 0), ("LME", 8), ("LMA", 10), ("NXE", 11), ("SVME", 12), ("LMSLE", 13), ("FFXSR", 14), ("TCE", 15),
    ("AIBRSE", 21),
)  # fmt: skip

SYSTEM_TYPES = {
    1: "16-bit TSS", 2: "LDT", 3: "busy 16-bit TSS", 4: "16-bit call gate", 5: "task gate", 6: "16-bit int gate",
    7: "16-bit trap gate", 9: "TSS", 11: "busy TSS", 12: "call gate", 14: "int gate", 15: "trap gate",
}  # fmt: skip


class Mode(Enum):
    """What the processor takes the next instruction for; the value is its name for a person."""

    REAL = "real mode"
    VM86 = "vm86 mode"
    PROTECTED_16 = "protected 16"
    PROTECTED_32 = "protected 32"
    COMPAT_16 = "compat 16"
    COMPAT_32 = "compat 32"
    LONG = "long mode"

    @property
    def bits(self) -> int:
        """The default operand and address size of code, as a disassembler wants it: 16, 32 or 64."""
        return _BITS[self]


_BITS = {
    Mode.REAL: 16, Mode.VM86: 16, Mode.PROTECTED_16: 16, Mode.PROTECTED_32: 32, Mode.COMPAT_16: 16,
    Mode.COMPAT_32: 32, Mode.LONG: 64,
}  # fmt: skip


def mode(sregs: Sregs | Sregs2, rflags: int) -> Mode:
    """The mode that these registers mean."""
    if not sregs.cr0 & CR0_PE:
        return Mode.REAL
    if sregs.efer & EFER_LMA:
        if sregs.cs.l:
            return Mode.LONG
        return Mode.COMPAT_32 if sregs.cs.db else Mode.COMPAT_16
    if rflags & RFLAGS_VM:
        return Mode.VM86
    return Mode.PROTECTED_32 if sregs.cs.db else Mode.PROTECTED_16


def cpl(sregs: Sregs | Sregs2, rflags: int) -> int:
    """The current privilege level, 0 to 3: SS's DPL, which is right also while CS is conforming."""
    if not sregs.cr0 & CR0_PE:
        return 0
    return 3 if rflags & RFLAGS_VM and not sregs.efer & EFER_LMA else sregs.ss.dpl & 3


def linear_rip(sregs: Sregs | Sregs2, rip: int, rflags: int) -> int:
    """The linear address of the next instruction: in long mode RIP itself, else CS's base + RIP, 32 bits."""
    if mode(sregs, rflags) is Mode.LONG:
        return rip
    return (sregs.cs.base + rip) & 0xFFFFFFFF


def flag_words(rflags: int) -> tuple[tuple[str, bool], ...]:
    """RFLAGS as (word, is set): the usual ones always, upper case if set; then IOPL; rare ones only if set."""
    usual = tuple((name.upper() if rflags >> bit & 1 else name, bool(rflags >> bit & 1)) for name, bit in FLAGS)
    iopl = rflags >> RFLAGS_IOPL_SHIFT & 3
    rare = tuple((name.upper(), True) for name, bit in RARE_FLAGS if rflags >> bit & 1)
    return (*usual, (f"iopl{iopl}", iopl > 0), *rare)


def bit_names(value: int, bits: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """The names of the bits that are set, in the table's order; those the table doesn't know as ``bit N``."""
    known = sum(1 << bit for _, bit in bits)
    unknown = value & ~known
    return (
        *(name for name, bit in bits if value >> bit & 1),
        *(f"bit {bit}" for bit in range(unknown.bit_length()) if unknown >> bit & 1),
    )


def segment_text(segment: Segment) -> str:
    """A segment's attributes: ``code64 r-x dpl0``, ``data32 rw- dpl3``, ``busy TSS dpl0``, ``unusable``."""
    if segment.unusable:
        return "unusable"
    if not segment.present:
        return "not present"
    if not segment.s:
        return f"{SYSTEM_TYPES.get(segment.type, f'type {segment.type}')} dpl{segment.dpl}"
    if segment.type & 8:
        size = 64 if segment.l else 32 if segment.db else 16
        conforming = " conforming" if segment.type & 4 else ""
        return f"code{size} {'r' if segment.type & 2 else '-'}-x dpl{segment.dpl}{conforming}"
    down = " down" if segment.type & 4 else ""
    return f"data{32 if segment.db else 16} r{'w' if segment.type & 2 else '-'}- dpl{segment.dpl}{down}"
