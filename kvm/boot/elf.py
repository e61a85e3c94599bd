"""ELF executables: placed by their program headers at their physical addresses.

ELF64 for x86-64 is entered in 64-bit mode as a flat64 image is, ELF32 for i386 in flat 32-bit protected mode.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from kvm.boot.entry import LongMode, ProtectedMode, gdt, identity_pages
from kvm.boot.flat import placed_tables
from kvm.boot.image import BootImage, Entry, Placed, Segment, Source, check_places
from kvm.x86 import layout

MAGIC = b"\x7fELF"
_MACHINES = {(32, "EM_386"), (64, "EM_X86_64")}
_HEADER_SIZE = {32: 52, 64: 64}
_PHDR_SIZE = {32: 32, 64: 56}
_SECTION_FIELDS = {32: ((32, 4), (46, 6)), 64: ((40, 8), (58, 6))}
"""Offset and size of e_shoff, and of e_shentsize, e_shnum and e_shstrndx."""
_MAX_PROGRAM_HEADERS = 1024
"""Linux itself takes no more than 64 KiB of them."""

_Fields = Any
"""A header as pyelftools gives it: its fields' names → numbers, or names (``ET_EXEC``) that it knows."""


@dataclass(frozen=True, slots=True)
class Elf:
    """What matters of an ELF file: its class, PT_LOAD segments (data still in the file) and physical entry point."""

    bits: int
    segments: tuple[Segment, ...]
    entry: int


def why_not(data: bytes) -> str:
    """Why this isn't an ELF file; empty if it is."""
    return "" if data.startswith(MAGIC) else "it doesn't begin with 7f 45 4c 46"


def load_elf(source: Source) -> BootImage:
    """Raises ImageError for what isn't an executable for this machine, or doesn't fit into its memory."""
    bits = _bits(source)
    tables = (gdt(), *identity_pages()) if bits == 64 else (gdt(),)
    elf = read_elf(source, placed_tables(tables))
    entry: Entry = LongMode(elf.entry) if elf.bits == 64 else ProtectedMode(elf.entry)
    return BootImage(source.path, "elf", (*tables, *elf.segments), b"", entry)


def read_elf(source: Source, reserved: tuple[Placed, ...]) -> Elf:
    """Check and read an ELF executable whose segments must keep out of ``reserved``. Raises ImageError."""
    # Slow to import, and only guests of this format need it.
    from elftools.common.exceptions import ELFError
    from elftools.common.utils import struct_parse
    from elftools.elf.elffile import ELFFile

    bits = _bits(source)
    try:
        file = ELFFile(_without_sections(source.data, bits))
        header: _Fields = file.header
        _check_header(source, bits, header)
        # Not iter_segments(): it goes on to read what the segments hold.
        offsets = (header["e_phoff"] + index * header["e_phentsize"] for index in range(header["e_phnum"]))
        phdrs: list[_Fields] = [struct_parse(file.structs.Elf_Phdr, file.stream, offset) for offset in offsets]
        loads = [phdr for phdr in phdrs if _wanted(source, phdr)]
    except ELFError as error:
        raise source.error(f"its ELF headers are damaged ({error}). Build or copy it again.") from error
    if not loads:
        raise source.error("this ELF file has nothing to load (no PT_LOAD segment). Link it to an executable.")
    places = [_place(source, index, phdr) for index, phdr in enumerate(loads)]
    check_places(source, (*places, *reserved))
    segments = tuple(
        Segment(phdr["p_paddr"], source.data[phdr["p_offset"] : phdr["p_offset"] + phdr["p_filesz"]], phdr["p_memsz"])
        for phdr in loads
    )
    return Elf(bits, segments, _physical_entry(source, header["e_entry"], loads))


def _bits(source: Source) -> int:
    """32 or 64; raises ImageError for files too short to have a header."""
    if why := why_not(source.data):
        raise source.error(f"{why}, so it's no ELF file. Choose another --format.")
    bits = {1: 32, 2: 64}.get(source.data[4] if len(source.data) > 4 else 0)
    if bits is None:
        raise source.error("its ELF class is neither 32 nor 64 bit. Build or copy it again.")
    if len(source.data) < _HEADER_SIZE[bits]:
        raise source.error(f"it's cut off after {len(source.data)} bytes, within the ELF header. Copy it again.")
    if source.data[5] != 1:
        raise source.error("it isn't little-endian, so it isn't for x86. Build it for i386 or x86-64.")
    return bits


def _without_sections(data: bytes, bits: int) -> io.BytesIO:
    """The file as if it had no sections: they don't matter for loading, and stripping tools leave strange ones."""
    stream = io.BytesIO(data)
    for offset, size in _SECTION_FIELDS[bits]:
        stream.seek(offset)
        stream.write(bytes(size))
    return stream


def _check_header(source: Source, bits: int, header: _Fields) -> None:
    machine, kind = header["e_machine"], header["e_type"]
    if (bits, machine) not in _MACHINES:
        raise source.error(f"it's a {bits}-bit ELF file for {machine}. Build it for i386 (32 bit) or x86-64 (64 bit).")
    if kind != "ET_EXEC":
        raise source.error(
            f"it's an ELF file of type {kind}, not a statically placed executable. Link it with -no-pie -static."
        )
    count, size = header["e_phnum"], header["e_phentsize"]
    if count > _MAX_PROGRAM_HEADERS:
        raise source.error(f"it has {count} program headers, more than {_MAX_PROGRAM_HEADERS}. Build it again.")
    if count and size != _PHDR_SIZE[bits]:
        raise source.error(f"its program headers have {size} bytes, not {_PHDR_SIZE[bits]}. Build or copy it again.")
    if header["e_phoff"] + count * size > len(source.data):
        raise source.error("it's cut off before the end of its program headers. Copy it again.")


def _wanted(source: Source, phdr: _Fields) -> bool:
    if phdr["p_type"] == "PT_INTERP":
        raise source.error("it's a program for an operating system (it names an ELF interpreter). Link it -static.")
    return bool(phdr["p_type"] == "PT_LOAD" and (phdr["p_memsz"] or phdr["p_filesz"]))


def _place(source: Source, index: int, phdr: _Fields) -> Placed:
    name = f"ELF segment {index}"
    if phdr["p_filesz"] > phdr["p_memsz"]:
        raise source.error(
            f"{name} has {phdr['p_filesz']} bytes in the file but {phdr['p_memsz']} in memory. Build or copy it again."
        )
    if phdr["p_offset"] + phdr["p_filesz"] > len(source.data):
        raise source.error(f"it's cut off within {name}. Copy it again.")
    return Placed(name, phdr["p_paddr"], phdr["p_memsz"])


def _physical_entry(source: Source, entry: int, loads: list[_Fields]) -> int:
    """e_entry is a virtual address by the book; kernels linked high often give a physical one. Both are understood."""
    for start in ("p_vaddr", "p_paddr"):
        for phdr in loads:
            if 0 <= entry - phdr[start] < phdr["p_filesz"]:
                physical: int = entry - phdr[start] + phdr["p_paddr"]
                if physical < layout.ROM_END:
                    return physical
                raise source.error(f"its entry point {physical:#x} lies above 4 GiB. Link it to a lower address.")
    raise source.error(f"its entry point {entry:#x} lies in none of its segments. Check the linker script's ENTRY.")
