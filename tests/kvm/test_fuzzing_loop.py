"""The loop that a fuzzer makes of a machine: restore, write input, run until it ends, read the result."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm.backends.interface import ExitKind, System
from kvm.machine import Phase
from tests.bench.fuzzing_loop import OK, SEED, Loop, build, fuzz
from tests.guests.assemble import BinutilsMissing

REFUSED = 1
EXPECTED = sum(SEED[9:-4]) + sum(SEED[-2:])


@pytest.fixture
def loop(system: System, tmp_path: Path) -> Iterator[Loop]:
    try:
        machine = build(system, tmp_path, 2 << 20)
    except BinutilsMissing as missing:
        pytest.skip(str(missing))
    with machine:
        yield Loop(machine, limit=0.2)


def test_the_guest_s_bug_is_found_and_every_execution_starts_afresh(loop: Loop) -> None:
    found = fuzz(loop, seed=1, most=1000)
    assert found is not None
    assert found.executions == 306  # the same on every backend: nothing is left of the executions before
    for _ in range(2):
        crashed = loop.execute(found.data)
        assert crashed.exit is not None
        assert crashed.exit.kind is ExitKind.SHUTDOWN
        assert (loop.execute(SEED).code, loop.sum()) == (OK, EXPECTED)
        assert loop.sum() == EXPECTED
        assert loop.execute(b"X\0").code == REFUSED
        assert loop.sum() == 0


def test_an_execution_that_hangs_is_told_and_the_next_one_goes_on(loop: Loop, tmp_path: Path) -> None:
    """A name that leads to the guest's HLT, interrupts off."""
    halt = 0x100000 + (tmp_path / "parser64").read_bytes().index(b"\xf4\xb0")
    name = b"x" * 16 + halt.to_bytes(8, "little") + bytes(104)
    assert loop.execute(b"N\x80" + name).phase is Phase.RUNNING
    assert (loop.execute(SEED).code, loop.sum()) == (OK, EXPECTED)
