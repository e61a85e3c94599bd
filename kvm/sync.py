"""The state-writeback contract: who owns a VCPU's registers, and the only places where that changes.

A VCPU's state lives in the kernel, or, while ``vcpu.dirty``, in ``vcpu.copy``. These hooks are the only code that
moves it (QEMU's "KVM: Rework VCPU state writeback API", 2010); everything else reads and writes the copy after
:func:`cpu_synchronize_state` and never thinks of writing it back. Each VCPU's part runs on its own thread.

===================================  =================================================================
hook                                 called from, and only from
===================================  =================================================================
cpu_synchronize_state                whoever is about to read or write one VCPU's state
cpu_synchronize_all_states           ``Machine.save``; the start of ``Machine.reset`` and of machine init
cpu_synchronize_all_post_reset       the end of ``Machine.reset``
cpu_synchronize_all_post_init        after machine init; the end of ``Machine.load``
cpu_synchronize_all_pre_loadvm       the start of ``Machine.load``
before_run                           the VCPU's run loop, before KVM_RUN
===================================  =================================================================
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kvm.errors import SubstateError
from kvm.ledger import Ledger, Part
from kvm.levels import WritebackLevel
from kvm.x86 import tsc

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm.chips import Chips
    from kvm.vcpu import Vcpu

    _Done = tuple[Part, SubstateError | None]
    """One VCPU's part, or the machine's own, and what ended it half-way."""

__all__ = [
    "WritebackLevel",
    "before_run",
    "cpu_synchronize_all_post_init",
    "cpu_synchronize_all_post_reset",
    "cpu_synchronize_all_pre_loadvm",
    "cpu_synchronize_all_states",
    "cpu_synchronize_state",
]


def cpu_synchronize_state(vcpu: Vcpu, *, ledger: Ledger, caller: str) -> None:
    """Bring one VCPU's whole state into its copy, which owns it from then on; nothing if it does already.

    Raises SubstateError; the kernel then still owns the state.
    """
    began = time.monotonic_ns()
    if not vcpu.dirty:
        done = vcpu.run_on(lambda: _get(vcpu))
        _record(ledger, "cpu_synchronize_state", None, caller, (done,), began)


def cpu_synchronize_all_states(
    vcpus: Sequence[Vcpu], *, ledger: Ledger, caller: str, skew_us: float = 0.0, chips: Chips | None = None
) -> None:
    """:func:`cpu_synchronize_state` for every VCPU; before them, where they are wanted, the machine's own substates.

    Raises SubstateError.
    """
    began = time.monotonic_ns()
    done = _after(chips.get() if chips else None, lambda: _on_all(vcpus, _get))
    _record(ledger, "cpu_synchronize_all_states", None, caller, done, began, skew_us)


def cpu_synchronize_all_post_reset(
    vcpus: Sequence[Vcpu], *, ledger: Ledger, caller: str, chips: Chips | None = None
) -> None:
    """Give every VCPU's copy, and before them the machine's own, back to the kernel at RESET.

    Raises SubstateError; what failed stays dirty.
    """
    _give_back("cpu_synchronize_all_post_reset", vcpus, WritebackLevel.RESET, ledger, caller, chips)


def cpu_synchronize_all_post_init(
    vcpus: Sequence[Vcpu], *, ledger: Ledger, caller: str, chips: Chips | None = None
) -> None:
    """Give every VCPU's copy, and before them the machine's own, back to the kernel at FULL.

    Raises SubstateError; what failed stays dirty.
    """
    _give_back("cpu_synchronize_all_post_init", vcpus, WritebackLevel.FULL, ledger, caller, chips)


def cpu_synchronize_all_pre_loadvm(vcpus: Sequence[Vcpu], *, ledger: Ledger, caller: str, skew_us: float = 0.0) -> None:
    """Let every copy own its VCPU's state without reading it.

    All of it is about to be loaded: a read later on, by a device that loads, would clobber what was loaded before
    (QEMU 75e972dab5).
    """
    began = time.monotonic_ns()
    _assert_stopped(vcpus)
    parts = [Part(vcpu.index) for vcpu in vcpus]
    for vcpu in vcpus:
        vcpu.dirty = True
    ledger.add("cpu_synchronize_all_pre_loadvm", None, caller, parts, began, skew_us)


def before_run(vcpu: Vcpu, *, ledger: Ledger) -> None:
    """On the VCPU's own thread, before KVM_RUN: give a dirty copy back at RUNTIME. Raises SubstateError."""
    if vcpu.dirty or vcpu.ours_changed():
        began = time.monotonic_ns()
        done = _put(vcpu, WritebackLevel.RUNTIME)
        _record(ledger, "before_run", WritebackLevel.RUNTIME, "run", (done,), began)


