"""``vmdeck lockstep``: a guest on KVM and on the software backend, side by side, up to the first difference."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

from kvm import lockstep
from kvm.backends.choice import open_system
from kvm.boot import loader

EQUAL, DIFFERENT = 0, 1


def run(image: Path, *, count: int, memory: int, format: str, address: int | None) -> int:
    """Step ``count`` instructions on both; what was found goes to stdout. 0 if nothing differed, 1 if something did.

    Raises BackendUnavailable where one of the two can't run, ImageError, ConfigError, KvmError.
    """
    with closing(open_system("kvm")) as reference, closing(open_system("software")) as other:
        guest = loader.load(image, memory=memory, format=format, address=address)
        with lockstep.pair(reference, other, guest, memory) as both:
            outcome = both.run(count, _show_progress if sys.stderr.isatty() else lambda steps: None)
    if sys.stderr.isatty():
        print(end="\r\x1b[K", file=sys.stderr)
    for why, times in outcome.taken.most_common():
        print(f"{times:8} × not compared: {why}")
    if outcome.difference is None:
        print(f"{outcome.steps} instructions, no difference{f'; {outcome.ended}' if outcome.ended else ''}")
        return EQUAL
    found = outcome.difference
    print(f"different after instruction {found.step}, at {found.where:#x}: {found.text}")
    for name, (mine, theirs) in found.values.items():
        print(f"  {name}: {mine:#x} on KVM, {theirs:#x} on the software backend")
    return DIFFERENT


def _show_progress(steps: int) -> None:
    print(f"\r{steps} instructions", end="", file=sys.stderr, flush=True)
