"""Guests from their sources: GNU as, ld and objcopy, from Debian's binutils.

The demo guest's binary is made by ``python -m tests.guests.assemble app/guests/demo.S app/guests/demo.elf``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

_OBJCOPY_TARGETS = {"bin": "binary", "elf32": "elf32-i386", "elf64": "elf64-x86-64"}


class BinutilsMissing(Exception):
    """as, ld or objcopy isn't installed; a test that needs one skips with this message."""


class AssemblyError(Exception):
    """The source doesn't assemble or link; the message is the tool's own."""


def assemble(source: Path, *, base: int, format: str) -> bytes:
    """The image of ``source``, its .text starting at ``base``: "bin" (flat), "elf32" or "elf64", entered at _start.

    The same source and binutils give the same bytes. ELF32 holds x86-64 code in an i386 container, as multiboot
    loaders want it.
    """
    target = _OBJCOPY_TARGETS[format]
    with tempfile.TemporaryDirectory() as folder:
        _tool("as", "--64", "-o", "guest.o", str(source.resolve()), folder=folder)
        _tool(
            *("ld", "-m", "elf_x86_64", "-nostdlib", "-n", "-z", "noseparate-code", "--build-id=none"),
            *("-Ttext", hex(base), "-e", "_start", "-o", "guest", "guest.o"),
            folder=folder,
        )
        _tool("objcopy", "-O", target, "guest", "image", folder=folder)
        return (Path(folder) / "image").read_bytes()


def _tool(*command: str, folder: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise BinutilsMissing(f"{command[0]} isn't installed; on Debian: apt-get install binutils") from None
    if done.returncode:
        raise AssemblyError(done.stderr)


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(assemble(Path(sys.argv[1]), base=0x100000, format="elf32"))
