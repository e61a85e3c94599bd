"""What is looked at in code and memory: what moves the window, and what doesn't; what changed; what can't be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app.address import parse
from app.code_look import CodeLook
from app.eyes import Eyes, eyes_of
from app.memory_look import MemoryLook
from app.seen import HOLD_NS, KEPT, Seen
from kvm.backends.software.system import SoftwareSystem
from kvm.errors import ConfigError
from kvm.machine import Machine
from tests.kvm.machines import ORIGIN, ORIGIN_32, build
from tests.kvm.test_memory_access import TABLES, put, remap
from widgets.memory_pane import Heading, HexRow

NOPS = bytes.fromhex("90 66 90 0f 1f 40 00") * 40
"""nop; 2 bytes: nop; 4 bytes: nop."""


def eyes(machine: Machine) -> Eyes:
    found = eyes_of(machine, 0)
    assert found is not None
    return found


def listing(look: CodeLook, machine: Machine, height: int = 8) -> list[int]:
    return [line.address for line in look.look(eyes(machine), 80, height).rows]


def rows(look: MemoryLook, machine: Machine, height: int = 8) -> list[str]:
    frame = look.look(eyes(machine), 80, height)
    return [row.text if isinstance(row, Heading) else f"{row.address:x} {row.why}".strip() for row in frame.rows]


# Code


def test_a_listing_stays_while_rip_moves_through_it(tmp_path: Path) -> None:
    with build(SoftwareSystem(), tmp_path, NOPS) as machine:
        look = CodeLook()
        first = listing(look, machine)
        assert first == [ORIGIN + at for at in (0, 1, 3, 7, 8, 10, 14, 15)]
        seen = []
        for _ in range(6):
            machine.step(0)
            frame = look.look(eyes(machine), 80, 8)
            assert frame.cursor == frame.rip
            seen.append(frame.rip)
            assert [line.address for line in frame.rows] == first
        assert seen == first[1:7]
        machine.step(0)
        assert listing(look, machine)[:3] == first[5:8], "RIP is near its end: it moves on, what leads there in view"
        machine.edit(0, "rip", 0x1800)
        assert listing(look, machine)[0] == 0x1800, "it has jumped away"
        machine.edit(0, "rip", 0x1801)
        assert listing(look, machine)[0] == 0x1801, "into the middle of an instruction"


def test_a_listing_is_scrolled_by_instructions_also_upwards(tmp_path: Path) -> None:
    with build(SoftwareSystem(), tmp_path, NOPS) as machine:
        look = CodeLook()
        first = listing(look, machine)
        look.move("row", 7, eyes(machine))
        assert (look.cursor, listing(look, machine)) == (first[-1], first)
        look.move("row", 1, eyes(machine))
        assert listing(look, machine)[:-1] == first[1:]
        assert look.follows is None
        look.move("page", 1, eyes(machine))
        later = listing(look, machine)
        assert later[0] == ORIGIN + 17, "the last line is the first one now"
        look.move("page", -1, eyes(machine))
        assert listing(look, machine)[:-1] == first[1:]
        look.move("row", -1000, eyes(machine))
        assert listing(look, machine)[0] == look.cursor < ORIGIN
        look.follow_again(eyes(machine))
        assert look.look(eyes(machine), 80, 8).cursor == ORIGIN


def test_a_listing_ends_with_the_address_space_and_begins_with_it(tmp_path: Path) -> None:
    with build(SoftwareSystem(), tmp_path, NOPS, format="flat64") as machine:
        look = CodeLook()
        look.go(parse("1"), eyes(machine))
        look.move("row", -5, eyes(machine))
        assert listing(look, machine)[0] == look.cursor == 0
        look.go(parse("-1"), eyes(machine))
        look.move("page", 1, eyes(machine))
        look.move("row", 3, eyes(machine))
        assert listing(look, machine) == [look.cursor] == [2**64 - 1]
    with build(SoftwareSystem(), tmp_path, NOPS) as machine:
        look.go(parse("-1"), eyes(machine))
        assert listing(look, machine) == [2**32 - 1]


@pytest.mark.parametrize("moves", [["row"], ["page"], ["page", "row", "byte"]])
def test_an_address_that_a_vcpu_s_mode_does_not_have_is_said_to_be_none_and_kept(
    tmp_path: Path, moves: list[str]
) -> None:
    with build(SoftwareSystem(), tmp_path, NOPS, vcpus=2, format="flat64") as machine:
        code, memory = CodeLook(), MemoryLook()
        real = eyes_of(machine, 1)
        assert real is not None
        for look in (code, memory):
            look.go(parse("ffff800000000000"), eyes(machine))
        for by in (1, -1):
            for unit in moves:
                code.move(unit, by, real)
                memory.move(unit, by)
            assert code.look(real, 80, 8).rows[0].text == "not an address: VCPU in a 32-bit mode"
            assert "not an address" in memory.look(real, 80, 8).rows[0].text  # type: ignore[union-attr]
        assert memory.cursor >> 40
        assert listing(code, machine)[0] >> 40


def test_in_a_segment_targets_are_offsets_and_lines_say_both(tmp_path: Path) -> None:
    with build(SoftwareSystem(), tmp_path, NOPS) as machine:
        machine.write_memory(0x2_3450, bytes.fromhex("eb fe"))
        for register, value in (("cs.selector", 0x2000), ("cs.base", 0x20000), ("rip", 0x3450)):
            machine.edit(0, register, value)
        frame = CodeLook().look(eyes(machine), 80, 8)
        line = frame.rows[0]
        assert (line.address, line.segmented, line.text) == (0x2_3450, "2000:3450", "jmp 0x3450")
        assert frame.rip == 0x2_3450
        assert frame.where == "VCPU 0 real mode, 16 bits"


def test_code_that_cannot_be_read_is_said_to_be_so_and_gone_past(tmp_path: Path) -> None:
    with build(SoftwareSystem(), tmp_path, NOPS, format="flat64") as machine:
        remap(machine)
        machine.write_memory(0x30_2FFD, bytes.fromhex("90 48 b8"))  # nop; movabs rax, what isn't there
        look = CodeLook()
        look.go(parse("1ffd"), eyes(machine))
        lines = look.look(eyes(machine), 80, 6).rows
        assert [(line.address, line.text) for line in lines[:5]] == [
            (0x1FFD, "nop"), (0x1FFE, "(bad)"), (0x1FFF, "(bad)"), (0x2000, "not mapped"), (0x3000, "no memory")
        ]  # fmt: skip
        assert lines[5].address == 0x4000
        machine.write_memory(0x30_1000, b"\x90" * 8)
        look = CodeLook()
        look.go(parse("4002"), eyes(machine))
        seen = []
        for _ in range(4):
            look.move("row", -1, eyes(machine))
            seen.append(look.cursor)
        assert seen == [0x4001, 0x4000, 0x3000, 0x2000], "a page that can't be read is one line upwards, too"
        look.go(parse("800000000000"), eyes(machine))
        assert look.look(eyes(machine), 80, 2).rows[0].text == "not canonical"
        with pytest.raises(ConfigError, match="Tab goes to memory"):
            look.go(parse("phys:0"), eyes(machine))


# Memory


def test_rows_say_which_page_they_lie_in(tmp_path: Path) -> None:
    with build(SoftwareSystem(), tmp_path, NOPS, format="flat64") as machine:
        remap(machine)
        look = MemoryLook()
        look.go(parse("ff0"), eyes(machine))
        look._top = 0xFF0
        assert rows(look, machine, 5) == [
            "page 00000000 is physical 300000", "ff0", "page 00001000 is physical 302000", "1000", "1010"
        ]  # fmt: skip
        look.go(parse("2000"), eyes(machine))
        assert {"page 00002000: not mapped", "2000 not mapped"} <= set(rows(look, machine))
        look.go(parse("3000"), eyes(machine))
        assert "page 00003000 is physical 10000000, where there is no memory" in rows(look, machine)
        look.go(parse("ffff700000000000"), eyes(machine))
        assert rows(look, machine)[1].endswith("not canonical")
        look.go(parse("phys:10000000"), eyes(machine))
        assert rows(look, machine)[0] == "fffffe0 no memory"


def test_physical_is_the_same_byte_and_linear_is_where_it_was(tmp_path: Path) -> None:
    with build(SoftwareSystem(), tmp_path, NOPS, format="flat64") as machine:
        remap(machine)
        machine.write_memory(0x30_2123, b"\xaa")
        look = MemoryLook()
        look.go(parse("1123"), eyes(machine))
        before = look.look(eyes(machine), 80, 8)
        look.turn(eyes(machine))
        after = look.look(eyes(machine), 80, 8)
        assert (look.physical, look.cursor) == (True, 0x30_2123)
        assert "aa" in after.facts[0]
        assert (before.where, after.where) == ("VCPU 0 linear", "physical")
        look.turn(eyes(machine))
        assert (look.physical, look.cursor) == (False, 0x1123)
        look.go(parse("2000"), eyes(machine))
        with pytest.raises(ConfigError, match="Linear 2000 isn't mapped"):
            look.turn(eyes(machine))
        assert not look.physical


def test_the_window_moves_only_as_far_as_the_cursor_needs(tmp_path: Path) -> None:
    with build(SoftwareSystem(), tmp_path, NOPS) as machine:
        look = MemoryLook()
        look.go(parse("phys:1000"), eyes(machine))
        assert rows(look, machine, 4) == ["ff0", "1000", "1010", "1020"]
        look.move("row", 2)
        assert rows(look, machine, 4) == ["ff0", "1000", "1010", "1020"]
        look.move("row", 1)
        assert rows(look, machine, 4) == ["1000", "1010", "1020", "1030"]
        look.move("page", 1)
        assert rows(look, machine, 4) == ["1040", "1050", "1060", "1070"]
        look.move("page", -1)
        look.move("byte", -1)
        assert (rows(look, machine, 4)[0], look.cursor) == ("1000", 0x102F)
        look.move("row", -4)
        assert rows(look, machine, 4)[0] == "fe0"
        look.move("page", -1_000_000)
        assert (rows(look, machine, 4)[0], look.cursor) == ("0", 0)
        look.move("page", 1 << 60)
        assert (rows(look, machine, 4)[-1], look.cursor) == ("ffffffffffff8 no memory", 2**52 - 1)


def test_a_register_is_followed_until_the_cursor_is_moved(tmp_path: Path) -> None:
    with build(SoftwareSystem(), tmp_path, NOPS) as machine:
        look = MemoryLook()
        machine.edit(0, "rsp", 0x5000)
        assert "5000" in rows(look, machine)
        where = rows(look, machine)
        machine.edit(0, "rsp", 0x5018)
        assert rows(look, machine) == where, "it is in view"
        assert look.cursor == 0x5018
        machine.edit(0, "rsp", 0x9000)
        assert "9000" in rows(look, machine)
        look.move("byte", 1)
        machine.edit(0, "rsp", 0x5000)
        assert look.look(eyes(machine), 80, 8).cursor == 0x9001
        assert look.look(eyes(machine), 80, 8).facts[-1] == "home follows rsp"
        look.go(parse("rdi+10"), eyes(machine))
        machine.edit(0, "rdi", 0x6000)
        assert look.look(eyes(machine), 80, 8).cursor == 0x6010
        look.point(0x6001)
        look.follow_again(eyes(machine))
        assert look.look(eyes(machine), 80, 8).facts[-1] == "follows rdi+10"


def test_bytes_that_changed_are_marked_until_something_else_is_done(tmp_path: Path) -> None:
    with build(SoftwareSystem(), tmp_path, NOPS) as machine:
        look = MemoryLook()

        def marked() -> dict[int, set[int]]:
            frame = look.look(eyes(machine), 80, 8)
            return {row.address: set(row.changed) for row in frame.rows if isinstance(row, HexRow) and row.changed}

        look.go(parse("phys:2000"), eyes(machine))
        assert marked() == {}
        machine.write_memory(0x2013, b"\1\2\0")
        assert marked() == {0x2010: {3, 4}}
        assert marked() == {0x2010: {3, 4}}, "it stands: they stay"
        look.settle()
        machine.write_memory(0x2000, b"x")
        assert marked() == {0x2000: {0}}
        look.go(parse("lin:2000"), eyes(machine))
        assert marked() == {}, "there nobody has looked yet"


def test_through_other_page_tables_other_bytes_are_changes(tmp_path: Path) -> None:
    with build(SoftwareSystem(), tmp_path, NOPS, format="flat64") as machine:
        remap(machine)
        machine.write_memory(0x30_1000, b"\xff")
        look = MemoryLook()
        look.go(parse("0"), eyes(machine))
        look.look(eyes(machine), 80, 8)
        put(machine, TABLES + 0x3000, 0x30_1003)
        frame = look.look(eyes(machine), 80, 8)
        assert next(row.changed for row in frame.rows if isinstance(row, HexRow)) == {0}
        assert isinstance(frame.rows[0], Heading)
        assert frame.rows[0].text.endswith("physical 301000")


def test_while_the_guest_runs_a_change_is_marked_for_a_moment() -> None:
    seen = Seen()

    def observe(data: bytes, now: int, *, running: bool = True, key: int = 0) -> list[int]:
        padded = data.ljust(8, b"\0")
        return list(map(int, np.flatnonzero(seen.observe(key, padded, running=running, now_ns=now))))

    assert observe(b"a", 0) == []
    assert observe(b"b", 10) == [0]
    assert observe(b"bb", 20) == [0, 1]
    assert observe(b"bb", HOLD_NS + 10) == [1]
    assert observe(b"bb", HOLD_NS + 20) == []
    assert observe(b"bb", HOLD_NS + 21, running=False) == [0, 1], "it stands: since it stood before"
    for key in range(KEPT):
        observe(b"c", HOLD_NS + 22, key=key + 1)
    assert observe(b"z", HOLD_NS + 23) == [], "forgotten: too many others were looked at since"


def test_long_mode_opens_on_the_stack_with_short_addresses(tmp_path: Path) -> None:
    with build(SoftwareSystem(), tmp_path, NOPS, format="flat64") as machine:
        look = MemoryLook()
        assert look.look(eyes(machine), 80, 8).digits == 8
        look.go(parse("ffff800000000000"), eyes(machine))
        frame = look.look(eyes(machine), 80, 8)
        assert frame.digits == 16
        assert CodeLook().look(eyes(machine), 80, 8).rows[0].address == ORIGIN_32
