"""``vmdeck snapshot``: what is in snapshot files, without a machine."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from app.size import show_size
from kvm.errors import SnapshotError

if TYPE_CHECKING:
    from kvm.snapshot.file import SnapshotFile

SAME, DIFFERENT, FAILED = 0, 1, 2
_QUIET = 0.5
"""Seconds before a person is told how far it is."""
_BYTES_SHOWN = 16


def add_commands(commands: argparse._SubParsersAction[Any], kind: type[argparse.ArgumentParser]) -> None:
    """Add ``snapshot`` and what it can do to the command line's parser; ``kind`` is the parsers' class."""
    parser = commands.add_parser("snapshot", help="list, show, compare, flatten and verify snapshot files")
    actions: argparse._SubParsersAction[Any] = parser.add_subparsers(required=True, metavar="ACTION", parser_class=kind)

    def action(name: str, command: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = actions.add_parser(name, help=help)
        made.set_defaults(command=command)
        return made

    made = action("list", _list, "a line a file, children under their parents")
    made.add_argument("files", metavar="FILE", nargs="+", type=Path, help="snapshot files, or folders of them")
    made = action("info", _info, "everything about each file but its memory")
    made.add_argument("files", metavar="FILE", nargs="+", type=Path)
    made = action("diff", _diff, "registers, devices and memory that differ; exit code 1 if anything does")
    made.add_argument("a", metavar="A", type=Path)
    made.add_argument("b", metavar="B", type=Path)
    made.add_argument("--lines", metavar="N", type=int, default=100, help="of memory, at most (default: 100)")
    made = action("flatten", _flatten, "write an incremental snapshot as a file that needs no other")
    made.add_argument("file", metavar="FILE", type=Path)
    made.add_argument("to", metavar="NEW", type=Path)
    made = action("verify", _verify, "check every checksum, those of the files that each builds on too")
    made.add_argument("files", metavar="FILE", nargs="+", type=Path)


class Meter:
    """How far something is, on a terminal, once it has taken half a second."""

    def __init__(self, what: str, stream: TextIO = sys.stderr) -> None:
        self._what = what
        self._stream = stream
        self._next = time.monotonic() + _QUIET
        self._drawn = False

    def __call__(self, done: int, total: int) -> None:
        if self._stream.isatty() and time.monotonic() >= self._next:
            self._stream.write(f"\r{self._what}: {100 * done // max(total, 1)} %")
            self._stream.flush()
            self._next = time.monotonic() + 0.1
            self._drawn = True

    def end(self) -> None:
        """Take the line away again."""
        if self._drawn:
            self._stream.write("\r" + " " * (len(self._what) + 8) + "\r")


def shown(text: str) -> str:
    """A file's own text, which may hold anything, on one line of a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _list(options: argparse.Namespace) -> int:
    from kvm.snapshot.file import read

    files: list[SnapshotFile] = []
    failed = False
    for path in options.files:
        for each in sorted(path.iterdir()) if path.is_dir() else [path]:
            try:
                files.append(read(each))
            except SnapshotError as error:
                if not path.is_dir():  # a folder has other files too
                    print(f"vmdeck: {error}", file=sys.stderr)
                    failed = True
    by_identity = {file.head.identity: file for file in files}
    roots = [file for file in files if file.head.parent is None or file.head.parent.identity not in by_identity]

    def branch(file: SnapshotFile, depth: int) -> None:
        print("  " * depth + _line(file))
        for child in sorted(files, key=lambda each: each.head.taken):
            if child.head.parent is not None and child.head.parent.identity == file.head.identity:
                branch(child, depth + 1)

    for root in sorted(roots, key=lambda file: file.head.taken):
        branch(root, 0)
    for file in files:
        file.close()
    return FAILED if failed else SAME


