"""Kills, full disks: the old file or the new one, whole."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kvm.backends.interface import System
from kvm.backends.software.system import SoftwareSystem
from kvm.errors import SnapshotError
from kvm.machine import Machine
from kvm.snapshot.file import Delta, Snapshot, read, write
from kvm.snapshot.notes import Parent
from tests.kvm.machines import COUNT, build
from tests.kvm.snapshot.crafted import memory_in, memory_of

MIB = 1 << 20
ROOT = Path(__file__).parents[3]

SAVER = """
import sys
from pathlib import Path
from kvm.backends.software.system import SoftwareSystem
from tests.kvm.machines import COUNT, build
folder, incremental = Path(sys.argv[1]), sys.argv[2] == "incremental"
machine = build(SoftwareSystem(), folder, COUNT, memory=8 << 20)
machine.save_file(folder / "base.vmdeck")
for number in range(1, 1_000_000):
    machine.load_file(folder / "base.vmdeck")
    machine.write_memory(0x100000, number.to_bytes(4, "little") * (1 << 20))
    print("begun", number, flush=True)
    machine.save_file(folder / "a.vmdeck", name=str(number), incremental=incremental,
                      progress=lambda done, total: print("written", 100 * done // total, flush=True))
    print("done", number, flush=True)
"""
KINDS = ("whole", "incremental")


def killed_while_saving(folder: Path, kind: str, rng: random.Random) -> str:
    """The file is whole afterwards, and not older than what was reported done. The last that the saver said."""
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, folder, kind], cwd=ROOT, stdout=subprocess.PIPE, bufsize=0
    )  # fmt: skip
    assert process.stdout is not None
    begun, took, done = 0.0, 0.0, 0
    for line in process.stdout:
        what, number = line.split()
        if what == b"begun":
            if done == 2:  # it has replaced a file before: now while it does so again, or soon after
                break
            begun = time.monotonic()
        elif what == b"done":
            took, done = time.monotonic() - begun, int(number)
    time.sleep(rng.uniform(0, 1.2 * took))  # the moment itself is what is random here
    process.send_signal(signal.SIGKILL)
    said = [line, *process.stdout.read().splitlines()]
    process.wait(20)
    done = max([done, *(int(each.split()[1]) for each in said if each.startswith(b"done"))])
    with read(folder / "a.vmdeck") as file:
        file.verify()
        number = int(file.head.name)
        assert (file.head.parent is not None) is (kind == "incremental")
    assert number in (done, done + 1)
    assert memory_in(folder / "a.vmdeck")[MIB : MIB + 4 * MIB] == number.to_bytes(4, "little") * MIB
    return said[-1].split()[0].decode() if said[-1] != b"written 100" else "all written"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_a_random_moment(tmp_path: Path, kind: str, seed: int) -> None:
    killed_while_saving(tmp_path, kind, random.Random(seed))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kill_9_at_200_random_moments(tmp_path: Path, kind: str) -> None:
    """All through the save: before the first byte, between two, before the new file has its name, and after."""
    rng = random.Random(200)
    stages = Counter(killed_while_saving(tmp_path, kind, rng) for _ in range(200))
    print(kind, dict(stages))
    assert stages.keys() == {"begun", "written", "all written", "done"}, stages


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A real tmpfs of ``size`` bytes; the test skips where we may not mount one."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a disk that fills up was not tested: {mounted.stderr.decode().strip()} (needs root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def leave(disk: Path, free: int) -> None:
    """Fill the disk up to so many bytes."""
    with open(disk / "ballast", "ab") as ballast:
        status = os.statvfs(disk)
        size = ballast.tell() + status.f_bavail * status.f_bsize - free
        ballast.truncate(size)
        if size:
            os.posix_fallocate(ballast.fileno(), 0, size)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fills_up_at_any_point_leaves_the_old_file_or_the_new_one(tmp_path: Path, kind: str) -> None:
    incremental = kind == "incremental"
    with (
        build(SoftwareSystem(), tmp_path, COUNT, memory=4 * MIB) as machine,
        small_disk(tmp_path / "disk", 8 * MIB) as disk,
    ):
        base, path = disk / "base.vmdeck", disk / "a.vmdeck"
        machine.save_file(base)
        machine.save_file(path, incremental=incremental)
        there, free, failures = memory_of(machine), 0, 0
        while True:
            machine.load_file(base)
            machine.write_memory(MIB, os.urandom(MIB))
            leave(disk, free)
            try:
                machine.save_file(path, incremental=incremental)
                break
            except SnapshotError:
                pass
            assert memory_in(path) == there
            assert set(disk.iterdir()) == {base, path, disk / "ballast"}
            free += 64 << 10
            failures += 1
        assert memory_in(path) == memory_of(machine)
        assert failures > 15, "from no byte of the memory to all but the head"


def test_a_full_disk_leaves_the_old_file(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, memory=16 * MIB) as machine, small_disk(tmp_path / "disk", 4 * MIB) as disk:
        path = disk / "a.vmdeck"
        path.write_bytes(b"the old file")
        machine.write_memory(MIB, os.urandom(8 * MIB))
        with pytest.raises(SnapshotError, match=os.strerror(errno.ENOSPC)):
            machine.save_file(path)
        assert path.read_bytes() == b"the old file"
        assert list(disk.iterdir()) == [path]
        machine.save_file(tmp_path / "elsewhere")
        assert memory_in(tmp_path / "elsewhere") == memory_of(machine)


def test_a_file_system_without_nameless_files_does_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS, some FUSE: the file has a name while it's written, which goes away when that fails."""
    monkeypatch.setattr(os, "O_TMPFILE", 0)
    folder = tmp_path / "saves"
    folder.mkdir()
    with build(SoftwareSystem(), tmp_path, COUNT, memory=4 * MIB) as machine:
        during: list[list[Path]] = []
        machine.write_memory(MIB, b"x")
        machine.save_file(folder / "a", progress=lambda done, total: during.append(list(folder.iterdir())))
        assert [path.suffix for path in during[0]] == [".part"]
        assert list(folder.iterdir()) == [folder / "a"]
        with pytest.raises(ZeroDivisionError):
            machine.save_file(folder / "a", progress=lambda done, total: 1 / 0)  # type: ignore[arg-type,return-value]
        assert list(folder.iterdir()) == [folder / "a"]
        assert memory_in(folder / "a") == memory_of(machine)


def after_a_failed_save(
    machine: Machine, folder: Path, disk: Path
) -> tuple[Path, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """A base, changes, an incremental save that fails; the base and RAM's index at the failure."""
    base = folder / "base.vmdeck"
    machine.write_memory(MIB, b"base")
    machine.save_file(base)
    machine.write_memory(2 * MIB, os.urandom(8 * MIB))
    with pytest.raises(SnapshotError):
        machine.save_file(disk / "lost.vmdeck", incremental=True)
    index, _ = machine._pages.take()
    return base, index


def test_15_a_failed_snapshot_loses_no_dirty_pages(system: System, tmp_path: Path) -> None:
    """FACTS 5, bug 15 (Firecracker #4545): the dirty log was read, the file never came to be."""
    with build(system, tmp_path, COUNT, memory=16 * MIB) as machine, small_disk(tmp_path / "disk", 4 * MIB) as disk:
        after_a_failed_save(machine, tmp_path, disk)
        machine.write_memory(12 * MIB, b"after the failure")
        machine.save_file(tmp_path / "again.vmdeck", incremental=True)
        assert memory_in(tmp_path / "again.vmdeck") == memory_of(machine)


def test_15_control_pages_dirty_since_the_failure_are_not_all(system: System, tmp_path: Path) -> None:
    """What a save writes that forgets: the file loads, and holds another machine."""
    with build(system, tmp_path, COUNT, memory=16 * MIB) as machine, small_disk(tmp_path / "disk", 4 * MIB) as disk:
        base, at_failure = after_a_failed_save(machine, tmp_path, disk)
        machine.write_memory(12 * MIB, b"after the failure")
        index, _ = machine._pages.take()
        with read(base) as file:
            delta = Delta(Parent(file.head.identity, base.name), np.flatnonzero(index != at_failure), False)
            snapshot = Snapshot(
                machine.config.memory, "", 0.0, "", "", "", file.head.state, machine._pages.hold(index), b"",
                machine.image,
            )  # fmt: skip
        write(tmp_path / "forgetful.vmdeck", snapshot, delta=delta)
        assert memory_in(tmp_path / "forgetful.vmdeck") != memory_of(machine)
