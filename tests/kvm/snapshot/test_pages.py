"""The page store against the plainest model there is: whole copies of RAM."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, multiple, rule

from kvm.backends.interface import PAGE_SIZE
from kvm.backends.software.system import SoftwareSystem
from kvm.errors import MachineError
from kvm.memory import Memory
from kvm.snapshot import pages
from kvm.snapshot.pages import PageStore

PAGES = 256


class Store(RuleBasedStateMachine):
    kept = Bundle("kept")

    def __init__(self) -> None:
        super().__init__()
        self.system = SoftwareSystem()
        self.vm = self.system.create_vm()
        self.memory = Memory(self.vm, PAGES * 4096, b"")
        self.store = PageStore(self.memory)
        self.indices: list[pages.Index] = []

    def teardown(self) -> None:
        self.vm.close()
        self.system.close()

    def ram(self) -> bytes:
        return self.memory.read(0, PAGES * 4096)

    @rule(page=st.integers(0, PAGES - 1), byte=st.integers(0, 255), count=st.integers(1, 9000))
    def host_writes(self, page: int, byte: int, count: int) -> None:
        address = page * 4096
        self.memory.write(address, bytes([byte]) * min(count, PAGES * 4096 - address))

    @rule(page=st.integers(0, PAGES - 1), byte=st.integers(0, 255))
    def guest_writes(self, page: int, byte: int) -> None:
        self.memory.ram[0].memory[page * 4096 + 17] = byte

    @rule()
    def get_ready(self) -> None:
        self.store.get_ready()

    @rule(target=kept)
    def take(self) -> tuple[pages.Index, bytes]:
        index, _ = self.store.take()
        self.indices.append(index)
        return index, self.ram()

    @rule(target=kept, checkpoint=kept)
    def put_back(self, checkpoint: tuple[pages.Index, bytes]) -> object:
        index, ram = checkpoint
        self.store.put_back(index)
        assert self.ram() == ram
        return multiple()

    @rule(target=kept, checkpoint=kept)
    def a_failed_put_back_loses_nothing(self, checkpoint: tuple[pages.Index, bytes]) -> object:
        real, self.store._contents = self.store._contents, np.empty((0, PAGE_SIZE), np.uint8)
        with suppress(IndexError):
            self.store.put_back(checkpoint[0])
        self.store._contents = real
        return self.put_back(checkpoint)

    @rule(checkpoint=consumes(kept))
    def forget(self, checkpoint: tuple[pages.Index, bytes]) -> None:
        self.indices = [index for index in self.indices if index is not checkpoint[0]]
        self.store.keep_only(self.indices)

    @rule(checkpoint=kept)
    def a_failed_take_loses_nothing(self, checkpoint: tuple[pages.Index, bytes]) -> None:
        """Bug 15 of FACTS: the dirty log was emptied, then the copy failed."""
        real, self.store._allocate = self.store._allocate, no_memory  # type: ignore[method-assign]
        with pytest.raises(MachineError, match="nothing was lost"):
            self.store.take()
        self.store._allocate = real  # type: ignore[method-assign]


def no_memory(count: int) -> pages.Pages:
    raise MemoryError


TestStore = Store.TestCase
TestStore.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_a_second_checkpoint_costs_its_changed_pages_only() -> None:
    vm = SoftwareSystem().create_vm()
    memory = Memory(vm, PAGES * 4096, b"")
    store = PageStore(memory)
    memory.write(0, b"x" * 4096 * 20)
    assert store.take()[1] == 20
    memory.write(5 * 4096, b"y")
    first, count = store.take()
    assert count == 1
    assert store.put_back(first) == 0
    assert len(np.unique(first)) == 21  # 20 of its own and the zero page
    vm.close()


def test_forgotten_contents_are_used_again() -> None:
    vm = SoftwareSystem().create_vm()
    memory = Memory(vm, PAGES * 4096, b"")
    store = PageStore(memory)
    for turn in range(50):
        memory.write(0, bytes([turn + 1]) * 4096 * 30)
        index, _ = store.take()
        store.keep_only([index])
    assert len(store._contents) <= 128
    vm.close()