def _line(file: SnapshotFile) -> str:
    head = file.head
    what = f"since {shown(head.parent.path)}" if head.parent else "whole"
    where = " ".join(f"{rip:#x}" for rip in file.head.state.position)
    name = f"  {shown(head.name)}" if head.name else ""
    return (
        f"{shown(str(file.path))}{name}  {_when(head.taken)}  {_stored(file)} stored, {what}  "
        f"{head.vcpus} VCPUs, {show_size(head.memory)}, {shown(head.backend)}  RIP {where}"
    )


def _info(options: argparse.Namespace) -> int:
    from kvm.snapshot.file import read

    for path in options.files:
        with read(path) as file:
            head = file.head
            lines = {
                "name": shown(head.name), "note": shown(head.note), "taken": f"{_when(head.taken)}, {shown(head.why)}",
                "identity": head.identity.hex(),
                "parent": f"{head.parent.identity.hex()} {shown(head.parent.path)}" if head.parent else "none",
                "machine": f"{head.vcpus} VCPUs, {show_size(head.memory)} of memory, {show_size(head.rom)} of ROM",
                "backend": shown(head.backend),
                "image": f"{shown(head.image.path)} ({shown(head.image.format)})" if head.image else "the parent's",
                "size": f"{head.file_size} bytes, {_stored(file)} stored",
                "memory in it": ", ".join(f"{extent.address:#x}–{extent.end - 1:#x}" for extent in head.extents[:8])
                + (f" and {len(head.extents) - 8} more" if len(head.extents) > 8 else ""),
                "devices": " ".join(shown(name) for name in head.state.devices),
                "chips": " ".join(shown(name) for name in head.state.machine),
            }  # fmt: skip
            print(shown(str(path)))
            for key, value in lines.items():
                if value:
                    print(f"  {key:<14}{value}")
            for index, (rip, copy) in enumerate(zip(head.state.position, head.state.vcpus, strict=True)):
                print(f"  {f'VCPU {index}':<14}RIP {rip:#x}; {' '.join(shown(name) for name in copy)}")
    return SAME


def _diff(options: argparse.Namespace) -> int:
    from kvm.snapshot import diff
    from kvm.snapshot.chain import open_chain

    code = SAME
    with open_chain(options.a) as a, open_chain(options.b) as b:
        a.verify()
        b.verify()
        for found in diff.states(a.state, b.state):
            print(f"{shown(found.where)}: {found.a or 'none'} → {found.b or 'none'}")
            code = DIFFERENT
        if a.head.memory != b.head.memory:
            print(f"memory: {show_size(a.head.memory)} → {show_size(b.head.memory)}")
            return DIFFERENT
        runs = diff.memory(a.contents(), b.contents(), a.head.memory)
        for run in islice(runs, options.lines):
            code = DIFFERENT
            left, right = (side[:_BYTES_SHOWN].hex(" ") for side in (run.a, run.b))
            more = f" … {len(run.a)} bytes" if len(run.a) > _BYTES_SHOWN else ""
            print(f"memory {run.address:#x}: {left} → {right}{more}")
        if rest := sum(1 for _ in runs):
            print(f"memory: {rest} more places; --lines shows more")
    return code


def _flatten(options: argparse.Namespace) -> int:
    from kvm.snapshot.chain import flatten

    meter = Meter(f"flattening {options.file.name}")
    try:
        written = flatten(options.file, options.to, meter)
    finally:
        meter.end()
    print(f"{shown(str(options.to))}: {written.size} bytes, {show_size(written.stored)} stored")
    return SAME


def _verify(options: argparse.Namespace) -> int:
    from kvm.snapshot.chain import open_chain

    code = SAME
    for path in options.files:
        meter = Meter(f"verifying {path.name}")
        try:
            with open_chain(path) as chain:
                chain.verify(meter)
        except SnapshotError as error:
            meter.end()
            print(f"vmdeck: {error}", file=sys.stderr)
            code = FAILED
        else:
            meter.end()
            print(f"{shown(str(path))}: whole, {len(chain.files)} file{'s' * (len(chain.files) > 1)}")
    return code


def _when(taken: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(taken))


def _stored(file: SnapshotFile) -> str:
    return f"{file.on_disk / (1 << 20):.1f} MiB"
