"""Snapshots as the tree that they are: who came from whom, drawn without growing wider for each generation."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from app.shelf import SUFFIX, ShelfFile
from kvm.backends.interface import PAGE_SIZE
from kvm.machine import Checkpoint, Machine
from widgets.snapshots import SnapshotEntry

FILE = "▤"
"""The sign of a snapshot file; a checkpoint has its number."""

K = TypeVar("K", bound=Hashable)


def checkpoint_entries(machine: Machine, parents: Mapping[int, int | None]) -> list[SnapshotEntry]:
    """The machine's checkpoints as they're drawn. ``parents``: see ``tree``."""
    now, came_from = time.time(), machine.came_from
    kept = {checkpoint.number: checkpoint for checkpoint in machine.checkpoints}
    return [
        SnapshotEntry(
            key=number,
            sign=str(number),
            name=kept[number].name,
            age=_age(now, kept[number].taken),
            size=kept[number].pages * PAGE_SIZE,
            rips=kept[number].position,
            branch=branch,
            note=kept[number].note,
            current=number == came_from,
        )
        for branch, number in tree({number: each.parent for number, each in kept.items()}, parents)
    ]


def file_entries(files: Sequence[ShelfFile]) -> list[SnapshotEntry]:
    """Snapshot files as they're drawn, each under the one that it builds on."""
    now = time.time()
    by_identity = {file.identity: file for file in files}
    parents = {file.identity: file.parent for file in files}
    return [
        SnapshotEntry(
            key=str(file.path),
            sign=FILE,
            name=f"{file.path.name.removesuffix(SUFFIX)} {file.name}".strip(),
            age=_age(now, file.taken),
            size=file.stored,
            rips=file.rips,
            branch=branch,
            note=file.note,
        )
        for branch, file in ((branch, by_identity[identity]) for branch, identity in tree(parents, parents))
    ]


def origin(machine: Machine) -> Checkpoint | None:
    """Where Back goes: the checkpoint that the machine came from, or else the newest one."""
    checkpoints = machine.checkpoints
    return find(machine, machine.came_from) or (checkpoints[-1] if checkpoints else None)


def find(machine: Machine, number: int | None) -> Checkpoint | None:
    """The checkpoint of this number, as it is kept; None if it's gone."""
    return next((found for found in machine.checkpoints if found.number == number), None)


def _age(now: float, taken: float) -> int:
    return max(int(now - taken), 0)


def tree(left: Mapping[K, K | None], parents: Mapping[K, K | None]) -> list[tuple[str, K]]:
    """All that are ``left``, each with its parent, oldest first: parents before children, each with the line to it.

    One whose parent isn't left hangs on the next ancestor that is; ``parents`` knows those that are gone.
    """
    children: dict[K | None, list[K]] = defaultdict(list)
    for key, parent in left.items():
        while parent is not None and parent not in left:
            parent = parents.get(parent)
        children[parent].append(key)

    drawn = []
    # (the line above it goes on here, its own joint, itself); an only child stays in its parent's column.
    waiting = [("", "┌" if children[root] else "╶", root) for root in reversed(children[None])]
    while waiting:
        column, joint, key = waiting.pop()
        drawn.append((column + joint, key))
        heirs = children[key]
        if joint in "├└":
            column += "│" if joint == "├" else " "
        if len(heirs) == 1:
            joints = "│" if children[heirs[0]] else "╵"
        else:
            joints = "├" * (len(heirs) - 1) + "└"
        waiting += [(column, joint, heir) for joint, heir in zip(joints, heirs, strict=False)][::-1]
    return drawn
