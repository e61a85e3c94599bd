"""The states that guests are entered in: what each format promises, and that real processors take them."""

from __future__ import annotations

import struct

import pytest

from kvm.boot.entry import (
    CODE32,
    CODE64,
    DATA,
    LINUX_CODE,
    LINUX_DATA,
    LongMode,
    ProtectedMode,
    RealMode,
    ResetVector,
    gdt,
    identity_pages,
    linux_gdt,
)
from kvm.boot.image import Entry
from kvm.boot.image import Segment as MemorySegment
from kvm.x86 import layout, reset
from kvm.x86.structs import CpuidEntry, Regs, Segment, Sregs, Sregs2, pack_cpuid
from tests.kvm.boot.vmentry import refused

ENTRIES = [
    ResetVector(),
    RealMode(0, 0x7C00, 0, 0x80),
    RealMode(0x2000, 0, 0x2000),
    ProtectedMode(0x100000, eax=0x2BADB002, ebx=0x9000),
    LongMode(0x100000),
    ProtectedMode(0x100000, esi=0xA000, code=LINUX_CODE, data=LINUX_DATA),
    LongMode(0x1000200, rsi=0xA000, code=LINUX_CODE, data=LINUX_DATA),
]


def entered(entry: Entry, kind: type[Sregs] | type[Sregs2] = Sregs) -> tuple[Regs, Sregs | Sregs2]:
    """The bootstrap processor's reset state, as the machine makes it, after ``apply``."""
    power_on = {
        "cpuid": pack_cpuid([CpuidEntry(function=1, eax=0x000A0F10)]),
        "regs": bytes(Regs()),
        "sregs": bytes(kind()),
    }
    state = reset.reset_state(power_on, 0)
    regs, sregs = Regs.from_buffer_copy(state["regs"]), kind.from_buffer_copy(state["sregs"])
    entry.apply(regs, sregs)
    return regs, sregs


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: type(entry).__name__)
@pytest.mark.parametrize("kind", [Sregs, Sregs2])
def test_a_processor_takes_every_entry_state(entry: Entry, kind: type[Sregs] | type[Sregs2]) -> None:
    assert refused(*entered(entry, kind)) == []


def test_the_check_refuses_what_a_processor_refuses() -> None:
    for change in (
        {"tr": Segment(limit=0xFFFF, type=9, present=1)},
        {"cr4": 0},
        {"cs": Segment(limit=0xFFFFFFFF, type=11, present=1, s=1, g=1, l=1, db=1)},
        {"ds": Segment(limit=0xFFFFFFFF, type=2, present=1, s=1, g=1)},
        {"ss": Segment(limit=0xFFFFFFFF, type=3, present=1, s=1)},
    ):
        regs, sregs = entered(LongMode(0x100000))
        for name, value in change.items():
            setattr(sregs, name, value)
        assert refused(regs, sregs)


def test_the_reset_vector_is_the_reset_state_itself() -> None:
    regs, sregs = entered(ResetVector())
    assert (sregs.cs.selector, sregs.cs.base, regs.rip) == (0xF000, 0xFFFF0000, 0xFFF0)
    assert (sregs.cr0, regs.rdx) == (0x60000010, 0x000A0F10)


def test_real_mode() -> None:
    regs, sregs = entered(RealMode(0x2000, 0x34, 0x2000, dl=0x80))
    assert (sregs.cs.selector, sregs.cs.base, regs.rip, regs.rdx & 0xFF) == (0x2000, 0x20000, 0x34, 0x80)
    assert (sregs.ds.base, sregs.es.base, sregs.ss.base, regs.rsp) == (0x20000, 0x20000, 0, 0x7C00)
    assert sregs.cr0 & 1 == 0
    assert regs.rflags == 2


def test_protected_mode() -> None:
    regs, sregs = entered(ProtectedMode(0x100020, eax=1, ebx=2))
    assert (regs.rip, regs.rax, regs.rbx, regs.rflags) == (0x100020, 1, 2, 2)
    assert sregs.cr0 & 0x80000001 == 1
    assert (sregs.cs.base, sregs.cs.limit, sregs.cs.db, sregs.cs.l) == (0, 0xFFFFFFFF, 1, 0)
    assert all(
        (getattr(sregs, name).base, getattr(sregs, name).limit) == (0, 0xFFFFFFFF)
        for name in ("ds", "es", "fs", "gs", "ss")
    )


def test_long_mode_maps_four_gib_to_itself() -> None:
    _, sregs = entered(LongMode(0x100000))
    assert (sregs.cs.l, sregs.cs.db, sregs.efer & 0x500) == (1, 0, 0x500)
    memory = bytearray(0x10000)
    for segment in identity_pages():
        memory[segment.address : segment.address + len(segment.data)] = segment.data

    def entry_at(table: int, index: int) -> int:
        return int(struct.unpack_from("<Q", memory, table + 8 * index)[0])

    frame = 0x000FFFFFFFFFF000
    for address in (0, 0x1FFFFF, 0x200000, 0x7FFFFFFF, 0xC0000000, 0xFEE00030, 0xFFFFFFFF):
        pml4e = entry_at(sregs.cr3, address >> 39)
        pdpte = entry_at(pml4e & frame, address >> 30 & 511)
        pde = entry_at(pdpte & frame, address >> 21 & 511)
        assert pml4e & pdpte & pde & 3 == 3
        assert pde & 0x80
        assert (pde & frame & ~0x1FFFFF) + (address & 0x1FFFFF) == address
    assert entry_at(sregs.cr3, 1) == entry_at(layout.BOOT_PDPT, 4) == 0


LINUX32 = ProtectedMode(0, code=LINUX_CODE, data=LINUX_DATA)
LINUX64 = LongMode(0, code=LINUX_CODE, data=LINUX_DATA)


@pytest.mark.parametrize(("selector", "name", "entry", "table"), [
    (CODE32, "cs", ProtectedMode(0), gdt()), (DATA, "ss", ProtectedMode(0), gdt()), (CODE64, "cs", LongMode(0), gdt()),
    (DATA, "ds", LongMode(0), gdt()),
    (LINUX_CODE, "cs", LINUX32, linux_gdt(32)), (LINUX_DATA, "ss", LINUX32, linux_gdt(32)),
    (LINUX_CODE, "cs", LINUX64, linux_gdt(64)), (LINUX_DATA, "es", LINUX64, linux_gdt(64)),
])  # fmt: skip
def test_the_gdt_in_memory_agrees_with_the_hidden_parts(
    selector: int, name: str, entry: Entry, table: MemorySegment
) -> None:
    """A guest that loads a selector again gets what it was entered with."""
    _, sregs = entered(entry)
    assert (sregs.gdt.base, sregs.gdt.limit) == (table.address, len(table.data) - 1)
    low, high = struct.unpack_from("<2I", table.data, selector)
    limit = (low & 0xFFFF) | (high & 0xF0000)
    segment = getattr(sregs, name)
    assert segment.selector == selector
    assert (segment.base, segment.limit) == (
        low >> 16 | (high & 0xFF) << 16 | (high & 0xFF000000), limit << 12 | 0xFFF,
    )  # fmt: skip
    attributes = [high >> 8 & 0xF, *(high >> bit & 1 for bit in (12, 15, 21, 22, 23)), high >> 13 & 3]
    assert attributes == [
        segment.type, segment.s, segment.present, segment.l, segment.db, segment.g, segment.dpl,
    ]  # fmt: skip
