"""The status line, the banner of a machine that stopped for cause, and the notice of a terminal that's too small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from widgets.line_pane import Line, LinePane, Span, bar, cut, width_of

PHASES = {
    "running": ("▶", "good"),
    "paused": ("‖", "warn"),
    "stopped": ("■", "bad"),
    "exited": ("●", "info"),
    "closed": ("·", "dim"),
}
"""Phase to its glyph and style."""


@dataclass(frozen=True, slots=True)
class StatusValues:
    """What the status line says: ``error``, else ``busy``, else ``news``. ``facts``: image, backend, VCPUs, memory."""

    phase: str
    reason: str
    facts: tuple[str, ...]
    busy: str = ""
    error: str = ""
    news: str = ""


class StatusLine(LinePane):
    """One line: what the machine is doing, and what it is."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.values: StatusValues | None = None

    def show(self, values: StatusValues) -> None:
        """Draw these."""
        if values != self.values:
            self.values = values
            self.redraw()

    def lines(self, width: int, height: int) -> Sequence[Line]:
        values = self.values
        if values is None:
            return []
        glyph, style = PHASES.get(values.phase, PHASES["closed"])
        left: list[Span] = [(f" {glyph} {values.phase.upper()} ", f"strong {style}")]
        if values.error:
            left.append((f" {cut(values.error, max(width - width_of(left) - 3, 0))}", "bad"))
        elif values.busy:
            left.append((f" {values.busy}", "accent"))
        elif values.news:
            left.append((f" {cut(values.news, max(width * 2 // 3, 20))}", "good"))
        elif values.reason and values.reason != values.phase:
            left.append((f" {cut(values.reason, max(width // 2, 20))}", style))
        return [bar(left, [[(fact, "label")] for fact in values.facts], width)]


class Banner(LinePane):
    """A few lines that stay until what they tell of is over."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.content: tuple[Line, ...] = ()

    def show(self, content: Sequence[Line]) -> None:
        """Draw these lines; none hides the banner."""
        if tuple(content) != self.content:
            self.content = tuple(content)
            self.display = bool(content)
            self.styles.height = len(content)
            self.redraw()

    def lines(self, width: int, height: int) -> Sequence[Line]:
        return self.content


class TooSmall(LinePane):
    """Covers the screen while there is too little of it."""

    def __init__(self, columns: int, rows: int, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.needed = (columns, rows)

    def lines(self, width: int, height: int) -> Sequence[Line]:
        columns, rows = self.needed
        text = [
            f"vmdeck needs {columns}×{rows}.",
            f"This terminal has {width}×{height}.",
            "The guest goes on as it was.",
            "Make it larger, or q quits.",
        ]
        above = max((height - len(text)) // 2, 0)
        return [()] * above + [((cut(line, width).center(width), "text"),) for line in text]
