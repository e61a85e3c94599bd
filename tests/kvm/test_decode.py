"""Registers in words, disassembly, and the walk of the page tables."""

from __future__ import annotations

import pytest

from kvm.x86 import decode, paging
from kvm.x86.decode import Mode
from kvm.x86.disasm import disassemble
from kvm.x86.structs import Segment, Sregs

PE, PG, PAE, PSE, LA57, LMA, VM = 1, 1 << 31, 1 << 5, 1 << 4, 1 << 12, 1 << 10, 1 << 17


def sregs(*, cr0: int = 0, cr4: int = 0, efer: int = 0, long: int = 0, db: int = 0, dpl: int = 0) -> Sregs:
    made = Sregs(cr0=cr0, cr4=cr4, efer=efer)
    made.cs.l, made.cs.db, made.ss.dpl = long, db, dpl
    return made


@pytest.mark.parametrize(
    ("state", "rflags", "mode", "bits", "cpl"),
    [
        (sregs(dpl=3), 0, Mode.REAL, 16, 0),
        (sregs(cr0=PE), VM, Mode.VM86, 16, 3),
        (sregs(cr0=PE), 0, Mode.PROTECTED_16, 16, 0),
        (sregs(cr0=PE, db=1, dpl=2), 0, Mode.PROTECTED_32, 32, 2),
        (sregs(cr0=PE | PG, efer=LMA), 0, Mode.COMPAT_16, 16, 0),
        (sregs(cr0=PE | PG, efer=LMA, db=1, dpl=3), 0, Mode.COMPAT_32, 32, 3),
        (sregs(cr0=PE | PG, efer=LMA, long=1, dpl=3), 0, Mode.LONG, 64, 3),
    ],
)
def test_mode_and_cpl(state: Sregs, rflags: int, mode: Mode, bits: int, cpl: int) -> None:
    assert (decode.mode(state, rflags), decode.mode(state, rflags).bits) == (mode, bits)
    assert decode.cpl(state, rflags) == cpl


def test_the_next_instruction_is_at_cs_base_plus_rip_except_in_long_mode() -> None:
    real = sregs()
    real.cs.base = 0xFFFF0000
    assert decode.linear_rip(real, 0xFFF0, 2) == 0xFFFFFFF0
    real.cs.base = 0xFFFFFFF0
    assert decode.linear_rip(real, 0x20, 2) == 0x10
    flat = sregs(cr0=PE | PG, efer=LMA, long=1)
    flat.cs.base = 0x1000
    assert decode.linear_rip(flat, 0xFFFFFFFF80000000, 2) == 0xFFFFFFFF80000000


def test_flags_are_spelled_out_and_those_set_are_upper_case() -> None:
    words = decode.flag_words(0x3246)
    assert " ".join(word for word, _ in words) == "cf PF af ZF sf tf IF df of iopl3"
    assert [word for word, is_set in words if is_set] == ["PF", "ZF", "IF", "iopl3"]
    assert "AC" in [word for word, _ in decode.flag_words(1 << 18)]


def test_bits_without_a_name_are_not_hidden() -> None:
    assert decode.bit_names(0x80050033, decode.CR0_BITS) == ("PG", "AM", "WP", "NE", "ET", "MP", "PE")
    assert decode.bit_names(0xD01, decode.EFER_BITS) == ("SCE", "LME", "LMA", "NXE")
    assert decode.bit_names(1 << 63 | 1 << 5, decode.CR4_BITS) == ("PAE", "bit 63")


@pytest.mark.parametrize(
    ("segment", "text"),
    [
        (Segment(type=0xB, present=1, s=1, l=1), "code64 r-x dpl0"),
        (Segment(type=0x9, present=1, s=1, db=1, dpl=3), "code32 --x dpl3"),
        (Segment(type=0xF, present=1, s=1), "code16 r-x dpl0 conforming"),
        (Segment(type=0x3, present=1, s=1, db=1), "data32 rw- dpl0"),
        (Segment(type=0x5, present=1, s=1), "data16 r-- dpl0 down"),
        (Segment(type=0xB, present=1), "busy TSS dpl0"),
        (Segment(type=0x2, present=1), "LDT dpl0"),
        (Segment(type=0x3, s=1), "not present"),
        (Segment(type=0x3, s=1, present=1, unusable=1), "unusable"),
    ],
)
def test_segments(segment: Segment, text: str) -> None:
    assert decode.segment_text(segment) == text


