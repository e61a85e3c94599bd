"""The snapshot files of a session: those it saved or loaded, and what they build on; and what is typed to name one."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from kvm.errors import ConfigError, SnapshotError
from kvm.snapshot.chain import open_chain
from kvm.snapshot.file import read
from kvm.snapshot.notes import Head

SUFFIX = ".vmdeck"
SHOWN_NAMES = 8
"""Names that the prompt's help line has room for."""


@dataclass(frozen=True, slots=True)
class ShelfFile:
    """One file. ``stored``: bytes of the disk that it takes; ``parent`` the identity that it builds on."""

    path: Path
    identity: bytes
    parent: bytes | None
    name: str
    note: str
    taken: float
    stored: int
    rips: tuple[int, ...]


def look(path: Path) -> tuple[ShelfFile, ...]:
    """This file and those that it builds on, oldest first. Raises SnapshotError."""
    with open_chain(path) as chain:
        paths = [file.path for file in chain.files]
    return tuple(map(_described, paths))  # read anew: of its ancestors a chain keeps no state


def _described(path: Path) -> ShelfFile:
    with read(path) as file:
        head, stored = file.head, file.on_disk
    return ShelfFile(
        path=Path(os.path.realpath(path)),
        identity=head.identity,
        parent=head.parent.identity if head.parent else None,
        name=head.name,
        note=head.note,
        taken=head.taken,
        stored=stored,
        rips=head.state.position,
    )


class Shelf:
    """What is shown, in the order in which it came. The UI thread's."""

    def __init__(self) -> None:
        self._files: dict[bytes, ShelfFile] = {}

    @property
    def files(self) -> Sequence[ShelfFile]:
        return tuple(self._files.values())

    def put(self, files: Sequence[ShelfFile]) -> None:
        """These are there now, whatever their paths held before."""
        paths = {file.path for file in files}
        new = {file.identity: file for file in files}
        self._files = {key: file for key, file in self._files.items() if file.path not in paths or key in new} | new

    def take_away(self, path: str) -> None:
        """Off the shelf; the file stays where it is."""
        self._files = {key: file for key, file in self._files.items() if str(file.path) != path}

    def find(self, path: str) -> ShelfFile | None:
        """The one at this path; None if it has been taken away."""
        return next((file for file in self._files.values() if str(file.path) == path), None)


def suggestion(image: str, promised: Collection[Path]) -> str:
    """A name that nothing here has, nor will have once what is ``promised`` is written."""
    stem = Path(image).stem or "machine"
    names = (Path(f"{stem}-{number}{SUFFIX}") for number in count(1))
    return str(next(name for name in names if name not in promised and not os.path.exists(name)))


def target(text: str) -> Path:
    """Where a typed name leads. Raises ConfigError for what would overwrite anything but a snapshot."""
    path = _path(text)
    _replaced(path, text)
    return path


def _replaced(path: Path, text: str) -> Head | None:
    """The snapshot that would be overwritten; None if there is nothing. Raises ConfigError for anything else."""
    if os.path.isdir(path):
        raise ConfigError(f"{text} is a folder. Name a file in it.")
    if not os.path.exists(path):
        return None
    try:
        with read(path) as file:
            return file.head
    except SnapshotError:
        raise ConfigError(f"{text} is there, and is no snapshot of vmdeck's. Choose another name.") from None


def source(text: str) -> Path:
    """The snapshot that a typed name means. Raises ConfigError, SnapshotError."""
    path = _path(text)
    read(path).close()
    return path


def _path(text: str) -> Path:
    if not text.strip():
        raise ConfigError("Which file? Type its name; Tab completes it.")
    return Path(os.path.expanduser(text.strip()))  # Path's own raises for a user that there isn't


def words(text: str) -> list[str]:
    """What Tab completes a path to: names in its folder, folders with a slash; hidden ones if asked for."""
    folder, _, start = text.rpartition("/")
    shown = f"{folder}/" if "/" in text else ""
    try:
        with os.scandir(os.path.expanduser(shown or ".")) as entries:
            return sorted(
                f"{shown}{entry.name}{'/' if entry.is_dir() else ''}"
                for entry in entries
                if entry.name.startswith(start) and (start or not entry.name.startswith("."))
            )
    except (OSError, ValueError):
        return []


def _when(head: Head) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(head.taken))


def help_saving(text: str, *, running: bool) -> str:
    """While a name to save to is typed: what Enter does."""
    try:
        path = _path(text)
        replaced = _replaced(path, text)
    except ConfigError as error:
        return str(error)
    if replaced is not None:
        return f"Enter replaces the snapshot of {_when(replaced)} in it. Esc doesn't."
    if not os.path.isdir(path.parent):
        return f"There is no folder {path.parent}."
    return "Enter saves; the guest runs on meanwhile." if running else "Enter saves the machine there."


def help_loading(text: str) -> str:
    """While a name to load is typed: what is there, or what can be completed to."""
    if text.strip() and os.path.isfile(_path(text)):
        try:
            with read(_path(text)) as file:
                head = file.head
        except SnapshotError as error:
            return str(error)
        return f"{_when(head)}, {head.vcpus} VCPUs, {head.memory >> 20} MiB, {head.backend}: Enter goes there."
    names = [word.removesuffix("/").rpartition("/")[2] + "/" * word.endswith("/") for word in words(text)]
    return "  ".join(names[:SHOWN_NAMES]) + " …" * (len(names) > SHOWN_NAMES) if names else "There is no such file."
