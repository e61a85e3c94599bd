"""An initrd made here: a cpio archive ("newc", the kernel's buffer-format.rst) with /init, and a console for it.

``python -m tests.guests.initrd FILE`` writes one.
"""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "init.c"


class CompilerMissing(Exception):
    """No C compiler that links statically; a test that needs one skips with this message."""


def initrd(folder: Path) -> bytes:
    """With ``init.c`` as /init."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise CompilerMissing("needs a C compiler; on Debian: apt-get install gcc libc6-dev")
    program = folder / "init"
    done = subprocess.run(
        [compiler, "-static", "-O2", "-o", program, SOURCE], capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        raise CompilerMissing(f"{compiler} -static: {done.stderr}")
    return archive(("dev", stat.S_IFDIR | 0o755, b"", (0, 0)), ("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1)),
                   ("init", stat.S_IFREG | 0o755, program.read_bytes(), (0, 0)))  # fmt: skip


def archive(*files: tuple[str, int, bytes, tuple[int, int]]) -> bytes:
    """Each file's name, mode, contents and device number."""
    packed = b""
    for number, (name, mode, data, device) in enumerate((*files, ("TRAILER!!!", 0, b"", (0, 0)))):
        fields = (number + 1, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
        packed += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        packed += bytes(-len(packed) % 4) + data
        packed += bytes(-len(packed) % 4)
    return packed


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        Path(sys.argv[1]).write_bytes(initrd(Path(folder)))
