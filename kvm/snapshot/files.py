"""The snapshot files that a running machine comes from and goes to."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash

from kvm.boot.image import BootImage
from kvm.config import MachineConfig
from kvm.errors import MachineError, SnapshotError, SnapshotMismatch
from kvm.memory import Memory
from kvm.snapshot import convert
from kvm.snapshot.chain import Chain, identity_of, parent_path
from kvm.snapshot.contents import Index, PageArray
from kvm.snapshot.file import Delta, Progress, Snapshot, Written, write
from kvm.snapshot.notes import Parent
from kvm.snapshot.pages import PageStore
from kvm.snapshot.replace import FileKey, StrPath, key_of
from kvm.snapshot.state import MachineState, check
from kvm.x86 import layout
from kvm.x86.substates import Substate, Table


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """The file that the machine was last saved to or loaded from: what an incremental one builds on."""

    path: str
    identity: bytes
    index: Index
    keys: tuple[FileKey, ...]
    """The files of its chain, itself last."""
    identities: tuple[bytes, ...]
    """Theirs: a file that was renamed or got another note since is another inode."""
    image: BootImage
    rom: bytes
    """The ROM's digest."""


@dataclass(frozen=True, slots=True, eq=False)
class Mapped:
    """A chain, mapped: ``ram`` is what the RAM regions are to be, but for the ``missing`` pages of later files."""

    chain: Chain
    image: BootImage
    ram: Sequence[mmap.mmap]
    index: Index
    sources: Mapping[int, PageArray]
    missing: Index


