"""The workstation on real machines: every key and button, every size, and what happens when a guest can't go on."""

from __future__ import annotations

from random import Random

import pytest
from textual import events
from textual.keys import key_to_character
from textual.widgets import Button
from textual.widgets._footer import FooterKey

from app.commands import COMMANDS, MEMORY_COMMANDS
from app.help import HelpScreen
from kvm.machine import Phase
from tests.app import guests
from tests.app.desk import BOTH, COUNT, Desk
from widgets.console import ConsolePane
from widgets.ledger import LedgerPane
from widgets.prompt import Prompt
from widgets.snapshots import SnapshotsPane
from widgets.status import Banner, StatusLine
from widgets.vcpu_area import VcpuArea
from widgets.vcpu_list import VcpuList
from widgets.vcpu_pane import MARK

SIZES = [(80, 24), (120, 40), (200, 60)]


@pytest.mark.parametrize("size", SIZES)
async def test_the_first_frame_says_what_runs_who_owns_it_and_which_keys_there_are(desk, size) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT, size=size) as at:
        status = at.text(StatusLine)
        assert "‖ PAUSED" in status
        assert "guest.bin" in status
        assert at.machine.system.name in status
        assert "2 VCPUs" in status
        assert ("real CPL0" if size == (120, 40) else "real mode CPL0") in at.pane()
        assert "kernel owns" in at.pane()
        assert "0000:7c00  " in at.pane()
        assert "inc eax" in at.pane()
        assert at.app.theme == "vmdeck"
        await at.until(lambda: "Run" in at.footer)
        for word in ("Run", "Step", "Edit", "Checkpoint", "Reset", "Type", "Help", "Quit"):
            assert at.footer[word], at.footer
        assert at.footer["Back"] is False
        assert "Pause" not in at.footer


