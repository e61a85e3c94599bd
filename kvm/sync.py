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

import functools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvm.errors import SubstateError
from kvm.ledger import Ledger, Part
from kvm.levels import WritebackLevel
from kvm.x86 import tsc
from kvm.x86.substates import Choice

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm.backends.interface import Batch
    from kvm.chips import Chips, Moved
    from kvm.ledger import Done
    from kvm.vcpu import Vcpu

    _Finish = Callable[[], Done]
    """Waits for ioctls, a VCPU's own thread makes its own, and does what follows from them."""

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
        done = _get(vcpu)()
        _record(ledger, "cpu_synchronize_state", None, caller, (done,), began)


def cpu_synchronize_all_states(
    vcpus: Sequence[Vcpu], *, ledger: Ledger, caller: str, skew_us: float = 0.0, chips: Chips | None = None
) -> None:
    """:func:`cpu_synchronize_state` for every VCPU; before them, where they are wanted, the machine's own substates.

    Raises SubstateError.
    """
    began = time.monotonic_ns()
    done = _after(chips.get() if chips else None, lambda: [_get(vcpu) for vcpu in vcpus])
    _record(ledger, "cpu_synchronize_all_states", None, caller, done, began, skew_us)


def cpu_synchronize_all_post_reset(
    vcpus: Sequence[Vcpu], *, ledger: Ledger, caller: str, chips: Chips | None = None
) -> None:
    """Give every VCPU's copy, and before them the machine's own, back to the kernel at RESET.

    Raises SubstateError; what failed stays dirty.
    """
    _give_back("cpu_synchronize_all_post_reset", vcpus, WritebackLevel.RESET, ledger, caller, chips)


def cpu_synchronize_all_post_init(
    vcpus: Sequence[Vcpu],
    *,
    ledger: Ledger,
    caller: str,
    chips: Chips | None = None,
    reading: Reading | None = None,
) -> None:
    """Give every VCPU's copy, and before them the machine's own, back to the kernel at FULL.

    ``reading``: of the TSC, if it was begun earlier. Raises SubstateError; what failed stays dirty.
    """
    _give_back("cpu_synchronize_all_post_init", vcpus, WritebackLevel.FULL, ledger, caller, chips, reading)


def cpu_synchronize_all_pre_loadvm(
    vcpus: Sequence[Vcpu], *, ledger: Ledger, caller: str, skew_us: float = 0.0
) -> Reading | None:
    """Let every copy own its VCPU's state without reading it.

    All of it is about to be loaded: a read later on, by a device that loads, would clobber what was loaded before
    (QEMU 75e972dab5). Only what the offsets of the TSC need is asked for, for post_init: it's known by the time that
    all is in place, and loaded into nothing.
    """
    began = time.monotonic_ns()
    _assert_stopped(vcpus)
    for vcpu in vcpus:
        vcpu.dirty = True
    reading = _read_tsc(vcpus)
    parts = [_nothing(vcpu.index) for vcpu in vcpus]
    ledger.add("cpu_synchronize_all_pre_loadvm", None, caller, parts, began, skew_us)
    return reading


def before_run(vcpu: Vcpu, *, ledger: Ledger) -> None:
    """On the VCPU's own thread, before KVM_RUN: give a dirty copy back at RUNTIME. Raises SubstateError."""
    if vcpu.dirty or vcpu.ours_changed():
        began = time.monotonic_ns()
        done = _put(vcpu, WritebackLevel.RUNTIME)()
        _record(ledger, "before_run", WritebackLevel.RUNTIME, "run", (done,), began)


def _give_back(
    hook: str,
    vcpus: Sequence[Vcpu],
    level: WritebackLevel,
    ledger: Ledger,
    caller: str,
    chips: Chips | None,
    reading: Reading | None = None,
) -> None:
    began = time.monotonic_ns()
    _assert_stopped(vcpus)
    if reading is None and vcpus[0].dirty:
        reading = _read_tsc(vcpus)
    done = _after(
        chips.put(level) if chips else None,
        lambda: _put_all(vcpus, level, reading),
        lambda: [reading.done] if reading else [],
    )
    _record(ledger, hook, level, caller, done, began)


