"""Addresses as they are typed, and what they come to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.address import parse, words
from kvm.errors import ConfigError
from kvm.x86 import registers
from kvm.x86.decode import CR0_PE, EFER_LMA
from kvm.x86.structs import Regs, Sregs

REGS = Regs(rip=0x123, rsp=0xFFFF_FFFF_0001_2340, rbp=8, rdi=0xFFFF_8880_0000_0000, rax=5)


def long_mode() -> Sregs:
    made = Sregs(cr0=CR0_PE, efer=EFER_LMA, cr3=0x1000)
    made.cs.l, made.cs.base, made.ss.base, made.gs.base = 1, 0x7000, 0x8000, 0xFFFF_C000
    made.idt.base = 0x5000
    return made


def real_mode() -> Sregs:
    made = Sregs()
    made.cs.base, made.ss.base, made.ds.base = 0xF0000, 0x20000, 0x30000
    return made


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("7c00", 0x7C00),
        ("0x7C00", 0x7C00),
        ("  rsp ", 0xFFFF_FFFF_0001_2340),
        ("RSP + 10", 0xFFFF_FFFF_0001_2350),
        ("rbp-0x8", 0),
        ("rbp-9", 2**64 - 1),
        ("-1", 2**64 - 1),
        ("rip", 0x123),
        ("gs.base+10", 0xFFFF_C010),
        ("rdi+rax+1", 0xFFFF_8880_0000_0006),
        ("00000000000000000000000000001", 1),
        ("idt.base", 0x5000),
        ("lin:cr3", 0x1000),
    ],
)
def test_what_can_be_typed(text: str, address: int) -> None:
    place = parse(text)
    assert not place.physical
    assert place.address(REGS, long_mode()) == address
    assert place.moves == any(letter in text.lower() for letter in "rist")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("rip", 0xF0123),
        ("rsp", 0x22340),
        ("rbp+8", 0x20010),
        ("rax", 5),
        ("ds.base+rax", 0x30005),
        ("rax-6", 2**32 - 1),
    ],
)
def test_outside_long_mode_rip_and_the_stack_are_in_their_segments(text: str, address: int) -> None:
    assert parse(text).address(REGS, real_mode()) == address


def test_a_32_bit_stack_has_32_bits() -> None:
    sregs = real_mode()
    sregs.ss.db = 1
    assert parse("rsp").address(REGS, sregs) == 0x32340
    assert parse("phys:rsp").address(REGS, sregs) == 0xF_FFFF_0001_2340, "physical: the number in the register"


def test_physical_is_said_or_the_pane_is() -> None:
    assert parse("phys:cr3").physical
    assert parse("PHYS: 1000", physical=False).address(REGS, long_mode()) == 0x1000
    assert parse("1000", physical=True).physical
    assert not parse("lin:1000", physical=True).physical
    assert parse("phys:-1").address(REGS, long_mode()) == 2**52 - 1


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "Which address?"),
        ("phys:", "Which address?"),
        ("rsp+", "Behind 'rsp+' a number or a register is missing"),
        ("rsp++8", "Behind 'rsp+' a number or a register is missing"),
        ("rsp 8", "no + or - before '8'"),
        ("esp", "neither a number nor a register. There is rsp"),
        ("cs", "There is cs.base, cs.limit, cs.selector"),
        ("cs.base.x", "'cs.base.x' is neither"),
        ("xyzzy", "Numbers are hexadecimal, Tab completes registers"),
        ("0x", "'0x' is neither"),
        ("12_34", "'12_34' is neither"),
        ("f000:fff0", "'f000:fff0' is neither"),
        ("10000000000000000", "more than 64 bits"),
        ("z" * 5000, "neither"),
        ("9" * 5000, "more than 64 bits"),
    ],
)
def test_what_cannot(text: str, error: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(text)
    assert error in str(raised.value)
    assert len(str(raised.value)) < 200


REGISTER = st.sampled_from(["rax", "rdi", "r15", "cr3", "fs.base", "gdt.limit"])
TERM = st.tuples(st.sampled_from("+-"), st.one_of(REGISTER, st.integers(0, 2**64 - 1)))


@given(st.lists(TERM, min_size=1, max_size=5), st.sampled_from(["", " ", "  "]), st.booleans())
def test_a_sum_is_what_python_says(terms: list[tuple[str, int | str]], space: str, physical: bool) -> None:
    sregs = long_mode()
    text, total = "phys:" * physical, 0
    for sign, term in terms:
        text += f"{space}{sign}{space}{term.upper() if isinstance(term, str) else f'{term:#x}'}"
        number = registers.value(term, REGS, sregs) if isinstance(term, str) else term
        total += -number if sign == "-" else number
    place = parse(text)
    assert place.address(REGS, sregs) == total % (2**52 if physical else 2**64)
    assert parse(place.text, physical=physical) == place, "what is shown can be typed"


@given(st.text(alphabet=st.one_of(st.sampled_from("rsp0xf+-:. cdbaeihl"), st.characters())))
def test_whatever_is_typed_is_an_address_or_said_to_be_none(text: str) -> None:
    said = ""
    try:
        place = parse(text)
    except ConfigError as error:
        said = str(error)
    else:
        assert 0 <= place.address(REGS, long_mode()) < 2**64
        assert 0 <= place.address(REGS, real_mode()) < 2**52
    assert len(said) < 500, "not all that was pasted"


def test_tab_completes_the_last_word() -> None:
    assert words("rs") == ["rsi", "rsp"]
    assert words("phys:c") == [f"phys:cr{number}" for number in (0, 2, 3, 4, 8)] + [
        f"phys:cs.{field}" for field in ("base", "limit", "selector")
    ]
    assert words("gs.base+r1")[:2] == ["gs.base+r10", "gs.base+r11"]
    assert words("ph") == ["phys:"]
    assert words("") == []
