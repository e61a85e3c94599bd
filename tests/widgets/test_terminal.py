"""The guest's terminal: whatever the guest sends, it survives, and nothing of it but printable text comes out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.widgets.hosts import text
from widgets.terminal import LONGEST_SEQUENCE, GuestTerminal


def shown(data: bytes, columns: int = 40, lines: int = 5) -> list[str]:
    terminal = GuestTerminal(columns, lines)
    terminal.feed(data)
    return terminal.text()


def test_plain_output_and_bare_line_feeds() -> None:
    assert shown(b"one\r\ntwo\nthree")[:3] == ["one", "two", "three"]


def test_colours_become_styles() -> None:
    terminal = GuestTerminal()
    terminal.feed(b"a\x1b[1;32mb\x1b[0m\x1b[38;5;196mc")
    assert terminal.rows()[0] == (("a", ""), ("b", "guest:green:default:b"), ("c", "guest:ff0000:default:"))


@pytest.mark.parametrize(
    "hostile",
    [
        b"\x1b[?1;2;3m",
        b"\x1b[>4;2m",
        b"\x1b[99999999999999999999999999A",
        b"\x1b[?99999h\x1b[?q\x1b[!p\x1b[$$",
        b"\x1b]0;title\x07\x1bP+q544e\x1b\\",
        b"\x9b5m\x9d0;x\x9c",
        b"\xff\xfe\xc3\x28",
        "a\u0301\u0301\u200b\u202e\ufeff".encode(),
        b"\x01\x02\x03\x0e\x0f\x7f",
        b"\x1b[2147483647;2147483647H",
        b"\x1b[5;1r\x1b[0;0r",
        b"\x1b#8" + b"\x1bc",
    ],
)
def test_what_follows_a_hostile_sequence_is_still_shown(hostile: bytes) -> None:
    lines = shown(hostile + b"\x1b[0m\x1b[H\x1b[2Jstill here")
    assert "still here" in "\n".join(lines)


def test_a_sequence_that_never_ends_does_not_swallow_the_output() -> None:
    lines = shown(b"\x1b]0;" + b"x" * LONGEST_SEQUENCE * 2 + b"\r\nstill here")
    assert "still here" in "\n".join(lines)


def test_control_characters_between_do_not_swallow_the_rest_of_the_line() -> None:
    assert shown(b"a\x01b\x1fc")[0] == "abc"


PIECES = [b"\x1b[", b"\x1b]", b"\x1b", b"?", b";", b"9" * 30, b"\n", "中".encode(), b"\xcc\x81"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=6), max_size=40))
def test_nothing_unprintable_ever_comes_out(pieces: list[bytes]) -> None:
    terminal = GuestTerminal(20, 4)
    for piece in pieces:
        terminal.feed(piece)
    for line in text(terminal.rows(terminal.scrollback)) + text(terminal.rows()):
        assert line.isprintable()


def test_scrollback() -> None:
    terminal = GuestTerminal(20, 3)
    terminal.feed(b"\n".join(b"line %d" % n for n in range(10)))
    assert text(terminal.rows()) == ["line 7", "line 8", "line 9"]
    assert terminal.scrollback == 7
    assert text(terminal.rows(2)) == ["line 5", "line 6", "line 7"]
    assert text(terminal.rows(7)) == ["line 0", "line 1", "line 2"]


def test_a_new_size_lays_the_output_out_anew() -> None:
    terminal = GuestTerminal(20, 3)
    terminal.feed(b"0123456789\r\nend")
    terminal.resize(5, 3)
    assert terminal.text() == ["01234", "56789", "end"]
    terminal.resize(20, 6)
    assert terminal.text()[:2] == ["0123456789", "end"]