def _record(
    ledger: Ledger,
    hook: str,
    level: WritebackLevel | None,
    caller: str,
    done: Sequence[Done],
    began: int,
    skew_us: float = 0.0,
) -> None:
    """What was moved stands in the ledger, whether all went well or not; then the first error is raised."""
    ledger.add(hook, level, caller, [part for part, _ in done], began, skew_us)
    for _, error in done:
        if error is not None:
            raise error


def _after(
    machine: Moved | None, vcpus: Callable[[], list[_Finish]], instead: Callable[[], list[_Finish]] = list
) -> list[Done]:
    """The machine's own part, if there is one, and then the VCPUs', which aren't touched if that failed: each VCPU's
    thread makes its part, all at once, and every part is waited for before an error is raised.

    ``instead``: what was asked of one of them already.
    """
    finish = vcpus() if machine is None or machine.error is None else instead()
    return [each() for each in ([*finish] if machine is None else [machine.done, *finish])]


def _assert_stopped(vcpus: Sequence[Vcpu]) -> None:
    running = [vcpu.index for vcpu in vcpus if vcpu.running]
    assert not running, f"VCPUs {running} run while all must be stopped"


class Reading:
    """Rows of one VCPU, asked of its thread. They stand in the record of the hook that waits for them."""

    def __init__(self, vcpu: Vcpu, choice: Choice) -> None:
        self._vcpu = vcpu
        self.names = choice.names
        self.batch = vcpu.fd.getting(choice.rows)
        self._reply = vcpu.make(self.batch)
        self._error: SubstateError | None = None
        self.values: dict[str, bytes] = {}
        """The rows' bytes, when it's done without an error."""

    def wait(self) -> bool:
        """Until it's done; has it gone well?"""
        outcome = self._reply.outcome()
        try:
            self.values = dict(zip(self.names, outcome(), strict=True))
        except SubstateError as error:
            self._error = error
        return self._error is None

    def done(self) -> Done:
        """Wait for it, where it makes a part of its own."""
        self.wait()
        return self.told()

    def told(self) -> Done:
        """The same, when it has been waited for."""
        if (error := self._error) is not None:
            read = self.names[: error.moved]
            return _part(self._vcpu, self.batch, read, (), (), error.moved + 1, str(error)), error
        return _part(self._vcpu, self.batch, self.names, (), (), len(self.names)), None


def _get(vcpu: Vcpu) -> _Finish:
    if vcpu.dirty:
        return lambda: (_nothing(vcpu.index), None)
    reading = Reading(vcpu, vcpu.table.to_get)

    def finish() -> Done:
        done = reading.done()
        if done[1] is None:  # else none of it is used: the kernel still owns the state
            vcpu.take(reading.values)
            vcpu.dirty = True
        return done

    return finish


_nothing = functools.cache(Part)
"""The part of a VCPU that had nothing to do."""


def _part(
    vcpu: Vcpu,
    batch: Batch[object] | None,
    read: tuple[str, ...],
    written: tuple[str, ...],
    skipped: tuple[str, ...],
    ioctls: int,
    error: str = "",
    tolerated: Sequence[SubstateError] = (),
    reading: Reading | None = None,
) -> Part:
    """``reading``: what was read for the batch's sake."""
    began, microseconds = (batch.began_ns, batch.microseconds) if batch else (time.monotonic_ns(), 0.0)
    if reading is not None:
        read, ioctls = reading.names, ioctls + len(reading.names)
        microseconds += reading.batch.microseconds
    refused = tuple([(each.substate, each.symbol) for each in tolerated]) if tolerated else ()
    return Part(vcpu.index, read, written, skipped, ioctls, began, microseconds, error, refused)


def _to_write(vcpu: Vcpu, level: WritebackLevel) -> Choice:
    """What the table says for this level. Left alone are, at RUNTIME, all rows whose bytes haven't changed, but for
    those that must follow another.

    Rows that the kernel can't read back (CPUID, guest debug) are written when they differ from what it was last given.
    """
    table, copy, known = vcpu.table, vcpu.copy, vcpu.known
    if level > WritebackLevel.RUNTIME and vcpu.dirty:
        same = [name for name in table.ours if known.get(name) == copy[name]]
        alone = [name for name in same if name not in table.followers or _is_off(copy[name])]
        return table.up_to(level, tuple(alone))
    rows, skipped = [], []
    again: set[str] = set()
    for row in table.up_to(level).rows:
        if not vcpu.dirty and row.get is not None:
            continue
        name = row.name
        if known.get(name) != copy[name] or (name in again and not _is_off(copy[name])):
            rows.append(row)
            again.update(row.then)
        else:
            skipped.append(name)
    return Choice(rows, tuple(skipped))