def _give_back(
    hook: str, vcpus: Sequence[Vcpu], level: WritebackLevel, ledger: Ledger, caller: str, chips: Chips | None
) -> None:
    began = time.monotonic_ns()
    _assert_stopped(vcpus)
    done = _after(chips.put(level) if chips else None, lambda: _put_all(vcpus, level))
    _record(ledger, hook, level, caller, done, began)


def _record(
    ledger: Ledger,
    hook: str,
    level: WritebackLevel | None,
    caller: str,
    done: Sequence[_Done],
    began: int,
    skew_us: float = 0.0,
) -> None:
    """What was moved stands in the ledger, whether all went well or not; then the first error is raised."""
    ledger.add(hook, level, caller, [part for part, _ in done], began, skew_us)
    for _, error in done:
        if error is not None:
            raise error


def _after(machine: _Done | None, vcpus: Callable[[], list[_Done]]) -> list[_Done]:
    """The machine's own part, if there is one, and then the VCPUs', which aren't touched if that failed."""
    if machine is None:
        return vcpus()
    return [machine] if machine[1] else [machine, *vcpus()]


def _on_all(vcpus: Sequence[Vcpu], part: Callable[[Vcpu], _Done]) -> list[_Done]:
    """Run each VCPU's part on its thread, all at once; every part is waited for before an error is raised."""
    waiting = [vcpu.post(lambda vcpu=vcpu: part(vcpu)) for vcpu in vcpus]  # type: ignore[misc]
    outcomes = [reply.outcome() for reply in waiting]
    return [outcome() for outcome in outcomes]


def _assert_stopped(vcpus: Sequence[Vcpu]) -> None:
    running = [vcpu.index for vcpu in vcpus if vcpu.running]
    assert not running, f"VCPUs {running} run while all must be stopped"


def _get(vcpu: Vcpu) -> _Done:
    if vcpu.dirty:
        return Part(vcpu.index), None
    began = time.monotonic_ns()
    rows = vcpu.table.get_order
    names = tuple(row.name for row in rows)
    try:
        fetched = vcpu.fd.get(rows)
    except SubstateError as error:  # none of it is used: the kernel still owns the state
        return _part(vcpu, began, read=names[: error.moved], ioctls=error.moved + 1, error=str(error)), error
    vcpu.take(dict(zip(names, fetched, strict=True)))
    vcpu.dirty = True
    return _part(vcpu, began, read=names, ioctls=len(rows)), None


def _part(
    vcpu: Vcpu,
    began: int,
    *,
    read: tuple[str, ...] = (),
    written: tuple[str, ...] = (),
    skipped: tuple[str, ...] = (),
    ioctls: int,
    error: str = "",
    tolerated: Sequence[SubstateError] = (),
) -> Part:
    microseconds = (time.monotonic_ns() - began) / 1000
    refused = tuple((each.substate, each.symbol) for each in tolerated)
    return Part(vcpu.index, read, written, skipped, ioctls, began, microseconds, error, refused)


