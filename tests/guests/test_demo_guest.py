"""The demo guest's binary: made from the source beside it, and what a multiboot loader takes."""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

import pytest
from elftools.elf.elffile import ELFFile

from app import guests
from tests.guests.assemble import BinutilsMissing, assemble

MIB = 1 << 20


class Contents(NamedTuple):
    """What of an ELF file reaches the guest, or a person who debugs it; section padding differs between binutils."""

    entry: int
    segments: list[tuple[int, bytes, int]]
    symbols: dict[str, int]


def contents(image: bytes) -> Contents:
    elf = ELFFile(io.BytesIO(image))
    return Contents(
        elf["e_entry"],
        [(segment["p_paddr"], segment.data(), segment["p_memsz"]) for segment in elf.iter_segments("PT_LOAD")],
        {symbol.name: symbol["st_value"] for symbol in elf.get_section_by_name(".symtab").iter_symbols()},
    )


def test_the_binary_is_its_source_assembled() -> None:
    binary = guests.demo()
    try:
        again = assemble(binary.with_suffix(".S"), base=MIB, format="elf32")
    except BinutilsMissing as missing:
        pytest.skip(str(missing))
    assert contents(binary.read_bytes()) == contents(again), (
        "rebuild it: python -m tests.guests.assemble app/guests/demo.S app/guests/demo.elf"
    )


def test_it_is_multiboot_elf32_below_2_mib() -> None:
    image = guests.demo().read_bytes()
    elf = ELFFile(io.BytesIO(image))
    assert (elf.elfclass, elf["e_machine"]) == (32, "EM_386")
    headers = (struct.unpack_from("<3I", image, offset) for offset in range(0, 8192 - 12, 4))
    assert any(magic == 0x1BADB002 and (magic + flags + checksum) % 2**32 == 0 for magic, flags, checksum in headers)
    for address, data, size in contents(image).segments:
        assert address >= MIB
        assert address + max(size, len(data)) <= 2 * MIB


def test_what_a_vcpu_does_has_a_name() -> None:
    names = contents(guests.demo().read_bytes()).symbols
    assert {"_start", "ap_loop", "round_loop", "unit_primes", "user_sum", "fib", "unit_lock", "run_checks"} <= set(
        names
    )
