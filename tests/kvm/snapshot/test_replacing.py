"""Kills, full disks: the old file or the new one, whole."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kvm.backends.interface import System
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
folder = Path(sys.argv[1])
machine = build(SoftwareSystem(), folder, COUNT, memory=8 << 20)
for number in range(1, 1_000_000):
    machine.write_memory(0x100000, number.to_bytes(4, "little") * (1 << 20))
    machine.save_file(folder / "a.vmdeck", name=str(number))
    print(number, flush=True)
"""


def killed_while_saving(folder: Path, delay: float) -> None:
    """The file is whole afterwards, and not older than what was reported done."""
    process = subprocess.Popen([sys.executable, "-c", SAVER, folder], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.readline()
    time.sleep(delay)  # the moment itself is what is random here
    process.send_signal(signal.SIGKILL)
    done = int((first + process.stdout.read()).split()[-1])
    process.wait(20)
    with read(folder / "a.vmdeck") as file:
        file.verify()
        number = int(file.head.name)
    assert number in (done, done + 1)
    assert memory_in(folder / "a.vmdeck")[MIB : MIB + 4 * MIB] == number.to_bytes(4, "little") * MIB


@pytest.mark.parametrize("seed", range(6))
def test_kill_9_at_a_random_moment(tmp_path: Path, seed: int) -> None:
    killed_while_saving(tmp_path, random.Random(seed).uniform(0, 0.1))


@pytest.mark.slow
def test_kill_9_at_200_random_moments(tmp_path: Path) -> None:
    rng = random.Random(200)
    for _ in range(200):
        killed_while_saving(tmp_path, rng.uniform(0, 0.2))


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs where we may mount one; else no file may grow beyond ``size``, as on a disk that's full."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True)
    if mounted.returncode == 0:
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", folder], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_file(system: System, tmp_path: Path) -> None:
    with build(system, tmp_path, COUNT, memory=16 * MIB) as machine, small_disk(tmp_path / "disk", 4 * MIB) as disk:
        path = disk / "a.vmdeck"
        path.write_bytes(b"the old file")
        machine.write_memory(MIB, os.urandom(8 * MIB))
        with pytest.raises(SnapshotError, match=rf"{os.strerror(errno.ENOSPC)}|{os.strerror(errno.EFBIG)}"):
            machine.save_file(path)
        assert path.read_bytes() == b"the old file"
        assert list(disk.iterdir()) == [path]
        machine.save_file(tmp_path / "elsewhere")
        assert memory_in(tmp_path / "elsewhere") == memory_of(machine)


def test_a_file_system_without_nameless_files_does_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS, some FUSE: the file has a name while it's written, which goes away when that fails."""
    from kvm.backends.software.system import SoftwareSystem

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
                machine.config.memory, "", 0.0, "", "", "", file.head.state, machine._pages.contents(index), b"",
                machine.image,
            )  # fmt: skip
        write(tmp_path / "forgetful.vmdeck", snapshot, delta=delta)
        assert memory_in(tmp_path / "forgetful.vmdeck") != memory_of(machine)
