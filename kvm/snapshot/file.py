"""The snapshot file, written and read whole; FORMAT.md has its layout.

``write`` replaces the file at once or not at all. ``read`` checks and decodes the whole head before it gives anything
out; memory is mapped, and checked by :meth:`SnapshotFile.verify`.
"""

from __future__ import annotations

import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash

from kvm.backends.interface import PAGE_SIZE
from kvm.boot.image import BootImage
from kvm.errors import SnapshotCancelled, SnapshotError
from kvm.host_memory import anonymous
from kvm.snapshot import core, notes, vmcoreinfo
from kvm.snapshot.contents import SOURCE_SHIFT, Contents, Index, PageArray
from kvm.snapshot.core import Extent
from kvm.snapshot.notes import CHUNK, Damaged, Draft, Head, Parent, StoredImage
from kvm.snapshot.replace import FileKey, StrPath, file_key, replacing
from kvm.snapshot.state import MachineState
from kvm.x86 import layout

Progress = Callable[[int, int], None]
"""Told of bytes done and bytes in all, now and then, on the thread that works."""

CHUNK_PAGES = CHUNK // PAGE_SIZE
_ZERO_CHECKSUM = xxhash.xxh3_64_intdigest(bytes(CHUNK))
_EARLY = 4 << 20
"""Bytes after which their writing to the disk is begun."""
_MAX_RUNS = 16384
"""Memory segments of an incremental file; the closest are joined beyond that. Debuggers take their time for many."""
_TAIL = 1 << 20
"""The source number, for one write, of what isn't RAM: ROM and the guest's image."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A machine to be written. ``rom`` is what its ROM holds now; ``memory`` in bytes."""

    memory: int
    backend: str
    taken: float
    why: str
    name: str
    note: str
    state: MachineState
    contents: Contents
    rom: bytes
    image: BootImage


@dataclass(frozen=True, slots=True)
class Written:
    """The identity that a child names, which file it is, its size in bytes and how many of them were written."""

    identity: bytes
    key: FileKey
    size: int
    stored: int


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """What an incremental file holds: the RAM pages that differ from the parent's, ascending; ROM if it does."""

    parent: Parent
    pages: Index
    rom: bool


