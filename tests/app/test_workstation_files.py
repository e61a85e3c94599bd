"""Snapshots at the workstation: files saved and loaded, what differs, and what takes long."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from textual import events

from app.contract import ContractScreen, contract_lines
from app.lines_screen import LinesScreen
from app.operations import Job
from kvm.backends.software.system import SoftwareSystem
from kvm.machine import Phase
from kvm.quirks import Ignored
from kvm.snapshot.file import read
from kvm.x86.structs import pack_msrs, unpack_msrs
from tests.app.desk import BOTH, COUNT, Desk
from tests.kvm.machines import build
from tests.kvm.snapshot.crafted import with_substate
from tests.widgets.hosts import text
from widgets.lines import LinesPane
from widgets.prompt import Prompt
from widgets.snapshots import SnapshotsPane
from widgets.status import StatusLine


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Names that are typed are in here."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(at: Desk) -> str:
    """What the screen over the workstation shows."""
    pane = at.app.screen.query_one(LinesPane)
    return "\n".join(pane.line_text(y) for y in range(pane.size.height))


class Gate:
    """An operation that has stepped aside and goes on when it's let: a save of much memory."""

    def __init__(self, at: Desk, name: str = "save") -> None:
        self.at, self.go = at, threading.Event()
        self.job: Job | None = None
        at.app.ask(name, self._work)

    def _work(self, job: Job) -> None:
        self.job = job
        job.aside()
        job.progress(43, 100)
        job._began -= 1  # as if it had taken a second
        while not self.go.wait(0.01):
            if job.cancel.is_set():
                return

    async def aside(self) -> None:
        await self.at.until(lambda: len(self.at.app.operations.asides) == 1)


@BOTH
async def test_a_file_is_saved_while_the_guest_runs_and_loaded_again(desk, folder) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        await at.press("s", "space")
        await at.press("w")
        assert "Enter saves; the guest runs on meanwhile." in at.said
        await at.press("enter")
        assert at.phase is Phase.RUNNING
        await at.until(lambda: "▤ guest-1" in at.text(SnapshotsPane))
        assert "KB written to guest-1.vmdeck" in at.text(StatusLine)
        with read("guest-1.vmdeck") as file:
            saved = int.from_bytes(file.head.state.vcpus[0]["regs"][:8], "little")
        await at.press("space", "s", "s")
        await at.press("l")
        assert "guest-1.vmdeck" in at.said
        await at.press("g", "tab", "minus", "tab")
        assert at.app.query_one(Prompt).input.value == "guest-1.vmdeck"
        await at.until(lambda: "2 VCPUs, 4 MiB" in at.said)
        await at.press("enter")
        assert int.from_bytes(at.machine.view(0).regs[:8], "little") == saved
        assert [kept.name for kept in at.machine.checkpoints] == ["guest-1.vmdeck"]
        await at.press("s", "b")
        assert int.from_bytes(at.machine.view(0).regs[:8], "little") == saved


async def test_only_what_changed_is_saved_and_files_are_chosen_in_their_pane(desk, folder) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        await at.press("W")
        assert not at.app.query_one(Prompt).display, "there is nothing that it could build on"
        await at.press("w")
        await at.press("enter", "s", "W")
        await at.press("enter")
        await at.until(lambda: "╵ ▤ guest-2" in at.text(SnapshotsPane))
        assert [file.rips[0] for file in at.app.desk.shelf.files] == [0x7C00, 0x7C02]
        await at.press("f4", "n")
        await at.press(*"one step", "enter")
        await at.until(lambda: "guest-2 one step" in at.text(SnapshotsPane))
        with read("guest-2.vmdeck") as file:
            assert (file.head.name, file.head.parent is not None) == ("one step", True)
        await at.press("up", "enter")
        assert at.rip() == 0x7C00
        await at.press("down", "down", "x")
        await at.until(lambda: "guest-2" not in at.text(SnapshotsPane))
        assert (folder / "guest-2.vmdeck").exists(), "only the list forgets it"


async def test_what_would_be_overwritten_is_said_or_refused(desk, folder) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        (folder / "thesis").write_text("five years of work")
        await at.press("w")
        await at.press("ctrl+u", *"thesis", "enter")
        assert "is no snapshot of vmdeck's" in at.said
        await at.press("ctrl+u", *"good", "enter")
        assert (folder / "thesis").read_text() == "five years of work"
        await at.press("w")
        await at.press("ctrl+u", *"good")
        await at.until(lambda: "Enter replaces the snapshot of" in at.said)
        await at.press("ctrl+u", *"no/such", "enter")
        assert "Can't write no/such" in at.text(StatusLine)
        await at.press("l")
        await at.press(*"thesis", "enter")
        assert "Can't use thesis" in at.said
        await at.press("ctrl+u", "enter")
        assert "Which file?" in at.said
        for name in ("~nobody-of-that-name/x", "x" * 300):
            await at.press("ctrl+u")
            at.app.post_message(events.Paste(name))
            await at.press("tab")
            await at.until(lambda: at.said == "There is no such file.")
        await at.press("enter")
        assert "Can't open" in at.said


