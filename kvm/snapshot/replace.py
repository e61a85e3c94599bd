"""Replacing a file so that it's the old or the new one, whole, whenever it's looked at: even after a power cut."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvm.errors import SnapshotError

StrPath = str | os.PathLike[str]
FileKey = tuple[int, int]
"""Device and inode: a file under whatever name."""


def file_key(status: os.stat_result) -> FileKey:
    """The file that was looked at."""
    return status.st_dev, status.st_ino


def key_of(path: StrPath) -> FileKey | None:
    """The file at ``path``, links followed; None if there is none."""
    try:
        return file_key(os.stat(path))
    except OSError:
        return None


def target(path: StrPath) -> Path:
    """Where a file written to ``path`` goes, links followed. Raises SnapshotError for what can't be one."""
    try:
        real = Path(os.path.realpath(path))
        there = real.lstat()
    except FileNotFoundError:
        there = None
    except (OSError, ValueError) as error:
        raise cant_write(path, error) from error
    if there is not None and not stat.S_ISREG(there.st_mode):
        raise SnapshotError(f"Can't write {os.fspath(path)}: it isn't a regular file. Name a file to write.")
    return real


@contextmanager
def replacing(path: StrPath, check: Callable[[Path], None]) -> Iterator[int]:
    """An fd to write to; at the block's end the file takes ``path``'s place, after ``check`` has had a last look there:
    at where ``path`` led in the beginning, links followed.

    An exception in the block leaves what was at ``path``, and nothing else. An OSError comes out as SnapshotError.
    """
    real = target(path)
    try:
        # Without a name until it's whole where the file system can: a kill -9 leaves nothing behind.
        fd, temporary = _nameless(real.parent)
        if fd < 0:
            temporary = _name(real)
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
    except OSError as error:
        raise cant_write(path, error) from error
    try:
        yield fd
        os.fsync(fd)
        check(real)
        if temporary is None:
            name = _name(real)
            # A folder's fd, unused as both names are absolute, makes Python call linkat, which follows /proc's link.
            with _folder(real.parent) as folder:
                os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=folder, follow_symlinks=True)
            temporary = name
        os.replace(temporary, real)
        temporary = None
        with _folder(real.parent) as folder:
            os.fsync(folder)  # the new name itself must survive a power cut
    except OSError as error:
        raise cant_write(path, error) from error
    finally:
        os.close(fd)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def cant_write(path: StrPath, error: Exception) -> SnapshotError:
    """What a failing write is to a person."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    advice = _ADVICE.get(
        getattr(error, "errno", None) or 0, "Free some space, or choose a folder that you can write to."
    )
    return SnapshotError(f"Can't write {os.fspath(path)}: {why}. What was there is as it was. {advice}")


_ADVICE = {
    errno.ENOENT: "There is no such folder: make it, or choose another.",
    errno.ENOTDIR: "A part of that path is a file: choose another.",
    errno.EISDIR: "There is a folder of that name: choose another.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EACCES: "Choose a folder that you can write to.",
    errno.EROFS: "Choose a folder that you can write to.",
}


def _nameless(folder: Path) -> tuple[int, str | None]:
    flags = getattr(os, "O_TMPFILE", 0)
    if flags and Path("/proc/self/fd").is_dir():
        try:
            return os.open(folder, os.O_RDWR | flags | os.O_CLOEXEC, 0o600), None
        except OSError:
            pass  # not on this file system, or no such folder: an ordinary file tells which
    return -1, None


def _name(real: Path) -> str:
    return str(real.with_name(f".{real.name[:200]}.{os.getpid()}.{os.urandom(4).hex()}.part"))


@contextmanager
def _folder(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        yield fd
    finally:
        os.close(fd)