@pytest.mark.parametrize(
    ("bits", "code", "text"),
    [
        (16, "b8 34 12", "mov ax, 0x1234"),
        (32, "b8 78 56 34 12", "mov eax, 0x12345678"),
        (64, "48 b8 88 77 66 55 44 33 22 11", "movabs rax, 0x1122334455667788"),
        (16, "eb fe", "jmp 0x7c00"),
    ],
)
def test_the_same_bytes_mean_what_the_mode_says(bits: int, code: str, text: str) -> None:
    raw = bytes.fromhex(code)
    (line,) = disassemble(raw + b"\x90" * 5, 0x7C00, bits)
    assert (line.raw, line.text) == (raw, text)


def test_bytes_that_are_no_instruction_get_a_line_and_the_next_one_follows() -> None:
    lines = disassemble(bytes.fromhex("06 90 0f"), 0x1000, 64, 5)
    assert [(line.address, line.text) for line in lines] == [(0x1000, "(bad)"), (0x1001, "nop"), (0x1002, "(bad)")]
    assert disassemble(b"", 0, 64) == ()


class Physical:
    """Guest-physical memory of table entries."""

    def __init__(self, entries: dict[int, int]) -> None:
        self.entries = entries

    def read(self, address: int, size: int) -> bytes:
        return self.entries.get(address, 0).to_bytes(8, "little")[:size]


def long_mode(cr4: int = PAE) -> Sregs:
    made = sregs(cr0=PE | PG, cr4=cr4, efer=LMA, long=1)
    made.cr3 = 0x1000
    return made


@pytest.mark.parametrize(
    ("entries", "linear", "physical"),
    [
        ({0x1000: 0x2003, 0x2000: 0x3003, 0x3000: 0x4003, 0x4008: 0x9003}, 0x1234, 0x9234),
        ({0x1000: 0x2003, 0x2000: 0x3003, 0x3008: 0x40_0083}, 0x20_1234, 0x40_1234),
        ({0x1000: 0x2003, 0x2000: 0x8000_0083}, 0x1234_5678, 0x9234_5678),
        ({0x1FF8: 0x2003, 0x2FF0: 0x8000_0000_0000_3003, 0x3000: 0x83}, 0xFFFFFFFF80000010, 0x10),
        ({0x1000: 0x2003, 0x2000: 0x3002}, 0x1234, None),
        ({}, 0x1234, None),
    ],
)
def test_long_mode_paging(entries: dict[int, int], linear: int, physical: int | None) -> None:
    assert paging.translate(long_mode(), linear, Physical(entries).read) == physical


def test_five_level_paging_has_one_table_more() -> None:
    entries = {0x1000: 0x2003, 0x2000: 0x3003, 0x3000: 0x4003, 0x4000: 0x5003, 0x5008: 0x9003}
    assert paging.translate(long_mode(PAE | LA57), 0x1234, Physical(entries).read) == 0x9234


def test_pae_paging() -> None:
    state = sregs(cr0=PE | PG, cr4=PAE, db=1)
    state.cr3 = 0x1020
    entries = {0x1038: 0x2001, 0x2000: 0x3003, 0x3008: 0x9003, 0x2008: 0x40_0083}
    assert paging.translate(state, 0xC0001234, Physical(entries).read) == 0x9234
    assert paging.translate(state, 0xC0201234, Physical(entries).read) == 0x40_1234
    assert paging.translate(state, 0x1234, Physical(entries).read) is None


def test_32_bit_paging() -> None:
    state = sregs(cr0=PE | PG, cr4=PSE, db=1)
    state.cr3 = 0x1000
    entries = {0x1C00: 0x2003, 0x2004: 0x9003, 0x1004: 0x0080_2083}
    assert paging.translate(state, 0xC0001234, Physical(entries).read) == 0x9234
    assert paging.translate(state, 0x0040_1234, Physical(entries).read) == 0x1_0080_1234
    state.cr4 = 0
    assert paging.translate(state, 0x0040_1234, Physical(entries).read) is None


