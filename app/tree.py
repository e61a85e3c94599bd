"""Checkpoints as the tree that they are: who came from whom, drawn without growing wider for each generation."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

from kvm.machine import Checkpoint, Machine
from widgets.checkpoints import CheckpointEntry


def tree_entries(machine: Machine, parents: Mapping[int, int | None]) -> list[CheckpointEntry]:
    """The machine's checkpoints as they're drawn. ``parents``: see ``tree``."""
    now, came_from = time.time(), machine.came_from
    return [
        CheckpointEntry(
            number=checkpoint.number,
            name=checkpoint.name,
            age=max(int(now - checkpoint.taken), 0),
            pages=checkpoint.pages,
            rip=checkpoint.position[0],
            branch=branch,
            note=checkpoint.note,
            current=checkpoint.number == came_from,
        )
        for branch, checkpoint in tree(machine.checkpoints, parents)
    ]


def tree(checkpoints: Sequence[Checkpoint], parents: Mapping[int, int | None]) -> list[tuple[str, Checkpoint]]:
    """All of them, parents before children, oldest first, each with the line that leads to it.

    A checkpoint whose parent was deleted hangs on the next ancestor that is left; ``parents`` knows the deleted ones.
    """
    left = {checkpoint.number for checkpoint in checkpoints}
    children: dict[int | None, list[Checkpoint]] = defaultdict(list)
    for checkpoint in checkpoints:
        parent = checkpoint.parent
        while parent is not None and parent not in left:
            parent = parents.get(parent)
        children[parent].append(checkpoint)

    drawn = []
    # (the line above it goes on here, its own joint, itself); an only child stays in its parent's column.
    waiting = [("", "┌" if children[root.number] else "╶", root) for root in reversed(children[None])]
    while waiting:
        column, joint, checkpoint = waiting.pop()
        drawn.append((column + joint, checkpoint))
        heirs = children[checkpoint.number]
        if joint in "├└":
            column += "│" if joint == "├" else " "
        if len(heirs) == 1:
            joints = "│" if children[heirs[0].number] else "╵"
        else:
            joints = "├" * (len(heirs) - 1) + "└"
        waiting += [(column, joint, heir) for joint, heir in zip(joints, heirs, strict=False)][::-1]
    return drawn
