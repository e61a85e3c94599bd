"""What differs between two machines, each now, at a checkpoint or in a file: as lines to read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from app.operations import Job
from app.tree import find
from kvm.errors import MachineError
from kvm.machine import Machine
from kvm.snapshot import diff
from kvm.snapshot.chain import open_chain
from kvm.snapshot.contents import Contents
from kvm.snapshot.state import MachineState
from widgets.line_pane import Line
from widgets.snapshots import Key

SHOWN_PLACES = 2000
"""Of memory, places that are listed."""
SHOWN_BYTES = 16
_WHERE = 30
"""Cells of the column that says where."""


@contextmanager
def opened(machine: Machine, key: Key | None, job: Job) -> Iterator[tuple[str, MachineState, Contents]]:
    """One side: its name, state and RAM. None is now. Raises MachineError, SnapshotError."""
    if isinstance(key, str):
        with open_chain(key) as chain:
            chain.verify(job.progress, job.cancel)
            if chain.head.memory != machine.config.memory:
                raise MachineError(
                    f"Can't compare: {Path(key).name} is of a machine with {chain.head.memory >> 20} MiB, this one has "
                    f"{machine.config.memory >> 20}. vmdeck snapshot diff compares two files."
                )
            yield Path(key).name, chain.state, chain.contents()
        return
    checkpoint = None if key is None else find(machine, key)
    if key is not None and checkpoint is None:
        raise MachineError(f"There is no checkpoint {key} any more.")
    with machine.held(checkpoint) as (state, contents):
        yield "now" if checkpoint is None else f"{checkpoint.number} {checkpoint.name}", state, contents


def compare(machine: Machine, a: Key, b: Key | None, job: Job) -> tuple[str, list[Line]]:
    """A title and what differs. On a worker's thread. Raises MachineError, SnapshotError, SnapshotCancelled."""
    # The second first: freezing the machine may move the store that both have their pages from.
    with opened(machine, b, job) as (to, after, new), opened(machine, a, job) as (since, before, old):
        job.aside()
        lines = list(_state_lines(before, after))
        size = machine.config.memory
        shown: list[diff.Bytes] = []
        pages = total = 0
        for page in diff.pages(old, new, size, progress=job.progress, cancel=job.cancel):
            pages, total = pages + 1, total + page.count
            shown += islice(page.runs(), SHOWN_PLACES - len(shown))
    if shown:
        head = f"{total} bytes in {pages} pages"
        lines += [(), ((" memory ", "strong"), (head, "label")), *map(_run_line, shown)]
    if total > sum(len(run.a) for run in shown):
        rest = f" … and more: these are the first {SHOWN_PLACES} places. Of two files vmdeck snapshot diff lists all."
        lines.append(((rest, "label"),))
    return f"{since} → {to}", lines or [((" No difference at all.", "good"),)]


def _state_lines(before: MachineState, after: MachineState) -> Iterator[Line]:
    owner = ""
    for found in diff.states(before, after):
        whose, rest = _split(found.where)
        if whose != owner:
            if owner:
                yield ()
            yield ((f" {whose}", "strong"),)
            owner = whose
        yield _line(rest, found.a or "none", found.b or "none")


def _split(where: str) -> tuple[str, str]:
    """ "VCPU 0 regs.rax" is VCPU 0's regs.rax; "pit.channels…" is the machine's."""
    first, _, rest = where.partition(" ")
    if first == "VCPU":
        number, _, rest = rest.partition(" ")
        return f"VCPU {number}", rest
    return ("devices", rest) if first == "device" else ("machine", where)


def _line(where: str, a: str, b: str) -> Line:
    return ((f"   {where:<{_WHERE}} ", "label"), (a, "text"), (" → ", "dim"), (b, "changed"))


def _run_line(run: diff.Bytes) -> Line:
    a, b = (side[:SHOWN_BYTES].hex(" ") for side in (run.a, run.b))
    more = f" … {len(run.a)} bytes" if len(run.a) > SHOWN_BYTES else ""
    return (
        (f"   {run.address:016x} ", "label"),
        (a, "text"),
        (" → ", "dim"),
        (b, "changed"),
        (more, "dim"),
    )
