"""The guest's terminal: its bytes go through pyte, so that no escape sequence of the guest reaches the person's own.

What pyte stumbles over (unknown private sequences, unprintable characters, strings that never end) is left out.
"""

from __future__ import annotations

import codecs
from collections import deque
from typing import Any

import pyte
from pyte.screens import Char
from wcwidth import wcwidth

from widgets.line_pane import Line

HISTORY = 5000
"""Lines that scroll back."""
KEPT = 32 << 10
"""Bytes that are kept to lay the screen out anew when its size changes."""
LONGEST_SEQUENCE = 256
"""An escape sequence longer than this is none: a guest must not swallow its own output for good."""
_CONTROLS = frozenset("\a\b\t\n\v\f\r\x1b\x18\x1a")


def drawable(text: str) -> str:
    """The text without what has no cell of its own: other controls, C1, combining characters."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char for char in text if char in _CONTROLS or (char.isprintable() and wcwidth(char) > 0))


class _Screen(pyte.Screen):
    """pyte's screen with the lines that scrolled off the top."""

    def __init__(self, columns: int, lines: int) -> None:
        self.above: deque[Any] = deque(maxlen=HISTORY)
        super().__init__(columns, lines)

    def index(self) -> None:
        if self.cursor.y == self.lines - 1 and self.margins is None:
            self.above.append(self.buffer[0])
        super().index()


class _Stream(pyte.Stream):
    """pyte's parser, which goes on after what it can't take."""

    _inside = 0

    def feed(self, data: str) -> None:
        assert self.listener is not None
        draw = self.listener.draw
        match = self._text_pattern.match
        offset = 0
        while offset < len(data):
            plain = match(data, offset) if self._taking_plain_text else None
            if plain and plain.end() > offset:
                draw(data[offset : plain.end()])
                offset = plain.end()
                continue
            try:
                self._taking_plain_text = self._send_to_parser(data[offset])
            except Exception:  # whatever a guest's sequence made pyte do: the parser has started anew
                self._inside = 0
            offset += 1
            self._inside = 0 if self._taking_plain_text else self._inside + 1
            if self._inside > LONGEST_SEQUENCE:
                self._initialize_parser()
                self._inside = 0


class GuestTerminal:
    """A screen of ``columns`` × ``lines`` cells with scrollback."""

    def __init__(self, columns: int = 80, lines: int = 24) -> None:
        self._kept = bytearray()
        self._start(columns, lines)

    def _start(self, columns: int, lines: int) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._screen = _Screen(columns, lines)
        self._screen.set_mode(pyte.modes.LNM)  # guests' early consoles send bare line feeds
        self._stream = _Stream(self._screen)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines."""
        return self._screen.columns, self._screen.lines

    @property
    def scrollback(self) -> int:
        """Lines above the screen."""
        return len(self._screen.above)

    @property
    def cursor(self) -> tuple[int, int] | None:
        """Column and line of the cursor; None while it's hidden."""
        cursor = self._screen.cursor
        return None if cursor.hidden else (min(cursor.x, self._screen.columns - 1), cursor.y)

    def feed(self, data: bytes) -> None:
        """Output of the guest."""
        self._kept += data
        del self._kept[:-KEPT]
        self._stream.feed(drawable(self._decoder.decode(data)))

    def resize(self, columns: int, lines: int) -> None:
        """Lay the newest output out anew in this size, and forget older scrollback."""
        if (columns, lines) != self.size:
            kept = bytes(self._kept)
            self._start(columns, lines)
            self._stream.feed(drawable(self._decoder.decode(kept)))

    def rows(self, back: int = 0) -> list[Line]:
        """The screen's lines, or those ``back`` lines further up. Style names: see ``style_of``."""
        screen = self._screen
        above = list(screen.above)[len(screen.above) - back :][: screen.lines] if back else []
        shown = [*above, *(screen.buffer[y] for y in range(screen.lines - len(above)))]
        return [self._row(row) for row in shown]

    def text(self) -> list[str]:
        """The screen as plain lines."""
        return [line.rstrip() for line in self._screen.display]

    def _row(self, row: Any) -> Line:
        spans: list[tuple[str, str]] = []
        text, style = "", ""
        for x in range(max(row, default=-1) + 1 if row else 0):
            char = row[x]
            name = style_of(char)
            if name != style and text:
                spans.append((text, style))
                text = ""
            style = name
            text += char.data
        if text:
            spans.append((text, style))
        return tuple(spans)


def style_of(char: Char) -> str:
    """A cell's looks as one word: ``guest:FG:BG:ATTRIBUTES``, empty for a plain one."""
    looks = (char.bold, char.italics, char.underscore, char.strikethrough, char.reverse)
    attributes = "".join(letter for letter, is_set in zip("biusr", looks, strict=True) if is_set)
    if char.fg == char.bg == "default" and not attributes:
        return ""
    return f"guest:{char.fg}:{char.bg}:{attributes}"
