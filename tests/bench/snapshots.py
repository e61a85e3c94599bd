"""Snapshot files beside a C program that writes as many bytes, and beside QEMU on the same /dev/kvm.

``python -m tests.bench.snapshots [files] [qemu]`` prints a table. Needs /dev/kvm and gcc; for QEMU, qemu-system-x86 and
qemu-utils. Half of a 128 MiB machine's memory is random bytes; all goes to a folder on the disk that tests run on.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvm.backends.interface import PAGE_SIZE
from kvm.backends.kernel.system import KernelSystem
from kvm.machine import Machine, Phase, Status
from kvm.snapshot.file import read
from tests.bench.__main__ import HERE, MEMORY, line, machine
from tests.kvm.machines import COUNT, build
from tests.parity.qemu import Qemu

MIB = 1 << 20
USED = 64 * MIB
ROUNDS = 7
SETTLED = 0.2
"""Seconds after which the kernel has taken a closed VM apart: until then it holds up the memory slots of a new one."""


def _median(work: Callable[[], float]) -> float:
    return statistics.median(work() for _ in range(ROUNDS))


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e6


def _fill(m: Machine) -> None:
    for address in range(16 * MIB, 16 * MIB + USED, MIB):
        m.write_memory(address, os.urandom(MIB))


def files() -> None:
    """Save and restore, against a bare write of the same bytes and fsync, each to a new file."""
    with tempfile.TemporaryDirectory(dir=HERE) as name, machine(COUNT, 1, MEMORY) as m:
        folder = Path(name)
        writer = folder / "write"
        subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-o", writer, HERE / "write.c"], check=True)

        def bare(size: int) -> float:
            (folder / "bare").unlink(missing_ok=True)
            os.sync()
            done = subprocess.run([writer, folder / "bare", str(size)], check=True, capture_output=True, timeout=60)
            return float(json.loads(done.stdout)["write"])

        _fill(m)
        m.run()
        stopped: list[float] = []
        stood: list[float] = []
        stop_all = m._stop_all

        def stop() -> float:
            stopped.append(time.perf_counter())
            return stop_all()

        m._stop_all = stop  # type: ignore[method-assign]

        def resumed(status: Status) -> None:
            if status.phase is Phase.RUNNING and stopped:
                stood.append((time.perf_counter() - stopped[-1]) * 1e6)

        m.subscribe(resumed)

        def save(path: Path, *, incremental: bool = False) -> float:
            path.unlink(missing_ok=True)
            os.sync()
            return _timed(lambda: m.save_file(path, incremental=incremental))

        first = save(folder / "a") / 1e3
        print(f"  first save (all memory copied): {first:.1f} ms, the guest stood {stood[-1]:.0f} µs of it")
        stored = m.save_file(folder / "a").stored
        pairs = [(save(folder / "b"), bare(stored)) for _ in range(ROUNDS)]
        line("save whole, 64 of 128 MiB used", *(statistics.median(side) for side in zip(*pairs, strict=True)))
        m.pause()
        pairs = [(save(folder / "b"), bare(stored)) for _ in range(ROUNDS)]
        line(
            "  the same while the guest leaves us its core",
            *(statistics.median(side) for side in zip(*pairs, strict=True)),
        )
        m.run()
        print(f"  the guest stood {statistics.median(stood[1 : ROUNDS + 1]):.0f} µs of it")

        def small(number: int) -> float:
            m.write_memory(20 * MIB, os.urandom(10 * PAGE_SIZE))
            m.run()
            return save(folder / f"delta{number}", incremental=True)

        pairs = [(small(number), bare(10 * PAGE_SIZE + 65536)) for number in range(ROUNDS)]
        line("save incrementally, 10 pages", *(statistics.median(side) for side in zip(*pairs, strict=True)))
        print(f"  the guest stood {statistics.median(stood[-ROUNDS:]):.0f} µs of it")

    for memory in (MEMORY, 2048 * MIB, 8192 * MIB):
        restored(memory)


def restored(memory: int) -> None:
    """From a file to the first guest instruction, in a new machine, beside building one from an image."""
    system = KernelSystem()
    with tempfile.TemporaryDirectory(dir=HERE) as name:
        folder = Path(name)
        with build(system, folder, COUNT, memory=memory) as m:
            _fill(m)
            m.save_file(folder / "a")

        def restore() -> float:
            time.sleep(SETTLED)
            start = time.perf_counter()
            m, _ = Machine.from_file(system, folder / "a")
            with m:
                m.step(0)
                return (time.perf_counter() - start) * 1e6

        def fresh() -> float:
            time.sleep(SETTLED)
            start = time.perf_counter()
            with build(system, folder, COUNT, memory=memory) as m:
                m.step(0)
                return (time.perf_counter() - start) * 1e6

        line(f"file to first instruction, {memory // MIB} MiB; a new machine", _median(restore), _median(fresh))
        with read(folder / "a") as file:
            print(f"  checking all its memory: {_timed(file.verify) / 1e3:.1f} ms")
    system.close()


@contextmanager
def _qemu(folder: Path) -> Iterator[Qemu]:
    """Its guest counts for ever too, and has as much in its memory."""
    (folder / "random").write_bytes(os.urandom(USED))
    (folder / "boot").write_bytes(COUNT.ljust(510, b"\0") + b"\x55\xaa")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "disk", "1G"], check=True)
    with Qemu(
        "-accel", "kvm", "-m", str(MEMORY // MIB),
        "-drive", f"file={folder / 'boot'},format=raw,if=floppy,snapshot=on",
        "-drive", f"file={folder / 'disk'},format=qcow2,if=none",
        "-device", f"loader,file={folder / 'random'},addr={16 * MIB:#x},force-raw=on",
    ) as other:  # fmt: skip
        other.command("migrate-set-parameters", **{"max-bandwidth": 1 << 40})  # it takes 128 MiB/s otherwise
        other.cont()
        time.sleep(1)  # its BIOS
        yield other


def _monitor(other: Qemu, text: str) -> None:
    if answer := other.command("human-monitor-command", **{"command-line": text}):
        raise RuntimeError(answer)


def _migrated(other: Qemu, path: Path) -> float:
    """Microseconds that the migration into a file takes; nobody syncs that."""
    path.unlink(missing_ok=True)
    os.sync()
    start = time.perf_counter()
    other.command("migrate", uri=f"exec:cat > {path}")
    while (status := other.command("query-migrate")["status"]) != "completed":
        if status == "failed":
            raise RuntimeError("QEMU's migration failed")
        time.sleep(0.0005)
    took = (time.perf_counter() - start) * 1e6
    other.cont()
    return took


def _saved_by(other: Qemu) -> float:
    """Another snapshot in its disk image, where nothing was before: as ours is a new file."""
    os.sync()
    return _timed(lambda: _monitor(other, f"savevm {os.urandom(4).hex()}"))


def qemu() -> None:
    """QEMU's savevm, migrate and loadvm of a machine of that size with as much in it, against ours, by turns."""
    with tempfile.TemporaryDirectory(dir=HERE) as name, machine(COUNT, 1, MEMORY) as m:
        folder = Path(name)
        _fill(m)
        m.run()
        m.save_file(folder / "ours")
        checkpoint = m.checkpoint()

        def save() -> float:
            (folder / "ours").unlink(missing_ok=True)
            os.sync()
            return _timed(lambda: m.save_file(folder / "ours"))

        def load() -> float:
            took = _timed(lambda: m.load_file(folder / "ours"))
            m.files.wait_checked()
            return took

        def restore() -> float:
            m.write_memory(16 * MIB, bytes(10 * PAGE_SIZE))
            m.run()
            time.sleep(0.002)  # it's under way, as QEMU's guest is
            return _timed(lambda: m.restore(checkpoint))

        def restore_standing() -> float:
            m.write_memory(16 * MIB, bytes(10 * PAGE_SIZE))
            return _timed(lambda: m.restore(checkpoint))

        with _qemu(folder) as other:
            _monitor(other, "savevm b")

            def loadvm() -> float:
                return _timed(lambda: _monitor(other, "loadvm b"))

            def loadvm_standing() -> float:
                other.stop()
                took = loadvm()
                other.cont()
                return took

            for what, ours, theirs in (
                ("restore, 10 pages dirty; QEMU's loadvm", restore, loadvm),
                ("  the same while the guests stand", restore_standing, loadvm_standing),
                ("load of a file; QEMU's loadvm", load, loadvm),
                ("save; QEMU's savevm", save, lambda: _saved_by(other)),
                ("save; QEMU's migrate to a file", save, lambda: _migrated(other, folder / "theirs")),
            ):
                pairs = []
                for _ in range(ROUNDS):
                    other.stop()  # its guest would take a core of what ours is measured on, and the other way round
                    m.run()
                    took = ours()
                    m.pause()
                    other.cont()
                    pairs.append((took, theirs()))
                line(what, *(statistics.median(side) for side in zip(*pairs, strict=True)))


ALL = {"files": files, "qemu": qemu}

if __name__ == "__main__":
    for name in sys.argv[1:] or list(ALL):
        ALL[name]()
