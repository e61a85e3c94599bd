"""Sizes, addresses and counts as people type them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.size import parse_address, parse_count, parse_size, show_size
from kvm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("65536", 65536),
        ("64K", 64 << 10),
        ("64M", 64 << 20),
        ("64m", 64 << 20),
        ("64MiB", 64 << 20),
        ("64MB", 64 << 20),
        ("1G", 1 << 30),
        (" 2g ", 2 << 30),
        ("1T", 1 << 40),
        ("1P", 1 << 50),
        ("0", 0),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "abc", "-1", "+1", "1.5G", "64 M M", "M", "0x100", "1E", "٣", "64Mi", "1e6", "9" * 31]
)
def test_what_is_no_size_says_so(text: str) -> None:
    with pytest.raises(ConfigError, match="not a memory size"):
        parse_size(text)


@given(st.integers(min_value=0, max_value=1 << 60))
def test_a_shown_size_reads_back(size: int) -> None:
    assert parse_size(show_size(size)) == size


def test_sizes_are_shown_short() -> None:
    assert [show_size(size) for size in (0, 4097, 4096, 64 << 20, 1 << 30)] == ["0", "4097", "4K", "64M", "1G"]


def test_addresses() -> None:
    assert [parse_address(text) for text in ("0x100000", "0", "31744", "0xffffffffffffffff")] == [
        1 << 20,
        0,
        31744,
        2**64 - 1,
    ]


@pytest.mark.parametrize("text", ["", "-1", "0x", "100000h", "abc", "0x10000000000000000", "1M"])
def test_what_is_no_address_says_so(text: str) -> None:
    with pytest.raises(ConfigError, match="not a guest-physical address"):
        parse_address(text)


def test_counts() -> None:
    assert [parse_count(text) for text in ("0", "4", "-1", "10000")] == [0, 4, -1, 10000]


@pytest.mark.parametrize("text", ["", "abc", "1.5", "0x4", "9" * 12])
def test_what_is_no_count_says_so(text: str) -> None:
    with pytest.raises(ConfigError, match="not a number of VCPUs"):
        parse_count(text)
