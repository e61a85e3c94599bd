"""The terminal that vmdeck was started from: is it good enough, and raw mode that is always given back."""

from __future__ import annotations

import os
import shutil
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from kvm.errors import ConfigError

_USE_HEADLESS = "or run the guest without the workstation: --headless."


def check_terminal() -> None:
    """Raise ConfigError if the workstation can't be drawn here."""
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if not os.isatty(number):
            raise ConfigError(f"The workstation needs a terminal and {name} is none. Start it in one, {_USE_HEADLESS}")
    if os.environ.get("TERM", "dumb") == "dumb":
        raise ConfigError(f"The workstation can't be drawn on TERM=dumb. Use a terminal that can, {_USE_HEADLESS}")
    if short := _too_small():
        raise ConfigError(f"This terminal is too small: {short}. Make it larger, {_USE_HEADLESS}")


def _too_small() -> str:
    from app.plan import MIN_COLUMNS, MIN_ROWS  # with it comes Textual

    size = shutil.get_terminal_size()
    if size.columns >= MIN_COLUMNS and size.lines >= MIN_ROWS:
        return ""
    return f"{size.columns}×{size.lines} characters, the workstation needs {MIN_COLUMNS}×{MIN_ROWS}"


@contextmanager
def raw_terminal(number: int) -> Iterator[None]:
    """Hand every key to us as it is typed, ctrl-c and ctrl-z too, if this fd is a terminal. What is written keeps
    its newline translation, as under QEMU, so that a guest's bare line feed starts a line.
    """
    if not os.isatty(number):
        yield
        return
    before = termios.tcgetattr(number)
    raw = termios.tcgetattr(number)
    raw[0] &= ~(
        termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR | termios.IGNCR
        | termios.ICRNL | termios.IXON
    )  # fmt: skip
    raw[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN | termios.ISIG)
    raw[6][termios.VMIN], raw[6][termios.VTIME] = 1, 0
    try:
        termios.tcsetattr(number, termios.TCSANOW, raw)
        yield
    finally:
        with suppress(termios.error):  # EIO: the terminal is gone
            termios.tcsetattr(number, termios.TCSANOW, before)


def describe_terminal() -> list[tuple[str, str]]:
    """What doctor says of the terminal: names and values."""
    size = shutil.get_terminal_size()
    return [
        ("stdin", "a terminal" if os.isatty(0) else "not a terminal"),
        ("stdout", "a terminal" if os.isatty(1) else "not a terminal"),
        ("size", f"too small: {short}" if (short := _too_small()) else f"{size.columns}×{size.lines}"),
        ("TERM", os.environ.get("TERM", "not set")),
        ("colours", _colours()),
        ("encoding", sys.stdout.encoding if sys.stdout else "unknown"),
    ]


def _colours() -> str:
    if "NO_COLOR" in os.environ:
        return "none, NO_COLOR is set: what changed is still marked by a glyph"
    if os.environ.get("COLORTERM", "") in ("truecolor", "24bit"):
        return "16 million"
    return "256" if "256" in os.environ.get("TERM", "") else "16"
