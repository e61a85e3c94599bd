"""The ledger as JSON lines: whole, in order, and never at the guest's cost."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm.backends.interface import System
from kvm.backends.software.system import SoftwareSystem
from kvm.errors import VmdeckError
from kvm.ledger import Ledger, Part
from kvm.ledger_file import WAITING_LIMIT, LedgerFile
from kvm.levels import WritebackLevel
from kvm.machine import Activity
from tests.kvm.machines import COUNT, HLT, build, until

PART = Part(1, ("regs",), ("sregs",), ("xsave",), 3, 5, 1.5, tolerated=(("tsc_khz", "EINVAL"),))


@pytest.fixture
def system() -> Iterator[System]:
    with_unicorn = SoftwareSystem()
    yield with_unicorn
    with_unicorn.close()


def add(ledger: Ledger, count: int = 1, level: WritebackLevel | None = WritebackLevel.RESET) -> None:
    for _ in range(count):
        ledger.add("hook", level, "caller", [PART], 0, 2.5)


def lines(path: Path) -> list[dict[str, object]]:
    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_a_record_as_json_has_all_its_fields() -> None:
    ledger = Ledger()
    add(ledger)
    add(ledger, level=None)
    record = ledger.records[0]
    assert "\n" not in record.as_json()
    assert json.loads(record.as_json()) == {
        "number": 1, "time_ns": record.time_ns, "hook": "hook", "level": "RESET", "caller": "caller",
        "microseconds": record.microseconds, "skew_us": 2.5,
        "parts": [{"vcpu": 1, "read": ["regs"], "written": ["sregs"], "skipped": ["xsave"], "ioctls": 3,
                   "began_ns": 5, "microseconds": 1.5, "error": "", "tolerated": [["tsc_khz", "EINVAL"]]}],
    }  # fmt: skip
    assert json.loads(ledger.records[1].as_json())["level"] is None


def test_the_ledger_keeps_the_newest_and_counts_all() -> None:
    ledger = Ledger(limit=3)
    add(ledger, 5)
    assert [record.number for record in ledger.records] == [3, 4, 5]
    assert ledger.total == 5


def test_records_from_before_and_after_the_file_was_opened(tmp_path: Path) -> None:
    path, ledger = tmp_path / "ledger", Ledger()
    path.write_text("what was there")
    add(ledger, 3)
    with LedgerFile(ledger, path) as file:
        add(ledger, 2)
    add(ledger)  # after it was closed
    assert [line["number"] for line in lines(path)] == [1, 2, 3, 4, 5]
    assert file.trouble == ""


def test_a_record_is_in_the_file_while_the_machine_goes_on(tmp_path: Path) -> None:
    ledger = Ledger()
    with LedgerFile(ledger, tmp_path / "ledger"):
        add(ledger)
        until(lambda: len(lines(tmp_path / "ledger")) == 1)


def test_every_hook_of_a_machine(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, HLT, vcpus=2) as machine:
        with LedgerFile(machine.ledger, tmp_path / "ledger"):
            machine.run()
            machine.edit(0, "rbx", 7)
            machine.reset()
            machine.restore(machine.checkpoint())
        assert lines(tmp_path / "ledger") == [json.loads(record.as_json()) for record in machine.ledger.records]
        hooks = [line["hook"] for line in lines(tmp_path / "ledger")]
    assert hooks[1:3] == ["cpu_synchronize_all_states", "cpu_synchronize_all_post_init"]
    assert {"cpu_synchronize_state", "cpu_synchronize_all_post_reset", "cpu_synchronize_all_pre_loadvm"} <= {*hooks}


def test_a_file_that_cant_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VmdeckError, match=r"can't be written to .*missing/ledger: No such file or directory\. Choose"):
        LedgerFile(Ledger(), tmp_path / "missing" / "ledger")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_leaves_the_guest_alone(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT) as machine:
        with LedgerFile(machine.ledger, Path("/dev/full")) as file:
            machine.run()
            for _ in range(3):
                machine.edit(0, "rbx", 7)
                machine.run()
            assert machine.view(0).activity is Activity.RUNNING
            machine.pause()  # a VCPU's thread adds no more records
        total = machine.ledger.total
    assert file.trouble == (
        f"The ledger in /dev/full is not whole: {total} of {total} records are missing (No space left on device). "
        "The guest was not affected."
    )


def test_what_a_disk_took_before_it_was_full_are_whole_lines(tmp_path: Path) -> None:
    """A limit on this process's files: the write that crosses it comes up short, the next fails."""
    path, ledger = tmp_path / "ledger", Ledger()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with LedgerFile(ledger, path) as file:
            add(ledger, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    kept = [line["number"] for line in lines(path)]
    assert kept == list(range(1, len(kept) + 1))
    assert 0 < len(kept) < 20
    assert f"{20 - len(kept)} of 20 records are missing (File too large)" in file.trouble


def test_a_reader_that_sleeps_costs_records_but_nothing_else(tmp_path: Path) -> None:
    path, ledger = tmp_path / "pipe", Ledger()
    os.mkfifo(path)
    reader: list[int] = []
    opening = threading.Thread(target=lambda: reader.append(os.open(path, os.O_RDONLY)))
    opening.start()
    file = LedgerFile(ledger, path)
    opening.join()
    add(ledger, WAITING_LIMIT + 2000)  # more than wait, and than a pipe holds
    os.close(reader[0])
    file.close()
    assert "records are missing (Broken pipe)" in file.trouble