class MachineFiles:
    """For whoever holds the machine's lock, but for ``write``, which works beside the running guest."""

    def __init__(
        self, config: MachineConfig, memory: Memory, pages: PageStore, table: Table, rows: Sequence[Substate]
    ) -> None:
        """The machine's: ``table`` is of its VCPUs' substates, ``rows`` are its own."""
        self._config = config
        self._memory = memory
        self._pages = pages
        self._table = table
        self._rows = rows
        self._saved: Saved | None = None
        self._mapped: dict[int, FileKey] = {}
        self._ram: tuple[FileKey, ...] = ()
        """The files that RAM itself is mapped from."""
        self._next_source = 1
        self._checker: threading.Thread | None = None
        self._stop_checking = threading.Event()

    @property
    def saved(self) -> Saved | None:
        """What an incremental file would build on."""
        return self._saved

    def check_target(self, path: StrPath, *, incremental: bool) -> None:
        """Raise SnapshotError where writing to ``path`` would destroy what the machine, or the new file, needs."""
        key = key_of(path)
        mapped = {self._mapped[source] for source in self._pages.files} | set(self._ram)
        chain: Sequence[object] = (*self._saved.keys, *self._saved.identities) if self._saved else ()
        own: Sequence[object] = (self._saved.keys[-1], self._saved.identities[-1]) if self._saved else ()
        shown = os.fspath(path)
        if incremental and self._saved is None:
            raise SnapshotError(
                f"Can't save to {shown} what changed: the machine has no file yet. Save it whole first."
            )
        if key is not None and key in mapped:
            raise SnapshotError(f"Can't save to {shown}: the machine's memory is mapped from it. Choose another name.")
        there = (key, identity_of(path))
        if any(it in chain and (incremental or it not in own) for it in there):
            raise SnapshotError(f"Can't save to {shown}: the machine's last file builds on it. Choose another name.")

    def write(
        self,
        path: StrPath,
        snapshot: Snapshot,
        parent: Saved | None,
        progress: Progress,
        cancel: threading.Event | None,
        lock: threading.RLock,
    ) -> Written:
        """Write the file; it's what the next incremental one builds on, if this succeeds. Raises SnapshotError.

        ``snapshot``'s index is held by the caller until then. ``lock`` is the machine's, taken only for that.
        """
        index, delta = snapshot.contents.index, None
        rom = xxhash.xxh3_128_digest(snapshot.rom)
        if parent is not None:
            named = Parent(parent.identity, parent_path(path, parent.path))
            delta = Delta(named, np.flatnonzero(index != parent.index), rom != parent.rom)

        def still_allowed(replaced: Path) -> None:
            with lock:
                self.check_target(replaced, incremental=parent is not None)

        written = write(path, snapshot, delta=delta, progress=progress, cancel=cancel, check=still_allowed)
        with lock:
            keys = (*(parent.keys if parent else ()), written.key)
            names = (*(parent.identities if parent else ()), written.identity)
            real = os.path.realpath(path)
            self._build_on(Saved(real, written.identity, index, keys, names, snapshot.image, rom))
        return written

    def fit(
        self,
        chain: Chain,
        fresh: MachineState,
        *,
        told: Sequence[bytes] | None,
        drop: bool,
    ) -> tuple[MachineState, tuple[str, ...]]:
        """The chain's state for this machine, and what it loses. ``fresh``: what it holds after machine init.

        ``told``: each VCPU's CPUID if the guest ran: what it was told of its processor stands, wherever it came from.
        Raises SnapshotError, SnapshotMismatch unless ``drop`` says to do without.
        """
        head = chain.head
        shapes = (
            ("VCPUs", head.vcpus, self._config.vcpus),
            ("bytes of memory", head.memory, self._config.memory),
            ("bytes of ROM", head.rom, len(self._memory.rom)),
        )
        if differing := [f"{theirs} {what}, this machine {ours}" for what, theirs, ours in shapes if theirs != ours]:
            raise SnapshotError(
                f"Can't load {chain.path}: it has {'; '.join(differing)}. Start a machine from it: vmdeck run --restore"
            )
        if told is not None:
            pairs = zip(fresh.vcpus, told, strict=True)
            fresh = replace(fresh, vcpus=tuple({**each, "cpuid": cpuid} for each, cpuid in pairs))
        try:
            state, losses = convert.fit(chain.state, self._table, self._rows, fresh, ran=told is not None)
            check(state, self._table, self._rows, head.vcpus)
        except (ValueError, MachineError) as error:
            raise SnapshotError(f"Can't load {chain.path}: {error}. Use another snapshot.") from error
        if losses and not drop:
            raise SnapshotMismatch(
                f"Can't carry all of {chain.path} ({head.backend!r}) over. It would lose\n  "
                + "\n  ".join(losses) + "\nLoad it with --drop (drop=True) to go on without.", losses,
            )  # fmt: skip
        return state, losses

    def map(self, chain: Chain) -> Mapped:
        """Everything of a chain that the machine will hold, so that taking it can't fail. Raises SnapshotError."""
        first, self._next_source = self._next_source, self._next_source + len(chain.files)
        return Mapped(chain, chain.image(), chain.ram, chain.index(first), chain.sources(first), chain.missing())

    def put_behind(self, mapped: Mapped) -> Callable[[], None]:
        """Put the file's RAM behind the machine's; what comes back puts all memory back as it was.

        Every VCPU stands. Raises KvmError, all as it was.
        """
        rom, settled = self._memory.rom, self._pages.settled()
        ram = self._memory.replace_ram(mapped.ram)

        def put_back() -> None:
            self._memory.replace_ram(ram)
            self._pages.revert(settled)
            self._write_rom(rom)

        return put_back

    def fill_in(self, mapped: Mapped) -> None:
        """Once its RAM is behind the machine's: the pages that later files of the chain hold, and the ROM."""
        self._pages.adopt(mapped.index, mapped.sources, mapped.missing)
        self._write_rom(mapped.image.rom)

    def _write_rom(self, rom: bytes) -> None:
        self._memory.write(layout.ROM_END - len(rom), rom)

    def adopt(self, mapped: Mapped) -> None:
        """The machine has taken it: build on it."""
        chain = mapped.chain
        known = self._mapped | dict(zip(mapped.sources, chain.keys, strict=True))
        self._mapped = {source: known[source] for source in self._pages.files}
        self._ram = chain.keys[:1]
        rom = xxhash.xxh3_128_digest(mapped.image.rom)
        path = os.path.realpath(chain.path)
        names = tuple(file.head.identity for file in chain.files)
        self._build_on(Saved(path, chain.head.identity, mapped.index, chain.keys, names, mapped.image, rom))

    def check_later(self, chain: Chain, damaged: Callable[[SnapshotError], None]) -> None:
        """Verify the chain's memory on a thread, and close it; ``damaged`` hears of what doesn't match."""
        self.stop_checking()
        stop = self._stop_checking = threading.Event()

        def work() -> None:
            with chain:
                try:
                    chain.verify(cancel=stop)
                except SnapshotError as error:
                    if not stop.is_set():
                        damaged(error)

        self._checker = threading.Thread(target=work, name="snapshot checksums", daemon=True)
        self._checker.start()

    def stop_checking(self) -> None:
        """End the thread that ``check_later`` started."""
        self._stop_checking.set()
        if self._checker is not None and self._checker is not threading.current_thread():
            self._checker.join()
        self._checker = None

    def wait_checked(self) -> None:
        """Wait until the memory of what was loaded is verified."""
        if self._checker is not None:
            self._checker.join()

    def _build_on(self, saved: Saved) -> None:
        if self._saved is not None:
            self._pages.release(self._saved.index)
        self._pages.hold(saved.index)
        self._saved = saved
