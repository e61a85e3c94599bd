"""A snapshot file with the files that it builds on, as one machine."""

from __future__ import annotations

import mmap
import os
import threading
from bisect import bisect
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np

from kvm.backends.interface import PAGE_SIZE
from kvm.boot.image import BootImage, Segment
from kvm.errors import SnapshotError
from kvm.snapshot.contents import SOURCE_SHIFT, Contents, Index, PageArray
from kvm.snapshot.file import Delta, Progress, Snapshot, SnapshotFile, Written, damaged, read, write
from kvm.snapshot.notes import Head
from kvm.snapshot.replace import FileKey, StrPath, key_of
from kvm.snapshot.state import MachineState
from kvm.x86 import layout

MAX_GENERATIONS = 256
_NO_STATE = MachineState((), {}, {})
"""An ancestor's, which nobody asks for: 255 of them may be a lot."""


@dataclass(frozen=True, eq=False)
class Chain:
    """``files`` from the one that holds everything to the one asked for. A context manager."""

    files: tuple[SnapshotFile, ...]

    @property
    def head(self) -> Head:
        """The head of the file that was asked for: its state is the machine's."""
        return self.files[-1].head

    @property
    def path(self) -> Path:
        return self.files[-1].path

    @property
    def keys(self) -> tuple[FileKey, ...]:
        return tuple(file.key for file in self.files)

    @property
    def state(self) -> MachineState:
        return self.head.state

    def sources(self, first: int = 1) -> dict[int, PageArray]:
        """Every file's pages, mapped, by source numbers from ``first`` on."""
        return {first + number: file.pages() for number, file in enumerate(self.files)}

    def index(self, first: int = 1) -> Index:
        """For every RAM page the number of its content in ``sources(first)``."""
        memory = self.head.memory
        # Anonymous memory, zero and untouched: 16 MiB of an 8 GiB machine's index are mostly never needed.
        try:
            index: Index = np.frombuffer(mmap.mmap(-1, memory // PAGE_SIZE * 8), np.int64)
        except OSError as error:
            raise SnapshotError(f"Can't map {self.path}: {error}. End something that takes memory.") from error
        for number, file in enumerate(self.files):
            base = first + number << SOURCE_SHIFT
            stored = file.stored()
            for extent in file.head.extents:
                page = page_number(memory, extent.address)
                if page is None:
                    continue
                place, count = (extent.offset - file.head.size) // PAGE_SIZE, extent.size // PAGE_SIZE
                if number:
                    index[page : page + count] = 0
                for start, end in _within(stored, place, place + count):
                    index[page + start - place : page + end - place] = np.arange(base + start, base + end)
        return index

    def contents(self) -> Contents:
        return Contents(self.index(), {0: np.zeros((1, PAGE_SIZE), np.uint8), **self.sources()})

    @cached_property
    def ram(self) -> list[mmap.mmap]:
        """RAM as the first file has it, mapped privately, for one machine."""
        return self.files[0].ram()

    def missing(self) -> Index:
        """The pages that the later files replace in ``ram``."""
        memory = self.head.memory
        later = np.zeros(memory // PAGE_SIZE, bool)
        for file in self.files[1:]:
            for extent in file.head.extents:
                if (page := page_number(memory, extent.address)) is not None:
                    later[page : page + extent.size // PAGE_SIZE] = True
        return np.flatnonzero(later)

    def rom(self) -> bytes:
        """What the ROM holds; as last written. Raises SnapshotError."""
        address = layout.ROM_END - self.head.rom
        for file in reversed(self.files):
            for extent in file.head.extents:
                if self.head.rom and extent.address == address:
                    return bytes(file.read_at(extent.offset, extent.size))
        return b""

    def image(self) -> BootImage:
        """The guest's image, for a reset. Raises SnapshotError."""
        stored = self.files[0].head.image
        assert stored is not None, "the first file of a chain has one"
        data, segments, at = memoryview(self.files[0].image_data()), [], 0
        for address, size, length in stored.segments:
            segments.append(Segment(address, bytes(data[at : at + length]), size))
            at += length
        return BootImage(stored.path, stored.format, tuple(segments), self.rom(), stored.entry)

    def snapshot(self, name: str, note: str) -> Snapshot:
        """It, to be written again under this name and note."""
        head = self.head
        return Snapshot(
            head.memory, head.backend, head.taken, head.why, name, note, head.state, self.contents(), self.rom(),
            self.image(),
        )  # fmt: skip

    def verify(self, progress: Progress = lambda done, total: None, cancel: threading.Event | None = None) -> None:
        """Check every file's memory. Raises SnapshotError, SnapshotCancelled."""
        sizes = [file.head.file_size - file.head.size for file in self.files]
        done = 0
        for file, size in zip(self.files, sizes, strict=True):
            before = done
            file.verify(lambda now, _, before=before: progress(before + now, sum(sizes)), cancel)  # type: ignore[misc]
            done += size

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> Chain:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _within(ranges: list[tuple[int, int]], first: int, end: int) -> Iterator[tuple[int, int]]:
    """What of the ascending ranges lies from ``first`` up to ``end``."""
    for number in range(max(bisect(ranges, (first, 0)) - 1, 0), len(ranges)):
        start, stop = max(ranges[number][0], first), min(ranges[number][1], end)
        if start >= end:
            return
        if start < stop:
            yield start, stop


def page_number(memory: int, address: int) -> int | None:
    """The number of the RAM page at a guest-physical address; None where there is no RAM."""
    first = 0
    for start, size in layout.ram(memory):
        if start <= address < start + size:
            return first + (address - start) // PAGE_SIZE
        first += size // PAGE_SIZE
    return None


def page_address(memory: int, page: int) -> int:
    """Where the RAM page of this number lies."""
    for start, size in layout.ram(memory):
        if page < size // PAGE_SIZE:
            return start + page * PAGE_SIZE
        page -= size // PAGE_SIZE
    raise IndexError(f"there is no page {page}")


def open_chain(path: StrPath) -> Chain:
    """Open a snapshot file and its ancestors, all their heads checked. Raises SnapshotError."""
    with ExitStack() as stack:
        files = [stack.enter_context(read(path))]
        while files[0].head.parent is not None:
            if len(files) == MAX_GENERATIONS:
                raise damaged(files[-1].path, f"it builds on more than {MAX_GENERATIONS - 1} others")
            parent = stack.enter_context(_find_parent(files[0]))
            head = parent.head = replace(parent.head, state=_NO_STATE)
            files.insert(0, parent)
            if (head.vcpus, head.memory, head.rom) != (files[1].head.vcpus, files[1].head.memory, files[1].head.rom):
                raise damaged(files[1].path, f"its parent {files[0].path} is of another machine")
        stack.pop_all()
        return Chain(tuple(files))


def _find_parent(child: SnapshotFile) -> SnapshotFile:
    """Where the child says, or under whatever name in the child's folder."""
    parent = child.head.parent
    assert parent is not None
    folder = Path(os.path.realpath(child.path)).parent
    named = folder / parent.path
    wrong = ""
    try:
        others = sorted(folder.iterdir())
    except OSError:
        others = []
    for path in (named, *(other for other in others if other != named)):
        if not _is_file(path):
            continue
        try:
            file = read(path)
        except SnapshotError as error:
            wrong = str(error) if path == named else wrong
            continue
        if file.head.identity == parent.identity:
            return file
        file.close()
    raise SnapshotError(
        f"Can't use {child.path}: it holds only what changed since {parent.path!r} (identity {parent.identity.hex()}), "
        f"which isn't there. {wrong or f'Put that file into {folder}.'}"
    )


def _is_file(path: Path) -> bool:
    """A path out of a file may be one that can't be looked at: too long, or through a folder that's closed to us."""
    try:
        return path.is_file()
    except OSError:
        return False


def identity_of(path: StrPath) -> bytes | None:
    """The identity of the snapshot at ``path``; None if there is none."""
    try:
        with read(path) as file:
            return file.head.identity
    except SnapshotError:
        return None


def parent_path(child: StrPath, parent: StrPath) -> str:
    """How the child names where its parent is."""
    return os.path.relpath(os.path.realpath(parent), os.path.dirname(os.path.realpath(child)))


def flatten(
    source: StrPath, path: StrPath, progress: Progress = lambda done, total: None, cancel: threading.Event | None = None
) -> Written:
    """Write a chain's last file anew as one that needs no other, checking memory first. Raises SnapshotError."""
    with open_chain(source) as chain:
        return rewrite(chain, path, chain.head.name, chain.head.note, progress, cancel)


def rewrite(
    chain: Chain, path: StrPath, name: str, note: str, progress: Progress, cancel: threading.Event | None
) -> Written:
    """A chain's last file anew, whole, under this name and note; memory is checked first. Raises SnapshotError."""
    chain.verify(progress, cancel)
    if key_of(path) in chain.keys[:-1]:
        raise SnapshotError(f"Can't write {path}: {chain.path} builds on it. Choose another name.")
    return write(path, chain.snapshot(name, note), progress=progress, cancel=cancel)


def relabel(
    path: StrPath,
    name: str,
    note: str,
    progress: Progress = lambda done, total: None,
    cancel: threading.Event | None = None,
) -> Written:
    """Give a snapshot file another name and note. It stays the same snapshot: its children still find it.

    Raises SnapshotError, SnapshotCancelled, the file as it was.
    """
    with open_chain(path) as chain:
        head = chain.head
        if head.parent is None:
            return rewrite(chain, path, name, note, progress, cancel)
        chain.verify(progress, cancel)
        pages = [
            np.arange(page, page + extent.size // PAGE_SIZE)
            for extent in head.extents
            if (page := page_number(head.memory, extent.address)) is not None
        ]
        changed: Index = np.concatenate(pages).astype(np.int64) if pages else np.empty(0, np.int64)
        rom = any(extent.address == layout.ROM_END - head.rom for extent in head.extents)
        return write(path, chain.snapshot(name, note), delta=Delta(head.parent, changed, rom))
