"""vmdeck as a fuzzer uses it: restore, write input, run until it ends, read the result. And what that costs.

``python -m tests.bench.fuzzing_loop [EXECUTIONS]`` mutates input for tests/guests/parser64.S until its bug is found,
then measures so many executions (5,000), on KVM beside the same ioctls and copies in C (needs gcc), and in software.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvm.backends.choice import open_system
from kvm.backends.interface import System
from kvm.boot import loader
from kvm.errors import BackendUnavailable
from kvm.machine import Machine, MachineConfig, Phase, Status
from tests.guests.assemble import assemble

GUEST = Path(__file__).parent.parent / "guests" / "parser64.S"
INPUT, SUM = 0x8000, 0x9000
READY, OK = 0x52, 0
SEED = b"N\x05helloS\xa0" + b"vmdeck" * 26 + b"....S\x02ab"
"""A name, 160 numbers, two numbers."""
SHORT = SEED[:7] + SEED[-4:]
"""What an execution costs but for the guest's own instructions, a microsecond each where KVM emulates them."""


def build(system: System, folder: Path, memory: int) -> Machine:
    """The parser, not started. Raises BinutilsMissing."""
    image = folder / "parser64"
    image.write_bytes(assemble(GUEST, base=0x100000, format="bin"))
    return Machine(system, loader.load(image, memory=memory, format="flat64"), MachineConfig(memory=memory))


class Loop:
    """A machine that executes one input after the other, each from where the guest was ready for the first.

    ``limit`` is how many seconds an execution may take.
    """

    def __init__(self, machine: Machine, limit: float = 1.0) -> None:
        self.machine = machine
        self._limit = limit
        machine.run()
        status = machine.wait(Phase.EXITED, Phase.STOPPED, timeout=20)
        assert status.code == READY, status
        self._ready = machine.checkpoint("ready")
        self.copied = 0
        """Pages that going back has cost so far."""

    def execute(self, data: bytes) -> Status:
        """How the guest ended; RUNNING if it hasn't in time."""
        machine = self.machine
        self.copied += machine.restore(self._ready)
        machine.write_memory(INPUT, len(data).to_bytes(8, "little") + data)
        machine.run()
        status = machine.wait(Phase.EXITED, Phase.STOPPED, timeout=self._limit)
        if status.phase is Phase.RUNNING:
            machine.pause()  # or the next restore would have it run on, from there with this input
        return status

    def sum(self) -> int:
        return int.from_bytes(self.machine.read_memory(SUM, 8), "little")


def mutations(seed: int) -> Iterator[bytes]:
    """Inputs for ever, the same for the same seed: up to 8 bytes of SEED changed."""
    rng = random.Random(seed)
    while True:
        data = bytearray(SEED)
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        yield bytes(data)


@dataclass(frozen=True, slots=True)
class Found:
    """The input that crashes the guest, how that ended, and the number of executions that it took."""

    data: bytes
    status: Status
    executions: int


def fuzz(loop: Loop, seed: int, most: int) -> Found | None:
    """Execute mutations until the guest crashes or hangs; None if none of so many does."""
    for number, data in zip(range(1, most + 1), mutations(seed), strict=False):
        status = loop.execute(data)
        if status.phase is not Phase.EXITED:
            return Found(data, status, number)
    return None


def measure(name: str, memory: int, executions: int) -> None:
    with tempfile.TemporaryDirectory() as folder, build(open_system(name), Path(folder), memory) as machine:
        loop = Loop(machine)
        start = time.perf_counter()
        found = fuzz(loop, 1, 100_000)
        assert found is not None
        print(f"{name}, {memory >> 20} MiB: the bug is found by execution {found.executions}, "
              f"{time.perf_counter() - start:.2f} s: {found.status.reason}")  # fmt: skip
        times, before = [], loop.copied
        for _ in range(executions):
            start = time.perf_counter()
            loop.execute(SHORT)
            times.append(time.perf_counter() - start)
        pages = (loop.copied - before) / executions
        print(f"  {executions / sum(times):.0f} executions a second, {pages:.1f} pages copied for each")
        if name == "kvm":
            from tests.bench.__main__ import floor, line

            line(
                "an execution; the same in C", statistics.median(times) * 1e6, floor("loop", round(pages))["execution"]
            )


if __name__ == "__main__":
    for name, memory in (("kvm", 128 << 20), ("software", 2 << 20)):
        try:
            measure(name, memory, int(sys.argv[1]) if len(sys.argv) == 2 else 5000)
        except BackendUnavailable as error:
            print(f"{name}: {error}")
