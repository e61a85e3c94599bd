"""bzImages made by hand, field by field (Documentation/arch/x86/boot.rst), with any protected-mode part."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True)
class BzImage:
    code: bytes = b"\xf4" * 0x400
    version: int = 0x20F
    setup_sects: int = 4
    jump: int = 0x6A
    """The header's length is in here: it ends at 0x202 + this."""
    magic: bytes = b"HdrS"
    loadflags: int = 1
    initrd_addr_max: int = 0x7FFF_FFFF
    alignment: int = 2 * MIB
    relocatable: int = 1
    xloadflags: int = 1
    cmdline_size: int = 2047
    pref_address: int = 16 * MIB
    init_size: int = 4 * MIB
    syssize: int | None = None
    after: bytes = b""
    """What follows the kernel in the file, such as a signature."""

    def but(self, **changes: Any) -> BzImage:
        return replace(self, **changes)

    def build(self) -> bytes:
        code = self.code + bytes(-len(self.code) % 16)
        setup = bytearray(((self.setup_sects or 4) + 1) * 512)
        fields = (
            (0x1F1, "<B", self.setup_sects), (0x1FE, "<H", 0xAA55), (0x200, "<BB", 0xEB, self.jump),
            (0x1F4, "<I", len(code) // 16 if self.syssize is None else self.syssize), (0x202, "<4s", self.magic),
            (0x206, "<H", self.version), (0x211, "<B", self.loadflags), (0x214, "<I", MIB),
            (0x22C, "<I", self.initrd_addr_max), (0x230, "<I", self.alignment), (0x234, "<B", self.relocatable),
            (0x236, "<H", self.xloadflags), (0x238, "<I", self.cmdline_size), (0x258, "<Q", self.pref_address),
            (0x260, "<I", self.init_size),
        )  # fmt: skip
        for at, form, *values in fields:
            struct.pack_into(form, setup, at, *values)  # type: ignore[arg-type]
        return bytes(setup) + code + self.after
