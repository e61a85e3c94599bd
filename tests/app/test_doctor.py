"""``vmdeck doctor`` tells what works here and what doesn't, and its exit code whether guests can run."""

from __future__ import annotations

import pytest

from kvm.backends.kernel.capabilities import CAPABILITIES
from kvm.backends.software.limits import LIMITS
from tests.app.process import EMPTY_DEV, in_namespace, vmdeck


@pytest.fixture(scope="module")
def said() -> str:
    done = vmdeck("doctor")
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode()


def part(said: str, title: str) -> list[str]:
    """The lines under a title."""
    (found,) = [block for block in said.split("\n\n") if block.strip().startswith(title)]
    return found.strip().splitlines()[1:]


def test_versions(said: str) -> None:
    names = {line.split()[0] for line in part(said, "vmdeck")}
    assert {"version", "system", "Python", "textual", "unicorn", "cffi"} <= names


def test_the_software_backend_ran_a_guest_and_tells_its_limits(said: str) -> None:
    (guest,) = part(said, "Backend software: usable")
    assert "ran" in guest
    assert len(part(said, "Limits of the software backend")) == len(LIMITS)


@pytest.mark.kvm
def test_kvm_ran_a_guest_and_tells_every_capability(said: str) -> None:
    device, extension, guest = part(said, "Backend kvm: usable")
    assert "opens" in device
    assert "built" in extension
    assert "ran" in guest
    assert [line.split()[0] for line in part(said, "KVM's capabilities")] == list(CAPABILITIES)
    assert part(said, "MSRs that this KVM lists and then refuses")
    assert part(said, "What this KVM accepts and then ignores")


def test_the_terminal(said: str) -> None:
    assert {line.split()[0] for line in part(said, "Terminal")} >= {"stdin", "stdout", "size", "TERM", "colours"}


def test_columns_are_aligned(said: str) -> None:
    values = part(said, "vmdeck")
    starts = {len(line) - len(line[2:].partition("  ")[2].lstrip()) for line in values}
    assert len(starts) == 1


def test_without_kvm_it_says_why_and_guests_still_run() -> None:
    done = in_namespace(EMPTY_DEV, "doctor")
    assert done.returncode == 0
    why = " ".join(line.strip() for line in part(done.stdout, "Backend kvm: NOT USABLE"))
    assert "can't be opened: No such file" in why
    assert "--backend software" in why
    assert part(done.stdout, "Backend software: usable")
