"""Snapshot files beside a C program that writes as many bytes, and beside QEMU on the same /dev/kvm.

Half of a 128 MiB machine's memory is random bytes; everything goes to a folder on the disk that tests run on.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvm.backends.kernel.system import KernelSystem
from kvm.machine import Machine, Phase, Status
from kvm.snapshot.file import read
from tests.bench.__main__ import HERE, MEMORY, line, machine
from tests.kvm.machines import COUNT, build

MIB = 1 << 20
USED = 64 * MIB
ROUNDS = 7


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
        stood: list[float] = []

        def save(path: Path, *, incremental: bool = False) -> float:
            path.unlink(missing_ok=True)
            os.sync()
            start = time.perf_counter()

            def resumed(status: Status) -> None:
                if status.phase is Phase.RUNNING:
                    stood.append((time.perf_counter() - start) * 1e6)

            m.subscribe(resumed)
            try:
                return _timed(lambda: m.save_file(path, incremental=incremental))
            finally:
                m._listeners.remove(resumed)

        print(
            f"  first save (all pages copied): {save(folder / 'a') / 1e3:.1f} ms, guest stood {stood[-1] / 1e3:.1f} ms"
        )
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
        print(f"  the guest stood {statistics.median(stood[1:]):.0f} µs of it")

        def small(number: int) -> float:
            m.write_memory(20 * MIB, os.urandom(10 * 4096))
            m.run()
            return save(folder / f"delta{number}", incremental=True)

        pairs = [(small(number), bare(10 * 4096 + 65536)) for number in range(ROUNDS)]
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
            start = time.perf_counter()
            m, _ = Machine.from_file(system, folder / "a")
            with m:
                m.step(0)
                return (time.perf_counter() - start) * 1e6

        def fresh() -> float:
            start = time.perf_counter()
            with build(system, folder, COUNT, memory=memory) as m:
                m.step(0)
                return (time.perf_counter() - start) * 1e6

        line(f"file to first instruction, {memory // MIB} MiB; a new machine", _median(restore), _median(fresh))
        with read(folder / "a") as file:
            print(f"  checking all its memory: {_timed(file.verify) / 1e3:.1f} ms")
    system.close()


class Qmp:
    """QEMU's monitor."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        for _ in range(200):
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                time.sleep(0.05)
        self._lines = self._socket.makefile("r")
        self._lines.readline()
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: Any) -> Any:
        self._socket.sendall(json.dumps({"execute": name, "arguments": arguments}).encode())
        while "return" not in (answer := json.loads(self._lines.readline())):
            if "error" in answer:
                raise RuntimeError(answer["error"]["desc"])
        return answer["return"]

    def monitor(self, text: str) -> None:
        if answer := self.command("human-monitor-command", **{"command-line": text}):
            raise RuntimeError(answer)


@contextmanager
def _qemu(folder: Path) -> Iterator[Qmp]:
    (folder / "random").write_bytes(os.urandom(USED))
    (folder / "boot").write_bytes(COUNT.ljust(510, b"\0") + b"\x55\xaa")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "disk", "1G"], check=True)
    process = subprocess.Popen([
        "qemu-system-x86_64", "-accel", "kvm", "-m", str(MEMORY // MIB), "-nodefaults", "-display", "none",
        "-drive", f"file={folder / 'boot'},format=raw,if=floppy,snapshot=on", "-drive",
        f"file={folder / 'disk'},format=qcow2,if=none", "-device",
        f"loader,file={folder / 'random'},addr={16 * MIB:#x},force-raw=on", "-qmp", f"unix:{folder / 'qmp'},server=on",
    ])  # fmt: skip
    try:
        yield Qmp(folder / "qmp")
    finally:
        process.kill()
        process.wait()


def qemu() -> None:
    """QEMU's savevm and loadvm of a machine of that size with as much in it, against ours."""
    with tempfile.TemporaryDirectory(dir=HERE) as name, machine(COUNT, 1, MEMORY) as m:
        folder = Path(name)
        _fill(m)
        m.run()
        m.save_file(folder / "ours")
        with _qemu(folder) as other:
            time.sleep(1)  # its BIOS
            saves = [_timed(lambda: other.monitor("savevm a")) for _ in range(3)]
            line("save; QEMU's savevm", _median(lambda: _timed(lambda: m.save_file(folder / "ours"))),
                 statistics.median(saves))  # fmt: skip
            loads = [_timed(lambda: other.monitor("loadvm a")) for _ in range(3)]
            line("load of a file; QEMU's loadvm", _median(lambda: _loaded(m, folder)), statistics.median(loads))
            checkpoint = m.checkpoint()
            m.write_memory(16 * MIB, bytes(10 * 4096))
            m.run()
            back = _median(lambda: _timed(lambda: m.restore(checkpoint)))
            line("restore of a checkpoint; QEMU's loadvm", back, statistics.median(loads))


def _loaded(m: Machine, folder: Path) -> float:
    taken = _timed(lambda: m.load_file(folder / "ours"))
    m.files.wait_checked()
    return taken


ALL = {"files": files, "qemu": qemu}

if __name__ == "__main__":
    for work in ALL.values():
        work()
