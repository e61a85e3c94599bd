"""The console log: positions, its bound, and waiting."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from kvm.devices.console import Console


def test_a_reader_gets_everything_once() -> None:
    console = Console()
    console.write(b"ab")
    first, position = console.since(0)
    console.put(ord("c"))
    assert (first, console.since(position), console.total) == (b"ab", (b"c", 3), 3)


@given(st.lists(st.binary(max_size=20)), st.integers(0, 300))
def test_what_fell_out_of_the_log_is_skipped(writes: list[bytes], position: int) -> None:
    console = Console(limit=16)
    for data in writes:
        console.write(data)
    written = b"".join(writes)
    kept = max(position, len(written) - 16)
    assert console.since(position) == (written[kept:], len(written))


def test_a_log_never_holds_much_more_than_its_limit() -> None:
    console = Console(limit=1000)
    for _ in range(10_000):
        console.put(0)
    assert len(console._log) <= 1250


def test_wait_sees_output_that_is_there_and_gives_up_if_none_comes() -> None:
    console = Console()
    console.write(b"x")
    assert console.wait(0, 0)
    assert not console.wait(1, 0)


def test_wait_wakes_up_as_a_byte_comes() -> None:
    console = Console()
    answers: list[bool] = []
    waiter = threading.Thread(target=lambda: answers.append(console.wait(0, 30)))
    waiter.start()
    console.put(1)
    waiter.join(30)
    assert answers == [True]


def test_listeners_hear_of_every_write_and_may_read_at_once() -> None:
    console = Console()
    heard: list[bytes] = []
    console.listen(lambda: heard.append(console.since(0)[0]))
    console.write(b"ab")
    console.put(ord("c"))
    assert heard == [b"ab", b"abc"]