def write(
    path: StrPath,
    snapshot: Snapshot,
    *,
    delta: Delta | None = None,
    progress: Progress = lambda done, total: None,
    cancel: threading.Event | None = None,
    check: Callable[[Path], None] = lambda replaced: None,
) -> Written:
    """Write the file; what is at ``path`` stays until all is on the disk, when ``check`` may still refuse.

    Raises SnapshotError, SnapshotCancelled.
    """
    pieces = list(_whole(snapshot) if delta is None else _changed(snapshot, delta))
    image, data = (None, b"") if delta else _stored_image(snapshot.image)
    tail = np.frombuffer(snapshot.rom + data + bytes(-len(data) % PAGE_SIZE), np.uint8).reshape(-1, PAGE_SIZE)
    places = np.arange(len(tail), dtype=np.int64) + (_TAIL << SOURCE_SHIFT)
    rom_pages = len(snapshot.rom) // PAGE_SIZE
    if rom_pages and (delta is None or delta.rom):
        pieces.append((layout.ROM_END - len(snapshot.rom), places[:rom_pages]))
        pieces.sort(key=lambda piece: piece[0])
    numbers = np.concatenate([*(numbers for _, numbers in pieces), places[rom_pages:]])
    contents = Contents(numbers, {**snapshot.contents.sources, _TAIL: tail})
    draft = Draft(
        len(snapshot.state.vcpus), snapshot.memory, len(snapshot.rom), snapshot.backend, snapshot.taken, snapshot.why,
        snapshot.name, snapshot.note, delta.parent if delta else None, image, snapshot.state,
        tuple((address, len(numbers) * PAGE_SIZE) for address, numbers in pieces),
        -(-len(numbers) // CHUNK_PAGES), len(numbers),
        vmcoreinfo.offered(snapshot.state, snapshot.contents, snapshot.memory),
    )  # fmt: skip
    try:
        size = notes.head_size(draft)
    except ValueError as error:
        raise SnapshotError(f"Can't write {os.fspath(path)}: {error}. Make it smaller.") from error
    if size > notes.MAX_HEAD:
        raise SnapshotError(
            f"Can't write {os.fspath(path)}: its headers would have {size >> 20} MiB, more than a reader takes."
        )
    with replacing(path, check) as fd:
        os.ftruncate(fd, size + len(numbers) * PAGE_SIZE)
        chunks, stored = _write_pages(fd, size, contents, progress, cancel, path)
        head, identity = notes.pack(draft, chunks)
        _write_all(fd, memoryview(head), 0)
        key = file_key(os.fstat(fd))
    return Written(identity, key, size + len(numbers) * PAGE_SIZE, size + stored)


def _whole(snapshot: Snapshot) -> Iterator[tuple[int, Index]]:
    """Address and page contents of each piece of the file: all RAM."""
    first = 0
    for address, size in layout.ram(snapshot.memory):
        count = size // PAGE_SIZE
        yield address, snapshot.contents.index[first : first + count]
        first += count


def _changed(snapshot: Snapshot, delta: Delta) -> Iterator[tuple[int, Index]]:
    """The same of the changed pages alone."""
    ranges = layout.ram(snapshot.memory)
    first = 0
    for address, size in ranges:
        count = size // PAGE_SIZE
        here = delta.pages[(delta.pages >= first) & (delta.pages < first + count)]
        for start, stop in runs(here, _MAX_RUNS // len(ranges)):
            yield address + (start - first) * PAGE_SIZE, snapshot.contents.index[start:stop]
        first += count


def runs(pages: Index, limit: int) -> list[tuple[int, int]]:
    """Ascending numbers as at most ``limit`` (start, stop) ranges that hold them, and as little else as that takes."""
    if not len(pages):
        return []
    gaps = np.diff(pages)
    breaks = np.flatnonzero(gaps > 1)
    if len(breaks) >= limit:
        breaks = np.sort(breaks[np.argsort(gaps[breaks], kind="stable")[-(limit - 1) :]])
    starts = pages[np.concatenate(([0], breaks + 1))]
    stops = pages[np.concatenate((breaks, [len(pages) - 1]))] + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _stored_image(image: BootImage) -> tuple[StoredImage, bytes]:
    segments = tuple((segment.address, segment.size, len(segment.data)) for segment in image.segments)
    data = b"".join(segment.data for segment in image.segments)
    return StoredImage(image.path, image.format, image.entry, len(data), segments), data


def _write_pages(
    fd: int, start: int, contents: Contents, progress: Progress, cancel: threading.Event | None, path: StrPath
) -> tuple[np.ndarray[tuple[int], np.dtype[np.uint64]], int]:
    """Zero pages stay holes. The chunks' checksums, and the bytes written."""
    numbers = contents.index
    total = len(numbers)
    chunks = np.full(-(-total // CHUNK_PAGES), _ZERO_CHECKSUM, np.uint64)
    room = np.empty((CHUNK_PAGES, PAGE_SIZE), np.uint8)
    stored = 0
    on_its_way = start
    for chunk, first in enumerate(range(0, total, CHUNK_PAGES)):
        if cancel is not None and cancel.is_set():
            raise SnapshotCancelled(f"Writing {os.fspath(path)} was called off. What was there is as it was.")
        here = numbers[first : first + CHUNK_PAGES]
        if len(here) == CHUNK_PAGES and not here.any():
            continue
        pages = contents.read(here, room)
        chunks[chunk] = xxhash.xxh3_64_intdigest(pages)
        for begin, end in runs(np.flatnonzero(pages.view(np.uint64).any(axis=1)), CHUNK_PAGES):
            _write_all(fd, memoryview(pages[begin:end]).cast("B"), start + (first + begin) * PAGE_SIZE)
            stored += (end - begin) * PAGE_SIZE
        end_of_chunk = start + (first + CHUNK_PAGES) * PAGE_SIZE
        if end_of_chunk - on_its_way >= _EARLY:
            _start_writeback(fd, on_its_way, end_of_chunk - on_its_way)
            on_its_way = end_of_chunk
        progress(first * PAGE_SIZE, total * PAGE_SIZE)
    progress(total * PAGE_SIZE, total * PAGE_SIZE)
    return chunks, stored


def _start_writeback(fd: int, offset: int, size: int) -> None:
    """Have the disk begin with these bytes while the next ones are got ready: the fsync has that much less to wait for.

    Linux starts to write what is dirty, and drops only what isn't (mm/fadvise.c).
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


# Reading


class SnapshotFile:
    """A snapshot file, open, its head read and checked. A context manager; ``close`` it in any case."""

    def __init__(self, path: Path, fd: int, head: Head) -> None:
        self.path = path
        self.head = head
        self.key = file_key(os.fstat(fd))
        self._fd = fd

    def verify(self, progress: Progress = lambda done, total: None, cancel: threading.Event | None = None) -> None:
        """Check memory against its checksums. Raises SnapshotError with the place, SnapshotCancelled."""
        head = self.head
        room = bytearray(CHUNK)
        total = head.file_size - head.size
        data = head.size
        for number, offset in enumerate(range(head.size, head.file_size, CHUNK)):
            if cancel is not None and cancel.is_set():
                raise SnapshotCancelled(f"Checking {self.path} was called off.")
            size = min(CHUNK, head.file_size - offset)
            expected = int(head.chunks[number])
            if data < offset + size:
                data = self._next_data(offset)
            if data >= offset + size and size == CHUNK:
                found = _ZERO_CHECKSUM
            else:
                view = memoryview(room)[:size]
                self._read_into(view, offset)
                found = xxhash.xxh3_64_intdigest(view)
            if found != expected:
                raise damaged(self.path, f"{self._what(offset)} doesn't match its checksum")
            progress(offset + size - head.size, total)

    def pages(self) -> PageArray:
        """The file's pages from the head's end on, mapped, read-only."""
        size = self.head.file_size - self.head.size
        if not size:
            return np.empty((0, PAGE_SIZE), np.uint8)
        try:
            mapping = mmap.mmap(self._fd, size, access=mmap.ACCESS_READ, offset=self.head.size)
        except (OSError, ValueError) as error:
            raise SnapshotError(f"Can't map {self.path}: {error}. Copy it to a local disk.") from error
        return np.frombuffer(mapping, np.uint8).reshape(-1, PAGE_SIZE)

    def ram(self) -> list[mmap.mmap]:
        """The RAM ranges, each mapped privately: pages are read as they're touched, writes stay in memory.

        Copied where that could fail as the guest runs.
        """
        ranges = {address for address, _ in layout.ram(self.head.memory)}
        extents = [extent for extent in self.head.extents if extent.address in ranges]
        if _holes_take_space(self._fd):
            return [self._copied(extent) for extent in extents]
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        try:
            return [
                mmap.mmap(self._fd, extent.size, flags=flags, prot=protection, offset=extent.offset)
                for extent in extents
            ]
        except (OSError, ValueError) as error:
            raise SnapshotError(f"Can't map {self.path}: {error}. Copy it to a local disk.") from error

    def _copied(self, extent: Extent) -> mmap.mmap:
        """Its stored pages in anonymous memory."""
        try:
            memory = anonymous(extent.size)
        except (OSError, OverflowError) as error:
            raise SnapshotError(f"No memory for {self.path}: {error}. Close something else, and try again.") from error
        first = (extent.offset - self.head.size) // PAGE_SIZE
        for start, stop in self.stored():
            start, stop = max(start - first, 0), min(stop - first, extent.size // PAGE_SIZE)
            if start < stop:
                view = memoryview(memory)[start * PAGE_SIZE : stop * PAGE_SIZE]
                self._read_into(view, extent.offset + start * PAGE_SIZE)
        return memory

    def stored(self) -> list[tuple[int, int]]:
        """The pages, counted from the head's end, that aren't known to be zero without reading: (first, end) ranges."""
        head, found = self.head, []
        at = head.size
        while (data := self._next_data(at)) < head.file_size:
            try:
                hole = self._next_hole(data)
            except OSError as error:
                raise damaged(self.path, f"{error.strerror} at {data:#x}") from error
            at = min(-(-hole // PAGE_SIZE) * PAGE_SIZE, head.file_size)
            found.append(((data - head.size) // PAGE_SIZE, (at - head.size) // PAGE_SIZE))
        return found

    def image_data(self) -> bytearray:
        """What the stored guest image's segments hold, checked. Raises SnapshotError."""
        image = self.head.image
        assert image is not None, "the first file of a chain has one"
        return self.read_at(self.head.size + sum(extent.size for extent in self.head.extents), image.size)

    def read_at(self, offset: int, size: int) -> bytearray:
        """So many of the file's bytes, every chunk that they touch checked. Raises SnapshotError."""
        start = self.head.size
        data, room = bytearray(size), memoryview(bytearray(CHUNK))
        for number in range((offset - start) // CHUNK, -(-(offset + size - start) // CHUNK)):
            at = start + number * CHUNK
            chunk = room[: self.head.file_size - at]
            self._read_into(chunk, at)
            if xxhash.xxh3_64_intdigest(chunk) != int(self.head.chunks[number]):
                raise damaged(self.path, f"{self._what(at)} doesn't match its checksum")
            part = chunk[max(offset - at, 0) : offset + size - at]
            place = max(at - offset, 0)
            data[place : place + len(part)] = part
        return data

    @property
    def on_disk(self) -> int:
        """Bytes that it takes of the disk: holes are free."""
        status = os.fstat(self._fd)
        return getattr(status, "st_blocks", -(-status.st_size // 512)) * 512

    def close(self) -> None:
        """Let go of the file; what is mapped of it stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> SnapshotFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next_data(self, offset: int) -> int:
        """Where, from ``offset`` on, something is stored; the file's size if nothing is."""
        if not hasattr(os, "SEEK_DATA"):
            return offset
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError:
            return self.head.file_size

    def _next_hole(self, offset: int) -> int:
        return os.lseek(self._fd, offset, os.SEEK_HOLE) if hasattr(os, "SEEK_HOLE") else self.head.file_size

    def _read_into(self, view: memoryview, offset: int) -> None:
        while view:
            try:
                count = os.preadv(self._fd, [view], offset)
            except OSError as error:
                raise damaged(self.path, f"{error.strerror} at {offset:#x}") from error
            if not count:
                raise damaged(self.path, f"it ends at {offset:#x}")
            view, offset = view[count:], offset + count

    def _what(self, offset: int) -> str:
        for extent in self.head.extents:
            if extent.offset <= offset < extent.offset + extent.size:
                return f"guest memory from {extent.address + offset - extent.offset:#x} (file offset {offset:#x})"
        return f"the guest's image (file offset {offset:#x})"


def _holes_take_space(fd: int) -> bool:
    """Is it on a tmpfs? A hole that is read through a mapping gets a page there; on a full one the reader SIGBUS."""
    device = os.fstat(fd).st_dev
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    return any(mount.split()[2] == number and " - tmpfs " in mount for mount in mounts)


def read(path: StrPath) -> SnapshotFile:
    """Open a snapshot file; its head is read, checked and decoded, at most 64 MiB. Raises SnapshotError."""
    shown = Path(path)
    fd = _open(shown)
    try:
        size = os.fstat(fd).st_size
        start = os.pread(fd, core.EHDR.size, 0)
        head = notes.head_bytes(start, size)
        while len(start) < head:
            part = os.pread(fd, head - len(start), len(start))
            if not part:
                raise Damaged(f"it's cut off after {len(start)} bytes")
            start += part
            head = max(head, notes.head_bytes(start, size))
        return SnapshotFile(shown, fd, notes.unpack(start))
    except (Damaged, OSError) as error:
        os.close(fd)
        raise damaged(shown, str(error)) from error
    except BaseException:
        os.close(fd)
        raise


def _open(path: Path) -> int:
    # O_NONBLOCK: opening a FIFO that nobody writes to would wait for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        fd = os.open(path, flags)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise SnapshotError(f"Can't open {path}: {why}. Check its name and its permissions.") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SnapshotError(f"Can't open {path}: it isn't a regular file. Name a snapshot file.")
    return fd


def damaged(path: Path, why: str) -> SnapshotError:
    """The error for a file that isn't what it should be."""
    return SnapshotError(f"Can't use {path}: {why}. Use another snapshot, or a copy of this one.")
