"""The same guest on KVM and on the software backend, a step at a time: nothing differs, and what differs is found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app import guests
from kvm import lockstep
from kvm.backends.interface import System
from kvm.backends.software.system import SoftwareSystem
from kvm.boot import loader
from kvm.lockstep import Lockstep
from tests.kvm.contract.lab import assembled

MEMORY = 4 << 20
SOURCES = Path(__file__).parents[1] / "guests"
SMALL = {
    "counter64": "flat64", "dirty64": "flat64", "echo64": "flat64", "hello16": "flat16", "pio": "flat16",
    "smp64": "flat64", "timer64": "flat64", "triple": "flat64",
}  # fmt: skip
"""Every small guest that KVM can step on any host, and its format."""


@pytest.fixture
def reference() -> Iterator[System]:
    from kvm.backends.kernel.system import KernelSystem

    system = KernelSystem()
    yield system
    system.close()


@contextmanager
def stepping(reference: System, folder: Path, guest: str) -> Iterator[Lockstep]:
    if guest == "demo":
        image = loader.load(guests.demo(), memory=MEMORY)
    else:
        base = 0x7C00 if SMALL[guest] == "flat16" else 0x100000
        path = folder / guest
        path.write_bytes(assembled(SOURCES / f"{guest}.S", folder, base))
        image = loader.load(path, memory=MEMORY, format=SMALL[guest], address=base)
    with lockstep.pair(reference, SoftwareSystem(), image, MEMORY) as both:
        yield both


@pytest.mark.kvm
@pytest.mark.parametrize("guest", ["demo", *SMALL])
def test_nothing_differs(reference: System, tmp_path: Path, guest: str) -> None:
    with stepping(reference, tmp_path, guest) as both:
        outcome = both.run(2000)
    assert outcome.difference is None
    assert outcome.steps == 2000 or outcome.ended


@pytest.mark.kvm
@pytest.mark.slow
@pytest.mark.parametrize("guest", ["demo", *SMALL])
def test_nothing_differs_for_long(reference: System, tmp_path: Path, guest: str) -> None:
    with stepping(reference, tmp_path, guest) as both:
        outcome = both.run(100_000)
    assert outcome.difference is None
    assert outcome.steps == 100_000 or outcome.ended


def test_a_machine_is_equal_to_itself(tmp_path: Path) -> None:
    with stepping(SoftwareSystem(), tmp_path, "counter64") as both:
        outcome = both.run(1500)
    assert (outcome.steps, outcome.ended, outcome.difference) == (1500, "", None)


@pytest.mark.parametrize("at", [0, 700, 1200])
def test_a_register_that_differs_is_found_at_once(tmp_path: Path, at: int) -> None:
    with stepping(SoftwareSystem(), tmp_path, "counter64") as both:
        both.run(at)
        both._machines[1].edit(0, "r13", 0xBAD)
        outcome = both.run(2000)
    assert outcome.difference is not None
    assert outcome.difference.step == at + 1
    assert list(outcome.difference.values) == ["r13"]
    assert outcome.difference.values["r13"][1] == 0xBAD
    assert outcome.ended == "different"


def test_a_byte_of_memory_that_differs_is_found_with_its_address(tmp_path: Path) -> None:
    with stepping(SoftwareSystem(), tmp_path, "counter64") as both:
        both.run(100)
        both._machines[1].write_memory(0x200003, b"\x01")
        outcome = both.run(2000)
    assert outcome.difference is not None
    assert outcome.difference.step == 101
    assert outcome.difference.values == {"memory[0x200000]": (0, 0x01000000)}
    assert outcome.difference.text