def test_without_paging_linear_is_physical() -> None:
    assert paging.translate(sregs(), 0xFFFFFFF0, Physical({}).read) == 0xFFFFFFF0


@pytest.mark.parametrize(
    ("cr4", "long", "entries", "expected"),
    [
        (PAE, 1, {0x1008: 0x2003, 0x2000: 0x3003, 0x2008: 0x83, 0x3000: 0x4003, 0x3008: 0x5083, 0x4000: 0x9003},
         {0x1000, 0x2000, 0x3000, 0x4000}),
        (PAE | LA57, 1, {0x1000: 0x2003, 0x2000: 0x3003, 0x3000: 0x4003, 0x4000: 0x5003, 0x5000: 0x9003},
         {0x1000, 0x2000, 0x3000, 0x4000, 0x5000}),
        (PAE, 0, {0x1000: 0x2001, 0x1018: 0x3001, 0x1020: 0x7001, 0x2000: 0x4003, 0x3008: 0x83},
         {0x2000, 0x3000, 0x4000}),
        (PSE, 0, {0x1000: 0x2003, 0x1008: 0x3083, 0x2000: 0x9003}, {0x1000, 0x2000}),
    ],
)  # fmt: skip
def test_pages_of_page_tables(cr4: int, long: int, entries: dict[int, int], expected: set[int]) -> None:
    state = long_mode(cr4) if long else sregs(cr0=PE | PG, cr4=cr4, db=1)
    state.cr3 = 0x1000

    def read(address: int, size: int) -> bytes:
        return b"".join(entries.get(at, 0).to_bytes(8, "little") for at in range(address, address + size, 8))

    assert paging.tables(state, read) == expected


def test_without_paging_there_are_no_tables() -> None:
    assert paging.tables(sregs(), Physical({}).read) == set()


@pytest.mark.parametrize(
    ("cr4", "address", "is_one"),
    [
        (PAE, 0x7FFF_FFFF_FFFF, True),
        (PAE, 0x8000_0000_0000, False),
        (PAE, 0xFFFF_7FFF_FFFF_FFFF, False),
        (PAE, 0xFFFF_8000_0000_0000, True),
        (PAE | LA57, 0x8000_0000_0000, True),
        (PAE | LA57, 0xFF_FFFF_FFFF_FFFF, True),
        (PAE | LA57, 1 << 56, False),
        (PAE | LA57, 0xFF00_0000_0000_0000, True),
    ],
)
def test_an_address_that_is_not_canonical_is_mapped_nowhere(cr4: int, address: int, is_one: bool) -> None:
    """Its low bits must not be looked up: that would be another address's page."""
    state = long_mode(cr4)
    assert paging.is_linear(state, address) == is_one
    everything = paging.translate(state, address, lambda at, size: (0x1003).to_bytes(size, "little"))
    assert everything == (0x1000 | address & 0xFFF if is_one else None)


def test_outside_long_mode_there_are_32_bits() -> None:
    pae = sregs(cr0=PE | PG, cr4=PAE, db=1)
    for state in (sregs(), pae, sregs(cr0=PE | PG, db=1)):
        assert paging.translate(state, 1 << 32, lambda at, size: (0x1003).to_bytes(size, "little")) is None
        assert paging.linear_bits(state) == 32


def test_a_range_comes_page_by_page_and_wraps_at_the_end() -> None:
    entries = {0x1000: 0x2003, 0x2000: 0x3003, 0x3000: 0x4003, 0x4008: 0x9003, 0x4010: 0x5003}
    read = Physical(entries).read
    assert list(paging.pieces(long_mode(), 0x1FFE, 0x1005, read)) == [
        (0x1FFE, 2, 0x9FFE), (0x2000, 0x1000, 0x5000), (0x3000, 3, None)
    ]  # fmt: skip
    assert list(paging.pieces(sregs(), 0xFFFF_FFFF, 3, read)) == [(0xFFFF_FFFF, 1, 0xFFFF_FFFF), (0, 2, 0)]
    assert list(paging.pieces(long_mode(), 2**64 - 1, 2, read)) == [(2**64 - 1, 1, None), (0, 1, None)]
    assert list(paging.pieces(sregs(), 0, 0, read)) == []
