"""The checkpoints that a machine keeps, and which of them it comes from."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from kvm.errors import MachineError
from kvm.snapshot.contents import Index
from kvm.snapshot.state import Checkpoint, MachineState


class Checkpoints:
    """Oldest first. For whoever holds the machine's lock; ``kept`` and ``came_from`` can be read on any thread."""

    def __init__(self) -> None:
        self._kept: list[Checkpoint] = []
        self._last_number = 0
        self.came_from: int | None = None
        """The number of the one that was taken or restored last; None since a reset or load."""

    @property
    def kept(self) -> tuple[Checkpoint, ...]:
        return tuple(self._kept)

    @property
    def indices(self) -> Iterator[Index]:
        """What their memory consists of."""
        return (checkpoint.index for checkpoint in self._kept)

    def add(self, name: str, state: MachineState, index: Index, pages: int) -> Checkpoint:
        """Keep this one, of which ``pages`` pages are stored for it alone; the machine comes from it now."""
        self._last_number += 1
        checkpoint = Checkpoint(
            number=self._last_number,
            name=name or f"checkpoint {self._last_number}",
            taken=time.time(),
            position=state.position,
            pages=pages,
            parent=self.came_from,
            state=state,
            index=index,
        )
        self._kept.append(checkpoint)
        self.came_from = checkpoint.number
        return checkpoint

    def find(self, checkpoint: Checkpoint) -> Checkpoint:
        """This checkpoint as it is kept: a rename has put another one in the caller's place. Raises MachineError."""
        for kept in self._kept:
            if kept.state is checkpoint.state:
                return kept
        raise MachineError(f"There is no checkpoint {checkpoint.number} ({checkpoint.name}) any more.")

    def remove(self, checkpoint: Checkpoint) -> None:
        """Raises MachineError."""
        self._kept.remove(self.find(checkpoint))

    def rename(self, checkpoint: Checkpoint, name: str, note: str) -> Checkpoint:
        """Raises MachineError."""
        kept = self.find(checkpoint)
        renamed = replace(kept, name=name, note=note)
        self._kept[self._kept.index(kept)] = renamed
        return renamed
