"""What a person needs to know when the guest can't go on: what happened, where, and what to do.

One look at the machine, told twice: as text on a terminal, and as the lines of the workstation's banner.
"""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING

from app.code import read_code
from kvm.backends.interface import ExitKind
from kvm.machine import Machine, Phase, Status
from kvm.x86 import decode
from kvm.x86.disasm import Instruction, disassemble
from kvm.x86.structs import Regs, Sregs

if TYPE_CHECKING:  # headless runs do without Textual
    from widgets.line_pane import Line

_WHAT = {
    ExitKind.SHUTDOWN: (
        "shut down: triple fault",
        "An exception came while a double fault was being delivered. Look at the IDT, the stack and the page tables.",
    ),
    ExitKind.INTERNAL_ERROR: (
        "stopped: KVM can't go on",
        "KVM had to emulate this instruction and doesn't know how. The guest stands before it, unharmed.",
    ),
    ExitKind.FAIL_ENTRY: (
        "stopped: the processor refused the guest's state",
        "Some register holds what no guest can have; look at the segments, CR0, CR4 and EFER.",
    ),
    ExitKind.SYSTEM_EVENT: ("asked for the end", "The guest shut the machine down by itself."),
    ExitKind.UNKNOWN: ("stopped", "KVM gave a reason that vmdeck doesn't know."),
}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the VCPU that stopped stands. ``code``: the bytes at RIP, more than the instruction's; empty if unknown."""

    mode: decode.Mode
    cpl: int
    rip: int
    code: bytes

    @property
    def instruction(self) -> Instruction | None:
        return disassemble(self.code, self.rip, self.mode.bits)[0] if self.code else None


def _place(machine: Machine, status: Status) -> _Place | None:
    """None if no VCPU stopped, or nothing is known of it. The bytes that KVM gives go before what memory holds."""
    if status.vcpu is None or not ((view := machine.view(status.vcpu)).regs and view.sregs):
        return None
    regs, sregs = Regs.from_buffer_copy(view.regs), Sregs.from_buffer_copy(view.sregs)
    code = (status.exit.insn if status.exit else b"") or read_code(machine, regs, sregs)
    return _Place(decode.mode(sregs, regs.rflags), decode.cpl(sregs, regs.rflags), regs.rip, code)


def text(machine: Machine, status: Status) -> str:
    """A few lines: the reason, the VCPU's mode and RIP, and the instruction there if its bytes are known."""
    lines = [f"The guest can't go on. {status.reason}"]
    if at := _place(machine, status):
        lines.append(f"VCPU {status.vcpu} in {at.mode.value}, CPL {at.cpl}, RIP {at.rip:#x}")
        if at.instruction:
            lines.append(f"{at.rip:#x}: {at.instruction.raw.hex(' ')}  {at.instruction.text}")
    return "\n  ".join(lines)


def banner(machine: Machine, status: Status, *, back: str, width: int, typing: bool = False) -> tuple[Line, ...]:
    """The banner's lines; none while the guest can run. ``back``: what Back leads to, if anywhere.

    ``typing``: the console has the keyboard, so other keys work.
    """
    keys = _keys(back, typing)
    if status.phase is Phase.EXITED:
        by_port = "" if status.code is None else f" with {status.code:#x} through isa-debug-exit."
        how = by_port or " by switching the machine off."
        return (
            ((" ● The guest ended itself", "info strong"), (how, "text")),
            ((f"   vmdeck will return {exit_code(status.code)}. ", "text"), *keys),
        )
    if status.phase is not Phase.STOPPED:
        return ()
    who = "The machine" if status.vcpu is None else f"VCPU {status.vcpu}"
    if status.exit is None:
        return (((f" ■ {who} stopped", "bad strong"),), *_prose(status.reason, width), (("   ", ""), *keys))
    what, why = _WHAT.get(status.exit.kind, _WHAT[ExitKind.UNKNOWN])
    lines: list[Line] = [((f" ■ {who} {what}", "bad strong"),)]
    if (at := _place(machine, status)) and at.instruction:
        lines.append(
            (
                ("   at ", "label"),
                (f"{at.rip:016x}", "rip"),
                (f"  {at.instruction.text}", "strong"),
                (f"   {at.code.hex(' ')}", "label"),
            )
        )
    elif status.exit.detail:
        lines += _prose(status.exit.detail, width)
    return (*lines, *_prose(why, width), (("   ", ""), *keys))


def _prose(words: str, width: int) -> list[Line]:
    return [((f"   {line}", "text"),) for line in wrap(words, max(width - 4, 20))]


def _keys(back: str, typing: bool) -> Line:
    rows = [("F2", " leaves the console")] if typing else [("r", " resets")]
    if back:
        rows.append(("F9" if typing else "b", f" goes back to {back}"))
    rows.append(("ctrl+q" if typing else "q", " quits"))
    keys: Line = ()
    for key, does in rows:
        keys += ((", ", "text"),) if keys else ()
        keys += ((key, "accent strong"), (does, "text"))
    return (*keys, (".", "text"))


def exit_code(value: int | None) -> int:
    """The process's exit code for what the guest wrote to isa-debug-exit: QEMU's, of which a process keeps 8 bits.

    0 if it wrote nothing, and switched the machine off.
    """
    return 0 if value is None else (value << 1 | 1) & 0xFF
