"""ACPI machine language, as far as a list of devices takes it (ACPI specification 6.4, chapters 6.4 and 20.2).

Each function gives the bytes of one term.
"""

from __future__ import annotations

import struct

_ZERO, _ONE, _BYTE, _WORD, _DWORD, _TEXT = b"\x00", b"\x01", b"\x0a", b"\x0b", b"\x0c", b"\x0d"
_NAME, _SCOPE, _BUFFER, _PACKAGE, _DEVICE = b"\x08", b"\x10", b"\x11", b"\x12", b"\x5b\x82"
_IO_PORTS, _IRQ, _END_TAG = 0x47, 0x22, b"\x79\x00"
_DECODES_16_BITS = 1


def integer(value: int) -> bytes:
    """0 to 2³² − 1."""
    if value < 2:
        return (_ZERO, _ONE)[value]
    form, prefix = ("<B", _BYTE) if value < 1 << 8 else ("<H", _WORD) if value < 1 << 16 else ("<I", _DWORD)
    return prefix + struct.pack(form, value)


def text(value: str) -> bytes:
    """ASCII."""
    return _TEXT + value.encode("ascii") + b"\0"


def eisa_id(value: str) -> bytes:
    """``PNP0501`` as the number that stands for it: 5 bits a letter, 4 a digit, its bytes the big-endian way."""
    first, second, third = (ord(letter) - 0x40 for letter in value[:3])
    number = (first << 10 | second << 5 | third) << 16 | int(value[3:], 16)
    return _DWORD + number.to_bytes(4, "big")


def name(path: str, value: bytes) -> bytes:
    """Name (path, value)."""
    return _NAME + path.encode("ascii") + value


def scope(path: str, *terms: bytes) -> bytes:
    """Scope (path) { terms }."""
    return _SCOPE + _sized(path.encode("ascii") + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Device (path) { terms }."""
    return _DEVICE + _sized(path.encode("ascii") + b"".join(terms))


def package(*values: bytes) -> bytes:
    """Package () { values }."""
    return _PACKAGE + _sized(bytes((len(values),)) + b"".join(values))


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate () { descriptors }: a buffer of them."""
    body = b"".join(descriptors) + _END_TAG
    return _BUFFER + _sized(integer(len(body)) + body)


def io(first: int, count: int) -> bytes:
    """IO (Decode16, first, first, 1, count)."""
    return struct.pack("<2B2H2B", _IO_PORTS, _DECODES_16_BITS, first, first, 1, count)


def irq(line: int) -> bytes:
    """IRQNoFlags () {line}: an ISA interrupt, edge-triggered."""
    return struct.pack("<BH", _IRQ, 1 << line)


def _sized(body: bytes) -> bytes:
    """A PkgLength, which counts itself, and the body."""
    if len(body) < 0x3F:
        return bytes((len(body) + 1,)) + body
    for more in (1, 2, 3):
        size = len(body) + 1 + more
        if size < 1 << 4 + 8 * more:
            return bytes((more << 6 | size & 0xF,)) + (size >> 4).to_bytes(more, "little") + body
    raise ValueError(f"{len(body)} bytes are more than a package can have")
