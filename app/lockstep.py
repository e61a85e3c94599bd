"""``vmdeck lockstep``: a guest on KVM and on the software backend, side by side, up to the first difference."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from app.bell import Bell
from kvm import lockstep
from kvm.backends.choice import open_system
from kvm.boot import loader
from kvm.lockstep import Outcome
from kvm.machine import MachineConfig

EQUAL, DIFFERENT = 0, 1


def run(image: Path, *, count: int, config: MachineConfig, wishes: Mapping[str, Any]) -> int:
    """Step ``count`` instructions on both; what was found goes to stdout, how far it is to a terminal's stderr.

    ``wishes``: how to load the image, as ``kvm.boot.loader.load`` takes them.
    0 if nothing differed, 1 if something did, 128 + n if signal n (ctrl-c) ended it before that.
    Raises BackendUnavailable where one of the two can't run, ImageError, ConfigError, KvmError.
    """
    with closing(open_system("kvm")) as reference, closing(open_system("software")) as other:
        guest = loader.load(image, memory=config.memory, vcpus=config.vcpus, **wishes)
        with lockstep.pair(reference, other, guest, config) as both, Bell() as bell, bell.ending_signals() as signals:
            progress = _Progress(count) if sys.stderr.isatty() else lambda steps: None
            outcome = both.run(count, progress, lambda: bool(signals))
    if sys.stderr.isatty():
        print(end="\r\x1b[K", file=sys.stderr)
    report(outcome)
    if outcome.difference is not None:
        return DIFFERENT
    return 128 + signals[0] if signals else EQUAL


def report(outcome: Outcome) -> None:
    """Print what was found."""
    for why, times in outcome.taken.most_common():
        print(f"{times:8} × not compared: {why}")
    if outcome.difference is None:
        print(f"{outcome.steps} instructions, no difference{f'; {outcome.ended}' if outcome.ended else ''}")
        return
    found = outcome.difference
    print(f"different after instruction {found.step}, VCPU {found.vcpu} at {found.where:#x}: {found.text}")
    for name, (mine, theirs) in found.values.items():
        print(f"  {name}: {mine:#x} on KVM, {theirs:#x} on the software backend")


class _Progress:
    """How many steps there were, of how many, and how fast they go."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._began = time.monotonic()

    def __call__(self, steps: int) -> None:
        speed = steps / (time.monotonic() - self._began)
        text = f"\r{steps} of {self._count} instructions, {speed:.0f} a second"
        print(text, end="\x1b[K", file=sys.stderr, flush=True)
