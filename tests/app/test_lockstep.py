"""``vmdeck lockstep`` as a person runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from app import lockstep
from kvm.lockstep import Difference, Outcome
from tests.app.process import Terminal, refused, vmdeck
from tests.kvm.contract.lab import START_AP


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "guest.bin"
    path.write_bytes(START_AP)
    return str(path)


FLAT = ("--format", "flat64", "--memory", "4M")


@pytest.mark.kvm
def test_it_steps_so_many(image: str) -> None:
    done = vmdeck("lockstep", image, *FLAT, "--vcpus", "2", "--count", "120")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"120 instructions, no difference\n", b"")


@pytest.mark.kvm
def test_ctrl_c_ends_it_with_what_was_found(image: str) -> None:
    with Terminal("lockstep", image, *FLAT, "--count", "1000000000") as terminal:
        terminal.expect(b" of 1000000000 instructions, ")
        terminal.type(b"\x03")
        assert terminal.wait() == 130
        assert b" instructions, no difference; stopped" in terminal.seen
        assert b"Traceback" not in terminal.seen


def test_a_difference_is_told_with_its_vcpu(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = Outcome(7, "different", Difference(7, 2, 0x1000, "inc eax", {"rax": (0x10, 0x11)}))
    outcome.taken["time or chance"] = 3
    lockstep.report(outcome)
    assert capsys.readouterr().out.splitlines() == [
        "       3 × not compared: time or chance",
        "different after instruction 7, VCPU 2 at 0x1000: inc eax",
        "  rax: 0x10 on KVM, 0x11 on the software backend",
    ]


@pytest.mark.kvm
def test_more_vcpus_than_both_backends_can_have(image: str) -> None:
    assert "255 VCPUs: this backend can have 1 to 254" in refused("lockstep", image, *FLAT, "--vcpus", "255")
