"""The bell: rings wake a sleeper in poll, once, from any thread; ending signals ring; ignored ones stay ignored."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

from app.bell import Bell


def rings(bell: Bell, timeout: float = 0) -> bool:
    return bool(select.select([bell], [], [], timeout)[0])


def test_a_ring_wakes_and_an_answer_silences() -> None:
    with Bell() as bell:
        assert not rings(bell)
        bell.ring()
        bell.ring()
        assert rings(bell)
        bell.answer()
        assert not rings(bell)
        bell.ring("news that a listener is told")
        assert rings(bell)


def test_no_ring_is_lost_between_threads() -> None:
    """Every change made before a ring is seen by a sleeper that answers first and looks then."""
    total, changes, seen = 2000, [], 0
    with Bell() as bell:

        def change() -> None:
            for number in range(total):
                changes.append(number)
                bell.ring()

        thread = threading.Thread(target=change)
        thread.start()
        while seen < total:
            assert rings(bell, 30), f"slept through a ring after {seen} of {total}"
            bell.answer()
            seen = len(changes)
        thread.join()


def test_a_late_ring_does_nothing() -> None:
    with Bell() as bell:
        pass
    bell.ring()


def test_ending_signals_ring_and_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Bell() as bell:
        with bell.ending_signals() as caught:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
            assert rings(bell, 30)
            assert caught == [signal.SIGTERM, signal.SIGHUP]
        assert signal.getsignal(signal.SIGTERM) is before


def test_what_nohup_ignores_stays_ignored() -> None:
    code = """
import os, signal
from app.bell import Bell
with Bell() as bell, bell.ending_signals() as caught:
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
    print(*caught)
"""
    as_nohup = f"""
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.executable, ["python", "-c", {code!r}])
"""
    done = subprocess.run(
        [sys.executable, "-c", as_nohup], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.split() == [str(int(signal.SIGTERM))], done.stderr
