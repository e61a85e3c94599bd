"""The contract as a screen: the table of substates, and of the chosen VCPU what each last did and what is due."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen

from kvm.ledger import Record
from kvm.machine import Machine
from kvm.quirks import Ignored
from kvm.x86.substates import Substate
from widgets.ledger import LEVEL_STYLES
from widgets.line_pane import Line, Span, cut, width_of
from widgets.lines import LinesPane

RATE = 4
"""Times a second that it's drawn anew."""
REASONED = 170
"""Columns from which each row has its reason beside it, not below."""


def contract_lines(machine: Machine, vcpu: int, ignored: Sequence[Ignored], width: int) -> list[Line]:
    """Who owns the VCPU's state, then a row a substate in put order, then the machine's own, then what is ignored."""
    owner = machine.vcpus[vcpu]
    due = owner.pending()
    last = dict(_last_moves(machine.ledger.records, vcpu))
    gets = {row.name: place for place, row in enumerate(machine.table.get_order, 1)}
    lines: list[Line] = [_owner(due, dirty=owner.dirty), ()]
    lines.append(((" put  substate      get  from     last moved", "dim"),))
    for place, row in enumerate(machine.table.put_order, 1):
        lines += _row(str(place), row, str(gets.get(row.name, "")), last.get(row.name, ""), row.name in due, width)
    lines += [(), ((" The machine's own, while all VCPUs stand", "dim"),)]
    for row in machine.chips.rows:
        lines += _row("VM", row, "VM", last.get(row.name, ""), False, width)
    if ignored:
        lines += [(), ((f" This {machine.system.name} takes these writes and ignores them", "warn"),)]
        lines += [((f"      {quirk.what}: ", "text"), (quirk.lost, "label")) for quirk in ignored]
    return lines


def _owner(due: Sequence[str], *, dirty: bool) -> Line:
    if not dirty:
        return ((" The kernel owns the registers", "strong"), ("; what the panes show is a sample.", "label"))
    back = ", ".join(due) if due else "nothing: no byte has changed"
    spans: list[Span] = [
        (" The user copy owns the registers", "strong accent"),
        ("; back before the VCPU runs goes ", "label"),
    ]
    return (*spans, (back, "changed" if due else "text"))


def _last_moves(records: Sequence[Record], vcpu: int) -> Iterator[tuple[str, str]]:
    """Each substate with the newest thing that happened to it, later ones last."""
    for record in records:
        hook = record.hook.removeprefix("cpu_synchronize_")
        at = f" at {record.level.name}" if record.level else ""
        for part in record.parts:
            if part.vcpu in (vcpu, None):
                for verb, names in (("unchanged", part.skipped), ("read", part.read), ("written", part.written)):
                    for name in names:
                        yield name, f"{verb}{at} for {record.caller} ({hook})"
                for name, errno in part.tolerated:
                    yield name, f"{errno}, tolerated{at} for {record.caller}"


def _row(place: str, row: Substate, get: str, last: str, due: bool, width: int) -> list[Line]:
    spans: list[Span] = [
        (f"{'•' if due else ' '}{place:>3}  ", "mark" if due else "label"),
        (f"{row.name:<12} ", "changed strong" if due else "strong"),
        (f"{get:>4}  ", "label"),
        (f"{row.level.name:<8} ", LEVEL_STYLES[row.level.name]),
        (f"{cut(last, 40):<40} ", "text"),
    ]
    why = f"{row.why}  {' '.join(filter(None, (row.get, row.put)))}"
    if width >= REASONED:
        return [(*spans, (cut(why, width - width_of(spans) - 1), "label"))]
    return [tuple(spans), ((cut(f"      {why}", width - 1), "dim"),)]


class ContractScreen(ModalScreen[None]):
    """Live while it's open; opens on the VCPU that is selected."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,t", "dismiss", "Close", id="contract.close"),
        Binding("right_square_bracket,right,l", "select(1)", "Next VCPU", id="contract.next"),
        Binding("left_square_bracket,left,h", "select(-1)", "Previous VCPU", id="contract.previous"),
    ]

    def __init__(self, machine: Machine, vcpu: int, ignored: Sequence[Ignored]) -> None:
        super().__init__()
        self._machine, self._vcpu, self._ignored = machine, vcpu, ignored

    def compose(self) -> ComposeResult:
        yield LinesPane("", (("[ ]", "VCPU"), ("esc", "close")), id="lines")

    def on_mount(self) -> None:
        self.query_one(LinesPane).focus()
        self.call_after_refresh(self._draw)
        self.set_interval(1 / RATE, self._draw)

    def _draw(self) -> None:
        pane = self.query_one(LinesPane)
        lines = contract_lines(self._machine, self._vcpu, self._ignored, pane.size.width)
        pane.show(lines, f"The contract: VCPU {self._vcpu}")

    def action_select(self, by: int) -> None:
        self._vcpu = (self._vcpu + by) % len(self._machine.vcpus)
        self._draw()
