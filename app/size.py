"""Numbers as people type them: memory sizes, guest-physical addresses, counts."""

from __future__ import annotations

import re

from kvm.errors import ConfigError

_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_SIZE = re.compile(r"(\d{1,30})([KMGTP]?)(?:i?B)?", re.ASCII | re.IGNORECASE)
_UNITS = tuple(_SUFFIXES.items())[::-1]


def parse_size(text: str) -> int:
    """``64M``, ``1g`` or ``65536`` in bytes; suffixes are powers of 1024. Raises ConfigError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{text!r} is not a memory size. Write a whole number of bytes, or one with K, M or G: 64M.")
    return int(found[1]) * _SUFFIXES[found[2].upper()]


def parse_address(text: str) -> int:
    """A guest-physical address: decimal, or hexadecimal after ``0x``. Raises ConfigError."""
    try:
        address = int(text, 0)
    except ValueError:
        address = -1
    if not 0 <= address < 1 << 64:
        raise ConfigError(f"{text!r} is not a guest-physical address. Write 0x100000, or a whole number below 2^64.")
    return address


def parse_count(text: str) -> int:
    """A number of VCPUs; the machine checks how many are possible. Raises ConfigError."""
    if not re.fullmatch(r"-?\d{1,9}", text, re.ASCII):
        raise ConfigError(f"{text!r} is not a number of VCPUs. Write a whole number, 1 or more.")
    return int(text)


def show_size(size: int) -> str:
    """The shortest exact form that parse_size reads back: ``64M``, ``1G``, ``4097``."""
    suffix, unit = next(row for row in _UNITS if (size % row[1] == 0 and size >= row[1]) or row[1] == 1)
    return f"{size // unit}{suffix}"
