"""Code and memory at the workstation: what a person presses, on real machines."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from textual import events
from textual.widgets._footer import FooterKey

from app.memory_screen import MemoryScreen
from app.palette import Palette
from kvm.errors import CalledOff
from kvm.machine import Machine, Phase
from tests.app import guests
from tests.app.desk import BOTH, COUNT, Desk
from widgets.code_pane import HERE, CodePane
from widgets.memory_pane import HexRow, MemoryPane
from widgets.prompt import Prompt
from widgets.status import StatusLine
from widgets.vcpu_pane import MARK

SIZES = [(60, 16), (80, 24), (200, 60)]
STORE = bytes.fromhex("66 ff 06 00 20 66 ff 06 00 90 eb f4")
"""again: inc dword [0x2000]; inc dword [0x9000]; jmp again"""


class Memory:
    """The screen that ``m`` opens, as a person sees it."""

    def __init__(self, at: Desk) -> None:
        self.at = at

    @property
    def screen(self) -> MemoryScreen:
        assert isinstance(self.at.app.screen, MemoryScreen)
        return self.at.app.screen

    def code(self) -> str:
        return self._text(CodePane)

    def memory(self) -> str:
        return self._text(MemoryPane)

    def status(self) -> str:
        return self._text(StatusLine)

    def offered(self) -> set[str]:
        """The footer."""
        return {key.description for key in self.screen.query(FooterKey)}

    def said(self) -> str:
        return str(self.screen.query_one("#prompt-help").content)  # type: ignore[attr-defined]

    def _text(self, of: type[CodePane] | type[MemoryPane] | type[StatusLine]) -> str:
        pane = self.screen.query_one(of)
        return "\n".join(pane.line_text(y) for y in range(pane.size.height))

    async def go(self, text: str) -> None:
        await self.at.press("g")
        await self.type(text)
        await self.at.press("enter")

    async def type(self, text: str) -> None:
        for character in text:
            self.at.app.post_message(events.Key({" ": "space"}.get(character, character), character))
        await self.at.idle()


async def opened(at: Desk) -> Memory:
    await at.press("m")
    memory = Memory(at)
    await at.until(lambda: HERE in memory.code() and "page" in memory.memory())
    return memory


@pytest.mark.parametrize("size", SIZES)
async def test_m_opens_on_rip_and_the_stack_and_closes(desk, size) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT, size=size) as at:
        memory = await opened(at)
        assert "Code  VCPU 0 real mode, 16 bits" in memory.code()
        assert f"{HERE}00007c00  66 40 " in memory.code()
        assert "inc eax" in memory.code()
        assert "Memory  VCPU 0 linear" in memory.memory()
        assert "page 00007000 is physical 7000" in memory.memory()
        assert "00007c00  66 40 eb fc" in memory.memory()
        code, rows = memory.screen.query_one(CodePane).region, memory.screen.query_one(MemoryPane).region
        assert (code.y == rows.y) == (size[0] == 200), "side by side where there is room"
        assert code.height >= 5
        assert rows.height >= 6
        key = {60: "m", 80: "escape", 200: "q"}[size[0]]
        await at.press(key)
        assert at.app.screen is at.app.desk
        assert at.machine.ledger.records[-1].caller == "init", "nothing was synchronised"


@BOTH
async def test_it_is_live_while_the_guest_runs_and_stands_still_with_it(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(STORE) as at:
        memory = await opened(at)
        await memory.go("2000")
        row = f"00002000 {MARK}"
        assert row not in memory.memory()
        assert {"Run", "Go to", "Write", "Close"} <= memory.offered()
        await at.press("space")
        await at.until(lambda: row in memory.memory())
        assert at.phase is Phase.RUNNING
        await at.until(lambda: "Pause" in memory.offered() and "Run" not in memory.offered())
        before = memory.memory()
        await at.until(lambda: memory.memory() != before)
        await at.press("space")
        value = at.machine.read_memory(0x2000, 4)
        await at.until(lambda: f"u64 00000000{int.from_bytes(value, 'little'):08x}" in memory.memory())
        while at.rip() != 0x7C00:
            await at.press("s")
        await at.press("s")
        await at.until(lambda: row in memory.memory())
        await at.press("s")
        await at.until(lambda: row not in memory.memory())
        rip = f"{HERE}{at.rip():08x}"
        await at.until(lambda: rip in memory.code())
        callers = {record.caller for record in at.machine.ledger.records}
        assert callers <= {"init", "run", "step"}, "looking synchronises nothing"


async def test_nothing_is_read_while_it_is_not_shown(desk, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        memory = await opened(at)
        looked: list[int] = []
        monkeypatch.setattr("app.memory_look.MemoryLook.look", lambda self, *_: looked.append(1) or _frame())
        await at.until(lambda: bool(looked))
        await at.press("t")
        looked.clear()
        memory_screen = at.app.screen_stack[-2]
        assert isinstance(memory_screen, MemoryScreen)
        memory_screen.draw()
        assert not looked, "covered by the contract"
        await at.press("escape", "m")
        assert at.app.screen is at.app.desk
        looked.clear()
        await at.press("s", "s")
        assert not looked
        assert memory.at is at


def _frame() -> object:
    from widgets.memory_pane import MemoryFrame

    return MemoryFrame()


async def test_going_to_addresses(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT, size=(80, 24)) as at:
        memory = await opened(at)
        await at.press("g")
        assert "numbers are hexadecimal" in memory.said()
        await memory.type("8+cs.")
        await at.until(lambda: memory.said() == "8+cs.base  8+cs.limit  8+cs.selector")
        await at.press("ctrl+u")
        await memory.type("cs.base+esp")
        await at.press("enter")
        assert "'esp' is neither a number nor a register. There is rsp" in memory.said()
        assert memory.screen.query_one(Prompt).display
        await at.press("ctrl+u")
        await memory.type("phys:f0000000")
        await at.until(lambda: memory.said() == "physical f0000000: no memory")
        await at.press("enter")
        assert "Memory  physical" in memory.memory()
        assert "f0000000  no memory" in memory.memory()
        await memory.go("lin:rip+1")
        await at.until(lambda: "follows rip+1" in memory.memory())
        await at.press("s")
        await at.until(lambda: "00007c03  u64" in memory.memory())
        await at.press("right")
        await at.until(lambda: "00007c04  u64" in memory.memory() and "home follows rip+1" in memory.memory())
        await at.press("tab")
        await memory.go("7d00")
        assert " 00007d00  00 00 " in memory.code()
        await at.press("g")
        await memory.type("phys:0")
        await at.press("enter")
        assert "Tab goes to memory" in memory.said()
        await at.press("escape", "home")
        await at.until(lambda: f"{HERE}00007c02" in memory.code())


async def test_p_turns_to_physical_and_back(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT, format="flat64") as at:
        memory = await opened(at)
        await memory.go("7c00")
        await at.press("p")
        await at.until(lambda: "Memory  physical" in memory.memory())
        await at.press("p")
        await at.until(lambda: "Memory  VCPU 0 linear" in memory.memory())
        await memory.go("200000000")
        await at.until(lambda: "page 0000000200000000: not mapped" in memory.memory())
        await at.press("p")
        assert "isn't mapped by VCPU 0's page tables" in [str(note.message) for note in at.app._notifications][-1]
        assert "VCPU 0 linear" in memory.memory()


@BOTH
async def test_bytes_are_written_and_the_guest_pauses_for_it(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT, size=(80, 24)) as at:
        memory = await opened(at)
        await memory.go("2001")
        await at.press("space", "e")
        await memory.type('"ok')
        await at.until(lambda: 'a " is missing' in memory.said())
        await at.press("enter")
        assert at.phase is Phase.RUNNING, "nothing is done"
        await memory.type('" 90')
        await at.until(lambda: memory.said() == "Enter pauses the guest; 00 00 00 → 6f 6b 90")
        await at.press("enter")
        assert at.phase is Phase.PAUSED
        assert at.machine.read_memory(0x2000, 5) == b"\0ok\x90\0"
        assert "3 bytes written at linear 2001; was 00 00 00" in memory.status()
        await at.until(lambda: f"00002000  00{MARK}6f{MARK}6b{MARK}90 00" in memory.memory())
        await memory.go("phys:f0000000")
        await at.press("e")
        await memory.type("90")
        await at.until(lambda: "f0000000 can't be written: it isn't mapped, or there is no memory" in memory.said())
        await at.press("enter")
        await at.until(lambda: "there is no memory" in memory.status())


@BOTH
async def test_code_is_patched_where_the_cursor_is_in_it(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        memory = await opened(at)
        await at.press("tab", "down", "e")
        await memory.type("b0 07 e6 f4")  # mov al, 7; out 0xf4, al
        await at.press("enter")
        await at.until(lambda: "out 0xf4, al" in memory.code())
        await at.press("space")
        await at.until(lambda: at.phase is Phase.EXITED)
        assert at.machine.status.code == 7
        assert "the guest ended itself" in memory.status()


async def test_a_linear_write_says_where_it_went_and_what_is_in_the_way(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT, format="flat64") as at:
        memory = await opened(at)
        at.machine.write_memory(0x1000 + 8 * 1, (0x2003).to_bytes(8, "little"))  # 512 GiB on is the beginning again
        await memory.go("8000007ffe")
        await at.press("e")
        await memory.type("aabb ccdd")
        await at.press("enter")
        assert "4 bytes written at linear 8000007ffe (physical 7ffe, 8000)" in memory.screen._station.desk.news
        assert at.machine.read_memory(0x7FFE, 4) == b"\xaa\xbb\xcc\xdd"
        await memory.go("ffff900000000000")
        await at.press("e")
        await memory.type("aa")
        await at.press("enter")
        await at.until(lambda: "Can't write at linear 0xffff900000000000" in memory.screen._station.desk.error)


async def test_bytes_and_text_are_found(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT, size=(80, 24)) as at:
        for address in (0x3000, 0x20_0123):
            at.machine.write_memory(address, b"vmdeck!")
        memory = await opened(at)
        await at.press("n")
        assert "physical" not in memory.memory().splitlines()[0], "there is nothing to find again"
        await memory.go("1000")
        await at.press("space", "slash")
        await memory.type('"vmdeck')
        await at.press("enter")
        assert 'a " is missing' in memory.said()
        await memory.type('" 21')
        await at.until(lambda: memory.said() == "finds 76 6d 64 65 63 6b 21, from the cursor on")
        await at.press("enter")
        await at.until(lambda: "physical" in memory.memory() and "00003000  u64" in memory.memory())
        await at.press("n")
        await at.until(lambda: "00200123  u64" in memory.memory())
        assert at.phase is Phase.RUNNING
        await at.press("n")
        await at.until(lambda: "isn't in memory from physical 200124 on" in memory.status())
        assert "00200123  u64" in memory.memory()


async def test_a_long_search_says_how_far_it_is_and_esc_calls_it_off(desk, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    begun = threading.Event()

    def slow(
        self: Machine, data: bytes, start: int, progress: Callable[[int, int], None], cancel: threading.Event
    ) -> None:
        """As in memory that takes an hour."""
        progress(43, 100)
        begun.set()
        assert cancel.wait(5)
        raise CalledOff("The search was called off.")

    monkeypatch.setattr(Machine, "find_memory", slow)
    async with desk(COUNT) as at:
        memory = await opened(at)
        await at.press("slash")
        await memory.type("90")
        await at.pilot.press("enter")
        await at.until(begun.is_set)
        (job,) = at.app.operations.asides or [at.app.operations.current]
        job._began -= 1  # as if it had taken a second
        await at.until(lambda: "find 43 %  esc calls it off" in memory.status())
        await at.pilot.press("escape")
        await at.idle()
        assert isinstance(at.app.screen, MemoryScreen), "the first Esc is for the search"
        await at.until(lambda: "43 %" not in memory.status())
        await at.press("escape")
        assert at.app.screen is at.app.desk


async def test_the_machine_s_keys_work_here_and_other_vcpus_are_selected(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT, vcpus=3) as at:
        memory = await opened(at)
        await at.press("c", "s", "s", "s", "b")
        await at.until(lambda: f"{HERE}00007c00" in memory.code())
        await at.press("right_square_bracket")
        await at.until(lambda: "VCPU 1 " in memory.code() and "VCPU 1 linear" in memory.memory())
        assert f"{HERE}fffffff0" in memory.code()
        await at.press("left_square_bracket", "left_square_bracket")
        await at.until(lambda: "VCPU 2 " in memory.code())
        assert at.app.desk.selected == 2


async def test_where_a_person_looked_is_there_again(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        memory = await opened(at)
        await memory.go("phys:2000")
        await at.press("m", "s", "m")
        await at.until(lambda: "Memory  physical" in memory.memory() and "00002000  u64" in memory.memory())
        await at.until(lambda: f"{HERE}00007c02" in memory.code())


@pytest.mark.parametrize("keys", ["grsp\rs", "e90\rs", "/66\rs"])
async def test_keys_that_come_at_once_go_where_they_belong(desk, keys) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        memory = Memory(at)
        for character in f"m{keys}":
            at.app.post_message(events.Key({"\r": "enter", "/": "slash"}.get(character, character), character))
        await at.until(lambda: at.rip() == (0x7C01 if keys[0] == "e" else 0x7C02))
        await at.idle()
        assert [record.caller for record in at.machine.ledger.records].count("reset") == 0
        assert not memory.screen.query_one(Prompt).display
        assert (at.machine.read_memory(0x7C00, 1) == b"\x90") == (keys[0] == "e")


async def test_its_prompt_is_there_as_soon_as_the_screen_is(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        await at.app.run_action("app.memory")
        await at.app.run_action("screen.find")
        await at.idle()
        assert Memory(at).screen.query_one(Prompt).input.has_focus


async def test_all_of_it_is_in_the_palette_here_and_nothing_that_only_the_desk_can(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        memory = await opened(at)
        names = {command.title for command in at.app.get_system_commands(at.app.screen)}
        assert {"Go to", "Physical", "Write", "Find", "Follow", "Other pane", "Close", "Run", "Step", "Edit"} <= names
        assert not {"Zoom", "Type", "Ledger", "Snapshots", "Other output"} & names
        assert "Memory" in {command.title for command in at.app.get_system_commands(at.app.desk)}
        assert "Go to" not in {command.title for command in at.app.get_system_commands(at.app.desk)}
        await at.press("ctrl+p")
        assert isinstance(at.app.screen, Palette)
        await at.pilot.press(*"edit")
        await at.until(lambda: at.app.screen.query_one("CommandList").option_count == 1)  # type: ignore[attr-defined]
        await at.pilot.press("enter")
        await at.until(lambda: isinstance(at.app.screen, MemoryScreen) and memory.screen.query_one(Prompt).display)
        await memory.type("rax=5")
        await at.press("enter")
        assert at.machine.view(0).dirty


async def test_clicks_and_the_wheel(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT, size=(120, 40)) as at:
        memory = await opened(at)
        pane = memory.screen.query_one(MemoryPane)
        y, row = next((y, row) for y, row in enumerate(pane.frame.rows) if isinstance(row, HexRow))
        await at.pilot.click(MemoryPane, offset=(11 + 3 * 5, y + 1))
        await at.until(lambda: pane.frame.cursor == row.address + 5)
        await at.pilot.click(CodePane, offset=(5, 3))
        code = memory.screen.query_one(CodePane)
        await at.until(lambda: code.has_focus and code.frame.cursor == code.frame.rows[2].address)
        code.post_message(_wheel(code))
        await at.until(lambda: code.frame.cursor == code.frame.rows[5].address)


def _wheel(pane: CodePane) -> events.MouseScrollDown:
    return events.MouseScrollDown(pane, 5, 5, 0, 1, 0, False, False, False)


async def test_a_terminal_that_gets_too_small_shows_nothing_else(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(COUNT) as at:
        await opened(at)
        await at.pilot.resize_terminal(40, 10)
        await at.until(lambda: at.app.screen is at.app.desk)
        await at.press("m")
        assert at.app.screen is at.app.desk


async def test_after_a_triple_fault_there_is_memory_to_look_at(desk) -> None:  # type: ignore[no-untyped-def]
    async with desk(guests.TRIPLE_FAULT_64, format="flat64", vcpus=1) as at:
        await at.press("space")
        await at.until(lambda: at.phase is Phase.STOPPED)
        memory = await opened(at)
        assert "shutdown" in memory.status(), "no banner says it here"
        await memory.go("idt.base")
        assert "follows idt.base" in memory.memory()
