"""A coverage-guided fuzzer on snapshot files: ``python -m tests.fuzz_snapshot MINUTES [PATH]``.

Each input is the head of a file, mutated by its bytes or by its structure and sealed with checksums that are right
(tests/kvm/snapshot/heads.py), and opened in one of the ways there are (target.py). A finding is anything but a
VmdeckError, a crash, an input that takes a minute, memory beyond what FORMAT.md states, and a machine that a refused
load has changed.

PATH is a folder that keeps what reached new code from one run to the next, or one input to be run again: a finding
prints that command. Ends with 0 when the time is over, with 1 at the first finding, with 2 where it can't run.
"""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import tempfile
import time
from pathlib import Path

_INSTRUMENTED = [
    "kvm.snapshot", "kvm.boot.image", "kvm.boot.entry", "kvm.devices", "app.snapshot_cli",
    *(f"kvm.backends.software.{name}" for name in ("vm", "vcpu", "state", "msr", "lapic", "pic", "pit", "ioapic")),
]  # fmt: skip
_LONGEST = 128 << 10
"""Bytes of an input."""
_SECONDS = 60
"""For one input: past this it hangs."""
_ROUND = 60
"""Seconds of a process: atheris 3.0 keeps some 20 to 200 KB of every input's comparisons for ever."""
_MEMORY = 64 << 20
"""Bytes, beyond four times the head, that opening a file may take at once (FORMAT.md: 32 MiB, the guest's memory and
its image, here some MiB at most, twice: a parent and its child)."""


def main(arguments: list[str]) -> int:
    if not 1 <= len(arguments) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    if importlib.util.find_spec("atheris") is None:
        print("fuzz: atheris isn't installed: pip install -e '.[fuzz]'. It's there for Linux only.", file=sys.stderr)
        return 2
    finding = Path("snapshot-finding").absolute()
    end = time.monotonic() + float(arguments[0]) * 60
    with tempfile.TemporaryDirectory() as corpus, tempfile.TemporaryDirectory(dir=_fast()) as folder:
        path = Path(arguments[1] if len(arguments) == 2 else corpus).absolute()
        while True:
            child = os.fork()  # libFuzzer ends its process
            if child == 0:
                fuzz(min(end - time.monotonic(), _ROUND), path, finding, Path(folder))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code or path.is_file() or time.monotonic() >= end - 1:
                break
    if code == 0:
        print("fuzz: no finding")
        return 0
    again = path if path.is_file() else finding
    print(f"fuzz: a finding, exit code {code}; again: python -m tests.fuzz_snapshot 1 {again}", file=sys.stderr)
    return 1


def fuzz(seconds: float, path: Path, finding: Path, folder: Path) -> None:
    """Doesn't return. ``folder`` is for the files that the inputs become."""
    import atheris

    with atheris.instrument_imports(include=_INSTRUMENTED, enable_loader_override=False):
        from tests.kvm.snapshot import heads
        from tests.kvm.snapshot.target import Target

    target = Target(folder)
    seeds = target.seeds()
    for number, seed in enumerate(seeds):
        target(seed)
        if path.is_dir():
            (path / f"seed {number}").write_bytes(seed)

    def one(data: bytes) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        before = _memory("VmRSS")
        target(data)
        taken = _memory("VmHWM") - before
        assert taken <= 4 * len(data) + _MEMORY, f"{taken >> 20} MiB for a head of {len(data) >> 10} KiB"

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if len(data) < 2 or rng.random() < 0.2:
            return atheris.Mutate(data, most)
        base = data if rng.random() < 0.5 else rng.choice(seeds)  # most of what is kept is refused, for ever
        return data[:1] + heads.mutated(base[1:], most - 1, rng, atheris.Mutate)

    atheris.Setup(
        [sys.argv[0], str(path), f"-max_total_time={max(1, round(seconds))}", f"-max_len={_LONGEST}",
         f"-timeout={_SECONDS}", f"-exact_artifact_path={finding}", "-print_final_stats=1",
         "-rss_limit_mb=0"],
        one,
        custom_mutator=mutator,
    )  # fmt: skip
    atheris.Fuzz()


def _fast() -> str | None:
    """A folder in memory, where there is one: fsync costs nothing there."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _memory(what: str) -> int:
    """Bytes, by /proc/self/status."""
    return int(Path("/proc/self/status").read_text().partition(what + ":")[2].split()[0]) << 10


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
