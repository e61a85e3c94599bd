"""Guest memory: RAM and ROM as host mappings, their slots, and which pages have changed.

A *page number* here counts the RAM's 4 KiB pages through all RAM regions, from 0, holes left out. ROM can't change
and isn't counted.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvm.backends.interface import PAGE_SIZE, Vm
from kvm.errors import CalledOff, ConfigError, KvmError, MemoryAccessError
from kvm.host_memory import anonymous
from kvm.x86 import layout

Pages = NDArray[np.int64]
SEARCHED = 256 << 10
"""Bytes that are searched at a time: less than a millisecond, in which no other thread of ours runs."""


def union(some: Pages, others: Pages) -> Pages:
    """The numbers that are in either, ascending. (The first np.union1d imports masked arrays: 10 ms of a restore.)"""
    both = np.concatenate((some, others))
    both.sort()
    new = np.ones(len(both), bool)
    np.not_equal(both[1:], both[:-1], out=new[1:])
    return both[new]


def _host_memory(size: int) -> mmap.mmap:
    try:
        return anonymous(size)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"The host gives no {size >> 20} MiB for guest memory ({error}). Ask for less with --memory."
        ) from error


@dataclass(eq=False)
class Region:
    """One slot: ``size`` bytes of host memory at a guest-physical ``address``."""

    slot: int
    address: int
    memory: mmap.mmap
    readonly: bool
    first_page: int
    """The page number of its first page (RAM only)."""
    host_wrote: set[int] = field(default_factory=set)
    """Pages of the region that the host wrote: the backend's dirty log doesn't know of them."""
    _marking: threading.Lock = field(default_factory=threading.Lock)
    """Devices write while a running guest's dirty pages are collected."""

    def __post_init__(self) -> None:
        self.size = len(self.memory)
        self.pages = np.frombuffer(self.memory, dtype=np.uint8).reshape(-1, PAGE_SIZE)

    def write(self, start: int, data: bytes) -> None:
        """Write at an offset. Marked when it's there: a page that is collected before is collected again."""
        self.memory[start : start + len(data)] = data
        with self._marking:
            self.host_wrote.update(range(start // PAGE_SIZE, (start + len(data) - 1) // PAGE_SIZE + 1))

    def take_marks(self) -> set[int]:
        """The pages that the host wrote since the last call."""
        with self._marking:
            marks, self.host_wrote = self.host_wrote, set()
        return marks


class Memory:
    """The guest's physical memory, for whoever holds the machine's lock; reads may race with the guest.

    ``dma_read`` and ``dma_write`` are for devices, on VCPUs' threads.
    """

    def __init__(self, vm: Vm, size: int, rom: bytes, ram: Sequence[mmap.mmap] = ()) -> None:
        """``size`` bytes of RAM, in two parts around the MMIO hole if it doesn't fit below; ``rom`` ends at 4 GiB.

        ``ram``: the parts that are there already, mapped from a file; what is written to them is logged from the start.
        """
        self._vm = vm
        self.size = size
        self.ram: list[Region] = []
        ranges = layout.ram(size)
        first = 0
        for (address, length), memory in zip(ranges, ram or [_host_memory(part) for _, part in ranges], strict=True):
            self.ram.append(Region(len(self.ram), address, memory, False, first))
            first += length // PAGE_SIZE
        self.regions = list(self.ram)
        if rom:
            region = Region(2, layout.ROM_END - len(rom), _host_memory(len(rom)), True, 0)
            region.memory[:] = rom
            self.regions.append(region)
        self._logging = bool(ram)
        for region in self.regions:
            log = self._logging and not region.readonly
            vm.set_memory(region.slot, region.address, region.memory, readonly=region.readonly, log_dirty=log)

    @property
    def page_count(self) -> int:
        return self.size // PAGE_SIZE

    @property
    def rom(self) -> bytes:
        """What the ROM holds now."""
        return b"".join(bytes(region.memory) for region in self.regions if region.readonly)

    def read(self, address: int, size: int) -> bytes:
        """``size`` bytes at a guest-physical address. Raises MemoryAccessError where there is no memory."""
        return _joined(self._spans(self.regions, address, size, "read"))

    def peek(self, address: int, size: int) -> bytes:
        """As ``read``, but empty where there is no memory for all of them. Fit for ``kvm.x86.paging``."""
        try:
            return self.read(address, size)
        except MemoryAccessError:
            return b""

    def find(
        self,
        data: bytes,
        start: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
        cancel: threading.Event | None = None,
    ) -> int | None:
        """The guest-physical address where ``data`` next lies in RAM or ROM, from ``start`` on; None if it doesn't.

        ``progress``: bytes searched, bytes to search. Raises CalledOff once ``cancel`` is set.
        """
        regions = sorted((r for r in self.regions if r.address + r.size > start), key=lambda r: r.address)
        spans = [(region, max(start - region.address, 0)) for region in regions]
        total = sum(region.size - at for region, at in spans)
        done = 0
        for region, first in spans:
            for at in range(first, region.size, SEARCHED):
                progress(done, total)
                if cancel is not None and cancel.is_set():
                    raise CalledOff(f"The search was called off at guest-physical {region.address + at:#x}.")
                found = bytes(memoryview(region.memory)[at : at + SEARCHED + len(data) - 1]).find(data)
                if found >= 0:
                    return region.address + at + found
                done += min(SEARCHED, region.size - at)
        return None

    def write(self, address: int, data: bytes) -> None:
        """Write into guest memory, ROM too. Raises MemoryAccessError, having written nothing, where there is none."""
        _fill(list(self._spans(self.regions, address, len(data), "write")), data)
        self._vm.memory_changed()

    def dma_read(self, address: int, size: int) -> bytes | None:
        """As ``read``, of RAM alone; None where there is none."""
        try:
            return _joined(self._spans(self.ram, address, size, "read"))
        except MemoryAccessError:
            return None

    def dma_write(self, address: int, data: bytes) -> bool:
        """As ``write``, to RAM alone; False where there is none. Code that it replaces isn't dropped: a VCPU runs."""
        try:
            spans = list(self._spans(self.ram, address, len(data), "write"))
        except MemoryAccessError:
            return False
        _fill(spans, data)
        return True

    def zero(self, address: int, size: int) -> None:
        """Write zeros, a piece at a time: an image's bss may be most of the memory."""
        piece = 1 << 20
        for offset in range(0, size, piece):
            self.write(address + offset, bytes(min(piece, size - offset)))

    def replace_ram(self, memory: Sequence[mmap.mmap]) -> list[mmap.mmap]:
        """Put other host memory of the same sizes behind the RAM, its dirty log on and empty; what was there before.

        Every VCPU stands. Raises KvmError, all as it was.
        """
        self._logging = True
        before = [region.memory for region in self.ram]
        try:
            self._put_behind(memory)
        except KvmError:
            self._put_behind(before)
            raise
        return before

    def _put_behind(self, memory: Sequence[mmap.mmap]) -> None:
        for region, mapping in zip(self.ram, memory, strict=True):
            self._vm.set_memory(region.slot, region.address, mapping, log_dirty=True)
            region.memory = mapping
            region.take_marks()
            region.__post_init__()
        self._vm.memory_changed()

    def start_log(self) -> None:
        """From now on ``dirty_pages`` tells what was written. The first page log costs the guest write faults."""
        if not self._logging:
            for region in self.ram:
                self._vm.set_memory(region.slot, region.address, region.memory, log_dirty=True)
                region.take_marks()
            self._logging = True

    def dirty_pages(self) -> Pages:
        """The numbers of the pages written, by guest or host, since the last call; ascending."""
        found = []
        for region in self.ram:
            pages = self._vm.dirty_pages(region.slot)
            if marks := region.take_marks():
                pages = union(pages, np.fromiter(marks, np.int64, len(marks)))
            found.append(pages + region.first_page if region.first_page else pages)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def go_back(self, contents: NDArray[np.uint8], places: Pages) -> int:
        """Give every page that was written since the last look at the log ``contents[places[page]]``; how many those
        were. Nothing is dirty then. Every VCPU stands, and with it the devices that write."""
        count = 0
        for region in self.ram:
            there = places[region.first_page :][: len(region.pages)] if len(self.ram) > 1 else places
            count += self._vm.go_back(region.slot, region.host_wrote, contents, there)
            if region.host_wrote:
                region.take_marks()
        return count

    def _by_region(self, pages: Pages) -> Iterable[tuple[Region, Pages, slice]]:
        """Ascending page numbers split by region: the region, their numbers within it, their place in ``pages``."""
        if len(self.ram) == 1:  # the usual machine, and the hot path of a restore
            yield self.ram[0], pages, slice(None)
            return
        for region in self.ram:
            last = region.first_page + len(region.pages)
            start, stop = np.searchsorted(pages, (region.first_page, last))
            if stop > start:
                yield region, pages[start:stop] - region.first_page, slice(int(start), int(stop))

    def put_pages(self, pages: Pages, contents: NDArray[np.uint8], places: Pages) -> None:
        """Fill the pages, ascending numbers, with ``contents[places]``; the dirty log doesn't learn of it."""
        for region, local, part in self._by_region(pages):
            self._vm.copy_pages(region.pages, local, contents, places[part])
        self._vm.memory_changed()

    def get_pages(self, pages: Pages, contents: NDArray[np.uint8], places: Pages) -> None:
        """The other way round: ``contents[places]`` from the pages."""
        for region, local, part in self._by_region(pages):
            self._vm.copy_pages(contents, places[part], region.pages, local)

    @staticmethod
    def _spans(regions: Sequence[Region], address: int, size: int, doing: str) -> Iterator[_Span]:
        end = address + size
        while address < end:
            region = next((r for r in regions if r.address <= address < r.address + r.size), None)
            if region is None:
                raise MemoryAccessError(f"Can't {doing} at guest-physical {address:#x}: there is no memory.")
            start = address - region.address
            count = min(end - address, region.size - start)
            yield region, start, count
            address += count


_Span = tuple[Region, int, int]
"""A region, an offset in it, a number of bytes."""


def _joined(spans: Iterable[_Span]) -> bytes:
    return b"".join(bytes(memoryview(region.memory)[start : start + count]) for region, start, count in spans)


def _fill(spans: Iterable[_Span], data: bytes) -> None:
    done = 0
    for region, start, count in spans:
        region.write(start, data[done : done + count])
        done += count
