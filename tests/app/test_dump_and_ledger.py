"""``--dump-registers`` and ``--ledger`` of a headless run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.app.process import refused, vmdeck

EXIT_7 = bytes.fromhex("66 bb 78 56 34 12  b0 07 e6 f4  eb fe")
"""mov ebx, 0x12345678; mov al, 7; out 0xf4, al (isa-debug-exit); jmp to itself."""


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    path = tmp_path / "guest.bin"
    path.write_bytes(EXIT_7)
    return path


HEADLESS = ("--backend", "software", "--format", "flat16", "--vcpus", "2", "--memory", "4M", "--headless")


def test_registers_are_on_stderr_when_the_guest_has_ended(guest: Path) -> None:
    done = vmdeck("run", str(guest), *HEADLESS, "--dump-registers")
    text = done.stderr.decode()
    assert (done.returncode, done.stdout) == (15, b"")
    assert text.startswith("\nCPU#0\nEAX=00000007 EBX=12345678 ")
    assert "\nCPU#1\nEAX=00000000 " in text


def test_the_ledger_is_in_the_file(guest: Path, tmp_path: Path) -> None:
    done = vmdeck("run", str(guest), *HEADLESS, "--ledger", str(tmp_path / "ledger"))
    assert (done.returncode, done.stderr) == (15, b"")
    records = [json.loads(line) for line in (tmp_path / "ledger").read_text().splitlines()]
    assert [record["number"] for record in records] == list(range(1, len(records) + 1))
    assert (records[2]["hook"], records[2]["level"]) == ("cpu_synchronize_all_post_init", "FULL")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said_and_the_guests_exit_code_stays(guest: Path) -> None:
    done = vmdeck("run", str(guest), *HEADLESS, "--ledger", "/dev/full")
    assert done.returncode == 15
    assert b"vmdeck: The ledger in /dev/full is not whole: " in done.stderr
    assert b"No space left on device" in done.stderr


def test_they_are_refused_without_headless(guest: Path, tmp_path: Path) -> None:
    assert "go with --headless" in refused("run", str(guest), "--dump-registers")
    assert "go with --headless" in refused("run", str(guest), "--ledger", str(tmp_path / "ledger"))
    assert not (tmp_path / "ledger").exists()


def test_a_ledger_that_cant_be_written_is_refused_before_the_guest_runs(guest: Path, tmp_path: Path) -> None:
    message = refused("run", str(guest), *HEADLESS, "--ledger", str(tmp_path / "missing" / "ledger"))
    assert "No such file or directory" in message
