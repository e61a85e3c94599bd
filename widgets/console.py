"""The console's pane: the guest's output, and while it's focused a keyboard of the guest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from rich.cells import cell_len
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message

from widgets.line_pane import Line, Span, bar
from widgets.scrolled_pane import ScrolledPane

if TYPE_CHECKING:
    from widgets.terminal import GuestTerminal

KEYS = {
    "enter": b"\r", "tab": b"\t", "backspace": b"\x7f", "escape": b"\x1b", "ctrl+at": b"\x00", "ctrl+space": b"\x00",
    "up": b"\x1b[A", "down": b"\x1b[B", "right": b"\x1b[C", "left": b"\x1b[D", "home": b"\x1b[H", "end": b"\x1b[F",
    "insert": b"\x1b[2~", "delete": b"\x1b[3~", "shift+tab": b"\x1b[Z", "ctrl+backslash": b"\x1c",
    "ctrl+circumflex_accent": b"\x1e", "ctrl+underscore": b"\x1f",
}  # fmt: skip
"""Named keys to what a VT100 sends. Function keys and PageUp/PageDown stay ours."""
OURS = ("ctrl+p", "ctrl+q")
"""The palette and the way out work while a person types at the guest."""

_COLOURS = {"brown": "yellow", "brightbrown": "bright_yellow", "bfightmagenta": "bright_magenta"}
"""pyte's names of colours (and its typo) that aren't Rich's."""


def guest_bytes(key: str, character: str | None) -> bytes | None:
    """What the guest gets for a key as Textual names it; None if the key isn't the guest's."""
    if key in OURS:
        return None
    if key in KEYS:
        return KEYS[key]
    if key.startswith("ctrl+") and len(key) == 6 and key[5].isalpha():
        return bytes([ord(key[5]) & 0x1F])
    if character and character.isprintable():
        return character.encode()
    return None


@lru_cache(1024)
def _rich_style(name: str) -> Style:
    _, fg, bg, attributes = name.split(":")

    def colour(value: str) -> str | None:
        if value == "default":
            return None
        if len(value) == 6 and all(digit in "0123456789abcdef" for digit in value):
            return f"#{value}"
        value = _COLOURS.get(value, value)
        return value.replace("bright", "bright_") if value.startswith("bright") and "_" not in value else value

    return Style(
        color=colour(fg), bgcolor=colour(bg), bold="b" in attributes, italic="i" in attributes,
        underline="u" in attributes, strike="s" in attributes, reverse="r" in attributes,
    )  # fmt: skip


