"""``vmdeck doctor``: what works on this machine, what doesn't, why, and what is lost without it."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from app.terminal import describe_terminal
from kvm.backends.choice import open_system
from kvm.errors import VmdeckError

if TYPE_CHECKING:
    from kvm.backends.interface import System

PACKAGES = ("textual", "rich", "unicorn", "cffi", "numpy", "capstone", "pyelftools", "pyte")

WIDTH = 96
"""Columns of running text."""

CHECK = b"\xb0V\xe6\xe9\xb0\x15\xe6\xf4\xf4"
"""mov al, 'V'; out 0xe9, al; mov al, 0x15; out 0xf4, al; hlt: real mode, the debug console, isa-debug-exit."""
CHECK_LIMIT = 20.0
"""Seconds for it; it takes milliseconds."""


def examine() -> int:
    """Print what there is to know; 0 if at least one backend can run guests, else 2."""
    _section("vmdeck", _versions())
    usable = [_backend("kvm", _kernel_rows), _backend("software", _software_rows)]
    _section("Terminal", describe_terminal())
    if not any(usable):
        print("\nNo backend can run guests here.")
    return 0 if any(usable) else 2


def _section(title: str, rows: Iterable[tuple[str, ...]]) -> None:
    """A title and rows of columns, aligned."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in rows), strict=True)]
    print(f"\n{title}")
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  " + "  ".join([*cells, row[-1]]).rstrip())
    sys.stdout.flush()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> list[tuple[str, ...]]:
    return [
        ("version", _version("vmdeck")),
        ("system", f"{platform.system()} {platform.release()} on {platform.machine()}"),
        ("Python", f"{platform.python_implementation()} {platform.python_version()}"),
        *((package, _version(package)) for package in PACKAGES),
    ]


def _backend(name: str, details: Callable[[System], None]) -> bool:
    """One backend: can it be opened, does a guest run on it, its details."""
    if name == "kvm":
        device, extension = _device(), _extension()
        rows: list[tuple[str, ...]] = [("/dev/kvm", device), ("extension", extension)]
    else:
        rows = []
    try:
        with closing(open_system(name)) as system:
            rows.append(("a guest", _self_check(system)))
            _section(f"Backend {name}: usable", rows)
            details(system)
    except VmdeckError as error:
        why = textwrap.wrap(str(error), WIDTH)
        _section(f"Backend {name}: NOT USABLE", [*rows, ("why", why[0]), *(("", line) for line in why[1:])])
        return False
    return True


def _device() -> str:
    path = "/dev/kvm"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"can't be opened: {error.strerror}"
    return "there, opens for reading and writing"


def _extension() -> str:
    from kvm.backends.kernel import library

    return "not built" if library.missing else "built"


def _kernel_rows(system: System) -> None:
    from kvm.backends.kernel.capabilities import CAPABILITIES
    from kvm.backends.kernel.system import KernelSystem
    from kvm.quirks import ignored
    from kvm.x86 import msrs

    _section(
        "KVM's capabilities, their values, and what each is for or what is lost without it",
        [(name, str(system.caps[name] or "MISSING"), lost) for name, lost in CAPABILITIES.items()],
    )
    assert isinstance(system, KernelSystem)
    _section(
        "MSRs that this KVM lists and then refuses: they are in no saved state",
        [(msrs.NAMES.get(index, hex(index)),) for index in system.refused_msrs()] or [("none",)],
    )
    _section(
        "What this KVM accepts and then ignores",
        [(quirk.what, quirk.lost) for quirk in ignored(system)] or [("nothing that vmdeck writes",)],
    )


def _software_rows(system: System) -> None:
    from kvm.backends.software.limits import LIMITS

    _section("Limits of the software backend", LIMITS)


def _self_check(system: System) -> str:
    """Run a guest of five instructions. Raises VmdeckError if it doesn't do what it should."""
    from kvm.boot import loader
    from kvm.machine import Machine, MachineConfig, Phase

    config = MachineConfig(vcpus=1, memory=1 << 20)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "check.bin"
        path.write_bytes(CHECK)
        image = loader.load(path, memory=config.memory, format="flat16", address=0x7C00)
    with Machine(system, image, config) as machine:
        machine.run()
        status = machine.wait(Phase.EXITED, Phase.STOPPED, timeout=CHECK_LIMIT)
        said, _ = machine.board.debug_console.since(0)
    if (status.phase, status.code, said) != (Phase.EXITED, 0x15, b"V"):
        raise VmdeckError(
            f"A test guest of five instructions did not do what it should: it is {status.phase.value}"
            f"{f' ({status.reason})' if status.reason else ''}, printed {said!r}. Please report this, with all of it."
        )
    return "ran: real mode, debug console, exit port"
