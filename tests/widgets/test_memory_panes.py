"""The panes of memory and of code: what they draw at every width, what a click means."""

from __future__ import annotations

import pytest

from tests.widgets.hosts import Host, text
from widgets.code_pane import HERE, CodeFrame, CodeLine, CodePane
from widgets.line_pane import width_of
from widgets.memory_pane import Heading, HexRow, MemoryFrame, MemoryPane, row_bytes
from widgets.vcpu_pane import MARK

GUEST = bytes(range(0x18, 0x28))
"""ESC is among them."""


def frame(width: int, digits: int = 8, cursor: int = 0x1001) -> MemoryFrame:
    count = row_bytes(width, digits)
    rows = (
        Heading("page 00001000 is physical 9000"),
        HexRow(0x1000, GUEST[:count], frozenset({1, 7})),
        Heading("page 00002000: not mapped", bad=True),
        HexRow(0x2000, why="not mapped"),
    )
    return MemoryFrame("VCPU 0 linear", ("00001001", "follows rsp"), "registers 3 s old", rows, cursor, digits)


@pytest.mark.parametrize(("width", "digits", "count"), [(60, 8, 8), (76, 8, 16), (80, 16, 8), (84, 16, 16)])
async def test_as_many_bytes_stand_in_a_row_as_fit(width: int, digits: int, count: int) -> None:
    assert row_bytes(width, digits) == count
    pane = MemoryPane()
    async with Host(pane).run_test(size=(width, 10)) as pilot:
        pane.show(frame(width, digits))
        await pilot.pause()
        title, heading, row, _, missing = (pane.line_text(y) for y in range(5))
        assert title.startswith(" Memory  VCPU 0 linear  registers 3 s old")
        assert heading == " page 00001000 is physical 9000"
        shown = f"{0x1000:0{digits}x}  18{MARK}19 1a 1b 1c 1d 1e{MARK}1f"
        assert row.startswith(f" {shown}")
        assert row.endswith("  " + "........ !\"#$%&'"[:count])
        assert missing.split() == [f"{0x2000:0{digits}x}", "not", "mapped"]
        assert all(width_of(line) <= width for line in pane.lines(width, 10))


async def test_guest_bytes_do_not_reach_the_terminal_as_they_are() -> None:
    pane = MemoryPane()
    async with Host(pane).run_test(size=(90, 20)) as pilot:
        pane.show(MemoryFrame(rows=tuple(HexRow(at, bytes(range(at, at + 16))) for at in range(0, 256, 16))))
        await pilot.pause()
        drawn = "".join(pane.line_text(y) for y in range(20)).replace(MARK, "")
        assert drawn.isascii()
        assert drawn.isprintable()


async def test_a_click_points_at_a_byte_in_both_columns() -> None:
    pane = MemoryPane()
    host = Host(pane)
    async with host.run_test(size=(80, 10)) as pilot:
        pane.show(frame(80))
        await pilot.pause()
        row = pane.line_text(2)
        places = (row.index("1d"), row.index("1d") + 1, row.index("27"), row.index("#"), 0, 79)
        for x in places:
            await pilot.click(offset=(x, 2))
        await pilot.click(offset=(11, 4))
        for y in (0, 1, 7):
            await pilot.click(offset=(11, y))
        assert host.heard == [0x1005, 0x1005, 0x100F, 0x100B, 0x1000, 0x100F, 0x2000]


async def test_the_cursor_is_seen_without_colours() -> None:
    pane = MemoryPane()
    async with Host(pane).run_test(size=(80, 10)) as pilot:
        pane.show(frame(80))
        await pilot.pause()
        assert [part for part, style in pane._lines[2] if "spot" in style] == ["19", "."]
        pane.show(frame(80, cursor=0x2008))
        await pilot.pause()
        assert [part for line in pane._lines for part, style in line if "spot" in style] == ["not mapped"]


CODE = CodeFrame(
    "VCPU 1 real mode, 16 bits", ("follows rip",), "",
    (
        CodeLine(0xFE05B, b"\xe9\x10\x00", "jmp 0xe06e", "f000:e05b"),
        CodeLine(0xFE05E, bytes(range(0x40, 0x4F)), "long", "f000:e05e"),
        CodeLine(0xFF000, b"", "not mapped"),
    ),
    0xFE05B, 0xFE05E, 8,
)  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120])
async def test_code(width: int) -> None:
    pane = CodePane()
    host = Host(pane)
    async with host.run_test(size=(width, 8)) as pilot:
        pane.show(CODE)
        await pilot.pause()
        title, jump, long, missing = text(pane.lines(width, 8))
        assert title.startswith(" Code  VCPU 1 real mode, 16 bits")
        assert jump.startswith(f"{HERE}000fe05b f000:e05b  e9 10 00 ")
        assert jump.endswith("jmp 0xe06e")
        shown = "40 41 42 43 44 45 46" + " 47 48 49" * (width == 120)
        assert long == f" 000fe05e f000:e05e  {shown} …  long", "that bytes are missing is said"
        assert missing == " 000ff000 not mapped"
        assert all(width_of(line) <= width for line in pane.lines(width, 8))
        await pilot.click(offset=(3, 3))
        await pilot.click(offset=(3, 0))
        await pilot.click(offset=(3, 6))
        assert host.heard == [0xFF000]
