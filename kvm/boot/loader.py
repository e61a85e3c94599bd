"""The way in: which formats there are, and how to tell them apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kvm.boot import bootsector, elf, firmware, flat, linux, multiboot
from kvm.boot.image import BootImage, Source, StrPath, read_file
from kvm.errors import ImageError


@dataclass(frozen=True, slots=True)
class Format:
    """A guest format: its loader, a line for a person, and which of the user's wishes it can fulfil."""

    load: Callable[[Source], BootImage]
    about: str
    takes_address: bool = False
    takes_initrd: bool = False
    """And a command line."""
    why_unlike: Callable[[bytes], str] | None = None
    """Why a file isn't of this format, empty if it is; None for formats that can't be told by looking."""


AUTO = "auto"
"""Not a format of its own: whichever the file looks like, in the order of ``FORMATS``."""

FORMATS = {
    "linux": Format(
        linux.load_linux, "Linux bzImage, 64- or 32-bit entry", takes_initrd=True, why_unlike=linux.why_not
    ),
    "multiboot": Format(multiboot.load_multiboot, "multiboot 1 kernel, 32-bit entry", why_unlike=multiboot.why_not),
    "elf": Format(elf.load_elf, "ELF32 or ELF64 executable, 32- or 64-bit entry", why_unlike=elf.why_not),
    "bootsector": Format(
        bootsector.load_bootsector, "512 bytes at 0x7c00, real mode", why_unlike=bootsector.why_not
    ),
    "firmware": Format(
        firmware.load_firmware, "ROM image that ends at 4 GiB, entered at the reset vector",
        why_unlike=firmware.why_unlike,
    ),
    "flat16": Format(flat.load_flat16, "binary at an address, real mode", True),
    "flat32": Format(flat.load_flat32, "binary at an address, 32-bit flat protected mode", True),
    "flat64": Format(flat.load_flat64, "binary at an address, 64-bit mode, 0–4 GiB identity-mapped", True),
}  # fmt: skip

_KNOWN = (
    (0, b"MZ", "an EFI or Windows program"),
    (0, b"\x1f\x8b", "compressed by gzip"),
    (0, b"\xfd7zXZ\0", "compressed by xz"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0x8001, b"CD001", "an ISO 9660 CD image"),
)
"""What people have at hand and vmdeck can't start: offset, bytes, name."""


def load(
    path: StrPath,
    *,
    memory: int,
    vcpus: int = 1,
    format: str = AUTO,
    address: int | None = None,
    initrd: StrPath | None = None,
    command_line: str | None = None,
) -> BootImage:
    """Load a guest image for a machine with ``memory`` bytes and so many VCPUs.

    ``address`` is where a flat binary goes (guest-physical); None means the format's own place. ``initrd``, a file, and
    ``command_line`` are for Linux; None for the latter means ``linux.COMMAND_LINE``.
    Raises ImageError: what, why, and what to do.
    """
    if format not in (AUTO, *FORMATS):
        raise ImageError(f"There is no image format {format!r}. Choose one of {', '.join((AUTO, *FORMATS))}.")
    source = Source(*read_file(path, memory=memory), memory, address, vcpus, command_line=command_line)
    if format == AUTO:
        format = detect(source)
    chosen = FORMATS[format]
    if address is not None and not chosen.takes_address:
        raise source.error(f"the format {format} has its own addresses. Leave --address out, or choose a flat format.")
    if not chosen.takes_initrd and (initrd, command_line) != (None, None):
        raise source.error(f"the format {format} takes no initrd and no command line. Leave --initrd and --append out.")
    if initrd is not None:
        source = replace(source, initrd=read_file(initrd, memory=memory)[1])
    return chosen.load(source)


def detect(source: Source) -> str:
    """The name of the first format in ``FORMATS`` that the file looks like. Raises ImageError if there is none."""
    tried = []
    for name, known in FORMATS.items():
        if known.why_unlike is not None:
            why = known.why_unlike(source.data)
            if not why:
                return name
            tried.append(f"not {name}: {why}")
    for offset, magic, name in _KNOWN:
        if source.data.startswith(magic, offset):
            raise source.error(
                f"it looks like {name}, which vmdeck can't start. If it's something else, say so with --format."
            )
    raise source.error(
        f"its format can't be told ({'; '.join(tried)}). Say what it is with --format; "
        "a binary without headers is flat16, flat32 or flat64."
    )