@BOTH
async def test_space_runs_and_pauses(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        await at.press("space")
        assert at.phase is Phase.RUNNING
        await at.until(lambda: "Pause" in at.footer and "Run" not in at.footer)
        await at.until(lambda: f"{MARK}RAX" in at.pane())
        assert "▶ RUNNING" in at.text(StatusLine)
        await at.press("space")
        assert at.phase is Phase.PAUSED
        await at.press("f5")
        assert at.phase is Phase.RUNNING
        await at.press("f5")
        assert at.phase is Phase.PAUSED


@BOTH
async def test_step_moves_the_selected_vcpu_and_marks_what_changed(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        await at.press("s")
        assert at.rip() == 0x7C02
        assert f"{MARK}RIP 0000000000007c02" in at.pane()
        assert f"{MARK}RAX 0000000000000001" in at.pane()
        await at.press("s")
        assert at.rip() == 0x7C00
        assert f"{MARK}RAX" not in at.pane()
        assert f"{MARK}RIP" in at.pane()
        await at.press("f6", "S")
        assert at.rip() == 0x7C00
        assert at.phase is Phase.PAUSED


async def test_keys_pressed_faster_than_the_machine_works_are_done_in_their_order(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        await at.press("s", "s", "s", "c", "s", "s", "s", "b")
        assert at.rip() == 0x7C02
        assert at.machine.checkpoints[0].position[0] == 0x7C02


@BOTH
async def test_checkpoint_and_back(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        await at.press("s", "c")
        await at.until(lambda: "●╶ 1 checkpoint 1" in at.text(SnapshotsPane))
        await at.until(lambda: at.footer.get("Back") is True)
        await at.press("s", "s", "s")
        await at.press("b")
        assert at.rip() == 0x7C02
        await at.press("s", "f8", "f9")
        assert len(at.machine.checkpoints) == 2
        assert at.rip() == 0x7C00


async def test_the_tree_of_checkpoints(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        await at.press("c", "s", "c", "f4")
        assert at.app.focused.id == "snapshots"
        await at.press("up", "enter")
        assert at.rip() == 0x7C00
        assert at.machine.came_from == 1
        await at.press("s", "c")
        await at.until(lambda: "●└ 3" in at.text(SnapshotsPane))
        rows = at.text(SnapshotsPane).splitlines()
        assert [row[1:5] for row in rows if "checkpoint " in row] == [" ┌ 1", " ├ 2", "●└ 3"]
        await at.press("n")
        await at.press("ctrl+u", *"crash", "enter")
        assert at.app.focused.id == "snapshots"
        await at.press("N")
        await at.press(*"why", "enter")
        await at.until(lambda: "└ 3 crash – why" in at.text(SnapshotsPane))
        await at.press("n")
        await at.press("ctrl+u", "enter")
        await at.press("N")
        await at.press("ctrl+u", "enter")
        kept = at.machine.checkpoints[-1]
        assert (kept.name, kept.note) == ("crash", ""), "a name can't be empty, a note can"
        await at.press("up", "up", "x")
        await at.until(lambda: "checkpoint 1" not in at.text(SnapshotsPane))
        await at.press("delete")
        await at.until(lambda: "╶ 3 crash" in at.text(SnapshotsPane))
        assert [kept.number for kept in at.machine.checkpoints] == [3]
        await at.press("f4")
        assert at.app.focused.id == "vcpus"


async def test_a_checkpoint_is_named_as_it_is_taken(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        await at.press("C")
        await at.press(*"boot", "escape")
        assert at.machine.checkpoints == ()
        await at.press("C")
        await at.press(*"at boot", "enter")
        await at.press("C")
        await at.press("enter")
        assert [kept.name for kept in at.machine.checkpoints] == ["at boot", "checkpoint 2"]


async def test_back_goes_to_where_the_machine_came_from(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        await at.press("c", "s", "c")  # only then are there two, and Up leads from the one to the other
        await at.press("f4", "up", "enter", "escape", "s")
        await at.press("b")
        assert at.rip() == 0x7C00
        await at.press("r", "s", "s", "b")
        assert at.rip() == 0x7C02, "after a reset: the newest"


@BOTH
async def test_a_register_is_edited(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT, size=(80, 24)) as at:
        prompt = at.app.query_one(Prompt)
        await at.press("space")
        await at.press("e")
        await at.press(*"rbx=0x", "enter")
        assert "no value for rbx" in at.said
        assert prompt.display
        await at.press("backspace", "backspace", *"99")
        await at.until(lambda: "Enter pauses the guest; rbx 0000000000000000 → 0000000000000063" in at.said)
        assert at.phase is Phase.RUNNING
        await at.press("enter")
        assert at.phase is Phase.PAUSED
        assert not prompt.display
        assert "user copy owns" in at.pane()
        assert f"{MARK}RBX 0000000000000063" in at.pane()
        await at.press("s")
        assert int.from_bytes(at.machine.view(0).regs[8:16], "little") == 99, "the guest has it"
        await at.press("j", "e")
        await at.press("up")
        await at.press("enter")
        assert at.machine.view(1).dirty
        assert int.from_bytes(at.machine.view(1).regs[8:16], "little") == 99
        await at.press("e")
        await at.press(*"ri", "tab", *"0x7c00", "escape", "j")
        assert at.app.desk.selected == 0
        await at.press("e")
        await at.press("f2")
        assert not prompt.display, "it goes with the keyboard"
        assert at.app.focused.id == "console"


async def test_a_value_that_the_processor_refuses_is_an_error_to_be_mended(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        await at.press("e")
        await at.press(*"cr4=0x8000000000000000", "enter", "s")
        assert "cr4" in at.text(StatusLine).lower() or "sregs" in at.text(StatusLine)
        assert "user copy owns" in at.pane()
        await at.press("e")
        await at.press(*"cr4=0", "enter", "s")
        assert at.rip() == 0x7C02


@pytest.mark.parametrize("keys", ["erax=1\rs", "Cboot\rs", "eresc\x1bcs", "erax\r\x15rbx=2\rs"])
async def test_keys_that_come_at_once_go_where_they_belong(desk, keys) -> None:  # type: ignore[no-untyped-def]
    """As over a slow line: of ``e rax=1`` no letter may be a command."""
    async with desk(COUNT) as at:
        for character in keys:
            at.app.post_message(
                events.Key({"\r": "enter", "\x1b": "escape", "\x15": "ctrl+u"}.get(character, character), character)
            )
        await at.idle()
        await at.until(lambda: not at.app.query_one(Prompt).display)
        await at.idle()
        assert "reset" not in [record.caller for record in at.machine.ledger.records]
        assert at.rip() == 0x7C02, "the step behind the prompt's end is a step"
        callers = [record.caller for record in at.machine.ledger.records]
        assert callers.count("edit") == keys.count("=")
        names = {"C": ["boot"], "\x1b": ["checkpoint 1"]}
        assert [kept.name for kept in at.machine.checkpoints] == next((names[key] for key in names if key in keys), [])


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
async def test_zoom_gives_the_whole_terminal_to_the_pane_with_the_keyboard(desk, size) -> None:  # type: ignore[no-untyped-def]
    columns, rows = size
    async with desk(COUNT, vcpus=4, size=size) as at:
        panes = {name: at.app.query_one(f"#{name}") for name in ("vcpus", "console", "ledger", "snapshots")}
        before = {name: (pane.region, pane.display) for name, pane in panes.items()}
        await at.press("z")
        for name in ("CS", "DS", "ES", "FS", "GS", "SS", "TR", "LDT", "GDT", "IDT", "CR4", "EFER", "CR8", "CR2", "CR3"):
            assert f"{name} " in at.pane()
        for key, name in (("f3", "ledger"), ("f4", "snapshots"), ("f2", "console")):
            await at.press(key)
            await at.until(lambda name=name: panes[name].region.size == (columns, rows - (3 if columns == 80 else 2)))
            assert at.app.focused is panes[name]
        await at.press("f7", "f2")
        await at.until(lambda: {name: (pane.region, pane.display) for name, pane in panes.items()} == before)


KEYS = (
    *(key for command in COMMANDS for key in command.keys.split(",") if command.name != "leave"),
    *(key for command in MEMORY_COMMANDS for key in command.keys.split(",") if key != "q"), "m", "m",
    *"rax=0x10, cs.b nNxX 9", "enter", "enter", "escape", "escape", "tab", "shift+tab", "backspace", "delete", "home",
    "end", "left", "right", "ctrl+u", "ctrl+a", "ctrl+right_square_bracket", "f12", "alt+x", "ctrl+z",
)  # fmt: skip


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 30))])
async def test_whatever_keys_come_the_app_lives_and_obeys(desk, seed, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)  # among other things they save files
    random = Random(seed)
    async with desk(guests.ECHO, vcpus=3, size=(80, 24)) as at:
        for size in [*SIZES, (60, 16), (30, 8), (100, 30)]:
            for key in random.choices(KEYS, k=30):
                character = key_to_character(key) or ({"enter": "\r", "escape": "\x1b"}.get(key))
                at.app.post_message(events.Key(key, character))
                if random.random() < 0.1:
                    await at.pilot.pause()
            at.app.post_message(events.Paste("paste\nq"))
            await at.pilot.resize_terminal(*size)
            await at.idle()
            assert "bug in vmdeck" not in at.text(StatusLine)
            assert at.phase in (Phase.RUNNING, Phase.PAUSED)
        await at.press("escape", "escape")
        while at.app.screen is not at.app.desk:
            await at.press("escape")
        if at.app.focused.id == "console":
            await at.press("f2")
        if at.phase is Phase.RUNNING:
            await at.press("space")
        await at.press("r", "S")
        assert at.rip() == 0x7C02
        assert "stepped" in at.text(StatusLine)


@BOTH
async def test_reset(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        await at.press("s", "s", "s", "r")
        assert at.rip() == 0x7C00
        assert "RESET" in at.text(LedgerPane)
        assert "reset" in at.text(StatusLine)


async def test_every_button(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT, size=(80, 24)) as at:
        await at.click("#button-step")
        assert at.rip() == 0x7C02
        await at.click("#button-checkpoint")
        await at.click("#button-step")
        await at.click("#button-restore")
        assert at.rip() == 0x7C02
        await at.click("#button-edit")
        await at.press(*"rcx=1", "enter")
        assert at.machine.view(0).dirty
        await at.click("#button-reset")
        assert at.rip() == 0x7C00
        await at.click("#button-run")
        assert at.phase is Phase.RUNNING
        assert not at.app.query_one("#button-run", Button).display
        await at.click("#button-pause")
        assert at.phase is Phase.PAUSED
        await at.click("#button-help")
        assert isinstance(at.app.screen, HelpScreen)
        await at.press("escape")
        await at.click("#button-leave")
        assert at.app.return_value == 0


async def test_help_lists_every_key_and_closes(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT, size=(120, 60)) as at:
        for opening in ("question_mark", "f1"):
            await at.press(opening)
            assert isinstance(at.app.screen, HelpScreen)
            drawn = "".join(
                segment.text for strip in at.app.screen.query_one("#help-text").render_lines(
                    at.app.screen.query_one("#help-text").size.region
                ) for segment in strip
            )  # fmt: skip
            assert not [each.help for each in (*COMMANDS, *MEMORY_COMMANDS) if each.help[:24] not in drawn]
            await at.press("escape")
            assert not isinstance(at.app.screen, HelpScreen)


@BOTH
async def test_typing_goes_to_the_guest_and_nowhere_else(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(guests.ECHO) as at:
        await at.press("space")
        await at.until(lambda: ">" in at.text(ConsolePane))
        await at.press("f2")
        await at.until(lambda: "typing goes to the guest" in at.text(ConsolePane))
        await at.until(lambda: "Reset" not in at.footer)
        assert {"Pause", "Step", "Leave the console"} <= set(at.footer)
        assert {key.key for key in at.app.query(FooterKey)} <= {"f1", "f2", "f5", "f6", "f7", "f8", "f9"}
        await at.pilot.press("q", "s", "r", "c", "space", "b")
        await at.until(lambda: ">qsrc b" in at.text(ConsolePane))
        assert at.phase is Phase.RUNNING
        assert not at.machine.checkpoints
        await at.press("f8")
        assert len(at.machine.checkpoints) == 1
        await at.press("f2", "c")
        assert len(at.machine.checkpoints) == 2
        await at.press("f2", "f5")
        await at.until(lambda: "hears this once it runs" in at.text(ConsolePane))
        await at.press("f2")
        await at.click("#console")
        await at.press("ctrl+right_square_bracket")
        assert at.app.focused.id == "vcpus"


async def test_a_flood_of_output_is_taken_in_bites_to_its_end(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(guests.FLOOD) as at:
        await at.press("space")
        await at.until(lambda: at.phase is Phase.EXITED)
        written = at.machine.board.serial_console.total
        assert written == guests.FLOOD_BYTES
        await at.until(lambda: at.app.desk._positions[0] == written)
        assert "xxxx" in at.text(ConsolePane)


async def test_the_debug_console_is_shown_and_can_be_switched(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(guests.PRINT_AND_SPIN) as at:
        await at.press("space")
        await at.until(lambda: "!" in at.text(ConsolePane))
        assert "debug" in at.text(ConsolePane)
        await at.press("o")
        assert "!" not in at.text(ConsolePane)
        await at.press("pageup", "pagedown", "o")
        assert "!" in at.text(ConsolePane)


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
async def test_keys_and_clicks_select_among_16_vcpus(desk, size) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT, vcpus=16, size=size) as at:
        assert "16 VCPUs" in at.text(VcpuList)
        await at.press("j", "down", "right_square_bracket")
        assert at.app.desk.selected == 3
        await at.press("k", "up", "left_square_bracket", "up")
        assert at.app.desk.selected == 15
        assert any("VCPU 15" in at.pane(n) for n in range(len(at.app.query_one(VcpuArea).panes)))
        await at.pilot.click(VcpuList, offset=(5, 2))
        assert at.app.desk.selected == 1
        await at.press("S")
        assert at.rip(0) == 0x7C02


async def test_a_click_on_a_pane_selects_it(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        await at.pilot.click(at.app.query_one(VcpuArea).panes[1], offset=(5, 3))
        assert at.app.desk.selected == 1


async def test_tab_goes_round_but_not_into_the_console(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT, size=(80, 24)) as at:
        seen = []
        for _ in range(3):
            await at.press("tab")
            seen.append(at.app.focused.id)
        assert seen == ["ledger", "snapshots", "vcpus"]
        await at.press("shift+tab")
        assert at.app.focused.id == "snapshots"
        await at.press("escape", "f3")
        assert at.app.query_one(LedgerPane).display
        assert not at.app.query_one(ConsolePane).display
        await at.press("f3", "f2")
        assert at.app.query_one(ConsolePane).display
        assert not at.app.query_one(LedgerPane).display


async def test_a_machine_that_was_switched_off_says_so_and_ends_without_error(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(guests.POWER_OFF, vcpus=1) as at:
        await at.press("space")
        await at.until(lambda: at.phase is Phase.EXITED)
        await at.until(lambda: "by switching the machine off" in at.text(Banner))
        assert "vmdeck will return 0." in at.text(Banner)
        await at.press("q")
        assert at.app.return_code == 0


@BOTH
async def test_a_triple_fault_is_explained_and_back_mends_it(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(guests.TRIPLE_FAULT_64, format="flat64", vcpus=1) as at:
        await at.press("c", "space")
        await at.until(lambda: "triple fault" in at.text(Banner))
        banner = at.text(Banner)
        assert "VCPU 0" in banner
        assert "r resets" in banner
        assert "b goes back to checkpoint 1" in banner
        assert "■ STOPPED" in at.text(StatusLine)
        await at.until(lambda: at.footer.get("Run") is False)
        assert at.footer["Step"] is False
        await at.press("f2")
        assert "F9 goes back to checkpoint 1" in at.text(Banner)
        await at.press("f2")
        assert "b goes back to checkpoint 1" in at.text(Banner)
        assert "shutdown" in at.pane()
        await at.press("b")
        assert "shutdown" not in at.pane()
        assert not at.app.query_one(Banner).content
        assert at.phase is Phase.PAUSED
        await at.until(lambda: at.footer.get("Run") is True)


@pytest.mark.kvm
@pytest.mark.parametrize("system", ["kvm"], indirect=True)
async def test_what_kvm_cannot_emulate_is_shown_with_bytes_and_disassembly(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(guests.NO_EMULATION_64, format="flat64", size=(80, 24)) as at:
        await at.press("space")
        await at.until(lambda: at.phase is Phase.STOPPED)
        await at.until(lambda: "0f 58 03" in at.text(Banner))
        assert "addps xmm0" in at.text(Banner)
        assert "0000000000007c05" in at.text(Banner)
        await at.press("r")
        assert at.phase is Phase.PAUSED
        assert not at.app.query_one(Banner).content


@BOTH
async def test_a_guest_that_exits_gives_the_exit_code(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(guests.print_and_exit(b"bye", 0x15)) as at:
        await at.press("space")
        await at.until(lambda: at.phase is Phase.EXITED)
        await at.until(lambda: "ended itself" in at.text(Banner))
        assert "● EXITED" in at.text(StatusLine)
        assert "vmdeck will return 43" in at.text(Banner)
        assert "bye" in at.text(ConsolePane)
        await at.press("q")
        assert at.app.return_value == 43


@pytest.mark.parametrize("keys", ["q", "ctrl+q", "ctrl+c", "f2 ctrl+q"])
async def test_every_way_to_quit(desk, keys) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        await at.press("space")
        await at.pilot.press(*keys.split())
        assert at.app.return_value == 0


async def test_an_error_is_shown_and_the_app_goes_on(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(guests.TRIPLE_FAULT_64, format="flat64") as at:
        await at.press("space")
        await at.until(lambda: at.phase is Phase.STOPPED)
        at.app.action_run()  # a key pressed before the footer knew
        await at.idle()
        assert "the guest has shut down (triple fault)" in at.text(StatusLine)
        await at.press("r")
        assert "shut down" not in at.text(StatusLine)


async def test_a_bug_in_an_operation_does_not_end_the_app(desk) -> None:  # type: ignore[no-untyped-def]
    def broken() -> None:
        raise ZeroDivisionError

    async with desk(COUNT) as at:
        at.app.operate("test", broken)
        await at.idle()
        assert "This is a bug in vmdeck" in at.text(StatusLine)
        await at.press("s")
        assert at.rip() == 0x7C02


async def test_too_small_a_terminal_says_so_and_recovers(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT, size=(80, 24)) as at:
        await at.pilot.resize_terminal(40, 10)
        await at.idle()
        await at.until(lambda: at.app.query_one("TooSmall").size == (40, 10))
        await at.press("space")
        assert at.phase is Phase.RUNNING
        await at.pilot.resize_terminal(100, 30)
        await at.idle()
        await at.until(lambda: not at.app.query_one("TooSmall").display)
        await at.until(lambda: "▶ RUNNING" in at.text(StatusLine))
        assert "VCPU 0" in at.pane()


async def find(at: Desk, command: str) -> None:
    """Have the open palette search for a command, until it's the first in the list."""
    await at.pilot.press(*command)
    palette = at.app.screen.query_one("CommandList")
    # The list is made anew while the search goes on: an Enter in between would choose nothing.
    await at.until(lambda: not any(worker.is_running for worker in at.app.workers if "palette" in worker.group))
    await at.until(lambda: palette.option_count > 0 and command in str(palette.get_option_at_index(0).prompt))


async def test_the_palette_has_every_command_that_works_now(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        titles = {command.title for command in at.app.get_system_commands(at.app.screen)}
        assert {"Run", "Step", "Step all", "Checkpoint", "Reset", "Help", "Quit"} <= titles
        assert not {"Pause", "Back"} & titles
        await at.press("ctrl+p", "pagedown", "pageup")
        await find(at, "Step")
        await at.press("enter", "enter")
        await at.until(lambda: at.rip() == 0x7C02)
        await at.press("ctrl+p")
        palette = at.app.screen
        palette.dismiss()
        palette.dismiss()
        await at.until(lambda: at.app.screen is at.app.desk)
        await at.press("s")


async def test_two_enters_at_once_do_what_was_chosen_once(desk) -> None:  # type: ignore[no-untyped-def]
    """As they come where the palette is slow to take the first one."""
    async with desk(COUNT) as at:
        await at.press("ctrl+p")
        await find(at, "Step")
        for _ in range(2):
            at.app.post_message(events.Key("enter", "\r"))
        await at.until(lambda: at.app.screen is at.app.desk)
        await at.idle()
        assert at.rip() == 0x7C02


def test_every_command_has_its_own_id_and_keys() -> None:
    ids = [command.id for command in COMMANDS]
    assert len(set(ids)) == len(ids)
    keys = [key for command in COMMANDS for key in command.keys.split(",")]
    twice = {key for key in keys if keys.count(key) > 1}
    assert twice == {"space", "f5", "escape"}, "run and pause, and what escape is for, are never there together"
