"""Where to look in memory, as a person types it: ``7c00``, ``rsp``, ``rbp-18``, ``gs.base+10``, ``phys:cr3``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from app.edit import LONGEST
from kvm.errors import ConfigError
from kvm.x86 import decode, registers
from kvm.x86.paging import PHYSICAL_BITS, linear_bits
from kvm.x86.structs import Regs, Sregs
from widgets.line_pane import cut

PHYSICAL, LINEAR = "phys:", "lin:"
_NUMBER = re.compile(r"(0x)?([0-9a-f]+)")
_TERM = re.compile(r"\s*([+-]?)\s*([^\s+-]*)")


@dataclass(frozen=True, slots=True)
class Place:
    """A sum of numbers and registers, as ``text`` says. ``physical``: guest-physical, else linear."""

    text: str
    physical: bool
    terms: tuple[tuple[int, int | str], ...]
    """Each a sign, 1 or -1, and a number or a register's name."""

    @property
    def moves(self) -> bool:
        """Does it depend on a register?"""
        return any(isinstance(term, str) for _, term in self.terms)

    def address(self, regs: Regs, sregs: Sregs) -> int:
        """Where it is with these registers. It wraps at the end of the address space.

        Linear, RIP is what CS makes of it, and RSP and RBP what SS does: only outside long mode that's a difference.
        """
        total = sum(sign * self._value(term, regs, sregs) for sign, term in self.terms)
        bits = PHYSICAL_BITS if self.physical else linear_bits(sregs)
        return total & (1 << bits) - 1

    def _value(self, term: int | str, regs: Regs, sregs: Sregs) -> int:
        if isinstance(term, int):
            return term
        if not self.physical and term == "rip":
            return decode.linear_rip(sregs, regs.rip, regs.rflags)
        value = registers.value(term, regs, sregs)
        if not self.physical and term in ("rsp", "rbp") and decode.mode(sregs, regs.rflags) is not decode.Mode.LONG:
            return sregs.ss.base + (value & (0xFFFFFFFF if sregs.ss.db else 0xFFFF)) & 0xFFFFFFFF
        return value


def parse(text: str, *, physical: bool = False) -> Place:
    """What was typed; ``physical``: what it is without ``phys:`` or ``lin:``. Raises ConfigError: what is wrong."""
    typed = text.strip().lower()
    if typed.startswith((PHYSICAL, LINEAR)):
        physical = typed.startswith(PHYSICAL)
    rest = typed.removeprefix(PHYSICAL).removeprefix(LINEAR).strip()
    if not rest:
        raise ConfigError("Which address? Write 7c00, rsp, rbp-18 or phys:1000; numbers are hexadecimal.")
    terms: list[tuple[int, int | str]] = []
    at = 0
    while at < len(rest):
        found = _TERM.match(rest, at)
        assert found is not None  # it matches nothing, too
        sign, word = found.groups()
        if terms and not sign:
            raise ConfigError(f"There is no + or - before {cut(word, LONGEST)!r}.")
        if not word:
            raise ConfigError(
                f"Behind {cut(rest[: found.end()].strip(), LONGEST)!r} a number or a register is missing."
            )
        terms.append((-1 if sign == "-" else 1, _term(word)))
        at = found.end()
    return Place(re.sub(r"\s+", "", rest), physical, tuple(terms))


def words(text: str) -> list[str]:
    """What Tab completes this to: its last word."""
    begun = re.split(r"[+\-:\s]", text)[-1].lower()
    before = text[: len(text) - len(begun)]
    known = registers.WIDTHS if before else (PHYSICAL, LINEAR, *registers.WIDTHS)
    return [before + name for name in known if begun and name.startswith(begun)]


def _term(word: str) -> int | str:
    if word in registers.WIDTHS:
        return word
    if number := _NUMBER.fullmatch(word):
        if len(number[2].lstrip("0")) > 16:
            raise ConfigError(f"{cut(word, LONGEST)} has more than 64 bits.")
        return int(number[2], 16)
    near = [name for name in registers.WIDTHS if name.startswith(f"{word}.")]
    near = near or get_close_matches(word, registers.WIDTHS)
    instead = f"There is {', '.join(near)}." if near else "Numbers are hexadecimal, Tab completes registers."
    raise ConfigError(f"{cut(word, LONGEST)!r} is neither a number nor a register. {instead}")
