"""What a person looks at in code: a listing that stays as it is while RIP moves through it."""

from __future__ import annotations

from app.address import Place
from app.eyes import Eyes
from app.look import Look
from app.space import PAGE, Space
from kvm.errors import ConfigError
from kvm.x86 import decode
from kvm.x86.disasm import MAX_INSTRUCTION, disassemble
from kvm.x86.paging import linear_bits
from widgets.code_pane import CodeFrame, CodeLine

START = "rip"
"""What is looked at first."""
BACK = 64
"""Bytes from which the instruction before an address is guessed."""
REMEMBERED = 1 << 16
"""Instructions whose beginnings are."""
LEAD = 2
"""Instructions that stay above RIP when the listing moves on."""


class CodeLook(Look):
    """Where the listing begins, and which instruction is chosen in it."""

    def __init__(self) -> None:
        super().__init__(START)
        self._top = 0
        self._height = 1
        self._begins: dict[int, int] = {}
        """Where an instruction ended, to where it began: what was listed from above needs no guess on the way back."""

    def go(self, place: Place, eyes: Eyes) -> None:
        """List what is there, and follow it if the place moves. Raises ConfigError for a physical address."""
        if place.physical:
            raise ConfigError("Code is at linear addresses here; Tab goes to memory, which shows physical ones, too.")
        super().go(place, eyes)
        if self.cursor not in self._addresses(eyes):
            self._top = self.cursor

    def move(self, unit: str, by: int, eyes: Eyes) -> None:
        """By instructions ("row", "byte") or listings ("page"). Where instructions begin further up is a guess."""
        addresses = self._addresses(eyes)
        at = addresses.index(self.cursor) if self.cursor in addresses else 0
        self.follows = None
        if unit == "page":
            self._scroll(by * max(self._height - 1, 1), eyes)
        elif at + by < 0:
            self._scroll(at + by, eyes)
            at = 0
        else:
            at += by
            self._scroll(max(at - self._height + 1, 0), eyes)
        addresses = self._addresses(eyes)
        self.cursor = addresses[min(at, len(addresses) - 1)]

    def _scroll(self, lines: int, eyes: Eyes) -> None:
        """The listing begins so many lines further down, or up if negative; not beyond the ends."""
        if lines > 0:
            self._top = self._list(eyes, self._top, lines + 1)[-1].address
        for _ in range(-lines):
            space = eyes.space()
            known = self._begins.get(self._top, self._top)
            insn = disassemble(space.read(known, MAX_INSTRUCTION), known, eyes.mode.bits)
            still_so = insn and len(insn[0].raw) == self._top - known
            self._top = known if still_so else _before(space, self._top, eyes.mode.bits)

    def look(self, eyes: Eyes, width: int, height: int) -> CodeFrame:
        """What there is to draw in ``height`` rows of ``width`` cells."""
        self._height = height
        listing = self._list(eyes, self._top, height)
        self.catch_up(eyes)
        if self.follows is not None:
            addresses = [line.address for line in listing]
            at = addresses.index(self.cursor) if self.cursor in addresses else -1
            if not 0 <= at <= height * 3 // 4:
                self._top = addresses[at - LEAD] if at >= LEAD else self.cursor
                listing = self._list(eyes, self._top, height)
        digits = 8 if all(line.address < 1 << 32 for line in listing) else 16
        rip = decode.linear_rip(eyes.sregs, eyes.regs.rip, eyes.regs.rflags)
        mode, bits = eyes.mode.value, eyes.mode.bits
        name = mode if str(bits) in mode else f"{mode}, {bits} bits"
        return CodeFrame(
            f"VCPU {eyes.vcpu} {name}", (self.following,), eyes.note, tuple(listing), rip, self.cursor, digits
        )

    def _addresses(self, eyes: Eyes) -> list[int]:
        return [line.address for line in self._list(eyes, self._top, self._height)]

    def _list(self, eyes: Eyes, top: int, count: int) -> list[CodeLine]:
        """``count`` lines from ``top`` on, fewer at the end of the address space; a page that can't be read is one."""
        space = eyes.space()
        base = 0 if eyes.mode is decode.Mode.LONG else eyes.sregs.cs.base
        mask = (1 << linear_bits(eyes.sregs)) - 1
        end = mask if top <= mask else (1 << space.bits) - 1
        lines: list[CodeLine] = []
        at = top
        while len(lines) < count and at <= end:
            code = space.read(at, (count - len(lines)) * MAX_INSTRUCTION)
            if not code:
                lines.append(CodeLine(at, b"", space.page(at).why))
                at += PAGE - at % PAGE
            for insn in disassemble(code, at - base & mask, eyes.mode.bits, count - len(lines)):
                segmented = f"{eyes.sregs.cs.selector:04x}:{insn.address:04x}" if base else ""
                lines.append(CodeLine(at, insn.raw, insn.text, segmented))
                self._begins[at + len(insn.raw)] = at
                at += len(insn.raw)
        if len(self._begins) > REMEMBERED:
            self._begins.clear()
        return lines


def _before(space: Space, address: int, bits: int) -> int:
    """Where the instruction that ends at ``address`` begins; 0 at the beginning of the address space.

    x86 can't be read backwards: it's the last one of those that fit in between from as far up as possible.
    """
    start = max(address - BACK, 0)
    code = space.read(start, address - start)
    if len(code) < address - start:  # a page that can't be read is one line
        start = (address - 1) // PAGE * PAGE
        code = space.read(start, address - start)
    for skipped in range(len(code)):
        lines = disassemble(code[skipped:], start + skipped, bits, BACK)
        if all(line.text != "(bad)" for line in lines):
            return lines[-1].address
    return address - 1 if code else start
