"""How threads hand work over: no ring is lost, whichever comes first."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from kvm.backends.interface import Bell
from kvm.backends.kernel.bell import FutexBell
from kvm.backends.kernel.library import missing
from kvm.backends.software.bell import QueueBell

extension = pytest.mark.skipif(missing != "", reason=f"the extension is not built: {missing}")
each = pytest.mark.parametrize("kind", [QueueBell, pytest.param(FutexBell, marks=extension)])


@each
def test_what_was_rung_before_the_wait_counts_once(kind: Callable[[], Bell]) -> None:
    bell = kind()
    assert not bell.wait(0.001)
    bell.ring()
    assert bell.wait()
    assert not bell.wait(0.001)


@each
def test_two_threads_that_ring_each_other_never_miss_it(kind: Callable[[], Bell]) -> None:
    there, back = kind(), kind()
    seen = []

    def answer() -> None:
        while len(seen) < 5000:
            assert there.wait(20)
            seen.append(len(seen))
            back.ring()

    thread = threading.Thread(target=answer)
    thread.start()
    for number in range(5000):
        there.ring()
        assert back.wait(20)
        assert len(seen) == number + 1
    thread.join(20)
    assert not thread.is_alive()