def _is_off(raw: bytes) -> bool:
    """An all-zero struct is KVM's "off" (no guest debug): nothing that would have to be renewed."""
    return not raw.strip(b"\0")


def _put(vcpu: Vcpu, level: WritebackLevel, reading: Reading | None = None) -> _Finish:
    choice = _to_write(vcpu, level)
    written = choice.names
    if not written:
        return lambda: _given_back(vcpu, level, None, choice, {}, (), reading)
    try:
        batch = vcpu.fd.putting(choice.rows, choice.raws(vcpu.copy, level))
    except SubstateError as error:
        failure = error.at(level)
        return lambda: _failed(vcpu, None, written, failure, reading)
    _unknown(vcpu, written)  # until it's known: who waits for it may be interrupted
    reply = vcpu.make(batch)
    held = dict(zip(written, map(vcpu.copy.__getitem__, written), strict=True))

    def finish() -> Done:
        outcome = reply.outcome()
        try:
            tolerated = outcome()
        except SubstateError as error:
            return _failed(vcpu, batch, written, error.at(level), reading)
        return _given_back(vcpu, level, batch, choice, held, tolerated, reading)

    return finish


def _given_back(
    vcpu: Vcpu,
    level: WritebackLevel,
    batch: Batch[object] | None,
    choice: Choice,
    held: dict[str, bytes],
    tolerated: Sequence[SubstateError],
    reading: Reading | None,
) -> Done:
    """The kernel holds these now, but for those of which it ``tolerated`` that it doesn't."""
    written = choice.names
    if tolerated:
        written = _without(written, tolerated)
        _unknown(vcpu, [each.substate for each in tolerated])
        held = {name: held[name] for name in written}
    vcpu.gave_back(held, level)
    vcpu.dirty = False
    return _part(vcpu, batch, (), written, choice.skipped, len(choice.names), "", tolerated, reading), None


def _failed(
    vcpu: Vcpu, batch: Batch[object] | None, rows: tuple[str, ...], error: SubstateError, reading: Reading | None
) -> Done:
    """The put of these ended half-way."""
    moved, rest = _without(rows[: error.moved], error.tolerated), rows[error.moved :]
    vcpu.known.update((name, vcpu.copy[name]) for name in moved)
    _unknown(vcpu, (*rest, *(each.substate for each in error.tolerated)))
    return _part(vcpu, batch, (), moved, (), error.moved + 1, str(error), error.tolerated, reading), error


def _read_tsc(vcpus: Sequence[Vcpu]) -> Reading | None:
    """VCPU 0's TSC and offset: what every VCPU's offset is found by (kvm/x86/tsc.py)."""
    choice = vcpus[0].table.tells_tsc
    return Reading(vcpus[0], choice) if choice else None


def _put_all(vcpus: Sequence[Vcpu], level: WritebackLevel, reading: Reading | None) -> list[_Finish]:
    if reading is not None:
        if not reading.wait():
            return [reading.told]
        for each, offset in zip(vcpus, tsc.offsets([each.copy for each in vcpus], reading.values), strict=True):
            each.copy["tsc_offset"] = offset
    first, *others = vcpus
    return [_put(first, level, reading), *[_put(vcpu, level) for vcpu in others]]


def _without(names: tuple[str, ...], failed: Sequence[SubstateError]) -> tuple[str, ...]:
    substates = {each.substate for each in failed}
    return tuple(name for name in names if name not in substates)


def _unknown(vcpu: Vcpu, names: Sequence[str]) -> None:
    """These were not written, or perhaps in part (MSRs), and one that had to follow another still has to, though its
    own bytes are the same: the next put must not skip them."""
    for name in names:
        vcpu.known.pop(name, None)
