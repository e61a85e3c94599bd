"""What every loader makes of a file: bytes for memory and the state that the first VCPU is entered in."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from kvm.errors import ImageError
from kvm.x86 import layout
from kvm.x86.structs import Regs, Sregs, Sregs2

StrPath = str | os.PathLike[str]


class Entry(Protocol):
    """The state that a format promises its guest."""

    def apply(self, regs: Regs, sregs: Sregs | Sregs2) -> None:
        """Change the bootstrap processor's architectural reset values into it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """``size`` bytes of RAM at a guest-physical address: ``data``, then zeros."""

    address: int
    data: bytes
    size: int


@dataclass(frozen=True, slots=True)
class BootImage:
    """A loaded guest image. ``rom`` is mapped read-only so that it ends at 4 GiB; b"" if there is none."""

    path: str
    format: str
    segments: tuple[Segment, ...]
    rom: bytes
    entry: Entry


@dataclass(frozen=True, slots=True)
class Source:
    """An image file, read, and what goes with it: what each loader is given. ``memory`` is the guest's, in bytes."""

    path: str
    data: bytes
    memory: int
    address: int | None
    """Where the user wants it; None if there's no wish."""
    vcpus: int = 1
    initrd: bytes | None = None
    command_line: str | None = None

    def error(self, why: str) -> ImageError:
        """An ImageError that names the file."""
        return ImageError(f"Can't load {self.path}: {why}")


@dataclass(frozen=True, slots=True)
class Placed:
    """A range of RAM that somebody fills; ``what`` names it in messages."""

    what: str
    address: int
    size: int

    @property
    def end(self) -> int:
        return self.address + self.size

    def __str__(self) -> str:
        return f"{self.what} ({self.address:#x}–{self.end - 1:#x})"


def check_places(source: Source, places: Iterable[Placed]) -> None:
    """Raise ImageError unless every range lies in RAM and no two overlap. Empty ranges are in nobody's way."""
    ram = layout.ram(source.memory)
    ordered = sorted((place for place in places if place.size), key=lambda place: place.address)
    for place in ordered:
        if any(start <= place.address and place.end <= start + size for start, size in ram):
            continue
        if place.end > layout.MMIO_HOLE and place.address < layout.HIGH_RAM and source.memory >= layout.MMIO_HOLE:
            raise source.error(
                f"{place} reaches into {layout.MMIO_HOLE:#x}–{layout.HIGH_RAM - 1:#x}, where a PC has devices and "
                "never RAM. Link it to a lower address."
            )
        raise source.error(
            f"{place} doesn't fit into the guest's {mib(source.memory)} of memory. Give it more with --memory, or "
            "link it to a lower address."
        )
    for before, after in pairwise(ordered):
        if before.end > after.address:
            raise source.error(f"{before} and {after} overlap. Link the image so that they don't.")


def read_file(path: StrPath, *, memory: int) -> tuple[str, bytes]:
    """Read an image file, once and whole: its name for messages, and what it holds.

    Raises ImageError for what isn't a readable, non-empty, sensible file.
    """
    shown = str(Path(path))
    limit = max(memory, layout.MAX_ROM)
    # O_NONBLOCK: opening a FIFO that nobody writes to would wait for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        fd = os.open(path, flags)
        try:
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                raise ImageError(f"Can't load {shown}: it's a directory. Name the image file in it.")
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"Can't load {shown}: it isn't a regular file. Copy what it gives into one first.")
            size = status.st_size
            data = b"" if size > limit else _read(fd, limit + 1)
        finally:
            os.close(fd)
    except OSError as error:
        raise ImageError(f"Can't load {shown}: {error.strerror}. {_advice(error)}") from error
    except ValueError as error:  # a NUL in the name
        raise ImageError(f"Can't load {shown!r}: that isn't a file name. Check its name.") from error
    size = max(size, len(data))
    if size > limit:
        raise ImageError(
            f"Can't load {shown}: it has {mib(size)}, the guest's memory only {mib(memory)}. "
            "Give the guest more with --memory, or strip the image of its debug information."
        )
    if not data:
        raise ImageError(f"Can't load {shown}: it's empty. Build it again.")
    return shown, data


def _read(fd: int, limit: int) -> bytes:
    parts = []
    while limit > 0 and (part := os.read(fd, min(limit, layout.MIB))):
        parts.append(part)
        limit -= len(part)
    return b"".join(parts)


def _advice(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "Check its name."
    if isinstance(error, PermissionError):
        return "Make it readable (chmod +r), or run as a user who may read it."
    return "Check the file and the disk that it's on."


def mib(size: int) -> str:
    """A size for a person."""
    return f"{size} bytes" if size < layout.MIB else f"{size / layout.MIB:.4g} MiB"
