"""What a VCPU's pane and the list of VCPUs say, and that only what changed is drawn again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from textual.geometry import Region

from kvm.x86.disasm import Instruction
from kvm.x86.structs import Regs, Sregs
from tests.widgets.hosts import Host, regs, sregs, text
from widgets import vcpu_list, vcpu_pane
from widgets.frame import HOLD_NS, Changes, VcpuFrame
from widgets.vcpu_list import VcpuList
from widgets.vcpu_pane import MARK, VcpuPane, heights, vcpu_lines

NOP = Instruction(0xFFFFFFFF81000123, b"\x90", "nop")
FRAME = VcpuFrame(2, "running", last_put="RUNTIME", regs=regs(rbx=0xBEEF), sregs=sregs(), insn=NOP)
WIDTHS = (46, 58, 78, 98, 120)


def test_the_title_says_what_it_does_in_which_mode_and_who_owns_its_state() -> None:
    assert text(vcpu_lines(FRAME, 98))[0].rstrip().endswith("long mode CPL0  kernel owns  put RUNTIME")
    assert text(vcpu_lines(FRAME, 98))[0].startswith(" VCPU 2 ▶ running ")
    owned = replace(FRAME, activity="stopped", reason="stepped", dirty=True, last_put="")
    title = text(vcpu_lines(owned, 98))[0]
    assert "■ stopped: stepped" in title
    assert "user copy owns" in title
    assert "never put" in title


def test_mode_owner_and_level_have_room_in_half_of_120_columns() -> None:
    owned = replace(FRAME, activity="stopped", reason="stepped", dirty=True)
    title = " ".join(text(vcpu_lines(owned, 58))[0].split())
    assert title == "VCPU 2 ■ stopped long CPL0 user copy owns put RUNTIME"


def test_a_stale_sample_says_how_old_it_is() -> None:
    assert "7 s ago" in text(vcpu_lines(replace(FRAME, age=7), 98))[0]


@pytest.mark.parametrize("width", WIDTHS)
def test_every_register_is_there_in_every_width(width: int) -> None:
    compact, full = heights(width)
    lines = text(vcpu_lines(FRAME, width))
    assert len(lines) <= full
    assert all(len(line) <= width for line in lines), [line for line in lines if len(line) > width]
    top = "\n".join(lines[:compact])
    for name in ("RIP", "RAX", "R15", "RFL"):
        assert name in top
    assert "cf PF af ZF sf tf IF df of iopl0" in top
    everything = "\n".join(lines[:full])
    for word in ("CR0", "PG", "CR3", "EFER", "LMA", "CS ", "0010", "code64 r-x", "TR", "GDT", "IDT"):
        assert word in everything


def test_rip_comes_first_with_its_instruction() -> None:
    line = text(vcpu_lines(FRAME, 98))[1]
    assert line.split() == ["RIP", "ffffffff81000123", "90", "nop"]
    assert "not readable" in text(vcpu_lines(replace(FRAME, insn=None), 98))[1]


def test_an_ap_before_its_sipi_has_no_instruction() -> None:
    reset = Sregs()
    reset.cs.base, reset.cs.selector = 0xFFFF0000, 0xF000
    frame = replace(FRAME, regs=regs(rip=0xFFF0), sregs=bytes(reset))
    assert "waits for SIPI" in text(vcpu_lines(frame, 98))[1]
    assert "nop" in text(vcpu_lines(replace(frame, index=0), 98))[1]


def test_halted_with_interrupts_off_says_so() -> None:
    halted = replace(FRAME, activity="halted")
    assert "interrupts are off" not in text(vcpu_lines(halted, 98))[0]
    assert "◌ halted: interrupts are off" in text(vcpu_lines(replace(halted, regs=regs(rflags=2)), 98))[0]


def test_real_mode_shows_segment_and_offset() -> None:
    real = Sregs()
    real.cs.selector = 0xF000
    frame = replace(FRAME, regs=regs(rip=0xFFF0), sregs=bytes(real))
    assert "f000:fff0" in text(vcpu_lines(frame, 58))[1]


def test_what_is_not_known_is_a_question_mark() -> None:
    lines = text(vcpu_lines(VcpuFrame(0), 98))
    assert "unknown" in lines[0]
    assert "?" in lines[1]
    assert not any("0000" in line for line in lines)


def test_a_changed_register_has_a_mark_besides_its_colour() -> None:
    lines = text(vcpu_lines(replace(FRAME, changed=frozenset({"rbx", "cr3", "rflags"})), 98))
    marked = [word for line in lines for word in line.split() if word.startswith(MARK)]
    assert marked == [f"{MARK}RBX", f"{MARK}RFL", f"{MARK}CR3"]


def test_numbers_stay_in_their_columns_whatever_they_are() -> None:
    small = text(vcpu_lines(replace(FRAME, regs=regs(rax=1)), 98))
    large = text(vcpu_lines(replace(FRAME, regs=regs(rax=2**64 - 1), changed=frozenset({"rax"})), 98))
    assert small[2].index("RSI") == large[2].index("RSI")
    assert len(small) == len(large)


class TestChanges:
    def test_while_it_runs_a_register_stays_marked_for_a_moment(self) -> None:
        changes = Changes()
        changes.observe(regs(), sregs(), running=True, now_ns=0)
        assert changes.observe(regs(rax=1), sregs(), running=True, now_ns=1) == {"rax"}
        assert changes.observe(regs(rax=1, rbx=1), sregs(), running=True, now_ns=HOLD_NS) == {"rax", "rbx"}
        assert changes.observe(regs(rax=1, rbx=1), sregs(), running=True, now_ns=HOLD_NS + 1) == {"rbx"}

    def test_while_it_stands_the_mark_tells_of_the_last_step(self) -> None:
        changes = Changes()
        changes.observe(regs(), sregs(), running=False, now_ns=0)
        changes.settle()
        other = Sregs.from_buffer_copy(sregs())
        other.cs.selector = 8
        for now in (1, 10 * HOLD_NS):
            assert changes.observe(regs(rip=5), bytes(other), running=False, now_ns=now) == {"rip", "cs"}
        changes.settle()
        assert changes.observe(regs(rip=5), bytes(other), running=False, now_ns=20 * HOLD_NS) == set()

    def test_the_first_values_are_no_change(self) -> None:
        changes = Changes()
        assert changes.observe(b"", b"", running=True, now_ns=0) == set()
        assert changes.observe(regs(), sregs(), running=True, now_ns=1) == set()


async def test_only_the_lines_that_changed_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pane = VcpuPane()
    drawn: list[Region] = []
    async with Host(pane).run_test(size=(98, 20)) as pilot:
        pane.show(FRAME, selected=True)
        await pilot.pause()
        refresh = pane.refresh

        def watched(*regions: Region) -> VcpuPane:
            drawn.extend(regions)
            return refresh(*regions)

        monkeypatch.setattr(pane, "refresh", watched)
        pane.show(replace(FRAME, regs=regs(rbx=0xBEF0)), selected=True)
        assert [region.y for region in drawn] == [3]
        pane.show(replace(FRAME, regs=regs(rbx=0xBEF0)), selected=True)
        assert len(drawn) == 1
        await pilot.pause()
        assert "bef0" in pane.line_text(3)


async def test_a_click_selects() -> None:
    host = Host(VcpuPane())
    async with host.run_test(size=(98, 20)) as pilot:
        host.widget.show(FRAME, selected=False)  # type: ignore[attr-defined]
        await pilot.click(VcpuPane, offset=(5, 5))
        assert host.heard == [("selected", 2)]


def frames(count: int) -> list[VcpuFrame]:
    return [VcpuFrame(n, "halted" if n % 2 else "running", regs=bytes(Regs(rip=0x1000 + n))) for n in range(count)]


async def test_the_list_has_every_vcpu_and_a_click_selects_it() -> None:
    widget = VcpuList()
    host = Host(widget)
    async with host.run_test(size=(80, vcpu_list.rows(16, 80))) as pilot:
        widget.show(frames(16), 3)
        await pilot.pause()
        assert "16 VCPUs" in widget.line_text(0)
        assert "▶ 8 running" in widget.line_text(0)
        assert "◌ 8 halted" in widget.line_text(0)
        body = "\n".join(widget.line_text(y) for y in range(1, 5))
        assert all(f"{0x1000 + n:x}" in body for n in range(16))
        assert widget.line_text(1).split()[:2] == ["0▶", "1000"]
        await pilot.click(VcpuList, offset=(vcpu_list.CELL * 2 + 4, 2))
        assert host.heard == [("selected", 9)]


async def test_a_list_with_too_few_rows_shows_the_selected_vcpu() -> None:
    widget = VcpuList()
    host = Host(widget)
    async with host.run_test(size=(40, 4)) as pilot:
        widget.show(frames(16), 7)
        await pilot.pause()
        shown = "\n".join(widget.line_text(y) for y in range(4))
        assert "1007" in shown
        row = next(y for y in range(1, 4) if "1007" in widget.line_text(y))
        await pilot.click(VcpuList, offset=(4, row))
        assert host.heard == [("selected", 7)]


def test_a_pane_needs_no_more_than_its_rows() -> None:
    for width in WIDTHS:
        compact, full = heights(width)
        assert compact < full
        assert vcpu_pane.columns(width) in (2, 3, 4)
