"""Bytes as they are typed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.typed_bytes import MOST, parse, spelled
from kvm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("0x90 90 cc", b"\x90\x90\xcc"),
        ("  DEADbeef ", b"\xde\xad\xbe\xef"),
        ('"ok\\n" 00', b"ok\n\0"),
        ('"a b"', b"a b"),
        ('"\\x41\\"\\\\\\0\\t\\r"', b'A"\\\0\t\r'),
        ('90"x"cc', b"\x90x\xcc"),
        ('"é"', "é".encode()),
    ],
)
def test_what_can_be_typed(text: str, data: bytes) -> None:
    assert parse(text) == data


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "Which bytes?"),
        ('""', "Which bytes?"),
        ("9", "'9' ends in half a byte"),
        ("0x123", "half a byte"),
        ("hello", 'Text goes in quotes: "text"'),
        ("0x", "no hexadecimal byte"),
        ("٣٣", "no hexadecimal byte"),
        ('"open', 'a " is missing'),
        ('"\\"', 'a " is missing'),
        ('"\\q"', "A backslash before 'q' means nothing"),
        ('"\\x1"', "A backslash before 'x' means nothing"),
        ("90" * (MOST + 1), f"These are {MOST + 1} bytes"),
        ("z" * 5000, "no hexadecimal byte"),
    ],
)
def test_what_cannot(text: str, error: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(text)
    assert error in str(raised.value)
    assert len(str(raised.value)) < 200


@given(st.binary(min_size=1, max_size=64), st.integers(0, 64))
def test_half_as_text_half_as_digits_is_the_same_bytes(data: bytes, at: int) -> None:
    text = "".join(f"\\x{byte:02x}" if byte in b'"\\' or not 32 <= byte < 127 else chr(byte) for byte in data[:at])
    assert parse(f'"{text}" {data[at:].hex(" ")}') == data


@given(st.text(max_size=200))
def test_whatever_is_typed_is_bytes_or_said_to_be_none(text: str) -> None:
    said = ""
    try:
        assert 0 < len(parse(text)) <= MOST
    except ConfigError as error:
        said = str(error)
    assert len(said) < 500, "not all that was pasted"


def test_many_bytes_are_spelled_in_part() -> None:
    assert spelled(b"\x90\xcc") == "90 cc"
    assert spelled(bytes(17)) == "00 " * 15 + "00 … 17 bytes"
