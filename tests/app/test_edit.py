"""What a person types to set a register, and what they are told about it."""

from __future__ import annotations

import pytest

from app.edit import help_line, parse, words
from kvm.errors import ConfigError
from kvm.x86.registers import WIDTHS
from tests.widgets.hosts import regs, sregs


@pytest.mark.parametrize(
    ("text", "edit"),
    [
        ("rax=0x1234", ("rax", 0x1234)),
        ("rip = 1000", ("rip", 1000)),
        ("  RFLAGS=0b10 ", ("rflags", 2)),
        ("cs.base=0xffff0000", ("cs.base", 0xFFFF0000)),
        ("GDT.limit=0xFFFF", ("gdt.limit", 0xFFFF)),
        ("rax=0xffff_ffff_ffff_ffff", ("rax", 2**64 - 1)),
    ],
)
def test_what_can_be_typed(text: str, edit: tuple[str, int]) -> None:
    assert parse(text) == edit


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "Which register?"),
        ("=5", "Which register?"),
        ("rax", "rax needs a value: rax=0x1000"),
        ("rax=", "no value for rax"),
        ("rax=12 34", "no value for rax"),
        ("rax=0x", "no value for rax"),
        ("rip=10a0", "hexadecimal needs its 0x, rip=0x10a0"),
        ("rfl=2", "There is rflags"),
        ("cs=8", "There is cs.base, cs.limit, cs.selector"),
        ("xyzzy=1", "Tab shows the names"),
        ("rax=0x10000000000000000", "doesn't fit rax, which has 64 bits"),
        ("rax=-1", "doesn't fit rax"),
        ("cs.selector=65536", "16 bits"),
        ("rax=" + "9" * 5000, "hexadecimal needs its 0x"),
        ("rax=" + "z" * 5000, "no value for rax"),
        ("z" * 5000, "no register"),
    ],
)
def test_what_cannot(text: str, error: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(text)
    assert error in str(raised.value)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "rip=0x1000"),
        ("rb", "rbx  rbp"),
        ("r", "rax  rbx  rcx  rdx  rsi  rdi  rsp  rbp  r8  r9  r10  r11 …"),
        ("rbx", "rbx, 64 bits, is 000000000000beef"),
        ("rbx=", "rbx, 64 bits, is 000000000000beef"),
        ("rbx=16", "rbx 000000000000beef → 0000000000000010"),
        ("cs.selector=8", "cs.selector 0010 → 0008"),
        ("cr3=0x2000", "cr3 0000000000001000 → 0000000000002000"),
        ("xyzzy", "no register 'xyzzy'"),
        ("rbx=zz", "no value for rbx"),
    ],
)
def test_help_while_typing(text: str, shown: str) -> None:
    assert shown in help_line(text, regs(rbx=0xBEEF), sregs(), running=False)


def test_help_says_that_the_guest_will_be_paused_and_what_is_not_known() -> None:
    assert help_line("rax=1", b"", b"", running=True) == "Enter pauses the guest; rax not known → 0000000000000001"


@pytest.mark.parametrize("register", WIDTHS)
def test_every_register_has_a_value_to_show(register: str) -> None:
    assert f"{register}=" in words(register)
    assert "→" in help_line(f"{register}=1", regs(), sregs(), running=False)
