"""The base of all panes: drawn line by line, and only the lines whose content changed are drawn again.

A line is a tuple of spans, a span a text with the names of its styles ("bar good"): plain values that compare
cheaply. Each name is a component class ``line--NAME``, which the app's .tcss gives its colour.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

Span = tuple[str, str]
Line = tuple[Span, ...]

STYLES = (
    "text", "label", "dim", "strong", "rip", "mark", "changed", "good", "warn", "bad", "info", "accent",
    "bar", "selected", "cursor", "spot",
)  # fmt: skip

GAP = "  "
"""Between the groups of a title bar."""


def width_of(spans: Iterable[Span]) -> int:
    """Cells that these spans take."""
    return sum(cell_len(text) for text, _ in spans)


def cut(text: str, width: int) -> str:
    """The text in at most ``width`` cells, with an ellipsis where something is missing."""
    if cell_len(text) <= width:
        return text
    kept = ""
    room = max(width - 1, 0)
    for char in text:
        room -= cell_len(char)
        if room < 0:
            break
        kept += char
    return kept + "…" if width > 0 else ""


def bar(left: Sequence[Span], right: Sequence[Sequence[Span]], width: int, base: str = "bar") -> Line:
    """A title bar: ``left``, then as many of the groups ``right``, first ones first, as fit, flush right."""
    room = width - width_of(left) - 1
    shown: list[Span] = []
    for group in right:
        size = width_of(group) + (len(GAP) if shown else 1)
        if size > room:
            break
        room -= size
        shown += [(GAP, ""), *group] if shown else group
    if shown:
        shown.append((" ", ""))
    gap = width - width_of(left) - width_of(shown)
    spans = (*left, (" " * max(gap, 0), ""), *shown)
    return tuple((text, f"{base} {style}".rstrip()) for text, style in spans if text)


def _plain(text: str) -> str:
    """What may go to a terminal: names of files and checkpoints can hold anything."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


class LinePane(Widget):
    """A widget of lines. Subclasses give ``lines`` and call ``redraw`` when their values have changed."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {f"line--{name}" for name in STYLES}
    ALLOW_SELECT = False

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._lines: Sequence[Line] = ()
        self._styles: dict[str, Style] = {}

    def lines(self, width: int, height: int) -> Sequence[Line]:
        """The content now, top to bottom; at most ``height`` lines are drawn."""
        raise NotImplementedError

    def redraw(self) -> None:
        """Have the lines that differ from what is on the screen drawn again."""
        width, height = self.size
        if not width or not height:
            return
        old, new = self._lines, self.lines(width, height)[:height]
        self._lines = new
        changed = [
            Region(0, y, width, 1)
            for y in range(max(len(old), len(new)))
            if y >= len(old) or y >= len(new) or old[y] != new[y]
        ]
        if changed:
            self.refresh(*changed)

    def on_resize(self) -> None:
        self.redraw()

    def watch_has_focus(self, has_focus: bool) -> None:
        super().watch_has_focus(has_focus)
        self.redraw()

    def render_line(self, y: int) -> Strip:
        width = self.size.width
        if y >= len(self._lines):
            return Strip.blank(width, self._style(""))
        segments = [Segment(_plain(text), self._style(names)) for text, names in self._lines[y]]
        return Strip(segments).adjust_cell_length(width, self._style(""))

    def _style(self, names: str) -> Style:
        """The looks of a span: the rules of its names laid one over the other, on the widget's own."""
        if names not in self._styles:
            background = self.background_colors[1]
            colour = self.styles.color
            text_style = Style()
            for name in names.split():
                rules = self.get_component_styles(f"line--{name}")
                if rules.has_rule("background"):
                    background += rules.background
                if rules.has_rule("color"):
                    colour = rules.color
                if rules.has_rule("text_style"):
                    text_style += rules.text_style
            colours = Style.from_color((background + colour).rich_color, background.rich_color)
            self._styles[names] = colours + text_style
        return self._styles[names]

    def notify_style_update(self) -> None:
        self._styles.clear()
        super().notify_style_update()

    def line_text(self, y: int) -> str:
        """The text of a line as it's drawn."""
        return "".join(text for text, _ in self._lines[y]) if y < len(self._lines) else ""
