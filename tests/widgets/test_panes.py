"""Console, ledger, checkpoints, status: what a person sees of them and what their keys do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from textual import events

from tests.widgets.hosts import Host
from widgets.console import ConsolePane, guest_bytes
from widgets.ledger import LedgerEntry, LedgerPane, duration
from widgets.line_pane import LinePane, bar, cut
from widgets.lines import LinesPane
from widgets.snapshots import SnapshotEntry, SnapshotsPane, ago, amount
from widgets.status import Banner, StatusLine, StatusValues, TooSmall


def body(pane: LinePane) -> str:
    return "\n".join(pane.line_text(y) for y in range(pane.size.height))


@pytest.mark.parametrize(
    ("key", "character", "data"),
    [
        ("a", "a", b"a"),
        ("A", "A", b"A"),
        ("é", "é", "é".encode()),
        ("space", " ", b" "),
        ("enter", "\r", b"\r"),
        ("backspace", "\x7f", b"\x7f"),
        ("tab", "\t", b"\t"),
        ("escape", "\x1b", b"\x1b"),
        ("up", None, b"\x1b[A"),
        ("delete", "\x7f", b"\x1b[3~"),
        ("ctrl+a", "\x01", b"\x01"),
        ("ctrl+c", "\x03", b"\x03"),
        ("ctrl+d", "\x04", b"\x04"),
        ("ctrl+q", "\x11", None),
        ("ctrl+p", "\x10", None),
        ("f2", None, None),
        ("f9", None, None),
        ("pageup", None, None),
        ("ctrl+right_square_bracket", "\x1d", None),
    ],
)
def test_keys_as_a_vt100_sends_them(key: str, character: str | None, data: bytes | None) -> None:
    assert guest_bytes(key, character) == data


async def test_while_focused_the_console_types_at_the_guest() -> None:
    pane = ConsolePane(("serial", "debug"))
    host = Host(pane)
    async with host.run_test(size=(80, 10)) as pilot:
        await pilot.press("q", "enter", "escape", "ctrl+c", "up")
        assert host.heard == [b"q", b"\r", b"\x1b", b"\x03", b"\x1b[A"]
        assert "typing goes to the guest, F2 leaves" in pane.line_text(0)
        host.heard.clear()
        pane.post_message(events.Paste("two\nlines"))
        await pilot.pause()
        assert host.heard == [b"two\rlines"]
        host.heard.clear()
        for leaving in ("f2", "ctrl+right_square_bracket"):
            await pilot.press(leaving, "q")
            assert host.heard == ["left"]
            host.heard.clear()
            pane.focus()
            await pilot.pause()


async def test_page_up_scrolls_back_and_what_is_read_stays_put() -> None:
    pane = ConsolePane(("serial",))
    async with Host(pane).run_test(size=(40, 6)) as pilot:
        pane.write(0, b"\n".join(b"line %d" % n for n in range(30)))
        await pilot.press("pageup")
        before = [pane.line_text(y) for y in range(1, 6)]
        assert before[0].strip() == "line 21"
        pane.write(0, b"\nmore\nand more")
        assert [pane.line_text(y) for y in range(1, 6)] == before
        assert "lines back" in pane.line_text(0)
        await pilot.press("pagedown", "pagedown", "pagedown")
        assert "and more" in body(pane)


async def test_the_source_that_speaks_is_shown_until_a_person_chooses() -> None:
    pane = ConsolePane(("serial", "debug"))
    async with Host(pane).run_test(size=(80, 6)):
        pane.write(1, b"SeaBIOS")
        assert "SeaBIOS" in body(pane)
        pane.write(0, b"GRUB")
        assert "GRUB" in body(pane)
        pane.write(1, b" again")
        assert "debug +6" in pane.line_text(0)
        pane.action_next_source()
        assert "SeaBIOS again" in body(pane)
        pane.write(0, b"!")
        assert "serial +1" in pane.line_text(0)


async def test_no_escape_of_the_guest_is_in_what_is_drawn() -> None:
    pane = ConsolePane(("serial",))
    async with Host(pane).run_test(size=(40, 6)) as pilot:
        pane.write(0, b"\x1b]52;c;aGk=\x07\x1b[?1049h\x1b[31mred\x1b[0m \x9b5n [b]no markup[/b]")
        await pilot.pause()
        drawn = "".join(segment.text for y in range(6) for segment in pane.render_line(y))
        assert drawn.isprintable()
        assert "red" in drawn
        assert "[b]no markup[/b]" in drawn


def entry(number: int) -> LedgerEntry:
    return LedgerEntry(
        number, "12:00:00.000", f"hook{number}", "RESET", "reset", 4, 44, 412.0, 35.0, "wrote 2: regs sregs"
    )


async def test_the_ledger_has_the_newest_first_and_stands_still_while_scrolled() -> None:
    pane = LedgerPane()
    async with Host(pane).run_test(size=(120, 6)) as pilot:
        assert "Nothing moved" in pane.line_text(1)
        pane.show([entry(n) for n in range(20, 0, -1)], 20)
        assert pane.line_text(1).split()[:8] == ["12:00:00.000", "hook20", "RESET", "4×", "44", "ioctls", "412", "µs"]
        assert "skew  35 µs reset wrote 2: regs sregs" in pane.line_text(1)
        await pilot.press("down", "down")
        assert "hook18" in pane.line_text(1)
        pane.show([entry(n) for n in range(21, 1, -1)], 21)
        assert "hook18" in pane.line_text(1)
        await pilot.press("home")
        assert "hook21" in pane.line_text(1)
        await pilot.press("pagedown", "pagedown", "pagedown")
        assert "hook2 " in pane.line_text(1)
        await pilot.press("pageup", "pageup", "pageup")
        assert "hook21" in pane.line_text(1)
        # Rows that stand for several records leave gaps between the numbers.
        pane.show([entry(n) for n in (33, 30, 29)], 37)
        await pilot.press("down")
        pane.show([entry(n) for n in (38, 33, 30, 29)], 38)
        assert "hook30" in pane.line_text(1)


@pytest.mark.parametrize(
    ("us", "text"),
    [(0.4, "  0 µs"), (412, "412 µs"), (1300, "1.3 ms"), (99_000, "99.0 ms"), (2.1e6, " 2.1 s")],
)
def test_durations(us: float, text: str) -> None:
    assert duration(us) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, " 0 s"), (59, "59 s"), (60, " 1 m"), (7300, " 2 h")])
def test_ages(seconds: int, text: str) -> None:
    assert ago(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "   0 K"), (1, "   1 K"), (44 << 10, "  44 K"), (1000 << 10, " 1.0 M"), (31 << 20, "31.0 M"),
     (400 << 20, " 400 M"), (8 << 30, " 8.0 G"), (1 << 60, "  lots")],
)  # fmt: skip
def test_amounts_take_six_cells(size: int, text: str) -> None:
    assert amount(size) == text


def kept(number: int, name: str = "", **more: object) -> SnapshotEntry:
    given = {"name": name or f"checkpoint {number}", "age": 5, "size": 40960, "rips": (0x1000 + number,), **more}
    return SnapshotEntry(number, str(number), **given)  # type: ignore[arg-type]


async def test_snapshots_are_chosen_with_cursor_and_keys() -> None:
    pane = SnapshotsPane()
    host = Host(pane)
    async with host.run_test(size=(80, 6)) as pilot:
        await pilot.press("enter", "delete", "d", "m")
        assert host.heard == []
        assert "None yet" in body(pane)
        three = [kept(n, branch="│") for n in (1, 2, 3)]
        pane.show(three)
        for key in ("enter", "up", "enter", "k", "k", "delete", "j", "down", "x", "n", "N", "d"):
            await pilot.press(key)
        assert host.heard == [
            (what, number, None)
            for what, number in (("restore", 3), ("restore", 2), ("forget", 1), ("forget", 3), ("name", 3), ("note", 3),
                                 ("compare", 3))
        ]  # fmt: skip
        host.heard.clear()
        await pilot.press("up")
        pane.show([replace(each, age=6) for each in three if each.key != 3])
        await pilot.press("enter")
        assert host.heard == [("restore", 2, None)]
        # A branch off 1 stands above 2, and the cursor goes to what is new.
        pane.show([three[0], kept(4, "new", branch="├"), three[1]])
        await pilot.press("enter")
        assert host.heard[-1] == ("restore", 4, None)
        await pilot.click(SnapshotsPane, offset=(10, 4))
        await pilot.press("enter")
        assert host.heard[-1] == ("restore", 2, None)
        await pilot.click(SnapshotsPane, offset=(10, 2), times=2)
        assert host.heard[-1] == ("restore", 1, None)


async def test_a_marked_snapshot_is_what_others_are_compared_with() -> None:
    pane = SnapshotsPane()
    host = Host(pane)
    async with host.run_test(size=(80, 6)) as pilot:
        pane.show([kept(1), replace(kept(2), key="/tmp/file", sign="▤")])
        await pilot.press("m", "d", "up", "d")
        assert host.heard == [("compare", "/tmp/file", None), ("compare", 1, "/tmp/file")]
        assert "◆" in pane.line_text(3)
        await pilot.press("down", "m", "up", "d")
        assert host.heard[-1] == ("compare", 1, None)
        await pilot.press("m")
        pane.show([replace(kept(2), key="/tmp/file")])
        await pilot.press("d")
        assert host.heard[-1] == ("compare", "/tmp/file", None), "the marked one is gone"


@pytest.mark.parametrize("width", [38, 60, 120])
async def test_a_snapshot_says_name_note_age_and_size_in_columns(width: int) -> None:
    pane = SnapshotsPane()
    async with Host(pane).run_test(size=(width, 9)):
        long = "a name that is far too long for so narrow a pane" * 2
        pane.show(
            [
                kept(1, "boot", age=7300, size=500 << 20, rips=(0xFFF0,), branch="┌", note="before paging is on"),
                kept(20, long, size=4096, rips=tuple(range(0x100000, 0x100010)), branch="╵", current=True),
            ]
        )
        heading, first, second, last = (pane.line_text(y) for y in (1, 2, 3, 8))
        assert first.startswith("  ┌ 1 boot")
        assert second.startswith("▸●╵ 20 a name")
        assert "…" in second
        assert {len(heading), len(first), len(second)} == {width}
        assert first.index("2 h") == second.index("5 s")
        assert first.index("500 M") == second.index("  4 K")
        assert ("before paging is on" in first) == (width == 120)
        assert ("000000000000fff0" in first) == (width >= 60)
        assert "⏎ back" in pane.line_text(0)
        assert last.startswith(" RIP  0 100000  1 100001")
        assert last.endswith(" …")
        assert len(last) <= width


async def test_names_can_hold_no_escape_sequence() -> None:
    pane = SnapshotsPane()
    async with Host(pane).run_test(size=(80, 6)):
        pane.show([kept(1, "\x1b]0;evil\x07")])
        assert all(segment.text.isprintable() for y in range(6) for segment in pane.render_line(y))


async def test_lines_scroll_to_their_ends_and_no_further() -> None:
    pane = LinesPane("Many", [("esc", "close")])
    async with Host(pane).run_test(size=(60, 11)) as pilot:
        pane.show([((f"line {number}", "text"),) for number in range(1, 41)])
        pane.focus()
        assert "1–10 of 40" in pane.line_text(0)
        for keys, first in (
            (["up"], 1),
            (["j", "down"], 3),
            (["pagedown"], 12),
            (["end"], 31),
            (["k"], 30),
            (["home"], 1),
        ):
            await pilot.press(*keys)
            assert pane.line_text(1) == f"line {first}"
        await pilot.press("G")
        pane.show([(("one", "text"),)], "One")
        assert (pane.line_text(1), "One" in pane.line_text(0), "of" in pane.line_text(0)) == ("one", True, False)


async def test_the_status_line_says_phase_error_and_facts() -> None:
    line = StatusLine()
    values = StatusValues("running", "", ("demo.elf", "kvm", "4 VCPUs", "128 MiB"))
    async with Host(line).run_test(size=(80, 1)):
        line.show(values)
        assert line.line_text(0).split("  ")[0].strip() == "▶ RUNNING"
        assert "demo.elf  kvm  4 VCPUs  128 MiB" in line.line_text(0)
        line.show(replace(values, phase="paused", busy="checkpoint …"))
        assert "‖ PAUSED  checkpoint …" in line.line_text(0)
        line.show(replace(values, phase="stopped", error="VCPU 3 did not answer " * 5))
        assert "■ STOPPED  VCPU 3 did not answer" in line.line_text(0)
        assert len(line.line_text(0)) <= 80


async def test_the_banner_takes_the_rows_that_it_needs() -> None:
    banner = Banner()
    async with Host(banner).run_test(size=(80, 10)) as pilot:
        banner.show([(("one", ""),), (("two", ""),)])
        await pilot.pause()
        assert (banner.size.height, banner.line_text(1)) == (2, "two")
        banner.show(())
        await pilot.pause()
        assert not banner.display


async def test_too_small_says_what_is_needed() -> None:
    notice = TooSmall(60, 16)
    async with Host(notice).run_test(size=(30, 8)):
        assert "vmdeck needs 60×16" in body(notice)
        assert "30×8" in body(notice)


def test_a_bar_drops_the_last_groups_where_there_is_no_room() -> None:
    def drawn(width: int) -> str:
        return "".join(text for text, _ in bar([("left", "")], [[("first", "")], [("second", "")]], width))

    assert drawn(30).split() == ["left", "first", "second"]
    assert drawn(16).split() == ["left", "first"]
    assert drawn(8).split() == ["left"]
    assert len(drawn(30)) == 30


def test_cut_counts_cells() -> None:
    assert (cut("abcdef", 4), cut("中文字", 5), cut("ab", 2), cut("ab", 0)) == ("abc…", "中文…", "ab", "")
