"""The ledger's pane: what the all-CPU hooks did, newest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual.binding import Binding, BindingType

from widgets.line_pane import Line, Span, bar, cut, width_of
from widgets.scrolled_pane import ScrolledPane


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One row; ``clock`` is the time of day, ``moved`` says which substates moved. Numbers fall, and may have gaps."""

    number: int
    clock: str
    hook: str
    level: str
    caller: str
    vcpus: int
    ioctls: int
    microseconds: float
    skew_us: float
    moved: str


def duration(microseconds: float) -> str:
    """A time in six cells: ``412 µs``, ``1.3 ms``, ``2.1 s ``."""
    if microseconds < 999.5:
        return f"{microseconds:3.0f} µs"
    if microseconds < 99_950:
        return f"{microseconds / 1000:.1f} ms".rjust(6)
    return f"{microseconds / 1e6:.1f} s".rjust(6)


class LedgerPane(ScrolledPane, can_focus=True):
    """The records; scrolls while focused, and then stands still while new ones come."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "scroll_by(-1)", "Newer", show=False, id="ledger.up"),
        Binding("down,j", "scroll_by(1)", "Older", show=False, id="ledger.down"),
        Binding("pageup", "scroll_by(-10)", "Newer", show=False, id="ledger.page_up"),
        Binding("pagedown", "scroll_by(10)", "Older", show=False, id="ledger.page_down"),
        Binding("home", "newest", "Newest", show=False, id="ledger.home"),
    ]

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.entries: tuple[LedgerEntry, ...] = ()
        self.total = 0
        self.others = ""
        self._top: int | None = None
        """The number of the entry at the top; None follows the newest."""

    def show(self, entries: Sequence[LedgerEntry], total: int) -> None:
        """The newest records, newest first, and how many there ever were."""
        if total != self.total:
            self.entries, self.total = tuple(entries), total
            self.redraw()

    def action_scroll_by(self, rows: int) -> None:
        if self.entries:
            row = min(self._skipped() + rows, len(self.entries) - 1)
            self._top = self.entries[row].number if row > 0 else None
            self.redraw()

    def _skipped(self) -> int:
        """How many entries are above the first one shown."""
        if self._top is None:
            return 0
        found = (row for row, entry in enumerate(self.entries) if entry.number <= self._top)
        return next(found, len(self.entries) - 1)

    def action_newest(self) -> None:
        self._top = None
        self.redraw()

    def lines(self, width: int, height: int) -> Sequence[Line]:
        base = "bar selected" if self.has_focus else "bar"
        right: list[list[Span]] = [[(f"{self.total} hooks", "")]]
        if self._top is not None:
            right.insert(0, [("scrolled, Home follows", "warn")])
        if self.others:
            right.append([(self.others, "label")])
        lines = [bar([(" F3 ", "label"), ("Ledger ", "strong")], right, width, base)]
        if not self.entries:
            return [*lines, ((" Nothing moved between the kernel and the user copy yet.", "dim"),)]
        skip = self._skipped()
        return [*lines, *(_row(entry, width) for entry in self.entries[skip : skip + height - 1])]


LEVEL_STYLES = {"RUNTIME": "text", "RESET": "warn", "FULL": "accent"}


def _row(entry: LedgerEntry, width: int) -> Line:
    spans: list[Span] = [(" ", "")]
    if width >= 48:
        spans.append((f"{entry.clock if width >= 100 else entry.clock[:8]} ", "dim"))
    spans.append((f"{entry.hook:<14} " if width >= 60 else f"{entry.hook.removeprefix('all_'):<10} ", "text"))
    spans.append((f"{entry.level or '·':<7} ", LEVEL_STYLES.get(entry.level, "dim")))
    spans.append((f"{entry.vcpus:>2}× ", "label"))
    spans.append((f"{entry.ioctls:>3} {'ioctls' if width >= 60 else 'io'} ", "label"))
    spans.append((f"{duration(entry.microseconds)} ", "strong"))
    if width >= 100:
        spans.append((f"skew {duration(entry.skew_us)} " if entry.skew_us else " " * 12, "label"))
    room = width - width_of(spans) - 1
    return (*spans, (cut(f"{entry.caller} {entry.moved}", room), "label")) if room >= 8 else tuple(spans)