def _put(vcpu: Vcpu, level: WritebackLevel) -> _Done:
    """Write what the table says for this level: at RUNTIME only rows whose bytes changed, and those that must follow.

    Rows that the kernel can't read back (CPUID, guest debug) are written when they differ from what it was last given.
    """
    began = time.monotonic_ns()
    copy, known = vcpu.copy, vcpu.known
    batch, skipped = [], []
    again: set[str] = set()
    for row in vcpu.table.put_order:
        if row.level > level or not (vcpu.dirty or row.get is None):
            continue
        name = row.name
        raw = copy[name]
        if (
            (level > WritebackLevel.RUNTIME and row.get is not None)
            or known.get(name) != raw
            # An all-zero struct is KVM's "off" (no guest debug): nothing that would have to be renewed.
            or (name in again and any(raw))
        ):
            batch.append((row, row.at(raw, level)))
            again.update(row.then)
        else:
            skipped.append(name)
    written = tuple([row.name for row, _ in batch])
    try:
        tolerated = vcpu.fd.put(batch) if batch else ()
    except SubstateError as failure:
        error = failure.at(level)
        moved, rest = _without(written[: error.moved], error.tolerated), written[error.moved :]
        vcpu.known.update((name, vcpu.copy[name]) for name in moved)
        _unknown(vcpu, (*rest, *(each.substate for each in error.tolerated)))
        made = error.moved + 1
        return _part(vcpu, began, written=moved, ioctls=made, error=str(error), tolerated=error.tolerated), error
    if tolerated:
        written = _without(written, tolerated)
        _unknown(vcpu, [each.substate for each in tolerated])
    vcpu.gave_back(written, level)
    vcpu.dirty = False
    skips = tuple(skipped)
    return _part(vcpu, began, written=written, skipped=skips, ioctls=len(batch), tolerated=tolerated), None


def _put_all(vcpus: Sequence[Vcpu], level: WritebackLevel) -> list[_Done]:
    """VCPU 0 first, where TSC offsets can be set: it finds out what every VCPU's is to be (kvm/x86/tsc.py)."""
    if not vcpus[0].dirty or "tsc_offset" not in vcpus[0].table.by_name:
        return _on_all(vcpus, lambda vcpu: _put(vcpu, level))
    first = vcpus[0].run_on(lambda: _put_first(vcpus, level))
    return [first] if first[1] else [first, *_on_all(vcpus[1:], lambda vcpu: _put(vcpu, level))]


def _put_first(vcpus: Sequence[Vcpu], level: WritebackLevel) -> _Done:
    began = time.monotonic_ns()
    vcpu = vcpus[0]
    rows = [vcpu.table.by_name[name] for name in tsc.FOUND_IN]
    try:
        now = dict(zip(tsc.FOUND_IN, vcpu.fd.get(rows), strict=True))
    except SubstateError as error:
        read = tsc.FOUND_IN[: error.moved]
        return _part(vcpu, began, read=read, ioctls=error.moved + 1, error=str(error)), error
    for each, offset in zip(vcpus, tsc.offsets([each.copy for each in vcpus], now), strict=True):
        each.copy["tsc_offset"] = offset
    part, failure = _put(vcpu, level)
    microseconds = (time.monotonic_ns() - began) / 1000
    ioctls = len(rows) + part.ioctls
    return replace(part, read=tsc.FOUND_IN, ioctls=ioctls, began_ns=began, microseconds=microseconds), failure


def _without(names: tuple[str, ...], failed: Sequence[SubstateError]) -> tuple[str, ...]:
    substates = {each.substate for each in failed}
    return tuple(name for name in names if name not in substates)


def _unknown(vcpu: Vcpu, names: Sequence[str]) -> None:
    """These were not written, or perhaps in part (MSRs), and one that had to follow another still has to, though its
    own bytes are the same: the next put must not skip them."""
    for name in names:
        vcpu.known.pop(name, None)
