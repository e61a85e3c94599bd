"""The checks that Intel processors make on the guest's segments and control registers at VM entry.

SDM vol. 3C, 27.3.1.1 to 27.3.1.3, for an unrestricted guest outside of virtual-8086 mode.
"""

from __future__ import annotations

from kvm.x86.structs import Regs, Segment, Sregs, Sregs2


def refused(regs: Regs, sregs: Sregs | Sregs2) -> list[str]:
    """Why a processor would refuse this state; empty if it takes it."""
    protected, paging = sregs.cr0 & 1, sregs.cr0 >> 31 & 1
    long = sregs.efer >> 10 & 1
    cs, ss = sregs.cs, sregs.ss
    rules = [
        (not paging or protected, "CR0.PG without PE"),
        (long == (sregs.efer >> 8 & 1 and paging), "EFER.LMA isn't LME and PG"),
        (not long or sregs.cr4 >> 5 & 1, "long mode without PAE"),
        (sregs.cr3 >> 52 == 0, "CR3 beyond physical addresses"),
        (regs.rflags & 0x2 and not regs.rflags & ~0x3F7FD7, "RFLAGS"),
        ((long and cs.l) or regs.rip >> 32 == 0, "RIP above 4 GiB outside of 64-bit code"),
        (cs.type in (9, 11, 13, 15) or (cs.type == 3 and not protected), "CS type"),
        (cs.s and cs.present and not cs.unusable, "CS must be a present code segment"),
        (not (long and cs.l and cs.db), "CS: L and D both set"),
        (cs.type not in (9, 11) or cs.dpl == ss.dpl, "CS.DPL isn't SS.DPL"),
        (ss.unusable or ss.type in (3, 7), "SS type"),
        (protected or ss.dpl == 0, "SS.DPL in real mode"),
        (ss.unusable or ss.selector & 3 == cs.selector & 3 or not protected, "SS.RPL isn't CS.RPL"),
        (not sregs.tr.unusable and sregs.tr.present and not sregs.tr.s, "TR must be a present system segment"),
        (sregs.tr.type == 11 or (not long and sregs.tr.type == 3), "TR must be a busy TSS"),
        (not sregs.tr.selector & 4, "TR in an LDT"),
        (sregs.ldt.unusable or (sregs.ldt.type, sregs.ldt.s, sregs.ldt.present) == (2, 0, 1), "LDTR"),
    ]
    found = [why for holds, why in rules if not holds]
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"):
        found += [f"{name}: {why}" for why in _segment(getattr(sregs, name), name, bool(protected))]
    return found


def _segment(segment: Segment, name: str, protected: bool) -> list[str]:
    if segment.unusable:
        return []
    rules = [
        (not segment.g or segment.limit & 0xFFF == 0xFFF, "G set, but the limit isn't whole pages"),
        (segment.g or segment.limit >> 20 == 0, "limit needs G"),
        (name in ("tr", "fs", "gs", "ldt") or segment.base >> 32 == 0, "base above 4 GiB"),
        (segment.present, "not present"),
    ]
    if name in ("ds", "es", "fs", "gs", "ss"):
        rules += [
            (segment.s, "a system segment"),
            (segment.type & 1, "not accessed"),
            (not segment.type & 8 or segment.type & 2, "code that isn't readable"),
        ]
    if not protected and name not in ("tr", "ldt"):
        rules += [
            (name == "cs" or segment.base == segment.selector << 4, "real mode: base isn't selector * 16"),
            (segment.limit == 0xFFFF, "real mode: limit"),
        ]
    return [why for holds, why in rules if not holds]
