"""The fuzzer's own parts, without a fuzzer: its inputs reach what they are for, and what must not be is found."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm.errors import SnapshotError
from kvm.machine import Machine
from kvm.snapshot import convert, notes
from tests import fuzz_snapshot
from tests.kvm.snapshot import heads
from tests.kvm.snapshot.target import WAYS, Target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with Target(tmp_path_factory.mktemp("fuzzer")) as made:
        yield made


@pytest.fixture(scope="module")
def seeds(target: Target) -> list[bytes]:
    return target.seeds()


def test_seeds_are_taken_and_mutations_get_past_the_checksum(target: Target, seeds: list[bytes]) -> None:
    rng = random.Random(1)

    def mutate(raw: bytes, most: int) -> bytes:
        changed = bytearray(raw or b"\0")
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed[:most])

    for seed in seeds:
        if WAYS[seed[0]] is Target.load:
            taken = target.taken
            target(seed)
            assert target.taken == taken + 1
    taken, refused = target.taken, target.refused
    for _ in range(30):
        seed = rng.choice(seeds)
        target(seed[:1] + heads.mutated(seed[1:], 64 << 10, rng, mutate))
    assert target.taken > taken + 5
    assert target.refused > refused + 5


@pytest.mark.slow
@settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False), number=st.integers(0, 10_000), raw=st.binary(min_size=1, max_size=8))
def test_mutations_by_the_thousand(
    target: Target, seeds: list[bytes], rng: random.Random, number: int, raw: bytes
) -> None:
    seed = seeds[number % len(seeds)]
    target(seed[:1] + heads.mutated(seed[1:], 64 << 10, rng, lambda old, most: (raw + old[len(raw) :])[:most]))


@pytest.mark.parametrize("fault", ["another error", "a changed machine", "an escape sequence"])
def test_control_what_must_not_be_is_found(
    target: Target, seeds: list[bytes], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def divide(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    def half_done(machine: Machine, *_: object) -> None:
        machine.memory.write(0x3000, b"half")
        raise SnapshotError("refused")

    parts = heads.taken_apart(seeds[0][1:])
    assert parts is not None
    way, wrong = Target.load, AssertionError
    with monkeypatch.context() as patched:
        match fault:
            case "another error":
                patched.setattr(convert, "fit", divide)
                wrong = ZeroDivisionError
            case "a changed machine":
                patched.setattr(Machine, "_take", half_done)
            case _:
                patched.setattr(notes, "_name", lambda raw: raw.rstrip(b"\0").decode())
                parts.notes += [(notes.OWNER, notes.SUBSTATE, bytes(4) + b"\x1b[31m".ljust(24, b"\0"))] * 2
                way = Target.look
        with pytest.raises(wrong):
            target(bytes([WAYS.index(way)]) + heads.put_together(parts))
    target.machine.load_file(target.good)


def test_where_it_can_t_run_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fuzz_snapshot.main(["1"]) == 2
    assert "pip install" in capsys.readouterr().err
    assert fuzz_snapshot.main([]) == 2