class ConsolePane(ScrolledPane, can_focus=True):
    """Several sources of output (serial line, debug console), one shown at a time."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f2,ctrl+right_square_bracket", "leave", "Leave the console", id="console.leave"),
        Binding("f7", "app.zoom", "Zoom", id="console.zoom"),
        Binding("pageup", "scroll_back(1)", "Scroll back", show=False, id="console.page_up"),
        Binding("pagedown", "scroll_back(-1)", "Scroll forward", show=False, id="console.page_down"),
    ]

    class Typed(Message):
        """Keys for the guest."""

        def __init__(self, data: bytes) -> None:
            super().__init__()
            self.data = data

    class Left(Message):
        """The person is done typing."""

    def __init__(self, sources: Sequence[str], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.sources = tuple(sources)
        self.shown = 0
        self.others = ""
        """What else can be shown in this place, for the title."""
        self.listening = True
        """Does the guest run, so that it hears what is typed?"""
        self._chosen = False
        self._back = 0
        self._terminals: dict[int, GuestTerminal] = {}
        """Of the sources that have said something."""
        self._unseen = [0] * len(self.sources)

    def _terminal(self, source: int) -> GuestTerminal:
        if source not in self._terminals:
            from widgets.terminal import GuestTerminal  # with it comes pyte, which the first frame can do without

            width, height = self.size
            self._terminals[source] = GuestTerminal(max(width - 1, 1), max(height - 1, 1))
        return self._terminals[source]

    @property
    def _scrollback(self) -> int:
        return self._terminals[self.shown].scrollback if self.shown in self._terminals else 0

    def _has_text(self, source: int) -> bool:
        return source in self._terminals and any(self._terminals[source].text())

    def write(self, source: int, data: bytes) -> None:
        """Output of the guest. Until a person chooses, the first source that has said something is shown."""
        if not data:
            return
        terminal = self._terminal(source)
        before = terminal.scrollback
        terminal.feed(data)
        if not self._chosen and (source < self.shown or not self._has_text(self.shown)):
            self.shown, self._back, self._unseen[source] = source, 0, 0
        if source != self.shown:
            self._unseen[source] += len(data)
        elif self._back:
            # What a person reads while scrolled back stays where it is.
            self._back = min(self._back + terminal.scrollback - before, terminal.scrollback)
        self.redraw()

    def listen(self, listening: bool) -> None:
        """The guest hears what is typed, or doesn't now."""
        if listening != self.listening:
            self.listening = listening
            self.redraw()

    def choose(self, source: int) -> None:
        """Show this source."""
        self.shown, self._chosen, self._back = source, True, 0
        self._unseen[source] = 0
        self.redraw()

    def action_leave(self) -> None:
        self.screen.set_focus(None)  # at once: the next key is no longer the guest's
        self.post_message(self.Left())

    def action_next_source(self) -> None:
        self.choose((self.shown + 1) % len(self.sources))

    def action_scroll_back(self, pages: int) -> None:
        page = max(self.size.height - 2, 1)
        self._back = min(max(self._back + pages * page, 0), self._scrollback)
        self.redraw()

    def lines(self, width: int, height: int) -> Sequence[Line]:
        self.set_class(self.has_focus, "-typing")
        title = self._title(width)
        if width < 2 or height < 2:
            return [title]
        if self.shown not in self._terminals and not self.has_focus:
            return [title]
        terminal = self._terminal(self.shown)
        for each in self._terminals.values():
            each.resize(width - 1, height - 1)
        rows = terminal.rows(self._back)
        cursor = terminal.cursor
        if self.has_focus and cursor and not self._back:
            rows[cursor[1]] = _with_cursor(rows[cursor[1]], cursor[0])
        return [title, *(((" ", ""), *row) for row in rows)]

    def _title(self, width: int) -> Line:
        base = "bar selected" if self.has_focus else "bar"
        left: list[Span] = [(" F2 " if not self.has_focus else " ▌", "label"), ("Console ", "strong")]
        for index, name in enumerate(self.sources):
            if index == self.shown:
                left.append((f" {name} ", "text"))
            elif index in self._terminals:
                left.append((f" {name} +{self._unseen[index]} ", "dim"))
        right: list[list[Span]] = []
        if self._back:
            right.append([(f"{self._back} lines back", "warn")])
        if self.has_focus:
            heard = "typing goes to the guest" if self.listening else "the guest stands, and hears this once it runs"
            right.append([(f"{heard}, F2 leaves", "accent")])
        if self.others and not self.has_focus:
            right.append([(self.others, "label")])
        return bar(left, right, width, base)

    def _style(self, names: str) -> Style:
        if names.startswith("guest:"):
            style, _, extra = names.partition(" ")
            return self._style(extra) + _rich_style(style)
        return super()._style(names)

    def check_consume_key(self, key: str, character: str | None) -> bool:
        return guest_bytes(key, character) is not None

    def on_key(self, event: events.Key) -> None:
        data = guest_bytes(event.key, event.character)
        if data is not None:
            event.stop()
            event.prevent_default()
            self._type(data)

    def on_paste(self, event: events.Paste) -> None:
        event.stop()
        self._type(event.text.replace("\r\n", "\r").replace("\n", "\r").encode())

    def _type(self, data: bytes) -> None:
        if self._back:
            self._back = 0
            self.redraw()
        self.post_message(self.Typed(data))

    def action_scroll_by(self, rows: int) -> None:
        self._back = min(max(self._back - rows, 0), self._scrollback)
        self.redraw()


def _with_cursor(row: Line, column: int) -> Line:
    """The row with the cell in this column drawn as the cursor."""
    # A character of two cells has a stub after it, so that the list's index is the column.
    cells = [(part, style) for text, style in row for char in text for part in (char, "")[: cell_len(char)]]
    cells += [(" ", "")] * (column + 1 - len(cells))
    char, style = cells[column]
    cells[column] = (char or " ", f"{style} cursor".strip())
    return tuple(cell for cell in cells if cell[0])
