"""The ledger's records as rows: one for each call of a hook, and one for all VCPUs that went back into the guest."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from kvm.ledger import Part, Record
from widgets.ledger import LedgerEntry


def ledger_rows(records: Sequence[Record]) -> list[LedgerEntry]:
    """Newest first, of records that come oldest first.

    ``before_run`` is each VCPU's own: those of one resume stand together, until a VCPU comes a second time.
    """
    groups: list[list[Record]] = []
    resumed: set[int | None] = set()
    for record in records:
        vcpus = {part.vcpu for part in record.parts}
        if record.hook == "before_run" and groups and groups[-1][0].hook == record.hook and not vcpus & resumed:
            groups[-1].append(record)
            resumed |= vcpus
        else:
            groups.append([record])
            resumed = vcpus
    return [_row(group) for group in reversed(groups)]


def _row(group: Sequence[Record]) -> LedgerEntry:
    first, last = group[0], group[-1]
    parts = [part for record in group for part in record.parts]
    seconds, rest = divmod(last.time_ns, 1_000_000_000)
    return LedgerEntry(
        number=first.number,
        clock=f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{rest // 1_000_000:03d}",
        hook=first.hook.removeprefix("cpu_synchronize_"),
        level=first.level.name if first.level else "",
        caller=first.caller,
        vcpus=sum(part.vcpu is not None for part in parts),
        ioctls=sum(part.ioctls for part in parts),
        microseconds=sum(record.microseconds for record in group),
        skew_us=first.skew_us,
        moved=_moved(parts),
    )


def _moved(parts: Sequence[Part]) -> str:
    """Which substates moved, in any of the VCPUs and then of the VM's own, in the order in which they did; those left
    alone only in number."""
    vcpus = [part for part in parts if part.vcpu is not None]
    machine = [part for part in parts if part.vcpu is None]
    words = [next((f"failed: {part.error}" for part in parts if part.error), "")]
    if refused := dict.fromkeys(each for part in parts for each in part.tolerated):
        words.append("tolerated: " + ", ".join(f"{name} {symbol}" for name, symbol in refused))
    for verb, names, own in (
        ("read", _names(part.read for part in vcpus), _names(part.read for part in machine)),
        ("wrote", _names(part.written for part in vcpus), _names(part.written for part in machine)),
    ):
        counts = ((f"{len(names)}", names), (f"VM {len(own)}", own))
        if names or own:
            shown = " + ".join(count for count, some in counts if some)
            words.append(f"{verb} {shown}: {' '.join([*names, *own])}")
    if unchanged := max((len(part.skipped) for part in parts), default=0):
        words.append(f"{unchanged} unchanged")
    return "; ".join(word for word in words if word) or "moved nothing"


def _names(rows: Iterable[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))
