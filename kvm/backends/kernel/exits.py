"""KVM_RUN's exits as the machine knows them: struct kvm_run (api.rst, 5) decoded from its page."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from kvm.backends.interface import Exit, ExitKind

UNION = 32
"""Where the exit's own part of struct kvm_run begins (asserted in shim.c)."""

_INSN_BYTES_VALID = 1  # KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
_SUBERRORS = {
    1: "KVM can't emulate this instruction",
    2: "an exception while another was delivered",
    3: "an exit while an event was delivered",
    4: "the processor left the guest for a reason that KVM doesn't know",
}
_EVENTS = {1: "shutdown", 2: "reset", 3: "crash", 4: "wakeup", 5: "suspend", 6: "SEV termination"}


def _debug(page: Any) -> Exit:
    exception, pc, dr6 = struct.unpack_from("<I4xQQ", page, UNION)
    return Exit(ExitKind.DEBUG, dr6, detail=f"exception {exception} at {pc:#x}, DR6 {dr6:#x}")


def _shutdown(page: Any) -> Exit:
    return Exit(ExitKind.SHUTDOWN, detail="triple fault")


def _internal_error(page: Any) -> Exit:
    suberror, count, flags, size = struct.unpack_from("<IIQB", page, UNION)
    insn = b""
    # Flags and bytes are there if the kernel counts them: two u64 of bytes follow one of flags.
    if suberror == 1 and count >= 3 and flags & _INSN_BYTES_VALID:
        start = UNION + struct.calcsize("<IIQB")
        insn = page[start : start + min(size, 15)]
    why = _SUBERRORS.get(suberror, f"suberror {suberror}")
    return Exit(ExitKind.INTERNAL_ERROR, suberror, insn, f"{why}: {insn.hex(' ')}" if insn else why)


def _fail_entry(page: Any) -> Exit:
    reason, cpu = struct.unpack_from("<QI", page, UNION)
    return Exit(ExitKind.FAIL_ENTRY, reason, detail=f"hardware reason {reason:#x} on host CPU {cpu}")


def _system_event(page: Any) -> Exit:
    (event,) = struct.unpack_from("<I", page, UNION)
    return Exit(ExitKind.SYSTEM_EVENT, event, detail=_EVENTS.get(event, f"event {event}"))


def _unknown(page: Any) -> Exit:
    (reason,) = struct.unpack_from("<Q", page, UNION)
    return Exit(ExitKind.UNKNOWN, reason, detail=f"hardware exit reason {reason:#x}, which KVM doesn't know")


def _halted(page: Any) -> Exit:
    # Only without an in-kernel local APIC, which could wake it.
    return Exit(ExitKind.UNKNOWN, 5, detail="KVM_EXIT_HLT: halted, and no interrupt controller to wake it")


_DECODERS: dict[int, Callable[[Any], Exit]] = {
    0: _unknown,
    4: _debug,
    5: _halted,
    8: _shutdown,
    9: _fail_entry,
    17: _internal_error,
    24: _system_event,
}
"""By KVM_EXIT_* number; they are ABI."""


def decode(reason: int, page: Any) -> Exit:
    """The exit in this kvm_run page (a buffer). I/O exits never come here."""
    decoder = _DECODERS.get(reason)
    return decoder(page) if decoder else Exit(ExitKind.UNKNOWN, reason, detail=f"KVM exit {reason}")
