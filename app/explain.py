"""What a person needs to know when the guest can't go on: what happened, where, and what to do."""

from __future__ import annotations

from textwrap import wrap

from kvm.backends.interface import ExitKind
from kvm.machine import Phase, Status
from kvm.x86.disasm import disassemble
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


def explain(
    status: Status, *, rip: int | None, bits: int, code: bytes, back: str, width: int, typing: bool = False
) -> tuple[Line, ...]:
    """The banner's lines; none while the guest can run. ``code``: bytes at ``rip``. ``back``: what Back leads to.

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
    raw = status.exit.insn or code
    if rip is not None and raw:
        insn = disassemble(raw, rip, bits)[0]
        lines.append(
            (("   at ", "label"), (f"{rip:016x}", "rip"), (f"  {insn.text}", "strong"), (f"   {raw.hex(' ')}", "label"))
        )
    elif status.exit.detail:
        lines += _prose(status.exit.detail, width)
    return (*lines, *_prose(why, width), (("   ", ""), *keys))


def _prose(text: str, width: int) -> list[Line]:
    return [((f"   {line}", "text"),) for line in wrap(text, max(width - 4, 20))]


def exit_code(value: int | None) -> int:
    """What QEMU's isa-debug-exit makes of the value that the guest wrote, as a process's exit code; 0 without one."""
    return 0 if value is None else value << 1 | 1


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
