"""A VCPU's pane: who owns its state, RIP and its instruction, registers, flags, control registers, segments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from textual import events
from textual.message import Message

from kvm.x86 import decode
from kvm.x86.structs import GENERAL_REGISTERS, SEGMENT_REGISTERS, Regs, Sregs
from widgets.frame import VcpuFrame
from widgets.line_pane import GAP, Line, LinePane, Span, bar, cut, width_of

MARK = "•"
"""Stands before a register that changed, for those who see no colours."""
ACTIVITY = {
    "running": ("▶", "good"),
    "halted": ("◌", "info"),
    "wait-for-SIPI": ("◌", "dim"),
    "stopped": ("■", "warn"),
    "": ("?", "dim"),
}
"""Activity to its glyph and style."""

MIN_WIDTH = 46
"""Cells that a pane needs: RFLAGS spelled out, or two registers side by side."""
_CELL = 23
WIDE = 98
"""From here on four registers fit side by side, and the segments beside the control registers."""
_SEGMENTS = 54
MODE = 64
"""From here on the title says "long mode", below it "long"."""
SHORTEST_REASON = 7
"""Cells of a reason that still say something; the status line has it, too."""


def columns(width: int) -> int:
    """How many registers stand side by side in a pane of this width."""
    return 4 if width >= WIDE else 3 if width >= 3 * _CELL + 2 else 2


def heights(width: int) -> tuple[int, int]:
    """Rows that a pane of this width needs: (compact, everything)."""
    compact = {2: 11, 3: 9, 4: 7}[columns(width)]
    return compact, compact + {2: 18, 3: 14, 4: 10}[columns(width)]


def vcpu_lines(frame: VcpuFrame, width: int, *, selected: bool = False) -> list[Line]:
    """The pane's lines, the most important ones first."""
    regs = Regs.from_buffer_copy(frame.regs) if frame.regs else None
    sregs = Sregs.from_buffer_copy(frame.sregs) if frame.sregs else None
    lines = [_title(frame, regs, sregs, width, selected), _rip(frame, regs, sregs, width)]
    lines += _registers(frame, regs, sregs, columns(width))
    lines.append(_flags(frame, regs))
    segments, controls = _segments(frame, sregs, width), _controls(frame, sregs, width)
    if width >= WIDE:
        for left, right in zip_longest(segments, controls, fillvalue=()):
            gap = " " * max(_SEGMENTS - width_of(left), 0)
            lines.append((*left, (gap, ""), *right))
    else:
        lines += [*controls, *segments]
    return lines


def _title(frame: VcpuFrame, regs: Regs | None, sregs: Sregs | None, width: int, selected: bool) -> Line:
    glyph, style = ACTIVITY.get(frame.activity, ACTIVITY[""])
    left: list[Span] = [(f" VCPU {frame.index} ", "strong"), (f"{glyph} {frame.activity or 'unknown'}", style)]
    if frame.age:
        left.append((f" {frame.age} s ago", "warn"))
    right: list[list[Span]] = []
    if regs and sregs:
        mode = decode.mode(sregs, regs.rflags).value
        mode = mode if width >= MODE else mode.removesuffix(" mode")
        right.append([(f"{mode} CPL{decode.cpl(sregs, regs.rflags)}", "")])
    right.append([("user copy owns", "accent")] if frame.dirty else [("kernel owns", "")])
    right.append([(f"put {frame.last_put}" if frame.last_put else "never put", "label")])
    reason = frame.reason
    if frame.activity == "halted" and regs and ("IF", True) not in decode.flag_words(regs.rflags):
        reason = "interrupts are off"
    room = width - width_of(left) - sum(width_of(group) + len(GAP) for group in right) - 2
    if reason and room >= SHORTEST_REASON:
        left.insert(2, (f": {cut(reason, room)}", style))
    return bar(left, right, width, "bar selected" if selected else "bar")


def _name(frame: VcpuFrame, name: str, width: int = 3, text: str = "") -> tuple[list[Span], str]:
    """A register's name, with its mark if it changed; and the style of its value."""
    changed = name in frame.changed
    spans = [(MARK if changed else " ", "mark"), (f"{(text or name).upper():<{width}} ", "label")]
    return spans, "changed" if changed else "text"


def number(value: int | None, digits: int, style: str = "text") -> tuple[Span, ...]:
    """A hexadecimal number with its leading zeros dimmed, so that what counts stands out."""
    if value is None:
        return (("?".rjust(digits), "dim"),)
    text = f"{value:0{digits}x}"
    if not value and style == "text":
        return ((text, "dim"),)
    significant = text.lstrip("0") or "0"
    zeros = text[: len(text) - len(significant)]
    return ((zeros, "dim"), (significant, style)) if zeros else ((text, style),)


def _rip(frame: VcpuFrame, regs: Regs | None, sregs: Sregs | None, width: int) -> Line:
    rip = f"{regs.rip:016x}" if regs else "?".rjust(16)
    spans: list[Span] = [_name(frame, "rip")[0][0], (f"RIP {rip}", "rip"), ("  ", "")]
    if regs and sregs and decode.mode(sregs, regs.rflags) in (decode.Mode.REAL, decode.Mode.VM86):
        spans.append((f"{sregs.cs.selector:04x}:{regs.rip & 0xFFFF:04x}  ", "label"))
    if frame.index and regs and sregs and regs.rip == 0xFFF0 and sregs.cs.base == 0xFFFF0000:
        # Only INIT leaves an AP at the reset vector, and nothing there is executed before its SIPI.
        return (*spans, ("waits for SIPI", "dim"))
    if frame.insn is None:
        return (*spans, ("?" if not regs else "? not readable", "dim"))
    if width >= 80:
        spans.append((f"{frame.insn.raw.hex(' '):<24} ", "label"))
    return (*spans, (cut(frame.insn.text, width - width_of(spans)), "strong"))


