"""Images made by hand, field by field, for the loaders' tests."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any

EM = {32: 3, 64: 62}
PT_LOAD, PT_INTERP, PT_NOTE = 1, 3, 4


@dataclass(frozen=True)
class Load:
    """A program header and its data; None: what follows from the rest."""

    address: int
    data: bytes = b""
    memsz: int | None = None
    filesz: int | None = None
    vaddr: int | None = None
    offset: int | None = None
    type: int = PT_LOAD


@dataclass(frozen=True)
class ElfImage:
    bits: int = 64
    loads: tuple[Load, ...] = (Load(0x100000, b"\xf4" * 16),)
    entry: int | None = None
    machine: int | None = None
    type: int = 2
    endian: int = 1
    ident_class: int | None = None
    phnum: int | None = None
    phentsize: int | None = None
    phoff: int | None = None
    shoff: int = 0
    pad_to: int = 0
    """Data starts at this file offset or later."""

    def but(self, **changes: Any) -> ElfImage:
        return replace(self, **changes)

    def build(self) -> bytes:
        wide = self.bits == 64
        header_size, phdr_size = (64, 56) if wide else (52, 32)
        at = max(header_size + phdr_size * len(self.loads), self.pad_to)
        phdrs, body = b"", b"\0" * (at - header_size - phdr_size * len(self.loads))
        for load in self.loads:
            offset = at if load.offset is None else load.offset
            filesz = len(load.data) if load.filesz is None else load.filesz
            memsz = filesz if load.memsz is None else load.memsz
            vaddr = load.address if load.vaddr is None else load.vaddr
            if wide:
                phdrs += struct.pack("<2I6Q", load.type, 7, offset, vaddr, load.address, filesz, memsz, 1)
            else:
                phdrs += struct.pack("<8I", load.type, offset, vaddr, load.address, filesz, memsz, 7, 1)
            body += load.data
            at += len(load.data)
        entry = self.entry
        if entry is None:
            first = self.loads[0] if self.loads else Load(0)
            entry = first.address if first.vaddr is None else first.vaddr
        ident = b"\x7fELF" + bytes((self.ident_class or (2 if wide else 1), self.endian, 1, 0)) + bytes(8)
        header = ident + struct.pack(
            "<2HIQQQI6H" if wide else "<2HIIIII6H",
            self.type,
            EM[self.bits] if self.machine is None else self.machine,
            1,
            entry,
            header_size if self.phoff is None else self.phoff,
            self.shoff,
            0,
            header_size,
            phdr_size if self.phentsize is None else self.phentsize,
            len(self.loads) if self.phnum is None else self.phnum,
            0,
            0,
            0,
        )
        return header + phdrs + body


def multiboot_header(flags: int = 0, addresses: tuple[int, ...] = ()) -> bytes:
    magic = 0x1BADB002
    header = struct.pack("<3I", magic, flags, -(magic + flags) & 0xFFFFFFFF)
    return header + struct.pack(f"<{len(addresses)}I", *addresses)
