"""Guest-physical memory: the slots, and reading and writing them by guest-physical address."""

from __future__ import annotations

import errno
import mmap
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvm.backends.interface import PAGE_SIZE
from kvm.backends.software.engine import MAPPED_END
from kvm.errors import KvmError
from kvm.host_memory import anonymous, touched

_PIECE = 256
"""Pages: what is compared at a time stays in the processor's cache."""


@dataclass
class Slot:
    """Host memory, a private mapping, at a guest-physical address.

    ``shadow``: the contents, when dirty logging last looked, of the pages that were ``backed`` then; the others were
    as they had been mapped.
    """

    address: int
    memory: mmap.mmap
    readonly: bool
    bytes: NDArray[np.uint8] = field(init=False)
    view: memoryview = field(init=False)
    shadow: NDArray[np.uint64] | None = None
    backed: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.bytes = np.frombuffer(self.memory, dtype=np.uint8)
        self.view = memoryview(self.memory)
        self.size = len(self.memory)
        self.end = self.address + self.size

    @property
    def pointer(self) -> int:
        return int(self.bytes.ctypes.data)

    @property
    def pages(self) -> NDArray[np.uint64]:
        """The memory as rows of one page each."""
        return self.bytes.view(np.uint64).reshape(-1, PAGE_SIZE // 8)

    def log_dirty(self, on: bool) -> None:
        if not on:
            self.shadow = None
        elif self.shadow is None:
            self.shadow = np.frombuffer(anonymous(self.size), np.uint64).reshape(self.pages.shape)
            self.backed = np.zeros(len(self.pages), bool)
            self.dirty_pages()

    def dirty_pages(self) -> NDArray[np.int64]:
        if self.shadow is None:
            raise KvmError("KVM_GET_DIRTY_LOG", errno.ENOENT, detail="dirty logging is off for this slot")
        now, shadow = self.pages, self.shadow
        found = [np.empty(0, np.int64)]
        backed = touched(now)
        for first in range(0, len(backed), _PIECE):
            piece = backed[first : first + _PIECE]
            piece = piece[~self.backed[piece] | (now[piece] != shadow[piece]).any(axis=1)]
            shadow[piece] = now[piece]
            found.append(piece)
        self.backed[backed] = True
        return np.concatenate(found)

    def filled(self, pages: NDArray[np.int64]) -> None:
        """The host has written these pages, which makes them no more dirty than they were."""
        if self.shadow is not None:
            self.shadow[pages] = self.pages[pages]
            self.backed[pages] = True

    def release(self) -> None:
        """Let go of the host memory, so that its owner can close it."""
        self.view.release()
        self.shadow = None
        del self.bytes


class Slots:
    """The memory slots of one VM."""

    def __init__(self) -> None:
        self._by_number: dict[int, Slot] = {}
        self._sorted: list[Slot] = []

    def set(self, number: int, address: int, memory: mmap.mmap, *, readonly: bool, log_dirty: bool) -> bool:
        """Add a slot or change one's flags; True if the layout changed. Raises KvmError as the ioctl would."""
        size = len(memory)
        if address % PAGE_SIZE or size % PAGE_SIZE or not size or address + size > MAPPED_END:
            raise KvmError("KVM_SET_USER_MEMORY_REGION", errno.EINVAL, detail=f"slot {number}: {address:#x}+{size:#x}")
        old = self._by_number.get(number)
        if old is not None and old.memory is memory and old.address == address and old.readonly == readonly:
            old.log_dirty(log_dirty)
            return False
        others = [slot for slot in self._sorted if slot is not old]
        if any(slot.address < address + size and address < slot.end for slot in others):
            raise KvmError("KVM_SET_USER_MEMORY_REGION", errno.EEXIST, detail=f"slot {number} overlaps another")
        if old is not None:
            old.release()
        slot = Slot(address, memory, readonly)
        slot.log_dirty(log_dirty)
        self._by_number[number] = slot
        self._sorted = sorted([*others, slot], key=lambda slot: slot.address)
        return True

    def dirty_pages(self, number: int) -> NDArray[np.int64]:
        return self._slot(number).dirty_pages()

    def go_back(self, number: int, source: NDArray[np.uint8], places: NDArray[np.int64]) -> int:
        """See ``interface.Vm``; what the host wrote is seen like what the guest did."""
        slot = self._slot(number)
        pages = slot.dirty_pages()
        try:
            slot.pages[pages] = source.view(np.uint64)[places[pages]]
            slot.filled(pages)
        except BaseException:
            slot.backed[pages] = False  # they are dirty still
            raise
        return len(pages)

    def _slot(self, number: int) -> Slot:
        slot = self._by_number.get(number)
        if slot is None:
            raise KvmError("KVM_GET_DIRTY_LOG", errno.ENOENT, detail=f"no slot {number}")
        return slot

    def filled(self, pointer: int, pages: NDArray[np.int64]) -> None:
        """The host has written these pages of the memory that lies there, a slot's perhaps; KVM logs no such writes."""
        for slot in self._sorted:
            if slot.pointer == pointer:
                slot.filled(pages)

    def layout(self) -> list[tuple[int, int, int, bool]]:
        """As ``Engine.map`` wants it."""
        return [(slot.address, slot.size, slot.pointer, slot.readonly) for slot in self._sorted]

    def read(self, address: int, size: int) -> bytes:
        """Guest-physical memory; where there is none, ones."""
        for slot in self._sorted:
            if slot.address <= address and address + size <= slot.end:
                offset = address - slot.address
                return bytes(slot.view[offset : offset + size])
        return b"\xff" * size

    def write(self, address: int, data: bytes) -> None:
        """Write guest-physical memory; where there is none, or it is read-only, nothing happens."""
        for slot in self._sorted:
            if slot.address <= address and address + len(data) <= slot.end and not slot.readonly:
                offset = address - slot.address
                slot.view[offset : offset + len(data)] = data
                return

    def release(self) -> None:
        """Let go of all host memory."""
        for slot in self._sorted:
            slot.release()
        self._by_number.clear()
        self._sorted.clear()