def _register(frame: VcpuFrame, name: str, value: int | None) -> list[Span]:
    spans, style = _name(frame, name)
    return [*spans, *number(value, 16, style), ("  ", "")]


def _registers(frame: VcpuFrame, regs: Regs | None, sregs: Sregs | None, across: int) -> list[Line]:
    values = [(name, getattr(regs, name) if regs else None) for name in GENERAL_REGISTERS]
    if across == 3:
        # Two cells would stay empty: the page fault's address and the page table fill them.
        values += [(name, getattr(sregs, name) if sregs else None) for name in ("cr2", "cr3")]
    rows = len(values) // across
    cells = [_register(frame, name, value) for name, value in values]
    return [tuple(span for cell in cells[row::rows] for span in cell) for row in range(rows)]


def _flags(frame: VcpuFrame, regs: Regs | None) -> Line:
    spans, style = _name(frame, "rflags", text="rfl")
    spans += number(regs.rflags & 0xFFFFFFFF if regs else None, 8, style)
    for word, is_set in decode.flag_words(regs.rflags) if regs else ():
        spans.append((f" {word}", "strong" if is_set else "dim"))
    return tuple(spans)


def _named_bits(
    frame: VcpuFrame, name: str, value: int | None, bits: tuple[tuple[str, int], ...], width: int
) -> list[Line]:
    """A control register and the names of its bits, on as many lines as these need."""
    label, style = _name(frame, name, 4)
    line: list[Span] = [*label, *number(value, 8, style)]
    lines, used = [], 14
    for word in decode.bit_names(value, bits) if value is not None else ():
        if used + len(word) + 1 > width:
            lines.append(tuple(line))
            line, used = [(" " * 14, "")], 14
        line.append((f" {word}", "text"))
        used += len(word) + 1
    return [*lines, tuple(line)]


def _controls(frame: VcpuFrame, sregs: Sregs | None, width: int) -> list[Line]:
    def value(name: str) -> int | None:
        return getattr(sregs, name) if sregs else None

    def plain(name: str, digits: int) -> Line:
        label, style = _name(frame, name, 4)
        return (*label, *number(value(name), digits, style))

    room = width - _SEGMENTS if width >= WIDE else width
    lines = _named_bits(frame, "cr0", value("cr0"), decode.CR0_BITS, room)
    lines += _named_bits(frame, "cr4", value("cr4"), decode.CR4_BITS, room)
    lines += _named_bits(frame, "efer", value("efer"), decode.EFER_BITS, room)
    if columns(width) == 3:
        return lines  # CR2 and CR3 stand beside the general registers, CR8 beside the tables
    return [*lines, (*plain("cr8", 1), ("  ", ""), *plain("cr2", 16)), plain("cr3", 16)]


def _segments(frame: VcpuFrame, sregs: Sregs | None, width: int) -> list[Line]:
    """Selector, base, limit, attributes; the limit gives way where it's narrow."""
    with_limit = width >= _SEGMENTS
    lines: list[Line] = []
    for name in SEGMENT_REGISTERS:
        spans, style = _name(frame, name)
        segment = getattr(sregs, name) if sregs else None
        spans += number(segment.selector if segment else None, 4, style)
        spans += [(" ", ""), *number(segment.base if segment else None, 16, style)]
        if with_limit:
            spans += [(" ", ""), *number(segment.limit if segment else None, 8, style)]
        spans.append((f" {decode.segment_text(segment) if segment else '?'}", "label"))
        lines.append(tuple(spans))
    beside = columns(width) == 3
    tables = []
    for name in ("gdt", "idt"):
        spans, style = _name(frame, name)
        table = getattr(sregs, name) if sregs else None
        if not beside:
            spans.append(("     ", ""))  # they have no selector
        spans += number(table.base if table else None, 16, style)
        spans.append(("     " if with_limit and not beside else " ", ""))
        spans += number(table.limit if table else None, 4, style)
        tables.append(tuple(spans))
    if not beside:
        return [*lines, *tables]
    gdt, idt = tables
    cr8, style = _name(frame, "cr8")
    return [*lines, (*gdt, ("  ", ""), *idt, ("  ", ""), *cr8, *number(sregs.cr8 if sregs else None, 1, style))]


class VcpuPane(LinePane):
    """One VCPU, drawn from a frame."""

    class Selected(Message):
        """The pane was clicked."""

        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.frame = VcpuFrame(0)
        self.selected = False

    def show(self, frame: VcpuFrame, *, selected: bool) -> None:
        """Draw this VCPU from now on."""
        if frame != self.frame or selected != self.selected:
            self.frame, self.selected = frame, selected
            self.redraw()

    def lines(self, width: int, height: int) -> Sequence[Line]:
        return vcpu_lines(self.frame, width, selected=self.selected)

    def on_click(self, event: events.Click) -> None:
        event.stop()
        self.post_message(self.Selected(self.frame.index))