async def test_what_a_file_would_lose_is_asked_first(desk, folder) -> None:  # type: ignore[no-untyped-def]
    with build(SoftwareSystem(), folder, COUNT, vcpus=2) as machine:
        machine.save_file("own")
    with read("own") as file:
        msrs = unpack_msrs(file.head.state.vcpus[1]["msrs_reset"])
    with_substate(folder / "own", 1, "msrs_reset", pack_msrs({**msrs, 0x4B564D03: 1})).rename("other")
    async with desk(COUNT) as at:
        await at.press("l")
        await at.press(*"other", "enter")
        await at.until(lambda: isinstance(at.app.screen, LinesScreen))
        assert "KVM_STEAL_TIME" in lines(at)
        await at.press("escape")
        assert at.machine.files.saved is None
        assert at.machine.checkpoints == ()
        await at.press("l")
        await at.press("up", "enter")
        await at.until(lambda: isinstance(at.app.screen, LinesScreen))
        await at.press("enter")
        await at.until(lambda: at.machine.files.saved is not None)
        await at.idle()
        assert [kept.name for kept in at.machine.checkpoints] == ["other"]


@BOTH
async def test_any_two_are_compared(desk, folder) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        await at.press("w")
        await at.press("enter", "c", "s")
        at.machine.write_memory(0x2000, b"changed")
        await at.press("f4", "up", "d")
        await at.until(lambda: isinstance(at.app.screen, LinesScreen))
        shown = lines(at)
        assert "1 checkpoint 1 → now" in shown
        assert "regs.rip                       0x7c00 → 0x7c02" in shown
        await at.press("end")
        shown = lines(at)
        assert "7 bytes in 1 pages" in shown
        assert "0000000000002000 00 00 00 00 00 00 00 → 63 68 61 6e 67 65 64" in shown
        await at.press("escape", "m", "down", "d")
        await at.until(lambda: isinstance(at.app.screen, LinesScreen))
        assert "1 checkpoint 1 → guest-1.vmdeck" in lines(at)
        assert "memory" not in lines(at)


async def test_a_long_operation_says_how_far_it_is_lets_others_pass_and_is_called_off(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        gate = Gate(at)
        await gate.aside()
        await at.until(lambda: "save 43 %  esc calls it off" in at.text(StatusLine))
        await at.pilot.press("s")
        await at.until(lambda: at.rip() == 0x7C02)
        await at.pilot.press("f4", "escape")
        await at.until(lambda: at.app.desk.keyboard == "vcpus")
        assert at.app.operations.shown is gate.job, "this Escape led back to the VCPUs"
        await at.pilot.press("escape")
        await at.idle()
        assert "43" not in at.text(StatusLine)


@pytest.mark.parametrize("again", [False, True])
async def test_quitting_waits_for_a_file_that_is_being_written(desk, again) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        gate = Gate(at)
        await gate.aside()
        await at.pilot.press("q")
        await at.pilot.pause()
        assert at.app.return_value is None
        if again:
            await at.pilot.press("q")
        else:
            gate.go.set()
        await at.until(lambda: at.app.return_value == 0)
        assert gate.job
        assert gate.job.cancel.is_set() == again


@BOTH
async def test_the_contract_shows_who_owns_what_and_what_goes_back(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT, size=(80, 24)) as at:
        await at.press("t")
        assert isinstance(at.app.screen, ContractScreen)
        await at.until(lambda: "The kernel owns the registers" in lines(at))
        await at.press("escape", "e")
        await at.press(*"rbx=1", "enter", "t")
        await at.until(lambda: "goes regs" in lines(at))
        assert "•  " in lines(at)
        await at.press("]")
        await at.until(lambda: "VCPU 1" in lines(at) and "The kernel owns" in lines(at))
        await at.press("q")
        assert at.app.screen is at.app.desk
        rows = "\n".join(text(contract_lines(at.machine, 0, [Ignored("MSR TSC", "it goes on")], 200)))
        for row in (*at.machine.table.put_order, *at.machine.chips.rows):
            assert row.why in rows
            assert row.name in rows
        assert "MSR TSC: it goes on" in rows
