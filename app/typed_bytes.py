"""Bytes as a person types them, to be written or found: ``90 90 cc``, ``0xdeadbeef``, ``"text\\r\\n" 00``."""

from __future__ import annotations

import re

from app.edit import LONGEST
from kvm.errors import ConfigError
from widgets.line_pane import cut

MOST = 4096
"""Bytes at a time."""
SHOWN = 16
"""Of the bytes, so many are spelled out."""
_PART = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"|([^\s"]+))')
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "0": "\0", '"': '"', "\\": "\\"}
_KNOWN = r"\n \r \t \0 \xNN \" and \\"
_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|(.))", re.DOTALL)


def parse(text: str) -> bytes:
    """At least one byte, in the order in which they are typed. Raises ConfigError that says what is wrong."""
    data = b""
    at = 0
    text = text.strip()
    while at < len(text):
        part = _PART.match(text, at)
        if part is None:
            raise ConfigError('The text has no end: a " is missing.')
        quoted, digits = part.groups()
        data += _text(quoted) if quoted is not None else _hexadecimal(digits)
        at = part.end()
    if not data:
        raise ConfigError('Which bytes? Write 90 90 cc, 0xdeadbeef as it lies in memory, or "text".')
    if len(data) > MOST:
        raise ConfigError(f"These are {len(data)} bytes, and {MOST} are the most.")
    return data


def spelled(data: bytes) -> str:
    """The bytes in hexadecimal, the first ones of many."""
    more = f" … {len(data)} bytes" if len(data) > SHOWN else ""
    return data[:SHOWN].hex(" ") + more


def _text(quoted: str) -> bytes:
    def escaped(found: re.Match[bytes]) -> bytes:
        if found[1]:
            return bytes.fromhex(found[1].decode())
        letter = found[2].decode("utf-8", "replace")
        if letter not in _ESCAPES:
            raise ConfigError(f"A backslash before {letter!r} means nothing: there are {_KNOWN}.")
        return _ESCAPES[letter].encode()

    return _ESCAPE.sub(escaped, quoted.encode("utf-8", "surrogatepass"))


def _hexadecimal(digits: str) -> bytes:
    bare = digits.lower().removeprefix("0x")
    if not re.fullmatch("[0-9a-f]+", bare):
        raise ConfigError(f'{cut(digits, LONGEST)!r} is no hexadecimal byte. Text goes in quotes: "text".')
    if len(bare) % 2:
        raise ConfigError(f"{cut(digits, LONGEST)!r} ends in half a byte: every byte has two digits.")
    return bytes.fromhex(bare)
